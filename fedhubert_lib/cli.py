"""The ``fedhubert`` command."""

import argparse
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedhubert_lib import files, params, runner, runs, studies
from fedhubert_lib.evaluation import command as evaluation
from fedhubert_lib.export import command as export

_RUN = f"""\
A stage is skipped when it is done and its notebook, parameters and inputs have not changed; the reason is printed.
Where library source or versions alone changed, its results are kept. Where parameters or inputs changed, it starts
anew, and its results move to RUN/.previous (see fedhubert clean), from where they are taken back when asked for again.
SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 let the notebook finish its checkpoint; the same command then resumes from it.

exit codes:
  {runner.OK}   every stage is done
  {runner.FAILED}   a stage failed: an error in a cell, sys.exit in a cell, a disk that is full
  {runner.USAGE}   nothing was run: wrong parameters, a path that does not exist, a run that is in use
  {runner.DIED}   the kernel of a stage died: killed, or out of memory
  {runner.INTERRUPTED}  stopped by a signal; the same command resumes
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the locale cannot print is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        code = options.function(options)
        sys.stdout.flush()
        return code or runner.OK
    except runner.StageError as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return error.code
    except (studies.ParameterError, runs.RunError) as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.USAGE
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough: print to nowhere from now on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            error = files.explained(error.errno, error.filename)
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.FAILED
    except KeyboardInterrupt:
        return runner.INTERRUPTED


def _run(options: argparse.Namespace) -> None:
    _run_study(studies.load(options.study, options.set, options.run), options.first, options.until, options.force)


def _run_study(study: params.Study, first: str, last: str, force: bool) -> None:
    from fedhubert_lib import index  # here: pandas takes a second to import, which a wrong parameter need not wait for

    runner.run(study, first, last, force)
    if results := index.results(runs.outputs() / study.run):
        print(results)


def _params(options: argparse.Namespace) -> None:
    print("\n\n".join(studies.described(stage) for stage in options.stage or params.SECTIONS))


def _ls(options: argparse.Namespace) -> None:
    from fedhubert_lib import index

    print(index.listing(runs.outputs()))


def _clean(options: argparse.Namespace) -> None:
    from fedhubert_lib import index

    run = runs.outputs() / options.run if (runs.outputs() / options.run).is_dir() else Path(options.run).resolve()
    if not (run / "run.json").is_file():
        raise runs.RunError(f"{options.run}: no run of that name in {runs.outputs()}, and no folder of a run")
    aside = {path.name: path for path in runs.previous(run)}
    names = [name.rstrip("/").removeprefix(f"{runs.PREVIOUS}/") for name in options.folder]
    if unknown := [name for name in names if name not in aside]:
        kept = ", ".join(sorted(aside)) or "nothing"
        raise runs.RunError(f"{', '.join(unknown)}: not in {run / runs.PREVIOUS}, which holds {kept}")
    if not names:
        print(index.previous(run))
        return
    with runs.holding(run / ".lock", "fedhubert clean"):
        for name in names:
            size = index.size(aside[name])
            shutil.rmtree(aside[name])
            print(f"removed: {aside[name]} ({size})")


def _export_client(options: argparse.Namespace) -> None:
    from fedhubert_lib import partition

    try:
        print(partition.export_client(options.run, options.client, options.destination, options.at))
    except ValueError as error:  # a client or folder that cannot be, a table that cannot be read
        raise runs.RunError(str(error)) from error


def _deployment() -> Any:
    """The module of Flower's programs, which end with this one, also by SIGTERM."""
    from fedhubert_lib.federated import deployment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return deployment


def _prepare(options: argparse.Namespace) -> None:
    from fedhubert_lib import federated

    folder = options.run / _deployment().FOLDER
    _deployment().prepare(folder, federated.client_ids(options.run), options.host, options.port)
    print(f"{folder}: ready; give each client its folder under nodes/ and nothing else, over a safe channel")


def _register(options: argparse.Namespace) -> None:
    added = _deployment().register(options.run / _deployment().FOLDER)
    print(f"registered: {', '.join(added) or 'no new client'}")


def _deploy_run(options: argparse.Namespace) -> None:
    folder = options.run.resolve()
    os.environ["FEDHUBERT_OUTPUTS"] = str(folder.parent)
    engines = [f"{stage}.engine=deployment" for stage in ("kmeans", "pretrain", "distill")]
    study = studies.load(options.study, [*options.set, *engines], folder.name)
    _deployment().check_records(folder)
    _deployment().check(folder)
    for stage in options.stage or DEPLOYED:
        _run_study(study, stage, stage, options.force)


