"""The work of a stage: what its results rest on, and whether a folder holds the same work.

Results follow from parameters and inputs: where one of them differs, a folder holds other work. Library source,
notebook and versions of packages are recorded beside them. What differs there is shown, and results are kept: most
changes of code change no result, and days of training are not repeated for a comment.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files, params

OPTIONAL = {False: frozenset({"pretrain", "distill"}), True: frozenset({"partition", "kmeans", "pretrain", "distill"})}
"""Stages that an evaluation does not need, without or with a checkpoint to measure: it measures what exists."""

_PACKAGES = ("fedhubert", "torch", "torchaudio", "flwr", "numpy", "scikit-learn", "pandas", "pyarrow", "papermill")
_CACHES = {"checkpoints", "features", "synthetic"}
"""Folders that no later stage reads: checkpoints of rounds, cached features, audio that the manifest stands for."""
_DATA = {".bin", ".npy", ".parquet", ".safetensors"}


class RunError(RuntimeError):
    """A run that cannot continue, and the remedy."""

    def _render_traceback_(self) -> list[str]:  # IPython's name: in a notebook the message alone
        return [str(self)]


class Cell(NamedTuple):
    """A cell of a notebook without its outputs."""

    kind: str
    source: str
    tags: tuple[str, ...]


class Changes(NamedTuple):
    """Differences between two identities, in words; empty where there are none."""

    results: str = ""
    """Parameters and inputs: other results."""
    additions: str = ""
    """Parameters that only add to the results."""
    notebook: str = ""
    code: str = ""
    """Library source and versions of packages."""

    def __str__(self) -> str:
        return "; ".join(filter(None, self))


def of(stage: str, p: params.Section, run: Path) -> dict[str, Any]:
    """What the results of ``stage`` rest on, JSON-like; code and versions for the record.

    Inputs are the outputs of earlier stages, by content, and the files and folders that parameters point to. Raises
    RunError when an earlier stage is not done, or is stale; an evaluation does without some (``OPTIONAL``).
    """
    records: dict[str, dict[str, Any]] = {}
    inputs = {}
    for before, folder in list(params.FOLDERS.items())[: list(params.FOLDERS).index(stage)]:
        done = read_json(run / folder / "done.json")
        if done is None:
            if isinstance(p, params.Evaluate) and before in OPTIONAL[bool(p.checkpoint)]:
                continue
            raise RunError(f"{run / folder}: not done yet; run notebook {folder} first, with run: {run.name}")
        if outdated := _outdated_inputs(done, records):
            if isinstance(p, params.Evaluate) and before in ({"pretrain", "distill"} if p.checkpoint else {"distill"}):
                continue  # its models are left out, which the report says
            raise RunError(f"{run / folder}: made from an earlier {outdated[0]}; run notebook {folder} again")
        records[folder] = done
        if before == "kmeans" and stage == "evaluate":
            continue  # it reads no labels
        inputs[folder] = done["outputs"]
        if before in ("corpus", "partition") and stage != "partition":
            inputs[folder] = done.get("speech", done["outputs"])  # the audio itself, wherever it lies
        elif before == "kmeans":  # other codebooks may come and go
            inputs[folder] = done.get("codebooks", {}).get(p.codebook, done["outputs"])
    code = [cell[:2] for cell in read_notebook(notebook(stage)) if "parameters" not in cell.tags]
    return {
        "stage": stage,
        "parameters": json.loads(json.dumps(p.model_dump(exclude={"run"}))),
        "inputs": inputs | listings(p),
        "library": library(),
        "notebook": hashlib.sha256(json.dumps(code).encode()).hexdigest(),
        "versions": versions(),
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """The differences between two identities."""

    def differing(kind: str) -> list[str]:
        before, now = old.get(kind, new[kind]), new[kind]  # records of earlier versions of the bench have no versions
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))

    def changed(kind: str, names: Iterable[str]) -> str:
        words = [f"{name} {old.get(kind, {}).get(name)} -> {new[kind].get(name)}" for name in names]
        falls = " (the learning rate falls over all rounds, so every round differs)" if "rounds" in names else ""
        return f"{kind} changed: {_few(words)}{falls}" if words else ""

    # Of a checkpoint that a parameter points to, the content counts, not the place; tables of audio name the place.
    by_content = (old["inputs"].keys() & new["inputs"].keys()) - {"root", "keywords_root"}
    settings = [name for name in differing("parameters") if name not in params.HOW | by_content]
    # A parameter that only one version of the bench has is a change of its code, unless somebody has set it.
    fields = params.SECTIONS[new["stage"]].model_fields
    other_version = [
        name
        for name in settings
        if name not in new["parameters"]
        or name not in old["parameters"]
        and new["parameters"][name] == fields[name].default
    ]
    settings = [name for name in settings if name not in other_version]
    patience = [identity["parameters"].get("patience", 0) or float("inf") for identity in (old, new)]  # 0: for ever
    additions = [
        name for name in settings if name in params.ADDITIONS and (name != "patience" or patience[1] > patience[0])
    ]
    inputs, sources = differing("inputs"), differing("library")
    results = [changed("parameters", [name for name in settings if name not in additions])]
    results.append(f"inputs changed: {_few(inputs)}" if inputs else "")
    code = [f"library changed: {_few(sources)}" if sources else "", changed("versions", differing("versions"))]
    code.append(f"parameters of another version: {_few(other_version)}" if other_version else "")
    return Changes(
        "; ".join(filter(None, results)),
        changed("parameters", additions),
        "notebook changed" if old["notebook"] != new["notebook"] else "",
        "; ".join(filter(None, code)),
    )


def stale(run: Path) -> dict[str, str]:
    """Stages of a run that are done but rest on something older than the run holds now: stage to reason."""
    records: dict[str, dict[str, Any]] = {}
    reasons = {}
    for stage, folder in params.FOLDERS.items():
        if (done := read_json(run / folder / "done.json")) is not None:
            if outdated := _outdated_inputs(done, records):
                reasons[stage] = f"made from an older {outdated[0]}"
            records[folder] = done
    return reasons


def _outdated_inputs(done: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The folders that a stage was made from in another state than ``records``, their done.json by folder, tell."""
    inputs = done["identity"]["inputs"]
    states = {
        folder: (record["outputs"], record.get("speech"), *record.get("codebooks", {}).values())
        for folder, record in records.items()
    }
    return [name for name in params.FOLDERS.values() if name in inputs and inputs[name] not in states.get(name, ())]


