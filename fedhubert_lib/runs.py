"""One folder is one run: its stages from start to finish, its locks, its record.

Every notebook begins with ``start``, which checks and changes nothing, does its work inside ``Stage.working`` and ends
with ``finish``. ``begun.json`` holds the identity of the work in a stage's folder, ``done.json``, written last, is the
only sign of success. The same work resumes where it stopped. Other work moves what the folder holds to
``RUN/.previous/STAGE-NUMBER``, from where it is taken back when it is asked for again: nothing that cost time is
deleted.
"""

import ast
import contextlib
import math
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedhubert_lib import files, identity, params, resources, studies
from fedhubert_lib.identity import Changes, RunError, read_json

PREVIOUS = ".previous"
"""The folder of a run that keeps what other work has replaced."""
LOCK_SECONDS = 5.0
"""How long to wait for a lock: the kernel of a runner that was killed takes a moment to notice."""
_AT_THE_START = {"begun.json", "params.yaml", "record.json"}
_locks: set[Path] = set()
"""The lock files that this process holds."""


class Interrupted(KeyboardInterrupt):
    """A stage that was interrupted; in a notebook one line instead of a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's name
        return [str(self)]


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
        self._check_current()
        with holding(self.run / ".lock", f"notebook {self.folder.name}"):
            _begin(self)
            try:
                yield
            except KeyboardInterrupt as error:
                give_up(self.run, self.name, "interrupted", "stopped by an interrupt")
                raise Interrupted(f"{self.folder.name}: interrupted; run the cell again to resume") from error
            except Exception as error:
                give_up(self.run, self.name, "failed", f"{type(error).__name__}: {error}")
                raise

    def _check_current(self) -> None:
        names = _assigned(self.namespace)
        current = studies.check(self.name, _only(self.namespace, names or type(self.p).model_fields))
        changed = [
            f"{name} is {value!r} now and was {getattr(self.p, name)!r} then"
            for name, value in current
            if value != getattr(self.p, name)
        ]
        if changed:
            raise RunError(f"parameters have changed since runs.start ({'; '.join(changed)}): run that cell again")
        if identity.of(self.name, self.p, self.run)["inputs"] != self.identity["inputs"]:
            raise RunError(f"{self.run}: inputs have changed since runs.start: run that cell again")


def outputs() -> Path:
    """The folder of all runs: ``outputs/`` of the project, or the one that FEDHUBERT_OUTPUTS names."""
    return (params.ROOT / (os.environ.get("FEDHUBERT_OUTPUTS") or "outputs")).resolve()


def start(stage: str, namespace: dict[str, Any]) -> Stage:
    """Begin ``stage``: the first library call of its notebook, ``runs.start("corpus", globals())``.

    Checks the parameters, that the stages before are done and that nobody else works in the run; prints what will
    become of the folder's content. Writes nothing. Raises ParameterError or RunError.
    """
    p = studies.check(stage, _only(namespace, _assigned(namespace) or namespace))
    run = outputs() / p.run
    if stage != "corpus" and (lost := lost_audio(run)):
        raise RunError(
            f"{lost}: no such file; was this run moved? Run notebooks 00_corpus and 01_partition again: they write"
            " where it is now, and later stages keep their results. If not: fedhubert run --from corpus --force"
        )
    if run.exists():
        with holding(run / ".lock", f"notebook {params.FOLDERS[stage]}"):
            pass
    now = identity.of(stage, p, run)
    if words := announcement(stage, prospect(stage, now, run), run):
        print(f"{params.FOLDERS[stage]}: {words}")
    facts = {
        "study": (read_json(run / "run.json") or {}).get("study", run.name),
        "run": run.name,
        "seed": p.seed,
        "git": identity.git(),
        "versions": now["versions"],
        "hardware": resources.hardware(),
        "data": identity.data_fingerprint(run),
    }
    return Stage(stage, run, p, {"stage": stage, **facts, "started": clock(time.time())}, now, namespace)


def finish(stage: Stage, headline: Mapping[str, float | int | str]) -> dict[str, Any]:
    """End the stage: the last call of its notebook. ``fedhubert ls`` shows ``headline``, its main figures.

    Writes ``done.json`` last of all. Returns the provenance, now with time and peak memory.
    """
    folder = stage.folder
    if wrong := [name for name, value in headline.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise RunError(f"{folder.name}: headline figure {', '.join(wrong)} is NaN or infinite; see the cells above")
    with holding(stage.run / ".lock", f"notebook {folder.name}"):
        begun = read_json(folder / "begun.json")
        if begun is None or identity.compare(begun["identity"], stage.identity).results:
            raise RunError(f"{folder}: holds no work of these parameters; run the notebook again from its top")
        work = begun["identity"] | {"notebook": stage.identity["notebook"]}
        work["inputs"] |= identity.listings(stage.p)  # what has been downloaded or unpacked
        resumed = begun.get("resumed", [])
        files.write_json(folder / "begun.json", {"identity": work, "started": begun["started"], "resumed": resumed})
        started = max(begun["started"], stage.began)
        used = _used_since(started)
        facts = {**stage.provenance, **used, "data": identity.data_fingerprint(stage.run)}
        state = {"state": "done", "headline": dict(headline), **used}
        record(stage.run, {"data": facts["data"]}, stage.name, state)
        done = {"identity": work, **identity.results(stage.name, stage.p, folder), "headline": dict(headline)}
        done |= {"started": started, "finished": time.time(), "resumed": resumed}
        files.write_json(folder / "done.json", done)
    return facts


def _begin(stage: Stage) -> None:
    """Make the stage's folder one of its work, see ``prospect``, and record that it is not done any more.

    The caller holds the run's lock.
    """
    run, folder = stage.run, stage.folder
    future = prospect(stage.name, stage.identity, run)
    begun: dict[str, Any] = {"started": time.time()}
    if future.source is not None:
        take_back(run, stage.name, future.source)
    elif future.kind not in ("keep", "resume"):
        replaced = _clear(run, stage.name)
        begun |= {} if replaced is None else {"replaced": replaced}
    forced(run, stage.name).unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
    if (before := read_json(folder / "begun.json")) is not None:
        begun = before
        if before["started"] < stage.began:
            changes = identity.compare(before["identity"], stage.identity)
            note = {"time": clock(time.time()), "changes": str(changes)}
            begun = before | {"started": time.time(), "resumed": [*before.get("resumed", []), note]}
    if (done := read_json(folder / "done.json")) is not None:
        begun |= {"done": done, "state": _states(run).get(stage.name, {})}
    with files.atomic(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(stage.p.model_dump(), sort_keys=False), encoding="utf-8")
    files.write_json(folder / "begun.json", begun | {"identity": stage.identity})
    (folder / "done.json").unlink(missing_ok=True)
    facts = {name: value for name, value in stage.provenance.items() if name not in ("stage", "started")}
    record(run, facts, stage.name, {"state": "running", "started": clock(begun["started"]), "git": facts["git"]})


def give_up(run: Path, stage: str, state: str, reason: str) -> None:
    """Record that ``stage`` did not end well, and in which ``state``. The caller holds the run's lock.

    Where nothing new was written, a stage that was done is done again, and work that had moved aside is back.
    """
    folder = run / params.FOLDERS[stage]
    begun = read_json(folder / "begun.json") or {}
    replaced, done = run / PREVIOUS / begun.get("replaced", "nothing"), begun.get("done")
    attempt = {"state": state, "reason": reason.split("\n")[0]}
    if replaced.is_dir() and not _has_results(folder):
        shutil.rmtree(folder)
        take_back(run, stage, replaced)
        record(run, {}, stage, {"last_attempt": attempt})
    elif done is not None and identity.outputs(folder) == done["outputs"]:
        work = {name: done[name] for name in ("identity", "started", "resumed")}
        files.write_json(folder / "begun.json", work)
        files.write_json(folder / "done.json", done)
        record(run, {}, stage, begun["state"] | {"last_attempt": attempt})
    else:
        record(run, {}, stage, attempt)


# --------------------------------------------------------------------------------------- what becomes of what there is


class Prospect(NamedTuple):
    """The fate of a stage's folder once the stage works: see ``prospect``."""

    kind: str
    """new, resume, keep (it is done), anew (the content moves aside), back (from ``.previous``)."""
    changes: Changes
    source: Path | None = None
    """back: where it is now."""


