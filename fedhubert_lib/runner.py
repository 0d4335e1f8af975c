"""Run a study's notebooks headless: papermill as a library, in order, only those whose work has changed.

What papermill leaves open is closed here. Parameters are validated before a kernel starts. SIGTERM, SIGINT and SIGUSR2
become a KeyboardInterrupt in the cell that is running, which then has all the time it needs to finish its checkpoint.
Success is what ``runs.finish`` has written, never the notebook's metadata, which say "completed" after ``sys.exit(0)``
and after a kernel that was killed.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedhubert_lib import files, identity, index, params, records, runs

OK, FAILED, USAGE, DIED, INTERRUPTED = 0, 1, 2, 3, 75
"""Exit codes. 75 is EX_TEMPFAIL, "try again later": batch systems can requeue on it."""


class StageError(RuntimeError):
    """A stage that did not end well: what happened, and the exit code that says so."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Stop:
    """Turns the first signal into an interrupt of the kernel that is running, and remembers it."""

    def __init__(self) -> None:
        self.by = ""
        self.kernel: Any = None

    def __call__(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.by:
            _say(f"{name}: already stopping; the notebook is finishing its checkpoint")
            return
        self.by = name
        _say(f"{name}: stopping; the notebook finishes its checkpoint first")
        # To the kernel alone, not to its group: workers end with it, and in order. Between two cells the kernel
        # ignores this, so it is looked at there, too.
        if self.kernel is not None and self.kernel.has_kernel:
            os.kill(self.kernel.provisioner.pid, signal.SIGINT)

    def check(self, **cell: Any) -> None:
        if self.by:
            raise StageError(f"stopped by {self.by}; the same command goes on where it stopped", INTERRUPTED)


DAMAGED = "files that it made are gone or were changed: starts anew"
"""The reason to run a stage again whose data are not those that its done.json tells of."""


def run(study: params.Study, first: str = "corpus", last: str = "evaluate", force: bool = False) -> None:
    """Run the stages ``first`` to ``last`` of ``study``; ``force`` runs those, too, that have not changed.

    Raises RunError when something can be seen to be wrong before it is run, StageError when a stage does not end well.
    """
    folder = runs.outputs() / study.run
    stages = list(params.SECTIONS)
    stages = stages[stages.index(first) : stages.index(last) + 1]
    if not stages:
        raise runs.RunError(f"--from {first} comes after --until {last}: nothing to run")
    for stage in stages:
        _preflight(stage, getattr(study, stage))
    from fedhubert_lib import preflight  # here, since torch takes seconds that a misspelt parameter need not wait for

    preflight.study(study, stages, folder)
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        with runs.holding(folder / ".runner.lock", "fedhubert run"):
            _note(folder, {"study": study.study})
            for number, stage in enumerate(stages, start=1):
                _stage(stage, getattr(study, stage), folder, force, stop)
                if stage in ("corpus", "partition"):  # what is there now says more of what comes
                    preflight.study(study, stages[number:], folder)
    finally:
        if {path.name for path in folder.glob("*")} <= {".lock", ".runner.lock", "run.json"}:  # nothing was begun
            shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def reason(stage: str, p: params.Section, run: Path) -> tuple[bool, str]:
    """Whether ``stage`` has to be run, and why, or why not, in words."""
    folder, name = run / params.FOLDERS[stage], params.FOLDERS[stage]
    what = records.prospect(stage, identity.of(stage, p, run), run)
    changes = what.changes
    if what.kind == "new":
        return True, "not run yet"
    if what.kind != "keep":
        return True, records.announcement(stage, what, run)
    if identity.content(folder) != runs.read_json(folder / "done.json")["outputs"]:
        return True, DAMAGED
    if stage == "corpus" and (lost := runs.lost_audio(run)):
        return True, DAMAGED if lost.is_relative_to(
            run
        ) else f"{lost} is not there: the run was moved, its tables follow"
    if changes.code and not changes.additions:
        return False, f"{changes}: what it made is kept, skipped; --force makes it anew"
    if any(changes):
        return True, records.announcement(stage, what, run)
    if (run / f"{name}.ipynb").exists():
        return False, "unchanged, skipped"
    # The runner was killed after the stage's last call and before it had put the notebook in its place.
    killed = (run / f"{name}.unfinished.ipynb").exists()
    return True, f"{'its notebook was not saved' if killed else 'was run by hand'}: its results are kept"


def _preflight(stage: str, p: params.Section) -> None:
    runs.check_places(stage, p)
    path = identity.notebook(stage)
    tagged = sum("parameters" in cell.tags for cell in identity.read_notebook(path))
    if tagged != 1:  # without one, papermill puts the parameters above the cell that then overrides them
        raise runs.RunError(f"{path}: {tagged} cells are tagged 'parameters'; tag the one that sets them")


def _stage(stage: str, p: params.Section, run: Path, force: bool, stop: _Stop) -> None:
    """Run one stage, or say why not."""
    name, folder = params.FOLDERS[stage], run / params.FOLDERS[stage]
    stop.check()
    go, why = (True, "forced: starts anew") if force else reason(stage, p, run)
    _say(f"{name}: {why}")
    if "taken back" in why:
        go, why = _take_back(stage, p, run)
        _say(f"{name}: {why}")
    if not go:
        return
    if force or why == DAMAGED:
        records.anew(run, stage)
    began, unfinished = time.time(), run / f"{name}.unfinished.ipynb"
    try:
        with _Progress(folder):
            _execute(stage, p, unfinished, stop)
        _judge(folder, p)
    except StageError as error:
        state = {DIED: "died", INTERRUPTED: "interrupted"}.get(error.code, "failed")
        with runs.holding(run / ".lock", "fedhubert run"):
            _settle(stage, run, state, str(error), began)
        where = f"\n{name}: its cells as far as they came: {unfinished}" if unfinished.exists() else ""
        raise StageError(f"{name}: {error}{where}", error.code) from error
    with files.atomic(run / f"{name}.ipynb") as temporary:
        temporary.write_bytes(unfinished.read_bytes())
    unfinished.unlink()
    _say(f"{name}: done in {index.duration(time.time() - began)}")


def _settle(stage: str, run: Path, state: str, reason: str, began: float) -> None:
    """Record how a stage ended that did not end well, where its own kernel has not."""
    folder = run / params.FOLDERS[stage]
    done = runs.read_json(folder / "done.json")
    told = (runs.read_json(run / "run.json") or {"stages": {}})["stages"].get(stage, {})
    if done is not None and done["finished"] >= began:  # after its last call
        (folder / "done.json").unlink()
        done = None
    elif told.get("state", "running") != "running":
        return
    records.give_up(run, stage, state, reason, done)


def _execute(stage: str, p: params.Section, output: Path, stop: _Stop) -> None:
    """Execute the notebook of ``stage`` in a kernel of this very Python, into ``output``. Raises StageError."""
    # Imported here, since that takes seconds, for which a misspelt parameter and `fedhubert ls` need not wait.
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    class OwnPython(KernelSpecManager):
        """The Python that runs this, whatever kernels a person has registered under the name python3."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    class Kernel(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # ipykernel 7.3 and later warns at each start when its connection is not encrypted.
            options |= {"kernel_spec_manager": OwnPython(), "ip": "127.0.0.1", "transport_encryption": "auto"}
            super().__init__(**options)
            stop.kernel = self

    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        executed = papermill.execute_notebook(
            identity.notebook(stage),
            output,
            parameters=p.model_dump(),
            kernel_name="python3",
            cwd=identity.notebook(stage).parent,  # as in JupyterLab
            progress_bar=False,
            start_timeout=300,
            iopub_timeout=60,
            kernel_manager_class=Kernel,
            on_cell_start=stop.check,
        )
    except papermill.PapermillExecutionError as error:
        stop.check()
        raise StageError(f"failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}", FAILED) from error
    except DeadKernelError as error:
        stop.check()
        raise StageError("its kernel died; if nobody ended it, the machine ran out of memory", DIED) from error
    except StageError:
        raise
    except RuntimeError as error:  # nbclient's and jupyter_client's word for a kernel that does not answer
        stop.check()
        raise StageError(f"its kernel does not answer: {error}", DIED) from error
    except OSError as error:
        raise StageError(f"its notebook cannot be written: {error}", FAILED) from error
    if executed.metadata.papermill.exception:
        stop.check()
        raise StageError("failed: a cell left the notebook before its end with sys.exit", FAILED)


def _judge(folder: Path, p: params.Section) -> None:
    """Raise StageError unless the notebook that has just been executed did what it was asked to do."""
    done = runs.read_json(folder / "done.json")
    if done is None:
        raise StageError("failed: it ended without runs.finish, its last call", FAILED)
    if done["identity"]["parameters"] != json.loads(json.dumps(p.model_dump(exclude={"run"}))):
        raise StageError("failed: a cell between its parameters and runs.start has overridden a parameter", FAILED)


def _take_back(stage: str, p: params.Section, run: Path) -> tuple[bool, str]:
    """Put in its place what lies in ``.previous/`` and is what is asked for; then as ``reason``."""
    with runs.holding(run / ".lock", "fedhubert run"):
        source = records.prospect(stage, identity.of(stage, p, run), run).source
        records.clear(run, stage)
        records.take_back(run, stage, source)
    return reason(stage, p, run)


def _note(run: Path, facts: dict[str, Any], stage: str = "", state: dict[str, Any] | None = None) -> None:
    """Write into run.json between two kernels."""
    with runs.holding(run / ".lock", "fedhubert run"):
        records.record(run, facts, stage, state)


class _Progress:
    """While a stage runs, prints what its metrics.jsonl say: round, loss, audio seconds per second, time left."""

    def __init__(self, folder: Path, every: float = 2.0, silence: float = 60.0) -> None:
        self.folder, self.every, self.silence = folder, every, silence
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.started = time.time()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        streams = {name: _Stream(self.folder / name, self.started) for name in ("", "centralised")}
        said = time.monotonic()
        while not self.over.wait(self.every):
            for name, stream in streams.items():
                line = stream.line()
                if line:
                    _say(f"{self.folder.name}: {name} {line}".replace("  ", " "))
                    said = time.monotonic()
            if time.monotonic() - said > self.silence:
                _say(f"{self.folder.name}: {index.duration(time.time() - self.started)} so far")
                said = time.monotonic()


class _Stream:
    """The rows of one metrics.jsonl as they come."""

    def __init__(self, folder: Path, since: float) -> None:
        self.path, self.since = folder / "metrics.jsonl", since
        self.offset, self.rounds = 0, 0
        self.seconds: list[float] = []

    def line(self) -> str:
        """What the rounds since the last call came to; empty if there were none."""
        last = None
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < self.offset:  # the stage has started anew
            self.offset, self.rounds, self.seconds = 0, 0, []
        if size == self.offset:
            return ""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break  # still being written
                self.offset += len(raw)
                row = json.loads(raw)
                if row["kind"] == "plan":
                    self.rounds = row["rounds"]
                elif row["kind"] in ("round", "lloyd") and row["time"] >= self.since:  # not those from before a restart
                    last = row
                    self.seconds.append(row.get("seconds", 0.0))
        return "" if last is None else self._words(last)

    def _words(self, row: dict[str, Any]) -> str:
        words = [f"round {row['round']}" + (f"/{self.rounds}" if self.rounds else "")]
        names = {"loss": "loss", "accuracy_masked": "masked accuracy", "inertia": "inertia"}
        words += [f"{word} {row[key]:.4g}" for key, word in names.items() if row.get(key) is not None]
        if row.get("audio_seconds_per_second"):
            words.append(f"{row['audio_seconds_per_second']:.4g} audio s/s")
        if self.rounds > row["round"]:
            left = (self.rounds - row["round"]) * sum(self.seconds) / len(self.seconds)
            words.append(f"{index.duration(left)} left")
        return ", ".join(words)


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads it any more, which is no reason to stop a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
