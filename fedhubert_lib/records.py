"""Records that stages leave in the folders of a run, and what of them rests on something older than the run holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


class RunError(RuntimeError):
    """A run that cannot continue, and the remedy."""

    def _render_traceback_(self) -> list[str]:  # IPython's name: in a notebook the message alone
        return [str(self)]


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of a run; none if there is no such file. Raises RunError when it cannot be read."""
    return _read(path, json.loads)


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it and run the stage again") from error
    return content


def parameters(stage: Path) -> dict[str, Any]:
    """The parameters that the folder of a stage records; empty where it has none. Raises RunError as ``read_json``."""
    return _read(stage / "params.yaml", yaml.safe_load) or {}


def all_parameters(run: Path) -> dict[str, Any]:
    """The parameters of all stages of a run that were begun, as ``stage.name``; of a plain folder ``corpus.speech``,
    of alignments ``corpus.phones``, too: names for what lay there, which no parameter tells from another's."""
    stages = [path.parent for path in sorted(run.glob("[0-9][0-9]_*/params.yaml")) if path.parent.name[3:].isalpha()]
    values = {f"{stage.name[3:]}.{name}": value for stage in stages for name, value in parameters(stage).items()}
    done = read_json(run / "00_corpus" / "done.json") or {}
    if values.get("corpus.kind") == "folder":
        values["corpus.speech"] = done.get("lists", "unknown")[:16]
    if values.get("corpus.alignments") and "files" in done:
        values["corpus.phones"] = done["files"].get("phones.parquet", "none")[:16]
    return values


def stale(run: Path) -> dict[str, str]:
    """Stages of a run that are done but rest on something older than the run holds now: stage to reason."""
    states: dict[str, set[str | None]] = {}
    reasons = {}
    for path in sorted(run.glob("[0-9][0-9]_*/done.json")):
        done, folder = read_json(path) or {}, path.parent.name
        if not folder[3:].isalpha():  # a copy that somebody has made, such as 03_pretrain-old
            continue
        inputs = [(name, hash) for name, hash in done["identity"]["inputs"].items() if name[:2].isdigit()]  # of stages
        if outdated := [name for name, hash in inputs if hash not in states.get(name, ())]:
            reasons[folder[3:]] = f"made from an older {outdated[0]}"
        elif models := [name for name, _ in inputs if name >= "03" and name[3:] in reasons]:  # 02 was made anew
            reasons[folder[3:]] = f"of {models[0]}, which is {reasons[models[0][3:]]}"
        parts = {done.get(name) for name in ("outputs", "speech", "heard", "training", "lists", "learnt", "federated")}
        states[folder] = parts.union(*(done.get(name, {}).values() for name in ("codebooks", "targets")))
    return reasons
