"""The engine for one machine with several devices: a worker process each, alive for the whole run.

Requests and answers are files of ``wire``; which to read, and for whom, is JSON on a pipe.
"""

import contextlib
import copy
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from fedhubert_lib import resources
from fedhubert_lib.federated import handlers, wire
from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Reply, Request

SPAWN = multiprocessing.get_context("spawn")  # not fork: CUDA forbids it


class Worker(Protocol):
    """A process that computes for one client after another."""

    def start(self) -> None:
        """Start it, or another in its place."""

    def answer(self, client: str, packed: Any, timeout: float | None) -> Reply | Failure:
        """The answer of ``client`` to a request. Raises TimeoutError where it takes longer, without the worker's start,
        and ConnectionError, with how, where the worker dies."""

    def stop(self) -> None:
        """Stop at once; an ``answer`` that is waited for ends in ConnectionError."""


class WorkerClients(Clients):
    """Clients over workers side by side, of this engine and of ``ray``.

    A worker that dies, or is late, costs its client's answer and nothing else: it is started again. Clients start in
    the order of their ids. Answers not yet read are few, since none starts while twice as many as workers wait: memory
    does not grow with the cohort. ``pack`` makes what the workers get of a request, its tensors once for all.
    """

    def __init__(self, ids: Sequence[str], workers: Sequence[Worker], pack: Callable[[Request], Any]) -> None:
        super().__init__(ids)
        self.workers, self._pack, self._closed = workers, pack, False
        for worker in workers:
            worker.start()

    def close(self) -> None:
        """Stop all workers, whatever they do."""
        self._closed = True
        self._last.close()  # first: a worker that is being started again is up afterwards
        for worker in self.workers:
            worker.stop()

    def answers(self, request: Request) -> Answers:
        """When they are not read to the end, workers that are busy with them are stopped, not waited for."""
        packed, idle, busy = self._pack(request), SimpleQueue[Worker](), set[Worker]()
        for worker in self.workers:
            idle.put(worker)

        def answer(client: str) -> Reply | Failure:
            busy.add(worker := idle.get())
            try:
                return worker.answer(client, packed, request.timeout)
            except (TimeoutError, ConnectionError) as error:
                worker.stop()
                if not self._closed:
                    worker.start()
                return Failure(client, str(error))
            finally:
                busy.discard(worker)
                idle.put(worker)

        pending: deque[Future[Reply | Failure]] = deque()
        with ThreadPoolExecutor(len(self.workers)) as pool:
            try:
                for client in request.clients:
                    pending.append(pool.submit(answer, client))
                    if len(pending) == 2 * len(self.workers):
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in list(busy):
                    worker.stop()


class Process:
    """A worker process on ``device``; requests and answers lie in the folder ``messages``."""

    def __init__(self, messages: Path, run: Path, device: str) -> None:
        self._arguments = messages, run, device, torch.get_num_threads()

    def start(self) -> None:
        self._pipe, far_end = SPAWN.Pipe()
        self._up = False
        process = SPAWN.Process(target=work, args=(far_end, *self._arguments), daemon=True)
        process.start()
        far_end.close()
        self.process = process  # last: one that has not begun cannot be stopped

    def answer(self, client: str, packed: Path, timeout: float | None) -> Reply | Failure:
        try:
            self._up = self._up or wire.receive(self._pipe)
            path = packed.with_name(f"answer-{self.process.pid}")
            wire.send(self._pipe, [client, str(packed), str(path)])
            if answered := self._pipe.poll(timeout):
                wire.receive(self._pipe)
        except (EOFError, OSError) as error:
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ConnectionError(
                f"the worker process died ({how}); its standard error says more, and the system log if memory ran out"
            ) from error
        if not answered:
            raise TimeoutError(f"no answer before the deadline of {timeout:.1f} s")
        return wire.read_answer(path)

    def stop(self) -> None:
        """Kill it: what a client writes is written atomically."""
        process = self.process  # the thread that waits for its answer may start another meanwhile
        process.kill()
        process.join()


def work(pipe: Connection, messages: Path, run: Path, device: str, threads: int) -> None:
    """A worker's main: answer requests until the process that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        shutil.rmtree(messages, ignore_errors=True)  # which a parent that was killed has left
        os._exit(0)  # in the middle of training: nobody waits for the answer

    threading.Thread(target=end, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for that process
    torch.set_num_threads(threads)
    read = functools.lru_cache(maxsize=1)(wire.read)  # a cohort's clients get the same tensors: see weights.placed
    wire.send(pipe, "up")
    while True:
        client, request_path, answer_path = wire.receive(pipe)
        request, arrays = read(Path(request_path))
        home = handlers.home(run, client, request["action"], device, simulated=True)
        answer = handlers.answer(home, request["action"], dict(arrays), copy.deepcopy(request["config"]))
        leave_lost_gpu(answer)
        wire.write_answer(Path(answer_path), answer)
        wire.send(pipe, "done")


def leave_lost_gpu(answer: Reply | Failure) -> None:
    """End this process after an error of its GPU, after which no call on it can succeed: another takes its place."""
    if isinstance(answer, Failure) and answer.reason.startswith("AcceleratorError"):
        print(answer.reason, file=sys.stderr, flush=True)
        os._exit(1)


def devices(device: str) -> list[str]:
    """The device of each worker: every GPU for ``cuda``, one for ``cuda:N``, ``cpu`` as often as the cores hold.

    On a CPU each worker takes as many threads as this process (torch.get_num_threads), since sums split over another
    number round differently: set OMP_NUM_THREADS=1 for as many workers as cores.
    """
    if device == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "cpu":
        return ["cpu"] * max(1, resources.cores() // torch.get_num_threads())
    return [device]


def side_by_side(engine: str, device: str) -> int:
    """Clients that train side by side on this machine: with this engine one on each of ``devices``, else one."""
    return len(devices(resources.resolve(device))) if engine == "pool" else 1


@contextlib.contextmanager
def connect(run: Path, ids: Sequence[str], device: str) -> Iterator[WorkerClients]:
    """The clients of ``run`` in worker processes, one per device that ``device`` stands for."""
    with wire.folder() as folder:
        numbers = itertools.count()

        def pack(request: Request) -> Path:
            for last in folder.glob("request-*"):
                last.unlink()
            path = folder / f"request-{next(numbers)}"
            wire.write(path, {"action": request.action, "config": request.config}, request.arrays)
            return path

        workers = [Process(folder, run, place) for place in devices(device)]
        with contextlib.closing(WorkerClients(ids, workers, pack)) as clients:
            yield clients
