"""The parameters of every notebook: typed, documented, validated before any kernel starts.

A section per notebook. The defaults stand here alone: a chain of minutes, which ``params/toy.yaml`` is.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fedhubert_lib import audio, resources

ROOT = Path(__file__).resolve().parents[1]
"""The project: notebooks/, params/ and outputs/ lie here. Relative paths in parameters start here, too, so that the
working directory, which differs between JupyterLab, papermill and nbval, plays no part."""


def _from_root(path: str) -> str:
    if b"\0" in os.fsencode(path):  # which raises a ValueError of its own where text is no path
        raise ValueError("no path holds a NUL")
    return path if path in ("", "mfcc") else os.path.normpath(ROOT / os.path.expanduser(path))


SUITED = ("server_rate", "server_momentum", "server_tau")


def _suited(value: object, info: ValidationInfo) -> object:
    """``value``, or where none is set what suits the server and its clients, most measured: docs/federation.md."""
    if value is not None:
        return value
    cohort, momentum, tau = info.data.get("local_state") == "cohort", 0.9, 1e-3
    match info.data.get("server"):
        case "nesterov" | "fedavgm":
            rate, momentum = 0.7, 0.6
        case "fedadam":
            rate, momentum, tau = 0.033 if cohort else 0.05, 0.2, 0.03
        case "fedyogi" | "fedadagrad":  # at twice that rate: tau counts twice, since the second moment starts at tau^2
            rate, momentum, tau = 0.066 if cohort else 0.1, 0.2, 0.03
        case "fedavg" | "scaffold" | "trimmed-mean" | "median" | None:  # None: the server itself is refused
            rate = 1.0 if cohort else 1.5
        case server:
            raise ValueError(f"server {server} has no default; set one, or add its case to params._suited")
    return dict(zip(SUITED, (rate, momentum, tau), strict=True))[str(info.field_name)]


Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=1)]
Trim = Annotated[float, Field(gt=0, lt=0.5)]
SuitedDecay = Annotated[Decay, BeforeValidator(_suited)]
SuitedPositive = Annotated[Positive, BeforeValidator(_suited)]
NONE: Any = None  # whose type is that of a number to a type checker
Natural = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Clusters = Annotated[int, Field(ge=2, le=65_535)]
Place = Annotated[str, AfterValidator(_from_root)]
Device = Annotated[str, AfterValidator(resources.named)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=200)]
"""Of a folder: letters, digits and _ . - only."""

Codebook = Literal["federated", "one-shot", "client", "aligned", "random-projection", "central"]
Optimiser = Literal[
    "fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad", "scaffold", "trimmed-mean", "median"
]
Engine = Literal["inprocess", "pool", "ray", "deployment"]
Compression = Literal["none", "float16", "int8", "top-k"]
Objective = Literal["hubert", "soft-targets", "distilhubert"]

_DEVICE = "device that computes: auto, cpu, cuda, cuda:0 ..."
_ENGINE = "carrier of the messages between server and clients"


class Section(BaseModel):
    """The parameters that every notebook has."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    run: Name = Field("toy", description="folder under outputs/ that holds the run")
    seed: Count = Field(0, description="seed of every random draw of the stage")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that are fine one by one and cannot go together: (parameter, what is wrong and what to do)."""
        yield from ()


class Corpus(Section):
    """00_corpus: the speech to train on, and the keywords to evaluate on."""

    kind: Literal["synthetic", "librispeech", "folder"] = Field("synthetic", description="source of the speech")
    root: Place = Field("", description="folder of LibriSpeech subsets, or of a folder per speaker (kind: folder)")
    train_subsets: list[Name] = Field(["train-clean-100"], min_length=1, description="subsets to train on")
    test_subsets: list[Name] = Field(["test-clean"], description="subsets for unit quality, never trained on")
    alignments: Place = Field("", description="phone alignments: folder of TextGrids, or JSON; empty: none")
    speakers: Natural = Field(6, description="training speakers of the synthetic corpus")
    minutes: Positive = Field(1.5, description="minutes of training speech of the synthetic corpus")
    test_speakers: Natural = Field(2, description="other speakers of the synthetic corpus, for unit quality")
    test_minutes: Positive = Field(0.5, description="minutes of test speech of the synthetic corpus")
    keywords: Literal["synthetic", "speech-commands"] = Field("synthetic", description="built-in words or v0.02 folder")
    keywords_root: Place = Field("", description="folder that holds a folder per word (keywords: speech-commands)")
    keyword_voices: Annotated[int, Field(ge=3)] = Field(6, description="voices of the synthetic keywords")
    keyword_takes: Natural = Field(1, description="takes of each synthetic keyword by each voice")
    download: bool = Field(False, description="fetch missing subsets and keywords into their roots")
    mirror: str = Field("https://www.openslr.org/resources", description="address of LibriSpeech's archives")
    keywords_mirror: str = Field(
        "https://storage.googleapis.com/download.tensorflow.org/data", description="address of Speech Commands' archive"
    )
    decode_check: bool = Field(False, description="decode every file in full, not only its header and its end")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key, folder in ("kind", "root"), ("keywords", "keywords_root"):
            choice, value = getattr(self, key), getattr(self, folder)
            if choice != "synthetic" and not value:
                yield folder, f"empty, but {key}: {choice} needs the folder that holds it"
            if choice == "synthetic" and value:
                yield folder, f"{value!r}, but {key} is synthetic; set {key} to what lies there, or leave it empty"
        subsets = self.train_subsets + self.test_subsets
        if len(set(subsets)) < len(subsets):
            yield "test_subsets", "names a subset twice; test speech is never trained on, name each once"


class Partition(Section):
    """01_partition: which client owns which utterance."""

    scheme: Literal["speakers", "speaker", "sex", "chapter", "subset", "dirichlet", "quantity", "iid"] = Field(
        "speakers", description="rule that gives utterances to clients; see fedhubert_lib.partition"
    )
    clients: Natural = Field(3, description="number of clients (scheme speaker: at most)")
    alpha: Positive = Field(0.5, description="concentration of the Dirichlet scheme; smaller: clients differ more")
    power: Positive = Field(1.5, description="exponent of the quantity scheme's power law")
    validation_fraction: Fraction = Field(0.1, description="fraction of each client's utterances for validation")
    heldout_speakers: Count = Field(
        1, description="speakers of no client: the public speech of 02 (layer: auto) and, with the test subsets, of 05"
    )
    minimum_minutes: NotNegative = Field(0.1, description="minutes of speech that every client has at least")
    small_clients: Literal["error", "merge"] = Field("error", description="action on clients below the minimum")


class Kmeans(Section):
    """02_kmeans: the targets."""

    codebooks: list[Codebook] = Field(["federated", "client"], min_length=1, description="codebooks to fit and compare")
    features: Place = Field("mfcc", min_length=1, description="mfcc, or a checkpoint folder (the second iteration)")
    layer: Natural | Literal["auto"] = Field("auto", description="layer of the checkpoint; auto: best on public speech")
    clusters: Clusters = Field(20, description="clusters per codebook, K")
    normalisation: Literal["none", "speaker"] = Field("speaker", description="of the features, per dimension")
    sample_fraction: Part = Field(1.0, description="fraction of utterances that codebooks are fitted on")
    lloyd_rounds: Natural = Field(10, description="federated Lloyd rounds at most")
    tolerance: NotNegative = Field(1e-4, description="relative change of the inertia below which Lloyd rounds stop")
    minimum_count: Count = Field(0, description="frames of a cluster below which a client does not report it (privacy)")
    noise_multiplier: NotNegative = Field(0.0, description="standard deviation of noise, as a multiple of noise_clip")
    noise_clip: Positive = Field(100.0, description="norm that a client's sums and counts are scaled down to (privacy)")
    noise_seeded: bool = Field(False, description="noise from the seed, for simulations that repeat: NOT private")
    missing_clients: Count = Field(0, description="clients that may fail and be left out of training; more: an error")
    device: Device = Field("auto", description=_DEVICE)
    engine: Engine = Field("inprocess", description=_ENGINE)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(set(self.codebooks)) < len(self.codebooks):
            yield "codebooks", "names one of them twice; keep one"
        if self.features == "mfcc" and self.layer != "auto":
            yield "layer", f"{self.layer}, but features is mfcc, which has no layers; leave it out"
        if "central" in self.codebooks and self.engine == "deployment":
            yield "codebooks", "names central, which pools all data: in simulation only; leave it out"
        if self.minimum_count > 0 and "aligned" in self.codebooks:
            yield "minimum_count", "does not protect the codebook that aligned sends to others; leave aligned out"
        if self.noise_seeded and self.engine == "deployment":
            yield "noise_seeded", "is for simulations: whoever has the seed can subtract the noise; leave it out"
        if self.noise_multiplier > 0:
            if exposed := set(self.codebooks) - {"federated", "client", "random-projection"}:
                yield "noise_multiplier", f"protects federated, not {', '.join(sorted(exposed))}; leave out"
            if self.normalisation != "speaker":
                yield "noise_multiplier", "needs normalisation: speaker, which sends the server nothing"


class Model(Section):
    """Model."""

    model: Literal["tiny", "small", "base", "large"] = Field("tiny", description="preset of the model's sizes")
    front_end: Literal["waveform", "logmel"] = Field(
        "logmel", description="waveform: convolutions as published; logmel: cheaper, same 20 ms frames"
    )
    layers: Natural | None = Field(None, description="transformer layers; null: the preset's")
    hidden_size: Natural | None = Field(None, description="size of the transformer's frames; null: the preset's")
    attention_heads: Natural | None = Field(None, description="null: the preset's, or fewer that divide hidden_size")
    feed_forward_size: Natural | None = Field(None, description="null: the preset's, or four times hidden_size")
    conv_width: Natural | None = Field(None, description="channels of the convolutions (waveform); null: the preset's")


class LocalTraining(Section):
    """Local training."""

    local_steps: Natural = Field(2, description="optimiser steps of a client per round; with local_epochs, at most")
    local_epochs: Count = Field(0, description="passes of a client over its speech per round; 0: local_steps")
    batch_seconds: Positive = Field(16.0, description="seconds of audio per step")
    crop_seconds: Positive = Field(4.0, description="seconds of an utterance that a step sees at most")
    learning_rate: Positive = Field(1e-3, description="peak learning rate of the client's AdamW")
    warmup_fraction: Fraction = Field(0.08, description="fraction of all steps over which the rate rises")
    weight_decay: NotNegative = Field(0.01, description="weight decay of the client's AdamW, on all parameters")
    clip_norm: Positive = Field(10.0, description="gradient norm above which gradients are scaled down")
    mask_probability: Fraction = Field(
        0.8, description="fraction of frames in spans, overlap counted twice (0.8 masks about 57 %); at least two spans"
    )
    mask_length: Natural = Field(10, description="frames of a masked span")
    unmasked_weight: NotNegative = Field(1.0, description="initial weight of the loss on unmasked frames; published: 0")
    unmasked_decay: Fraction = Field(0.6, description="fraction of all steps over which it falls to 0; 0: it stays")
    proximal: NotNegative = Field(0.0, description="FedProx: weight of the squared distance to the global model")
    local_state: Literal["reset", "keep", "cohort"] = Field(
        "keep", description="AdamW moments of a client; cohort: sent with the weights and averaged by the server"
    )


class Server(Section):
    """Server."""

    rounds: Natural = Field(2, description="federated rounds")
    cohort: Natural = Field(3, description="clients per round, drawn by (seed, round)")
    server: Optimiser = Field("fedavg", description="server optimiser")
    server_rate: SuitedPositive = Field(
        NONE,
        description="learning rate of the server; null: 1.5 (with local_state: cohort 1); fedavgm and nesterov 0.7;"
        " fedadam 0.05 (cohort 0.033), fedyogi and fedadagrad twice that",
    )
    server_schedule: Literal["constant", "clients"] = Field(
        "constant", description="server_rate over the rounds; clients: it rises and falls as their learning rate"
    )
    server_momentum: SuitedDecay = Field(NONE, description="momentum; of adaptive ones beta 1; null: what suits it")
    server_beta2: Decay = Field(0.99, description="beta 2 of the adaptive optimisers")
    server_tau: SuitedPositive = Field(NONE, description="adaptivity tau of adaptive ones; null: what suits it")
    server_trim: Trim = Field(0.1, description="trimmed-mean: fraction of the values left out at each end")
    weighting: Literal["masked-frames", "clients"] = Field(
        "masked-frames", description="what updates are weighted by, but for scaffold's c, trimmed mean and median"
    )
    quorum: Fraction = Field(0.5, description="fraction of a cohort that must answer, else the round is repeated")
    deadline_seconds: NotNegative = Field(0.0, description="seconds after which an answer is left out; 0: wait")
    outlier: Factor = Field(100.0, description="an update this many times as long as last round's median is left out")
    validate_every: Natural = Field(1, description="rounds from one validation to the next")
    centralised: bool = Field(True, description="also train the baseline: pooled data, as many updates")


class Privacy(Section):
    """Privacy."""

    secure_aggregation: bool = Field(False, description="show the server sums only; scales updates to privacy_clip")
    privacy: Literal["none", "server", "client"] = Field("none", description="client-level DP: who adds the noise")
    privacy_clip: Positive = Field(1.0, description="norm an update is scaled down to; with a quantile, in round 1")
    privacy_quantile: Fraction = Field(0.0, description="quantile of the updates' norms that the norm follows; 0: none")
    privacy_noise: NotNegative = Field(1.0, description="standard deviation of the noise on the sum, in clipping norms")
    privacy_delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="delta at which epsilon is reported")
    privacy_seeded: bool = Field(False, description="noise from the seed, for simulations that repeat: NOT private")


class Transport(Section):
    """Transport."""

    engine: Engine = Field("inprocess", description=_ENGINE)
    compression: Compression = Field("none", description="compression of updates; int8, top-k: with error feedback")
    top_k_fraction: Part = Field(0.01, description="fraction of an update's values that top-k sends")


class Machine(Section):
    """Machine."""

    device: Device = Field("auto", description=_DEVICE)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of local steps; auto: bfloat16 where the machine is faster with it"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    threads: Count = Field(
        0, le=1024, description="threads of a client; 0: all cores; on CPUs with engine pool 1 is fastest"
    )


class Federation(Machine, Transport, Privacy, Server, LocalTraining, Model):
    """The parameters of both pretraining and distillation: six groups, of which the last base comes first."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.hidden_size and self.hidden_size % 16:
            yield "hidden_size", f"{self.hidden_size}; positions are convolved in 16 groups: give a multiple of 16"
        if self.conv_width is not None and self.front_end != "waveform":
            yield "conv_width", f"{self.conv_width}, but front_end is logmel, which has no convolutions"
        if self.crop_seconds > self.batch_seconds:
            yield "crop_seconds", f"{self.crop_seconds}; a batch holds batch_seconds: {self.batch_seconds} at most"
        frames = audio.frame_count(int(min(self.crop_seconds * audio.SAMPLE_RATE, audio.SHORTEST)))
        if self.mask_length > frames:
            yield "mask_length", f"{self.mask_length}; the shortest clip that a batch may hold has {frames} frames"
        if self.server in ("trimmed-mean", "median") and self.cohort < 3:
            yield "server", f"{self.server} needs a cohort of 3 or more, not {self.cohort}"
        needs_all = self.server in ("scaffold", "trimmed-mean", "median")
        protected = self.secure_aggregation or self.privacy != "none" or self.compression != "none"
        if self.local_state == "cohort" and (needs_all or protected):
            yield "local_state", "cohort goes with no privacy, compression or sum that is no mean; give keep or reset"
        if self.compression == "top-k" and (needs_all or self.privacy == "server"):
            yield "compression", "top-k sends few values, of all rounds so far: for a plain mean alone; give int8"
        if self.secure_aggregation:
            if self.privacy == "none" and self.privacy_quantile:
                yield "privacy_quantile", "is followed with privacy: server or client alone; set it to 0"
            if self.weighting != "clients" or self.compression != "none":
                yield "secure_aggregation", "needs weighting: clients, compression: none; it adds integers of one scale"
            if needs_all:
                yield "secure_aggregation", f"gives the server nothing but a sum; server: {self.server} needs more"
            if self.cohort < 3:
                yield "secure_aggregation", "needs a cohort of 3 or more; of two, one knows the other's update"
        if self.privacy != "none":
            if self.weighting != "clients":
                yield "privacy", "needs weighting: clients; by masked frames one client could weigh more than the noise"
            if needs_all:
                yield "privacy", f"adds its noise to a sum of updates; server: {self.server} takes no sum"
            if self.privacy_seeded and self.engine == "deployment":
                yield "privacy_seeded", "is for simulations: whoever has the seed can subtract the noise; leave it out"
            if self.privacy == "client" and self.compression != "none":
                yield "compression", "rounds each update, but privacy: client needs their exact sum; leave it out"


