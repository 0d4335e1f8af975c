"""The best round so far, whose checkpoint is kept beside the last one's, and after which ``patience`` is counted."""

from collections.abc import Mapping
from typing import Any

from fedhubert_lib.federated.hooks import Hook

UNJUDGED = {"best_round": 0, "best_loss": None, "validations_since_best": 0, "validated": False}
"""State before any round was judged."""


class Judging(Hook):
    """The server: judge a round by the clients that validated in it and in the best one so far: where some failed, the
    others' loss is no measure for it."""

    def __init__(self, server) -> None:
        super().__init__(server)
        server.state |= UNJUDGED | {"panel": {}}

    def save(self, round, row: Mapping[str, Any]) -> None:
        state, panel = self.server.state, round.panel
        best = state["panel"]
        if best and panel:
            if not (both := sorted(best.keys() & panel.keys())):
                return
            then, now = (round.validation({client: metrics[client] for client in both}) for metrics in (best, panel))
            state["best_loss"], row = then["validation_loss"], {**row, **now}
        judge(state, round.number, row)
        if state["best_round"] == round.number:
            state["panel"] = panel


def judge(state: dict[str, Any], number: int, row: Mapping[str, Any]) -> None:
    """Note whether round ``number`` is the best: by validation loss, or by training loss if none validates."""
    validated = "validation_loss" in row
    if not validated and state["validated"]:
        return
    loss = row["validation_loss"] if validated else row["loss"]
    first = validated and not state["validated"]  # a training loss is no measure for it
    if state["best_loss"] is None or first or loss < state["best_loss"]:
        state |= {"best_loss": loss, "best_round": number, "validations_since_best": 0, "validated": validated}
    else:
        state["validations_since_best"] += validated