def prospect(stage: str, now: Mapping[str, Any], run: Path) -> Prospect:
    """What will become of the folder of ``stage`` in ``run`` once work of the identity ``now`` begins."""
    folder = run / params.FOLDERS[stage]
    begun = read_json(folder / "begun.json")
    if forced(run, stage).exists():
        return Prospect("anew" if folder.exists() else "new", Changes("forced"))
    changes = Changes() if begun is None else identity.compare(begun["identity"], now)
    if begun is not None and not changes.results:
        return Prospect("keep" if (folder / "done.json").exists() else "resume", changes)
    if begun is None and _has_results(folder):
        return Prospect("anew", Changes("no record of what made it"))
    for earlier in previous(run, stage):
        work = read_json(earlier / "begun.json")
        if work is not None and not identity.compare(work["identity"], now).results:
            return Prospect("back", changes, earlier)
    return Prospect("new" if begun is None else "anew", changes)


def announcement(stage: str, future: Prospect, run: Path) -> str:
    """``future`` in words; empty where a folder is new, or done and unchanged."""
    changes = future.changes
    if future.kind == "back":
        return f"{changes.results or 'was moved aside'}: taken back from {future.source}"
    if future.kind == "anew":
        words, target = f"{changes.results}: starts anew", _aside(run, stage)
        if _has_results(run / params.FOLDERS[stage]):
            words += f"\nits results move to {target}"
            if stage == "pretrain" and " rounds " in changes.results:
                words += f"; to train on from its weights instead: initial: {target}/checkpoint, in another run"
        return words
    if future.kind == "resume":
        return "was not finished: resumes" + (f" ({changes})" if any(changes) else "")
    return f"{changes}: its results are kept" if any(changes) else ""


