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
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import __version__, folders, params, resources
from fedhubert_lib.records import RunError, read_json, stale

_PACKAGES = ("torch", "torchaudio", "flwr", "numpy", "scikit-learn", "pandas", "pyarrow", "papermill")
_CACHES = {"checkpoints", "features", "synthetic"}
"""Folders that no later stage reads: checkpoints of rounds, cached features, audio that the manifest stands for."""
_DATA = {".bin", ".npy", ".parquet", ".safetensors"}
RECORDS = {"kmeans": ["quality.json"], "evaluate": ["report.json", "report.csv"]}
RECORDS |= dict.fromkeys(("pretrain", "distill"), ["metrics.jsonl"])
"""What a stage tells of its work: data of no later stage."""
_PLACES = ("centralised/checkpoint/", "checkpoint/", "clients/", "clusters/", "codebooks/")
"""Folders that stages write data into, beside their top; others hold copies and exports."""
EXCLUDED, KEYWORDS, PHONES = "excluded.parquet", "keywords.parquet", "phones.parquet"
"""Tables that train nothing."""
READ = "read.json"
"""The ``listings`` of a corpus when 00_corpus began to read it."""
NOTHING = hashlib.sha256().hexdigest()
"""The listing of a place where no file is."""


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
    """All that the results of ``stage`` rest on, JSON-like; code and versions for the record.

    Inputs are the outputs of earlier stages, by content, and the files and folders that parameters point to. Raises
    RunError when an earlier stage is not done, or is stale. An evaluation measures what exists: it does without models
    and, with a checkpoint to measure, without all but the corpus. A distillation from a teacher that lies elsewhere
    does without pretraining.
    """
    optional: dict[str, bool] = {}  # stages that may be absent; whether they may also be stale
    if isinstance(p, params.Evaluate):
        optional = {"pretrain": bool(p.checkpoint), "distill": True}
        optional |= {"partition": False, "kmeans": False} if p.checkpoint else {}
    elif isinstance(p, params.Distill) and p.teacher:
        optional = {"pretrain": True}
    outdated, parts = stale(run), {}
    for before, folder in list(params.FOLDERS.items())[: list(params.FOLDERS).index(stage)]:
        done = read_json(run / folder / "done.json")
        if done is None and before not in optional:
            raise RunError(f"{run / folder}: not done yet; run notebook {folder} first, with run: {run.name}")
        if before in outdated and not optional.get(before):
            raise RunError(f"{run / folder}: {outdated[before]}; run notebook {folder} again")
        if done is not None and before not in outdated:  # the report says which models are left out
            parts[folder] = _read(stage, p, before, done)
    code = [cell[:2] for cell in cells(notebook(stage)) if "parameters" not in cell.tags]
    return {
        "stage": stage,
        "parameters": json.loads(json.dumps(p.model_dump(exclude={"run"}))),
        "inputs": {name: hashes[0] for name, hashes in parts.items() if hashes} | listings(p),
        "parts": parts,
        "library": library(),
        "notebook": hashlib.sha256(json.dumps(code).encode()).hexdigest(),
        "versions": versions(),
    }


