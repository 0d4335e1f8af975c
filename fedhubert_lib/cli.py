"""The ``fedhubert`` command."""

import argparse
import contextlib
import functools
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedhubert_lib import export, files, params, progress, runner, runs, studies

_RUN = f"""\
A stage is skipped when it is done and its notebook, parameters and inputs have not changed; the reason is printed.
Where library source or versions alone changed, its results are kept. Where parameters or inputs changed, it starts
anew, and its results move to RUN/.previous (see fedhubert clean), from where they are taken back when asked for again.
SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR2 let the notebook finish its checkpoint; the same command resumes, without
--force.

exit codes:
  {runner.OK}   every stage is done
  {runner.FAILED}   a stage failed: an error in a cell, sys.exit in a cell, a disk that is full
  {runner.USAGE}   a stage cannot run: wrong parameters, a path that does not exist, a run that is in use
  {runner.DIED}   the kernel of a stage died: killed, or out of memory
  {runner.INTERRUPTED}  stopped by a signal; the same command resumes
"""
STAGES = list(params.SECTIONS)
DEPLOYED = STAGES[2:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores the first
            signal.signal(number, signal.default_int_handler)  # what was started ends, too
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the locale cannot print is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        code = options.function(options)
        sys.stdout.flush()
        return code or runner.OK
    except (runner.StageError, studies.ParameterError, runs.RunError) as error:
        progress.say(f"fedhubert: {error}", sys.stderr)
        return error.code if isinstance(error, runner.StageError) else runner.USAGE
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough: print to nowhere from now on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            error = files.explained(error.errno, error.filename)
        progress.say(f"fedhubert: {error}", sys.stderr)
        return runner.FAILED
    except KeyboardInterrupt:
        return runner.INTERRUPTED


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What the block refuses of its inputs, with a ValueError, ends the command with that sentence."""
    try:
        yield
    except ValueError as error:
        raise runner.StageError(str(error), runner.FAILED) from error


def _run(options: argparse.Namespace) -> None:
    stages = STAGES[STAGES.index(options.first) : STAGES.index(options.until) + 1]
    if not stages:
        raise runs.RunError(f"--from {options.first} comes after --until {options.until}: nothing to run")
    study = studies.load(options.study, options.set, options.run)
    if options.seeds:
        _run_seeds(options, study.run, stages)
    else:
        _run_stages(study, stages, options.force, [runs.named(options.like)] if options.like else [])


def _run_seeds(options: argparse.Namespace, name: str, stages: Sequence[str]) -> None:
    """Run ``name``-SEED for each training seed; all but the first take over what their seeds do not change."""
    from fedhubert_lib import compare
    from fedhubert_lib.evaluation import training_seeds

    others = compare.groups([options.like]).popitem()[1] if options.like else []
    folders: list[Path] = []
    seeds = {seed: [*options.set, f"pretrain.seed={seed}", f"distill.seed={seed}"] for seed in options.seeds}
    loaded = [(seed, studies.load(options.study, changes, f"{name}-{seed}")) for seed, changes in seeds.items()]
    begun = [runs.outputs() / study.run for _, study in loaded if (runs.outputs() / study.run).is_dir()]
    with runner.forcing([runs.forced(run, stage) for run in begun for stage in stages] if options.force else []):
        for seed, study in loaded:
            like = [other for other in others if other.name.endswith(f"-{seed}")] or others[:1]
            progress.say(f"{study.run}:")
            runner.run(study, stages, options.force, [*like, *folders[:1]])
            folders.append(runs.outputs() / study.run)
    if "evaluate" in stages:
        print(training_seeds.markdown(training_seeds.reports(folders)))


def _run_stages(study: studies.Study, stages: Sequence[str], force: bool, like: Sequence[Path] = ()) -> None:
    from fedhubert_lib import index  # here: pandas takes a second to import, which a wrong parameter need not wait for

    runner.run(study, stages, force, like)
    if results := index.results(runs.outputs() / study.run):
        print(results)


def _params(options: argparse.Namespace) -> None:
    print("\n\n".join(studies.described(stage) for stage in options.stage or STAGES))


def _ls(options: argparse.Namespace) -> None:
    from fedhubert_lib import index

    print(index.listing(runs.outputs()))


def _clean(options: argparse.Namespace) -> None:
    from fedhubert_lib import index

    run = runs.named(options.run)
    aside = {path.name: path for path in runs.previous(run)}
    names = [name.rstrip("/").removeprefix(f"{runs.PREVIOUS}/") for name in options.folder]
    if unknown := [name for name in names if name not in aside]:
        kept = ", ".join(sorted(aside)) or "nothing"
        raise runs.RunError(f"{', '.join(unknown)}: not in {run / runs.PREVIOUS}, which holds {kept}")
    if not names:
        print(index.previous(run))
        return
    with runs.holding(run / ".lock", "fedhubert clean"):
        for name in dict.fromkeys(names):
            size = index.size(aside[name])
            shutil.rmtree(aside[name])
            print(f"removed: {aside[name]} ({size})")


def _export_client(options: argparse.Namespace) -> None:
    from fedhubert_lib import partition

    with _refusing():
        print(partition.export_client(runs.named(options.run), options.client, options.destination, options.at))


def _table(options: argparse.Namespace) -> None:
    from fedhubert_lib.evaluation import training_seeds

    print(training_seeds.markdown(training_seeds.reports([*map(runs.named, options.runs)])))


def _along(options: argparse.Namespace) -> None:
    from fedhubert_lib.evaluation import training_seeds

    training_seeds.draw_along([*map(runs.named, options.runs)], options.to)
    print(options.to)


def _reference(options: argparse.Namespace) -> None:
    from fedhubert_lib import reference

    with _refusing():
        reference.write(reference.make([*map(runs.named, options.runs)]), options.to)
    print(options.to)


def _compare(options: argparse.Namespace) -> None:
    from fedhubert_lib import compare

    groups = compare.groups(options.runs)
    name = "-".join(["compare", *(Path(group).name for group in groups)])
    with _refusing():
        print(compare.write(groups, options.to or runs.outputs() / name))


def _export(options: argparse.Namespace) -> None:
    with _refusing():
        facts = export.write(options.format, options.checkpoint, options.out)
    print(f"{options.out}: " + ", ".join(f"{name} {value:.6g}" for name, value in facts.items()))


def _units(options: argparse.Namespace) -> None:
    from fedhubert_lib.export import unit_text

    names = ("codebook", "layer", "clusters", "seed", "deduplicate", "device")
    chosen = {name: getattr(options, name) for name in names}
    with _refusing():
        facts = unit_text.write(options.checkpoint, options.folder, options.to, **chosen)
    print(f"{options.to}: " + ", ".join(f"{name} {value:.6g}" for name, value in facts.items()))


def _s3prl(options: argparse.Namespace) -> None:
    from fedhubert_lib.export import s3prl

    chosen = {name: getattr(options, name) for name in ("seeds", "fine_tune", "steps", "rate", "device")}
    run = runs.named(options.run)
    with _refusing(), runs.holding(run / ".lock", "fedhubert s3prl"):
        results = s3prl.of_run(run, options.system, **chosen)
    for result in results:
        print(f"seed {result['seed']}: dev {result['dev']:.4f}, test {result['test']:.4f}")


def _deploy(options: argparse.Namespace) -> int | None:
    """A step of a real federation."""
    from fedhubert_lib import federated
    from fedhubert_lib.federated import deployment

    named = runs.outputs() / options.run
    run = named if named.is_dir() and not options.run.is_dir() else options.run
    folder = run / deployment.FOLDER
    if options.step == "prepare":
        with _refusing():
            deployment.prepare(folder, federated.client_ids(run), options.host, options.port)
        print(f"{folder}: ready; give each client its folder under nodes/ and nothing else, over a safe channel")
    elif options.step == "server":
        return deployment.serve(folder, options.bind)
    elif options.step == "register":
        for client in options.clients:
            with _refusing():
                deployment.add_client(folder, client)
        print(f"registered: {', '.join(deployment.register(folder)) or 'no new client'}")
    elif options.step == "client":
        with _refusing():
            deployment.attend(options.node, run, options.device)
    else:
        deployment.check_records(run)
        run = run.resolve()
        os.environ["FEDHUBERT_OUTPUTS"] = str(run.parent)
        engines = [f"{stage}.engine=deployment" for stage in DEPLOYED[:-1]]
        study = studies.load(options.study, [*options.set, *engines], run.name)
        with deployment.local(folder, run, options.device) if options.step == "local" else contextlib.nullcontext():
            deployment.check(run)
            _run_stages(study, options.stage or DEPLOYED, options.force)
    return None


def parser() -> argparse.ArgumentParser:
    """The command's arguments; ``function`` of a parsed command does its work."""
    whole = argparse.ArgumentParser(prog="fedhubert", description="Federated HuBERT pretraining and distillation.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = functools.partial(_add, commands)
    argument = add("run", _run, "run a study's notebooks in order into outputs/RUN, those that changed", _RUN)
    _add_study(argument)
    argument("--run", metavar="NAME", help="folder under outputs/ (default: the study's name)")
    argument("--like", metavar="RUN", help="take the stages of this run that do not differ, as hard links")
    seeds = "training seeds: runs NAME-0, NAME-1 ..., which share what does not differ, and their table"
    argument("--seeds", type=int, nargs="+", default=[], metavar="N", help=seeds)
    argument("--from", dest="first", choices=STAGES, default="corpus", metavar="STAGE", help="first stage")
    argument("--until", choices=STAGES, default="evaluate", metavar="STAGE", help="last stage")

    add("ls", _ls, "list the runs side by side")

    about = "show the sizes of a run's stages and of earlier work that it keeps; remove what is named"
    argument = add("clean", _clean, about)
    argument("run", help="the run's name or folder, such as toy or outputs/toy")
    argument("folder", nargs="*", help="earlier work to remove, such as .previous/03_pretrain-1")

    argument = add("params", _params, "print all parameters: default, allowed values, meaning")
    argument("stage", nargs="*", choices=[[], *STAGES], metavar="STAGE", help="sections (default: all)")

    argument = add("export-client", _export_client, "copy the data of one client to a folder, for its machine")
    argument("run", help="the run's name or folder, such as toy or outputs/toy")
    argument("client", help="its id, such as client-003")
    argument("destination", type=Path, help="folder to make")
    argument("--at", type=Path, metavar="FOLDER", help="its path on the client's machine, if another")

    about = "a real federation over Flower's SuperLink and SuperNodes: see docs/deployment.md"
    steps = commands.add_parser("deploy", help=about, description=about)
    _add_steps(steps.add_subparsers(dest="step", required=True, metavar="STEP"))
    _add_evaluation(add)
    return whole


def _add(commands: Any, name: str, function: Callable, about: str, epilog: str = "") -> Callable:
    """Add the command ``name``, which is done by ``function``; returns what adds an argument to it."""
    form = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=form)
    command.set_defaults(function=function)
    return command.add_argument


def _add_evaluation(add: Callable) -> None:
    runs = {"nargs": "+", "metavar": "RUN", "help": "name or folder of an evaluated run; several: other seeds"}
    argument = add("table", _table, "the headline table of a run, or of training seeds with intervals, in Markdown")
    argument("runs", **runs)

    argument = add("along", _along, "draw quality over hours of speech heard, of runs with evaluate.along, as a PNG")
    argument("runs", **runs)
    argument("--to", type=Path, default=Path("along.png"), metavar="FILE", help="(default: along.png)")

    argument = add("reference", _reference, "make reference curves, mean and band, of runs with other training seeds")
    argument("runs", **runs)
    about = "such as params/reference/STUDY.json, where notebooks look for one"
    argument("--to", type=Path, required=True, metavar="FILE", help=about)

    about = "runs beside each other: parameters that differ, curves, figures with intervals; as text and as a page"
    argument = add("compare", _compare, about)
    seeds = "name or folder of a run; a name whose runs NAME-0, NAME-1 ... are those of --seeds stands for their mean"
    argument("runs", nargs="+", metavar="RUN", help=seeds)
    argument("--to", type=Path, metavar="FOLDER", help="folder to write (default: outputs/compare-RUN-RUN...)")

    formats = "\n".join(f"  {name:13} {text}" for name, text in export.FORMATS.items())
    argument = add("export", _export, "write a checkpoint for other software, and compare it with the source", formats)
    argument("format", choices=list(export.FORMATS), metavar="FORMAT", help="one of those below")
    argument("checkpoint", type=Path, help="such as outputs/RUN/04_distill/checkpoint")
    argument("out", type=Path, help="folder or file to write")

    about = "write recordings as text: a line NAME|12 12 7 ... of each, the clusters of a hidden layer, 50 a second"
    argument = add("units", _units, about)
    argument("checkpoint", type=Path, help="such as outputs/RUN/03_pretrain/checkpoint")
    argument("folder", type=Path, help="its .wav and .flac files, in subfolders too, are 16 kHz mono speech")
    argument("--to", type=Path, default=Path("units.txt"), metavar="FILE", help="(default: units.txt)")
    argument(
        "--codebook", type=Path, metavar="FILE", help="of an earlier call (default: fitted on the folder, and kept)"
    )
    argument("--layer", type=int, help="1 is the first (default: the middle one)")
    argument("--clusters", type=int, help="to fit (default: 100)")
    argument("--seed", type=int, help="of the recordings that are fitted on, and of k-means (default: 0)")
    argument("--deduplicate", action="store_true", help="one unit for each run of the same")
    argument("--device", default="cpu", help="cpu, cuda, auto")

    about = "train and evaluate s3prl's speech_commands on a model of a run, and add its accuracy to the report"
    argument = add("s3prl", _s3prl, about, "Needs s3prl's environment: make s3prl.")
    argument("run", help="name or folder of an evaluated run, such as outputs/quickstart")
    argument("--system", default="teacher", help="teacher (default), student, random: as report.json says")
    argument("--fine-tune", action="store_true", help="train the whole model on its last layer")
    argument("--steps", type=int, default=200_000, help="optimiser steps (default: 200000, as SUPERB)")
    argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4, as SUPERB)")
    argument("--seeds", type=int, default=1, help="runs, each with its own seed (default: 1)")
    argument("--device", choices=["cpu", "cuda"], default="cpu", help="where s3prl computes")


