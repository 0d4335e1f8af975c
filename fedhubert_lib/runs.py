"""One folder is one run: its stages from start to finish, its locks, its record.

Every notebook begins with ``start``, which checks and changes nothing, does its work inside ``Stage.working`` and ends
with ``finish``. ``begun.json`` holds the identity of the work in a stage's folder, ``done.json``, written last, is the
only sign of success. The same work resumes where it stopped. Other work moves what the folder holds to
``RUN/.previous/STAGE-NUMBER``, from where it is taken back when it is asked for again: nothing that cost time is
deleted. ``outlook`` says which of these it will be, to notebooks and to the runner.
"""

import ast
import contextlib
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedhubert_lib import files, identity, params, progress, resources, studies
from fedhubert_lib.identity import Changes
from fedhubert_lib.records import RunError, read_json

PREVIOUS = ".previous"
"""The folder of a run that keeps what other work has replaced."""
LOCK_SECONDS = 120.0 if "SLURM_JOB_ID" in os.environ else 5.0
"""Time to wait for a lock: the kernel of a runner that was killed takes a moment to notice, NFS 90 s for a node."""
DAMAGED = "files that it made are missing or were changed"
WAS_DONE = ".done.json"
"""A stage's done.json while it works again."""


class Interrupted(KeyboardInterrupt):
    """A stage that was interrupted; in a notebook one line instead of a traceback."""

    _render_traceback_ = RunError._render_traceback_


