"""Tables out of reports: the headline and the rest, the student beside its teacher, hours heard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedhubert_lib import records
from fedhubert_lib.evaluation.intervals import Interval
from fedhubert_lib.evaluation.systems import GIVEN_TEACHER

STAGE = "05_evaluate"
MEASURES = {
    "keyword-accuracy": ("keyword accuracy", "higher", "s3prl's probe on all layers, test speakers unseen"),
    "fine-tuned-accuracy": ("keyword accuracy, fine-tuned", "higher", "the whole model trained on the words"),
    "moments-accuracy": ("keyword accuracy, mean and standard deviation", "higher", "of the best layer, least squares"),
    "s3prl-accuracy": ("keyword accuracy, s3prl", "higher", "s3prl's speech_commands on frozen layers"),
    "s3prl-fine-tuned-accuracy": ("keyword accuracy, s3prl fine-tuned", "higher", "the same, the whole model trained"),
    "layer-accuracy": ("keyword accuracy, one layer", "higher", "linear least squares on one layer"),
    "layer-weight": ("weight of the layer", "neither", "in the keyword probe's weighted sum"),
    "nearest-accuracy": ("10 nearest neighbours", "higher", "keywords by cosine on the best layer"),
    "unseen-speaker-accuracy": ("speakers left out", "higher", "linear probe over folds of speakers, best layer"),
    "abx-error": ("ABX error across speakers", "lower", "ON word ACROSS speaker, as fastabx; angles, DTW; best layer"),
    "speaker-accuracy": ("speaker identified", "lower", "by a linear probe on the best layer"),
    "pnmi": ("PNMI of units", "higher", "phones known from clusters of the scaled layer; baseline: shuffled labels"),
    "phone-accuracy": ("phone probe", "higher", "frames, least squares, new speakers; baseline: commonest phone"),
    "phone-purity": ("phone purity of units", "higher", "fraction of frames with the main phone of their cluster"),
    "cluster-purity": ("cluster purity of units", "higher", "fraction of frames in the main cluster of their phone"),
    "parameters": ("parameters", "lower", "of the encoder"),
    "macs": ("MACs per second of audio", "lower", "multiply-accumulates for one second"),
    "bytes": ("bytes on disk", "lower", "of the encoder's weights"),
}
"""Stable name to title, which way is better, and what it is; where no other baseline is named, it is chance."""

ESSENTIALS = ("keyword-accuracy", "phone-accuracy", "pnmi", "abx-error")
"""Measures of checkpoints along a training."""

HEADLINE = ("keyword-accuracy", "moments-accuracy", "phone-accuracy", "pnmi", "abx-error")
COST = ("parameters", "macs", "bytes")
BELOW = (
    ("fine-tuned-accuracy", "s3prl-accuracy", "s3prl-fine-tuned-accuracy", "nearest-accuracy"),
    ("unseen-speaker-accuracy", "speaker-accuracy", "phone-purity", "cluster-purity"),
    COST,
)
QUALITY = ("keyword-accuracy", "phone-accuracy", "pnmi")
"""Measures of what a student keeps of its teacher."""
TITLES = {name: title for name, (title, _, _) in MEASURES.items()}
NO_BREAK = "\N{NO-BREAK SPACE}"

Report = dict[str, Any]
Best = dict[str, dict[str, dict[str, Any]]]
"""System and measure to a figure of report.json."""


def read(run: Path) -> dict[str, Any]:
    """The report.json of ``run``. Raises FileNotFoundError where there is none of the models that it holds now."""
    path = run / STAGE / "report.json"
    report = records.read_json(path) or {}
    if why := records.stale(run).get("evaluate") if report else "not there":
        raise FileNotFoundError(f"{path}: {why}; run 05_evaluate first, and what is stale before it")
    return report


def best(figures: Sequence[dict[str, Any]]) -> Best:
    """The figure of the best layer, by system and measure; purity is that of the layer which is best by PNMI.

    Layers measured with fewer seeds, to find the best one by PNMI, do not count.
    """
    chosen: Best = {}
    for figure in figures:
        of_system, name = chosen.setdefault(figure["system"], {}), figure["measure"]
        sign = -1 if MEASURES[name][1] == "lower" else 1
        if name in ("phone-purity", "cluster-purity"):  # they follow the PNMI of their layer
            better = of_system["pnmi"]["layer"] == figure["layer"]
        else:
            so_far = of_system.get(name, {"seeds": 0, "value": 0})
            better = (figure["seeds"], sign * figure["value"]) > (so_far["seeds"], sign * so_far["value"])
        if better:
            of_system[name] = figure
    return chosen


def figures(report: Report) -> pd.DataFrame:
    """The figures of a report, which report.csv holds.

    Columns: system, measure (titles), system_name, measure_name (stable), layer, value, low, high, baseline, seeds.
    """
    table = pd.DataFrame(report["figures"]).drop(columns="values")
    table = table.astype({"layer": "Int64", "low": float, "high": float})
    table = table.rename(columns={"system": "system_name", "measure": "measure_name"})
    table.insert(0, "system", table.system_name.map(titles(report)))
    table.insert(1, "measure", table.measure_name.map(TITLES))
    return table


def of_best_layers(report: Report, names: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """As ``figures``, but a row per system and measure in ``names``: that of the best layer."""
    chosen = best(report["figures"]).values()
    rows = [of_system[name] for name in names for of_system in chosen if name in of_system]
    return figures(report | {"figures": rows})


def titles(report: Report) -> dict[str, str]:
    """System to its title."""
    return {system["system"]: system["title"] for system in report["systems"]}


def interval(figure: dict[str, Any]) -> Interval:
    """Mean and interval of a figure of report.json."""
    return Interval(*(figure[key] for key in Interval._fields))


def headline(report: Report, names: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """One row per system, one column per measure in ``names``, as text ``mean ± interval`` that no line breaks."""
    cells = {
        system: {name: _text(of_system[name]) for name in names if name in of_system}
        for system, of_system in best(report["figures"]).items()
    }
    table = pd.DataFrame(cells, names).dropna(how="all").dropna(how="all", axis=1)
    return table.fillna("").T.rename(titles(report)).rename(columns=TITLES)


def below(report: Report) -> list[pd.DataFrame]:
    """The measures that the headline leaves out, in tables of the same form."""
    return [table for names in BELOW if (table := headline(report, names)).size]


def _text(figure: dict[str, Any]) -> str:
    if figure["measure"] in COST:
        return f"{figure['value'] / 1e6:.2f}{NO_BREAK}M"
    return str(interval(figure)).replace(" ", NO_BREAK)


def student(report: Report) -> pd.DataFrame:
    """Quality over random weights and cost of a student as fractions of its teacher's, for ``plots.bars``."""
    chosen = best(report["figures"])
    zeros = {name: figure["value"] for name, figure in chosen.get("random", {}).items()} | dict.fromkeys(COST, 0.0)
    of_student, of_teacher = chosen.get("student", {}), chosen.get(GIVEN_TEACHER) or chosen.get("teacher", {})
    of_teacher = {} if GIVEN_TEACHER in report["absent"] else of_teacher
    rows = [
        (TITLES[name], f"{kind}: fraction of the teacher's", (of_student[name]["value"] - zeros[name]) / gain, 1.0)
        for kind, names in (("quality over random weights", QUALITY), ("cost", COST))
        for name in names
        if name in of_student and name in of_teacher and name in zeros
        if (gain := (value := of_teacher[name]["value"]) - zeros[name]) > 1e-6  # of nothing there is no fraction,
        if (of_teacher[name]["high"] or value) - value < gain  # nor of what may be nothing
    ]
    return pd.DataFrame(rows, columns=["system", "measure", "value", "baseline"])


def along(reports: Sequence[Report]) -> pd.DataFrame:
    """Quality against hours of speech heard: run (its number), system, hours, measure (titles), value.

    ``hours`` is NaN for what does not train: random weights and MFCC.
    """
    rows = []
    for number, report in enumerate(reports):  # folders of one name are runs, too
        chosen = best(report["figures"])
        baselines = [
            chosen[system][name] | {"hours": np.nan}
            for system in ("random", "mfcc")
            for name in ESSENTIALS
            if report["along"] and name in chosen[system]
        ]
        for figure in report["along"] + baselines:
            row = {"run": number, "system": titles(report)[figure["system"]], "hours": figure["hours"]}
            rows.append(row | {"measure": TITLES[figure["measure"]], "value": figure["value"]})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, corner: str) -> str:
    """A table of texts in Markdown, ``corner`` above its index."""
    rows = [[corner, *table.columns], ["---"] * (table.shape[1] + 1), *table.reset_index().to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace(NO_BREAK, " ")