def _read(stage: str, p: Any, before: str, done: Mapping[str, Any]) -> list[str]:
    """Hashes of what ``stage`` reads of the stage ``before``, the narrowest first; none where it reads nothing."""
    if (before == "kmeans" and stage == "evaluate") or (before == "pretrain" and getattr(p, "teacher", None)):
        return []
    if before == "kmeans":  # other codebooks may come and go
        labels = (done.get(name, {}).get(p.codebook) for name in ("targets", "codebooks"))
        return [hash for hash in (*labels, done["outputs"]) if hash]
    names: tuple[str, ...] = ("federated",) if stage == "distill" else ()
    if before in ("corpus", "partition") and stage != "partition":  # the audio itself, wherever it lies
        names = {"evaluate": ("heard",), "kmeans": ("training",)}.get(stage, ("learnt", "lists", "training"))
        names += ("speech",)
    return [done[name] for name in (*names, "outputs") if name in done]


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """The differences between two identities."""

    def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        return {name: f"{name} {before.get(name)} -> {now.get(name)}" for name in names}

    # Of parameters that another version of the bench did not have, or had beside these, the defaults count.
    fields, now, then = params.SECTIONS[new["stage"]].model_fields, new["parameters"], old["parameters"]
    before = {name: then.get(name, field.default) for name, field in fields.items() if name in now}
    # Of a checkpoint that a parameter points to, the content counts, not the place; tables of audio name the place.
    by_content = (old["inputs"].keys() & new["inputs"].keys()) - {"root", "keywords_root"}
    settings = {name: words for name, words in differing(before, now).items() if name not in params.HOW | by_content}
    removed = {name: then[name] for name, value in params.REMOVED.items() if then.get(name, value) != value}
    settings |= {name: f"{name} {value} -> removed" for name, value in removed.items()}
    added = settings.keys() & params.ADDITIONS
    additions = _changed("parameters", [settings.pop(name) for name in sorted(added)])
    falls = " (the learning rate falls over all rounds, so every round differs)" if "rounds" in settings else ""
    parameters = _changed("parameters", settings.values()) + falls
    # An earlier version may have recorded the hash of another part of what a stage read.
    same = {name: hash for name, hash in old["inputs"].items() if hash in new.get("parts", {}).get(name, ())}
    inputs = _changed("inputs", differing(old["inputs"], new["inputs"] | same))
    library = _changed("library", differing(old["library"], new["library"]))
    versions = _changed("versions", differing(old.get("versions", new["versions"]), new["versions"]).values())
    notebook = "notebook changed" if old["notebook"] != new["notebook"] else ""
    results, code = ("; ".join(filter(None, words)) for words in ((parameters, inputs), (library, versions)))
    return Changes(results, additions, notebook, code)


def _changed(kind: str, words: Iterable[str]) -> str:
    words = list(words)
    rest = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return f"{kind} changed: {', '.join(words[:5])}{rest}" if words else ""


def results(stage: str, p: params.Section, folder: Path) -> dict[str, Any]:
    """Hashes of a stage's data for its done.json: ``outputs``, and of parts that a later stage reads alone.

    ``files``: of each file; ``records``: which of RECORDS there are. ``speech``: wherever the tables say audio is;
    ``heard``: without what was left out; ``training``: without the words to evaluate on; ``lists``: without phones,
    too; ``learnt``: without the manifest, too, since 03 and 04 read the lists of 01_partition instead. ``codebooks``:
    each one's labels and centroids; ``targets``: without phones. ``federated``: without pooled training.
    """
    data = _data(folder)
    kept = {name: value for name, value in data.items() if "/session-" not in name}  # which clients may free
    parts: dict[str, Any] = {"outputs": _combined(data), "files": kept}
    parts["records"] = [name for name in RECORDS.get(stage, ()) if (folder / name).is_file()]
    if isinstance(p, params.Kmeans):
        of_kinds = {kind: {n: value for n, value in data.items() if kind in n.split("/")} for kind in p.codebooks}
        parts["codebooks"] = {kind: _combined(of_kind) for kind, of_kind in of_kinds.items()}
        parts["targets"] = {kind: _combined(of_kind, PHONES) for kind, of_kind in of_kinds.items()}
    elif stage == "pretrain":
        parts["federated"] = _combined({n: value for n, value in data.items() if not n.startswith("centralised/")})
    elif stage in ("corpus", "partition"):
        data = data | {name: _without_paths(folder / name) for name in data if name.endswith(".parquet")}
        parts["speech"], parts["heard"] = _combined(data), _combined(data, EXCLUDED)
        parts["training"] = _combined(data, EXCLUDED, KEYWORDS)
        parts["lists"] = _combined(data, EXCLUDED, KEYWORDS, PHONES)
        parts["learnt"] = _combined(data, EXCLUDED, KEYWORDS, PHONES, "manifest.parquet")
    return parts


def outputs(folder: Path) -> str:
    """Hash of the data that a stage has made."""
    return _combined(_data(folder))


def damaged(folder: Path, done: Mapping[str, Any]) -> list[str]:
    """The files of data that a stage had made when it was ``done`` and that are missing now, or were changed.

    A copy or an export that somebody has put beside them is none.
    """
    now = _data(folder)
    return [name for name, value in done["files"].items() if now.get(name) != value and _is_made(name)]


def gone(folder: Path, done: Mapping[str, Any]) -> list[str]:
    """The records that a stage had when it was ``done`` and that are missing now; earlier versions told none."""
    return [name for name in done.get("records", ()) if not (folder / name).is_file()]


def listings(p: params.Section) -> dict[str, str]:
    """For each parameter that points to a file or folder, a hash of the files there.

    Of a corpus it is that of names, sizes and times; of a checkpoint that of the content, which a copy has, too.
    """
    by_content = not isinstance(p, params.Corpus)
    return {name: _listing(Path(place), by_content) for name, place in params.places(p).items()}