def results(stage: str, p: params.Section, folder: Path) -> dict[str, Any]:
    """Hashes of a stage's data for its done.json: ``outputs``, and of parts that a later stage reads alone.

    ``speech``: wherever the tables say audio is. ``codebooks``: the labels and centroids of each.
    """
    data = _data(folder)
    hashes: dict[str, Any] = {"outputs": _combined(data)}
    if isinstance(p, params.Kmeans):
        hashes["codebooks"] = {
            kind: _combined({name: value for name, value in data.items() if kind in name.split("/")})
            for kind in p.codebooks
        }
    elif stage in ("corpus", "partition"):
        tables = {name: _without_paths(folder / name) for name in data if name.endswith(".parquet")}
        hashes["speech"] = _combined(data | tables)
    return hashes


def outputs(folder: Path) -> str:
    """Hash of the data that a stage has made."""
    return _combined(_data(folder))


def listings(p: params.Section) -> dict[str, str]:
    """For each parameter that points to a file or folder, a hash of the files there.

    Of a corpus it is that of names, sizes and times; of a checkpoint that of the content, which a copy has, too.
    """
    by_content = not isinstance(p, params.Corpus)
    return {name: _listing(Path(place), by_content) for name, place in params.places(p).items()}


def notebook(stage: str) -> Path:
    """The notebook of a stage."""
    return params.ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb"


def read_notebook(path: Path) -> list[Cell]:
    """The cells of a notebook. Raises RunError when it cannot be read."""
    try:
        return _cells(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a notebook ({error!r}); restore it with git") from error


def _cells(text: str) -> list[Cell]:
    return [
        Cell(cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", ())))
        for cell in json.loads(text)["cells"]
    ]


def library() -> dict[str, str]:
    """SHA-256 of each file of the library."""
    package = params.ROOT / "fedhubert_lib"
    return {path.relative_to(package).as_posix(): _sha256(path) for path in sorted(package.rglob("*.py"))}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results may depend on."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def git() -> dict[str, Any]:
    """Commit of the project, and whether its files differ from it: ``dirty``. Outputs saved in a notebook are none."""
    command = ["git", "-C", str(params.ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an archive of the source
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": any(_differs(line) for line in status.splitlines())}


def _differs(line: str) -> bool:
    """Whether a line of ``git status --porcelain`` reports more than outputs that were saved in a notebook."""
    state, name = line[:2], line[3:].strip('"')
    if not name.endswith(".ipynb") or "M" not in state:
        return True
    command = ["git", "-C", str(params.ROOT), "show", f"HEAD:./{name}"]
    committed = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    return _cells(committed) != read_notebook(params.ROOT / name)


def data_fingerprint(run: Path) -> str | None:
    """One hash for all utterances of the run's manifest and the fingerprints of their files; none before 00_corpus."""
    manifest = run / params.FOLDERS["corpus"] / "manifest.parquet"
    return _columns(manifest, ["utterance", "fingerprint"])[:16] if manifest.exists() else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of a run; none if there is no such file. Raises RunError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and run the stage again") from error


def _data(folder: Path) -> dict[str, str]:
    """Name to hash of each file of data that a stage has made."""
    names = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix in _DATA)
    kept = [name for name in names if not _CACHES & set(name.parts) and not name.name.startswith((".", "scan"))]
    return {name.as_posix(): _sha256(folder / name) for name in kept}


def _combined(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in hashes.items()).encode()).hexdigest()


def _without_paths(table: Path) -> str:
    """Hash of a table but for its column of paths, if it has one."""
    import pyarrow.parquet  # here: it is slow to import and `fedhubert run` has no use for it

    columns = pyarrow.parquet.read_schema(table).names
    return _columns(table, [name for name in columns if name != "path"]) if "path" in columns else _sha256(table)


def _columns(table: Path, columns: list[str]) -> str:
    import pyarrow.parquet

    digest = hashlib.sha256(repr(columns).encode())
    for batch in pyarrow.parquet.ParquetFile(table).iter_batches(columns=columns):
        for column in batch.columns:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _listing(root: Path, by_content: bool) -> str:
    # Not rglob: of a corpus of 280,000 files it would make as many Path objects, in six seconds.
    below = os.path.join(root, "")
    lines = []
    for file in [entry.path for entry in files.walk(root)] if root.is_dir() else [str(root)]:
        if os.path.isfile(file):
            place = file.removeprefix(below) if len(file) > len(below) else "."
            facts = os.stat(file)
            state = _sha256(Path(file)) if by_content else f"{facts.st_size} {facts.st_mtime_ns}"
            lines.append((place.split(os.sep), f"{place} {state}\n"))
    return hashlib.sha256(b"".join(os.fsencode(line) for _, line in sorted(lines))).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
