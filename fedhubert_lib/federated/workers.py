"""What the engines ``pool`` and ``ray`` have in common: clients over workers that answer side by side.

A worker has a device, and works for one client at a time. One that dies costs its client's answer and nothing else:
another takes its place.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedhubert_lib.federated.protocol import Failure, Reply

WAIT_SECONDS = 0.5
"""Longest wait for an answer before deadlines are looked at."""


class WorkerClients(ABC):
    """``protocol.Clients`` over ``count`` workers. An engine says how they are started, stopped, fed and listened to.

    Clients start in the order of their ids. Answers not yet read are few, since none starts while there are twice as
    many as workers: memory does not grow with the cohort. A client has the request's time from when a worker has it, as
    if all worked side by side; past it the worker is stopped: a straggler holds no device. A new request ends the one
    before.
    """

    def __init__(self, clients: Sequence[str], count: int) -> None:
        self.ids: Sequence[str] = sorted(clients)
        self._queue: deque[str] = deque()
        self._busy: dict[int, str] = {}
        self._up: set[int] = set()
        self._began: dict[int, float] = {}
        self._answers: dict[str, Reply | Failure] = {}
        self._timeout: float | None = None
        self._requests = 0
        self._count = count
        for slot in range(count):
            self.start(slot)

    @abstractmethod
    def start(self, slot: int) -> None:
        """Start the worker of ``slot``."""

    @abstractmethod
    def stop(self, slot: int) -> None:
        """Stop the worker of ``slot`` at once, whatever it does."""

    @abstractmethod
    def prepare(self, action: str, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Keep a request in place of the last, its tensors once for all clients."""

    @abstractmethod
    def give(self, slot: int, client: str) -> None:
        """Hand the request for ``client`` to the worker of ``slot``, which is idle."""

    @abstractmethod
    def collect(self, busy: Sequence[int], seconds: float) -> Iterator[tuple[int, Reply | Failure | str | None]]:
        """Wait up to ``seconds`` for the ``busy`` workers: whose news it is, and its answer, how it died, or None when
        it is up (a new worker takes seconds to start, which are not its client's)."""

    def ask(
        self,
        action: str,
        *,
        arrays: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        clients: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Reply | Failure]:
        """See ``protocol.Clients.ask``."""
        for slot in list(self._busy):
            self._lose(slot)
        self._requests += 1
        number, asked = self._requests, self.ids if clients is None else sorted(clients)
        self._answers, self._timeout = {}, timeout
        self._queue = deque(client for client in asked if client in self.ids)
        self.prepare(action, arrays or {}, config or {})
        self._hand_out()
        for client in asked:
            if client not in self.ids:
                yield Failure(client, "not connected")
                continue
            while number == self._requests and client not in self._answers:
                self._receive(WAIT_SECONDS)
                self._hand_out()
            if number != self._requests:
                raise RuntimeError("a new request went out before all answers to the last were read; read them first")
            answer = self._answers.pop(client)
            self._hand_out()
            yield answer

    def _hand_out(self) -> None:
        for slot in range(self._count):
            if self._queue and slot not in self._busy and len(self._busy) + len(self._answers) < 2 * self._count:
                client = self._busy[slot] = self._queue.popleft()
                self.give(slot, client)
                if slot in self._up:
                    self._began[slot] = time.monotonic()

    def _receive(self, seconds: float) -> None:
        for slot, answer in self.collect(sorted(self._busy), seconds):
            if answer is None:
                self._up.add(slot)
                self._began[slot] = time.monotonic()
                continue
            if isinstance(answer, str):
                client = self._lose(slot)
                self._answers[client] = Failure(client, answer)
            else:
                del self._began[slot]
                self._answers[self._busy.pop(slot)] = answer
        for slot, began in list(self._began.items()):
            if self._timeout is not None and time.monotonic() - began > self._timeout:
                client = self._lose(slot)
                self._answers[client] = Failure(client, f"no answer before the deadline of {self._timeout:.1f} s")

    def _lose(self, slot: int) -> str:
        """Replace a worker that is dead, or is not waited for any more; the client that it worked for."""
        self.stop(slot)
        self.start(slot)
        self._began.pop(slot, None)
        self._up.discard(slot)
        return self._busy.pop(slot)


def threads() -> int:
    """Threads of each worker: as many as this process uses, since sums split over another number round differently."""
    return torch.get_num_threads()
