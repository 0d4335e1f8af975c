"""The engine for one machine with several devices: a worker process each, alive for the whole run.

Requests and answers are files of ``wire``; what to read, and for whom, is JSON on a pipe.
"""

import contextlib
import copy
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from fedhubert_lib.federated import devices, handlers, wire
from fedhubert_lib.federated.protocol import Clients, Failure, Reply, Request
from fedhubert_lib.federated.workers import Worker, WorkerClients


class Process(Worker):
    """A worker process on ``device``.

    A fresh interpreter, not a fork (CUDA forbids it), and not multiprocessing's spawn (which runs the caller's main
    module again).
    """

    def __init__(self, run: Path, device: str) -> None:
        self._pipe, theirs = Pipe()
        self._up = False
        command = "import sys; from fedhubert_lib.federated import pool; pool.work(int(sys.argv[1]))"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                start_new_session=True,  # Ctrl-C is for this process; the workers end with it
            )
        wire.send(self._pipe, {"run": str(run), "device": device, "threads": torch.get_num_threads()})

    def answer(self, client: str, packed: Path, timeout: float | None) -> Reply | Failure:
        try:
            self._up = self._up or wire.receive(self._pipe)
            path = packed.with_name(f"answer-{self.process.pid}")
            wire.send(self._pipe, {"client": client, "request": str(packed), "answer": str(path)})
            if not self._pipe.poll(timeout):
                raise TimeoutError(f"no answer before the deadline of {timeout:.1f} s")
            wire.receive(self._pipe)
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionError(self._death()) from error
        return wire.read_answer(path)

    def _death(self) -> str:
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the worker process died ({how}); its standard error says more, and the system log if memory ran out"

    def stop(self) -> None:
        """Kill it: what a client writes is written atomically."""
        self.process.kill()
        self.process.wait()


class PoolClients(WorkerClients):
    """Clients over one persistent process per entry of ``devices``; messages lie in ``folder``."""

    def __init__(self, run: Path, clients: Sequence[str], devices: Sequence[str], folder: Path) -> None:
        self._folder, self._requests = folder, itertools.count()
        super().__init__(clients, devices, lambda device: Process(run, device))

    def packed(self, request: Request) -> Path:
        for last in self._folder.glob("request-*"):
            last.unlink()
        path = self._folder / f"request-{next(self._requests)}"
        wire.write(path, {"action": request.action, "config": request.config}, request.arrays)
        return path


def work(descriptor: int) -> None:
    """A worker's main: answer requests until the process that started it is gone."""
    pipe = Connection(descriptor)
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(wire.receive(pipe))
        except (EOFError, OSError):
            os._exit(0)  # at once, in the middle of training: nobody waits for the answer

    threading.Thread(target=listen, daemon=True).start()
    setup = requests.get()
    torch.set_num_threads(setup["threads"])
    read = functools.lru_cache(maxsize=1)(wire.read)  # a cohort's clients get the same tensors: see weights.placed
    wire.send(pipe, True)  # up
    while True:
        task = requests.get()
        (request, arrays), run = read(Path(task["request"])), Path(setup["run"])
        home = handlers.home(run, task["client"], request["action"], setup["device"], simulated=True)
        answer = handlers.answer(home, request["action"], dict(arrays), copy.deepcopy(request["config"]))
        wire.write_answer(Path(task["answer"]), answer)
        wire.send(pipe, True)


@contextlib.contextmanager
def connect(run: Path, clients: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients of ``run`` in worker processes, one per device that ``device`` stands for."""
    with wire.folder() as folder, contextlib.closing(PoolClients(run, clients, devices(device), folder)) as pool:
        yield pool
