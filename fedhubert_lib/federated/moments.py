"""``local_state: cohort``: AdamW's moments travel with the weights, and fit a batch as large as the whole cohort's.

The server averages moments as it does weights (Local Adam: Cheng and Glasgow 2024, arXiv 2409.13155; Iacob et al. 2025,
arXiv 2505.22549). A client keeps nothing, and one that is seldom drawn starts from nothing old. The mean second moment
is g^2 + s^2, of a gradient g with the noise s of one client's small batches, so that the mean of M clients' steps is
shorter than a step on all their batches, which is divided by g^2 + s^2 / M. That is what clients start from here, with
the first moment for g; it makes the mean step as long as a pooled one at the same rates (docs/federation.md).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedhubert_lib import training, weights
from fedhubert_lib.federated import client_state
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.optimisers import Mean, UpdateError, checked_norm
from fedhubert_lib.federated.protocol import Arrays

PREFIX = "moments/"


def shared(update: Update) -> Iterator[None]:
    """The client: start from the moments of the message, and send those of the end; personal ones stay here."""
    received = {name.removeprefix(PREFIX): t.clone() for name, t in update.arrays.items() if name.startswith(PREFIX)}
    kept = received | (client_state.load(update.home, update.config, "moments") or {})
    names = {name: parameter for name, parameter in update.names.items() if f"{name}/step" in kept}
    weights.restore_moments(update.optimiser, names, kept)
    yield
    moments = weights.moments(update.optimiser, update.names)
    update.change |= {PREFIX + name: moments.pop(name) for name in received}
    if moments:
        client_state.save(update.home, update.config, "moments", moments)


class Sharing(Hook):
    """The server: average the moments, and send them as a batch of the whole cohort would have them."""

    def __init__(self, server) -> None:
        super().__init__(server)
        self.sent: Arrays = {}
        for name, weight in server.weights.items():
            sizes = dict.fromkeys(weights.MOMENTS, weight.shape) | {"step": ()}
            server.tensors |= {f"{PREFIX}{name}/{key}": torch.zeros(size) for key, size in sizes.items()}

    def message(self, round) -> None:
        self.sent = pooled(self._moments(), len(round.asked))
        round.payload |= self.sent

    def collector(self, round) -> Mean:
        return _Mean()

    def step(self, round, update: dict[str, Tensor]) -> None:
        averaged = {name: update.pop(name) for name in self.sent}
        for name, moment in self._moments().items():
            if name.endswith("/exp_avg_sq"):  # as if clients had started from the mean itself, not from what was sent
                step = name.replace("exp_avg_sq", "step")
                steps = float(averaged[step] - self.sent[step])
                averaged[name].add_(moment - self.sent[name], alpha=training.BETAS[1] ** steps)
        for name, moment in self._moments().items():
            moment.copy_(averaged[name])

    def _moments(self) -> Arrays:
        return {name: tensor for name, tensor in self.server.tensors.items() if name.startswith(PREFIX)}


def pooled(moments: Mapping[str, Tensor], clients: int) -> Arrays:
    """``moments``, the mean of the clients', with second moments as gradients of all ``clients``' batches have them.

    Without their bias, the first is g and the second g^2 + s^2, which becomes g^2 + s^2 / ``clients``.
    """
    sent = dict(moments)
    for name in moments if clients > 1 else ():
        if name.endswith("/exp_avg_sq") and (step := float(moments[name.replace("exp_avg_sq", "step")])):
            first, second = (1 - beta**step for beta in training.BETAS)
            square = (moments[name.replace("exp_avg_sq", "exp_avg")] / first).square_().mul_(second)
            sent[name] = (moments[name] - square).clamp_(min=0).div_(clients).add_(square)
    return sent


class _Mean(Mean):
    """The mean of updates and moments; the norm is that of the update."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _norm


def _norm(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
    checked_norm(update, like)
    moments = {name: tensor for name, tensor in update.items() if name.startswith(PREFIX)}
    for name, tensor in moments.items():
        lowest = {"exp_avg_sq": torch.zeros(()), "step": like[name]}.get(name.rpartition("/")[2], tensor)
        if bool((tensor < lowest).any()):
            raise UpdateError(f"{name} is lower than it can be: a square below 0, or fewer steps than were sent")
    change = {name: tensor for name, tensor in update.items() if name not in moments}
    return checked_norm(change, {name: like[name] for name in change})
