"""Checks before a stage starts: whether its inputs, device, packages and parameters fit, so that no hour is lost.

``check`` is called at the top of each notebook for its stage; ``study`` by ``fedhubert run`` for all stages to come,
before the first, and again once the corpus and the clients exist.
"""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fedhubert_lib import (
    distillation,
    federated,
    hubert,
    params,
    planning,
    pretrained,
    recipes,
    resources,
    runs,
    threads,
)
from fedhubert_lib.corpora import archives, librispeech, speech_commands
from fedhubert_lib.evaluation import keywords, layers
from fedhubert_lib.federated import rounds
from fedhubert_lib.teaching import Teacher


def check(stage: str, p: params.Section, run: Path) -> None:
    """Raise RunError, with all that is wrong, unless ``stage`` of the run in folder ``run`` can do its work."""
    _refuse(_places(stage, p, run))
    _refuse(_problems(stage, p, run, None))


def study(study: params.Study, stages: Sequence[str], run: Path) -> None:
    """Raise RunError, with all that is wrong, unless ``stages`` of ``study`` can run one after the other."""
    _refuse(text for stage in stages for text in _places(stage, getattr(study, stage), run))
    _refuse(text for stage in stages for text in _problems(stage, getattr(study, stage), run, study))


def plan(run: Path, p: params.Pretrain) -> planning.Plan:
    """What pretraining will take on this machine, from a measured training step: see ``planning.plan``.

    Twice the federation's steps with ``p.centralised``; epochs are counted as ``local_steps``, the most that they are.
    """
    p = rounds.sized(p, len(federated.client_ids(run, p.codebook)))
    config = pretrained.read_config(Path(p.initial)) if p.initial else recipes.model_config(p)
    work = planning.Workload(
        config, recipes.clusters(run, p.codebook), p.crop_seconds, p.precision, p.gradient_checkpointing
    )
    steps = p.rounds * p.cohort * p.local_steps * (1 + p.centralised)
    with threads.limited(p.threads):
        workers = min(federated.side_by_side(p.engine, p.device), p.cohort)
        return planning.plan(work, p.batch_seconds, steps, resources.resolve(p.device), workers)


