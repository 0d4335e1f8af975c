"""What the server does with its clients' updates: collect them one at a time, then step.

An update is a client's parameters after its local steps minus the global ones, float32 throughout. Replies arrive in
the fixed order of client ids, so results do not depend on who was faster. The mean is a running one: the server holds
the weights, one collected update and the optimiser's moments, whatever the size of the cohort. Trimmed mean and median
need all updates at once: these wait on disk and are read back a stretch at a time.

The state of an optimiser is a flat dict of tensors, so that it can be saved beside the weights.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.params import Federation

CONTROL = "control/"
"""Prefix of the tensors that are SCAFFOLD's control variates, on the way down (c) and up (the change of c_i)."""

STRETCH = 1 << 22
"""Values of one tensor that are sorted over clients at a time: 16 MiB per client."""
BLOCK = 1 << 17
"""Values that are stepped at a time: what several passes touch stays in the cache."""


class UpdateError(ValueError):
    """An update that cannot be used: it does not fit the model, or holds a NaN or an infinity."""


class Collector(Protocol):
    """Takes one update at a time and gives what the server steps along."""

    def add(self, update: Arrays, weight: float) -> None:
        """Take ``update``: its tensors may be kept and overwritten."""

    def result(self) -> Arrays:
        """The collected update; the collector is spent."""


def checked_norm(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of ``update``, all tensors together.

    Raises UpdateError when its names, shapes or dtypes are not those of ``like``, or a value is not finite.
    """
    if update.keys() != like.keys():
        missing, surplus = sorted(like.keys() - update.keys()), sorted(update.keys() - like.keys())
        raise UpdateError(f"the update lacks {missing[:3]} and has {surplus[:3]} that the model has not")
    for name, tensor in update.items():
        if tensor.shape != like[name].shape or tensor.dtype != torch.float32:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UpdateError(f"{name} of the update is {found}, not torch.float32 {tuple(like[name].shape)}")
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in update.values()))
    if not math.isfinite(norm):
        raise UpdateError("the update holds a NaN or an infinity")
    return norm


class Mean:
    """The weighted mean of the updates, running, in float32."""

    def __init__(self) -> None:
        self._mean: Arrays = {}
        self._weight = 0.0

    def add(self, update: Arrays, weight: float) -> None:
        """Move the mean towards ``update`` by its share of the weight so far. ``weight`` above 0."""
        self._weight += weight
        if not self._mean:
            self._mean = dict(update)
            return
        for name, mean in self._mean.items():
            mean.lerp_(update[name], weight / self._weight)

    def result(self) -> Arrays:
        """The mean."""
        return self._mean


class Sorted:
    """Coordinate-wise trimmed mean, or median, of the updates (Yin et al. 2018, arXiv 1803.01498), without weights.

    ``trim`` is the share left out at each end, rounded down to whole clients but at least one where three or more
    answered; 0.5 is the median. Updates wait in ``folder`` as one safetensors file each, which is removed at the end.
    """

    def __init__(self, trim: float, folder: Path) -> None:
        self._trim, self._folder = trim, folder
        self._files: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, update: Arrays, weight: float) -> None:
        """Put ``update`` on disk."""
        path = self._folder / f"update-{len(self._files):06d}.safetensors"
        save_file(update, path)
        self._files.append(path)

    def result(self) -> Arrays:
        """The trimmed mean or median of all, then the files are gone."""
        opened = [safe_open(path, "pt") for path in self._files]
        result = {name: self._reduce([file.get_slice(name) for file in opened]) for name in sorted(opened[0].keys())}
        del opened
        for path in self._files:
            path.unlink()
        self._folder.rmdir()
        return result

    def _reduce(self, slices: list) -> Tensor:
        count = len(slices)
        lowest = (count - 1) // 2 if self._trim == 0.5 else min(max(int(self._trim * count), 1), (count - 1) // 2)
        shape = slices[0].get_shape()
        rows = max(1, STRETCH // max(1, math.prod(shape[1:])))
        pieces = []
        for start in range(0, shape[0], rows):
            values = torch.stack([piece[start : start + rows] for piece in slices]).sort(0).values
            pieces.append(values[lowest : count - lowest].mean(0))
        return torch.cat(pieces)


def collector(p: Federation, folder: Path) -> Collector:
    """What ``p.server`` collects updates with; ``folder`` is for those that must wait on disk."""
    if p.server == "trimmed-mean":
        return Sorted(p.server_trim, folder)
    if p.server == "median":
        return Sorted(0.5, folder)
    return Mean()


def initial_state(p: Federation, weights: Mapping[str, Tensor]) -> Arrays:
    """The optimiser's tensors before round 1, named ``moment/NAME``."""

    def moment(moment_name: str, value: float) -> Arrays:
        return {f"{moment_name}/{name}": torch.full_like(tensor, value) for name, tensor in weights.items()}

    match p.server:
        case "fedavgm":
            return moment("first", 0.0)
        case "fedadam":
            return moment("first", 0.0) | moment("second", 0.0)
        case "fedyogi" | "fedadagrad":  # Reddi et al.: v starts at tau squared
            return moment("first", 0.0) | moment("second", p.server_tau**2)
        case "scaffold":
            return {CONTROL + name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return {}


def step(p: Federation, weights: Arrays, update: Arrays, state: Arrays, number: int) -> None:
    """Move ``weights`` along ``update``, in place; ``number`` counts steps from 1. ``update`` is used up.

    fedavg, trimmed-mean, median, scaffold: rate x update. fedavgm (Hsu et al. 2019): momentum. fedadam, fedyogi,
    fedadagrad: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2. FedAdam corrects both moments' bias by 1 - beta^t
    with t from 1 and starts v at 0, as Adam does: the first step is rate x sign(update) where |update| >> tau.
    """
    moments = [moment for moment in ("first", "second") if any(name.startswith(f"{moment}/") for name in state)]
    for name, weight in weights.items():
        tensors = [weight, update.pop(name), *(state[f"{moment}/{name}"] for moment in moments)]
        for parts in zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True):
            _step_block(p, number, *parts)


def _step_block(
    p: Federation, number: int, weight: Tensor, delta: Tensor, first: Tensor | None = None, second: Tensor | None = None
) -> None:
    rate, beta1, beta2 = p.server_rate, p.server_momentum, p.server_beta2
    if p.server == "fedavgm":
        weight.add_(first.mul_(beta1).add_(delta), alpha=rate)
        return
    if second is None:
        weight.add_(delta, alpha=rate)
        return
    first.lerp_(delta, 1 - beta1)
    square = delta.square_()
    correction1 = correction2 = 1.0
    if p.server == "fedadam":
        second.lerp_(square, 1 - beta2)
        correction1, correction2 = 1 - beta1**number, 1 - beta2**number
    elif p.server == "fedyogi":
        second.addcmul_(square, torch.sign(second - square), value=-(1 - beta2))
    else:
        second.add_(square)
    # The square is not needed any more: its memory holds the denominator.
    denominator = torch.div(second, correction2, out=square).sqrt_().add_(p.server_tau)
    weight.addcdiv_(first, denominator, value=rate / correction1)


def step_control(state: Arrays, change: Arrays, share: float) -> None:
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): c moves by the cohort's mean change of the c_i (by name of
    parameter), times the share of all clients that answered."""
    for name, value in change.items():
        state[CONTROL + name].add_(value, alpha=share)
