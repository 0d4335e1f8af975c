"""What the server does with its clients' updates: collect them one at a time, then step.

An update is a client's parameters after its local steps minus the global ones, float32 throughout. The mean is a
running one: beside weights and moments the server holds it and the update that arrives, however large the cohort is.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedhubert_lib import training
from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.params import Federation, Server


class UpdateError(ValueError):
    """An update that cannot be used: it does not fit the model, or holds a NaN or an infinity."""


class Collector:
    """Takes one update at a time and returns what the server steps along: here the running weighted mean, float32."""

    def __init__(self) -> None:
        self._mean: Arrays = {}
        self._weight = 0.0

    def norm(self, update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
        """The norm of ``update``; NaN where it cannot be seen. Raises UpdateError where it does not fit ``like``."""
        return checked_norm(update, like)

    def add(self, update: Arrays, weight: float) -> None:
        """Take ``update``: its tensors may be kept and overwritten. ``weight`` is above 0."""
        self._weight += weight
        if not self._mean:
            self._mean = dict(update)
            return
        for name, mean in self._mean.items():
            mean.lerp_(update[name], weight / self._weight)

    def result(self) -> Arrays:
        """The collected update; the collector is spent. Empty where nothing was added."""
        return self._mean


def check(update: Mapping[str, Tensor], like: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Raise UpdateError unless ``update`` has the names and shapes of ``like``, and ``dtype``."""
    if update.keys() != like.keys():
        missing, surplus = sorted(like.keys() - update.keys()), sorted(update.keys() - like.keys())
        raise UpdateError(f"the update lacks {missing[:3]} and has {surplus[:3]}, which the model does not have")
    for name, tensor in update.items():
        if tensor.shape != like[name].shape or tensor.dtype != dtype:
            actual, expected = f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype} {tuple(like[name].shape)}"
            raise UpdateError(f"{name} of the update is {actual}, not {expected}")


def checked_norm(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of ``update``, all tensors together. Raises UpdateError as ``check``, and for NaN and
    infinity."""
    check(update, like)
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in update.values()))
    if not math.isfinite(norm):
        raise UpdateError("the update holds a NaN or an infinity")
    return norm


# Server optimisers: functions of (parameters, rate, number of the step from 1, weight, update, moments ...) that change
# weight and moments in place. To add one: docs/architecture.md.


def fedavg(p: Server, rate: float, number: int, weight: Tensor, update: Tensor) -> None:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): rate x update; rate 1 is the mean of the clients' weights."""
    weight.add_(update, alpha=rate)


def fedavgm(p: Server, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor) -> None:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): momentum, as torch.optim.SGD's."""
    first.mul_(p.server_momentum).add_(update)
    weight.add_(first, alpha=rate)


def nesterov(p: Server, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor) -> None:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv 2311.08105): torch.optim.SGD with nesterov=True."""
    first.mul_(p.server_momentum).add_(update)
    weight.add_(update.add(first, alpha=p.server_momentum), alpha=rate)


def fedadam(p: Server, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor) -> None:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2) with Adam's start at 0 and correction of the bias by
    1 - beta^t, t from 1: the first step is rate x sign(update) where |update| >> tau."""
    first.lerp_(update, 1 - p.server_momentum)
    second.lerp_(update.square(), 1 - p.server_beta2)
    denominator = torch.div(second, 1 - p.server_beta2**number).sqrt_().add_(p.server_tau)
    weight.addcdiv_(first, denominator, value=rate / (1 - p.server_momentum**number))


def fedyogi(p: Server, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor) -> None:
    """FedYogi (Reddi et al. 2021, algorithm 2): the second moment moves by a step of the square's size."""
    first.lerp_(update, 1 - p.server_momentum)
    square = update.square()
    second.addcmul_(square, torch.sign(second - square), value=-(1 - p.server_beta2))
    weight.addcdiv_(first, second.sqrt().add_(p.server_tau), value=rate)


def fedadagrad(
    p: Server, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor
) -> None:
    """FedAdagrad (Reddi et al. 2021, algorithm 2): the second moment is the sum of all squares."""
    first.lerp_(update, 1 - p.server_momentum)
    second.add_(update.square())
    weight.addcdiv_(first, second.sqrt().add_(p.server_tau), value=rate)


BOTH = ("first", "second")
OPTIMISERS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "fedavg": (fedavg, ()),
    "scaffold": (fedavg, ()),
    "trimmed-mean": (fedavg, ()),
    "median": (fedavg, ()),
    "fedavgm": (fedavgm, ("first",)),
    "nesterov": (nesterov, ("first",)),
    "fedadam": (fedadam, BOTH),
    "fedyogi": (fedyogi, BOTH),
    "fedadagrad": (fedadagrad, BOTH),
}
"""The function that each server steps with, and the moments that it keeps of a parameter."""


def moments(p: Federation, weights: Mapping[str, Tensor]) -> Arrays:
    """The moments before round 1, such as ``first/NAME``: 0, but tau squared for Reddi et al.'s second."""
    start = {"second": p.server_tau**2} if p.server in ("fedyogi", "fedadagrad") else {}
    kept = OPTIMISERS[p.server][1]
    return {f"{kind}/{name}": torch.full_like(w, start.get(kind, 0.0)) for name, w in weights.items() for kind in kept}


def step(p: Federation, number: int, weights: Arrays, update: Mapping[str, Tensor], moments: Arrays) -> None:
    """Move ``weights`` along ``update``, and ``moments`` with them, in place; ``number`` counts steps from 1."""
    function, kept = OPTIMISERS[p.server]
    for name, weight in weights.items():
        function(p, rate(p, number), number, weight, update[name], *(moments[f"{kind}/{name}"] for kind in kept))


def rate(p: Federation, number: int) -> float:
    """The server's rate in round ``number``. ``server_schedule: clients`` rises and falls as the clients' learning rate
    does from round to round: steps of FedAdam and FedYogi do not shrink with the clients' by themselves."""
    if p.server_schedule == "constant":
        return p.server_rate
    return training.rate(p.server_rate, p.warmup_fraction, number - 1, p.rounds)
