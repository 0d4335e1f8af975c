"""The default engine: every client in this process, one after another, tensors by reference, one device.

Nothing is serialised and nothing waits: a client runs when the server wants its answer, so one update at most is alive
beside the server's own tensors.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import Clients, Failure, Reply


class InProcess:
    """``protocol.Clients`` over clients in this process, computing on ``device``."""

    def __init__(self, run: Path, clients: Sequence[str], device: str) -> None:
        self.ids: Sequence[str] = sorted(clients)
        self._run, self._device = run, device

    def ask(
        self,
        action: str,
        *,
        arrays: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        clients: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Reply | Failure]:
        """See ``protocol.Clients.ask``. Each client has ``timeout`` for itself, as if all worked side by side.

        A late one cannot be interrupted here: the other engines stop waiting.
        """
        message = json.dumps(dict(config or {}))  # a client may change its copy, and sees what a network would carry
        for client in self.ids if clients is None else sorted(clients):
            if client not in self.ids:
                yield Failure(client, "not connected")
                continue
            began = time.monotonic()
            home = handlers.home(self._run, client, action, self._device, simulated=True)
            tensors = {name: tensor.detach() for name, tensor in (arrays or {}).items()}
            answer = handlers.answer(home, action, tensors, json.loads(message))
            if timeout is not None and (seconds := time.monotonic() - began) > timeout:
                reason = f"answered after {seconds:.1f} s, later than the deadline of {timeout:.1f} s"
                answer = Failure(client, reason)
            yield answer


@contextmanager
def connect(run: Path, clients: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients of ``run`` in this process, computing on ``device``."""
    yield InProcess(run, clients, device)
