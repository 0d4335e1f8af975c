"""The protocol over Flower's Message API: what a request and a reply look like, and ``Clients`` over any Flower Grid.

A request holds an ArrayRecord ``arrays`` and a ConfigRecord ``request`` (the action, and its configuration as JSON). A
reply holds ``arrays``, a MetricRecord ``metrics`` and a ConfigRecord ``client`` (the client's id, and the reason where
it failed). Nothing else travels.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedhubert_lib.federated.protocol import Failure, Reply

POLL_SECONDS = 0.05
IDENTIFY_SECONDS = 120.0
"""A node's first answer: its process has to import PyTorch."""


def packed(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """``arrays`` as Flower's record."""
    record = ArrayRecord()
    for name, tensor in arrays.items():
        record[name] = Array(tensor.detach())
    return record


def unpacked(record: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of ``packed``."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


def request(action: str, arrays: ArrayRecord, config: Mapping[str, Any]) -> RecordDict:
    """The content of a request. Each message gets records of its own, since a Flower mod may change them; the arrays in
    them are shared, so that a model is packed once for a whole cohort.
    """
    record = ConfigRecord({"action": action, "config": json.dumps(dict(config))})
    return RecordDict({"arrays": arrays.copy(), "request": record})


def read_request(content: RecordDict) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Action, arrays and configuration of a request."""
    record = content["request"]
    return record["action"], unpacked(content["arrays"]), json.loads(record["config"])


def reply(answer: Reply | Failure) -> RecordDict:
    """The content of a reply."""
    if isinstance(answer, Failure):
        return RecordDict({"client": ConfigRecord({"id": answer.client, "failure": answer.reason})})
    return RecordDict(
        {
            "arrays": packed(answer.arrays),
            "metrics": MetricRecord(dict(answer.metrics)),
            "client": ConfigRecord({"id": answer.client}),
        }
    )


def read_reply(client: str, message: Message) -> Reply | Failure:
    """What ``client`` answered. An error of the engine, an answer in another client's name or one that is not
    understood is a Failure."""
    if message.has_error():
        return Failure(client, message.error.reason or f"Flower's error {message.error.code}")
    record = message.content.get("client", {})
    if record.get("id") != client:
        return Failure(client, f"answered in the name of {record.get('id')!r}")
    if "failure" in record:
        return Failure(client, str(record["failure"]))
    try:
        metrics = {name: float(value) for name, value in message.content["metrics"].items()}
        return Reply(client, unpacked(message.content["arrays"]), metrics)
    except (KeyError, TypeError, ValueError) as error:
        return Failure(client, f"its answer is not understood: {type(error).__name__}: {error}")


class GridClients:
    """``protocol.Clients`` over a Flower Grid.

    Replies are pulled one by one in sorted order of client id: those that came early wait where the engine keeps them,
    so the server holds one at a time, and sums do not depend on the order of arrival.

    ``nodes`` maps client ids to the Flower nodes that are known; ``ids`` are all clients, also those that are not
    connected yet (default: the known ones). A node that comes later is asked who it is before the next message.
    """

    def __init__(self, grid: Grid, nodes: Mapping[str, int], ids: Sequence[str] | None = None) -> None:
        self._grid, self._nodes = grid, dict(nodes)
        self._strangers: set[int] = set()
        """Nodes that did not say who they are, or are not among ``ids``."""
        self.ids: Sequence[str] = sorted(nodes if ids is None else ids)

    def ask(
        self,
        action: str,
        *,
        arrays: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        clients: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Reply | Failure]:
        """See ``protocol.Clients.ask``. A client that is not connected is a Failure, not an exception."""
        asked = self.ids if clients is None else sorted(clients)
        connected = self._connected()
        present = [client for client in asked if client in connected]
        record = packed(arrays or {})
        messages = [
            Message(request(action, record, config or {}), connected[client], MessageType.TRAIN, ttl=timeout)
            for client in present
        ]
        identifiers = dict(zip(present, self._grid.push_messages(messages), strict=True))
        del messages, record
        for client in asked:
            if client not in identifiers:
                yield Failure(client, "not connected")
            elif identifiers[client] is None:
                yield Failure(client, "the engine could not take its message")
            else:
                yield self._answer(client, identifiers[client])

    def _connected(self) -> dict[str, int]:
        """Nodes by client, of those that are there now."""
        there = set(self._grid.get_node_ids())
        if unknown := there - set(self._nodes.values()) - self._strangers:
            found = identify(self._grid, unknown)
            self._nodes |= {client: node for client, node in found.items() if client in self.ids}
            self._strangers |= unknown - set(self._nodes.values())
        return {client: node for client, node in self._nodes.items() if node in there}

    def _answer(self, client: str, identifier: str) -> Reply | Failure:
        while True:  # ends: past a message's time to live every engine answers with an error
            for message in self._grid.pull_messages([identifier]):
                return read_reply(client, message)
            time.sleep(POLL_SECONDS)


def identify(grid: Grid, nodes: Iterable[int], timeout: float = IDENTIFY_SECONDS) -> dict[str, int]:
    """Ask ``nodes`` which client each is: node by client. Those that do not answer in time are left out.

    Raises ValueError when two say that they are the same client.
    """
    found: dict[str, int] = {}
    asked = [Message(request("identify", ArrayRecord(), {}), node, MessageType.TRAIN) for node in sorted(nodes)]
    for message in grid.send_and_receive(asked, timeout=timeout):
        if message.has_error():
            continue
        client, node = str(message.content["client"]["id"]), message.metadata.src_node_id
        if found.setdefault(client, node) != node:
            raise ValueError(f"two connected nodes say that they are {client!r}; give each its own in --node-config")
    return found
