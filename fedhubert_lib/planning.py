"""What a run will need on this machine, from one measured training step."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

import psutil
import torch
from torch import nn

from fedhubert_lib import hubert, masking, objectives, resources, seeds, training
from fedhubert_lib.audio import SAMPLE_RATE, frame_count
from fedhubert_lib.batching import Batch


@dataclass(frozen=True)
class Step:
    """One measured training step."""

    audio_seconds: float
    seconds: float
    bytes: int
    """Peak memory that the step added to what the process held before the model was made."""


@dataclass(frozen=True)
class Plan:
    """What a run will need on this machine."""

    device: str
    step: Step
    parameters: int
    steps: int
    """Optimiser steps of the whole run, over all clients."""
    workers: int
    """Processes of engine ``pool``, each on a device or on cores of its own, that take them side by side; else 1."""

    @property
    def seconds(self) -> float:
        """Expected duration of the run's training steps."""
        return self.steps * self.step.seconds / self.workers

    def __str__(self) -> str:
        step, speed = self.step, self.step.audio_seconds / self.step.seconds
        return (
            f"{self.parameters / 1e6:.1f} M parameters on {self.device}: a step of {step.audio_seconds:.0f} s of audio"
            f" takes {step.seconds:.2f} s ({speed:.0f} audio s/s) and {step.bytes / 2**30:.2f} GiB.\n"
            f"{self.steps} steps, {f'by {self.workers} workers' if self.workers > 1 else 'one after the other'}: about"
            f" {_duration(self.seconds)}."
        )


def plan(
    config: hubert.HubertConfig,
    *,
    clusters: int,
    batch_seconds: float,
    crop_seconds: float,
    steps: int,
    device: str = "cpu",
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    workers: int = 1,
) -> Plan:
    """Measure a training step and say what ``steps`` of them need. Takes two steps' time; print it before long work.

    ``workers`` of them go on side by side: on a CPU they share its memory, while each GPU has but one. Raises
    MemoryError when a step does not fit, with the largest batch that does, or when not all workers' steps do.
    """
    place = torch.device(device)
    clips = max(1, int(batch_seconds / crop_seconds))
    chosen = precision, gradient_checkpointing
    free = resources.free_memory(place)
    try:
        step = measure_step(config, clusters, clips, crop_seconds, place, *chosen)
    except torch.OutOfMemoryError:
        most = largest_batch(config, clusters, crop_seconds, device, *chosen, at_most=batch_seconds)
        raise MemoryError(f"batch_seconds {batch_seconds} does not fit on {device}; {most:.0f} does") from None
    if place.type == "cpu" and workers > 1 and workers * step.bytes > free:
        raise MemoryError(
            f"{workers} workers' steps need {workers * step.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free:"
            " set OMP_NUM_THREADS higher for fewer workers, or batch_seconds lower"
        )
    parameters = sum(p.numel() for p in hubert.Hubert(config).parameters())
    return Plan(device, step, parameters, steps, workers)