def missing_packages(*names: str) -> list[str]:
    """Those of the packages ``names`` that this Python cannot import."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _refuse(problems: Iterable[str]) -> None:
    if lines := list(dict.fromkeys(problems)):
        raise runs.RunError("\n".join(lines))


def _places(stage: str, p: params.Section, run: Path) -> Iterator[str]:
    """Files and folders that parameters point to and that do not exist, or that the stage is going to make."""
    fetched = {"root", "keywords_root"} if isinstance(p, params.Corpus) and p.download else set()
    for name, place in params.places(p).items():
        if name not in fetched and not Path(place).exists():
            yield f"{stage}.{name}: {place}: no such file or folder"
    made = [(run / folder).resolve() for folder in list(params.FOLDERS.values())[list(params.FOLDERS).index(stage) :]]
    for name, place in params.places(p).items():
        if any(Path(place).resolve().is_relative_to(folder) for folder in made):
            remedy = "give the run another name, or copy it first"
            yield f"{stage}.{name}: {place}: lies in what this run makes from it; {remedy}"


def _problems(stage: str, p: params.Section, run: Path, study: params.Study | None) -> Iterator[str]:
    """Reasons why ``stage`` cannot work; its ``study`` tells what the stages before it are going to make."""
    checks: list[tuple[str, Iterator[str]]] = []
    if isinstance(p, params.Corpus):
        checks = [("root", _speech(p)), ("keywords_root", _words(p))]
    if isinstance(p, params.Kmeans | params.Federation | params.Evaluate):
        checks += [("device", _device(p.device, getattr(p, "engine", "")))]
    if isinstance(p, params.Kmeans | params.Federation):
        checks += [("engine", _engine(p.engine))]
    if isinstance(p, params.Federation):
        checks += [("cohort", _cohort(p, run))]
    if isinstance(p, params.Kmeans):
        checks += [("features", _features(p))]
    if isinstance(p, params.Pretrain):
        checks += [("initial", _model(p.initial))]
    if isinstance(p, params.Distill):
        checks += [("teacher", _teacher(p, run, study))]
    if isinstance(p, params.Evaluate):
        checks += [("checkpoint", _model(p.checkpoint)), ("task", _keywords(p, run, study))]
        checks += [("clusters", _units(p, run))]
    for name, problems in checks:
        try:
            yield from (f"{stage}.{name}: {text}" for text in problems)
        except (OSError, ValueError) as error:  # the library's own refusal of a corpus, a checkpoint, a teacher
            yield f"{stage}.{name}: {str(error).removeprefix(f'{stage}.{name}: ')}"


def _speech(p: params.Corpus) -> Iterator[str]:
    if "synthetic" in (p.kind, p.keywords) and missing_packages("espeakng_loader"):
        yield "the speech synthesiser espeakng-loader is not installed; run: make install"
    if p.kind == "librispeech" and not p.download:
        subsets = p.train_subsets + p.test_subsets
        librispeech.home(Path(p.root), [name for name in subsets if not Path(p.root, f"{name}.tar.gz").is_file()])


def _words(p: params.Corpus) -> Iterator[str]:
    root = Path(p.keywords_root)
    fetched = p.download or any((root / f"{name}.tar.gz").is_file() for name in archives.KEYWORDS)
    if p.keywords == "speech-commands" and (speech_commands.is_home(root) or not fetched):
        speech_commands.usable(speech_commands.home(root))
    yield from ()


def _device(device: str, engine: str) -> Iterator[str]:
    if engine != "ray":  # a Ray cluster may have other devices than this machine
        resources.resolve(device)
    yield from ()


def _engine(engine: str) -> Iterator[str]:
    if engine == "ray" and missing_packages("ray"):
        yield "ray given, but it is not installed; run: make ray"


def _cohort(p: params.Federation, run: Path) -> Iterator[str]:
    if (run / "01_partition" / "clients.parquet").is_file():
        clients = len(federated.client_ids(run, p.codebook))
        if (size := rounds.sized(p, clients).cohort) > clients:
            yield f"{size} given, but 01_partition made {clients} clients; give that or fewer"


def _features(p: params.Kmeans) -> Iterator[str]:
    if p.features != "mfcc":
        depth = pretrained.load(p.features, weights=False)[0].config.num_hidden_layers
        if (p.layer or 1) > depth:
            yield f"layer {p.layer} given, but {p.features} has {depth} layers; give one of them"


def _model(folder: str) -> Iterator[str]:
    if folder:
        pretrained.load(folder, weights=False)
    yield from ()


def _teacher(p: params.Distill, run: Path, study: params.Study | None) -> Iterator[str]:
    """Whether the student can learn from its teacher; that of 03_pretrain to come is what the study describes."""
    clusters = study.kmeans.clusters if study else None
    with torch.device("meta"):
        if p.teacher or study is None:
            teacher = Teacher(*pretrained.load(distillation.teacher_folder(run, p), weights=False))
        else:
            first = study.pretrain.initial
            model = pretrained.load(first, weights=False)[0] if first else None
            model = model or hubert.Hubert(recipes.model_config(study.pretrain))
            teacher = Teacher(model, hubert.Head(model.config, clusters))
        distillation.check_teacher(run, p, teacher, clusters)
    yield from ()


def _keywords(p: params.Evaluate, run: Path, study: params.Study | None) -> Iterator[str]:
    """Whether the clips allow a fair figure; before 00_corpus, whether SUPERB's task has what it needs."""
    path = run / "00_corpus" / "keywords.parquet"
    if path.is_file():
        clips = keywords.read_clips(path)
        if p.task == "superb":
            keywords.superb(clips, p.seed)
    elif p.task == "superb" and study is not None:
        root = Path(study.corpus.keywords_root)
        if study.corpus.keywords == "synthetic":
            yield "superb given; it needs background noise, which the synthetic keywords lack: give words"
        elif speech_commands.is_home(root):
            root = speech_commands.home(root)
            if missing := sorted(set(keywords.COMMANDS) - speech_commands.usable(root)):
                yield f"superb needs ten commands; {root} has no training or no test clip of {', '.join(missing)}"
            keywords.noise(root)


def _units(p: params.Evaluate, run: Path) -> Iterator[str]:
    """Whether the held-out speech, once it is there, has a frame for every cluster."""
    if (run / "00_corpus" / "manifest.parquet").is_file() and (run / "01_partition" / "heldout.parquet").is_file():
        with contextlib.suppress(layers.NoPhonesError):  # units are then left out
            layers.held_out(run, p.unit_minutes, p.seed, p.clusters)
    yield from ()