@dataclass(frozen=True)
class Stage:
    """A stage of a run between ``start`` and ``finish``."""

    name: str
    run: Path
    """The folder of the run."""
    p: Any
    """The checked parameters: the stage's section of ``fedhubert_lib.params``."""
    provenance: dict[str, Any]
    """Study, run, seed, git commit, versions, hardware, data fingerprint, start: for the notebook's top."""
    identity: dict[str, Any] = field(repr=False)
    namespace: Mapping[str, Any] = field(repr=False)
    """The notebook's variables."""
    began: float = field(default_factory=time.time)

    @property
    def folder(self) -> Path:
        """The folder of this stage; write into it inside ``working`` only."""
        return self.run / params.FOLDERS[self.name]

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around whatever makes or changes results: prepares the folder, holds the run's lock, records how it ended.

        Raises RunError when parameters or inputs are no longer those that ``start`` saw. An interrupt ends in
        ``Interrupted``. A stage that fails before it has written anything leaves the run as it was.
        """
        p = studies.check(self.name, _parameters(self.namespace, type(self.p).model_fields))
        pairs = ((name, getattr(self.p, name), value) for name, value in p)
        if changed := [f"{name} is {now!r} now and was {then!r} then" for name, then, now in pairs if now != then]:
            raise RunError(f"parameters have changed since runs.start ({'; '.join(changed)}): run that cell again")
        with holding(self.run / ".lock", f"notebook {self.folder.name}"):
            future = outlook(self.name, self.p, self.run)
            if future.identity["inputs"] != self.identity["inputs"]:
                raise RunError(f"{self.run}: inputs have changed since runs.start: run that cell again")
            _begin(self, future)
            try:
                yield
            except KeyboardInterrupt as error:
                give_up(self.run, self.name, "interrupted", "stopped by an interrupt")
                raise Interrupted(f"{self.folder.name}: interrupted; run the cell again to resume") from error
            except Exception as error:
                give_up(self.run, self.name, "failed", f"{type(error).__name__}: {error}")
                raise


def outputs() -> Path:
    """The folder of all runs: ``outputs/`` of the project, or the one that FEDHUBERT_OUTPUTS names."""
    return (params.ROOT / os.path.expanduser(os.environ.get("FEDHUBERT_OUTPUTS") or "outputs")).resolve()


def start(stage: str, namespace: dict[str, Any]) -> Stage:
    """Begin ``stage``: the first library call of its notebook, ``runs.start("corpus", globals())``.

    Checks the parameters, that the stages before are done and that nobody else works in the run; prints what will
    become of the folder's content. Writes nothing. Raises ParameterError or RunError.
    """
    p = studies.check(stage, _parameters(namespace, namespace))
    run = outputs() / p.run
    if run.exists():
        with holding(run / ".lock", f"notebook {params.FOLDERS[stage]}"):
            pass
    future = outlook(stage, p, run)
    if future.words:
        print(f"{params.FOLDERS[stage]}: {future.words}")
    facts = {
        "stage": stage,
        "study": (read_json(run / "run.json") or {}).get("study", run.name),
        "run": run.name,
        "seed": p.seed,
        "git": identity.git(),
        "versions": future.identity["versions"],
        "hardware": identity.hardware(),
        "data": identity.data_fingerprint(run),
        "started": clock(time.time()),
    }
    return Stage(stage, run, p, facts, future.identity, namespace)


def finish(stage: Stage, headline: Mapping[str, float | int | str]) -> dict[str, Any]:
    """End the stage: the last call of its notebook. Returns the provenance, now with time and peak memory.

    ``fedhubert ls`` shows ``headline``, its main figures.
    """
    folder = stage.folder
    if wrong := [name for name, value in headline.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise RunError(f"{folder.name}: headline figure {', '.join(wrong)} is NaN or infinite; see the cells above")
    with holding(stage.run / ".lock", f"notebook {folder.name}"):
        begun = read_json(folder / "begun.json")
        if begun is None or identity.compare(begun["identity"], stage.identity).results:
            raise RunError(f"{folder}: holds no work of these parameters; run the notebook again from its top")
        work = begun["identity"] | {"notebook": stage.identity["notebook"]}
        if stage.name == "corpus":  # what has been downloaded or unpacked
            work["inputs"] |= read_json(folder / identity.READ) or {}
        files.write_json(folder / "begun.json", begun | {"identity": work})
        peak = max(resources.peak_memory(), resources.peak_memory(children=True))  # the notebook's or a worker's
        seconds = round(time.time() - max(begun["started"], stage.began), 1)
        used = {"seconds": seconds, "peak_memory_bytes": peak}
        done = begun | {"identity": work, "headline": dict(headline), "finished": time.time()} | used
        done |= identity.results(stage.name, stage.p, folder)
        data = done["speech"][:16] if stage.name == "corpus" else identity.data_fingerprint(stage.run)
        record(stage.run, data=data)
        files.write_json(folder / "done.json", done)
        (folder / WAS_DONE).unlink(missing_ok=True)
    return {**stage.provenance, **used, "data": data}


def _begin(stage: Stage, future: "Outlook") -> None:
    """Make the stage's folder one of its work, as ``future`` says, and record that it is not done any more.

    The caller holds the run's lock.
    """
    run, folder, replaced = stage.run, stage.folder, ""
    if future.source is not None:
        take_back(run, stage.name, future.source)
    elif future.kind == "anew":
        replaced = clear(run, stage.name)
    elif future.changes.code and stage.name not in ("pretrain", "distill"):
        done, aside = read_json(folder / "done.json"), _aside(run, stage.name)
        if done and all(read_json(earlier / "done.json") != done for earlier in previous(run, stage.name)):
            # Other code may give other results in their place; a training has none left. Without begun.json no copy,
            # which lacks audio, is taken back for the whole.
            left = shutil.ignore_patterns(".*", "begun.json", "checkpoints", "features", "synthetic")
            with files.atomic(aside) as copy:
                shutil.copytree(folder, copy, ignore=left, ignore_dangling_symlinks=True)
            progress.say(f"copied: {folder} -> {aside}")
    forced(run, stage.name).unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
    begun = read_json(folder / "begun.json") or {"started": time.time(), "replaced": replaced}
    cache = folder / "features"  # of 05
    if cache.is_dir() and identity.compare(begun.get("identity", stage.identity), stage.identity).code:
        shutil.rmtree(cache)
        progress.say(f"removed: {cache}, since other code may compute other features")
    if begun["started"] < stage.began:
        note = {"time": clock(time.time()), "changes": str(identity.compare(begun["identity"], stage.identity))}
        begun |= {"started": time.time(), "resumed": [*begun.get("resumed", []), note]}
    files.write_text(folder / "params.yaml", yaml.safe_dump(stage.p.model_dump(), sort_keys=False))
    begun |= {"identity": stage.identity, "git": stage.provenance["git"], "state": "running", "reason": ""}
    files.write_json(folder / "begun.json", begun)
    record(run, **{name: value for name, value in stage.provenance.items() if name not in ("stage", "started")})
    if (folder / "done.json").exists():  # last of all: on a disk that is full it stays done
        (folder / "done.json").replace(folder / WAS_DONE)


def give_up(run: Path, stage: str, state: str, reason: str) -> None:
    """Record that ``stage`` did not end well, and in which ``state``. The caller holds the run's lock.

    Where nothing new was written, a stage that was done is done again, and the work that it had moved aside is back.
    """
    folder = run / params.FOLDERS[stage]
    replaced = (read_json(folder / "begun.json") or {}).get("replaced")
    if (done := read_json(folder / WAS_DONE)) is not None and identity.outputs(folder) == done["outputs"]:
        (folder / WAS_DONE).replace(folder / "done.json")
    elif replaced and (run / PREVIOUS / replaced).is_dir() and not _has_results(folder):
        take_back(run, stage, run / PREVIOUS / replaced)
    if (begun := read_json(folder / "begun.json")) is not None:
        files.write_json(folder / "begun.json", begun | {"state": state, "reason": reason.split("\n")[0]})


# --------------------------------------------------------------------------------------- what becomes of what there is


@dataclass(frozen=True)
class Outlook:
    """The answer of ``outlook``."""

    kind: str
    """done (it stays as it is), resume, anew (what the folder holds moves aside), back (from ``.previous``)."""
    words: str
    """Why, and where to; empty where a folder is new, or done and unchanged."""
    changes: Changes
    """Since the folder's work was begun."""
    identity: dict[str, Any]
    """Of the work that is asked for."""
    source: Path | None = None
    """back: where it is now."""


