"""What the work of a stage rests on, and whether what lies in its folder is still that work.

Results follow from parameters and inputs: where one of them differs, a folder holds other work. Library source,
notebook and versions of packages are recorded beside them. What differs there is shown, and results are kept: most
changes of code change no result, and training of days is not made again for a comment.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files, params

OPTIONAL = {False: frozenset({"pretrain", "distill"}), True: frozenset({"partition", "kmeans", "pretrain", "distill"})}
"""Stages without which an evaluation runs, too, without or with a checkpoint to measure: it measures what is there."""

_PACKAGES = ("fedhubert", "torch", "torchaudio", "flwr", "numpy", "scikit-learn", "pandas", "pyarrow", "papermill")
_CACHES = {"checkpoints", "features", "synthetic"}
"""What no later stage reads: checkpoints of single rounds, features kept for speed, audio the manifest stands for."""
_DATA = {".bin", ".npy", ".parquet", ".safetensors"}


class RunError(RuntimeError):
    """A run that cannot go on, and what to do."""

    def _render_traceback_(self) -> list[str]:  # IPython's name: in a notebook the message alone
        return [str(self)]


class Cell(NamedTuple):
    """A cell of a notebook without its outputs."""

    kind: str
    source: str
    tags: tuple[str, ...]


class Changes(NamedTuple):
    """What differs between two identities, in words; empty where nothing does."""

    results: str
    """Parameters and inputs: other results."""
    additions: str
    """Parameters that only add to the results."""
    notebook: str
    code: str
    """Library source and versions of packages."""

    def __str__(self) -> str:
        return "; ".join(filter(None, self))


def notebook(stage: str) -> Path:
    """The notebook of a stage."""
    return params.ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb"


def of(stage: str, p: params.Section, run: Path) -> dict[str, Any]:
    """What the results of ``stage`` rest on, JSON-like; code and versions for the record.

    Inputs are the outputs of the stages before, by content, and the files and folders that parameters point to. Raises
    RunError when a stage before is not done, or is stale; an evaluation does without some (``OPTIONAL``).
    """
    earlier: dict[str, dict[str, Any]] = {}
    for before, folder in list(params.FOLDERS.items())[: list(params.FOLDERS).index(stage)]:
        done = read_json(run / folder / "done.json")
        if done is None:
            if isinstance(p, params.Evaluate) and before in OPTIONAL[bool(p.checkpoint)]:
                continue
            raise RunError(f"{run / folder}: not done yet; run notebook {folder} first, with run: {run.name}")
        if older := _older(done, earlier):
            raise RunError(
                f"{run / folder}: made from another {older[0]} than is there now; run notebook {folder} again"
            )
        earlier[folder] = done
    # From k-means on it does not matter where the audio lies, only what it is.
    seen = "outputs" if stage == "partition" else "speech"
    inputs = {folder: done.get(seen, done["outputs"]) for folder, done in earlier.items()}
    inputs |= listings(p)
    cells = [cell for cell in read_notebook(notebook(stage)) if "parameters" not in cell.tags]
    return {
        "stage": stage,
        "parameters": json.loads(json.dumps(p.model_dump(exclude={"run"}))),
        "inputs": inputs,
        "library": library(),
        "notebook": hashlib.sha256(json.dumps([cell[:2] for cell in cells]).encode()).hexdigest(),
        "versions": versions(),
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """What differs between two identities."""

    def differing(kind: str) -> list[str]:
        one, other = old.get(kind, new[kind]), new[kind]  # records of earlier versions of the bench have no versions
        return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))

    def told(kind: str, names: Iterable[str]) -> str:
        words = [f"{name} {old.get(kind, {}).get(name)} -> {new[kind].get(name)}" for name in names]
        falls = " (the learning rate falls over all rounds, so that none is the same)" if "rounds" in names else ""
        return f"{kind} changed: {_few(words)}{falls}" if words else ""

    # Of a checkpoint that a parameter points to, the content counts, not the place; tables of audio name the place.
    by_content = (old["inputs"].keys() & new["inputs"].keys()) - {"root", "keywords_root"}
    settings = [name for name in differing("parameters") if name not in params.HOW | by_content]
    fields = params.SECTIONS[new["stage"]].model_fields
    # What only one version of the bench knows is a change of its code, unless somebody has set it.
    other = [
        name
        for name in settings
        if name not in new["parameters"]
        or name not in old["parameters"]
        and new["parameters"][name] == fields[name].default
    ]
    settings = [name for name in settings if name not in other]
    additions = [name for name in settings if name in params.ADDITIONS and (name != "patience" or _longer(old, new))]
    inputs, sources = differing("inputs"), differing("library")
    results = [told("parameters", [name for name in settings if name not in additions])]
    results.append(f"inputs changed: {_few(inputs)}" if inputs else "")
    code = [f"library changed: {_few(sources)}" if sources else "", told("versions", differing("versions"))]
    code.append(f"parameters of another version: {_few(other)}" if other else "")
    return Changes(
        "; ".join(filter(None, results)),
        told("parameters", additions),
        "notebook changed" if old["notebook"] != new["notebook"] else "",
        "; ".join(filter(None, code)),
    )


def stale(run: Path) -> dict[str, str]:
    """Stages of a run that are done and rest on something older than is there now: stage to why."""
    earlier: dict[str, dict[str, Any]] = {}
    why = {}
    for stage, folder in params.FOLDERS.items():
        done = read_json(run / folder / "done.json")
        if done is None:
            continue
        if older := _older(done, earlier):
            why[stage] = f"made from an older {older[0]}"
        earlier[folder] = done
    return why


def listings(p: params.Section) -> dict[str, str]:
    """For each parameter that points to a file or folder, a hash of the files there.

    Of a corpus it is that of names, sizes and times; of a checkpoint that of the content, which a copy has, too.
    """
    by_content = not isinstance(p, params.Corpus)
    return {name: _listing(Path(place), by_content) for name, place in params.places(p).items()}


def read_notebook(path: Path) -> list[Cell]:
    """The cells of a notebook. Raises RunError when it cannot be read."""
    try:
        return cells(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a notebook ({error!r}); restore it with git") from error


def cells(text: str) -> list[Cell]:
    """The cells of a notebook that is ``text``."""
    return [
        Cell(cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", ())))
        for cell in json.loads(text)["cells"]
    ]


def library() -> dict[str, str]:
    """SHA-256 of each file of the library."""
    package = params.ROOT / "fedhubert_lib"
    paths = sorted(package.rglob("*.py"))
    return {path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results may depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


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


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file of a run holds, or none if there is no such file. Raises RunError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and run the stage again") from error


def content(folder: Path, places: bool = True) -> str:
    """Hash of the data that a stage has made; without ``places``, wherever its tables say audio is."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        kept = not _CACHES & set(name.parts) and not file.name.startswith((".", "scan"))
        if file.suffix in _DATA and kept:
            told = _sha256(file) if places or file.suffix != ".parquet" else _without_places(file)
            digest.update(f"{name.as_posix()} {told}\n".encode())
    return digest.hexdigest()


