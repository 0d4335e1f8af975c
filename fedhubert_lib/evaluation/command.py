"""``fedhubert table`` and ``fedhubert along``: reports of several training seeds as one table, and as one picture."""

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Add ``table`` and ``along`` to the command's subparsers."""
    runs = {"type": Path, "nargs": "+", "metavar": "RUN"}
    runs["help"] = "folder of an evaluated run, such as outputs/quickstart; several: the same study with other seeds"
    about = "the headline table of a run, or of several training seeds of one study, in Markdown, with intervals"
    parser = commands.add_parser("table", help=about, description=about)
    parser.add_argument("runs", **runs)
    parser.set_defaults(function=_table)

    about = "draw quality over hours of speech heard, of runs with evaluate.along: true, as a PNG"
    parser = commands.add_parser("along", help=about, description=about)
    parser.add_argument("runs", **runs)
    parser.add_argument("--to", type=Path, default=Path("along.png"), metavar="FILE", help="(default: along.png)")
    parser.set_defaults(function=_along)


def _table(options: argparse.Namespace) -> None:
    from fedhubert_lib.evaluation import training_seeds

    print(training_seeds.markdown(training_seeds.reports(options.runs)))


def _along(options: argparse.Namespace) -> None:
    from fedhubert_lib.evaluation import training_seeds

    training_seeds.draw_along(options.runs, options.to)
    print(options.to)
