"""All runs side by side: a listing for the terminal, and outputs/index.html, which opens offline."""

import html
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from fedhubert_lib import files, identity, params, provenance, records, runs

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222 }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
tr > :first-child { position: sticky; left: 0; background: #fff; white-space: nowrap }
thead th { border-bottom: 2px solid #222 }
th.part { padding-top: 1.2rem }
img { height: 5rem; margin: .15rem; border: 1px solid #ddd }
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    folder: Path
    facts: dict[str, Any]
    """run.json"""
    parameters: dict[str, Any]
    """``section.parameter`` to value, of the stages that were begun"""
    stale: dict[str, str]
    """Stages whose results rest on something older than is there now, and on what."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> str:
        """``done``, or what became of the last stage that was begun."""
        if "unreadable" in self.facts:
            return self.facts["unreadable"]
        begun = [(stage, self.facts["stages"][stage]) for stage in params.SECTIONS if stage in self.facts["stages"]]
        if not begun:
            return "nothing run"
        stage, last = next(((s, facts) for s, facts in begun if facts["state"] != "done"), begun[-1])
        state = last["state"]
        if state == "running" and not any(runs.is_held(self.folder / lock) for lock in (".lock", ".runner.lock")):
            state = "not finished"  # its process was killed, or has stopped after its work
        state = "done" if state == "done" and len(begun) == len(params.SECTIONS) else f"{params.FOLDERS[stage]} {state}"
        return "; ".join([state, *(f"{params.FOLDERS[name]} stale" for name in self.stale)])

    @property
    def commit(self) -> str:
        git = self.facts.get("git") or {}
        return (git.get("commit") or "unknown")[:8] + ("+changes" if git.get("dirty") else "")

    @property
    def started(self) -> str:
        return min((stage["started"] for stage in self.facts["stages"].values() if "started" in stage), default="")

    @property
    def seconds(self) -> float:
        return sum(stage.get("seconds", 0) for stage in self.facts["stages"].values())

    @property
    def memory(self) -> int:
        return max((stage.get("peak_memory_bytes", 0) for stage in self.facts["stages"].values()), default=0)

    @property
    def headlines(self) -> dict[str, Any]:
        """``stage: figure`` to value, in order of stages; what is stale says so."""
        return {
            f"{stage}: {name}": f"{_text(value)} (stale)" if stage in self.stale else value
            for stage in params.SECTIONS
            for name, value in self.facts["stages"].get(stage, {}).get("headline", {}).items()
        }


def read(outputs: Path) -> list[Run]:
    """The runs in ``outputs``, the latest first. One whose record cannot be read is there, and says so."""
    found = []
    for path in outputs.glob("*/run.json"):
        try:
            facts, values, stale = runs.read_json(path), _parameters(path.parent), identity.stale(path.parent)
            if not isinstance(facts, dict) or not isinstance(facts.get("stages", {}), dict):
                raise runs.RunError(f"{path}: not the record of a run")
        except (runs.RunError, yaml.YAMLError, UnicodeDecodeError) as error:
            facts, values, stale = {"unreadable": str(error)}, {}, {}
        found.append(Run(path.parent, {"stages": {}} | facts, values, stale))
    return sorted(found, key=lambda run: (run.started, run.name), reverse=True)


def differing(found: Sequence[Run]) -> list[str]:
    """The parameters that are not the same in all runs that have them; not ``run``, and not each stage's own seed."""
    names = dict.fromkeys(name for run in found for name in run.parameters)
    return [
        name
        for name in names
        if name.split(".")[1] not in ("run", "seed")
        and len({json.dumps(run.parameters[name]) for run in found if name in run.parameters}) > 1
    ]


def listing(outputs: Path) -> str:
    """A line per run, and its headline figures of the evaluation."""
    found = read(outputs)
    if not found:
        return f"no runs in {outputs} yet: fedhubert run params/quickstart.yaml"
    rows = [["run", "study", "seed", "commit", "state", "started", "time"]]
    figures = dict.fromkeys(name for run in found for name in run.headlines if name.startswith("evaluate: "))
    rows[0] += [name.removeprefix("evaluate: ") for name in figures]
    for run in found:
        facts = run.facts
        row = [run.name, facts.get("study"), facts.get("seed"), run.commit, run.state, run.started]
        rows.append([_text(each) for each in (*row, duration(run.seconds), *map(run.headlines.get, figures))])
    return aligned(rows)


def results(run: Path) -> str:
    """The headline of a run as a table, where its results and pictures lie; empty without an evaluation."""
    folder = run / params.FOLDERS["evaluate"]
    report = runs.read_json(folder / "report.json")
    if report is None:
        return ""
    names = {each["measure"]: each for each in report["measures"] if each.get("headline")}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in report["figures"]:  # of the best layer, where there are several
        key, name = (figure["system"], figure["measure"]), figure["measure"]
        worse = operator.gt if name in names and names[name]["better"] == "lower" else operator.lt
        if key not in best or worse(best[key]["value"], figure["value"]):
            best[key] = figure
    measured = [each for each in names.values() if any(name == each["measure"] for _, name in best)]
    rows = [["", *(each["title"] for each in measured)]]
    for system in report["systems"]:
        rows.append([system["title"], *(_figure(best.get((system["system"], each["measure"]))) for each in measured)])
    paths = [f"  {folder / f'report.{kind}'}" for kind in ("html", "csv", "json")]
    pictures = [f"  {place}" for place in sorted(run.glob("*/figures")) if any(place.iterdir())]
    lines = [aligned(rows), "", "results:", *paths, "figures:", *pictures]
    if why := identity.stale(run).get("evaluate"):
        lines.insert(0, f"stale: {why}; fedhubert run without --until evaluates what is there now")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        lines.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)


def write(outputs: Path) -> Path:
    """Write ``outputs/index.html`` and return its path. No script, nothing fetched: it opens offline."""
    found = read(outputs)
    path = outputs / "index.html"
    if path.is_dir():
        raise runs.RunError(f"{path}: is a run where the page of all runs has to be; give it another name")
    rows = [
        ("study", [run.facts.get("study") for run in found]),
        ("state", [run.state for run in found]),
        ("seed", [run.facts.get("seed") for run in found]),
        ("commit", [run.commit for run in found]),
        ("data", [run.facts.get("data") for run in found]),
        ("hardware", [_hardware(run) for run in found]),
        ("started", [run.started for run in found]),
        ("time", [duration(run.seconds) for run in found]),
        ("peak memory", [f"{run.memory / 2**30:.2f} GiB" for run in found]),
    ]
    parts = [_part("Headline figures", found), *_rows(_headlines(found)), _part("Parameters that differ", found)]
    parts += _rows([(name, [run.parameters.get(name) for run in found]) for name in differing(found)])
    parts += [_part("Files", found), _links("report", found, ["05_evaluate/report.html"])]
    parts += [_links("notebooks", found, [f"{folder}.ipynb" for folder in params.FOLDERS.values()])]
    parts += [_links("record", found, ["run.json"]), _pictures(outputs, found)]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in found)
    body = f"<thead><tr><th>run</th>{head}</tr></thead><tbody>{''.join([*_rows(rows), *parts])}</tbody>"
    with files.atomic(path) as temporary:
        temporary.write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fedhubert: runs</title>'
            f"<style>{_STYLE}</style></head><body><h1>Runs</h1><div><table>{body}</table></div></body></html>\n",
            encoding="utf-8",
        )
    return path


