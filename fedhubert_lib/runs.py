"""One folder is one run: where it is, whose turn it is, what made it, and what of it is still true.

Every notebook begins with ``start`` and ends with ``finish``. Between them it holds the run's lock. ``done.json``,
written last, is the only sign of success; ``begun.json`` holds the identity of the work in the folder: parameters,
inputs, library source and notebook. A stage started again with the same work goes on where it stopped; with other work
its folder is emptied first, so that nothing of one is ever taken for the other.
"""

import ast
import fcntl
import hashlib
import importlib.metadata
import json
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

import yaml

from fedhubert_lib import files, params

PRESENTATION = {"cli.py", "display.py", "params.py", "plots.py", "runs.py", "yaml12.py"}
"""Library files that no result depends on: when they change a stage is run again, but what it has made is kept."""

_DATA = {".bin", ".npy", ".parquet", ".safetensors"}
_PACKAGES = ("fedhubert", "torch", "torchaudio", "flwr", "numpy", "scikit-learn", "pandas", "pyarrow", "papermill")

_held: dict[Path, IO[str]] = {}
"""The locks of this process."""


class RunError(RuntimeError):
    """A run that cannot go on, and what to do."""


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
    """Run, seed, git commit, versions, hardware, data fingerprint, time: for the notebook's top."""

    @property
    def figures(self) -> Path:
        return self.folder / "figures"


def outputs() -> Path:
    """The folder of all runs: ``outputs/`` of the project, or where FEDHUBERT_OUTPUTS points."""
    return Path(os.environ.get("FEDHUBERT_OUTPUTS") or params.ROOT / "outputs").resolve()


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

    run = outputs() / p.run
    hold(run / ".lock", f"notebook {params.FOLDERS[stage]}")
    folder = run / params.FOLDERS[stage]
    now = identity(stage, p, run)
    before = read_json(folder / "begun.json")
    if before is None or not same_work(before["identity"], now):
        if folder.exists():
            shutil.rmtree(folder)
    (folder / "done.json").unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with files.atomic(folder / "params.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(p.model_dump(), sort_keys=False))
    files.write_json(folder / "begun.json", {"identity": now, "started": time.time()})
    facts = provenance(run, p.seed)
    record(run, stage, {"state": "running", "started": facts["started"], "git": facts["git"]}, facts)
    return Stage(stage, run, folder, p, {"stage": stage, **facts})


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
    used = _since(begun["started"])
    facts = {**stage.provenance, **used, "data": data_fingerprint(stage.run)}
    done = {
        "identity": begun["identity"],
        "outputs": _content(stage.folder),
        "headline": dict(headline),
        "started": begun["started"],
        "finished": time.time(),
    }
    state = {"state": "done", "headline": dict(headline), "git": facts["git"], "started": facts["started"], **used}
    record(stage.run, stage.name, state, {"data": facts["data"]})
    files.write_json(stage.folder / "done.json", done)
    release(stage.run / ".lock")
    return facts


def hold(path: Path, who: str) -> None:
    """Take the lock file ``path`` for this process, until ``release`` or its end. Raises RunError if another has it."""
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"{path.parent}: in use by {holder}. Wait for it, stop it (a notebook: shut its kernel down), "
            "or give this run another name"
        ) from None
    file.truncate(0)
    file.write(f"{who}, process {os.getpid()} on {socket.gethostname()}, since {_clock(time.time())}\n")
    file.flush()
    _held[path] = file


def release(path: Path) -> None:
    """Give back what ``hold`` took."""
    if path in _held:
        _held.pop(path).close()


def identity(stage: str, p: params.Section, run: Path) -> dict[str, Any]:
    """What the results of ``stage`` depend on: parameters, inputs, library source; and the notebook's own source.

    Inputs are the outputs of the stage before, by content, and the folders that parameters point to, by the names,
    sizes and times of their files. Raises RunError when the stage before is not done.
    """
    inputs: dict[str, str] = {}
    for before in list(params.FOLDERS.values())[: list(params.FOLDERS).index(stage)]:
        done = read_json(run / before / "done.json")
        if done is None:
            raise RunError(f"{run / before}: not done yet; run notebook {before} first, with run: {run.name}")
        stale = [folder for folder, content in inputs.items() if done["identity"]["inputs"][folder] != content]
        if stale:
            raise RunError(
                f"{run / before}: made from another {stale[0]} than is there now; run notebook {before} again"
            )
        inputs[before] = done["outputs"]
    inputs |= {name: _listing(place) for name, place in params.places(p).items()}
    path = params.ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb"
    cells = read_notebook(path)
    return {
        "parameters": p.model_dump(exclude={"run"}),
        "inputs": inputs,
        "library": library("\n".join(source for kind, source in cells if kind == "code"), path),
        "notebook": hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
    }


