"""One folder is one run: where it is, whose turn it is, what made it, and what of it is still true.

Every notebook begins with ``start`` and ends with ``finish``. Between them it holds the run's lock. ``done.json``,
written last, is the only sign of success; ``begun.json`` holds the identity of the work in the folder: parameters,
inputs, library source and notebook. A stage started again with the same work goes on where it stopped; with other work
its folder is emptied first, so that nothing of one is ever taken for the other.
"""

import contextlib
import fcntl
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from fedhubert_lib import files, identity, params, threads
from fedhubert_lib.identity import RunError, read_json

_PACKAGES = ("fedhubert", "torch", "torchaudio", "flwr", "numpy", "scikit-learn", "pandas", "pyarrow", "papermill")

PATIENCE = 5.0
"""Seconds to wait for a lock: the kernel of a runner that was killed takes one to notice."""

_held: dict[Path, IO[str]] = {}
"""The locks of this process."""


@dataclass(frozen=True)
class Stage:
    """What a notebook works with between ``start`` and ``finish``."""

    name: str
    run: Path
    """The folder of the run."""
    folder: Path
    """The folder of this stage in it; ``figures/`` is there."""
    p: Any
    """The checked parameters: the stage's section of ``fedhubert_lib.params``."""
    provenance: dict[str, Any]
    """Study, run, seed, git commit, versions, hardware, data fingerprint, start: for the notebook's top."""

    @property
    def figures(self) -> Path:
        return self.folder / "figures"


def outputs() -> Path:
    """The folder of all runs: ``outputs/`` of the project, or where FEDHUBERT_OUTPUTS points."""
    return (params.ROOT / (os.environ.get("FEDHUBERT_OUTPUTS") or "outputs")).resolve()


def start(stage: str, namespace: dict[str, Any]) -> Stage:
    """Begin ``stage``: the first library call of its notebook, ``runs.start("corpus", globals())``.

    Checks the parameters, takes the run's lock, makes sure that the stage before is done, and makes the stage's folder
    ready. Raises ParameterError or RunError.
    """
    # Run All in a kernel that is already warm: what later cells have set since is not a parameter.
    first = namespace.get("_names_at_start")
    fields = params.SECTIONS[stage].model_fields
    given = namespace if first is None else {k: v for k, v in namespace.items() if k in first or k in fields}
    p = params.check(stage, given)
    namespace["_names_at_start"] = first or frozenset(namespace)

    check_places(stage, p)
    run = outputs() / p.run
    if stage != "corpus":
        _check_audio(run)
    hold(run / ".lock", f"notebook {params.FOLDERS[stage]}")
    folder = run / params.FOLDERS[stage]
    now = identity.of(stage, p, run)
    before = read_json(folder / "begun.json")
    if folder.exists() and (before is None or not identity.same_work(before["identity"], now)):
        (folder / "begun.json").unlink(missing_ok=True)  # first, so that a folder half emptied is not gone on with
        shutil.rmtree(folder)
    (folder / "done.json").unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
    with files.atomic(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(p.model_dump(), sort_keys=False))
    files.write_json(folder / "begun.json", {"identity": now, "started": time.time()})
    facts = provenance(run, p.seed)
    began = {"started": _clock(time.time()), "git": facts["git"]}
    record(run, facts, stage, {"state": "running", **began})
    return Stage(stage, run, folder, p, {"stage": stage, **facts, **began})


def _check_audio(run: Path) -> None:
    """Tables name audio by absolute path: that of a run with a corpus of its own moves only together with a link."""
    manifest = run / "00_corpus" / "manifest.parquet"
    if not manifest.is_file() or not (run / "00_corpus" / "synthetic").is_dir():
        return
    from pyarrow import parquet  # here: most commands do without

    first = next(parquet.ParquetFile(manifest).iter_batches(1, columns=["path"]))["path"][0].as_py()
    if not Path(first).exists():
        raise RunError(
            f"{first}: is not there; this run was made at another place, to which its tables point. Move it back, leave"
            " a link to it there, or make it anew: --from corpus --force"
        )


