"""What the work of a stage rests on, and whether what lies in its folder is still true.

The identity of the work is its parameters, its inputs by content, the library source that the notebook imports, and the
notebook. What differs is said in words: it is why the runner runs a stage again.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files, params

PRESENTATION = {"cli", "display", "identity", "index", "params", "plots", "runner", "runs", "wording", "yaml12"}
"""Modules that no result depends on: when they change a stage is run again, but what it has made is kept."""

_CACHES = {"checkpoints", "features", "synthetic"}
"""What no later stage reads: checkpoints of single rounds, features kept for speed, audio the manifest stands for."""
_DATA = {".bin", ".npy", ".parquet", ".safetensors"}


class RunError(RuntimeError):
    """A run that cannot go on, and what to do."""


class Cell(NamedTuple):
    """A cell of a notebook without its outputs."""

    kind: str
    source: str
    tags: tuple[str, ...]


def notebook(stage: str) -> Path:
    """The notebook of a stage."""
    return params.ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb"


def of(stage: str, p: params.Section, run: Path) -> dict[str, Any]:
    """What the results of ``stage`` depend on: parameters, inputs, library source; and the notebook's own source.

    Inputs are the outputs of the stage before, by content, and the folders that parameters point to, by the names,
    sizes and times of their files. Raises RunError when a stage before is not done.
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
    inputs |= listings(p)
    path = notebook(stage)
    cells = read_notebook(path)
    return {
        "parameters": p.model_dump(exclude={"run"}),
        "inputs": inputs,
        "library": library("\n".join(cell.source for cell in cells if cell.kind == "code"), path),
        "notebook": hashlib.sha256(json.dumps([cell[:2] for cell in cells]).encode()).hexdigest(),
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
            keys = [k for k in keys if not _presents(k)]
        if kind == "parameters":
            keys = [f"{k} {old[kind].get(k)} -> {new[kind].get(k)}" for k in keys]
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            words.append(f"{kind} changed: {', '.join(keys[:5])}{more}")
    if not results_only and old["notebook"] != new["notebook"]:
        words.append("notebook changed")
    return words


def listings(p: params.Section) -> dict[str, str]:
    """For each parameter that points to a file or folder, a hash of the names, sizes and times of all files there."""
    return {name: _listing(Path(place)) for name, place in params.places(p).items()}


def read_notebook(path: Path) -> list[Cell]:
    """The cells of a notebook. Raises RunError when it cannot be read."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [Cell(c["cell_type"], "".join(c["source"]), tuple(c["metadata"].get("tags", ()))) for c in cells]
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
                imported = _imports(text.decode(), file)
                # No result rests on a module because pictures import it.
                todo += [name for name in imported if _presents(name)] if _presents(key) else imported
    return dict(sorted(found.items()))


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
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and run the stage again") from error


def _presents(key: str) -> bool:
    return key.split("/")[0].removesuffix(".py") in PRESENTATION


def _listing(root: Path) -> str:
    # Not rglob: of a corpus of 280,000 files it would make as many Path objects, in six seconds.
    below = os.path.join(root, "")
    there = [entry.path for entry in files.walk(root)] if root.is_dir() else [str(root)]
    lines = []
    for file in there:
        if os.path.isfile(file):
            facts = os.stat(file)
            place = file.removeprefix(below) if len(file) > len(below) else "."
            lines.append((place.split(os.sep), f"{place} {facts.st_size} {facts.st_mtime_ns}\n"))
    return hashlib.sha256(b"".join(os.fsencode(line) for _, line in sorted(lines))).hexdigest()


def content(folder: Path) -> str:
    """Hash of the data that a stage has made."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        kept = not _CACHES & set(name.parts) and not file.name.startswith((".", "scan"))
        if file.suffix in _DATA and kept:
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