def previous(run: Path) -> str:
    """What of ``run`` has moved aside, and how much it takes, and what its stages take that are there."""
    rows = [["folder", "size", "state"]]
    for folder in [run / name for name in params.FOLDERS.values()] + records.previous(run)[::-1]:
        if folder.is_dir():
            done = runs.read_json(folder / "done.json")
            state = "not finished" if done is None else f"done {provenance.clock(done['finished'])[:16]}"
            rows.append([folder.relative_to(run).as_posix(), size(folder), state])
    return aligned(rows) if len(rows) > 1 else f"nothing in {run}"


def size(folder: Path) -> str:
    """What the files below ``folder`` take."""
    taken = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{taken / 2**30:.2f} GiB" if taken >= 2**30 else f"{taken / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _parameters(run: Path) -> dict[str, Any]:
    values = {}
    for stage, folder in params.FOLDERS.items():
        file = run / folder / "params.yaml"
        if file.exists():
            values |= {
                f"{stage}.{name}": value
                for name, value in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items()
            }
    return values


def _headlines(found: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    names = dict.fromkeys(f"{stage}: {name}" for stage in params.SECTIONS for run in found for name in _of(run, stage))
    return [(name, [run.headlines.get(name) for run in found]) for name in names]


def _of(run: Run, stage: str) -> dict[str, Any]:
    return run.facts["stages"].get(stage, {}).get("headline", {})


def _hardware(run: Run) -> str:
    has = run.facts.get("hardware")
    if has is None:
        return "-"
    return ", ".join([has["machine"], f"{has['cores']} cores", f"{has['memory_bytes'] / 2**30:.1f} GiB", *has["gpus"]])


def _rows(rows: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    return [
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(_text(v))}</td>' for v in values)}</tr>"
        for name, values in rows
    ]


def _part(title: str, found: Sequence[Run]) -> str:
    return f'<tr><th class="part" colspan="{len(found) + 1}">{title}</th></tr>'


def _links(title: str, found: Sequence[Run], paths: Sequence[str]) -> str:
    cells = []
    for run in found:
        there = [path for path in paths if (run.folder / path).exists()]
        links = (f'<a href="{quote(f"{run.name}/{path}")}">{html.escape(Path(path).name)}</a>' for path in there)
        cells.append(f"<td>{'<br>'.join(links)}</td>")
    return f"<tr><th>{title}</th>{''.join(cells)}</tr>"


def _pictures(outputs: Path, found: Sequence[Run]) -> str:
    cells = []
    for run in found:
        images = []
        for path in sorted(run.folder.glob("*/figures/*.png")):
            place, name = quote(path.relative_to(outputs).as_posix()), html.escape(f"{path.parts[-3]}: {path.stem}")
            images.append(f'<a href="{place}"><img loading="lazy" src="{place}" alt="{name}" title="{name}"></a>')
        summary = f"<details><summary>{len(images)} figures</summary>{''.join(images)}</details>" if images else ""
        cells.append(f"<td>{summary}</td>")
    return f"<tr><th>figures</th>{''.join(cells)}</tr>"


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    value = _text(figure["value"])
    return value if figure["high"] is None else f"{value} ±{_text((figure['high'] - figure['low']) / 2)}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e4 else f"{value:.3e}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
