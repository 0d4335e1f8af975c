"""What a client keeps between rounds: personal heads, optimiser moments, control variates, error feedback.

Kept under the session (one start of a study) and the round that wrote it. A server that dies resumes from its last
durable checkpoint and asks for a round again: the client then starts from what it had before that round, and writes the
same. Other sessions are left alone, since they may be resumed and nobody else has a copy: delete them by hand.

The message's configuration says where it stands: ``session``, ``round``, and ``durable``, the last round that the
server has on disk.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import files
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.hooks import Update
from fedhubert_lib.federated.protocol import Arrays, ClientHome


def load(home: ClientHome, config: Mapping[str, Any], name: str) -> Arrays | None:
    """The tensors called ``name`` from the last round before this one that this client had a part in, else None.

    What comes after the round in which its answer last ``counted``, where the server says so, is dropped: it was lost.
    Raises ValueError where the server was restored from a copy that is older than all that is kept.
    """
    earlier = {number: file for number, file in saved(home, config, name).items() if number < config["round"]}
    if not earlier and max(saved(home, config, name), default=0) > config.get("durable", 0) + 2 > 2:
        raise ValueError(
            "the server is before all rounds that are kept here: restored? To begin anew, remove session-*"
        )
    counted = config.get("counted", {}).get(home.client, config["round"])
    for number in [number for number in earlier if number > counted]:
        earlier.pop(number).unlink()
    return load_file(earlier[max(earlier)]) if earlier else None


def save(home: ClientHome, config: Mapping[str, Any], name: str, arrays: Mapping[str, Tensor]) -> None:
    """Keep ``arrays`` as ``name`` of this round, and drop what no repeated round can need: all of this session before
    the newest durable one."""
    files.sweep(_session(home, config))  # what a client that was killed while it wrote has left
    with files.atomic(_session(home, config) / f"{name}-{config['round']:06d}.safetensors") as temporary:
        save_file(dict(arrays), temporary)
        temporary.chmod(0o600)  # keys of secure aggregation are among them
    rounds = saved(home, config, name)
    needed = max((number for number in rounds if number <= config["durable"]), default=0)
    for number, file in rounds.items():
        if number < needed:
            file.unlink()


def take(home: ClientHome, config: Mapping[str, Any], name: str) -> Arrays | None:
    """The tensors called ``name`` that this client saved in this round, which are then forgotten, else None."""
    if (file := saved(home, config, name).get(config["round"])) is None:
        return None
    arrays = load_file(file)
    file.unlink()
    if not any(file.parent.iterdir()):
        file.parent.rmdir()
    return arrays


def forget(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Handler: after the last round, drop all that is kept of the message's session, but personal heads."""
    for file in _session(home, config).glob("*.safetensors"):
        if not file.name.startswith("personal-"):
            file.unlink()
    return {}, {}


handlers.HANDLERS |= {"pretrain.forget": forget, "distill.forget": forget}


def _session(home: ClientHome, config: Mapping[str, Any]) -> Path:
    return home.state / f"session-{config['session']}"


def saved(home: ClientHome, config: Mapping[str, Any], name: str) -> dict[int, Path]:
    """The files of ``name`` by round."""
    paths = _session(home, config).glob(f"{name}-*.safetensors")
    return {int(number): file for file in paths if (number := file.stem.removeprefix(f"{name}-")).isdecimal()}


def personal(update: Update) -> Iterator[None]:
    """Hook: keep the parameters that are not in the message (``head: personal``); the task loads them."""
    yield
    kept = {name: p.detach().cpu() for name, p in update.names.items() if name not in update.arrays}
    if kept:
        save(update.home, update.config, "personal", kept)
