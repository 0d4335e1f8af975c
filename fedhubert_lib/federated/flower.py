"""The protocol over Flower's Message API: the ClientApp and the ServerApp, which Flower starts in processes of its own.

A request holds an ArrayRecord ``arrays`` and a ConfigRecord ``request`` (the action, and its configuration as JSON). A
reply holds ``arrays``, a MetricRecord ``metrics`` and a ConfigRecord ``client`` (the client's id, and the reason where
it failed). Nothing else travels.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedhubert_lib.federated import handlers, wire
from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Reply, Request

POLL_SECONDS = 0.05
LOOK_SECONDS = 1.0
"""Time between looks for nodes that are away, while an answer is waited for."""
IDENTIFY_SECONDS = 120.0
"""Time that a request waits for a new node to name its client: the node's process has to import PyTorch."""
WAIT_SECONDS = 120
"""Time to wait at the start until all clients are named; those still missing then are left out until they come."""
LONGEST_REASON = 500
"""Characters of a client's reason for a failure that are kept."""

logger = logging.getLogger(__name__)

client = ClientApp()
server = ServerApp()


# ---------------------------------------------------------------------------------------------------------- at a client


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Every request comes as Flower's message type ``train``; the action inside says what is asked.

    The node's configuration names the client, the ``run`` folder on its machine, and its device.
    """
    records: Mapping[str, Any] = message.content
    node, request = context.node_config, records["request"]
    run, device = Path(str(node["run"])), str(node.get("device", "cpu"))
    home = handlers.home(run, str(node["client"]), request["action"], device, simulated=False)
    try:
        wire.check(config := json.loads(request["config"]))
        answer = handlers.answer(home, request["action"], records["arrays"].to_torch_state_dict(), config)
    except ValueError as error:  # it says nothing but what the server has written
        answer = Failure(home.client, str(error))
    if isinstance(answer, Failure):
        reply = RecordDict({"client": ConfigRecord({"id": answer.client, "failure": answer.reason})})
    else:
        metrics, name = MetricRecord(dict(answer.metrics)), ConfigRecord({"id": answer.client})
        reply = RecordDict({"arrays": ArrayRecord(answer.arrays), "metrics": metrics, "client": name})
    return Message(reply, reply_to=message)


# -------------------------------------------------------------------------------------------------------- at the server


class GridClients(Clients):
    """Clients over Flower's Grid.

    Replies are pulled one by one in sorted order of client id: those that came early wait where Flower keeps them, so
    the server holds one at a time, and sums do not depend on the order of arrival. ``ids`` are all clients. A node is
    asked which client it is when it connects.
    """

    def __init__(self, grid: Grid, ids: Sequence[str]) -> None:
        super().__init__(ids)
        self._grid = grid
        self._names: dict[int, str] = {}
        """Which client a node says it is; it need not be among ``ids``."""
        self._asked: dict[str, int] = {}
        """Nodes that have not said yet who they are, by the message that asks them."""
        self._met: set[int] = set()
        """Nodes that were asked before."""
        self._late: list[str] = []
        """Messages whose answers came too late, or still may: unread they stay in Flower's memory."""
        self._looked = 0.0
        """When it last looked for nodes that are away."""

    def answers(self, request: Request) -> Answers:
        """A client that is not connected is a Failure, not an exception. One that is late costs its answer alone.

        A node that was seen to be away, however briefly, is not waited for: Flower hands a message out once, and the
        process that took it may be gone.
        """
        self._late = [identifier for identifier in self._late if not self._pull([identifier])]
        connected = self.connected()
        nodes = {name: connected[name] for name in request.clients if name in connected}
        identifiers = dict(zip(nodes, self._push(request, list(nodes.values())), strict=True))
        deadline = time.monotonic() + (math.inf if request.timeout is None else request.timeout)
        away: set[str] = set()
        for name in request.clients:
            if name not in identifiers:
                yield Failure(name, "not connected", reached=False)
            elif identifiers[name] is None:
                yield Failure(name, "Flower could not take its message", reached=False)
            else:
                yield self._answer(name, identifiers[name], deadline, nodes, away)

    def wait(self, seconds: float) -> None:
        """Wait until all clients are connected, or ``seconds`` have passed. Nodes appear as they activate."""
        deadline = time.monotonic() + seconds
        while missing := sorted(set(self.ids) - set(self.connected(deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                logger.warning("%s: not connected within %.0f s; left out until they come", ", ".join(missing), seconds)
                return
            time.sleep(0.5)

    def connected(self, seconds: float | None = None) -> dict[str, int]:
        """Nodes by client, of those that are connected now.

        A new node has ``seconds`` (default: IDENTIFY_SECONDS) to say which client it is; the name of a slower one is
        taken whenever it comes, and a node that failed is asked again. A client that two nodes say they are is neither.
        """
        nodes = set(self._grid.get_node_ids())
        self._take_names()
        if unnamed := sorted(nodes - {*self._names, *self._asked.values()}):
            sent = self._push(Request("identify", {}, {}, (), IDENTIFY_SECONDS), unnamed)
            self._asked |= {identifier: node for identifier, node in zip(sent, unnamed, strict=True) if identifier}
        new, deadline = set(unnamed) - self._met, time.monotonic() + (IDENTIFY_SECONDS if seconds is None else seconds)
        self._met |= new
        self._take_names()
        while not new.isdisjoint(self._asked.values()) and time.monotonic() <= deadline:
            time.sleep(POLL_SECONDS)
            self._take_names()
        here = {node: name for node, name in self._names.items() if node in nodes and name in self.ids}
        counts = Counter(here.values())
        for name in [name for name, count in counts.items() if count > 1]:
            logger.warning("%d nodes say that they are %r; left out until one is left", counts[name], name)
        return {name: node for node, name in here.items() if counts[name] == 1}

    def _take_names(self) -> None:
        """Read the names that have come."""
        for message in self._pull(list(self._asked)) if self._asked else ():
            node = self._asked.pop(message.metadata.reply_to_message_id, None)  # a node may send what it likes
            if node is not None and not message.has_error():
                records: Mapping[str, Any] = message.content
                self._names[node] = str(records.get("client", {}).get("id"))

    def _push(self, request: Request, nodes: Sequence[int]) -> list[Any]:
        """Send ``request`` to ``nodes``: Flower's identifier of the message to each, or None.

        Each message has its own records, since a Flower mod may change them; the arrays in them are shared, so that a
        model is packed once for a whole cohort. Flower keeps a reply as long as its message lives: until all are read.
        """
        arrays, lives = ArrayRecord(request.arrays), request.timeout and 2 * request.timeout
        fields: dict[str, Any] = {"action": request.action, "config": json.dumps(request.config)}
        contents = (RecordDict({"arrays": arrays.copy(), "request": ConfigRecord(fields)}) for _ in nodes)
        pairs = zip(contents, nodes, strict=True)
        messages = [Message(content, node, MessageType.TRAIN, ttl=lives) for content, node in pairs]
        return list(self._grid.push_messages(messages))

    def _answer(
        self, name: str, identifier: str, deadline: float, nodes: Mapping[str, int], away: set[str]
    ) -> Reply | Failure:
        """``away`` takes the clients among ``nodes`` that are not connected while this waits."""
        while True:  # ends: past a message's time to live Flower answers with an error
            now = time.monotonic()
            if now >= self._looked + LOOK_SECONDS:
                self._looked, here = now, set(self._grid.get_node_ids())
                away |= {client for client, node in nodes.items() if node not in here}
                self._take_names()  # before Flower forgets them
            lost = name in away  # before the last look for its answer
            for message in self._pull([identifier]):
                if message.metadata.reply_to_message_id == identifier:  # not one that another node has slipped in
                    return read_reply(name, message)
            if lost or now > deadline:
                self._late.append(identifier)
                return Failure(name, "its node left while it worked" if lost else "no answer before the deadline")
            time.sleep(POLL_SECONDS)

    def _pull(self, identifiers: Sequence[str]) -> list[Message]:
        try:
            return list(self._grid.pull_messages(identifiers))
        except Exception:  # bytes of others raise what they like; Flower has dropped them, and now says so
            logger.warning("an answer could not be unpacked", exc_info=True)
            if len(identifiers) > 1:  # another may be as bad: one by one
                return [message for identifier in identifiers for message in self._pull([identifier])]
            return list(self._grid.pull_messages(identifiers))


def read_reply(name: str, message: Message) -> Reply | Failure:
    """The answer of client ``name``. An error of Flower's, an answer in another client's name, and one that does not
    hold what a reply holds are Failures."""
    if message.has_error():
        return Failure(name, _plain(message.error.reason or f"Flower's error {message.error.code}"))
    records: Mapping[str, Any] = message.content
    record = records.get("client", {})
    if record.get("id") != name:
        return Failure(name, f"answered in the name of {record.get('id')!r:.100}")
    if "failure" in record:
        return Failure(name, _plain(str(record["failure"])))
    try:
        metrics = {key: float(value) for key, value in records["metrics"].items()}
        arrays = records["arrays"].to_torch_state_dict()
        if complex_ones := [key for key, array in arrays.items() if array.is_complex()]:  # safetensors holds none
            raise ValueError(f"{complex_ones[0]:.100} is complex")
        return Reply(name, arrays, metrics)
    except Exception as error:  # bytes of others raise what they like: EOFError, BadZipFile, TokenError, MemoryError
        return Failure(name, _plain(f"its answer is not understood: {type(error).__name__}: {error}"))


def _plain(reason: str) -> str:
    """A client's words, cut, and without what would steer the terminal that shows them."""
    return "".join(letter if letter.isprintable() else " " for letter in reason[:LONGEST_REASON])


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the clients that the stage names, then pass its requests on until it ends."""
    with Client(str(context.run_config["socket"]), family="AF_UNIX") as pipe:
        clients = GridClients(grid, wire.receive(pipe))
        clients.wait(WAIT_SECONDS)
        wire.send(pipe, connected := sorted(clients.connected(0)))
        if connected:
            wire.serve(pipe, clients)
