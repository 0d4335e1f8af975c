"""A stage's messages on their way to Flower's ServerApp, which ``flwr run`` starts on the same machine.

A stage runs in the process that asked for it, as over any other engine; the ServerApp passes its requests on to the
SuperNodes. Files of ``wire`` are announced over a socket, which only this user can open. Answers are fetched one at a
time: neither end holds a cohort of them.
"""

import itertools
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fedhubert_lib.federated import wire
from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Reply, Request

NEXT, END = "next", "end"
"""Requests of a stage beside files: the next answer; nothing more."""


class RelayClients(Clients):
    """Clients at the stage's end of ``pipe``; messages lie in ``folder``."""

    def __init__(self, pipe: Connection, ids: Sequence[str], folder: Path) -> None:
        """Tell the ServerApp who is expected, and wait until they are there. Raises ConnectionError if none comes."""
        super().__init__(ids)
        self._pipe, self._folder, self._requests = pipe, folder, itertools.count()
        wire.send(pipe, self.ids)
        if not self._receive():
            raise ConnectionError("no client is connected; start them with `fedhubert deploy client`")

    def answers(self, request: Request) -> Answers:
        """Raises ConnectionError when the ServerApp has ended."""
        path = self._folder / f"request-{next(self._requests)}"
        header = {"action": request.action, "config": request.config, "clients": request.clients}
        wire.write(path, {**header, "timeout": request.timeout}, request.arrays)
        wire.send(self._pipe, str(path))
        for _ in request.clients:
            wire.send(self._pipe, NEXT)
            yield wire.read_answer(Path(self._receive()))

    def end(self) -> None:
        """Tell the ServerApp that the stage needs nothing more."""
        wire.send(self._pipe, END)

    def _receive(self) -> Any:
        try:
            return wire.receive(self._pipe)
        except EOFError as error:
            raise ConnectionError("Flower's ServerApp has ended") from error


def serve(pipe: Connection, clients: Clients) -> None:
    """Answer the requests that arrive at ``pipe`` with what ``clients`` answer, until the stage ends.

    When the process at the other end dies or is interrupted, this one ends at once: nobody waits for its answers.
    """
    requests: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(asked := wire.receive(pipe))
                if asked == END:
                    return
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, daemon=True).start()
    path, answers = Path(), iter(list[Reply | Failure]())
    while (asked := requests.get()) != END:
        if asked == NEXT:
            wire.write_answer(path.with_name("answer"), next(answers))
            wire.send(pipe, str(path.with_name("answer")))
        else:
            path = Path(asked)
            header, arrays = wire.read(path)
            path.unlink()
            answers = clients.ask(**header, arrays=arrays)