def same_work(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether what one has made is good for the other, whole or in part."""
    return not changes(one, other, results_only=True)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], results_only: bool = False) -> list[str]:
    """What differs between two identities, in words. ``results_only`` leaves out what no result depends on."""
    words = []
    for kind in ("parameters", "inputs", "library"):
        keys = sorted(k for k in old[kind].keys() | new[kind].keys() if old[kind].get(k) != new[kind].get(k))
        if kind == "library" and results_only:
            keys = [k for k in keys if k not in PRESENTATION]
        if kind == "parameters":
            keys = [f"{k} {old[kind].get(k)} -> {new[kind].get(k)}" for k in keys]
        if keys:
            words.append(f"{kind} changed: {', '.join(keys)}")
    if not results_only and old["notebook"] != new["notebook"]:
        words.append("notebook changed")
    return words


def read_notebook(path: Path) -> list[tuple[str, str]]:
    """Type and source of each cell: the notebook without outputs and metadata."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a notebook ({error!r}); restore it with git") from error


def library(code: str, path: Path) -> dict[str, str]:
    """SHA-256 of every library file that ``code`` imports, or that those import. ``path`` is named in errors."""
    package = params.ROOT / "fedhubert_lib"
    todo = list(_imports("\n".join(line for line in code.split("\n") if line.lstrip()[:1] not in ("%", "!")), path))
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        for file in (package / f"{name}.py", package / name / "__init__.py"):
            key = file.relative_to(package).as_posix()
            if key not in found and file.is_file():
                text = file.read_bytes()
                found[key] = hashlib.sha256(text).hexdigest()
                todo += _imports(text.decode(), file)
    return dict(sorted(found.items()))


def provenance(run: Path, seed: int) -> dict[str, Any]:
    """What made a result: for run.json and for the top of every notebook."""
    return {
        "run": run.name,
        "seed": seed,
        "git": git(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "data": data_fingerprint(run),
        "started": _clock(time.time()),
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


def data_fingerprint(run: Path) -> str | None:
    """One hash for all utterances of the run's manifest and the fingerprints of their files; none before 00_corpus."""
    manifest = run / params.FOLDERS["corpus"] / "manifest.parquet"
    if not manifest.exists():
        return None
    import pyarrow.parquet  # here, since it is slow to import and `fedhubert run` has no use for it

    digest = hashlib.sha256()
    for batch in pyarrow.parquet.ParquetFile(manifest).iter_batches(columns=["utterance", "fingerprint"]):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def record(run: Path, stage: str, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Put ``facts`` at the top level of run.json and ``state`` under the stage. Only the holder of the lock may."""
    path = run / "run.json"
    whole = read_json(path) or {"stages": {}}
    stages = whole.pop("stages")
    stages[stage] = dict(state)
    files.write_json(path, whole | dict(facts) | {"stages": stages})


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file of a run holds, or none if there is no such file. Raises RunError when it cannot be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and run the stage again") from error


def hardware() -> dict[str, Any]:
    """What this machine has."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def _since(started: float) -> dict[str, Any]:
    """Time and peak memory of a stage that began at ``started``; one that was resumed counts from there."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, children = (
        resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    now = time.time()
    return {"finished": _clock(now), "seconds": round(now - started, 1), "peak_memory_bytes": max(own, children)}


def _listing(place: str) -> str:
    """Hash of the names, sizes and times of all files under ``place``. Raises RunError if there is nothing."""
    root = Path(place)
    if not root.exists():
        raise RunError(f"{place}: no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if file.is_file():
            facts = file.stat()
            digest.update(f"{file.relative_to(root)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _content(folder: Path) -> str:
    """Hash of the data that a stage has made. Checkpoints of single rounds are left out: later stages read the last."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.suffix in _DATA and "checkpoints" not in name.parts and not file.name.startswith("."):
            digest.update(f"{name.as_posix()} {hashlib.file_digest(file.open('rb'), 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _imports(source: str, path: Path) -> Iterator[str]:
    """The modules of the library, as paths without suffix, that ``source`` may import anywhere in it."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise RunError(f"{path}: Python cannot read it ({error})") from error
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # What is imported from a package may be a module, a name of a module, or a name of the package itself.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, *rest = name.split(".")
            if package == "fedhubert_lib" and rest:
                yield from ("/".join(rest[: depth + 1]) for depth in range(len(rest)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
