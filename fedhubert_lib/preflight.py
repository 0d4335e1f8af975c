"""Checks before a stage starts: whether its inputs, device, packages and parameters fit, so that no hour is lost.

``check`` is called at the top of each notebook for its stage; ``study`` by ``fedhubert run`` for all stages to come,
before the first, and again once the corpus and the clients exist.
"""

import importlib.util
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedhubert_lib import distillation, federated, files, identity, params, pretrained, recipes, records, resources
from fedhubert_lib.corpora import archives, folder, librispeech, speech_commands
from fedhubert_lib.evaluation import keywords, layers
from fedhubert_lib.hubert import Head, Hubert
from fedhubert_lib.labels import Labels
from fedhubert_lib.progress import say
from fedhubert_lib.studies import Study
from fedhubert_lib.teaching import Teacher


def check(stage: str, p: params.Section, run: Path) -> None:
    """Raise RunError, with all that is wrong, unless ``stage`` of the run in folder ``run`` can do its work."""
    _refuse({stage: p}, run, None)


def study(study: Study, stages: Sequence[str], run: Path) -> None:
    """Raise RunError, with all that is wrong, unless ``stages`` of ``study`` can run one after the other."""
    _refuse({stage: getattr(study, stage) for stage in stages}, run, study)


def _refuse(sections: dict[str, params.Section], run: Path, study: Study | None) -> None:
    """Raise RunError with all problems of ``sections``: first those of places that parameters name, then the rest."""
    if (events := files.events()) is not None:
        events.check()
    for look in _places, _problems:
        findings = ((stage, look(stage, p, run, study, sections)) for stage, p in sections.items())
        if lines := [f"{stage}.{name}: {why}" for stage, problems in findings for name, why in problems]:
            raise records.RunError("\n".join(dict.fromkeys(lines)))


def _places(stage: str, p: params.Section, run: Path, *_: Any) -> Iterator[tuple[str, str]]:
    """Files and folders that parameters point to and that do not exist, or that the stage is going to make."""
    fetched = {"root", "keywords_root"} if isinstance(p, params.Corpus) and p.download else set()
    made = [(run / folder).resolve() for folder in list(params.FOLDERS.values())[list(params.FOLDERS).index(stage) :]]
    for name, place in params.places(p).items():
        if name not in fetched and not Path(place).exists():
            yield name, f"{place}: no such file or folder"
        if any(Path(place).resolve().is_relative_to(folder) for folder in made):
            yield name, f"{place}: lies in what this run makes from it; give the run another name, or copy it first"


def _problems(
    stage: str, p: params.Section, run: Path, study: Study | None, coming: Container[str]
) -> Iterator[tuple[str, str]]:
    """Parameters that keep ``stage`` from working, and why; its ``study`` tells what those before it are going to make.

    What an earlier start has left of a stage that is ``coming``, too, is no reason: it may be made anew.
    """
    for section, name, look in CHECKS:
        try:
            if isinstance(p, section):
                look(p, run, study, coming)
        except (OSError, ValueError) as error:  # also the library's own refusal of a corpus, a checkpoint, a teacher
            yield name, str(error).removeprefix(f"{stage}.{name}: ")


def _speech(p: params.Corpus, *_: Any) -> None:
    if "synthetic" in (p.kind, p.keywords) and importlib.util.find_spec("espeakng_loader") is None:
        raise ValueError("the speech synthesiser espeakng-loader is not installed; run: make install")
    if p.kind == "librispeech" and not p.download:
        subsets = p.train_subsets + p.test_subsets
        librispeech.home(Path(p.root), [name for name in subsets if not Path(p.root, f"{name}.tar.gz").is_file()])
    if p.kind == "folder":
        folder.speakers(Path(p.root), p.train_subsets + p.test_subsets)


def _words(p: params.Corpus, *_: Any) -> None:
    root = Path(p.keywords_root)
    fetched = p.download or (root / f"{archives.KEYWORDS}.tar.gz").is_file()
    if p.keywords == "speech-commands" and (speech_commands.homes(root) or not fetched):
        speech_commands.usable(speech_commands.home(root))


