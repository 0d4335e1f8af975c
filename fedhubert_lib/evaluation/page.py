"""The report as one HTML page that opens offline: table, layers, missed clips to listen to. Nothing is fetched."""

import base64
import html
import io
from typing import Any

import pandas as pd
import soundfile

from fedhubert_lib import audio
from fedhubert_lib.evaluation import tables
from fedhubert_lib.evaluation.keywords import one_second

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th small { display: block; font-weight: normal; color: #666 }
.best { font-weight: 700 }
.wide { overflow-x: auto }
audio { height: 1.8rem; vertical-align: middle }
"""


def render(
    report: dict[str, Any], table: pd.DataFrame, speed: dict[str, dict[str, float | None]], clips: pd.DataFrame
) -> str:
    """The page. ``table`` holds the figures; ``speed`` is by system; ``clips`` are read to be listened to."""
    data = report["data"]
    about = (
        f"{data['clips']['test']} test clips of {len(data['words'])} words by {data['speakers']['test']} speakers that"
        f" no probe has heard; mean and 95 % interval over {report['parameters']['seeds']} evaluation seeds."
    )
    if "units" in data:
        about += f" Units: {data['units']['minutes']:.1f} minutes of {data['units']['speakers']} held-out speakers."
    parts = [
        f"<h1>{html.escape(report['run'])}: evaluation</h1><p>{html.escape(about)}</p>",
        _systems(report, tables.headline(table)),
        "<h2>More of each system</h2>",
        *(_systems(report, each) for each in [*tables.below(table), _speeds(report, speed)]),
        _layers(table),
        _missed(report, clips),
    ]
    for what in (*report["notes"], *(f"{name}: {reason}" for name, reason in report["absent"].items())):
        parts.append(f"<p>Not measured: {html.escape(what)}.</p>")
    title = html.escape(report["run"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}: evaluation</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _systems(report: dict[str, Any], wide: pd.DataFrame) -> str:
    """A table with a row per system and a column per measure, which says what it is and which way is better."""
    explained = {each["title"]: each for each in report["measures"]}
    head = "".join(
        f'<th title="{html.escape(explained[title]["what"])}">{html.escape(title)}'
        f"<small>{explained[title]['better']} is better</small></th>"
        if title in explained
        else f"<th>{html.escape(title)}</th>"
        for title in wide.columns
    )
    rows = [
        f"<tr><td>{html.escape(title)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for title, cells in wide.iterrows()
    ]
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _speeds(report: dict[str, Any], speed: dict[str, dict[str, float | None]]) -> pd.DataFrame:
    rows = {each["title"]: f"{speed[each['system']]['real_time_factor']:.0f} ×" for each in report["systems"]}
    return pd.DataFrame({"speed here, of real time": rows})


def _layers(table: pd.DataFrame) -> str:
    parts = ["<h2>Layer by layer</h2>"]
    for name in ("layer-accuracy", "pnmi", "phone-accuracy", "layer-weight"):
        own = table[table.measure_name == name]
        if own.empty:
            continue
        wide = own.pivot(index="system", columns="layer", values="value").loc[list(dict.fromkeys(own.system))]
        head = "".join(f"<th>{layer}</th>" for layer in wide.columns)
        rows = []
        for title, cells in wide.iterrows():
            best = cells.max()
            body = "".join(
                "<td></td>" if pd.isna(value) else f"<td{' class=best' if value == best else ''}>{value:.3f}</td>"
                for value in cells
            )
            rows.append(f"<tr><td>{html.escape(title)}</td>{body}</tr>")
        caption = html.escape(own.measure.iloc[0])
        parts.append(f"<table><caption>{caption}</caption><tr><th>layer</th>{head}</tr>{''.join(rows)}</table>")
    return "".join(parts)


def _missed(report: dict[str, Any], clips: pd.DataFrame) -> str:
    paths = dict(zip(clips["clip"], clips.path, strict=True))
    parts = ["<h2>Heard wrong</h2><p>The test clips that most seeds got wrong.</p>"]
    for system in report["systems"]:
        missed = report["missed"][system["system"]][:6]
        if not missed or system["system"] not in ("teacher", "student"):
            continue
        rows = "".join(
            f"<tr><td>{html.escape(each['word'])}</td><td>{html.escape(each['taken_for'])}</td><td>{each['seeds']}</td>"
            f"<td>{_player(paths[each['clip']])}</td></tr>"
            for each in missed
        )
        head = "<tr><th>word</th><th>taken for</th><th>seeds</th><th>clip</th></tr>"
        parts.append(f"<table><caption>{html.escape(system['title'])}</caption>{head}{rows}</table>")
    return "".join(parts)


def _player(path: str) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, one_second(audio.read(path)).numpy(), audio.SAMPLE_RATE, format="FLAC")
    return f'<audio controls src="data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}"></audio>'
