"""``fedhubert table`` and ``fedhubert along``: reports of several training seeds as one table, and as one picture."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: argparse._SubParsersAction) -> None:
    """Add ``table`` and ``along`` to the command's subparsers."""
    runs = {"type": Path, "nargs": "+", "metavar": "RUN"}
    runs["help"] = "folder of an evaluated run, such as outputs/quickstart; several: the same study with other seeds"
    parser = commands.add_parser(
        "table",
        help="the headline table of a run, or of several training seeds with their interval, in Markdown",
        description="Words, phones, units and ABX of every system, mean and 95 %% interval: over evaluation seeds for"
        " one run, over training seeds for several runs of one study.",
    )
    parser.add_argument("runs", **runs)
    parser.set_defaults(function=_table)

    parser = commands.add_parser(
        "along",
        help="quality over hours of speech heard, of a run or of several training seeds, as a PNG",
        description="Draw the measures that runs with evaluate.along: true have of their checkpoints on the way.",
    )
    parser.add_argument("runs", **runs)
    parser.add_argument("--to", type=Path, default=Path("along.png"), metavar="FILE", help="(default: along.png)")
    parser.set_defaults(function=_along)


def _table(arguments: argparse.Namespace) -> int:
    from fedhubert_lib.evaluation import tables

    print(tables.markdown(_reports(arguments.runs)))
    return 0


def _along(arguments: argparse.Namespace) -> int:
    from fedhubert_lib import files, plots
    from fedhubert_lib.evaluation import tables

    reports = _reports(arguments.runs)
    if without := [str(run) for run, report in zip(arguments.runs, reports, strict=True) if not report["along"]]:
        raise tables.DifferentRunsError(
            f"{', '.join(without)}: evaluated without its checkpoints on the way; set evaluate.along: true"
        )
    with files.atomic(arguments.to) as temporary:
        temporary.write_bytes(plots.png(plots.along(tables.along(reports))))
    print(arguments.to)
    return 0


def _reports(runs: list[Path]) -> list[dict[str, Any]]:
    """The reports of runs of one study with different seeds; raises DifferentRunsError for others."""
    from fedhubert_lib.evaluation import report, tables

    reports = [report.read(run) for run in runs]
    tables.check_one_study(runs)
    tables.over_training_seeds(reports)
    return reports
