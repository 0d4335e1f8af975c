"""Runs a study's notebooks headless: papermill as a library, in order, only those whose work has changed.

Papermill alone does not do the following. Parameters are validated before a kernel starts. SIGTERM, SIGINT and SIGUSR2
become a KeyboardInterrupt in the running cell, which then has all the time it needs to finish its checkpoint. Success
is the marker of ``runs.finish``, never the notebook's metadata, which say "completed" after ``sys.exit(0)`` and after a
kernel that was killed.
"""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedhubert_lib import files, identity, params, runs

OK, FAILED, USAGE, DIED, INTERRUPTED = 0, 1, 2, 3, 75
"""Exit codes. 75 is EX_TEMPFAIL, "try again later": batch systems can requeue on it."""
DAMAGED = "files that it made are missing or were changed: starts anew"


class StageError(RuntimeError):
    """A stage that did not end well: the reason, and the exit code for it."""

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
            _print(f"{name}: already stopping; the notebook is finishing its checkpoint")
            return
        self.by = name
        _print(f"{name}: stopping; the notebook finishes its checkpoint first")
        # To the kernel alone, not to its group: its workers end with it, and in order. Between two cells the kernel
        # ignores this; ``check`` is called there.
        if self.kernel is not None and self.kernel.has_kernel:
            os.kill(self.kernel.provisioner.pid, signal.SIGINT)

    def check(self, **cell: Any) -> None:
        if self.by:
            raise StageError(f"stopped by {self.by}; the same command resumes", INTERRUPTED)


def run(study: params.Study, first: str = "corpus", last: str = "evaluate", force: bool = False) -> None:
    """Run the stages ``first`` to ``last`` of ``study``; ``force`` runs those, too, that have not changed.

    Raises RunError when something is wrong that can be known before, StageError when a stage does not end well.
    """
    folder = runs.outputs() / study.run
    stages = list(params.SECTIONS)
    stages = stages[stages.index(first) : stages.index(last) + 1]
    if not stages:
        raise runs.RunError(f"--from {first} comes after --until {last}: nothing to run")
    for stage in stages:
        path = identity.notebook(stage)
        tagged = sum("parameters" in cell.tags for cell in identity.read_notebook(path))
        if tagged != 1:  # without one, papermill puts the parameters above the cell that then overrides them
            raise runs.RunError(f"{path}: {tagged} cells are tagged 'parameters'; tag the one that sets them")
    from fedhubert_lib import preflight  # here: torch takes seconds that a misspelt parameter need not wait for

    preflight.study(study, stages, folder)
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        with runs.holding(folder / ".runner.lock", "fedhubert run"):
            with _lock(folder):
                runs.record(folder, {"study": study.study})
            for number, stage in enumerate(stages, start=1):
                _stage(stage, getattr(study, stage), folder, force, stop)
                if stage in ("corpus", "partition"):  # now more is known about the stages to come
                    preflight.study(study, stages[number:], folder)
    finally:
        if {path.name for path in folder.glob("*")} <= {".lock", ".runner.lock", "run.json"}:  # nothing was begun
            shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def reason(stage: str, p: params.Section, run: Path) -> tuple[bool, str]:
    """Whether ``stage`` has to be run, and why, or why not, in words."""
    name = params.FOLDERS[stage]
    future = runs.prospect(stage, identity.of(stage, p, run), run)
    changes, words = future.changes, runs.announcement(stage, future, run)
    if future.kind != "keep":
        return True, words or "not run yet"
    if identity.outputs(run / name) != runs.read_json(run / name / "done.json")["outputs"]:
        return True, DAMAGED
    if stage == "corpus" and (lost := runs.lost_audio(run)):
        moved = f"{lost}: no such file: the run was moved; its tables are written again"
        return True, DAMAGED if lost.is_relative_to(run) else moved
    if changes.code and not changes.additions:
        return False, f"{changes}: its results are kept, skipped; --force makes them anew"
    if any(changes):
        return True, words
    if (run / f"{name}.ipynb").exists():
        return False, "unchanged, skipped"
    # The runner was killed after the stage's last call and before it had put the notebook in its place.
    killed = (run / f"{name}.unfinished.ipynb").exists()
    return True, f"{'its notebook was not saved' if killed else 'was run by hand'}: its results are kept"


def _stage(stage: str, p: params.Section, run: Path, force: bool, stop: _Stop) -> None:
    """Run one stage, or print why not."""
    name, folder = params.FOLDERS[stage], run / params.FOLDERS[stage]
    stop.check()
    needed, why = (True, "forced: starts anew") if force else reason(stage, p, run)
    _print(f"{name}: {why}")
    if not force and (source := runs.prospect(stage, identity.of(stage, p, run), run).source):
        with _lock(run):
            runs.take_back(run, stage, source)
        needed, why = reason(stage, p, run)
        _print(f"{name}: {why}")
    if not needed:
        return
    if force or why == DAMAGED:
        runs.forced(run, stage).touch()
    began, unfinished = time.time(), run / f"{name}.unfinished.ipynb"
    try:
        with _Progress(folder):
            _execute(stage, p, unfinished, stop)
        done = runs.read_json(folder / "done.json")
        if done is None:
            raise StageError("failed: it ended without runs.finish, its last call", FAILED)
        if done["identity"]["parameters"] != json.loads(json.dumps(p.model_dump(exclude={"run"}))):
            raise StageError("failed: a cell between its parameters and runs.start has overridden a parameter", FAILED)
    except StageError as error:
        with _lock(run):
            _record_failure(stage, run, error, began)
        where = f"\n{name}: its cells so far: {unfinished}" if unfinished.exists() else ""
        raise StageError(f"{name}: {error}{where}", error.code) from error
    with files.atomic(run / f"{name}.ipynb") as temporary:
        temporary.write_bytes(unfinished.read_bytes())
    unfinished.unlink()
    if stage == "evaluate":
        save_page(run / f"{name}.ipynb")
    _print(f"{name}: done in {timedelta(seconds=round(time.time() - began))}")


