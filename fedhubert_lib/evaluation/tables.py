"""Tables out of reports: the headline, what stands below it, compared students, several training seeds, hours heard."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedhubert_lib.evaluation.intervals import Measure, measure
from fedhubert_lib.evaluation.measures import ESSENTIALS, MEASURES
from fedhubert_lib.evaluation.systems import teacher_of

HEADLINE = ("keyword-accuracy", "moments-accuracy", "phone-accuracy", "pnmi", "abx-error")
BELOW = (
    ("fine-tuned-accuracy", "s3prl-accuracy", "s3prl-fine-tuned-accuracy", "nearest-accuracy"),
    ("unseen-speaker-accuracy", "speaker-accuracy", "phone-purity", "cluster-purity"),
    ("parameters", "macs", "bytes"),
)
NO_BREAK = "\N{NO-BREAK SPACE}"
COMPARED = ("keyword-accuracy", "phone-accuracy", "pnmi")
"""What compared students are judged by."""


def figures(report: dict[str, Any]) -> pd.DataFrame:
    """The figures of a report, with titles: what report.csv holds."""
    table = pd.DataFrame(report["figures"]).drop(columns="values")
    table["layer"] = table.layer.astype("Int64")
    titles = {each["system"]: each["title"] for each in report["systems"]}
    table = table.rename(columns={"system": "system_name", "measure": "measure_name"})
    table.insert(0, "system", table.system_name.map(titles))
    table.insert(1, "measure", table.measure_name.map({name: title for name, (title, _, _) in MEASURES.items()}))
    return table


def best(table: pd.DataFrame) -> pd.DataFrame:
    """A row per system and measure: that of the best layer; purity is that of the layer which is best by PNMI."""
    signs = table.measure_name.map({name: -1 if better == "lower" else 1 for name, (_, better, _) in MEASURES.items()})
    order = table.assign(order=-signs * table.value).sort_values("order", kind="stable")
    chosen = order.drop_duplicates(["system_name", "measure_name"]).drop(columns="order").sort_index()
    pnmi = chosen[chosen.measure_name == "pnmi"][["system_name", "layer"]]
    purity = table[table.measure_name.isin(("phone-purity", "cluster-purity"))].merge(pnmi)
    return pd.concat([chosen[~chosen.measure_name.isin(("phone-purity", "cluster-purity"))], purity], ignore_index=True)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """One row per system, one column per measure of ``HEADLINE``, as text ``mean ± interval`` that no line breaks."""
    return _wide(table, HEADLINE)


def below(table: pd.DataFrame) -> list[pd.DataFrame]:
    """What the headline leaves out, in tables of like make."""
    tables = [_wide(table, names) for names in BELOW]
    return [each for each in tables if each.size]


def _wide(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    rows = best(table)
    text = rows[rows.measure_name.isin(names)]
    text = text.assign(text=[_text(row) for row in text.itertuples()])
    wide = text.pivot(index="system", columns="measure", values="text")
    systems = [each for each in dict.fromkeys(table.system) if each in wide.index]
    titles = [MEASURES[name][0] for name in names]
    wide = wide.loc[systems, [title for title in titles if title in wide.columns]].fillna("")
    return wide.rename_axis(index=None, columns=None)


def _text(row: Any) -> str:
    if row.measure_name in ("parameters", "macs", "bytes"):
        return f"{row.value / 1e6:.2f}{NO_BREAK}M"
    text = f"{row.value:.3f}" if pd.isna(row.high) else f"{row.value:.3f} ± {row.high - row.value:.3f}"
    return text.replace(" ", NO_BREAK)


def student(table: pd.DataFrame) -> tuple[dict[str, float], dict[str, float]]:
    """What the student keeps of its teacher's quality, and what it costs: shares by title; empty without a student."""
    values = best(table).set_index(["measure_name", "system_name"]).value.unstack()
    if "student" not in values:
        return {}, {}
    shares = (values["student"] / values[teacher_of(values.columns)]).dropna()
    names = (("keyword-accuracy", "phone-accuracy", "pnmi"), ("parameters", "macs", "bytes"))
    return tuple({MEASURES[name][0]: float(shares[name]) for name in each if name in shares} for each in names)


