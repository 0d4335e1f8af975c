"""The ``fedhubert`` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedhubert_lib import index, params, runner, runs

_RUN = f"""\
A stage is skipped when its notebook, parameters, library source and inputs have not changed; what changed is said.
SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 let the notebook finish its checkpoint; the same command then goes on from it.

exit codes:
  {runner.OK}   every stage is done
  {runner.FAILED}   a stage failed: an error in a cell, sys.exit in a cell, a disk that is full
  {runner.USAGE}   nothing was run: wrong parameters, a path that is not there, a run that is in use
  {runner.DIED}   the kernel of a stage died: killed, or out of memory
  {runner.INTERRUPTED}  stopped by a signal; the same command goes on where it stopped
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="fedhubert", description="Federated HuBERT pretraining and distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_ls(commands)
    given = parser.parse_args(arguments)
    try:
        return given.function(given)
    except runner.StageError as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return error.code
    except (params.ParameterError, runs.RunError) as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.USAGE
    except OSError as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.FAILED


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="run a study's notebooks, those that have changed",
        description="Run the notebooks of a study in order into outputs/RUN/.",
        epilog=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = list(params.SECTIONS)
    parser.add_argument("study", type=Path, help="study file, such as params/quickstart.yaml")
    parser.add_argument("--run", metavar="NAME", help="folder under outputs/ (default: the study's name)")
    parser.add_argument("--from", dest="first", choices=stages, default=stages[0], metavar="STAGE", help="first stage")
    parser.add_argument("--until", choices=stages, default=stages[-1], metavar="STAGE", help="last stage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="put a value over the file's; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="run the stages anew even if nothing has changed")
    parser.set_defaults(function=_run)


def _run(given: argparse.Namespace) -> int:
    study = params.load(given.study, given.set, given.run)
    runner.run(study, given.first, given.until, given.force)
    index.write(runs.outputs())
    print(index.results(runs.outputs() / study.run))
    return runner.OK


def _add_ls(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("ls", help="list the runs side by side; write outputs/index.html")
    parser.set_defaults(function=_ls)


def _ls(given: argparse.Namespace) -> int:
    print(index.listing(runs.outputs()))
    print(index.write(runs.outputs()))
    return runner.OK


if __name__ == "__main__":
    sys.exit(main())
