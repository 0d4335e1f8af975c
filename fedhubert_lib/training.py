"""One local update: some optimiser steps of one client. Pretraining and distillation share it.

AdamW with fairseq's settings and its schedule over the GLOBAL step count, so that a client drawn in round 40 trains at
round 40's rate. The gradient is that of the summed objective divided by its count (masked frames), clipped.
"""

import contextlib
import ctypes
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from fedhubert_lib import resources
from fedhubert_lib.batching import Batch
from fedhubert_lib.objectives import Sums
from fedhubert_lib.params import Federation

Objective = Callable[[Batch, float], Sums]
"""(batch, fraction of all steps of the study that are done) to what is minimised."""
Adjust = Callable[[float], None]
"""Adds to the gradients, which are still to be divided by the argument: adds its part times that."""


class DivergedError(RuntimeError):
    """A loss or gradient that is not finite; the message names the batch."""


EPS, BETAS = 1e-6, (0.9, 0.98)  # AdamW's, as fairseq's
CHECK_EVERY = 50
"""Steps after which a GPU is asked whether all gradients were finite: each question makes it wait."""

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # reproducible sums; read when CUDA is first used


def rate(peak: float, warmup_fraction: float, step: int, total_steps: int) -> float:
    """Learning rate of global ``step`` (from 0): linear warm-up to the peak, then linear decay towards 0 at the end."""
    warmup = round(warmup_fraction * total_steps)
    return peak * (step + 1) / warmup if step < warmup else peak * (total_steps - step) / max(total_steps - warmup, 1)


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones instead of giving it back to the system.

    A step allocates what the step before it has freed, hundreds of MB; mapped anew each time, the kernel clears all of
    it page by page, which took a tenth of a small model's step. Only glibc can be told; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which freeing would undo
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may stay free at the end of the heap