def _record_failure(stage: str, run: Path, error: StageError, began: float) -> None:
    """Record how a stage ended that did not end well, unless its kernel has."""
    done = runs.read_json(run / params.FOLDERS[stage] / "done.json")
    if late := done is not None and done["finished"] >= began:  # after its last call
        (run / params.FOLDERS[stage] / "done.json").unlink()
    stages = (runs.read_json(run / "run.json") or {"stages": {}})["stages"]
    if late or stages.get(stage, {}).get("state", "running") == "running":
        state = {DIED: "died", INTERRUPTED: "interrupted"}.get(error.code, "failed")
        runs.give_up(run, stage, state, str(error))


def _execute(stage: str, p: params.Section, output: Path, stop: _Stop) -> None:
    """Execute the notebook of ``stage`` in a kernel of this very Python, into ``output``. Raises StageError."""
    # Imported here: it takes seconds, for which a misspelt parameter and `fedhubert ls` need not wait.
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    class ThisPython(KernelSpecManager):
        """The Python that runs this, whatever kernels a person has registered under the name python3."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    class Kernel(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # ipykernel 7.3 and later warns at each start when its connection is not encrypted.
            options |= {"kernel_spec_manager": ThisPython(), "ip": "127.0.0.1", "transport_encryption": "auto"}
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
        failure = StageError("failed: a cell left the notebook before its end with sys.exit", FAILED)
        failure = failure if executed.metadata.papermill.exception else None
    except StageError:
        raise
    except papermill.PapermillExecutionError as error:
        failure = StageError(f"failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}", FAILED)
    except DeadKernelError:
        failure = StageError("its kernel died; if nobody ended it, the machine ran out of memory", DIED)
    except RuntimeError as error:  # nbclient's and jupyter_client's for a kernel that does not answer
        failure = StageError(f"its kernel does not answer: {error}", DIED)
    except OSError as error:
        raise StageError(f"its notebook cannot be written: {error}", FAILED) from error
    if failure is not None:
        stop.check()
        raise failure


def save_page(notebook: Path) -> Path:
    """Write an executed notebook as one HTML page beside it, without scripts: it opens offline and fetches nothing."""
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    page = notebook.with_suffix(".html")
    with files.atomic(page) as temporary:
        temporary.write_text(re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL), encoding="utf-8")
    return page


def _lock(run: Path) -> Any:
    """The lock of a run, between two kernels."""
    return runs.holding(run / ".lock", "fedhubert run")


class _Progress:
    """While a stage runs, prints the rounds in its metrics.jsonl: loss, audio seconds per second, time left."""

    def __init__(self, folder: Path, every: float = 2.0, silence: float = 60.0) -> None:
        self.folder, self.every, self.silence = folder, every, silence
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        started = printed = time.time()
        streams = [_rounds(self.folder / part, started) for part in ("", "centralised")]
        while not self.over.wait(self.every):
            lines = [line for stream in streams if (line := next(stream))]
            if not lines and time.time() - printed > self.silence:
                lines = [f"running for {timedelta(seconds=round(time.time() - started))}"]
            for line in lines:
                _print(f"{self.folder.name}: {line}")
                printed = time.time()


def _rounds(folder: Path, since: float) -> Iterator[str]:
    """In words, the last of the rounds that metrics.jsonl has gained between two calls of ``next``; empty: none."""
    path, offset, rounds, seconds = folder / "metrics.jsonl", 0, 0, []
    part = "centralised " if folder.name == "centralised" else ""
    while True:
        last = None
        if path.is_file():
            if path.stat().st_size < offset:  # the stage has started anew
                offset, rounds, seconds = 0, 0, []
            with path.open("rb") as file:
                file.seek(offset)
                lines = [line for line in file if line.endswith(b"\n")]  # not one that is still being written
            offset += sum(map(len, lines))
            for row in map(json.loads, lines):
                if row["kind"] == "plan":
                    rounds = row["rounds"]
                elif row["kind"] in ("round", "lloyd") and row["time"] >= since:  # not those from before a restart
                    last = row
                    seconds.append(row.get("seconds", 0.0))
        if last is None:
            yield ""
            continue
        words = [f"{part}round {last['round']}" + (f"/{rounds}" if rounds else "")]
        names = {"loss": "loss", "accuracy_masked": "masked accuracy", "inertia": "inertia"}
        words += [f"{word} {last[key]:.4g}" for key, word in names.items() if last.get(key) is not None]
        if last.get("audio_seconds_per_second"):
            words.append(f"{last['audio_seconds_per_second']:.4g} audio s/s")
        if rounds > last["round"]:
            left = (rounds - last["round"]) * sum(seconds) / len(seconds)
            words.append(f"{timedelta(seconds=round(left))} left")
        yield ", ".join(words)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads it any more, which is no reason to stop a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
