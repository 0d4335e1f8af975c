"""Tables out of reports: the headline and the rest, compared students, several training seeds, hours heard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedhubert_lib import identity, params
from fedhubert_lib.evaluation import systems
from fedhubert_lib.evaluation.intervals import Interval, measure
from fedhubert_lib.evaluation.measures import ESSENTIALS, MEASURES

HEADLINE = ("keyword-accuracy", "moments-accuracy", "phone-accuracy", "pnmi", "abx-error")
COST = ("parameters", "macs", "bytes")
BELOW = (
    ("fine-tuned-accuracy", "s3prl-accuracy", "s3prl-fine-tuned-accuracy", "nearest-accuracy"),
    ("unseen-speaker-accuracy", "speaker-accuracy", "phone-purity", "cluster-purity"),
    COST,
)
COMPARED = ("keyword-accuracy", "phone-accuracy", "pnmi")
"""Measures of compared students."""
TITLES = {name: title for name, (title, _, _) in MEASURES.items()}
IRRELEVANT = params.HOW | params.ADDITIONS - {"patience"}
IRRELEVANT |= {"seed", "root", "keywords_root", "alignments", "checkpoint"}
"""Parameters in which the runs of one table may differ."""
NO_BREAK = "\N{NO-BREAK SPACE}"

Report = dict[str, Any]
Best = dict[str, dict[str, dict[str, Any]]]
"""System and measure to a figure of report.json."""


class DifferentRunsError(identity.RunError):
    """Reports that cannot stand in one table."""


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
    return _frame(report, report["figures"])


def of_best_layers(report: Report, names: Sequence[str] = HEADLINE) -> pd.DataFrame:
    """As ``figures``, but a row per system and measure in ``names``: that of the best layer."""
    chosen = best(report["figures"])
    return _frame(report, [of_system[name] for name in names for of_system in chosen.values() if name in of_system])


def _frame(report: Report, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).drop(columns="values").astype({"layer": "Int64", "low": float, "high": float})
    table = table.rename(columns={"system": "system_name", "measure": "measure_name"})
    table.insert(0, "system", table.system_name.map(_titles(report)))
    table.insert(1, "measure", table.measure_name.map(TITLES))
    return table


def _titles(report: Report) -> dict[str, str]:
    return {each["system"]: each["title"] for each in report["systems"]}


def headline(report: Report) -> pd.DataFrame:
    """One row per system, one column per measure of ``HEADLINE``, as text ``mean ± interval`` that no line breaks."""
    return _wide(report, HEADLINE)


def below(report: Report) -> list[pd.DataFrame]:
    """The measures that the headline leaves out, in tables of the same form."""
    return [wide for names in BELOW if (wide := _wide(report, names)).size]


def _wide(report: Report, names: Sequence[str]) -> pd.DataFrame:
    titles = _titles(report)
    cells = {
        titles[system]: {TITLES[name]: _text(of_system[name]) for name in names if name in of_system}
        for system, of_system in best(report["figures"]).items()
    }
    wide = pd.DataFrame.from_dict({title: row for title, row in cells.items() if row}, orient="index").fillna("")
    return wide[[TITLES[name] for name in names if TITLES[name] in wide.columns]]


def _text(figure: dict[str, Any]) -> str:
    if figure["measure"] in COST:
        return f"{figure['value'] / 1e6:.2f}{NO_BREAK}M"
    return str(Interval(*(figure[key] for key in Interval._fields))).replace(" ", NO_BREAK)


def student(report: Report) -> tuple[dict[str, float], dict[str, float]]:
    """Quality and cost of the student as fractions of its teacher's, by title; empty without a student."""
    chosen = best(report["figures"])
    of_student, of_teacher = chosen.get("student", {}), chosen.get(systems.teacher_of(chosen), {})
    ratios = {name: of_student[name]["value"] / of_teacher[name]["value"] for name in of_student if name in of_teacher}
    return tuple({TITLES[name]: ratios[name] for name in names if name in ratios} for names in (COMPARED, COST))


def comparison(report: Report) -> pd.DataFrame:
    """The compared students beside the teacher and MFCC, as ``plots.bars`` draws them; empty without any.

    Columns: system and measure (titles), baseline (shuffled labels or chance), value, low, high, seeds.
    """
    chosen, rows = best(report["figures"]), []
    for name in COMPARED:
        students = {
            f"{each['objective']}, {each['training']}".removesuffix(", none"): each
            for each in report["compared"]
            if each["measure"] == name
        }
        if students:
            teacher = chosen[systems.teacher_of(chosen)][name]
            for title, each in ({"teacher": teacher} | students | {"MFCC": chosen["mfcc"][name]}).items():
                row = {"system": title, "measure": TITLES[name], "baseline": teacher["baseline"]}
                row |= {key: each[key] for key in ("value", "low", "high")}
                rows.append(row | {"seeds": len(each["values"])})
    return pd.DataFrame(rows).astype({"low": float, "high": float} if rows else {})


