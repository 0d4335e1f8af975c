"""The parameters of every notebook: typed, documented, validated before any kernel starts.

One YAML file is one study. Its top level holds ``study``, ``seed`` and, where it builds on another file, ``base``; six
sections, one per notebook, hold what differs from the defaults. The defaults stand here alone: a chain of seconds,
which ``params/toy.yaml`` is. Distillation takes over from pretraining what both have, but for the model's shape.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fedhubert_lib import audio, wording, yaml12

ROOT = Path(__file__).resolve().parents[1]
"""The project: notebooks/, params/ and outputs/ lie here. Relative paths in parameters start here, too, so that the
working directory, which differs between JupyterLab, papermill and nbval, plays no part."""


def device(name: str) -> str:
    """``name``, which says where something computes. Raises ValueError where it is none of those that can."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is None:
        why = "; mps does not have float64, in which norms and sums are taken" if name.startswith("mps") else ""
        raise ValueError(f"auto, cpu, cuda or cuda:NUMBER is expected{why}")
    return name


def _from_root(path: str) -> str:
    return path if path in ("", "mfcc") else os.path.normpath(ROOT / Path(path).expanduser())


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Place = Annotated[str, AfterValidator(_from_root)]
"""A file or folder; a relative one starts at the project's root."""
Device = Annotated[str, AfterValidator(device)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
"""Of a folder: letters, digits and _ . - only."""

Codebook = Literal["federated", "one-shot", "client", "aligned", "random-projection", "central"]
Optimiser = Literal[
    "fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad", "scaffold", "trimmed-mean", "median"
]
Preset = Literal["tiny", "small", "base", "large"]
FrontEnd = Literal["waveform", "logmel"]
PositionEmbedding = Literal["conv", "sinusoidal"]
Head = Literal["shared", "personal"]
Engine = Literal["inprocess", "pool", "ray", "deployment"]
Compression = Literal["none", "float16", "int8", "top-k"]
Precision = Literal["auto", "float32", "bfloat16"]
Objective = Literal["hubert", "soft-targets", "distilhubert"]
Compared = Literal["hubert", "soft-targets", "distilhubert", "labels"]


class Section(BaseModel):
    """What the parameters of every notebook have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    run: Name = Field("toy", description="folder under outputs/ that holds the run")
    seed: Count = Field(0, description="every random draw of the stage comes from it")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that are fine one by one and cannot go together: (parameter, what is wrong and what to do)."""
        yield from ()


class Corpus(Section):
    """00_corpus: which speech, and which keywords to evaluate on."""

    kind: Literal["synthetic", "librispeech"] = Field(
        "synthetic", description="built-in corpus, or LibriSpeech folders"
    )
    root: Place = Field("", description="folder that holds the LibriSpeech subsets (kind: librispeech)")
    train_subsets: list[Name] = Field(["train-clean-100"], description="subsets to train on")
    test_subsets: list[Name] = Field(["test-clean"], description="subsets kept for unit quality, never trained on")
    alignments: Place = Field("", description="phone alignments: folder of TextGrids, or JSON; empty: none")
    speakers: Natural = Field(6, description="speakers of the synthetic corpus")
    minutes: Positive = Field(1.5, description="minutes of speech of the synthetic corpus")
    test_speakers: Natural = Field(2, description="other speakers of the synthetic corpus, kept for unit quality")
    test_minutes: Positive = Field(0.5, description="minutes of speech of those")
    keywords: Literal["synthetic", "speech-commands"] = Field(
        "synthetic", description="built-in words, or v0.02 folder"
    )
    keywords_root: Place = Field("", description="folder that holds a subfolder per word (keywords: speech-commands)")
    keyword_voices: Annotated[int, Field(ge=3)] = Field(6, description="voices of the synthetic keywords")
    keyword_takes: Natural = Field(1, description="takes of each word by each voice of the synthetic keywords")
    download: bool = Field(False, description="fetch subsets and keywords that are not there, into their roots")
    mirror: str = Field("https://www.openslr.org/resources", description="where LibriSpeech's archives lie")
    keywords_mirror: str = Field(
        "https://storage.googleapis.com/download.tensorflow.org/data", description="where Speech Commands' archive lies"
    )
    decode_check: bool = Field(False, description="decode every file in full, not only its header")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for kind, key, folder in ("librispeech", "kind", "root"), ("speech-commands", "keywords", "keywords_root"):
            chosen, given = getattr(self, key) == kind, getattr(self, folder)
            if chosen and not given:
                yield folder, f"{key}: {kind} needs the folder that holds it; none given"
            if given and not chosen:
                yield (
                    folder,
                    f"{given!r} given, but {key} is {getattr(self, key)}; set {key}: {kind}, or leave it empty",
                )
        both = set(self.train_subsets) & set(self.test_subsets)
        if self.kind == "librispeech" and both:
            yield (
                "test_subsets",
                f"{', '.join(sorted(both))} is also among train_subsets; test speech is never trained on",
            )
        for key in ("train_subsets", "test_subsets"):
            if twice := sorted({name for name in getattr(self, key) if getattr(self, key).count(name) > 1}):
                yield key, f"{', '.join(twice)} given twice; name each subset once"
        if self.kind == "librispeech" and not self.train_subsets:
            yield "train_subsets", "an empty list given; name at least one subset"


class Partition(Section):
    """01_partition: who owns which utterance."""

    scheme: Literal["speakers", "speaker", "sex", "chapter", "subset", "dirichlet", "quantity", "iid"] = Field(
        "speakers", description="how utterances are given to clients; see fedhubert_lib.partition"
    )
    clients: Natural = Field(3, description="number of clients (scheme speaker: at most)")
    alpha: Positive = Field(0.5, description="concentration of the Dirichlet scheme: smaller is less alike")
    power: Positive = Field(1.5, description="exponent of the quantity scheme's power law")
    validation_share: Share = Field(0.1, description="share of each client's utterances kept for validation")
    heldout_speakers: Count = Field(1, description="speakers given to no client: the global validation set")
    minimum_minutes: float = Field(0.1, ge=0, description="a client below it is an error, or merged")
    small_clients: Literal["error", "merge"] = Field("error", description="what to do with a client below the minimum")


class Kmeans(Section):
    """02_kmeans: the targets."""

    codebooks: list[Codebook] = Field(["federated", "client"], min_length=1, description="codebooks to fit and compare")
    features: Place = Field("mfcc", description="mfcc, or a checkpoint folder: the second iteration")
    layer: Natural | Literal["auto"] = Field("auto", description="of that checkpoint; auto: whose units are best")
    clusters: Annotated[int, Field(ge=2, le=65_535)] = Field(20, description="K")
    normalisation: Literal["none", "global", "speaker"] = Field("speaker", description="of the features, per dimension")
    sample_share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of utterances used to fit")
    lloyd_rounds: Natural = Field(10, description="at most so many federated Lloyd rounds")
    tolerance: float = Field(1e-4, ge=0, description="stop when the inertia falls by a smaller share than this")
    minimum_count: Count = Field(0, description="a client reports no cluster with fewer frames than this (privacy)")
    noise_multiplier: float = Field(0.0, ge=0, description="Gaussian noise on sums and counts (privacy); 0: none")
    noise_clip: Positive = Field(100.0, description="norm that a client's sums and counts are scaled down to (privacy)")
    noise_seeded: bool = Field(False, description="noise from the seed, for simulations that repeat: NOT private")
    missing_clients: Count = Field(0, description="clients that may fail and be left out of training; more: an error")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    engine: Engine = Field("inprocess", description="what carries the messages")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(set(self.codebooks)) < len(self.codebooks):
            yield "codebooks", "names one of them twice; keep one"
        if not self.features:
            yield "features", "nothing given; mfcc, or a checkpoint folder"
        if self.features == "mfcc" and self.layer != "auto":
            yield "layer", f"{self.layer} given, but features is mfcc, which has no layers; leave it out"
        if "central" in self.codebooks and self.engine == "deployment":
            yield "codebooks", "names central, which pools all data: in simulation only; leave it out"
        if self.minimum_count > 0 and "aligned" in self.codebooks:
            yield "minimum_count", "protects no codebook that aligned lends to others; leave aligned out of codebooks"
        if self.noise_seeded and self.engine == "deployment":
            yield "noise_seeded", "is for simulations: who knows the seed subtracts the noise; leave it out"
        if self.noise_multiplier > 0:
            if exposed := {"one-shot", "aligned", "central"} & set(self.codebooks):
                yield (
                    "noise_multiplier",
                    f"protects the federated codebook, not {', '.join(sorted(exposed))}; leave out",
                )
            if self.normalisation != "speaker":
                yield (
                    "noise_multiplier",
                    "needs normalisation: speaker, which scales features and tells the server nothing",
                )


class Federation(Section):
    """What pretraining and distillation have in common: model, rounds, local updates, server."""

    model: Preset = Field("tiny", description="size of the model that is trained")
    front_end: FrontEnd = Field("logmel", description="waveform as published; logmel: cheaper, same 20 ms frames")
    layers: Natural | None = Field(None, description="transformer layers; none: the preset's")
    hidden_size: Natural | None = Field(None, description="size of the transformer's frames; none: the preset's")
    attention_heads: Natural | None = Field(None, description="none: the preset's, or fewer that divide hidden_size")
    feed_forward_size: Natural | None = Field(None, description="none: the preset's, or four times hidden_size")
    conv_width: Natural | None = Field(None, description="channels of the convolutions (waveform); none: the preset's")
    position_embedding: PositionEmbedding = Field("conv", description="conv as published; sinusoidal: no parameters")
    rounds: Natural = Field(2, description="federated rounds")
    cohort: Natural = Field(3, description="clients per round, drawn by (seed, round)")
    cohort_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of all clients per round; cohort is then the most, cohort_minimum the fewest"
    )
    cohort_minimum: Natural = Field(1, description="clients per round at least, with a cohort_share below 1")
    local_steps: Natural = Field(2, description="optimiser steps of a client per round; with local_epochs, at most")
    local_epochs: Count = Field(0, description="passes over its own speech that a client makes per round; 0: by steps")
    batch_seconds: Positive = Field(16.0, description="seconds of audio per step")
    crop_seconds: Positive = Field(4.0, description="longest crop of an utterance")
    learning_rate: Positive = Field(1e-3, description="peak rate of the client's AdamW")
    warmup_share: Share = Field(0.08, description="share of all steps over which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="of the client's AdamW, on all parameters")
    clip_norm: Positive = Field(10.0, description="gradient norm above which it is scaled down")
    mask_probability: Share = Field(
        0.8, description="expected share of frames in spans before overlap: 8 % starts x 10"
    )
    mask_length: Natural = Field(10, description="frames of a masked span")
    unmasked_weight: float = Field(
        1.0, ge=0, description="weight of the loss on frames that are not masked, at the start; 0: as published"
    )
    unmasked_decay: Share = Field(0.6, description="fraction of all steps over which it falls to 0; 0: it stays")
    server: Optimiser = Field("fedavg", description="server optimiser")
    server_rate: Positive = Field(1.5, description="rate of the server optimiser")
    server_schedule: Literal["constant", "clients"] = Field(
        "constant", description="of server_rate over the rounds; clients: it rises and falls as their learning rate"
    )
    server_momentum: Share = Field(0.9, description="momentum of fedavgm and nesterov, beta 1 of the adaptive ones")
    server_beta2: Share = Field(0.99, description="beta 2 of the adaptive optimisers")
    server_tau: Positive = Field(1e-3, description="adaptivity of the adaptive optimisers")
    server_trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.1, description="trimmed-mean: share cut at each end")
    proximal: float = Field(0.0, ge=0, description="FedProx: weight of the squared distance to the global model")
    weighting: Literal["masked-frames", "clients"] = Field("masked-frames", description="of updates in their mean")
    local_state: Literal["reset", "keep"] = Field("keep", description="AdamW moments of a client from round to round")
    quorum: Share = Field(0.5, description="share of a cohort that must answer, else the round is repeated")
    deadline_seconds: float = Field(0.0, ge=0, description="an answer later than this is left out; 0: wait")
    outlier: Annotated[float, Field(gt=1)] = Field(100.0, description="an update this many times too large is left out")
    compression: Compression = Field("none", description="of what a client sends; int8, top-k: with error feedback")
    top_k_share: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="share of an update that top-k sends")
    secure_aggregation: bool = Field(False, description="the server learns sums only; scales updates to privacy_clip")
    privacy: Literal["none", "server", "client"] = Field("none", description="client-level DP: who adds the noise")
    privacy_clip: Positive = Field(1.0, description="norm an update is scaled down to; with a quantile, in round 1")
    privacy_quantile: Share = Field(0.0, description="the norm follows this quantile of the updates' norms; 0: stays")
    privacy_noise: float = Field(1.0, ge=0, description="deviation of the noise on a cohort's sum, in clipping norms")
    privacy_delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="epsilon is reported at this delta")
    privacy_seeded: bool = Field(False, description="noise from the seed, for simulations that repeat: NOT private")
    validate_every: Natural = Field(1, description="rounds from one validation to the next")
    patience: Count = Field(0, description="stop after so many validations without a better loss; 0: never")
    precision: Precision = Field("auto", description="of the local steps: bfloat16 where the machine is faster with it")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    engine: Engine = Field("inprocess", description="what carries the messages")
    threads: Count = Field(0, description="threads of a client on a CPU; 0: all cores; with engine pool 1 is fastest")
    centralised: bool = Field(True, description="also train on the pooled data with equal updates: the yardstick")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.crop_seconds > self.batch_seconds:
            yield (
                "crop_seconds",
                f"{self.crop_seconds} given; a batch holds batch_seconds: {self.batch_seconds} at most",
            )
        if self.mask_length > (frames := audio.frame_count(int(self.crop_seconds * audio.SAMPLE_RATE))):
            yield (
                "mask_length",
                f"{self.mask_length} frames do not fit into crop_seconds: {self.crop_seconds}, or {frames}",
            )
        if self.hidden_size and self.hidden_size % 16:
            yield "hidden_size", f"{self.hidden_size} given; positions are convolved in 16 groups: a multiple of 16"
        if self.hidden_size and self.attention_heads and self.hidden_size % self.attention_heads:
            yield "attention_heads", f"{self.attention_heads} given; it must divide hidden_size: {self.hidden_size}"
        if self.conv_width is not None and self.front_end != "waveform":
            yield "conv_width", f"{self.conv_width} given, but front_end is logmel, which has no convolutions"
        if self.cohort_minimum > self.cohort:
            yield "cohort_minimum", f"{self.cohort_minimum} given, but cohort, the most, is {self.cohort}"
        fewest = self.cohort if self.cohort_share == 1 else self.cohort_minimum
        if self.server == "trimmed-mean" and fewest < 3:
            yield "server", f"trimmed-mean needs a cohort of 3 or more; this one may be {fewest}"
        if self.secure_aggregation:
            if self.weighting != "clients" or self.compression != "none":
                yield "secure_aggregation", "needs weighting: clients, compression: none; it adds integers of one scale"
            if self.server in ("scaffold", "trimmed-mean", "median"):
                yield "secure_aggregation", f"gives the server a sum and nothing else; server: {self.server} needs more"
            if fewest < 3:
                yield "secure_aggregation", f"needs a cohort of 3 or more; of {fewest}, each can tell the other's"
        if self.privacy != "none":
            if self.weighting != "clients":
                yield "privacy", "needs weighting: clients; by masked frames one client could weigh more than the noise"
            if self.server in ("scaffold", "trimmed-mean", "median"):
                yield "privacy", f"its noise is made for a sum of updates; server: {self.server} takes no sum"
            if self.patience:
                yield "patience", "stops by losses that no noise covers, which privacy rules out; set it to 0"
            if self.privacy_seeded and self.engine == "deployment":
                yield "privacy_seeded", "is for simulations: who knows the seed subtracts the noise; leave it out"
            if self.privacy == "client" and self.compression != "none":
                yield "compression", "rounds each update, but privacy: client counts on their exact sum; leave it out"