def local_update(
    module: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    p: Federation,
    *,
    first_step: int,
    total_steps: int,
    seed: int,
    accumulate: int = 1,
    optimiser: torch.optim.Optimizer | None = None,
    adjust: Sequence[Adjust] = (),
) -> dict[str, float]:
    """Train ``module`` in place on ``batches`` and return what was measured.

    Args:
        module, batches, p: all that trains, on its device; ``accumulate`` batches make a step, by ``p``'s schedule.
        first_step, total_steps: where in the global schedule this update stands.
        seed: of dropout and layerdrop (``seeds.derive(seed, round, client, "dropout")``); sets torch's global stream.
        optimiser, adjust: a new ``adamw``; what is added to gradients before they are clipped (see ``gradient``).

    Returns sums of the objective's ``measured``, objective_count, steps, audio_seconds, seconds, waiting_seconds (for
    data), gradient_norm (mean, before clipping), learning_rate (last). Same seed, batches and threads: same weights, on
    a GPU, too. A step that is not finite leaves weights as they are: DivergedError.
    >>> local_update(module, [batch] * 4, objective, p, first_step=0, total_steps=4, seed=0)["steps"]
    4.0
    """
    keep_freed_memory()
    device, optimiser = next(module.parameters()).device, optimiser or adamw(module, p)
    module.train().zero_grad()
    torch.manual_seed(seed)
    tally, stream, began = _Tally(1 if device.type == "cpu" else CHECK_EVERY), iter(batches), time.perf_counter()
    while group := tally.group(stream, accumulate):
        number = first_step + tally.steps
        with reproducible(device):
            count = unit = 0
            for batch in group:
                with resources.autocast(device, p.precision):
                    sums = objective(batch.to(device), number / total_steps)
                unit = unit or max(sums.count, 1)
                (sums.loss / unit).backward()
                count += sums.count
                tally.add(batch, sums)
            if not count:
                raise ValueError(f"nothing to learn from in {_names(group)}: the objective counted no frame")
            # Gradients were divided by the first batch's count. The rest, where there are more, goes with clipping.
            for add in adjust:
                add(count / unit)
            norm = _clip(module.parameters(), count / unit, p.clip_norm)
            for parameter_group in optimiser.param_groups:
                parameter_group["lr"] = rate(p.learning_rate, p.warmup_fraction, number, total_steps)
            tally.step(number, norm, group)
            if device.type != "cpu":  # where it is not seen before the step: AdamW then leaves the weights as they are
                optimiser.found_inf = (~norm.isfinite()).float()
            optimiser.step()
            optimiser.zero_grad()
    if not tally.steps:
        raise ValueError("no batch to train on")
    measured = tally.result()  # a GPU is done then
    return measured | {"seconds": time.perf_counter() - began, "learning_rate": optimiser.param_groups[0]["lr"]}


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of ``parameter``, to be added to: zeros where layerdrop left its layer out."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _clip(parameters: Iterable[Tensor], rest: float, limit: float) -> Tensor:
    """Divide the gradients by ``rest`` and clip their norm to ``limit``; the norm before clipping, on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / rest
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1) / rest
    if norm.device.type != "cpu" or factor != 1:  # to ask a GPU takes longer than a pass over all gradients
        torch._foreach_mul_(gradients, factor)
    return norm


class _Tally:
    """What steps measured: sums stay on the device, norms are fetched once in ``check_every`` steps."""

    def __init__(self, check_every: int) -> None:
        self.check_every = check_every
        self.totals: dict[str, Tensor] = {}
        self.steps, self.count, self.audio_seconds, self.waiting, self.norms = 0, 0, 0.0, 0.0, 0.0
        self.pending: list[tuple[int, Tensor, str]] = []

    def group(self, stream: Iterator[Batch], size: int) -> list[Batch]:
        """The next ``size`` batches, or what is left; the time that they took to come is counted."""
        asked = time.perf_counter()
        group = list(islice(stream, size))
        self.waiting += time.perf_counter() - asked
        return group

    def add(self, batch: Batch, sums: Sums) -> None:
        """Count a batch."""
        self.count += sums.count
        self.audio_seconds += batch.seconds
        for name, value in sums.measured.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.double()

    def step(self, number: int, norm: Tensor, group: Sequence[Batch]) -> None:
        """Count a step; raise DivergedError when one of the last was not finite."""
        self.steps += 1
        self.pending.append((number, norm, _names(group)))  # not the batches, which are pinned memory on a GPU
        if len(self.pending) == self.check_every:
            self.settle()

    def settle(self) -> None:
        """Fetch the norms of the steps since the last time."""
        norms = torch.stack([norm for _, norm, _ in self.pending]).tolist() if self.pending else ()
        for (number, _, names), norm in zip(self.pending, norms, strict=True):
            if not math.isfinite(norm):
                raise DivergedError(
                    f"the gradient's norm is {norm} at global step {number}, batch {names}; listen to these"
                    " clips, or lower the learning rate"
                )
            self.norms += norm
        self.pending.clear()

    def result(self) -> dict[str, float]:
        """All of it; waits for the device."""
        self.settle()
        return {name: float(value) for name, value in self.totals.items()} | {
            "objective_count": float(self.count),
            "steps": float(self.steps),
            "audio_seconds": self.audio_seconds,
            "waiting_seconds": self.waiting,
            "gradient_norm": self.norms / self.steps,
        }


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Let a GPU choose algorithms that give the same numbers twice; a CPU always does. Memory stays uninitialised."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def adamw(module: nn.Module, p: Federation) -> torch.optim.AdamW:
    """The client's optimiser, fused: one pass over the parameters."""
    settings = {"lr": p.learning_rate, "betas": BETAS, "eps": EPS, "weight_decay": p.weight_decay}
    return torch.optim.AdamW(module.parameters(), **settings, fused=True)


@torch.no_grad()
def evaluate(module: nn.Module, batches: Iterable[Batch], objective: Objective, precision: str) -> dict[str, float]:
    """Sums of ``objective``, as at the end of a study, over ``batches`` in eval mode: keys as in ``Sums.measured``."""
    device = next(module.parameters()).device
    module.eval()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        with resources.autocast(device, precision):
            sums = objective(batch.to(device), 1.0)
        for name, value in sums.measured.items():
            totals[name] = totals.get(name, 0.0) + value.double()
    return {name: float(value) for name, value in totals.items()}


def _names(group: Sequence[Batch]) -> str:
    return "; ".join(", ".join(batch.utterances) for batch in group)
