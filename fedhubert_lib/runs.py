"""One folder is one run: where it is, whose turn it is, what made it, and what of it is still true.

Every notebook begins with ``start``, which checks and changes nothing, does its work inside ``Stage.working`` and ends
with ``finish``. ``begun.json`` holds the identity of the work in a stage's folder, ``done.json``, written last, is the
only sign of success. The same work resumes where it stopped. Other work moves what is there to ``.previous/``, and is
taken back from there when it is asked for again: nothing that cost time is deleted.
"""

import ast
import contextlib
import functools
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from fedhubert_lib import files, identity, params, provenance, records, studies
from fedhubert_lib.identity import RunError, read_json

PATIENCE = 5.0
"""Seconds to wait for a lock: the kernel of a runner that was killed takes one to notice."""

_held: dict[Path, IO[str]] = {}
"""The locks of this process."""


class Interrupted(KeyboardInterrupt):
    """A stage that was interrupted; in a notebook one line instead of a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's name
        return [str(self)]


@dataclass(frozen=True)
class Stage:
    """What a notebook works with between ``start`` and ``finish``."""

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

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of this stage, ready to be written into; ``figures/`` is there.

        Asked for first, it is prepared: other work that lay there moves aside, and this process holds the run's lock
        until ``working`` or ``finish`` ends. Where the stage is done nothing changes.
        """
        lock = self.run / ".lock"
        hold(lock, f"notebook {params.FOLDERS[self.name]}")
        folder = _prepare(self)
        if (folder / "done.json").exists():
            release(lock)
        else:
            _begin(self, folder)
        return folder

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around whatever makes or changes results: holds the run's lock, and records how it ended.

        Raises RunError when parameters or inputs are no longer those that ``start`` saw. An interrupt ends in
        ``Interrupted``. A stage that fails before it has written anything leaves what was there as it was.
        """
        self._check_current()
        lock = self.run / ".lock"
        hold(lock, f"notebook {params.FOLDERS[self.name]}")
        try:
            self.__dict__.pop("folder", None)  # an attempt that failed may have moved it
            done = read_json(self.folder / "done.json")
            hold(lock, f"notebook {params.FOLDERS[self.name]}")
            _begin(self, self.folder)
            try:
                yield
            except KeyboardInterrupt as error:
                records.give_up(self.run, self.name, "interrupted", "stopped by an interrupt", done)
                raise Interrupted(f"{self.folder.name}: interrupted; run the cell again to resume") from error
            except Exception as error:
                records.give_up(self.run, self.name, "failed", f"{type(error).__name__}: {error}", done)
                raise
        finally:
            release(lock)

    def _check_current(self) -> None:
        current = studies.check(self.name, _assigned(self.name, self.namespace))
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
    """The folder of all runs: ``outputs/`` of the project, or where FEDHUBERT_OUTPUTS points."""
    return (params.ROOT / (os.environ.get("FEDHUBERT_OUTPUTS") or "outputs")).resolve()


def start(stage: str, namespace: dict[str, Any]) -> Stage:
    """Begin ``stage``: the first library call of its notebook, ``runs.start("corpus", globals())``.

    Checks the parameters, that the stages before are done and that nobody else works in the run; says what will become
    of what is there. Writes nothing. Raises ParameterError or RunError.
    """
    namespace.setdefault("_names_at_start", frozenset(namespace))
    p = studies.check(stage, _assigned(stage, namespace))
    check_places(stage, p)
    run = outputs() / p.run
    if stage != "corpus" and (lost := lost_audio(run)):
        raise RunError(
            f"{lost}: is not there; was this run moved? Run notebooks 00_corpus and 01_partition again, which point"
            " to where it is now: what rests on them stays. If not: fedhubert run --from corpus --force"
        )
    if run.exists():
        with holding(run / ".lock", f"notebook {params.FOLDERS[stage]}"):
            pass
    now = identity.of(stage, p, run)
    if words := records.announcement(stage, records.prospect(stage, now, run), run):
        print(f"{params.FOLDERS[stage]}: {words}")
    facts = provenance.of(run, p.seed)
    return Stage(stage, run, p, {"stage": stage, **facts, "started": provenance.clock(time.time())}, now, namespace)


def _prepare(stage: Stage) -> Path:
    """Make the stage's folder one of its work, or empty: see ``records.prospect``. For the holder of the lock."""
    run, folder = stage.run, stage.run / params.FOLDERS[stage.name]
    what = records.prospect(stage.name, stage.identity, run)
    begun: dict[str, Any] = {"identity": stage.identity, "started": time.time()}
    if what.kind in ("new", "anew", "back"):
        begun["replaced"] = records.clear(run, stage.name)
    if what.kind == "back":
        records.take_back(run, stage.name, what.source)
    elif what.kind in ("new", "anew"):
        files.write_json(folder / "begun.json", begun)
    records.forced(run, stage.name).unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
    return folder