class Pretrain(Federation):
    """03_pretrain: masked prediction of the targets."""

    codebook: Codebook = Field("federated", description="whose labels to predict")
    head: Head = Field("shared", description="personal: projection and label embeddings stay with the client")
    initial: Place = Field("", description="checkpoint folder to start from; empty: random weights")


class Distill(Federation):
    """04_distill: a smaller student learns from the pretrained teacher, over the same federation."""

    teacher: Place = Field("", description="checkpoint folder; empty: what 03_pretrain of this run wrote")
    layers: Natural | None = Field(2, description="transformer layers of the student; none: the preset's")
    hidden_size: Natural | None = Field(96, description="size of the student's frames; none: the preset's")
    initial: Literal["random", "teacher"] = Field("random", description="teacher: its front end and first layers")
    send_teacher: bool = Field(
        False, description="send it to clients once, as a deployment does; False: they read its folder"
    )
    objectives: list[Objective] = Field(["soft-targets"], min_length=1, description="what the student learns; summed")
    codebook: Codebook = Field("federated", description="whose labels the k-means part of the objective predicts")
    temperature: Positive = Field(4.0, description="softens teacher and student predictions")
    soft_weight: Share = Field(0.7, description="alpha: weight of the teacher's soft targets")
    label_weight: Share = Field(0.3, description="beta: weight of the k-means labels")
    teacher_layer: Natural | None = Field(None, description="whose clusters hubert predicts; none: half the depth")
    teacher_clusters: Annotated[int, Field(ge=2, le=65_535)] = Field(20, description="K of these clusters")
    regression_weight: Positive = Field(1.0, description="weight of distilhubert in the sum")
    hubert_weight: Positive = Field(1.0, description="weight of hubert in the sum")
    compare: list[Compared] = Field([], description="objectives to compare, each alone; labels: without a teacher")
    compare_seeds: Natural = Field(3, description="training seeds of that comparison")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if "soft-targets" in {*self.objectives, *self.compare} and self.soft_weight + self.label_weight == 0:
            yield "soft_weight", "0 given, and label_weight is 0, too: nothing is left to learn from"
        if len(set(self.objectives)) < len(self.objectives):
            yield "objectives", "names one of them twice; keep one, and give it the weight"
        if {"hubert", "soft-targets"} <= set(self.objectives):
            yield "objectives", "hubert and soft-targets predict different clusters; keep one of them"


