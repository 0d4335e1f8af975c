"""What a study may add to the rounds: a hook is one file with what runs at the client, and what runs at the server.

At a client a hook is a generator: what stands before its ``yield`` happens before the local steps, what stands after it
to the change that they made (``Update``). At the server it is a ``Hook``, called at five points of a round.
``HOOKS`` lists them in the clients' order; a study imports those alone that its parameters choose. A hook that changes
the update itself stands above ``moments``: those below add tensors to it, then noise, masks or codes, and ``privacy``
keeps back the metrics of hooks above it alone. Draws come from ``seeds`` by (seed, round, client, purpose), never from
torch's global stream.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedhubert_lib import training
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.params import Federation

if TYPE_CHECKING:
    from fedhubert_lib.federated.optimisers import Collector
    from fedhubert_lib.federated.rounds import Round, Server

HOOKS: Sequence[tuple[str, str, Callable[[Federation], bool]]] = (
    ("", "robust:SortedUpdates", lambda p: p.server in ("trimmed-mean", "median")),
    ("client_state:personal", "", lambda p: True),
    ("moments:carried", "", lambda p: p.local_state != "reset"),
    ("", "moments:Sharing", lambda p: p.local_state == "cohort"),
    ("fedprox:proximal", "", lambda p: p.proximal > 0),
    ("scaffold:corrected", "scaffold:Control", lambda p: p.server == "scaffold"),
    ("privacy:protected", "privacy:Bounding", lambda p: p.privacy != "none"),
    ("secure:masked", "secure:Summing", lambda p: p.secure_aggregation),
    ("compression:encoded", "compression:Decoding", lambda p: p.compression != "none"),
)
"""A hook's half at clients (MODULE:FUNCTION), its half at the server (MODULE:CLASS), and whether a study chooses it."""
AT_CLIENTS = {client: needed for client, _, needed in HOOKS if client}
AT_SERVER = {server: needed for _, server, needed in reversed(HOOKS) if server}  # what clients do last is undone first


def chosen(table: Mapping[str, Callable[[Federation], bool]], p: Federation) -> Iterator[Callable[..., Any]]:
    """The functions or classes in ``table`` that ``p`` chooses."""
    return (pkgutil.resolve_name(f"fedhubert_lib.federated.{name}") for name, needed in table.items() if needed(p))


@dataclass
class Update:
    """One client's update in the making, as hooks see and change it."""

    home: ClientHome
    arrays: Mapping[str, Tensor]
    """The message's tensors."""
    config: Mapping[str, Any]
    p: Federation
    names: dict[str, nn.Parameter]
    """The module's parameters."""
    optimiser: torch.optim.Optimizer
    adjust: list[training.Adjust] = field(default_factory=list)
    """Functions that change the gradients before each step."""
    measured: dict[str, float] = field(default_factory=dict)
    """After the steps: metrics that will be sent."""
    change: Arrays = field(default_factory=dict)
    """After the steps: tensors that will be sent."""


class Hook:
    """An addition to the server's rounds. Every method does nothing unless a hook overrides it."""

    def __init__(self, server: "Server") -> None:
        """Tensors to keep in checkpoints go into ``server.tensors``, numbers into ``server.state``: the checkpoint to
        resume from is read into them afterwards."""
        self.server, self.p = server, server.p

    def draw(self, round: "Round") -> list[str] | None:
        """The cohort, in place of the usual draw."""

    def message(self, round: "Round") -> None:
        """Change ``round.message``, ``payload``, ``asked`` or ``quorum`` before updates are asked for."""

    def collector(self, round: "Round") -> "Collector | None":
        """What adds up the updates, in place of the weighted mean."""

    def received(self, round: "Round", update: Arrays) -> Arrays:
        """The update in a client's answer. Raises ``optimisers.UpdateError`` where it cannot be used."""
        return update

    def step(self, round: "Round", update: Arrays) -> None:
        """Change the collected ``update`` in place before the server optimiser steps along it."""