def comparison(report: dict[str, Any]) -> pd.DataFrame:
    """The compared students beside the teacher and the floors, as ``plots.bars`` draws them; empty without any.

    Columns: system and measure (titles), value, low, high, baseline (shuffled labels or chance), seeds.
    """
    rows = []
    teacher = teacher_of({each["system"] for each in report["figures"]})
    for name in COMPARED if report["compared"] else ():
        own = [each for each in report["figures"] if each["measure"] == name and each["system"] in (teacher, "mfcc")]
        top = {each["system"]: each for each in sorted(own, key=lambda each: each["value"])}
        named = [
            (f"{each['objective']}, {each['training']}", each) for each in report["compared"] if each["measure"] == name
        ]
        named = [(title.removesuffix(", none"), each) for title, each in named]
        for system, each in [("teacher", top[teacher]), *named, ("MFCC", top["mfcc"])] if top else ():
            row = {"system": system, "measure": MEASURES[name][0], "baseline": top[teacher]["baseline"]}
            rows.append(row | {key: each[key] for key in ("value", "low", "high")} | {"seeds": len(each["values"])})
    return pd.DataFrame(rows).astype({"low": float, "high": float} if rows else {})


def kept(report: dict[str, Any]) -> pd.DataFrame:
    """For each compared objective: federated student against its teacher, and against the centralised student.

    A row per objective and measure, index (objective, measure); each column a mean over training seeds with its 95 %
    interval, as text.
    """
    rows = {}
    teacher = teacher_of({each["system"] for each in report["figures"]})
    students = {(each["objective"], each["training"], each["measure"]): each["values"] for each in report["compared"]}
    for (objective, training, name), values in students.items():
        if training != "federated":
            continue
        own = [each["value"] for each in report["figures"] if (each["system"], each["measure"]) == (teacher, name)]
        row = {"of the teacher's": str(measure(np.array(values) / max(own), "training seeds"))}
        if pooled := students.get((objective, "centralised", name)):
            ratios = np.array(values) / np.array(pooled)
            row["of the centralised student's"] = str(measure(ratios, "training seeds"))
        rows[objective, MEASURES[name][0]] = row
    return pd.DataFrame.from_dict(rows, orient="index")


class DifferentRunsError(ValueError):
    """Reports that cannot stand in one table."""


def over_training_seeds(reports: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Measure]:
    """The headline of runs that differ in their training seed alone: (system, measure) titles to a mean over runs.

    What not every run has is left out. Raises DifferentRunsError where the runs were measured differently, or two of
    them hold the same model.
    """
    settings = [each["parameters"] | {"words": each["data"]["words"]} for each in reports]
    for report, theirs in zip(reports, settings, strict=True):
        differing = {key for key in settings[0] | theirs if settings[0].get(key) != theirs.get(key)}
        if differing := sorted(differing - {"seed", "checkpoint", "along"}):
            words = ", ".join(differing)
            raise DifferentRunsError(f"{report['run']}: measured otherwise than {reports[0]['run']}: {words} differ")
    for system in ("teacher", "centralised"):
        digests = [s["digest"] for each in reports for s in each["systems"] if s["system"] == system]
        if len(set(digests)) < len(digests):
            raise DifferentRunsError(f"two runs have the same {system}, bit by bit; give runs of different seeds")
    tables = [best(figures(report)).set_index(["system", "measure_name"]).value for report in reports]
    titles = dict.fromkeys(each["title"] for each in reports[0]["systems"])
    return {
        (title, name): measure([table[title, name] for table in tables], "training seeds")
        for title in titles
        for name in HEADLINE
        if all((title, name) in table.index for table in tables)
    }


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """The headline of a run or of several training seeds, in Markdown; it says what the intervals span."""
    if len(reports) == 1:
        wide = headline(figures(reports[0]))
        span = f"one training seed, {reports[0]['parameters']['seeds']} evaluation seeds"
    else:
        values = over_training_seeds(reports)
        cells = pd.Series({(title, MEASURES[name][0]): str(value) for (title, name), value in values.items()})
        wide = cells.unstack(sort=False).fillna("")
        span = f"{len(reports)} training seeds"
    rows = [[f"mean and 95 % interval over {span}", *wide.columns], ["---"] * (wide.shape[1] + 1)]
    rows += [[title, *cells] for title, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace(NO_BREAK, " ")


def along(reports: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Quality against hours of speech heard: run, system, measure (titles), hours, value.

    ``hours`` is NaN for what does not train: random weights and MFCC.
    """
    rows = []
    for report in reports:
        titles = {each["system"]: each["title"] for each in report["systems"]}
        for each in report["along"]:
            row = {"run": report["run"], "system": titles[each["system"]], "hours": each["hours"]}
            rows.append(row | {"measure": MEASURES[each["measure"]][0], "value": each["value"]})
        if report["along"]:
            table = best(figures(report))
            floors = table[table.system_name.isin(("random", "mfcc")) & table.measure_name.isin(ESSENTIALS)]
            rows += floors.assign(run=report["run"], hours=np.nan)[list(rows[0])].to_dict("records")
    return pd.DataFrame(rows)
