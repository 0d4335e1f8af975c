"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates take the clients' drift out of the gradients.

The server's variate c travels with the weights, as tensors ``control/NAME``; a client adds c - c_i to each gradient and
sends the change of its own c_i with its update. Personal parameters have none. c stays the mean of the c_i, in which
clients count alike: a client takes up its c_i of the last round in which its answer counted, which the server says.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedhubert_lib import training
from fedhubert_lib.federated import client_state, optimisers
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.protocol import Arrays

CONTROL = "control/"


def corrected(update: Update) -> Iterator[None]:
    """The client: correct its gradients by c - c_i; send the change of c_i.

    Option II: c_i+ = c_i - c + (x - y) / (K eta). For plain SGD (x - y) / (K eta) is the mean of the gradients stepped
    along; under AdamW that mean is taken itself.
    """
    common = {name: update.arrays[CONTROL + name] for name in update.names if CONTROL + name in update.arrays}
    local = client_state.load(update.home, update.config, "control")
    if local is None and update.config.get("counted", {}).get(update.home.client):
        raise ValueError("its control variate is gone, which the mean of all still holds: restore its folder session-*")
    gradients: Arrays = {}
    offsets = {name: (c - local[name] if local else c).to(update.names[name].device) for name, c in common.items()}

    def correct(factor: float) -> None:
        for name, offset in offsets.items():
            training.gradient(update.names[name]).add_(offset, alpha=factor)

    def add_up(*_: object) -> None:
        for name in offsets:
            gradient = update.names[name].grad.detach()
            gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient.clone()

    update.adjust.append(correct)
    update.optimiser.register_step_pre_hook(add_up)
    yield
    change = {name: (gradients[name] / update.measured["steps"]).cpu() - c for name, c in common.items()}
    new = {name: value + local[name] if local else value.clone() for name, value in change.items()}
    client_state.save(update.home, update.config, "control", new)
    update.change |= {CONTROL + name: value for name, value in change.items()}


class Control(Hook):
    """The server: send c, and move it by the mean change of the c_i times the fraction of clients that answered."""

    def __init__(self, server) -> None:
        super().__init__(server)
        self.control = {CONTROL + name: torch.zeros_like(weight) for name, weight in server.weights.items()}
        server.tensors |= self.control

    def message(self, round) -> None:
        state = self.server.state
        # A checkpoint of an earlier version has none: all answers before it count.
        counted = state.setdefault("counted", {} if state["round"] else dict.fromkeys(self.server.clients.ids, 0))
        round.payload |= self.control
        round.message["counted"] = {client: counted[client] for client in round.asked if client in counted}

    def collector(self, round) -> optimisers.Collector:
        # Clipped gradients take c_i no farther, and rounding not twice as far.
        return _Means(2 * (self.p.clip_norm + optimisers.checked_norm(self.control, self.control)))

    def step(self, round, update: dict[str, Tensor]) -> None:
        self.server.state["counted"] |= dict.fromkeys(round.clients, round.number)
        fraction = len(round.clients) / len(self.server.clients.ids)
        for name, control in self.control.items():
            control.add_(update.pop(name), alpha=fraction)


class _Means(optimisers.Collector):
    """The mean of the updates as they weigh, and beside it that of the changes of the c_i, which count alike."""

    def __init__(self, farthest: float) -> None:
        super().__init__()
        self._changes, self._farthest = optimisers.Collector(), farthest

    def norm(self, update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
        """That of the weights' change. A change of c_i that is too large is refused."""
        optimisers.check(update, like)
        parts = [{n: t for n, t in update.items() if n.startswith(CONTROL) == of_control} for of_control in (0, 1)]
        norm, moved = (optimisers.checked_norm(part, part) for part in parts)
        if moved > self._farthest:
            raise optimisers.UpdateError("its control variate moved farther than gradients of clip_norm carry it")
        return norm

    def add(self, update: Arrays, weight: float) -> None:
        self._changes.add({name: update.pop(name) for name in list(update) if name.startswith(CONTROL)}, 1.0)
        super().add(update, weight)

    def result(self) -> Arrays:
        return super().result() | self._changes.result()