class Pretrain(Federation):
    """03_pretrain: masked prediction of the targets."""

    codebook: Codebook = Field("federated", description="codebook whose labels are predicted")
    head: Literal["shared", "personal"] = Field("shared", description="personal: each client keeps its own")
    initial: Place = Field("", description="checkpoint folder to start from, with its sizes; empty: random weights")


class Distill(Federation):
    """04_distill: a smaller student; what is not set here is taken from pretrain, except the model's sizes."""

    teacher: Place = Field("", description="checkpoint folder of the teacher, of the same codebook; empty: 03_pretrain")
    layers: Natural | None = Field(2, description="transformer layers of the student; null: the preset's")
    hidden_size: Natural | None = Field(96, description="size of the student's frames; null: the preset's")
    initial: Literal["random", "teacher"] = Field("random", description="teacher: start as its front end, first layers")
    send_teacher: bool = Field(False, description="send the teacher to clients once; False: they read its folder")
    objectives: list[Objective] = Field(["soft-targets", "distilhubert"], min_length=1, description="losses, summed")
    codebook: Codebook = Field("federated", description="codebook whose labels the k-means loss predicts")
    temperature: Positive = Field(4.0, description="temperature of teacher's and student's predictions (soft_weight)")
    soft_weight: Fraction = Field(0.0, description="alpha: weight of the teacher's predictions in soft-targets")
    label_weight: Fraction = Field(1.0, description="beta: weight of the k-means labels in soft-targets")
    teacher_layer: Natural | None = Field(None, description="layer of hubert's clusters; null: half the depth")
    teacher_clusters: Clusters = Field(20, description="clusters of that layer, K")
    regression_weight: Positive = Field(1.0, description="weight of distilhubert in the sum")
    hubert_weight: Positive = Field(1.0, description="weight of hubert in the sum")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if "soft-targets" in self.objectives and self.soft_weight + self.label_weight == 0:
            yield "soft_weight", "0, and label_weight is 0, too: nothing is left to learn from"
        if len(set(self.objectives)) < len(self.objectives):
            yield "objectives", "names one of them twice; keep one, and give it the weight"
        if {"hubert", "soft-targets"} <= set(self.objectives):
            yield "objectives", "hubert and soft-targets predict different clusters; keep one of them"