def _speakers(p: params.Partition, _: Path, study: Study | None, coming: Container[str]) -> None:
    """Whether the built-in corpus, not made yet, will have a speaker for each client."""
    if study is None or "corpus" not in coming or (study.corpus.kind, p.scheme) != ("synthetic", "speakers"):
        return
    if p.clients > (left := study.corpus.speakers - p.heldout_speakers):
        raise ValueError(f"{p.clients}, but corpus.speakers less heldout_speakers are {left}; give that or fewer")


def _engine(p: Any, *_: Any) -> None:
    if p.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("ray given, but it is not installed; run: make ray")


def _device(p: Any, *_: Any) -> None:
    # Clients may have other devices than this machine, which trains on pooled data and makes codebooks.
    if getattr(p, "engine", "") not in ("ray", "deployment") or getattr(p, "centralised", True):
        resources.resolve(p.device)


def _model(folder: str) -> Any:
    return pretrained.load(folder, weights=False)[0] if folder else None


def _initial(p: params.Pretrain, run: Path, *_: Any) -> None:
    """Whether the checkpoint to start from has the sizes that are set: a model that is trained on keeps its sizes."""
    model = _model(p.initial)
    if model is None or (run / "03_pretrain" / "checkpoints").exists():  # begun when these sizes were ignored
        return
    sizes = {"layers": model.config.num_hidden_layers, "hidden_size": model.config.hidden_size}
    sizes |= {"attention_heads": model.config.num_attention_heads, "feed_forward_size": model.config.intermediate_size}
    for name, size in sizes.items():
        if getattr(p, name) not in (None, size):
            raise ValueError(
                f"{p.initial} has {name} {size}, but {getattr(p, name)} is given; set it to {size}, or null"
            )


def _cohort(p: Any, run: Path, _: Any, coming: Container[str]) -> None:
    if "partition" not in coming and (run / "01_partition" / "clients.parquet").is_file():
        clients = len(federated.client_ids(run, "" if "kmeans" in coming else p.codebook))
        if p.cohort > clients:
            raise ValueError(f"{p.cohort} given, but 01_partition made {clients} clients; give that or fewer")


def _labels(p: Any, run: Path, study: Study | None, _: Any) -> None:
    """Whether the labels that 02_kmeans made are whole: one client's would end pooled training after the federation."""
    if study is not None or p.engine == "deployment" or "hubert" in getattr(p, "objectives", ()):
        return
    clusters = recipes.clusters(run, p.codebook)
    for client in federated.client_ids(run, p.codebook):
        labels = Labels(run / "02_kmeans" / "clients" / client / p.codebook)
        if (highest := int(labels.flat.max(initial=0))) >= clusters:
            raise ValueError(f"{labels.folder}: label {highest} of {clusters} clusters; delete it, run 02_kmeans again")


def _kept(p: Any, run: Path, _: Any, coming: Container[str]) -> None:
    """Whether this disk holds what clients keep of two rounds or three (``client_state.save``): of base 757 MB each."""
    copies = 2 * (p.local_state == "keep") + (p.server == "scaffold") + (p.compression in ("int8", "top-k"))
    first, table = isinstance(p, params.Pretrain), run / "01_partition" / "clients.parquet"
    folder = run / ("03_pretrain" if first else "04_distill")
    if p.engine == "deployment" or "partition" in coming or not table.is_file() or (folder / "done.json").is_file():
        return
    clients = len(federated.client_ids(run, "" if "kmeans" in coming else p.codebook))
    drawn = clients * (1 - (1 - min(1, p.cohort / clients)) ** p.rounds)  # in the mean
    try:
        initial = _model(p.initial if first and copies else "")
        with torch.device("meta"):
            model = initial or Hubert(recipes.model_config(p))
    except (OSError, ValueError):  # the checks of the model and of `initial` say so
        return
    rounds = min(p.rounds, 3 if p.cohort == clients else 2)
    size = 4 * copies * rounds * drawn * sum(weight.numel() for weight in model.parameters())
    size -= sum(file.stat().st_size for file in folder.glob("clients/*/session-*/*"))
    if size > (free := shutil.disk_usage(run).free):
        remedy = "give local_state: cohort or reset, or make room" if p.local_state == "keep" else "make room"
        raise ValueError(f"clients keep {size / 1e9:.1f} GB between rounds, and {free / 1e9:.1f} GB are free; {remedy}")


