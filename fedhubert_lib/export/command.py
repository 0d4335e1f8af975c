"""``fedhubert export``: a checkpoint for other software; ``fedhubert s3prl``: its benchmark on a run's model."""

import argparse
import sys
from pathlib import Path

from fedhubert_lib.export import FORMATS, write


def add(commands: argparse._SubParsersAction) -> None:
    """Add ``export`` and ``s3prl`` to the command's subparsers."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint for other software, and compare it with the source",
        epilog="\n".join(f"  {name:13} {text}" for name, text in FORMATS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=list(FORMATS), metavar="FORMAT", help="one of those below")
    parser.add_argument("checkpoint", type=Path, help="such as outputs/RUN/04_distill/checkpoint")
    parser.add_argument("out", type=Path, help="folder or file to write")
    parser.set_defaults(function=_export)

    parser = commands.add_parser(
        "s3prl",
        help="train and evaluate s3prl's speech_commands on a model of a run, and add its accuracy to the report",
        description="Run s3prl's own run_downstream, train and evaluate, on the run's keywords (needs: make s3prl)."
        " Its accuracy goes into the run's report.",
    )
    parser.add_argument("run", type=Path, help="folder of an evaluated run, such as outputs/quickstart")
    parser.add_argument("--system", default="teacher", help="teacher (default), student, random: as report.json says")
    parser.add_argument("--fine-tune", action="store_true", help="train the whole model on its last layer")
    parser.add_argument("--steps", type=int, default=200_000, help="optimiser steps (default: 200000, as SUPERB)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4, as SUPERB)")
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with its own seed (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.set_defaults(function=_s3prl)


def _export(options: argparse.Namespace) -> int:
    from fedhubert_lib.export.formats import ExportError

    try:
        facts = write(options.format, options.checkpoint, options.out)
    except (ExportError, ValueError) as error:  # a ValueError: a checkpoint that cannot be read
        print(f"fedhubert: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: " + ", ".join(f"{name} {value:.6g}" for name, value in facts.items()))
    return 0


def _s3prl(options: argparse.Namespace) -> int:
    from fedhubert_lib import runs
    from fedhubert_lib.evaluation import report
    from fedhubert_lib.export import formats, s3prl

    chosen = {name: getattr(options, name) for name in ("seeds", "fine_tune", "steps", "rate", "device")}
    report.read(options.run)  # or it says what to do, before a lock is asked of a folder that is no run
    try:
        with runs.holding(options.run / ".lock", "fedhubert s3prl"):
            results = s3prl.of_run(options.run, options.system, **chosen)
    except (formats.ExportError, ValueError) as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return 1
    for result in results:
        print(f"seed {result['seed']}: dev {result['dev']:.4f}, test {result['test']:.4f}")
    return 0
