"""What a client keeps between rounds: personal heads, optimiser moments, control variates, error feedback.

Kept under the session (one start of a study) and the round that wrote it. A server that dies goes on from its last
durable checkpoint and asks for a round again: the client then starts from what it had before that round, and writes the
same.

The message's configuration says where it stands: ``session``, ``round``, and ``durable``, the last round that the
server has on disk.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import files
from fedhubert_lib.federated.protocol import Arrays, ClientHome


def load(home: ClientHome, config: Mapping[str, Any], name: str) -> Arrays | None:
    """The tensors called ``name`` from the last round before this one that this client had a part in, else None."""
    earlier = [number for number in _rounds(home, config, name) if number < config["round"]]
    return load_file(_path(home, config, name, max(earlier))) if earlier else None


def save(home: ClientHome, config: Mapping[str, Any], name: str, arrays: Mapping[str, Tensor]) -> None:
    """Keep ``arrays`` as ``name`` of this round, and drop what no repeated round can need: all before the newest
    durable one, and other sessions.
    """
    for session in home.state.glob("session-*"):
        if session.name != f"session-{config['session']}":
            shutil.rmtree(session)
    with files.atomic(_path(home, config, name, config["round"])) as temporary:
        save_file(dict(arrays), temporary)
    numbers = _rounds(home, config, name)
    needed = max((number for number in numbers if number <= config["durable"]), default=0)
    for number in numbers:
        if number < needed:
            _path(home, config, name, number).unlink()


def _path(home: ClientHome, config: Mapping[str, Any], name: str, number: int) -> Path:
    return home.state / f"session-{config['session']}" / f"{name}-{number:06d}.safetensors"


def _rounds(home: ClientHome, config: Mapping[str, Any], name: str) -> list[int]:
    folder = home.state / f"session-{config['session']}"
    return [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*.safetensors")]