def _without_places(file: Path) -> str:
    """Hash of a table but for its column of paths, if it has one."""
    import pyarrow.parquet  # here, since it is slow to import and `fedhubert run` has no use for it

    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in table.schema_arrow.names if name != "path"]
    if len(columns) == len(table.schema_arrow.names):
        return _sha256(file)
    digest = hashlib.sha256(repr(columns).encode())
    for batch in table.iter_batches(columns=columns):
        for column in batch.columns:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()


def _older(done: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The stages that a done one was made from in another state than they are in; ``earlier`` are theirs, by folder."""
    inputs = done["identity"]["inputs"]
    states = {folder: (other["outputs"], other.get("speech")) for folder, other in earlier.items()}
    return [name for name in params.FOLDERS.values() if name in inputs and inputs[name] not in states.get(name, ())]


def _longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether patience was raised: 0 waits for ever."""
    before, now = (each["parameters"].get("patience", 0) or float("inf") for each in (old, new))
    return now > before


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _listing(root: Path, by_content: bool) -> str:
    # Not rglob: of a corpus of 280,000 files it would make as many Path objects, in six seconds.
    below = os.path.join(root, "")
    there = [entry.path for entry in files.walk(root)] if root.is_dir() else [str(root)]
    lines = []
    for file in there:
        if os.path.isfile(file):
            place = file.removeprefix(below) if len(file) > len(below) else "."
            facts = os.stat(file)
            told = _sha256(Path(file)) if by_content else f"{facts.st_size} {facts.st_mtime_ns}"
            lines.append((place.split(os.sep), f"{place} {told}\n"))
    return hashlib.sha256(b"".join(os.fsencode(line) for _, line in sorted(lines))).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
