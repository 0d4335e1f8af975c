"""Runs a study's notebooks headless: papermill as a library, in order, only those whose work has changed.

Papermill alone does not do the following. Parameters are validated before a kernel starts. SIGTERM, SIGINT, SIGHUP and
SIGUSR2 become a KeyboardInterrupt in the running cell, which then has all the time it needs to finish its checkpoint.
Success is the marker of ``runs.finish``, never the notebook's metadata, which say "completed" after ``sys.exit(0)`` and
after a kernel that was killed.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedhubert_lib import files, identity, params, progress, runs, sharing, studies

OK, FAILED, USAGE, DIED, INTERRUPTED = 0, 1, 2, 3, 75
"""Exit codes. 75 is EX_TEMPFAIL, "try again later": batch systems can requeue on it."""

UNCHANGED = "unchanged, skipped"
TAIL = 2**20
"""Bytes at the end of a metrics.jsonl that the runner looks at: the rows of a cohort of 2,000 clients."""


class StageError(Exception):
    """A stage that did not end well: the reason, and the exit code for it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Stop:
    """Turns the first signal into an interrupt of the kernel that is running, and remembers it."""

    def __init__(self, force: bool) -> None:
        self.by, self.again = "", "the same command without --force resumes" if force else "the same command resumes"
        self.kernel: Any = None

    def __call__(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.by:
            progress.say(f"{name}: already stopping; the notebook is finishing its checkpoint")
            return
        self.by = name
        # To the kernel alone, not to its group: its workers end with it, and in order. Between two cells the kernel
        # ignores this; ``check`` is called there.
        if self.kernel is not None and self.kernel.has_kernel:
            os.kill(self.kernel.provisioner.pid, signal.SIGINT)
        progress.say(f"{name}: stopping; the notebook finishes its checkpoint first")

    def check(self, **cell: Any) -> None:
        if self.by:
            raise StageError(f"stopped by {self.by}; {self.again}", INTERRUPTED)


def run(study: studies.Study, stages: Sequence[str], force: bool = False, like: Sequence[Path] = ()) -> None:
    """Run ``stages`` of ``study``, in this order; ``force`` runs those, too, that have not changed.

    A stage that has to start anew is taken from the first of the runs ``like`` that has done the same work.

    Raises RunError when something is wrong that can be known before, StageError when a stage does not end well.
    """
    folder = runs.outputs() / study.run
    for path in map(identity.notebook, stages):
        tagged = sum("parameters" in cell.tags for cell in identity.cells(path))
        if tagged != 1:  # without one, papermill puts the parameters above the cell that then overrides them
            raise runs.RunError(f"{path}: {tagged} cells are tagged 'parameters'; tag the one that sets them")
    from fedhubert_lib import preflight  # here: torch takes seconds that a misspelt parameter need not wait for

    preflight.study(study, stages, folder)
    done = runs.read_json(folder / params.FOLDERS["corpus"] / "done.json") if "corpus" not in stages else None
    if done and "deployment" not in (study.kmeans.engine, study.pretrain.engine):  # whose server has a part, if any
        with contextlib.suppress(OSError):  # a place that this user may not read
            for name, state in identity.listings(study.corpus).items():
                if state not in (done["identity"]["inputs"].get(name, state), identity.NOTHING):
                    progress.say(f"corpus.{name}: not the files that 00_corpus read; without --from it reads them anew")
    stop, marks = _Stop(force), [runs.forced(folder, stage) for stage in stages] if force else []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
    before = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}  # of nohup
    try:
        with runs.holding(folder / ".runner.lock", "fedhubert run"):
            try:
                with _lock(folder):
                    runs.record(folder, study=study.study)
                with forcing(marks):
                    for number, stage in enumerate(stages, start=1):
                        _stage(stage, getattr(study, stage), folder, like, stop)
                        if stage in ("corpus", "partition"):  # now more is known about the stages to come
                            preflight.study(study, stages[number:], folder)
            finally:  # inside the lock: refused, it is another runner that has begun nothing yet
                if {p.name for p in folder.glob("*") if p not in marks} <= {".lock", ".runner.lock", "run.json"}:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def forcing(marks: Sequence[Path]) -> Iterator[None]:
    """Mark stages (``runs.forced``) to start anew. A failure inside the block takes it back, a signal does not."""
    for mark in marks:
        mark.touch()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and getattr(error, "code", FAILED) != INTERRUPTED:
            for mark in marks:
                mark.unlink(missing_ok=True)
        raise


def needed(future: runs.Outlook, executed: Path) -> tuple[bool, str]:
    """Whether a stage with this outlook and ``executed`` notebook has to be run, and why, or why not, in words."""
    if future.kind != "done":
        return True, future.words or "not run yet"
    if future.changes.code and not future.changes.additions:
        return False, f"{future.words}, skipped; --force makes them anew"
    if any(future.changes):
        return True, future.words
    if executed.exists():
        return False, UNCHANGED
    return True, "its notebook was not saved, or was run by hand: its results are kept"