def _features(p: params.Kmeans, *_: Any) -> None:
    model = _model("" if p.features == "mfcc" else p.features)
    if model and p.layer != "auto" and p.layer > (depth := model.config.num_hidden_layers):
        raise ValueError(f"layer {p.layer} given, but {p.features} has {depth} layers; give one of them")


def _teacher(p: params.Distill, run: Path, study: Study | None, coming: Container[str]) -> None:
    """Whether the student can learn from its teacher; that of 03_pretrain to come is what the study describes."""
    clusters = study.kmeans.clusters if study and "kmeans" in coming else None
    with torch.device("meta"):
        if p.teacher or study is None or "pretrain" not in coming:
            teacher = Teacher(*pretrained.load(distillation.teacher_folder(run, p), weights=False))
        else:
            model = _model(study.pretrain.initial) or Hubert(recipes.model_config(study.pretrain))
            teacher = Teacher(model, Head(model.config, study.kmeans.clusters))
        distillation.check_teacher(run, p, teacher, clusters)


def _taught(p: params.Evaluate, run: Path, _: Any, coming: Container[str]) -> None:
    """Whether a teacher from elsewhere is still the one that taught the student, beside which it will stand."""
    folder = run / "04_distill"
    if "distill" in coming or not (done := records.read_json(folder / "done.json")) or "distill" in records.stale(run):
        return
    teacher = records.parameters(folder).get("teacher")
    if not (teacher and Path(teacher, "config.json").is_file()):
        return
    if done["identity"]["inputs"].get("teacher") != identity.listings(params.Distill(teacher=teacher))["teacher"]:
        raise ValueError(f"{teacher} has changed since it taught the student of 04; put it back, or distill anew")


def _keywords(p: params.Evaluate, run: Path, _: Any, coming: Container[str]) -> None:
    """Whether the clips, once they are there, allow a fair figure."""
    path = run / "00_corpus" / "keywords.parquet"
    if "corpus" not in coming and path.is_file():
        clips = keywords.read_clips(path)
        if p.task == "superb":
            keywords.superb(clips, p.seed)


def _units(p: params.Evaluate, run: Path, _: Any, coming: Container[str]) -> None:
    """Whether the held-out speech, once it is there, has a frame for every cluster; says it where it has no phones."""
    made = (run / "00_corpus" / "manifest.parquet").is_file() and (run / "01_partition" / "heldout.parquet").is_file()
    if made and "partition" not in coming:  # which comes with or after the corpus
        try:
            layers.held_out(run, p.unit_minutes, p.seed, p.clusters)
        except layers.NoPhonesError as error:  # no refusal: words need none, and 02 measures clients' phones
            say(f"05_evaluate measures neither PNMI nor phones: {error}")


CHECKS: tuple[tuple[Any, str, Callable[..., object]], ...] = (
    (params.Corpus, "root", _speech),
    (params.Corpus, "keywords_root", _words),
    (params.Partition, "clients", _speakers),
    (params.Kmeans | params.Federation, "engine", _engine),
    (params.Kmeans | params.Federation | params.Evaluate, "device", _device),
    (params.Kmeans, "features", _features),
    (params.Federation, "attention_heads", lambda p, *_: recipes.model_config(p)),
    (params.Federation, "cohort", _cohort),
    (params.Federation, "codebook", _labels),
    (params.Federation, "local_state", _kept),
    (params.Pretrain, "initial", _initial),
    (params.Distill, "teacher", _teacher),
    (params.Evaluate, "checkpoint", lambda p, *_: _model(p.checkpoint)),
    (params.Evaluate, "run", _taught),
    (params.Evaluate, "task", _keywords),
    (params.Evaluate, "clusters", _units),
)
"""Sections, the parameter that is checked, and the check, which raises OSError or ValueError."""