class Evaluate(Section):
    """05_evaluate: keywords and units, beside the baselines."""

    seeds: Natural = Field(3, description="evaluation seeds: each draws its own training clips and probe")
    train_share: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="share of training clips each seed draws")
    probe_steps: Natural = Field(100, description="steps of the keyword probe")
    probe_rate: Positive = Field(1e-2, description="learning rate of the keyword probe")
    standardise: bool = Field(True, description="scale features by the training clips; False: s3prl to the letter")
    task: Literal["words", "superb"] = Field("words", description="all words, or SUPERB's ten, unknown and silence")
    fine_tune_steps: Count = Field(0, description="steps of training the whole model on the words, too; 0: do not")
    fine_tune_rate: Positive = Field(1e-4, description="learning rate of that")
    clusters: Annotated[int, Field(ge=2, le=65_535)] = Field(20, description="K of the units made from hidden layers")
    unit_minutes: Positive = Field(1.0, description="minutes of held-out speech for unit quality")
    checkpoint: Place = Field("", description="a model folder to evaluate beside the run's; 03 and 04 may be missing")
    along: bool = Field(False, description="evaluate the checkpoints on the way, too: quality over hours heard")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:0 ...")


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


SHAPE = {"layers", "hidden_size", "attention_heads", "feed_forward_size", "conv_width"}
"""What a student does not take over from its teacher's pretraining."""