def _stage(stage: str, p: params.Section, run: Path, like: Sequence[Path], stop: _Stop) -> None:
    """Run one stage, or print why not."""
    name, folder = params.FOLDERS[stage], run / params.FOLDERS[stage]
    executed, unfinished = run / f"{name}.ipynb", run / f"{name}.unfinished.ipynb"
    stop.check()
    future, forced = runs.outlook(stage, p, run), runs.forced(run, stage).exists()
    if taken := future.kind == "anew" and future.changes.results != "forced":
        with _lock(run):
            taken = sharing.take(stage, p, run, like, future.identity)
        future = runs.outlook(stage, p, run) if taken else future
    if future.source is not None:
        progress.say(f"{name}: {future.words}")
        with _lock(run):
            runs.take_back(run, stage, future.source)
        future = runs.outlook(stage, p, run)
    work, why = needed(future, executed)
    if not (taken and why == UNCHANGED):
        progress.say(f"{name}: {why}")
    if not work:
        return
    began, before = time.time(), runs.read_json(folder / "done.json")
    started = (runs.read_json(folder / "begun.json") or {}).get("started")
    try:
        with _progress(folder):
            _execute(stage, p, unfinished, stop)
        done = runs.read_json(folder / "done.json")
        if done is None:
            raise StageError("failed: it ended without runs.finish, its last call", FAILED)
        if done["identity"]["parameters"] != future.identity["parameters"]:
            raise StageError("failed: a cell between its parameters and runs.start has overridden a parameter", FAILED)
    except StageError as error:
        with _lock(run):
            _record_failure(stage, run, error, before)
            begun = runs.read_json(folder / "begun.json") or {}
            if forced and error.code == INTERRUPTED and begun.get("started") == started:
                runs.forced(run, stage).touch()  # what was to be replaced is back
        where = f"\n{name}: its cells so far: {unfinished}" if unfinished.exists() else ""
        raise StageError(f"{name}: {error}{where}", error.code) from error
    unfinished.replace(executed)
    if stage == "evaluate":
        save_page(executed)
    progress.say(f"{name}: done in {timedelta(seconds=round(time.time() - began))}")


def _record_failure(stage: str, run: Path, error: StageError, before: dict[str, Any] | None) -> None:
    """Record how a stage ended that did not end well, unless its kernel has; ``before`` was its done.json."""
    done = run / params.FOLDERS[stage] / "done.json"
    if late := runs.read_json(done) not in (None, before):  # after its last call
        done.unlink()
    if late or runs.state(run, stage).get("state") == "running":
        state = {DIED: "died", INTERRUPTED: "interrupted"}.get(error.code, "failed")
        runs.give_up(run, stage, state, str(error))


def _execute(stage: str, p: params.Section, output: Path, stop: _Stop) -> None:
    """Execute the notebook of ``stage`` in a kernel of this very Python, into ``output``. Raises StageError."""
    # Imported here: it takes seconds, for which a misspelt parameter and `fedhubert ls` need not wait.
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    class Kernel(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # This Python, whatever kernels a person has registered as python3. ipykernel 7.3 and later warns at each
            # start when its connection is not encrypted.
            options |= {"kernel_spec_manager": KernelSpecManager(kernel_dirs=[]), "transport_encryption": "auto"}
            super().__init__(ip="127.0.0.1", **options)
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
        if not executed.metadata.papermill.exception:
            return
        failure = StageError("failed: a cell left the notebook before its end with sys.exit", FAILED)
    except papermill.PapermillExecutionError as error:
        failure = StageError(f"failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}", FAILED)
    except DeadKernelError:
        failure = StageError("its kernel died; if nobody ended it, the machine ran out of memory", DIED)
    except RuntimeError as error:  # nbclient's and jupyter_client's for a kernel that does not answer
        failure = StageError(f"its kernel does not answer: {error}", DIED)
    except OSError as error:
        failure = StageError(f"its notebook cannot be written: {error}", FAILED)
    stop.check()
    raise failure


def save_page(notebook: Path) -> Path:
    """Write an executed notebook as one HTML page beside it, without scripts: it opens offline and fetches nothing."""
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    page = notebook.with_suffix(".html")
    files.write_text(page, re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    return page


def _lock(run: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of a run, between two kernels."""
    return runs.holding(run / ".lock", "fedhubert run")


@contextlib.contextmanager
def _progress(folder: Path, every: float = 2.0, silence: float = 60.0) -> Iterator[None]:
    """Inside the block, print the rounds that a stage writes to metrics.jsonl in ``folder``."""
    over, started = threading.Event(), time.time()
    paths = {"": folder / "metrics.jsonl", "centralised ": folder / "centralised" / "metrics.jsonl"}

    def watch() -> None:
        shown, printed = dict[str, Any](), started
        while not over.wait(every):
            rows = {title: _recent(path) for title, path in paths.items()}
            # Its row tells a round from the one before: the time left changes when an early one is not read any more.
            rounds = {title: row for title in rows for row in rows[title] if row["kind"] in ("round", "lloyd")}
            changed = [title for title, row in rounds.items() if row != shown.get(title)]
            lines = [title + line for title in changed if (line := progress.last_round(rows[title], started))]
            shown |= rounds
            if not lines and time.time() - printed > silence:
                work = [f"; {text}" for title in rows if (text := progress.at_work(rows[title], started))]
                lines = [f"running for {timedelta(seconds=round(time.time() - started))}{''.join(work)}"]
            for line in lines:
                progress.say(f"{folder.name}: {line}")
                printed = time.time()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _recent(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that tell how far a training is: the first, which is its plan, and the last ones.

    Not all: of 5,000 rounds they are 72 MB, which every look would parse again.
    """
    lines: list[bytes] = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:  # it may move aside at any moment
        lines.append(stream.readline())
        end = os.fstat(stream.fileno()).st_size
        if end - TAIL > stream.tell():
            stream.seek(end - TAIL)
            stream.readline()  # the rest of a row
        lines += stream.readlines()
    return [json.loads(line) for line in lines if line.endswith(b"\n") and line.strip()]  # the last may still grow
