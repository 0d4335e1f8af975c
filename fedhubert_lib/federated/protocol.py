"""What a client and the server say to each other, whatever carries it.

Client code is a set of handlers, ``handler(home, arrays, config) -> (arrays, metrics)``: it reads its own folder and
the message, nothing else. Server code is a set of algorithms over ``Clients``: it sees replies, never a file of a
client.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Arrays = dict[str, Tensor]
"""Named CPU tensors: model parameters, cluster sums and counts. Never audio, features, labels or file names."""


@dataclass(frozen=True)
class ClientHome:
    """Where one client keeps what is its own."""

    client: str
    data: Path
    """``train.parquet`` and ``validation.parquet``: the utterances it may read."""
    labels: Path
    """Written by the k-means handlers: a folder per codebook."""
    state: Path
    """Personal heads, optimiser state, error feedback: a folder per task."""
    device: str = "cpu"
    """Where it computes."""
    simulated: bool = False
    """Whether the server lives on the same machine, as an engine of a simulation says: never over a network."""


@dataclass(frozen=True)
class Reply:
    """What a client sends back: tensors, and scalars for the ledger."""

    client: str
    arrays: Arrays = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, or answered with something unusable, and why."""

    client: str
    reason: str


class Clients(Protocol):
    """The clients of a federation, as the server's algorithms see them. Engines implement it."""

    ids: Sequence[str]
    """Client ids, sorted."""

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
        JSON-like. An answer later than ``timeout`` seconds is a Failure.
        """
        ...
