"""``fedhubert table`` and ``fedhubert along``: reports of several training seeds as one table, and as one picture."""

import argparse
import sys
from pathlib import Path

_RUNS = "folder of an evaluated run, such as outputs/quickstart; several: the same study with other seeds"


def add(commands: argparse._SubParsersAction) -> None:
    """Add ``table`` and ``along`` to the command's subparsers."""
    parser = commands.add_parser(
        "table",
        help="the headline table of a run, or of several training seeds with their interval, in Markdown",
        description="Words, phones, units and ABX of every system, mean and 95 %% interval; over training seeds where"
        " several runs of one study are given, else over evaluation seeds.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=_RUNS)
    parser.set_defaults(function=_table)

    parser = commands.add_parser(
        "along",
        help="quality over hours of speech heard, of a run or of several training seeds, as a PNG",
        description="Draw what runs with evaluate.along: true have measured of their checkpoints on the way.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=_RUNS)
    parser.add_argument("--to", type=Path, default=Path("along.png"), metavar="FILE", help="(default: along.png)")
    parser.set_defaults(function=_along)


def _table(given: argparse.Namespace) -> int:
    from fedhubert_lib.evaluation import report, tables

    try:
        print(tables.markdown([report.read(run) for run in given.runs]))
    except tables.DifferentRunsError as error:
        return _fail(error)
    return 0


def _along(given: argparse.Namespace) -> int:
    from fedhubert_lib import files, plots
    from fedhubert_lib.evaluation import report, tables

    reports = [report.read(run) for run in given.runs]
    if without := [str(run) for run, each in zip(given.runs, reports, strict=True) if not each.get("along")]:
        return _fail(f"{', '.join(without)}: evaluated without its checkpoints on the way; set evaluate.along: true")
    try:
        tables.over_training_seeds(reports)  # checks that they are of one study
    except tables.DifferentRunsError as error:
        return _fail(error)
    with files.atomic(given.to) as temporary:
        temporary.write_bytes(plots.png(plots.along(tables.along(reports))))
    print(given.to)
    return 0


def _fail(reason: object) -> int:
    print(f"fedhubert: {reason}", file=sys.stderr)
    return 1
