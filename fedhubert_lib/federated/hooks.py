"""What a study may add to the rounds: a hook is one file with what runs at the client, and what runs at the server.

At a client a hook is a generator: what stands before its ``yield`` happens before the local steps, what stands after it
to the change that they made (``Update``). At the server it is a ``Hook``, called at five points of a round.
``local.HOOKS`` and ``rounds.HOOKS`` list them, in their order, with the parameters that choose them.
"""

from collections.abc import Mapping
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
        """Tensors to keep in checkpoints go into ``server.tensors``, numbers into ``server.state``, both before the
        checkpoint to resume from is read."""
        self.server, self.p = server, server.p

    def draw(self, round: "Round") -> list[str] | None:
        """The cohort, in place of the usual draw."""

    def message(self, round: "Round") -> None:
        """Change ``round.message``, ``round.payload`` or ``round.asked`` before updates are asked for."""

    def collector(self, round: "Round") -> "Collector | None":
        """What adds up the updates, in place of the weighted mean."""

    def received(self, round: "Round", update: Arrays) -> Arrays:
        """The update in a client's answer. Raises ``optimisers.UpdateError`` where it cannot be used."""
        return update

    def step(self, round: "Round", update: Arrays) -> None:
        """Change the collected ``update`` in place before the server optimiser steps along it."""
