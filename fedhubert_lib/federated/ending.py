"""The last message of a training: clients free what only another round would need."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import ClientHome


def forget(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Handler: drop all that is kept of the message's session, but personal heads."""
    for file in (home.state / f"session-{config['session']}").glob("*.safetensors"):
        if not file.name.startswith("personal-"):
            file.unlink()
    return {}, {}


handlers.HANDLERS |= {"pretrain.forget": forget, "distill.forget": forget}
