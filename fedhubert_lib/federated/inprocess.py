"""The default engine: every client in this process, one after another, tensors by reference, one device.

Nothing is serialised and nothing waits: a client runs when the server wants its answer, so one update at most is alive
beside the server's tensors.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import Answers, Clients, Failure, Request


class InProcess(Clients):
    """Clients in this process, computing on ``device``."""

    def __init__(self, run: Path, ids: Sequence[str], device: str) -> None:
        super().__init__(ids)
        self._run, self._device = run, device

    def answers(self, request: Request) -> Answers:
        """Each client has ``timeout`` for itself, as if all worked side by side. A late one is not interrupted."""
        config = json.dumps(request.config)  # a client may change its copy, and sees what a network would carry
        for client in request.clients:
            began = time.monotonic()
            home = handlers.home(self._run, client, request.action, self._device, simulated=True)
            answer = handlers.answer(home, request.action, dict(request.arrays), json.loads(config))
            if request.timeout is not None and (seconds := time.monotonic() - began) > request.timeout:
                reason = f"answered after {seconds:.1f} s, later than the deadline of {request.timeout:.1f} s"
                answer = Failure(client, reason)
            yield answer


@contextmanager
def connect(run: Path, ids: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients of ``run`` in this process, computing on ``device``."""
    yield InProcess(run, ids, device)
