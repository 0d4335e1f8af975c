"""What the server does with its clients' updates: collect them one at a time, then step.

An update is a client's parameters after its local steps minus the global ones, float32 throughout. Replies arrive in
the fixed order of client ids, so results do not depend on who was faster. The mean is a running one: the server holds
the weights and one collected update, whatever the size of the cohort. Trimmed mean and median need all updates at once:
these wait on disk and are read back a stretch at a time. The moments of adaptive optimisers, two models in size, are
needed for a moment in each round: they stay in the file of the last checkpoint.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedhubert_lib import training
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


# What a server steps with: functions of (parameters, rate, number of the step from 1, weight, update, moments ...) that
# change weight and moments in place. To add one, write it, and name it in OPTIMISERS and in params.Optimiser.


def fedavg(p: Federation, rate: float, number: int, weight: Tensor, update: Tensor) -> None:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): rate x update; rate 1 is the mean of the clients' weights."""
    weight.add_(update, alpha=rate)


def fedavgm(p: Federation, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor) -> None:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): momentum, as torch.optim.SGD's."""
    first.mul_(p.server_momentum).add_(update)
    weight.add_(first, alpha=rate)


def nesterov(p: Federation, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor) -> None:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv 2311.08105): torch.optim.SGD with nesterov=True."""
    first.mul_(p.server_momentum).add_(update)
    weight.add_(update.add(first, alpha=p.server_momentum), alpha=rate)


def fedadam(
    p: Federation, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor
) -> None:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2) with Adam's start at 0 and correction of the bias by
    1 - beta^t, t from 1: the first step is rate x sign(update) where |update| >> tau."""
    first.lerp_(update, 1 - p.server_momentum)
    second.lerp_(update.square(), 1 - p.server_beta2)
    denominator = torch.div(second, 1 - p.server_beta2**number).sqrt_().add_(p.server_tau)
    weight.addcdiv_(first, denominator, value=rate / (1 - p.server_momentum**number))


def fedyogi(
    p: Federation, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor
) -> None:
    """FedYogi (Reddi et al. 2021, algorithm 2): the second moment moves by a step of the square's size."""
    first.lerp_(update, 1 - p.server_momentum)
    square = update.square()
    second.addcmul_(square, torch.sign(second - square), value=-(1 - p.server_beta2))
    weight.addcdiv_(first, second.sqrt().add_(p.server_tau), value=rate)


def fedadagrad(
    p: Federation, rate: float, number: int, weight: Tensor, update: Tensor, first: Tensor, second: Tensor
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
"""How each server steps, and the moments of a parameter that it keeps."""


def rate(p: Federation, number: int) -> float:
    """The server's rate in round ``number``. ``server_schedule: clients`` rises and falls as the clients' learning rate
    does from round to round: steps of FedAdam and FedYogi do not shrink with the clients' by themselves."""
    if p.server_schedule == "constant":
        return p.server_rate
    schedule = training.Settings(p.server_rate, warmup_steps=round(p.warmup_share * p.rounds))
    return training.rate(schedule, number - 1, p.rounds)


class Moments:
    """What an optimiser keeps of earlier updates: in a file, read one tensor at a time.

    The file is a safetensors one, of float32 tensors named ``first/NAME`` and ``second/NAME``, opened anew for each:
    pages that stay mapped would count as this process's memory.
    """

    def __init__(self, p: Federation, file: Path | None, weights: Mapping[str, Tensor]) -> None:
        """Those of ``weights`` in ``file``, or as they are before round 1.

        Raises OSError, SafetensorError or ValueError where the file does not read, or is not of these parameters.
        """
        self._p, self._file = p, file
        self._function, self.names = OPTIMISERS[p.server]
        if file is None or not self.names:
            return
        wanted = {f"{moment}/{name}": list(w.shape) for name, w in weights.items() for moment in self.names}
        with safe_open(file, "pt") as opened:
            keys = opened.keys()
            slices = {key: opened.get_slice(key) for key in keys}
            if {key: piece.get_shape() for key, piece in slices.items()} != wanted:
                raise ValueError(f"{file} does not hold {' and '.join(self.names)} moments of this model's parameters")
            if any(piece.get_dtype() != "F32" for piece in slices.values()):
                raise ValueError(f"{file} holds other moments than float32")

    def before(self, name: str, like: Tensor) -> list[Tensor]:
        """The moments of the parameter ``name``, flat, as the last step left them."""
        if self._file is None:  # Reddi et al.: v starts at tau squared, but Adam's at 0
            second = 0.0 if self._p.server == "fedadam" else self._p.server_tau**2
            return [torch.full((like.numel(),), {"first": 0.0, "second": second}[moment]) for moment in self.names]
        if not self.names:
            return []
        with safe_open(self._file, "pt") as opened:
            return [opened.get_tensor(f"{moment}/{name}").clone().view(-1) for moment in self.names]

    def step(self, weights: Mapping[str, Tensor], update: Mapping[str, Tensor], number: int) -> None:
        """Move ``weights`` along ``update``, in place; ``number`` counts steps from 1."""
        for name, weight in weights.items():
            self._advance(number, weight, update[name], self.before(name, weight))

    def write(self, file: Path, update: Mapping[str, Tensor], number: int) -> None:
        """Write the moments after step ``number``, along ``update``, to ``file``, one tensor at a time; where there are
        none, a file of none."""
        update = update if self.names else {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, delta in update.items():
            for moment in self.names:
                start, end = end, end + 4 * delta.numel()
                place = {"dtype": "F32", "shape": list(delta.shape), "data_offsets": [start, end]}
                header[f"{moment}/{name}"] = place
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, delta in update.items():
                values = self.before(name, delta)
                self._advance(number, torch.zeros_like(delta), delta, values)  # the weight has been moved already
                for moment in values:
                    stream.write(memoryview(moment.numpy()))

    def _advance(self, number: int, weight: Tensor, update: Tensor, moments: Sequence[Tensor]) -> None:
        flat = (weight.view(-1), update.view(-1), *moments)
        for block in zip(*(tensor.split(BLOCK) for tensor in flat), strict=True):
            self._function(self._p, rate(self._p, number), number, *block)


def step_control(state: Arrays, change: Arrays, share: float) -> None:
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): c moves by the cohort's mean change of the c_i (by name of
    parameter), times the share of all clients that answered."""
    for name, value in change.items():
        state[CONTROL + name].add_(value, alpha=share)
