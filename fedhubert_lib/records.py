"""The folder of a stage through its life: what is in it, where it moves, what run.json tells of it.

Other work moves what is there to ``RUN/.previous/STAGE-NUMBER`` and is taken back from there when it is asked for
again. Nothing that cost time is deleted.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files, identity, params

PREVIOUS = ".previous"
"""The folder in a run to which work moves that other work replaces."""
_BEGINNING = {"begun.json", "params.yaml", "record.json"}


class Prospect(NamedTuple):
    """What will become of a stage's folder once the stage works: see ``prospect``."""

    kind: str
    """new, resume, keep (it is done), anew (what is there moves aside), back (from ``.previous``)."""
    changes: identity.Changes
    source: Path | None = None
    """back: where it is now."""


def record(run: Path, facts: Mapping[str, Any], stage: str = "", state: Mapping[str, Any] | None = None) -> None:
    """Put ``facts`` at the top level of run.json and ``state`` under ``stage``. For the holder of the run's lock."""
    path = run / "run.json"
    whole = identity.read_json(path) or {"stages": {}}
    stages = whole.pop("stages")
    if state is not None:
        before = {} if state.get("state") == "running" else stages.get(stage, {})
        stages[stage] = before | dict(state)
    files.write_json(path, whole | dict(facts) | {"stages": stages})


def prospect(stage: str, now: Mapping[str, Any], run: Path) -> Prospect:
    """What will become of the folder of ``stage`` in ``run`` once work of the identity ``now`` begins there."""
    folder = run / params.FOLDERS[stage]
    begun = identity.read_json(folder / "begun.json")
    changes = identity.Changes("", "", "", "")
    if forced(run, stage).exists():
        return Prospect("anew" if folder.exists() else "new", changes._replace(results="forced"))
    if begun is not None:
        changes = identity.compare(begun["identity"], now)
        if not changes.results:
            return Prospect("keep" if (folder / "done.json").exists() else "resume", changes)
    elif has_results(folder):
        return Prospect("anew", changes._replace(results="no record of what made it"))
    for earlier in previous(run, stage):
        record = identity.read_json(earlier / "begun.json")
        if record is not None and not identity.compare(record["identity"], now).results:
            return Prospect("back", changes, earlier)
    return Prospect("new" if begun is None else "anew", changes)


def announcement(stage: str, what: Prospect, run: Path) -> str:
    """``what`` in words; empty where a folder is new, or done and unchanged."""
    changes = what.changes
    if what.kind == "back":
        return f"{changes.results or 'was moved aside'}: taken back from {what.source}"
    if what.kind == "anew":
        words, target = f"{changes.results}: starts anew", _aside(run, stage)
        if has_results(run / params.FOLDERS[stage]):
            words += f"\nwhat is there moves to {target}"
            if stage == "pretrain" and " rounds " in changes.results:
                words += f"; to train on from its weights instead: initial: {target}/checkpoint, in another run"
        return words
    if what.kind == "resume":
        return "was not finished: goes on where it stopped" + (f" ({changes})" if any(changes) else "")
    return f"{changes}: its results are kept" if any(changes) else ""


def previous(run: Path, stage: str = "") -> list[Path]:
    """The folders of ``stage`` (default: of all) that have moved aside, the latest first."""
    name = params.FOLDERS.get(stage, "*")
    found = [path for path in (run / PREVIOUS).glob(f"{name}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def move_aside(run: Path, stage: str) -> Path:
    """Move the folder of ``stage``, with its executed notebook, to ``.previous/``; returns where it is then.

    The caller holds the run's lock.
    """
    folder, target = run / params.FOLDERS[stage], _aside(run, stage)
    state = (identity.read_json(run / "run.json") or {"stages": {}})["stages"].get(stage, {})
    files.write_json(folder / "record.json", state)
    notebook = run / f"{folder.name}.ipynb"
    if notebook.exists():
        notebook.replace(folder / notebook.name)
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    print(f"moved: {folder} -> {target}", flush=True)
    return target


def clear(run: Path, stage: str) -> str | None:
    """Make way for other work in the folder of ``stage``; the name in ``.previous/`` of what was there, if anything."""
    folder = run / params.FOLDERS[stage]
    if has_results(folder):
        return move_aside(run, stage).name
    shutil.rmtree(folder, ignore_errors=True)
    return None


def take_back(run: Path, stage: str, source: Path) -> None:
    """Undo ``move_aside``. The caller holds the run's lock, and there is no folder of ``stage``."""
    folder = run / params.FOLDERS[stage]
    source.rename(folder)
    notebook = folder / f"{folder.name}.ipynb"
    if notebook.exists():
        notebook.replace(run / notebook.name)
    if (state := identity.read_json(folder / "record.json")) is not None:
        record(run, {}, stage, state)
        (folder / "record.json").unlink()
    print(f"moved: {source} -> {folder}", flush=True)


def give_up(run: Path, stage: str, state: str, reason: str, done: Mapping[str, Any] | None = None) -> None:
    """Record that ``stage`` did not end well. ``done`` is its done.json from before it began.

    Where nothing new was written, what was there is done as before, and work that had moved aside is back.
    """
    folder = run / params.FOLDERS[stage]
    begun = identity.read_json(folder / "begun.json") or {}
    replaced = run / PREVIOUS / (begun.get("replaced") or "nothing")
    attempt = {"state": state, "reason": reason.split("\n")[0]}
    if replaced.is_dir() and not has_results(folder):
        shutil.rmtree(folder)
        take_back(run, stage, replaced)
    elif done is not None and identity.content(folder) == done["outputs"]:
        files.write_json(
            folder / "begun.json", begun | {key: done[key] for key in ("identity", "resumed") if key in done}
        )
        files.write_json(folder / "done.json", done)
        record(run, {}, stage, begun["before"])
    else:
        record(run, {}, stage, attempt)
        return
    record(run, {}, stage, {"last_attempt": attempt})


def anew(run: Path, stage: str) -> None:
    """Ask for ``stage`` to be made anew at its next start, whatever is there."""
    run.mkdir(parents=True, exist_ok=True)
    forced(run, stage).touch()


def forced(run: Path, stage: str) -> Path:
    return run / f".anew-{params.FOLDERS[stage]}"


def _aside(run: Path, stage: str) -> Path:
    """Where the folder of ``stage`` would move."""
    number = max((int(path.name.rpartition("-")[2]) for path in previous(run, stage)), default=0)
    return run / PREVIOUS / f"{params.FOLDERS[stage]}-{number + 1}"


def has_results(folder: Path) -> bool:
    """Whether there is more in a stage's folder than the records of its start, and pictures."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return any(
        name.parts[0] != "figures" and name.as_posix() not in _BEGINNING and not name.name.startswith(".")
        for name in names
    )
