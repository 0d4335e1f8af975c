"""Several runs of one study with different training seeds: one table, with intervals over these seeds."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedhubert_lib import files, params, plots, records
from fedhubert_lib.evaluation import systems, tables
from fedhubert_lib.evaluation.intervals import Interval, measure
from fedhubert_lib.evaluation.tables import HEADLINE, TITLES, Report

IRRELEVANT = params.HOW | params.ADDITIONS | {"seed", "root", "keywords_root", "alignments", "checkpoint"}
"""Parameters in which the runs of one table may differ."""


def reports(runs: Sequence[Path]) -> list[Report]:
    """The reports of ``runs``. Raises RunError unless they are of one study and of different seeds."""
    evaluated = [tables.read(run) for run in runs]
    check_one_study(runs)
    means(evaluated)
    return evaluated


def draw_along(runs: Sequence[Path], path: Path) -> None:
    """Draw quality over hours of speech heard as the PNG ``path``. Raises RunError."""
    evaluated = reports(runs)
    if without := [run["run"] for run in evaluated if not run["along"]]:
        raise records.RunError(f"{', '.join(without)}: evaluated at its end alone; set evaluate.along: true")
    with files.atomic(path) as temporary:
        temporary.write_bytes(plots.png(plots.along(tables.along(evaluated))))


def check_one_study(runs: Sequence[Path]) -> None:
    """Raise RunError, with what differs, unless ``runs`` differ in seeds, places and machines only."""
    recorded = pd.DataFrame(
        {key: str(value) for key, value in records.all_parameters(run).items() if key.split(".")[1] not in IRRELEVANT}
        for run in runs
    )
    removed = {f"{stage}.{name}": str(value) for stage in params.SECTIONS for name, value in params.REMOVED.items()}
    values = {name: column.dropna().unique() for name, column in recorded.fillna(removed).items()}
    if differing := [f"{name} ({', '.join(texts)})" for name, texts in values.items() if len(texts) > 1]:
        raise records.RunError(
            f"{', '.join(map(str, runs))}: a mean over training seeds needs runs of one study, and these differ in"
            f" {', '.join(differing)}"
        )


def means(reports: Sequence[Report]) -> dict[tuple[str, str], Interval]:
    """The headline of runs of one study: (system title, measure name) to a mean over their training seeds, or, of a
    single run, over its evaluation seeds.

    What not every run has is left out. Raises RunError where the speech differs that was measured on, or two runs hold
    the same model.
    """
    first = reports[0]
    if other := [run["run"] for run in reports if run["data"] != first["data"]]:
        raise records.RunError(f"{', '.join(other)}: measured on other speech than {first['run']}: see their data")
    for name in systems.CHECKPOINTS:
        digests = [system["digest"] for run in reports for system in run["systems"] if system["system"] == name]
        if len(set(digests)) < len(digests):
            raise records.RunError(f"two runs have the same {name}, bit by bit; give runs of different seeds")
    chosen = [tables.best(run["figures"]) for run in reports]
    figures = {
        (title, name): [run[system][name] for run in chosen]
        for system, title in tables.titles(first).items()
        for name in HEADLINE
        if all(name in run.get(system, {}) for run in chosen)
    }
    if len(reports) == 1:
        return {key: tables.interval(figure) for key, [figure] in figures.items()}
    return {key: measure([figure["value"] for figure in of_runs]) for key, of_runs in figures.items()}


def markdown(reports: Sequence[Report]) -> str:
    """The headline of a run or of several training seeds, in Markdown, with what the intervals span."""
    span = f"{len(reports)} training seeds"
    if len(reports) == 1:
        span = f"one training seed, {reports[0]['parameters']['seeds']} evaluation seeds"
    cells = {(title, TITLES[name]): str(value) for (title, name), value in means(reports).items()}
    table = pd.Series(cells).unstack(sort=False).fillna("")
    return tables.markdown(table, f"mean and 95 % interval over {span}")
