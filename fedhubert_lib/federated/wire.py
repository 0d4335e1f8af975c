"""Messages between processes of one machine, and the two ends of such a connection.

A message is a safetensors file in a temporary folder (TMPDIR names another place), with the rest as JSON in its
metadata; its path is sent as JSON over a pipe. A reader maps the file and copies nothing: its changes are private, and
the file may be removed while it is in use.

``RemoteClients`` and ``serve`` connect a stage, in the process that asked for it, with Flower's ServerApp, which ``flwr
run`` starts on the same machine. Answers are fetched one at a time: neither end holds a cohort of them.
"""

import itertools
import json
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedhubert_lib import files
from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Reply, Request

NEXT, END = "next", "end"
"""Requests of a stage beside files: the next answer; nothing more."""

NAMES, NUMBERS = {"session", "kind", "digest"}, {"round", "durable"}
"""Settings of a message that become parts of paths at a client, wherever in the message they stand."""


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``NAMES`` in a message are names of files, and ``NUMBERS`` whole numbers from 0 on.

    A server is hostile until looked at: none of its words may lead out of the client's folders.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check(value)
        elif key in NAMES:
            checked_name(key, value)
        elif key in NUMBERS and not (type(value) is int and value >= 0):
            raise ValueError(f"{key}: {value!r} in a message; a whole number from 0 on is expected")


def checked_name(key: str, value: Any) -> str:
    """``value``, which is called ``key``, if it can name a file or folder and nothing else. Raises ValueError."""
    if not isinstance(value, str) or re.fullmatch(r"[\w-][\w.-]*", value, re.ASCII) is None:
        raise ValueError(f"{key}: {value!r} is no name; letters, digits and _ . - are expected, and no . in front")
    return value


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write ``header`` (JSON-like) and ``arrays`` (CPU), by number since their names are clients', to a new file."""
    metadata = {"header": json.dumps(dict(header)), "names": json.dumps(list(arrays))}
    with files.naming(path):
        save_file({str(i): tensor.detach().contiguous() for i, tensor in enumerate(arrays.values())}, path, metadata)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the arrays that ``write`` wrote, in the same order."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        arrays = {name: opened.get_tensor(str(i)) for i, name in enumerate(json.loads(metadata["names"]))}
    return json.loads(metadata["header"]), arrays


def write_answer(path: Path, answer: Reply | Failure) -> None:
    """Write a client's answer."""
    header = dict(vars(answer))
    write(path, header, header.pop("arrays", {}))


def read_answer(path: Path) -> Reply | Failure:
    """Read, and remove, the file that ``write_answer`` wrote."""
    header, arrays = read(path)
    path.unlink()
    return Failure(**header) if "reason" in header else Reply(**header, arrays=arrays)


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder for messages, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fedhubert-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def send(pipe: Connection, document: Any) -> None:
    """Send a JSON document."""
    pipe.send_bytes(json.dumps(document).encode())


def receive(pipe: Connection) -> Any:
    """Wait for a JSON document. Raises EOFError or OSError when the other end is gone."""
    return json.loads(pipe.recv_bytes())


class RemoteClients(Clients):
    """Clients at the stage's end of ``pipe``; messages lie in ``folder``."""

    def __init__(self, pipe: Connection, ids: Sequence[str], folder: Path) -> None:
        """Send ``ids`` to the ServerApp and wait until it has looked for them. Raises ConnectionError if none comes."""
        super().__init__(ids)
        self._pipe, self._folder, self._requests = pipe, folder, itertools.count()
        send(pipe, self.ids)
        if not self._receive():
            raise ConnectionError(
                "no client has answered; start them with `fedhubert deploy client`. Where they run, try again later:"
                " what an earlier start has left them to do comes first"
            )

    def answers(self, request: Request) -> Answers:
        """Raises ConnectionError when the ServerApp has ended."""
        path, header = self._folder / f"request-{next(self._requests)}", dict(vars(request))
        write(path, header, header.pop("arrays"))
        send(self._pipe, str(path))
        for _ in request.clients:
            send(self._pipe, NEXT)
            yield read_answer(Path(self._receive()))

    def _receive(self) -> Any:
        try:
            return receive(self._pipe)
        except EOFError as error:
            raise ConnectionError("Flower's ServerApp has ended") from error


def serve(pipe: Connection, clients: Clients) -> None:
    """Answer the requests that arrive at ``pipe`` with the answers of ``clients``, until the stage ends.

    When the process at the other end dies or is interrupted, this one ends at once: nobody waits for its answers.
    """
    requests: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(request := receive(pipe))
                if request == END:
                    return
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, daemon=True).start()
    path, answers = Path(), iter(list[Reply | Failure]())
    while (request := requests.get()) != END:
        if request == NEXT:
            answer = next(answers)
            try:
                write_answer(path.with_name("answer"), answer)
            except SafetensorError as error:  # the names of arrays and metrics are the client's: of any length
                write_answer(path.with_name("answer"), Failure(answer.client, f"its answer is not passed on: {error}"))
            send(pipe, str(path.with_name("answer")))
        else:
            path = Path(request)
            header, arrays = read(path)
            path.unlink()
            answers = clients.ask(**header, arrays=arrays)