def kept(report: Report) -> pd.DataFrame:
    """For each compared objective: federated student against its teacher, and against the centralised student.

    A row per objective and measure, index (objective, measure); each column a mean over training seeds with its 95 %
    interval, as text.
    """
    chosen = best(report["figures"])
    teacher = chosen.get(systems.teacher_of(chosen))
    students = {(each["objective"], each["training"], each["measure"]): each["values"] for each in report["compared"]}
    rows = {}
    for (objective, training, name), values in students.items():
        if training == "federated":
            row = {"of the teacher's": str(measure(np.array(values) / teacher[name]["value"]))}
            if centralised := students.get((objective, "centralised", name)):
                row["of the centralised student's"] = str(measure(np.array(values) / np.array(centralised)))
            rows[objective, TITLES[name]] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def check_one_study(runs: Sequence[Path]) -> None:
    """Raise DifferentRunsError, with what differs, unless ``runs`` differ in seeds, places and machines only."""
    recorded = [
        {
            f"{stage}.{name}": str(value)
            for stage, folder in params.FOLDERS.items()
            for name, value in systems.parameters(run / folder).items()
            if name not in IRRELEVANT
        }
        for run in runs
    ]
    differing = []
    for name in dict.fromkeys(name for parameters in recorded for name in parameters):
        values = dict.fromkeys(parameters[name] for parameters in recorded if name in parameters)
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    if differing:
        raise DifferentRunsError(
            f"{', '.join(map(str, runs))}: a mean over training seeds needs runs of one study, and these differ in"
            f" {', '.join(differing)}"
        )


def over_training_seeds(reports: Sequence[Report]) -> dict[tuple[str, str], Interval]:
    """The headline of runs of one study with different seeds: (system title, measure name) to a mean over runs.

    What not every run has is left out. Raises DifferentRunsError where the words differ, or two runs hold the same
    model.
    """
    for report in reports:
        if report["data"]["words"] != reports[0]["data"]["words"]:
            raise DifferentRunsError(f"{report['run']}: measured on other words than {reports[0]['run']}")
    for system in ("teacher", "centralised"):
        digests = [each["digest"] for report in reports for each in report["systems"] if each["system"] == system]
        if len(set(digests)) < len(digests):
            raise DifferentRunsError(f"two runs have the same {system}, bit by bit; give runs of different seeds")
    chosen = [best(report["figures"]) for report in reports]
    return {
        (title, name): measure([run[system][name]["value"] for run in chosen])
        for system, title in _titles(reports[0]).items()
        for name in HEADLINE
        if all(name in run.get(system, {}) for run in chosen)
    }


def markdown(reports: Sequence[Report]) -> str:
    """The headline of a run or of several training seeds, in Markdown, with what the intervals span."""
    if len(reports) == 1:
        wide = headline(reports[0])
        span = f"one training seed, {reports[0]['parameters']['seeds']} evaluation seeds"
    else:
        cells = {(title, TITLES[name]): str(value) for (title, name), value in over_training_seeds(reports).items()}
        wide = pd.Series(cells).unstack(sort=False).fillna("")
        span = f"{len(reports)} training seeds"
    rows = [[f"mean and 95 % interval over {span}", *wide.columns], ["---"] * (wide.shape[1] + 1)]
    rows += [[title, *cells] for title, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace(NO_BREAK, " ")


def along(reports: Sequence[Report]) -> pd.DataFrame:
    """Quality against hours of speech heard: run, system, hours, measure (titles), value.

    ``hours`` is NaN for what does not train: random weights and MFCC.
    """
    rows = []
    for report in reports:
        chosen, titles = best(report["figures"]), _titles(report)
        baselines = [
            chosen[system][name] | {"hours": np.nan}
            for system in ("random", "mfcc")
            for name in ESSENTIALS
            if report["along"] and name in chosen[system]
        ]
        for each in report["along"] + baselines:
            row = {"run": report["run"], "system": titles[each["system"]], "hours": each["hours"]}
            rows.append(row | {"measure": TITLES[each["measure"]], "value": each["value"]})
    return pd.DataFrame(rows)