class Study(BaseModel):
    """One YAML file: a name, a seed, and the parameters of the six notebooks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    study: Name = Field(description="name of the study")
    run: Name = Field(description="folder under outputs/ that holds the run")
    seed: Count = Field(description="of every section that sets none itself")
    corpus: Corpus
    partition: Partition
    kmeans: Kmeans
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Values that cannot go together: (section, parameter, what is wrong and what to do)."""
        for stage in SECTIONS:
            yield from ((stage, key, text) for key, text in getattr(self, stage).conflicts())
        corpus, partition = self.corpus, self.partition
        if corpus.kind == "synthetic" and partition.heldout_speakers >= corpus.speakers:
            text = (
                f"{partition.heldout_speakers} given, but corpus.speakers is {corpus.speakers}; leave some to train on"
            )
            yield "partition", "heldout_speakers", text
        for stage in ("pretrain", "distill"):
            section = getattr(self, stage)
            if section.cohort > partition.clients:
                text = f"{section.cohort} given, but partition.clients is {partition.clients}; give that or fewer"
                yield stage, "cohort", text
            if section.codebook not in self.kmeans.codebooks:
                fitted = ", ".join(self.kmeans.codebooks)
                yield stage, "codebook", f"{section.codebook} given, but kmeans.codebooks has {fitted}; add it there"
        distill = self.distill
        soft = "soft-targets" in {*distill.objectives, *distill.compare}
        if soft and distill.soft_weight > 0 and not distill.teacher and self.pretrain.head == "personal":
            text = "soft-targets needs the teacher's head, but pretrain.head: personal keeps it; give others"
            yield "distill", "objectives" if "soft-targets" in distill.objectives else "compare", text
        if soft and not distill.teacher and distill.label_weight > 0 and distill.codebook != self.pretrain.codebook:
            text = (
                f"{distill.codebook} given, but the teacher's soft targets are over pretrain.codebook: "
                f"{self.pretrain.codebook}; give the same, or label_weight: 0"
            )
            yield "distill", "codebook", text