def outlook(stage: str, p: params.Section, run: Path) -> Outlook:
    """The fate of the folder of ``stage`` once work with ``p`` begins. Raises RunError where it cannot begin."""
    lost = lost_audio(run)
    if lost and stage != "corpus":
        raise RunError(
            f"{lost}: no such file; was this run moved? Run notebooks 00_corpus and 01_partition again: they write"
            " where it is now, and later stages keep their results. If not: fedhubert run --from corpus --force"
        )
    folder, now = run / params.FOLDERS[stage], identity.of(stage, p, run)
    done = read_json(folder / "done.json")
    work = done or read_json(folder / "begun.json")
    changes = identity.compare(work["identity"], now) if work else Changes()
    if forced(run, stage).exists():
        changes = Changes("forced")
    elif work is None and _has_results(folder):
        changes = Changes("no record of what made it")
    elif work is None or changes.results:
        for earlier in previous(run, stage):
            work = read_json(earlier / "begun.json")
            if work and not identity.compare(work["identity"], now).results:
                words = f"{changes.results or 'was moved aside'}: taken back from {earlier}"
                return Outlook("back", words, changes, now, earlier)
    elif done is None:
        words = "was not finished: resumes" + (f" ({changes})" if any(changes) else "")
        return Outlook("resume", words, changes, now)
    elif lost and lost.is_relative_to(run):
        changes = Changes(DAMAGED)
    elif damaged := identity.damaged(folder, done):
        models = [(folder / name).parent for name in damaged]  # which the last round beside them has, too
        if all(model.name == "checkpoint" and any(model.parent.glob("checkpoints/round-*")) for model in models):
            return Outlook("resume", f"{DAMAGED}: {damaged[0]}; made again from the last round", changes, now)
        changes = Changes(DAMAGED)
    elif gone := identity.gone(folder, done):
        if stage in ("pretrain", "distill"):
            raise RunError(f"{folder / gone[0]}: gone; put it back, or train anew with --from {stage} --force")
        return Outlook("resume", "; ".join(filter(None, (f"{DAMAGED}: {gone[0]}", *changes))), changes, now)
    else:
        if lost:
            changes = Changes(additions=f"{lost}: no such file: the run was moved; its tables are written again")
        return Outlook("done", f"{changes}: its results are kept" if any(changes) else "", changes, now)
    words = f"{changes.results}: starts anew" if changes.results else ""
    if _has_results(folder):
        words += f"\nits results move to {_aside(run, stage)}"
        if stage == "pretrain" and " rounds " in words:
            words += "; to train on from its weights instead, give another run their checkpoint folder as initial"
    return Outlook("anew", words, changes, now)


def previous(run: Path, stage: str = "") -> list[Path]:
    """The folders of ``stage`` (default: of all) that have moved aside, the latest first."""
    paths = (run / PREVIOUS).glob(f"{params.FOLDERS.get(stage, '*')}-*")
    numbers = {path: int(number) for path in paths if (number := path.name.rpartition("-")[2]).isdecimal()}
    return sorted(numbers, key=lambda path: (path.name[:2], numbers[path]), reverse=True)


def _aside(run: Path, stage: str) -> Path:
    """Where the folder of ``stage`` would move."""
    number = next((int(path.name.rpartition("-")[2]) for path in previous(run, stage)), 0) + 1
    return run / PREVIOUS / f"{params.FOLDERS[stage]}-{number}"


