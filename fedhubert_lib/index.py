"""All runs side by side, and what a run keeps, as tables for the terminal."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from fedhubert_lib import params, records, runs


def listing(outputs: Path) -> str:
    """A row per run, the latest first, with its headline figures; below, the parameters in which the runs differ."""
    rows, values = {}, {}
    for folder in (path.parent for path in outputs.glob("*/run.json")):
        try:
            rows[folder.name], values[folder.name] = summary(folder), records.all_parameters(folder)
        except (runs.RunError, OSError) as error:  # an OSError: the lock of somebody else; it hides no other
            rows[folder.name] = {"state": str(error), "started": ""}
    if not rows:
        return f"no runs in {outputs} yet: fedhubert run params/quickstart.yaml"
    table = pd.DataFrame.from_dict(rows, orient="index").sort_values(["started", "state"], ascending=False)
    text = table.to_string(na_rep="-", float_format="{:.4g}".format)
    differ = differing(values).filter(regex=r"\.(?!seed$)", axis=0)
    return f"{text}\n\nparameters that differ:\n{differ.to_string(na_rep='-')}" if len(differ) else text


def differing(values: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The parameters (rows, ``stage.name``) in which runs (columns) differ; NaN where a stage was not begun."""
    table = pd.DataFrame(values).filter(regex=r"\.(?!run$)", axis=0)
    return table[table.map(json.dumps).replace("NaN", None).nunique(axis=1) > 1]


def summary(run: Path) -> dict[str, Any]:
    """The columns of ``listing``. Raises RunError where one of the run's records cannot be read."""
    facts = runs.read_json(run / "run.json") or {}
    states = {stage: state for stage in params.SECTIONS if (state := runs.state(run, stage))}
    git, used = facts.get("git") or {}, [state for state in states.values() if "taken_from" not in state]
    seconds = [state["finished"] - state["started"] for state in used if "finished" in state]
    peaks = [state["peak_memory_bytes"] for state in used if "peak_memory_bytes" in state]
    row = {
        "study": facts.get("study"),
        "seed": records.parameters(run / "03_pretrain").get("seed", facts.get("seed")),
        "commit": (git.get("commit") or "unknown")[:8] + ("+changes" if git.get("dirty") else ""),
        "state": _state(run, states),
        "started": min((runs.clock(state["started"]) for state in used), default=""),
        "time": str(timedelta(seconds=round(sum(seconds)))),
        "memory": f"{max(peaks) / 2**30:.1f} GiB" if peaks else "",
    }
    figures = states.get("evaluate", {}).get("headline", {})
    if "evaluate" in records.stale(run):
        figures = {name: f"{value} (stale)" for name, value in figures.items()}
    return row | figures


def _state(run: Path, states: dict[str, dict[str, Any]]) -> str:
    """``done``, or the state of the first stage that is not, else of the last; and which stages are stale."""
    if not states:
        return "nothing run"
    last = next((stage for stage in states if states[stage]["state"] != "done"), list(states)[-1])
    word = states[last]["state"]
    if word == "running" and not any(runs.is_held(run / lock) for lock in (".lock", ".runner.lock")):
        word = "not finished"  # its process was killed, or has stopped after its work
    word = "done" if word == "done" and len(states) == len(params.SECTIONS) else f"{params.FOLDERS[last]} {word}"
    taken: dict[str, list[str]] = {}
    for stage, state in states.items():
        if "taken_from" in state:
            taken.setdefault(Path(state["taken_from"]["run"]).name, []).append(params.FOLDERS[stage][:2])
    word = "; ".join([word, *(f"{' '.join(numbers)} from {other}" for other, numbers in taken.items())])
    return "; ".join([word, *(f"{params.FOLDERS[stage]} stale" for stage in records.stale(run))])


def results(run: Path) -> str:
    """The headline table of a run, and where its results and figures lie; empty without an evaluation."""
    folder = run / params.FOLDERS["evaluate"]
    if (report := runs.read_json(folder / "report.json")) is None:
        return ""
    from fedhubert_lib.evaluation import tables  # here: it imports torch

    paths = [folder.with_suffix(".html"), folder / "report.csv", folder / "report.json", *sorted(run.glob("*/figures"))]
    lines = [tables.headline(report).to_string(), "", *(str(path) for path in paths if path.exists())]
    if why := records.stale(run).get("evaluate"):
        lines.insert(0, f"stale: {why}; fedhubert run without --until evaluates it again")
    return "\n".join(lines)


def previous(run: Path) -> str:
    """The sizes of a run's stages, and of the folders that have moved aside."""
    rows = {}
    for folder in [run / name for name in params.FOLDERS.values()] + runs.previous(run)[::-1]:
        if folder.is_dir():
            done = runs.read_json(folder / "done.json")
            word = "not finished" if done is None else f"done {runs.clock(done['finished'])[:16]}"
            if origin := (done or {}).get("taken_from"):
                word += f", taken from {origin['run']}"
            rows[folder.relative_to(run).as_posix()] = {"size": size(folder), "state": word}
    return pd.DataFrame.from_dict(rows, orient="index").to_string() if rows else f"nothing in {run}"


def size(folder: Path) -> str:
    """The size of the files below ``folder``, and of those among them that other folders hold, too."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    shared = sum(file.st_size for file in stats if file.st_nlink > 1)
    text = _bytes(sum(file.st_size for file in stats))
    return f"{text} ({_bytes(shared)} shared)" if shared else text


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