def previous(run: Path, stage: str = "") -> list[Path]:
    """The folders of ``stage`` (default: of all) that have moved aside, the latest first."""
    paths = (run / PREVIOUS).glob(f"{params.FOLDERS.get(stage, '*')}-*")
    return sorted((path for path in paths if path.name.rpartition("-")[2].isdigit()), key=_number, reverse=True)


def _number(aside: Path) -> int:
    return int(aside.name.rpartition("-")[2])


def _aside(run: Path, stage: str) -> Path:
    """Where the folder of ``stage`` would move."""
    return run / PREVIOUS / f"{params.FOLDERS[stage]}-{max(map(_number, previous(run, stage)), default=0) + 1}"


def _clear(run: Path, stage: str) -> str | None:
    """Move the folder of ``stage``, with its executed notebook, to ``.previous/``; returns its name there, if any.

    A folder without results goes. The caller holds the run's lock.
    """
    folder, target = run / params.FOLDERS[stage], _aside(run, stage)
    if not _has_results(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    files.write_json(folder / "record.json", _states(run).get(stage, {}))
    notebook = run / f"{folder.name}.ipynb"
    if notebook.exists():
        notebook.replace(folder / notebook.name)
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    print(f"moved: {folder} -> {target}", flush=True)
    return target.name


def take_back(run: Path, stage: str, source: Path) -> None:
    """Move a folder of ``.previous/`` to its place. The caller holds the run's lock."""
    _clear(run, stage)
    folder = run / params.FOLDERS[stage]
    source.rename(folder)
    notebook = folder / f"{folder.name}.ipynb"
    if notebook.exists():
        notebook.replace(run / notebook.name)
    if (state := read_json(folder / "record.json")) is not None:
        record(run, {}, stage, state)
        (folder / "record.json").unlink()
    print(f"moved: {source} -> {folder}", flush=True)


def forced(run: Path, stage: str) -> Path:
    """The mark that asks for ``stage`` to start anew, whatever its folder holds."""
    return run / f".anew-{params.FOLDERS[stage]}"


def _has_results(folder: Path) -> bool:
    """Whether a stage's folder holds more than the records of its start, and figures."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return any(
        name.parts[0] != "figures" and name.as_posix() not in _AT_THE_START and not name.name.startswith(".")
        for name in names
    )


def lost_audio(run: Path) -> Path | None:
    """The first utterance of a synthetic corpus, if it is not where the tables say: the run was moved.

    They name audio by absolute path; 00_corpus and 01_partition of a run that was moved write them again.
    """
    manifest = run / "00_corpus" / "manifest.parquet"
    if not manifest.is_file() or not (run / "00_corpus" / "synthetic").is_dir():
        return None
    from pyarrow import parquet  # here: most commands do without

    first = Path(next(parquet.ParquetFile(manifest).iter_batches(1, columns=["path"]))["path"][0].as_py())
    return None if first.exists() or "synthetic" not in first.parts else first


# ------------------------------------------------------------------------------------------ parameters of a notebook


def _only(namespace: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: namespace[name] for name in names if name in namespace}


def _assigned(namespace: Mapping[str, Any]) -> set[str]:
    """The names that a notebook's parameters cell has set when it was executed last; none where no cells are kept.

    IPython keeps the cells that were executed. A name that only an earlier version of that cell has set is no parameter
    any more; nor is one that a later cell has, but for those that do nothing but set plain values, as papermill's does.
    """
    cells = namespace.get("In")
    cells = [(source, *_assignments(source)) for source in cells] if isinstance(cells, list) else []
    numbers = [  # papermill's cell may set any of them
        number for number, (source, names, _) in enumerate(cells) if {"run", "seed"} <= names and source[:2] != "# "
    ]
    if not numbers:
        return set()
    return cells[numbers[-1]][1].union(*(names for _, names, plain in cells[numbers[-1] :] if plain))


def _assignments(source: str) -> tuple[set[str], bool]:
    """The names that a cell sets if it does nothing else, else none; and whether all their values are plain."""
    names, plain = set(), True
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set(), False
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not all(isinstance(item, ast.Name) for item in targets):
            return set(), False
        names |= {target.id for target in targets}
        try:
            ast.literal_eval(node.value)
        except ValueError:
            plain = False
    return names, plain


# ------------------------------------------------------------------------------------------------- record and locks


def record(run: Path, facts: Mapping[str, Any], stage: str = "", state: Mapping[str, Any] | None = None) -> None:
    """Put ``facts`` at the top level of run.json and ``state`` under ``stage``. The caller holds the run's lock."""
    whole = read_json(run / "run.json") or {}
    stages = whole.pop("stages", {})
    if state is not None:
        before = {} if state.get("state") == "running" else stages.get(stage, {})
        stages[stage] = before | dict(state)
    files.write_json(run / "run.json", whole | dict(facts) | {"stages": stages})


def _states(run: Path) -> dict[str, Any]:
    return (read_json(run / "run.json") or {}).get("stages", {})


def _used_since(started: float) -> dict[str, Any]:
    """Time since ``started``, and the peak memory of the notebook or of its largest worker, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [resources.peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit]
    now, torch = time.time(), sys.modules.get("torch")
    used = {"finished": clock(now), "seconds": round(now - started, 1), "peak_memory_bytes": max(peaks)}
    if torch and torch.cuda.is_initialized():
        used["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return used


def clock(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def holding(path: Path, who: str) -> Iterator[None]:
    """Hold the lock file ``path`` inside the block. Raises RunError if another process does."""
    if path in _locks:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path, LOCK_SECONDS) as free:
        if not free:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise RunError(
                f"{path.parent}: in use by {holder}. Wait for it, stop it (a notebook: shut its kernel down), "
                "or give this run another name"
            )
        about = f"{who}, process {os.getpid()} on {socket.gethostname()}, since {clock(time.time())}\n"
        path.write_text(about, encoding="utf-8")
        _locks.add(path)
        try:
            yield
        finally:
            _locks.discard(path)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock file ``path``."""
    if not path.exists():
        return False
    with files.locked(path) as free:
        return not free
