"""What stays at a client from one of its rounds to the next: parameters of its own, and its optimiser's moments."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedhubert_lib import weights
from fedhubert_lib.federated import client_state

if TYPE_CHECKING:
    from fedhubert_lib.federated.local import Update


def kept_parameters(update: "Update") -> Iterator[None]:
    """Parameters that are not in the message (``head: personal``), which the task reads back with ``client_state``."""
    yield
    personal = {name: p.detach().cpu() for name, p in update.names.items() if name not in update.arrays}
    if personal:
        client_state.save(update.home, update.config, "personal", personal)


def kept_moments(update: "Update") -> Iterator[None]:
    """``local_state: keep``: AdamW's moments."""
    saved = client_state.load(update.home, update.config, "moments")
    weights.restore_moments(update.optimiser, update.names, saved)
    yield
    client_state.save(update.home, update.config, "moments", weights.moments(update.optimiser, update.names))
