"""The parameters of every notebook: typed, documented, validated before any kernel starts.

One YAML file is one study. Its top level holds ``study`` and ``seed``; below stand six sections, one per notebook,
whose names are the notebook's parameters. Defaults are those of ``params/toy.yaml`` and of the notebooks' own
parameter cells: a chain of seconds.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]

Codebook = Literal["federated", "one-shot", "client", "aligned", "random-projection", "central"]
Optimiser = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "trimmed-mean", "median"]
Preset = Literal["tiny", "small", "base", "large"]
FrontEnd = Literal["waveform", "logmel"]
Head = Literal["shared", "personal"]
Engine = Literal["inprocess", "pool", "ray", "deployment"]
Precision = Literal["auto", "float32", "bfloat16"]
Objective = Literal["hubert", "soft-targets", "distilhubert"]


class Section(BaseModel):
    """What the parameters of every notebook have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    run: str = Field("toy", pattern=r"^[A-Za-z0-9][\w.-]*$", description="folder under outputs/ that holds the run")
    seed: Count = Field(0, description="every random draw of the stage comes from it")


class Corpus(Section):
    """00_corpus: which speech, and which keywords to evaluate on."""

    kind: Literal["synthetic", "librispeech"] = Field("synthetic", description="built-in corpus, or LibriSpeech folders")
    root: str = Field("", description="folder that holds the LibriSpeech subsets (kind: librispeech)")
    train_subsets: list[str] = Field(["train-clean-100"], description="subsets to train on")
    test_subsets: list[str] = Field(["test-clean"], description="subsets kept for unit quality, never trained on")
    alignments: str = Field("", description="phone alignments: folder of TextGrids, or JSON; empty: none")
    speakers: Natural = Field(6, description="speakers of the synthetic corpus")
    minutes: Positive = Field(1.5, description="minutes of speech of the synthetic corpus")
    keywords: Literal["synthetic", "speech-commands"] = Field("synthetic", description="built-in words, or v0.02 folder")
    keywords_root: str = Field("", description="folder that holds a subfolder per word (keywords: speech-commands)")
    keyword_voices: Natural = Field(6, description="voices of the synthetic keywords")
    keyword_takes: Natural = Field(1, description="takes of each word by each voice of the synthetic keywords")
    decode_check: bool = Field(False, description="decode every file in full, not only its header")


class Partition(Section):
    """01_partition: who owns which utterance."""

    scheme: Literal["speakers", "speaker", "sex", "chapter", "subset", "dirichlet", "quantity", "iid"] = Field(
        "speakers", description="how utterances are given to clients; see fedhubert_lib.partition"
    )
    clients: Natural = Field(3, description="number of clients (schemes speaker, sex, chapter, subset: at most)")
    alpha: Positive = Field(0.5, description="concentration of the Dirichlet scheme: smaller is less alike")
    power: Positive = Field(1.5, description="exponent of the quantity scheme's power law")
    validation_share: Share = Field(0.1, description="share of each client's utterances kept for validation")
    heldout_speakers: Count = Field(1, description="speakers given to no client: the global validation set")
    minimum_minutes: float = Field(0.1, ge=0, description="a client below it is an error, or merged")
    small_clients: Literal["error", "merge"] = Field("error", description="what to do with a client below the minimum")


class Kmeans(Section):
    """02_kmeans: the targets."""

    codebooks: list[Codebook] = Field(["federated", "client"], min_length=1, description="codebooks to fit and compare")
    features: str = Field("mfcc", description="mfcc, or a checkpoint folder: the second iteration")
    layer: Natural | None = Field(None, description="hidden layer of that checkpoint; none: half its depth")
    clusters: Annotated[int, Field(ge=2, le=65_535)] = Field(20, description="K")
    normalisation: Literal["none", "global", "speaker"] = Field("speaker", description="of the features, per dimension")
    sample_share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of utterances used to fit")
    lloyd_rounds: Natural = Field(10, description="at most so many federated Lloyd rounds")
    tolerance: float = Field(1e-4, ge=0, description="stop when the inertia falls by a smaller share than this")
    minimum_count: Count = Field(0, description="a client reports no cluster with fewer frames than this (privacy)")
    noise_multiplier: float = Field(0.0, ge=0, description="Gaussian noise on sums and counts (privacy); 0: none")
    cache_features: bool = Field(False, description="keep features on disk instead of computing them in each pass")


