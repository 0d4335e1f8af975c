"""The ``fedhubert`` command."""

import argparse
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedhubert_lib import files, index, params, records, runner, runs, studies
from fedhubert_lib.evaluation import command as evaluation
from fedhubert_lib.export import command as export

_RUN = f"""\
A stage is skipped when it is done and its notebook, parameters and inputs have not changed; what changed is said.
Where library source or versions alone changed, its results are kept. Where parameters or inputs changed, it starts
anew, and what is there moves to RUN/.previous (see fedhubert clean), from where it is taken back when asked for again.
SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 let the notebook finish its checkpoint; the same command then goes on from it.

exit codes:
  {runner.OK}   every stage is done
  {runner.FAILED}   a stage failed: an error in a cell, sys.exit in a cell, a disk that is full
  {runner.USAGE}   nothing was run: wrong parameters, a path that is not there, a run that is in use
  {runner.DIED}   the kernel of a stage died: killed, or out of memory
  {runner.INTERRUPTED}  stopped by a signal; the same command goes on where it stopped
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; what a subcommand does stands in its ``function``."""
    parser = argparse.ArgumentParser(prog="fedhubert", description="Federated HuBERT pretraining and distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_ls(commands)
    _add_clean(commands)
    _add_params(commands)
    _add_export_client(commands)
    _add_deploy(commands)
    evaluation.add(commands)
    export.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale cannot print is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        code = given.function(given)
        sys.stdout.flush()
        return code
    except runner.StageError as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return error.code
    except (studies.ParameterError, runs.RunError) as error:
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.USAGE
    except BrokenPipeError:  # whoever read what is printed has seen enough, such as head
        return _closed()
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            error = files.explained(error.errno, error.filename)
        print(f"fedhubert: {error}", file=sys.stderr)
        return runner.FAILED
    except KeyboardInterrupt:
        return runner.INTERRUPTED


def _closed() -> int:
    """Print to nowhere from now on; the exit code of a process that SIGPIPE has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


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
    _add_changes(parser)
    parser.set_defaults(function=_run)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="put a value over the file's; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="run the stages anew even if nothing has changed")


def _run(given: argparse.Namespace) -> int:
    study = studies.load(given.study, given.set, given.run)
    runner.run(study, given.first, given.until, given.force)
    return _shown(study)


def _shown(study: params.Study) -> int:
    index.write(runs.outputs())
    if results := index.results(runs.outputs() / study.run):
        print(results)
    return runner.OK


def _add_params(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("params", help="print all parameters: defaults, what may stand there, meaning")
    stages = list(params.SECTIONS)
    parser.add_argument("stage", nargs="*", choices=[[], *stages], default=[], help="sections (default: all)")
    parser.set_defaults(function=_params)


def _params(given: argparse.Namespace) -> int:
    print("\n\n".join(studies.described(stage) for stage in given.stage or params.SECTIONS))
    return runner.OK


def _add_ls(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("ls", help="list the runs side by side; write outputs/index.html")
    parser.set_defaults(function=_ls)


def _ls(given: argparse.Namespace) -> int:
    print(index.listing(runs.outputs()))
    print(index.write(runs.outputs()))
    return runner.OK


def _add_clean(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "clean",
        help="show what a run keeps of earlier work; remove what is named",
        description="Show the sizes of a run: of its stages and of what has moved aside. Remove what is named.",
    )
    parser.add_argument("run", help="the run's name or folder, such as toy or outputs/toy")
    parser.add_argument("folder", nargs="*", help="what to remove, such as .previous/03_pretrain-1")
    parser.set_defaults(function=_clean)


def _clean(given: argparse.Namespace) -> int:
    run = runs.outputs() / given.run if (runs.outputs() / given.run).is_dir() else Path(given.run).resolve()
    if not (run / "run.json").is_file():
        raise runs.RunError(f"{given.run}: no run of that name in {runs.outputs()}, and no folder of a run")
    aside = {path.name: path for path in records.previous(run)}
    names = [name.rstrip("/").removeprefix(f"{records.PREVIOUS}/") for name in given.folder]
    if unknown := [name for name in names if name not in aside]:
        there = ", ".join(sorted(aside)) or "nothing"
        raise runs.RunError(f"{', '.join(unknown)}: not in {run / records.PREVIOUS}, where there is {there}")
    if not names:
        print(index.previous(run))
        return runner.OK
    with runs.holding(run / ".lock", "fedhubert clean"):
        for name in names:
            taken = index.size(aside[name])
            shutil.rmtree(aside[name])
            print(f"removed: {aside[name]} ({taken})")
    return runner.OK


def _add_deploy(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "deploy",
        help="a real federation: keys, server, clients, stages over it",
        description="A federation over Flower's SuperLink and SuperNodes; see docs/deployment.md.",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str, run: str) -> argparse.ArgumentParser:
        step = steps.add_parser(name, help=text, description=text)
        step.add_argument("run", type=Path, help=run)
        step.set_defaults(function=function)
        return step

    here = "the server's run folder, such as outputs/toy"
    prepare = add("prepare", _prepare, "write keys, certificates and configuration to RUN/federation", here)
    prepare.add_argument("--host", default="127.0.0.1", help="name or address by which clients reach the server")
    prepare.add_argument("--port", type=int, default=9092)
    server = add("server", _server, "run the SuperLink, until it is stopped", here)
    server.add_argument("--bind", metavar="ADDRESS", help="address to listen on (default: the host; 0.0.0.0: all)")
    add("register", _register, "let in the clients whose keys the running SuperLink does not know yet", here)
    client = add("client", _client, "run a client's SuperNode, until it is stopped", "the run folder with its data")
    client.add_argument("node", type=Path, help="the client's folder that prepare wrote, RUN/federation/nodes/CLIENT")
    client.add_argument("--device", type=params.device, default="cpu", help="where it computes: cpu, cuda:0 ...")
    run = add("run", _deploy_run, "run stages of a study over the clients that are connected", here)
    local = add("local", _local, "server, clients and stages on this machine, then stop them", here)
    stages = list(params.SECTIONS)[2:]
    some = f"{', '.join(stages)} (default: all of them)"
    for step in (run, local):
        step.epilog = "As fedhubert run, with engine: deployment."
        step.add_argument("study", type=Path, help="study file with the stages' parameters")
        step.add_argument("stage", nargs="*", choices=[[], *stages], default=[], metavar="STAGE", help=some)
        _add_changes(step)
    local.add_argument("--device", type=params.device, default="cpu", help="where the clients compute: cpu, cuda:0 ...")


def _prepare(given: argparse.Namespace) -> int:
    from fedhubert_lib import federated
    from fedhubert_lib.federated import deployment

    folder = given.run / deployment.FOLDER
    deployment.prepare(folder, federated.client_ids(given.run), given.host, given.port)
    print(f"{folder}: ready; give each client its folder under nodes/ and nothing else, over a safe channel")
    return runner.OK


def _server(given: argparse.Namespace) -> int:
    from fedhubert_lib.federated import deployment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the SuperLink is ended, too
    return deployment.serve(given.run / deployment.FOLDER, given.bind)


def _register(given: argparse.Namespace) -> int:
    from fedhubert_lib.federated import deployment

    added = deployment.register(given.run / deployment.FOLDER)
    print(f"let in: {', '.join(added) or 'nobody new'}")
    return runner.OK


def _client(given: argparse.Namespace) -> int:
    from fedhubert_lib.federated import deployment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deployment.attend(given.node, given.run, given.device)


def _deploy_run(given: argparse.Namespace) -> int:
    from fedhubert_lib.federated import deployment

    folder = given.run.resolve()
    os.environ["FEDHUBERT_OUTPUTS"] = str(folder.parent)
    engines = [f"{stage}.engine=deployment" for stage in ("kmeans", "pretrain", "distill")]
    study = studies.load(given.study, [*given.set, *engines], folder.name)
    deployment.check_records(folder)
    deployment.check(folder)
    for stage in given.stage or list(params.SECTIONS)[2:]:
        runner.run(study, stage, stage, given.force)
    return _shown(study)


def _local(given: argparse.Namespace) -> int:
    from fedhubert_lib.federated import deployment

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deployment.check_records(given.run)
    with deployment.local(given.run / deployment.FOLDER, given.run, given.device):
        return _deploy_run(given)


def _add_export_client(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export-client", help="copy what one client of a run owns to a folder of its own, for a machine of its own"
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as outputs/toy")
    parser.add_argument("client", help="its id, such as client-003")
    parser.add_argument("destination", type=Path, help="folder to make")
    parser.add_argument(
        "--at", type=Path, metavar="FOLDER", help="where it will lie on the client's machine, if elsewhere"
    )
    parser.set_defaults(function=_export_client)


def _export_client(given: argparse.Namespace) -> int:
    from fedhubert_lib import partition  # here: pandas takes a second to import, for which other commands need not wait

    try:
        print(partition.export_client(given.run, given.client, given.destination, given.at))
    except ValueError as error:  # a client or folder that cannot be, a table that cannot be read
        raise runs.RunError(str(error)) from error
    return runner.OK


if __name__ == "__main__":
    sys.exit(main())
