"""A training run on disk: a folder per round, written atomically, so that the same command resumes after any kill.

``checkpoints/round-00012/`` holds the weights (``model.safetensors``, ``head.safetensors``: a file per first part of
the tensors' names), the optimiser's tensors (``server.safetensors``), ``state.json`` (counters, and the settings they
belong to), and the documents that make it a model folder. The last is kept. ``checkpoints/model-00004/`` is the model
folder alone; those of rounds 1, 2, 4, 8 … stay, so that quality can be plotted over hours of speech heard.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedhubert_lib import files, params, pretrained
from fedhubert_lib.weights import Arrays

OnRow = Callable[[dict[str, Any]], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another study."""


def decisive(p: params.Federation) -> dict[str, Any]:
    """The parameters that must not change when training resumes: not where it runs; of a checkpoint whether there is
    one, not where it lies."""
    values = p.model_dump(mode="json", exclude={*params.HOW, *params.ADDITIONS})
    return values | dict.fromkeys(params.places(p), "a folder")


@contextlib.contextmanager
def sole(out: Path) -> Iterator[None]:
    """Hold ``out`` for this process alone; the system lets go of it when the process dies, however that happens.

    Raises RuntimeError when another process trains there. Clears away what a killed one left half-written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out / ".lock") as free:
        if not free:
            raise RuntimeError(f"{out}: another process trains in this folder; wait for it, or name another run")
        files.sweep(out / "checkpoints")
        yield


def path(out: Path, number: int) -> Path:
    """The folder of round ``number``."""
    return out / "checkpoints" / f"round-{number:05d}"


def write(out: Path, weights: Arrays, server: Arrays, state: Mapping[str, Any], documents: Mapping[str, str]) -> None:
    """Write the ``round`` of ``state`` and remove earlier ones. ``weights`` are named FILE.NAME, such as
    ``model.masked_spec_embed``; ``server`` are the tensors that server and hooks keep; ``documents`` are small text
    files by name."""
    number, groups = state["round"], _by_file(weights)
    if number & (number - 1) == 0:  # before the round is done: a kill in between leaves both to be written again
        with files.atomic(out / "checkpoints" / f"model-{number:05d}") as temporary:
            pretrained.write(temporary, {"model": groups["model"]}, documents)
    state_text = json.dumps(dict(state), indent=2, allow_nan=False) + "\n"
    with files.atomic(path(out, number)) as temporary:
        pretrained.write(temporary, groups | {"server": server}, {**documents, "state.json": state_text})
    for earlier in rounds(out):
        if earlier < number:
            shutil.rmtree(path(out, earlier), ignore_errors=True)  # NFS keeps open files; the next write tries again


def save(folder: Path, weights: Arrays, documents: Mapping[str, str]) -> Path:
    """Write a model folder of the tensors called model.NAME and head.NAME, without what else was trained; its path."""
    groups = _by_file(weights)
    with files.atomic(folder) as temporary:
        pretrained.write(temporary, {name: groups[name] for name in ("model", "head") if name in groups}, documents)
    return folder


def _by_file(weights: Arrays) -> dict[str, Arrays]:
    groups: dict[str, Arrays] = {}
    for name, tensor in weights.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def rounds(out: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    folders = (out / "checkpoints").glob("round-*")
    return sorted(int(folder.name[6:]) for folder in folders if folder.name[6:].isdecimal())  # others are copies


def read(out: Path, number: int) -> tuple[Arrays, Arrays, dict[str, Any]]:
    """Weights, server tensors and state of round ``number``. Raises CheckpointError when a file does not read."""
    folder = path(out, number)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        groups = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({error}); move it away to resume from an earlier round, or from the start"
        ) from error
    server = groups.pop("server", {})
    weights = {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    return weights, server, state


def resume(out: Path, settings: Mapping[str, Any], weights: Arrays, server: Arrays) -> dict[str, Any]:
    """Write the last checkpoint (see ``read``) into ``weights`` and ``server``, which keep the order of a fresh start:
    sums over tensors then round alike. Returns its state; empty where there is no checkpoint yet.

    Raises CheckpointError when it was made with other ``settings`` (JSON-like): they would not give what a run that was
    never stopped gives; or when it does not hold tensors of those names, shapes and dtypes.
    """
    if not (done := rounds(out)):
        return {}
    saved_weights, saved_server, state = read(out, done[-1])
    then = state["settings"]
    # Settings in one of them alone are parameters that another version of the bench does not have.
    common = sorted(then.keys() & settings.keys())
    if changed := [f"{name}: {then[name]} -> {settings[name]}" for name in common if then[name] != settings[name]]:
        raise CheckpointError(f"{out}: a run of other parameters ({', '.join(changed)}); name another, or move it away")
    for saved, fresh in (saved_weights, weights), (saved_server, server):
        kinds = [{(name, tensor.dtype, tensor.shape) for name, tensor in group.items()} for group in (saved, fresh)]
        if differing := sorted({name for name, *_ in kinds[0] ^ kinds[1]}):
            raise CheckpointError(f"{path(out, done[-1])}: does not hold this model's tensors: {differing[:3]}")
        for name, tensor in fresh.items():
            tensor.copy_(saved[name])
    return state


class Ledger:
    """metrics.jsonl: rows of rounds, clients, failures, what was sent before; ``on_row`` sees them as they come."""

    def __init__(self, out: Path, done: int, plan: Mapping[str, Any], on_row: OnRow | None) -> None:
        """Begin with the row ``plan``, or resume after round ``done``: rows of later rounds go, but for those of
        attempts at the next one that failed as a whole."""
        self._path, self._on_row = out / "metrics.jsonl", on_row
        rows = files.read_rows(self._path)
        next_failures = [row for row in rows if row["kind"] == "failure" and row["round"] == done + 1]
        while next_failures and next_failures[-1]["client"]:  # of an attempt that was not finished
            next_failures.pop()
        self.failed: list[dict[str, Any]] = [row for row in next_failures if not row["client"]]
        """The rows of the next round's attempts that failed as a whole."""
        rows = [row for row in rows if row.get("round", 0) <= done] + next_failures
        files.write_text(self._path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        events = files.events()
        self._curve = events and events.Curve(out, done + 1)
        if not rows:
            self.row("plan", plan)

    def row(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one row."""
        row = {"kind": kind, **values, "time": time.time()}
        files.append_row(self._path, row, durable=kind == "round")  # before its checkpoint
        if kind == "round":
            self.failed = []
            if self._curve is not None:
                self._curve.add(row, row["round"], row["time"])
        elif kind == "failure" and not row["client"]:
            self.failed.append(row)
        if self._on_row is not None:
            self._on_row(row)