def _begin(stage: Stage, folder: Path) -> None:
    """Record in the folder and in run.json that the stage works; it is not done any more."""
    begun = read_json(folder / "begun.json")
    if begun is None:
        raise RunError(f"{folder}: begun.json has gone; run the notebook again from its top")
    if begun["started"] < stage.began:
        changes = identity.compare(begun["identity"], stage.identity)
        note = {"time": provenance.clock(time.time()), "changes": str(changes)}
        begun |= {"started": time.time(), "resumed": [*begun.get("resumed", []), note]}
    state = (read_json(stage.run / "run.json") or {"stages": {}})["stages"].get(stage.name, {})
    begun |= {"identity": stage.identity, "before": state}
    with files.atomic(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(stage.p.model_dump(), sort_keys=False), encoding="utf-8")
    files.write_json(folder / "begun.json", begun)
    (folder / "done.json").unlink(missing_ok=True)
    facts = {name: value for name, value in stage.provenance.items() if name not in ("stage", "started")}
    state = {"state": "running", "started": provenance.clock(begun["started"]), "git": facts["git"]}
    records.record(stage.run, facts, stage.name, state)


def _assigned(stage: str, namespace: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables of a notebook that its parameters cell has set, as it was executed last.

    IPython keeps the cells that were executed. What only earlier versions of that cell have set is no parameter any
    more; nor is what later cells have, but for those that do nothing but set plain values (as papermill's does).
    """
    cells = namespace.get("In")
    cells = cells if isinstance(cells, list) else []
    assigned = [_assignments(source) for source in cells]
    parameters = [
        number
        for number, (names, _) in enumerate(assigned)
        if {"run", "seed"} <= names and not cells[number].startswith("# Parameters")  # papermill's, which has any
    ]
    if not parameters:  # no kernel, or one that keeps no cells (nbval): what was there at the first start
        first = namespace["_names_at_start"] | params.SECTIONS[stage].model_fields.keys()
        return {name: value for name, value in namespace.items() if name in first}
    last = parameters[-1]
    names = assigned[last][0].union(*(names for names, plain in assigned[last:] if plain))
    return {name: namespace[name] for name in names if name in namespace}


def _assignments(source: str) -> tuple[set[str], bool]:
    """The names that a cell sets if it does nothing else, else none; and whether all their values are plain."""
    names, plain = set(), True
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set(), False
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not all(isinstance(each, ast.Name) for each in targets):
            return set(), False
        names |= {target.id for target in targets}
        try:
            ast.literal_eval(node.value)
        except ValueError:
            plain = False
    return names, plain


def lost_audio(run: Path) -> Path | None:
    """The first utterance, if the run has made its speech itself and that is not where its tables say.

    They name audio by absolute path: of a run that was moved, 00_corpus and 01_partition write them again.
    """
    manifest = run / "00_corpus" / "manifest.parquet"
    if not manifest.is_file() or not (run / "00_corpus" / "synthetic").is_dir():
        return None
    from pyarrow import parquet  # here: most commands do without

    first = Path(next(parquet.ParquetFile(manifest).iter_batches(1, columns=["path"]))["path"][0].as_py())
    return None if first.exists() or "synthetic" not in first.parts else first


def finish(stage: Stage, headline: Mapping[str, float | int | str]) -> dict[str, Any]:
    """End the stage: the last call of its notebook. ``headline`` is what ``fedhubert ls`` and the index show of it.

    Writes ``done.json`` last of all and gives the lock back. Returns the provenance, now with time and peak memory.
    """
    wrong = [k for k, v in headline.items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise RunError(
            f"{params.FOLDERS[stage.name]}: headline figure {', '.join(wrong)} is NaN or infinite; see the cells above"
        )
    hold(stage.run / ".lock", f"notebook {params.FOLDERS[stage.name]}")
    try:
        return _finish(stage, dict(headline))
    finally:
        release(stage.run / ".lock")


def _finish(stage: Stage, headline: dict[str, Any]) -> dict[str, Any]:
    folder = stage.folder
    begun = read_json(folder / "begun.json")
    if begun is None:
        raise RunError(f"{folder}: begun.json has gone; run the notebook again from its top")
    begun["identity"]["notebook"] = stage.identity["notebook"]
    begun["identity"]["inputs"] |= identity.listings(stage.p)  # what has been downloaded or unpacked
    begun = {name: value for name, value in begun.items() if name not in ("replaced", "before")}
    files.write_json(folder / "begun.json", begun)
    started = max(begun["started"], stage.began)
    used = provenance.since(started)
    facts = {**stage.provenance, **used, "data": identity.data_fingerprint(stage.run)}
    done = {
        "identity": begun["identity"],
        "outputs": identity.content(folder),
        "headline": headline,
        "started": started,
        "finished": time.time(),
        "resumed": begun.get("resumed", []),
    }
    if stage.name in ("corpus", "partition"):
        done["speech"] = identity.content(folder, places=False)
    state = {"state": "done", "headline": headline, **used}
    records.record(stage.run, {"data": facts["data"]}, stage.name, state)
    files.write_json(folder / "done.json", done)
    return facts


def _absent(section: params.Section) -> dict[str, str]:
    """Those of ``params.places`` that do not exist, but for what the stage may download."""
    fetched = {"root", "keywords_root"} if isinstance(section, params.Corpus) and section.download else set()
    return {n: place for n, place in params.places(section).items() if n not in fetched and not Path(place).exists()}


def check_places(stage: str, p: params.Section) -> None:
    """Raise RunError if a file or folder that a parameter points to is not there, or is what the stage will make."""
    lines = [f"{stage}.{name}: {place}: no such file or folder" for name, place in _absent(p).items()]
    for folder in list(params.FOLDERS.values())[list(params.FOLDERS).index(stage) :]:
        made = (outputs() / p.run / folder).resolve()
        lines += [
            f"{stage}.{name}: {place}: lies in what this run makes from it; give the run another name, or copy it first"
            for name, place in params.places(p).items()
            if Path(place).resolve().is_relative_to(made)
        ]
    if lines:
        raise RunError("\n".join(lines))


def hold(path: Path, who: str) -> None:
    """Take the lock file ``path`` for this process, until ``release`` or its end. Raises RunError if another has it."""
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    until = time.monotonic() + PATIENCE
    while not (taken := files.lock(file)) and time.monotonic() < until:
        time.sleep(0.1)
    if not taken:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"{path.parent}: in use by {holder}. Wait for it, stop it (a notebook: shut its kernel down), "
            "or give this run another name"
        )
    file.truncate(0)
    file.write(f"{who}, process {os.getpid()} on {socket.gethostname()}, since {provenance.clock(time.time())}\n")
    file.flush()
    _held[path] = file


@contextlib.contextmanager
def holding(path: Path, who: str) -> Iterator[None]:
    """``hold`` for as long as the ``with`` block lasts, or as this process held it before."""
    before = path in _held
    hold(path, who)
    try:
        yield
    finally:
        if not before:
            release(path)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock file ``path``."""
    if not path.exists():
        return False
    with path.open("a", encoding="utf-8") as file:
        return not files.lock(file)


def release(path: Path) -> None:
    """Give back what ``hold`` took."""
    if path in _held:
        _held.pop(path).close()
