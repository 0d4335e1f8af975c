"""Messages between processes of one machine: a safetensors file, with the rest as JSON in its metadata.

A reader maps the file and copies nothing; what it changes is its own, and the file may be removed while it is in use.
Files lie in a temporary folder (TMPDIR names another place); paths and small news travel as JSON over a pipe.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedhubert_lib.federated.protocol import Failure, Reply


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write ``header`` (JSON-like) and ``arrays`` (CPU) to a new file."""
    metadata = {"header": json.dumps(dict(header)), "names": json.dumps(list(arrays))}
    save_file({name: tensor.detach().contiguous() for name, tensor in arrays.items()}, path, metadata)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``write`` wrote, tensors in the same order."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in json.loads(metadata["names"])}
    return json.loads(metadata["header"]), arrays


def write_answer(path: Path, answer: Reply | Failure) -> None:
    """Write a client's answer."""
    if isinstance(answer, Failure):
        write(path, {"client": answer.client, "reason": answer.reason}, {})
    else:
        write(path, {"client": answer.client, "metrics": dict(answer.metrics)}, answer.arrays)


def read_answer(path: Path) -> Reply | Failure:
    """Read, and remove, the file that ``write_answer`` wrote."""
    header, arrays = read(path)
    path.unlink()
    return Failure(**header) if "reason" in header else Reply(**header, arrays=arrays)


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder for messages, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="fedhubert-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def send(pipe: Connection, document: Any) -> None:
    """Send a JSON document."""
    pipe.send_bytes(json.dumps(document).encode())


def receive(pipe: Connection) -> Any:
    """Wait for a JSON document. Raises EOFError or OSError when the other end is gone."""
    return json.loads(pipe.recv_bytes())
