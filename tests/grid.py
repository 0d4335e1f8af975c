"""A Flower Grid over clients in this process, for tests of what stands between a stage and Flower."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedhubert_lib.federated import client_app


class InProcessGrid(Grid):
    """Flower's Grid over clients in this process; node ``i`` is ``clients[i - 1]``."""

    def __init__(self, run: Path, clients: Sequence[str], device: str) -> None:
        # A Message cannot be made without these; a SuperLink would have set them.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self.nodes = {client: node for node, client in enumerate(clients, start=2)}
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"client": client, "run": str(run), "device": device},
                state=RecordDict(),
                run_config={},
            )
            for client, node in self.nodes.items()
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(run_id=1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's older way to make a message; part of the interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: each is always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; their clients run when the replies are pulled."""
        identifiers = []
        for message in messages:
            identifier = message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the clients that these messages are for, one at each step of the iterator.

        Each has the message's time to live for itself, as if all worked side by side; a later answer is an error. It
        cannot be interrupted here: the other engines stop waiting.
        """
        for identifier in message_ids:
            message, began = self._waiting.pop(identifier), time.monotonic()
            reply = client_app.app(message, self._contexts[message.metadata.dst_node_id])
            if (seconds := time.monotonic() - began) > message.metadata.ttl:
                reason = f"answered after {seconds:.1f} s, later than the deadline of {message.metadata.ttl:.1f} s"
                reply = Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=message)
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push, and pull in the same order, as the iterator is consumed."""
        return self.pull_messages(self.push_messages(messages))