class Federation(Section):
    """What pretraining and distillation have in common: model, rounds, local updates, server."""

    model: Preset = Field("tiny", description="size of the model that is trained")
    front_end: FrontEnd = Field("logmel", description="waveform as published; logmel: cheaper, same 20 ms frames")
    rounds: Natural = Field(2, description="federated rounds")
    cohort: Natural = Field(3, description="clients per round, drawn by (seed, round)")
    local_steps: Natural = Field(2, description="optimiser steps of a client per round")
    batch_seconds: Positive = Field(16.0, description="seconds of audio per step")
    crop_seconds: Positive = Field(4.0, description="longest crop of an utterance")
    learning_rate: Positive = Field(1e-3, description="peak rate of the client's AdamW")
    warmup_share: Share = Field(0.08, description="share of all steps over which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="of the client's AdamW, on all parameters")
    clip_norm: Positive = Field(10.0, description="gradient norm above which it is scaled down")
    mask_probability: Share = Field(0.8, description="expected share of frames in spans before overlap: 8 % starts x 10")
    mask_length: Natural = Field(10, description="frames of a masked span")
    server: Optimiser = Field("fedadam", description="server optimiser")
    server_rate: Positive = Field(1e-3, description="rate of the server optimiser")
    server_momentum: Share = Field(0.9, description="beta 1 of the adaptive optimisers, momentum of fedavgm")
    server_beta2: Share = Field(0.99, description="beta 2 of the adaptive optimisers")
    server_tau: Positive = Field(1e-3, description="adaptivity of the adaptive optimisers")
    proximal: float = Field(0.0, ge=0, description="FedProx: weight of the squared distance to the global model")
    quorum: Share = Field(0.5, description="share of a cohort that must answer, else the round is repeated")
    precision: Precision = Field("auto", description="of the local steps: bfloat16 where the machine is faster with it")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    engine: Engine = Field("inprocess", description="what carries the messages")
    centralised: bool = Field(True, description="also train on the pooled data with equal updates: the yardstick")


class Pretrain(Federation):
    """03_pretrain: masked prediction of the targets."""

    codebook: Codebook = Field("federated", description="whose labels to predict")
    head: Head = Field("shared", description="personal: projection and label embeddings stay with the client")
    unmasked_weight: float = Field(0.0, ge=0, description="weight of the loss on frames that are not masked")
    initial: str = Field("", description="checkpoint folder to start from; empty: random weights")


class Distill(Federation):
    """04_distill: a smaller student learns from the pretrained teacher, over the same federation."""

    teacher: str = Field("", description="checkpoint folder; empty: what 03_pretrain of this run wrote")
    layers: Natural = Field(2, description="transformer layers of the student")
    width: Natural = Field(96, description="width of the student's transformer")
    objective: Objective = Field("soft-targets", description="what the student learns; see fedhubert_lib.distillation")
    codebook: Codebook = Field("federated", description="whose labels the k-means part of the objective predicts")
    temperature: Positive = Field(4.0, description="softens teacher and student predictions")
    soft_weight: Share = Field(0.7, description="alpha: weight of the teacher's soft targets")
    label_weight: Share = Field(0.3, description="beta: weight of the k-means labels")


class Evaluate(Section):
    """05_evaluate: keywords and units, beside the baselines."""

    seeds: Natural = Field(3, description="evaluation seeds: each draws its own training clips and probe")
    train_share: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="share of training clips each seed draws")
    probe_steps: Natural = Field(100, description="steps of the keyword probe")
    probe_rate: Positive = Field(1e-2, description="learning rate of the keyword probe")
    clusters: Annotated[int, Field(ge=2, le=65_535)] = Field(20, description="K of the units made from hidden layers")
    unit_minutes: Positive = Field(1.0, description="minutes of held-out speech for unit quality")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")


SECTIONS: dict[str, type[Section]] = {
    "corpus": Corpus,
    "partition": Partition,
    "kmeans": Kmeans,
    "pretrain": Pretrain,
    "distill": Distill,
    "evaluate": Evaluate,
}
"""The stages in order, each with the schema of its notebook."""
