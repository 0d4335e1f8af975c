"""What a study may add to the rounds: a hook is one file with what runs at the client, and what runs at the server.

At a client a hook is a generator: what stands before its ``yield`` happens before the local steps, what stands after it
to the change that they made (``local.Update``). At the server it is a ``Hook``, called at five points of a round.
``local.HOOKS`` and ``rounds.HOOKS`` list them, in their order, with the parameters that choose them.
"""

from typing import TYPE_CHECKING

from fedhubert_lib.federated.protocol import Arrays

if TYPE_CHECKING:
    from fedhubert_lib.federated.optimisers import Collector
    from fedhubert_lib.federated.rounds import Round, Server


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