def clear(run: Path, stage: str) -> str:
    """Move the folder of ``stage``, with its notebook and page, to ``.previous/``; one without results goes.

    Returns its name there, if any. The caller holds the run's lock.
    """
    folder, target = run / params.FOLDERS[stage], _aside(run, stage)
    if not _has_results(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    for place in _pages(run, folder):
        place.replace(folder / place.name)
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    progress.say(f"moved: {folder} -> {target}")
    return target.name


def take_back(run: Path, stage: str, source: Path) -> None:
    """Move a folder of ``.previous/`` to its place. The caller holds the run's lock."""
    clear(run, stage)
    folder = run / params.FOLDERS[stage]
    source.rename(folder)
    for place in _pages(folder, folder):
        place.replace(run / place.name)
    progress.say(f"moved: {source} -> {folder}")


def _pages(place: Path, stage: Path) -> list[Path]:
    """The executed notebook and the page of the folder of a stage that are in ``place``."""
    return [path for path in (place / f"{stage.name}.ipynb", place / f"{stage.name}.html") if path.exists()]


def forced(run: Path, stage: str) -> Path:
    """The mark that asks for ``stage`` to start anew, whatever its folder holds."""
    return run / f".anew-{params.FOLDERS[stage]}"


def _has_results(folder: Path) -> bool:
    """Whether a stage's folder holds more than the records of its start, and figures."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return any(name.parts[0] not in ("figures", "begun.json", "params.yaml", identity.READ) for name in names)


def lost_audio(run: Path) -> Path | None:
    """The first synthetic utterance or word that is not where the tables say: the run was moved.

    They name audio by absolute path; 00_corpus and 01_partition of a run that was moved write them again.
    """
    if not (run / "00_corpus" / "synthetic").is_dir():
        return None
    from pyarrow import parquet  # here: most commands do without

    for name in ("manifest.parquet", "keywords.parquet"):
        if (table := run / "00_corpus" / name).is_file():
            try:
                first = Path(next(parquet.ParquetFile(table).iter_batches(1, columns=["path"]))["path"][0].as_py())
            except (OSError, ValueError, StopIteration):  # no table: ``identity.damaged`` tells
                continue
            if "synthetic" in first.parts and not first.exists():
                return first
    return None


# ------------------------------------------------------------------------------------------ parameters of a notebook


def _parameters(namespace: Mapping[str, Any], default: Iterable[str]) -> dict[str, Any]:
    """The variables that a notebook's parameters cell has set when it was executed last; else those named ``default``.

    IPython keeps the cells that were executed. A name that only an earlier version of that cell has set is no parameter
    any more; nor is one that a later cell has, but for those that do nothing but set plain values, as papermill's does.
    """
    cells = namespace.get("In")
    names: set[str] = set()
    for source in reversed(cells if isinstance(cells, list) else []):
        assigned, plain = _assignments(source)
        injected = source.startswith("# Parameters\n")  # by papermill: it may set them all
        is_parameters = {"run", "seed"} <= assigned and not injected
        names |= assigned if plain or is_parameters or injected else set()
        if is_parameters:
            break
    else:
        names = set(default)
    return {name: namespace[name] for name in names if name in namespace}


def _assignments(source: str) -> tuple[set[str], bool]:
    """The names that a cell sets if it does nothing else, else none; and whether all their values are plain."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set(), False
    names, plain = set(), True
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return set(), False
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        try:
            ast.literal_eval(node.value or "")
        except (ValueError, TypeError, SyntaxError):  # no literal, one such as {[]: 1}, none at all
            plain = False
    return names, plain


# ------------------------------------------------------------------------------------------------- record and locks


def record(run: Path, /, **facts: Any) -> None:
    """Put ``facts`` into run.json. The caller holds the run's lock."""
    files.write_json(run / "run.json", (read_json(run / "run.json") or {}) | facts)


def state(run: Path, stage: str) -> dict[str, Any]:
    """The record of a stage's folder: ``state``, when it started, what it used; empty where it was not begun.

    A stage whose last attempt left its results as they were is done.
    """
    folder = run / params.FOLDERS[stage]
    if done := read_json(folder / "done.json"):
        return done | {"state": "done"}
    begun = read_json(folder / "begun.json")
    return {"state": "running", **begun} if begun else {}


def clock(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def holding(path: Path, who: str) -> Iterator[None]:
    """Hold the lock file ``path`` inside the block. Raises RunError if somebody else does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path, LOCK_SECONDS) as free:
        if not free:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise RunError(
                f"{path.parent}: in use by {holder}. Wait for it, stop it (a notebook: shut its kernel down), "
                "or give this run another name"
            )
        about = f"{who}, process {os.getpid()} on {socket.gethostname()}, since {clock(time.time())}\n"
        with files.naming(path):
            path.write_text(about, encoding="utf-8")
        yield


def named(name: str) -> Path:
    """The folder of the run ``name``, or at the path ``name``. Raises RunError where there is no run."""
    folder = outputs() / name
    folder = folder if folder.is_dir() else Path(name).resolve()
    if not (folder / "run.json").is_file() and not any(folder.glob("0[0-5]_*/")):  # a part of one was copied here
        raise RunError(f"{name}: no run of that name in {outputs()}, and no folder of a run")
    return folder


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock file ``path``."""
    if not path.exists():
        return False
    with files.locked(path) as free:
        return not free