def notebook(stage: str) -> Path:
    """The notebook of a stage."""
    return params.ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb"


def cells(path: Path, text: str | None = None) -> list[Cell]:
    """The cells of the notebook ``path``, or of its earlier ``text``. Raises RunError when it cannot be read."""
    try:
        return [
            Cell(cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", ())))
            for cell in json.loads(path.read_text(encoding="utf-8") if text is None else text)["cells"]
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a notebook ({error!r}); restore it with git") from error


def library() -> dict[str, str]:
    """SHA-256 of each file of the library; what an editor keeps beside them, under a name with a dot first, is none."""
    package = params.ROOT / "fedhubert_lib"
    names = [path.relative_to(package) for path in sorted(package.rglob("*.py"))]
    return {name.as_posix(): _sha256(package / name) for name in names if not any(p[0] == "." for p in name.parts)}


def versions() -> dict[str, str]:
    """Versions of Python, this library and the packages that results may depend on."""
    packages = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "fedhubert": __version__, **packages}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs. GPUs are listed once torch is loaded: a stage that does without uses none."""
    torch, cpuinfo = sys.modules.get("torch"), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": models[0] if models else platform.processor(),
        "cores": resources.cores(),
        "memory_bytes": resources.memory_limit(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
    }


def git() -> dict[str, Any]:
    """Commit of the project, and whether its files differ from it: ``dirty``. Outputs saved in a notebook are none."""
    try:
        commit, status = _git("rev-parse", "HEAD").strip(), _git("status", "--porcelain", ".").splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an archive of the source
        return {"commit": None, "dirty": None}
    options = ("--name-only", "--relative", "--diff-filter=M", "-z")  # names as they are, from ROOT
    modified = _git("diff", "HEAD", *options, "*.ipynb").split("\0")[:-1]
    committed = {params.ROOT / name: _git("show", f"HEAD:./{name}") for name in modified}
    same = [path for path, text in committed.items() if cells(path) == cells(path, text)]
    return {"commit": commit, "dirty": len(same) < len(status)}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(params.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def data_fingerprint(run: Path) -> str | None:
    """Hash of the run's speech, as its tables name it; none before 00_corpus is done."""
    done = read_json(run / params.FOLDERS["corpus"] / "done.json") or {}
    return done.get("speech", "")[:16] or None


def _data(folder: Path) -> dict[str, str]:
    """Name to hash of each file of data that a stage has made."""
    names = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix in _DATA)
    kept = [name for name in names if not _CACHES & set(name.parts) and not name.name.startswith((".", "scan"))]
    return {name.as_posix(): _sha256(folder / name) for name in kept if _is_made(name.as_posix())}


def _is_made(name: str) -> bool:
    return ("/" not in name or name.startswith(_PLACES)) and "/.previous/" not in name


def _combined(hashes: Mapping[str, str], *without: str) -> str:
    kept = (f"{name} {value}\n" for name, value in hashes.items() if Path(name).name not in without)
    return hashlib.sha256("".join(kept).encode()).hexdigest()


def _without_paths(table: Path) -> str:
    """Hash of a table but for its column of paths, if it has one."""
    import pandas as pd  # here: it is slow to import and `fedhubert run` has no use for it

    rows = pd.read_parquet(table).drop(columns="path", errors="ignore")
    hashes = pd.util.hash_pandas_object(rows, index=False).to_numpy()
    return hashlib.sha256(repr(list(rows.columns)).encode() + hashes.tobytes()).hexdigest()


def _listing(root: Path, by_content: bool) -> str:
    # Not rglob: of a corpus of 280,000 files it would make as many Path objects, in six seconds.
    lines, start = [], len(os.path.join(root, ""))
    for file in [entry.path for entry in folders.walk(root)] if root.is_dir() else [str(root)]:
        if os.path.isfile(file):
            facts, place = os.stat(file), file[start:] or "."
            state = _sha256(Path(file)) if by_content else f"{facts.st_size} {facts.st_mtime_ns}"
            lines.append((place.split(os.sep), f"{place} {state}\n"))
    lines.sort()
    kept = [line for line in lines if Path(line[0][-1]).suffix in _DATA | {".json"}] if by_content else []
    return hashlib.sha256(b"".join(os.fsencode(line) for _, line in kept or lines)).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
