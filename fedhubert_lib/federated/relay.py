"""A stage's messages on their way to Flower's ServerApp: the stage runs in the process that asked for it, as over any
other engine, and the ServerApp passes on what it asks.

Each message is a JSON header and tensors as safetensors, over a socket that only this user can open. Answers are
fetched one at a time: neither end holds a cohort of them.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedhubert_lib.federated.protocol import Clients, Failure, Reply

NEXT, END = "", "."
"""What stands for an action where the next answer is asked for, and at the end."""


class RelayClients:
    """``protocol.Clients`` at the stage's end of ``pipe``."""

    def __init__(self, pipe: Connection, ids: Sequence[str]) -> None:
        """Tell the ServerApp who is expected, and wait until they are there. Raises ConnectionError if none comes."""
        self.ids = sorted(ids)
        self._pipe = pipe
        self._requests = 0
        send(pipe, {"ids": self.ids}, {})
        if not self._receive()[0]["connected"]:
            raise ConnectionError("no client is connected; start them with `fedhubert deploy client`")

    def ask(
        self,
        action: str,
        *,
        arrays: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        clients: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Reply | Failure]:
        """See ``protocol.Clients.ask``. Raises ConnectionError when the ServerApp has ended."""
        self._requests += 1
        number, asked = self._requests, sorted(self.ids if clients is None else clients)
        request = {"action": action, "config": dict(config or {}), "clients": asked, "timeout": timeout}
        send(self._pipe, request, arrays or {})
        for _ in asked:
            if number != self._requests:
                raise RuntimeError("a new request went out before all answers to the last were read; read them first")
            send(self._pipe, {"action": NEXT}, {})
            header, tensors = self._receive()
            yield Failure(**header) if "reason" in header else Reply(**header, arrays=tensors)

    def end(self) -> None:
        """Tell the ServerApp that the stage needs nothing more."""
        send(self._pipe, {"action": END}, {})

    def _receive(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            return receive(self._pipe)
        except EOFError as error:
            raise ConnectionError("Flower's ServerApp has ended") from error


def serve(pipe: Connection, clients: Clients) -> None:
    """Answer the requests that arrive at ``pipe`` with what ``clients`` answer, until the stage ends.

    When the process at the other end dies or is interrupted, this one ends at once: nobody waits for its answers.
    """
    requests: SimpleQueue[tuple[dict[str, Any], dict[str, Tensor]]] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(request := receive(pipe))
                if request[0]["action"] == END:
                    return
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, daemon=True).start()
    answers: Iterator[Reply | Failure] = iter(())
    while (request := requests.get())[0]["action"] != END:
        header, arrays = request
        if header["action"] != NEXT:
            answers = clients.ask(**header, arrays=arrays)
            continue
        answer = next(answers)
        if isinstance(answer, Failure):
            send(pipe, asdict(answer), {})
        else:
            send(pipe, {"client": answer.client, "metrics": answer.metrics}, answer.arrays)


def send(pipe: Connection, header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write a header (JSON-like) and tensors."""
    pipe.send_bytes(json.dumps({"names": list(arrays), "header": dict(header)}).encode())
    pipe.send_bytes(save({name: tensor.contiguous() for name, tensor in arrays.items()}))


def receive(pipe: Connection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``send`` wrote, tensors in the same order. Raises EOFError when the other end is gone."""
    document, tensors = json.loads(pipe.recv_bytes()), load(pipe.recv_bytes())
    return document["header"], {name: tensors[name] for name in document["names"]}