class ParameterError(ValueError):
    """Wrong parameters: every one of them, each with its place and what may stand there."""

    def _render_traceback_(self) -> list[str]:  # IPython's name: in a notebook the message alone
        return [str(self)]


def load(path: str | Path, overrides: Sequence[str] = (), run: str | None = None) -> Study:
    """Read the study file ``path`` and put ``overrides`` (``section.key=value``, ``seed=1``) on top.

    What neither the file nor its ``base`` says has its default; what ``distill`` does not say and ``pretrain`` does is
    pretraining's (``inherit``). ``run`` names the folder under outputs/; default: the file's own ``run``,
    else its ``study``, else the file's name. The top level's ``seed`` holds in every section that sets none. Raises
    ParameterError with all errors at once.
    """
    path = Path(path)
    raw, places, errors = _read(path)
    if errors and not places:  # no file to speak of: what else is wrong with it cannot be known
        raise ParameterError("\n".join(errors))
    for override in overrides:
        try:
            key = _override(raw, override)
        except ValueError as error:
            errors.append(f"--set {override}: {error}")
        else:
            places[key] = f"--set {override}"
    inherited = inherit(raw)
    raw.setdefault("study", path.stem)
    raw["run"] = run or raw.get("run", raw["study"])
    raw.setdefault("seed", 0)
    for stage in SECTIONS:
        section = raw[stage] = {} if raw.get(stage) is None else raw[stage]
        if isinstance(section, dict):
            if "run" in section:
                errors.append(f"{places[stage, 'run']}: {stage}.run: one folder is one run; set run at the top level")
            section["run"] = raw["run"]
            section.setdefault("seed", raw["seed"])

    def place(key: yaml12.Key) -> str:
        return places.get(key) or places.get(key[:1]) or str(path)

    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        flowed = {(stage, key) for stage in SECTIONS for key in ("run", "seed")} - places.keys()
        flowed |= {("distill", key) for key in inherited}
        errors += wording.explain([item for item in error.errors() if item["loc"] not in flowed], Study, place)
    else:
        errors += [f"{place((stage, key))}: {stage}.{key}: {text}" for stage, key, text in study.conflicts()]
    if errors:
        raise ParameterError("\n".join(dict.fromkeys(errors)))
    return study


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[yaml12.Key, str], list[str]]:
    """The values of a study file over those of its ``base``, the place of each key, and what is wrong."""
    raw, lines, errors = yaml12.read(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    if (name := raw.pop("base", None)) is None:
        return raw, places, errors
    base = path.parent / str(name)
    if base.resolve() in (path.resolve(), *above):
        return raw, places, [*errors, f"{places['base',]}: base: {name} rests on this file; name another"]
    under, under_places, under_errors = _read(base, (*above, path.resolve()))
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            under[key] |= value
        else:
            under[key] = value
    if "study" not in raw:
        under.pop("study", None)
    return under, under_places | places, under_errors + errors


def inherit(sections: dict[str, Any]) -> set[str]:
    """Put what ``pretrain`` says of the federation, and ``distill`` does not, into ``distill``; returns the names."""
    pretrain, distill = sections.get("pretrain"), sections.get("distill", {})
    if not isinstance(pretrain, dict) or not isinstance(distill or {}, dict):
        return set()
    common = (Federation.model_fields.keys() | {"codebook"}) - Section.model_fields.keys() - SHAPE
    names = (pretrain.keys() & common) - (distill or {}).keys()
    sections["distill"] = {name: pretrain[name] for name in names} | (distill or {})
    return names


def check(stage: str, namespace: Mapping[str, Any]) -> Section:
    """The parameters of ``stage`` from ``namespace``, the variables that its notebook has set: its ``globals()``.

    A variable with a plain value whose name is no parameter is an error, since papermill injects a misspelt parameter
    without a word; names that begin with an underscore are the notebook's own. What is not set has its default: the
    parameters cell shows only what its reader may want to change. A study file given to plain ``papermill -f`` arrives
    as one mapping per section; the stage's own is then put over the values of the cell.
    """
    schema, where = SECTIONS[stage], f"parameters of {FOLDERS[stage]}"
    plain = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, bool | int | float | str | list | tuple | set | dict | None)
        and not name.startswith("_")
        and name not in ("In", "Out")  # IPython's
    }
    sections = {name: plain.pop(name) for name in SECTIONS if isinstance(plain.get(name), dict)}
    if sections:
        inherit(sections)
        study = {"run": plain.pop("study")} if "study" in plain else {}
        plain |= study | sections.get(stage, {})
    for name, value in plain.items():
        if isinstance(value, str) and not _is_text(schema, name):
            plain[name] = yaml12.scalar(value)  # papermill reads YAML 1.1, to which 1e-3 is text
    try:
        section = schema.model_validate(plain)
    except ValidationError as error:
        raise ParameterError("\n".join(wording.explain(error.errors(), schema, lambda key: where, (stage,)))) from None
    if errors := [f"{where}: {stage}.{key}: {text}" for key, text in section.conflicts()]:
        raise ParameterError("\n".join(errors))
    return section


