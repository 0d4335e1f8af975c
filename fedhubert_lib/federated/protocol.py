"""Messages between a client and the server, whatever carries them.

Client code is a set of handlers, ``handler(home, arrays, config) -> (arrays, metrics)``: it reads its own folder and
the message, nothing else. Server code is a set of algorithms over ``Clients``: it sees replies, never a client's file.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

Arrays = dict[str, Tensor]
"""Named CPU tensors: model parameters, cluster sums and counts. Never audio, features, labels or file names."""


def size(arrays: Mapping[str, Tensor]) -> int:
    """Bytes of ``arrays``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in arrays.values())


def digest(arrays: Mapping[str, Tensor]) -> str:
    """One name for all names and bits of ``arrays``."""
    result = hashlib.sha256()
    for name, tensor in sorted(arrays.items()):
        result.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()[:16]


@dataclass(frozen=True)
class ClientHome:
    """The folders of one client, and where it computes."""

    client: str
    data: Path
    """``train.parquet`` and ``validation.parquet``: the utterances it may read."""
    labels: Path
    """Written by the k-means handlers: a folder per codebook."""
    state: Path
    """Personal heads, optimiser state, error feedback: a folder per task."""
    device: str = "cpu"
    simulated: bool = False
    """Whether the server lives on the same machine, as an engine of a simulation says: never over a network."""


@dataclass(frozen=True)
class Reply:
    """A client's answer: tensors, and scalars for the ledger."""

    client: str
    arrays: Arrays = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, or answered with something unusable, and why."""

    client: str
    reason: str
    reached: bool = True
    """Whether the request was sent to it."""


@dataclass(frozen=True)
class Request:
    """One message to some clients."""

    action: str
    arrays: Arrays
    config: dict[str, Any]
    clients: Sequence[str]
    """Sorted."""
    timeout: float | None


Answers = Generator[Reply | Failure, None, None]
"""One of each client asked, in the order of client ids."""


class Clients(ABC):
    """The clients of a federation, as the server's algorithms see them. Engines say how answers come about."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids: Sequence[str] = sorted(ids)
        self.bytes = {"bytes_down": 0, "bytes_up": 0}
        """Of all tensors that have travelled."""
        self._last: Answers = (answer for answer in list[Reply | Failure]())

    @abstractmethod
    def answers(self, request: Request) -> Answers:
        """The answers of ``request.clients``, all of them among ``ids``, in their order."""

    def ask(
        self,
        action: str,
        *,
        arrays: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        clients: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Reply | Failure]:
        """Send one message to ``clients`` (default: all) and yield one answer each, in sorted order of client id.

        Yields as soon as the next in order is there, so that the server holds few replies at a time. ``config`` is
        JSON-like. An answer later than ``timeout`` seconds is a Failure. A new request ends the last one.
        """
        self._last.close()
        tensors = {name: tensor.detach() for name, tensor in (arrays or {}).items()}
        asked = sorted(self.ids if clients is None else clients)
        self._last = self._counted(Request(action, tensors, dict(config or {}), asked, timeout))
        return self._last

    def _counted(self, request: Request) -> Answers:
        asked = size(request.arrays)
        with closing(self.answers(request)) as answers:
            for answer in answers:
                self.bytes["bytes_down"] += asked if isinstance(answer, Reply) or answer.reached else 0
                self.bytes["bytes_up"] += size(answer.arrays) if isinstance(answer, Reply) else 0
                yield answer

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """``bytes`` that have travelled after they were ``before``."""
        return {name: count - before.get(name, 0) for name, count in self.bytes.items()}