def _add_steps(steps: Any) -> None:
    def add(step: str, about: str) -> Callable:
        argument = _add(steps, step, _deploy, about)
        argument("run", type=Path, help="the run's folder or name, such as outputs/toy: the server's, or the client's")
        return argument

    argument = add("prepare", "write keys, certificates and configuration to RUN/federation")
    argument("--host", default="127.0.0.1", help="name or address by which clients reach the server")
    argument("--port", type=int, default=9092)
    argument = add("server", "run the SuperLink, until it is stopped")
    argument("--bind", metavar="ADDRESS", help="address to listen on (default: the host; 0.0.0.0: all)")
    argument = add("register", "make keys for new clients, and let in those whom the running SuperLink does not know")
    argument("clients", nargs="*", metavar="CLIENT", help="new clients, who get a folder under RUN/federation")
    attend = add("client", "run a client's SuperNode, until it is stopped")
    attend("node", type=Path, help="the client's folder RUN/federation/nodes/CLIENT")
    run = add("run", "run stages of a study over the connected clients")
    local = add("local", "server, clients and stages on this machine, then stop them")
    for argument in run, local:
        _add_study(argument)
        some = f"of {', '.join(DEPLOYED)} (default: all)"
        argument("stage", nargs="*", choices=[[], *DEPLOYED], metavar="STAGE", help=some)
    for argument in attend, local:
        argument("--device", default="cpu", help="where clients compute: cpu, cuda:0 ...")


def _add_study(argument: Callable) -> None:
    argument("study", type=Path, help="study file, such as params/quickstart.yaml")
    argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="override a value; repeatable")
    argument("--force", action="store_true", help="run the stages anew even if nothing has changed")


if __name__ == "__main__":
    sys.exit(main())