def described(stage: str) -> str:
    """All parameters of ``stage`` as text: name and default, what may stand there, what it is."""
    lines = [f"{stage}:  # {(SECTIONS[stage].__doc__ or '').splitlines()[0]}"]
    for name, content in SECTIONS[stage].model_json_schema()["properties"].items():
        default = yaml.safe_dump(content["default"], default_flow_style=True).removesuffix("\n...\n").strip()
        lines.append(f"  {name}: {default}  # {content['description']} ({wording.allowed(content)})")
    return "\n".join(lines)


def places(section: Section) -> dict[str, str]:
    """The parameters that point to a file or folder, with where they point."""
    values = {name: getattr(section, name) for name, field in type(section).model_fields.items() if _is_place(field)}
    return {name: value for name, value in values.items() if value not in ("", "mfcc")}


def absent(section: Section) -> dict[str, str]:
    """Those of ``places`` that are not there. What the stage may download need not be."""
    fetched = {"root", "keywords_root"} if isinstance(section, Corpus) and section.download else set()
    return {n: place for n, place in places(section).items() if n not in fetched and not Path(place).exists()}


def _is_place(field: FieldInfo) -> bool:
    return any(getattr(item, "func", None) is _from_root for item in field.metadata)


def _override(raw: dict[str, Any], override: str) -> yaml12.Key:
    """Put ``section.key=value`` into ``raw`` and return its key."""
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key) or len(key) > 2 or key[0] in SECTIONS and len(key) == 1:
        raise ValueError("section.parameter=value is expected, or study, run or seed=value")
    if len(key) == 1:
        raw[key[0]] = yaml12.value(text)
    elif key[0] not in SECTIONS:
        raise ValueError(f"no section {key[0]!r}{wording.nearest(key[0], SECTIONS)}")
    else:
        section = raw[key[0]] = {} if raw.get(key[0]) is None else raw[key[0]]
        if not isinstance(section, dict):
            raise ValueError(f"section {key[0]} of the file is not a mapping")
        # A path may hold any character, so text is taken as it stands.
        section[key[1]] = text if _is_text(SECTIONS[key[0]], key[1]) else yaml12.value(text)
    return key


def _is_text(schema: type[BaseModel], name: str) -> bool:
    return schema.model_json_schema()["properties"].get(name, {}).get("type") == "string"
