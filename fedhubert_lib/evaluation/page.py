"""The report as one HTML page that opens offline: table, layers, missed clips to listen to. Nothing is fetched."""

import base64
import html
import io
from typing import Any

import pandas as pd
import soundfile

from fedhubert_lib import audio
from fedhubert_lib.evaluation.keywords import one_second

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
th small { display: block; font-weight: normal; color: #666 }
.best { font-weight: 700 }
.wide { overflow-x: auto }
audio { height: 1.8rem; vertical-align: middle }
"""


def render(
    report: dict[str, Any],
    table: pd.DataFrame,
    wide: pd.DataFrame,
    speed: dict[str, dict[str, float | None]],
    clips: pd.DataFrame,
) -> str:
    """The page. ``table`` holds the figures, ``wide`` a row per system; ``speed`` by system; ``clips`` to read from."""
    data = report["data"]
    about = (
        f"{data['clips']['test']} test clips of {len(data['words'])} words by {data['speakers']['test']} speakers that"
        f" no probe has heard; mean and 95 % interval over {report['parameters']['seeds']} evaluation seeds."
    )
    if "units" in data:
        about += f" Units: {data['units']['minutes']:.1f} minutes of {data['units']['speakers']} held-out speakers."
    parts = [
        f"<h1>{html.escape(report['run'])}: evaluation</h1><p>{html.escape(about)}</p>",
        _main(report, wide, speed),
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


def _main(report: dict[str, Any], wide: pd.DataFrame, speed: dict[str, dict[str, float | None]]) -> str:
    explained = {each["title"]: each for each in report["measures"]}
    head = "".join(
        f'<th title="{html.escape(explained[title]["what"])}">{html.escape(title)}'
        f"<small>{explained[title]['better']} is better</small></th>"
        for title in wide.columns
    )
    names = {each["title"]: each["system"] for each in report["systems"]}
    rows = []
    for title, cells in wide.iterrows():
        factor = speed[names[title]]["real_time_factor"]
        body = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{html.escape(title)}</td>{body}<td>{factor:.0f} ×</td></tr>")
    head = f"<tr><th>system</th>{head}<th>speed<small>of real time, here</small></th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


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