def finish(stage: Stage, headline: Mapping[str, float | int | str]) -> dict[str, Any]:
    """End the stage: the last call of its notebook. ``headline`` is what ``fedhubert ls`` and the index show of it.

    Writes ``done.json`` last of all and gives the lock back. Returns the provenance, now with time and peak memory.
    """
    wrong = [k for k, v in headline.items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise RunError(
            f"{stage.folder.name}: headline figure {', '.join(wrong)} is NaN or infinite; see the cells above"
        )
    begun = read_json(stage.folder / "begun.json")
    if begun is None:
        raise RunError(f"{stage.folder}: begun.json has gone; run the notebook again from its top")
    listings = identity.listings(stage.p)
    if begun["identity"]["inputs"] != begun["identity"]["inputs"] | listings:  # what has been downloaded or unpacked
        begun["identity"]["inputs"] |= listings
        files.write_json(stage.folder / "begun.json", begun)
    used = _since(begun["started"])
    facts = {**stage.provenance, **used, "data": identity.data_fingerprint(stage.run)}
    done = {
        "identity": begun["identity"],
        "outputs": identity.content(stage.folder),
        "headline": dict(headline),
        "started": begun["started"],
        "finished": time.time(),
    }
    state = {"state": "done", "headline": dict(headline), **used}
    record(stage.run, {"data": facts["data"]}, stage.name, state)
    files.write_json(stage.folder / "done.json", done)
    release(stage.run / ".lock")
    return facts


def check_places(stage: str, p: params.Section) -> None:
    """Raise RunError if a file or folder that a parameter points to is not there."""
    lines = [f"{stage}.{name}: {place}: no such file or folder" for name, place in params.absent(p).items()]
    if lines:
        raise RunError("\n".join(lines))


def hold(path: Path, who: str) -> None:
    """Take the lock file ``path`` for this process, until ``release`` or its end. Raises RunError if another has it."""
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    until = time.monotonic() + PATIENCE
    while not (taken := _locked(file)) and time.monotonic() < until:
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
    file.write(f"{who}, process {os.getpid()} on {socket.gethostname()}, since {_clock(time.time())}\n")
    file.flush()
    _held[path] = file


@contextlib.contextmanager
def holding(path: Path, who: str) -> Iterator[None]:
    """``hold`` for as long as the ``with`` block lasts."""
    hold(path, who)
    try:
        yield
    finally:
        release(path)


def release(path: Path) -> None:
    """Give back what ``hold`` took."""
    if path in _held:
        _held.pop(path).close()


def provenance(run: Path, seed: int) -> dict[str, Any]:
    """What made a result: for run.json and for the top of every notebook."""
    return {
        "study": (read_json(run / "run.json") or {}).get("study", run.name),
        "run": run.name,
        "seed": seed,
        "git": git(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "data": identity.data_fingerprint(run),
    }


def git() -> dict[str, Any]:
    """Commit of the project, and whether its files differ from it."""
    command = ["git", "-C", str(params.ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an archive of the source
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def record(run: Path, facts: Mapping[str, Any], stage: str = "", state: Mapping[str, Any] | None = None) -> None:
    """Put ``facts`` at the top level of run.json and ``state`` under ``stage``. For the holder of the run's lock."""
    path = run / "run.json"
    whole = read_json(path) or {"stages": {}}
    stages = whole.pop("stages")
    if state is not None:
        before = {} if state["state"] == "running" else stages.get(stage, {})
        stages[stage] = before | dict(state)
    files.write_json(path, whole | dict(facts) | {"stages": stages})


def hardware() -> dict[str, Any]:
    """What this machine has. GPUs are listed once torch is loaded: a stage that does without it uses none."""
    torch = sys.modules.get("torch")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": threads.cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
    }


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _since(started: float) -> dict[str, Any]:
    """Time since ``started``, and the peak memory of the notebook or of its largest worker, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    now, torch = time.time(), sys.modules.get("torch")
    used = {"finished": _clock(now), "seconds": round(now - started, 1), "peak_memory_bytes": max(peaks)}
    if torch and torch.cuda.is_initialized():
        used["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return used


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
