"""Stages that a run takes from another run instead of doing them again: ``fedhubert run --like``.

Folders are the run's own, files of results hard links: whatever becomes of the other run, these files stay, and
nothing is copied. What is appended to or says whose it is, records, logs and lists of audio, is a copy.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedhubert_lib import files, identity, params, progress, records, runs

LINKED = {".safetensors", ".npy", ".bin", ".parquet", ".flac", ".wav", ".png", ".svg"}
"""Suffixes of files that are never written in place: a new one takes the place of the old one."""
_AUDIO = Path("00_corpus") / "synthetic"


def take(stage: str, p: params.Section, run: Path, others: Sequence[Path], now: Mapping[str, Any]) -> bool:
    """Take ``stage`` of ``run`` from the first of ``others`` that has done the same work, else print why not.

    ``now`` is the identity of the work in ``run``. What ``run`` holds moves aside. The caller holds the run's lock.
    Raises RunError where the other run's files are not those that it recorded.
    """
    name = params.FOLDERS[stage]
    for other in others if stage != "evaluate" else ():  # a report names its run
        done = records.read_json(other / name / "done.json")
        if why := _differs(stage, p, run, other, done, now):
            progress.say(f"{name}: {why}")
        else:
            _copy(stage, p, run, other, now)
            progress.say(f"{name}: taken from {other}")
            return True
    return False


def _differs(stage: str, p: Any, run: Path, other: Path, done: dict[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Why the stage of ``other`` with the record ``done`` cannot be taken; empty if it can."""
    if done is None:
        return f"not done in {other.name}"
    if stage == "partition":  # which reads the tables of the corpus: the same speech may lie elsewhere in ``other``
        ours, theirs = (records.read_json(folder / "00_corpus" / "done.json") or {} for folder in (run, other))
        roots = {corpus["identity"]["parameters"].get("root") for corpus in (ours, theirs) if corpus}
        if ours and ours.get("speech") == theirs.get("speech") and len(roots) == 1:  # else its lists name the other's
            now = {**now, "inputs": {**now["inputs"], "00_corpus": theirs["outputs"]}}
    if changed := identity.compare(done["identity"], now).results:
        return f"differs from {other.name} ({changed})"
    if "deployment" in (getattr(p, "engine", ""), done["identity"]["parameters"].get("engine")):
        return f"not taken from {other.name}: in a real federation clients keep their part of it"
    return ""


def _link(old: str, new: str) -> None:
    """Make ``new`` a hard link to the file of results ``old``, or a copy of it."""
    if Path(old).suffix not in LINKED:
        shutil.copyfile(old, new)
        return
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links, or another one; a file of another user
        shutil.copy2(old, new)  # with its mode, since a personal head is its client's alone, and its time


def _copy(stage: str, p: params.Section, run: Path, other: Path, now: Mapping[str, Any]) -> None:
    """Make the folder of ``stage`` in ``run`` from that of ``other``."""
    source = other / params.FOLDERS[stage]
    for left in run.glob(f".{source.name}.*.partial"):  # by a start that was killed
        shutil.rmtree(left)
    with files.atomic(run / source.name) as folder:
        shutil.copytree(source, folder, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
        for place in filter(Path.is_dir, (folder, *folder.rglob("*"))):  # of a run that was made read-only
            place.chmod(place.stat().st_mode | 0o700)
        done, begun = (records.read_json(folder / f"{record}.json") or {} for record in ("done", "begun"))
        if not done:
            raise runs.RunError(f"{source}: is being worked on; wait until it is done, or do without --like")
        if identity.damaged(folder, done) or identity.gone(folder, done):
            raise runs.RunError(f"{source}: {runs.DAMAGED}; run that stage there again, or do without --like")
        origin = {"run": str(other), "outputs": done["outputs"], "time": runs.clock(time.time())}
        if stage in ("corpus", "partition"):
            _name_audio(folder, run, folder / "synthetic" if stage == "corpus" else run / _AUDIO)
            done |= identity.results(stage, p, folder)
        values = records.parameters(folder) | {"run": run.name}
        files.write_text(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
        note = {"taken_from": origin, "replaced": "", "identity": done["identity"] | {"inputs": now["inputs"]}}
        files.write_json(folder / "begun.json", begun | note)
        files.write_json(folder / "done.json", done | note)
        runs.clear(run, stage)
    executed = source.with_suffix(".ipynb")
    if executed.exists():
        shutil.copy2(executed, run / executed.name)
    facts = {"run": run.name, "seed": p.seed, "git": done["git"], "versions": done["identity"]["versions"]}
    runs.record(run, data=identity.data_fingerprint(run), **facts)


def _name_audio(folder: Path, run: Path, audio: Path) -> None:
    """Have the tables below ``folder`` name the files of ``audio``, a synthetic corpus, by where ``run`` has them."""
    from pyarrow import Array, array, parquet  # here: most commands do without

    def place(path: str) -> str:
        rest = path.rpartition(f"/{_AUDIO.as_posix()}/")[2]
        return str(run / _AUDIO / rest) if rest != path and (audio / rest).is_file() else path

    for name in folder.rglob("*.parquet") if audio.is_dir() else ():
        table = parquet.read_table(name)
        if (column := table.schema.get_field_index("path")) < 0:
            continue
        kind = table.schema.field(column)
        paths: Array = array([place(path) for path in table["path"].to_pylist()], kind.type)
        with files.atomic(name) as temporary:  # in the place of the link, not through it
            parquet.write_table(table.set_column(column, kind, paths), temporary)