def largest_batch(
    config: hubert.HubertConfig,
    clusters: int,
    crop_seconds: float,
    device: str = "cpu",
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    *,
    share: float = 0.8,
    at_most: float = 400.0,
) -> float:
    """Seconds of audio of the largest batch whose training step stays below ``share`` of the free memory.

    Doubles the clips while the last two measurements say that the double fits, then tries what they say the largest is
    and steps down until it has run within the budget. Raises MemoryError when one clip does not fit.
    """
    place = torch.device(device)
    budget, most = share * resources.free_memory(place), max(1, int(at_most / crop_seconds))

    def used(clips: int) -> float:
        try:
            return measure_step(config, clusters, clips, crop_seconds, place, precision, gradient_checkpointing).bytes
        except torch.OutOfMemoryError:
            return float("inf")

    measured = {1: used(1)}
    if measured[1] > budget:
        raise MemoryError(f"one clip of {crop_seconds} s does not fit on {device}; shorten crop_seconds or the model")
    clips = 1
    while clips * 2 <= most:
        if clips > 1:
            slope = (measured[clips] - measured[clips // 2]) / (clips - clips // 2)
            if measured[clips] + slope * clips > budget:
                break
        measured[clips * 2] = used(clips * 2)
        if measured[clips * 2] > budget:
            break
        clips *= 2
    slope = (measured[clips] - measured[max(clips // 2, 1)]) / max(clips - clips // 2, 1)
    room = int((budget - measured[clips]) / slope) if slope > 0 else 0
    candidate = max(clips, min(most, 2 * clips - 1, clips + room))
    while candidate > clips and used(candidate) > budget:
        candidate = (candidate + clips) // 2
    return candidate * crop_seconds


def measure_step(
    config: hubert.HubertConfig,
    clusters: int,
    clips: int,
    seconds: float,
    device: torch.device,
    precision: str,
    gradient_checkpointing: bool,
) -> Step:
    """Duration (second of two) and peak memory of a training step on ``clips`` clips of noise of ``seconds`` each.

    On a CPU a fresh process does it: this one's memory says little, since what it freed stays with it. Raises
    torch.OutOfMemoryError when it does not fit.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        duration = _two_steps(config, clusters, clips, seconds, device, precision, gradient_checkpointing)
        return Step(clips * seconds, duration, torch.cuda.max_memory_allocated(device) - before)
    chosen = precision, gradient_checkpointing
    order = json.dumps([asdict(config), clusters, clips, seconds, *chosen, torch.get_num_threads()])
    child = subprocess.run([sys.executable, "-m", __name__, order], capture_output=True, text=True, check=False)
    if child.returncode == -signal.SIGKILL or "DefaultCPUAllocator: can't allocate memory" in child.stderr:
        raise torch.OutOfMemoryError(f"{clips} clips of {seconds} s do not fit into memory")
    if child.returncode:
        raise RuntimeError(f"measuring a training step failed: {child.stderr}")
    return Step(clips * seconds, *json.loads(child.stdout))


def _measure_here(order: str) -> None:
    """Child of ``measure_step``: prints [seconds, bytes]."""
    values, clusters, clips, seconds, *chosen, threads = json.loads(order)
    torch.set_num_threads(threads)
    config = hubert.HubertConfig(**values)
    process = psutil.Process()
    before = process.memory_info().rss
    duration = _two_steps(config, clusters, clips, seconds, torch.device("cpu"), *chosen)
    print(json.dumps([duration, max(resources.peak_memory() - before, 0)]))


def _two_steps(
    config: hubert.HubertConfig,
    clusters: int,
    clips: int,
    seconds: float,
    device: torch.device,
    precision: str,
    gradient_checkpointing: bool,
) -> float:
    """Seconds of the second of two training steps."""
    samples = int(seconds * SAMPLE_RATE)
    frames = frame_count(samples)
    masks = [torch.from_numpy(masking.spans(frames, seeds.numpy_generator(0, "measure", i))) for i in range(clips)]
    with torch.random.fork_rng():
        batch = Batch(
            torch.randn(clips, samples) * 0.1,
            torch.randint(clusters, (clips, frames)),
            torch.stack(masks),
            tuple(f"noise {i}" for i in range(clips)),
        )
        module = nn.ModuleList([hubert.Hubert(config), hubert.Head(config, clusters)]).to(device)
        module[0].gradient_checkpointing(gradient_checkpointing)
        settings = training.Settings(learning_rate=1e-6, warmup_steps=0, precision=precision)
        optimiser = training.adamw(module, settings)
        for _ in range(2):
            row = training.local_update(
                module,
                [batch],
                lambda one, _: objectives.masked_prediction(*module, one),
                settings,
                first_step=0,
                total_steps=2,
                seed=0,
                optimiser=optimiser,
            )
    return row["seconds"]


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


if __name__ == "__main__":
    _measure_here(sys.argv[1])
