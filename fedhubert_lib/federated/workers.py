"""What the engines ``pool`` and ``ray`` have in common: a Flower Grid over workers that answer side by side.

Each worker is an in-process engine of its own, with its own device; this grid gives it one message at a time. A worker
that dies costs its client's answer and nothing else: another takes its place.
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedhubert_lib.federated import messages
from fedhubert_lib.federated.inprocess import InProcessGrid

WAIT_SECONDS = 0.5
"""Longest wait for an answer in one pull; deadlines are seen that late."""


class WorkerGrid(InProcessGrid):
    """A Grid over ``count`` workers. An engine says how they are started, stopped, given a message and listened to.

    Messages start in the order in which they are pushed. Answers not yet pulled are few, since no message starts while
    there are twice as many as workers: memory does not grow with the cohort. A client has the message's time to live
    from when a worker has it, as if all worked side by side; past it the worker is stopped: a straggler holds no
    device. A new push ends the one before.
    """

    def __init__(self, run: Path, clients: Sequence[str], count: int) -> None:
        super().__init__(run, clients, device="")
        self._clients = {node: client for client, node in self.nodes.items()}
        self._queue: deque[Message] = deque()
        self._busy: dict[int, Message] = {}
        self._up: set[int] = set()
        self._began: dict[int, float] = {}
        self._answers: dict[str, Message] = {}
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
    def give(self, slot: int, client: str, content: RecordDict) -> None:
        """Send the worker of ``slot``, which is idle, a message for ``client``."""

    @abstractmethod
    def collect(self, busy: Sequence[int], seconds: float) -> Iterator[tuple[int, RecordDict | str | None]]:
        """Wait up to ``seconds`` for the ``busy`` workers: whose news it is, and its answer, how it died, or None when
        it is up (a new worker takes seconds to start, which are not its client's)."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, in place of whatever is left of the last push."""
        for slot in list(self._busy):
            self._lose(slot)
        self._answers.clear()
        self._waiting.clear()
        identifiers = super().push_messages(messages)
        self._queue = deque(self._waiting.values())
        self._hand_out()
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The answers that are there; waits a little where there is none."""
        wanted = list(message_ids)
        for identifier in wanted:
            if identifier not in self._waiting:
                raise RuntimeError("a new request went out before all answers to the last were read; read them first")
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._answers.keys() & wanted and (left := deadline - time.monotonic()) > 0:
            self._receive(left)
            self._hand_out()
        ready = [identifier for identifier in wanted if identifier in self._answers]
        answers = [self._answers.pop(identifier) for identifier in ready]
        for identifier in ready:
            del self._waiting[identifier]
        self._hand_out()
        yield from answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push, and pull in the same order, without a deadline."""
        for identifier in self.push_messages(messages):
            while identifier in self._waiting:
                yield from self.pull_messages([identifier])

    def _hand_out(self) -> None:
        for slot in range(self._count):
            if self._queue and slot not in self._busy and len(self._busy) + len(self._answers) < 2 * self._count:
                message = self._busy[slot] = self._queue.popleft()
                self.give(slot, self._clients[message.metadata.dst_node_id], message.content)
                if slot in self._up:
                    self._began[slot] = time.monotonic()

    def _receive(self, seconds: float) -> None:
        for slot, answer in self.collect(sorted(self._busy), seconds):
            if answer is None:
                self._up.add(slot)
                self._began[slot] = time.monotonic()
                continue
            if isinstance(answer, str):
                message, answer = self._lose(slot), Error(ErrorCode.UNKNOWN, answer)
            else:
                del self._began[slot]
                message = self._busy.pop(slot)
            self._answers[message.metadata.message_id] = Message(answer, reply_to=message)
        for slot, began in list(self._began.items()):
            limit = self._busy[slot].metadata.ttl
            if time.monotonic() - began > limit:
                message = self._lose(slot)
                error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"no answer before the deadline of {limit:.1f} s")
                self._answers[message.metadata.message_id] = Message(error, reply_to=message)

    def _lose(self, slot: int) -> Message:
        """Replace a worker that is dead, or is not waited for any more; what it worked on."""
        self.stop(slot)
        self.start(slot)
        self._began.pop(slot, None)
        self._up.discard(slot)
        return self._busy.pop(slot)


def answer(grid: InProcessGrid, client: str, content: RecordDict) -> RecordDict:
    """What a worker does: have ``client`` answer in this process."""
    message = Message(content, grid.nodes[client], MessageType.TRAIN)
    (reply,) = grid.send_and_receive([message])
    return reply.content


def take_apart(content: RecordDict) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the rest as JSON-like values: what a worker's wire carries."""
    arrays = messages.unpacked(content["arrays"]) if "arrays" in content else {}
    rest = {
        "config": {name: dict(record) for name, record in content.config_records.items()},
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
    }
    return arrays, rest


def put_together(arrays: Mapping[str, Tensor], rest: Mapping[str, Any]) -> RecordDict:
    """The inverse of ``take_apart``; the tensors go by reference."""
    content = RecordDict({"arrays": messages.packed(arrays, messages.SharedArray)})
    content.update({name: ConfigRecord(values) for name, values in rest["config"].items()})
    content.update({name: MetricRecord(values) for name, values in rest["metrics"].items()})
    return content


def threads() -> int:
    """Threads of each worker: as many as this process uses, since sums split over another number round differently."""
    return torch.get_num_threads()
