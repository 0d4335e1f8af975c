"""What the server does with its clients' updates: collect them one at a time, then step.

An update is a client's parameters after its local steps minus the global ones, float32 throughout. Replies arrive in
the fixed order of client ids, so results do not depend on who was faster. The mean is a running one: the server holds
the weights and one collected update, whatever the size of the cohort. Trimmed mean and median need all updates at once:
these wait on disk and are read back a stretch at a time. The moments of adaptive optimisers, two models in size, are
needed for a moment in each round: they stay in the file of the last checkpoint.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
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


BOTH = ("first", "second")
MOMENTS = {"fedavgm": ("first",), "fedadam": BOTH, "fedyogi": BOTH, "fedadagrad": BOTH}
"""What each adaptive optimiser keeps of a parameter."""


class Moments:
    """What an adaptive optimiser keeps of earlier updates: in a file, read one tensor at a time.

    The file is a safetensors one, of float32 tensors named ``first/NAME`` and ``second/NAME``. It is read with plain
    reads: pages of a mapped file would count as this process's memory.
    """

    def __init__(self, p: Federation, file: Path | None, weights: Mapping[str, Tensor]) -> None:
        """Those of ``weights`` in ``file``, or as they are before round 1.

        Raises OSError or ValueError where the file does not read, or is not of these parameters.
        """
        self._p, self._file = p, file
        self.names = MOMENTS.get(p.server, ())
        self._places: dict[str, int] = {}
        if file is None or not self.names:
            return
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        wanted = {f"{moment}/{name}": tensor for name, tensor in weights.items() for moment in self.names}
        if not isinstance(header, dict) or header.keys() - {"__metadata__"} != wanted.keys():
            raise ValueError(f"{file} does not hold {' and '.join(self.names)} moments of this model's parameters")
        content = sum(4 * tensor.numel() for tensor in wanted.values())
        if size != 8 + length + content:
            raise ValueError(f"{file} has {size} bytes instead of {8 + length + content}")
        for key, tensor in wanted.items():
            match header[key]:
                case {"dtype": "F32", "data_offsets": [int(first), int(last)]} if (
                    0 <= first == last - 4 * tensor.numel() and last <= content
                ):
                    self._places[key] = 8 + length + first
                case _:
                    raise ValueError(f"{file}: {key} is not {tensor.numel()} values of float32 in it")

    def before(self, name: str, like: Tensor) -> list[Tensor]:
        """The moments of the parameter ``name``, flat, as the last step left them."""
        if self._file is None:  # Reddi et al.: v starts at tau squared, but Adam's at 0
            second = 0.0 if self._p.server == "fedadam" else self._p.server_tau**2
            return [torch.full((like.numel(),), {"first": 0.0, "second": second}[moment]) for moment in self.names]
        found = []
        with self._file.open("rb", buffering=0) as stream:
            for moment in self.names:
                values = torch.empty(like.numel())
                if _read_into(stream, self._places[f"{moment}/{name}"], values) != 4 * len(values):
                    raise OSError(f"{self._file}: {moment}/{name} cannot be read; delete the folder of this round")
                found.append(values)
        return found

    def write(self, file: Path, update: Mapping[str, Tensor]) -> None:
        """Write the moments after a step along ``update`` to ``file``; where there are none, a file of none."""
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
                for parts in _blocks(delta, *values):
                    _advance(self._p, *parts)
                for moment in values:
                    stream.write(memoryview(moment.numpy()))


def _read_into(stream: io.FileIO, offset: int, values: Tensor) -> int:
    """Fill ``values`` from ``offset`` of ``stream`` on; how many bytes there were."""
    wanted = memoryview(values.numpy()).cast("B")
    done = 0
    while done < len(wanted) and (count := os.preadv(stream.fileno(), [wanted[done:]], offset + done)):
        done += count
    return done


def step(p: Federation, weights: Arrays, update: Mapping[str, Tensor], moments: Moments, number: int) -> None:
    """Move ``weights`` along ``update``, in place; ``number`` counts steps from 1.

    fedavg, trimmed-mean, median, scaffold: rate x update. fedavgm (Hsu et al. 2019): momentum. fedadam, fedyogi,
    fedadagrad: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2. FedAdam corrects both moments' bias by 1 - beta^t
    with t from 1 and starts v at 0, as Adam does: the first step is rate x sign(update) where |update| >> tau.
    """
    for name, weight in weights.items():
        for parts in _blocks(weight, update[name], *moments.before(name, weight)):
            _step_block(p, number, *parts)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same stretch of each of ``tensors``, one stretch after another."""
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def _step_block(p: Federation, number: int, weight: Tensor, delta: Tensor, *moments: Tensor) -> None:
    if not moments:
        weight.add_(delta, alpha=p.server_rate)
        return
    _advance(p, delta, *moments)
    first, *rest = moments
    if not rest:
        weight.add_(first, alpha=p.server_rate)
        return
    correction1 = correction2 = 1.0
    if p.server == "fedadam":
        correction1, correction2 = 1 - p.server_momentum**number, 1 - p.server_beta2**number
    denominator = torch.div(rest[0], correction2).sqrt_().add_(p.server_tau)
    weight.addcdiv_(first, denominator, value=p.server_rate / correction1)


def _advance(p: Federation, delta: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """What ``delta`` makes of the moments, in place."""
    if second is None:
        first.mul_(p.server_momentum).add_(delta)
        return
    first.lerp_(delta, 1 - p.server_momentum)
    square = delta.square()
    if p.server == "fedadam":
        second.lerp_(square, 1 - p.server_beta2)
    elif p.server == "fedyogi":
        second.addcmul_(square, torch.sign(second - square), value=-(1 - p.server_beta2))
    else:
        second.add_(square)


def step_control(state: Arrays, change: Arrays, share: float) -> None:
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): c moves by the cohort's mean change of the c_i (by name of
    parameter), times the share of all clients that answered."""
    for name, value in change.items():
        state[CONTROL + name].add_(value, alpha=share)