def _local(options: argparse.Namespace) -> None:
    _deployment().check_records(options.run)
    with _deployment().local(options.run / _deployment().FOLDER, options.run, options.device):
        _deploy_run(options)


def _argument(*flags: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, options


class Command(NamedTuple):
    """A subcommand; one with two words is a step of the first."""

    function: Callable[[argparse.Namespace], int | None]
    """Its exit code; none: OK."""
    help: str
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]] = ()
    epilog: str = ""


STAGES = list(params.SECTIONS)
DEPLOYED = STAGES[2:]
STUDY = _argument("study", type=Path, help="study file, such as params/quickstart.yaml")
CHANGES = (
    _argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="override a value; repeatable"),
    _argument("--force", action="store_true", help="run the stages anew even if nothing has changed"),
)
FOLDER = _argument("run", type=Path, help="the run's folder, such as outputs/toy; with deploy the server's or client's")
DEVICE = _argument("--device", type=params.device, default="cpu", help="where clients compute: cpu, cuda:0 ...")
STEPS = _argument("stage", nargs="*", choices=[[], *DEPLOYED], default=[], help=f"of {', '.join(DEPLOYED)}: all")
COMMANDS = {
    "run": Command(
        _run,
        "run a study's notebooks in order into outputs/RUN, those that have changed",
        (
            STUDY,
            _argument("--run", metavar="NAME", help="folder under outputs/ (default: the study's name)"),
            _argument("--from", dest="first", choices=STAGES, default="corpus", metavar="STAGE", help="first stage"),
            _argument("--until", choices=STAGES, default="evaluate", metavar="STAGE", help="last stage"),
            *CHANGES,
        ),
        _RUN,
    ),
    "ls": Command(_ls, "list the runs side by side"),
    "clean": Command(
        _clean,
        "show the sizes of a run's stages and of earlier work that it keeps; remove what is named",
        (
            _argument("run", help="the run's name or folder, such as toy or outputs/toy"),
            _argument("folder", nargs="*", help="earlier work to remove, such as .previous/03_pretrain-1"),
        ),
    ),
    "params": Command(
        _params,
        "print all parameters: default, allowed values, meaning",
        (_argument("stage", nargs="*", choices=[[], *STAGES], default=[], help="sections (default: all)"),),
    ),
    "export-client": Command(
        _export_client,
        "copy the data of one client of a run to a folder, for the client's machine",
        (
            FOLDER,
            _argument("client", help="its id, such as client-003"),
            _argument("destination", type=Path, help="folder to make"),
            _argument("--at", type=Path, metavar="FOLDER", help="its path on the client's machine, if another"),
        ),
    ),
    "deploy prepare": Command(
        _prepare,
        "write keys, certificates and configuration to RUN/federation",
        (
            FOLDER,
            _argument("--host", default="127.0.0.1", help="name or address by which clients reach the server"),
            _argument("--port", type=int, default=9092),
        ),
    ),
    "deploy server": Command(
        lambda options: _deployment().serve(options.run / _deployment().FOLDER, options.bind),
        "run the SuperLink, until it is stopped",
        (FOLDER, _argument("--bind", metavar="ADDRESS", help="address to listen on (default: the host; 0.0.0.0: all)")),
    ),
    "deploy register": Command(_register, "register clients whose keys the running SuperLink does not know", (FOLDER,)),
    "deploy client": Command(
        lambda options: _deployment().attend(options.node, options.run, options.device),
        "run a client's SuperNode, until it is stopped",
        (FOLDER, _argument("node", type=Path, help="the client's folder RUN/federation/nodes/CLIENT"), DEVICE),
    ),
    "deploy run": Command(
        _deploy_run, "run stages of a study over the connected clients", (FOLDER, STUDY, STEPS, *CHANGES)
    ),
    "deploy local": Command(
        _local,
        "server, clients and stages on this machine, then stop them",
        (FOLDER, STUDY, STEPS, *CHANGES, DEVICE),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments; ``function`` of a parsed command does its work."""
    parser = argparse.ArgumentParser(prog="fedhubert", description="Federated HuBERT pretraining and distillation.")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            about = f"a real federation over Flower's SuperLink and SuperNodes: see docs/{group}ment.md"
            whole = groups[""].add_parser(group, help=about, description=about)
            groups[group] = whole.add_subparsers(dest="step", required=True, metavar="STEP")
        sub = groups[group].add_parser(
            word,
            help=command.help,
            description=command.help,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flags, options in command.arguments:
            sub.add_argument(*flags, **options)
        sub.set_defaults(function=command.function)
    evaluation.add(groups[""])
    export.add(groups[""])
    return parser


if __name__ == "__main__":
    sys.exit(main())