class Evaluate(Section):
    """05_evaluate: keywords and units, beside the baselines."""

    seeds: Natural = Field(3, description="evaluation seeds, each with its draw of training clips and its probe")
    train_fraction: Part = Field(0.8, description="fraction of training clips that each seed draws (fine-tuning: all)")
    probe_steps: Natural = Field(100, description="steps of the keyword probe")
    probe_rate: Positive = Field(1e-2, description="learning rate of the keyword probe")
    standardise: bool = Field(True, description="scale features by the training clips; False: as they are (s3prl)")
    task: Literal["words", "superb"] = Field("words", description="all words, or SUPERB's ten, unknown and silence")
    fine_tune_steps: Count = Field(0, description="steps of training the whole model on the words; 0: do not")
    fine_tune_rate: Positive = Field(1e-4, description="learning rate of that training")
    clusters: Clusters = Field(20, description="clusters of the units made from hidden layers, K")
    unit_minutes: Positive = Field(1.0, description="minutes of held-out speech for unit quality")
    checkpoint: Place = Field("", description="a model folder to evaluate beside the run's; 03 and 04 may be missing")
    along: bool = Field(False, description="also evaluate intermediate checkpoints: quality over hours heard")
    device: Device = Field("auto", description=_DEVICE)


SECTIONS: dict[str, type[Section]] = {
    "corpus": Corpus,
    "partition": Partition,
    "kmeans": Kmeans,
    "pretrain": Pretrain,
    "distill": Distill,
    "evaluate": Evaluate,
}
"""The stages in order, each with the schema of its notebook."""

FOLDERS = {stage: f"{number:02d}_{stage}" for number, stage in enumerate(SECTIONS)}
"""The name of each stage's notebook, and of its folder in a run."""

HOW = frozenset(
    ["run", "engine", "threads", "device", "gradient_checkpointing", "deadline_seconds", "send_teacher"]
    + ["download", "mirror", "keywords_mirror"]
)
"""Parameters that say where and how a stage runs, not what comes out."""
ADDITIONS = frozenset({"centralised", "along", "missing_clients", "quorum"})
"""Parameters that add to what is there, or allow that some of it is missing, and change nothing of it."""
REMOVED = {"cohort_fraction": 1.0, "position_embedding": "conv", "patience": 0}
"""Parameters of earlier versions, with the values at which those did what is done now."""


def places(section: Section) -> dict[str, str]:
    """The parameters that point to a file or folder, with where they point."""
    fields = type(section).model_fields
    names = [n for n, field in fields.items() if any(getattr(m, "func", None) is _from_root for m in field.metadata)]
    return {name: value for name in names if (value := getattr(section, name)) not in ("", "mfcc")}
