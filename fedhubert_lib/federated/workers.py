"""Clients over workers that answer side by side: what the engines ``pool`` and ``ray`` have in common.

A worker has a device, and works for one client at a time. One that dies, or is late, costs its client's answer and
nothing else: another takes its place.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Reply, Request


class Worker(ABC):
    """A process somewhere that computes for one client after another. Making one starts it."""

    @abstractmethod
    def answer(self, client: str, packed: Any, timeout: float | None) -> Reply | Failure:
        """The answer of ``client`` to a request. Raises TimeoutError where it takes longer, without the worker's start,
        and ConnectionError, with how, where the worker dies."""

    @abstractmethod
    def stop(self) -> None:
        """Stop at once, whatever it does; an ``answer`` that is waited for ends in ConnectionError."""


class WorkerClients(Clients):
    """Clients over one worker for each of ``places``. An engine says what its packed requests and its workers are.

    Clients start in the order of their ids. Answers not yet read are few, since none starts while there are twice as
    many as workers: memory does not grow with the cohort. A straggler is stopped: it holds no device.
    """

    def __init__(self, clients: Sequence[str], places: Sequence[Any], make: Callable[[Any], Worker]) -> None:
        super().__init__(clients)
        self._make, self._places = make, places
        self.workers = [make(place) for place in places]
        self._closed = False

    @abstractmethod
    def packed(self, request: Request) -> Any:
        """What workers get for every client, its tensors once for all. The last one is not used any more."""

    def close(self) -> None:
        """Stop all workers."""
        self._closed = True
        self._last.close()
        for worker in self.workers:
            worker.stop()

    def answers(self, request: Request) -> Answers:
        """When they are not read to the end, workers that are busy with them are replaced."""
        packed = self.packed(request)
        idle: SimpleQueue[int] = SimpleQueue()
        for slot in range(len(self.workers)):
            idle.put(slot)
        busy: set[int] = set()

        def answer(client: str) -> Reply | Failure:
            busy.add(slot := idle.get())
            try:
                return self.workers[slot].answer(client, packed, request.timeout)
            except (TimeoutError, ConnectionError) as error:
                self.workers[slot].stop()
                if not self._closed:
                    self.workers[slot] = self._make(self._places[slot])
                return Failure(client, str(error))
            finally:
                busy.discard(slot)
                idle.put(slot)

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
                for future in pending:
                    future.cancel()
                for slot in list(busy):
                    self.workers[slot].stop()
