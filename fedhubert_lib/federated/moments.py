"""AdamW's moments between a client's rounds: kept by the client (``local_state: keep``) or averaged (``cohort``).

With ``cohort`` they travel with the weights, and fit a batch as large as the whole cohort's. The server averages them
as it does weights (Local Adam: Cheng and Glasgow 2024, arXiv 2409.13155; Iacob et al. 2025, arXiv 2505.22549). A client
keeps nothing but a personal head's, and one that is seldom drawn starts from nothing old.

A mean second moment is that of one client's small batches; clients start from what one of the cohort's batches
together would be (``pooled``; docs/federation.md says why). It is an estimate: what changes the gradient for all counts
as noise, clients count alike, and in the local steps the moment drifts back to that of one client's batches.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedhubert_lib import training, weights
from fedhubert_lib.federated import client_state
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.optimisers import Collector, UpdateError, check, checked_norm
from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.params import Federation

PREFIX = "moments/"


def carried(update: Update) -> Iterator[None]:
    """The client: start from the moments in the message and from those kept here. Afterwards send those that came with
    the message, and keep the rest: a personal head's or, with ``local_state: keep``, all."""
    received = {name.removeprefix(PREFIX): t for name, t in update.arrays.items() if name.startswith(PREFIX)}
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
        self.moments: Arrays = {}
        for name, weight in server.weights.items():
            sizes = dict.fromkeys(weights.MOMENTS, weight.shape) | {"step": ()}
            self.moments |= {f"{PREFIX}{name}/{key}": torch.zeros(size) for key, size in sizes.items()}
        server.tensors |= self.moments

    def message(self, round) -> None:
        round.payload |= pooled(self.moments, len(round.asked))

    def collector(self, round) -> Collector:
        return _Mean(self.p)

    def step(self, round, update: dict[str, Tensor]) -> None:
        sent, averaged = round.payload, {name: update.pop(name) for name in self.moments}
        for name, moment in self.moments.items():
            if name.endswith("/exp_avg_sq"):  # as if clients had started from the mean itself, not from what was sent
                step = name.replace("exp_avg_sq", "step")
                steps = float(averaged[step] - sent[step])
                averaged[name].add_(moment - sent[name], alpha=training.BETAS[1] ** steps)
        for name, moment in self.moments.items():
            moment.copy_(averaged[name])


def pooled(moments: Mapping[str, Tensor], clients: int) -> Arrays:
    """``moments``, the mean of the clients', with second moments as gradients of all ``clients``' batches have them.

    Without their bias, the first is the gradient g, and the second g^2 + s^2, with the noise s of one client's batches,
    which becomes g^2 + s^2 / ``clients``.
    """
    sent = dict(moments)
    for name in moments if clients > 1 else ():
        if name.endswith("/exp_avg_sq") and (step := float(moments[name.replace("exp_avg_sq", "step")])):
            first, second = (1 - beta**step for beta in training.BETAS)
            square = (moments[name.replace("exp_avg_sq", "exp_avg")] / first).square_().mul_(second)
            sent[name] = (moments[name] - square).clamp_(min=0).div_(clients).add_(square)
    return sent


class _Mean(Collector):
    """The mean of updates and moments. Its norm is that of the update; moments are bounded, since gradients are."""

    def __init__(self, p: Federation) -> None:
        super().__init__()
        self._p = p

    def norm(self, update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
        check(update, like)
        kinds: dict[str, Arrays] = {key: {} for key in ("weights", *weights.MOMENTS)}
        for name, tensor in update.items():
            kinds[name.rpartition("/")[2] if name.startswith(PREFIX) else "weights"][name] = tensor
        first, second, steps = (kinds[key] for key in weights.MOMENTS)
        largest = 1.1 * self._p.clip_norm  # moments of a layer that layerdrop leaves out do not shrink
        taken = [float(step - like[name]) for name, step in steps.items()]
        if (
            not checked_norm(first, first) <= largest  # so written, NaN is refused, too
            or not sum(float(square.sum()) for square in second.values()) <= largest**2
            or not all(float(square.min()) >= 0 for square in second.values())
            or not all(0 <= number < self._p.local_steps + 0.5 for number in taken)  # means, rounded to float32
        ):
            raise UpdateError("its moments are not those of so many steps with gradients of at most clip_norm")
        return checked_norm(kinds["weights"], kinds["weights"])
