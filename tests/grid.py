"""A Flower Grid over clients in this process, for tests of what stands between a stage and Flower.

Flower's own Message can be made only inside its processes, so another stands for it here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedhubert_lib.federated import flower


@dataclass
class Message:
    """As much of Flower's Message as is used."""

    content: Any
    dst_node_id: int = 0
    message_type: str = ""
    ttl: float | None = None
    reply_to: "Message | None" = None

    def has_error(self) -> bool:
        return False

    @property
    def metadata(self) -> SimpleNamespace:
        return SimpleNamespace(reply_to_message_id=identifier(self.reply_to))


def identifier(message: Message) -> str:
    return f"message-{id(message)}"


class InProcessGrid:
    """Node ``i`` is ``clients[i - 2]``."""

    def __init__(self, run: Path, clients: Sequence[str], monkeypatch) -> None:
        monkeypatch.setattr(flower, "Message", Message)
        self.configs = {
            node: {"client": client, "run": str(run), "device": "cpu"} for node, client in enumerate(clients, start=2)
        }
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; their clients run when the replies are pulled."""
        pushed = {identifier(message): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, identifiers: Iterable[str]) -> Iterator[Message]:
        for identifier in identifiers:
            message = self._waiting.pop(identifier)
            yield flower.answer(message, SimpleNamespace(node_config=self.configs[message.dst_node_id]))
