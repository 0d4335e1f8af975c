"""What a run will need on this machine, from one measured training step."""

import bisect
import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

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
    """Processes of engine ``pool``, each on its own device or cores, that share the steps; else 1."""

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
            f" {timedelta(seconds=round(self.seconds))}."
        )


@dataclass(frozen=True)
class Workload:
    """The training step to measure."""

    config: hubert.HubertConfig
    clusters: int
    crop_seconds: float
    precision: str = "auto"
    gradient_checkpointing: bool = False


def plan(work: Workload, batch_seconds: float, steps: int, device: str = "cpu", workers: int = 1) -> Plan:
    """Measure a training step on ``batch_seconds`` of audio and say what ``steps`` of them need. Takes two steps' time.

    ``workers`` run side by side: on a CPU they share its memory, while each GPU has but one. Raises MemoryError when a
    step does not fit, with the largest batch that does, or when the steps of all workers together do not.
    """
    free = resources.free_memory(torch.device(device))
    try:
        step = measure_step(work, max(1, int(batch_seconds / work.crop_seconds)), device)
    except torch.OutOfMemoryError:
        most = largest_batch(work, device, at_most=batch_seconds)
        raise MemoryError(f"batch_seconds {batch_seconds} does not fit on {device}; {most:.0f} does") from None
    if device == "cpu" and workers > 1 and workers * step.bytes > free:
        raise MemoryError(
            f"{workers} workers' steps need {workers * step.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free:"
            " set OMP_NUM_THREADS higher for fewer workers, or batch_seconds lower"
        )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in hubert.Hubert(work.config).parameters())
    return Plan(device, step, parameters, steps, workers)


def largest_batch(work: Workload, device: str, at_most: float, fraction: float = 0.8) -> float:
    """Seconds of audio of the largest batch whose training step stays below ``fraction`` of the free memory.

    Raises MemoryError when one clip does not fit.
    """
    budget = fraction * resources.free_memory(torch.device(device))

    def too_many(clips: int) -> bool:
        try:
            return measure_step(work, clips, device).bytes > budget
        except torch.OutOfMemoryError:
            return True

    clips = bisect.bisect_left(range(1, int(at_most / work.crop_seconds) + 1), True, key=too_many)
    if not clips:
        raise MemoryError(f"one clip of {work.crop_seconds} s does not fit on {device}; shorten it, or the model")
    return clips * work.crop_seconds


def measure_step(work: Workload, clips: int, device: str) -> Step:
    """Duration (second of two) and peak memory of a training step on ``clips`` clips of noise.

    On a CPU a fresh process does it: this one's memory says little, since what it freed stays with it. Raises
    torch.OutOfMemoryError when it does not fit.
    """
    audio_seconds = clips * work.crop_seconds
    if device != "cpu":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        duration = _two_steps(work, clips, device)
        return Step(audio_seconds, duration, torch.cuda.max_memory_allocated(device) - before)
    order = json.dumps([asdict(work), clips, torch.get_num_threads()])
    child = subprocess.run([sys.executable, "-m", __name__, order], capture_output=True, text=True, check=False)
    if child.returncode == -signal.SIGKILL or "can't allocate memory" in child.stderr:
        raise torch.OutOfMemoryError(f"{clips} clips of {work.crop_seconds} s do not fit into memory")
    if child.returncode:
        raise RuntimeError(f"measuring a training step failed: {child.stderr}")
    return Step(audio_seconds, *json.loads(child.stdout))


def _measure_here(values: dict[str, Any], clips: int, threads: int) -> None:
    """Child of ``measure_step``: prints [seconds, bytes]."""
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    duration = _two_steps(Workload(hubert.HubertConfig(**values.pop("config")), **values), clips, "cpu")
    print(json.dumps([duration, max(resources.peak_memory() - before, 0)]))


def _two_steps(work: Workload, clips: int, device: str) -> float:
    """Seconds of the second of two training steps."""
    samples = int(work.crop_seconds * SAMPLE_RATE)
    frames = frame_count(samples)
    masks = [torch.from_numpy(masking.spans(frames, seeds.numpy_generator(0, "measure", i))) for i in range(clips)]
    with torch.random.fork_rng():
        batch = Batch(
            torch.randn(clips, samples) * 0.1,
            torch.randint(work.clusters, (clips, frames)),
            torch.stack(masks),
            tuple(f"noise {i}" for i in range(clips)),
        )
        module = nn.ModuleList([hubert.Hubert(work.config), hubert.Head(work.config, work.clusters)]).to(device)
        module[0].gradient_checkpointing(work.gradient_checkpointing)
        settings = training.Settings(learning_rate=1e-6, warmup_steps=0, precision=work.precision)
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


if __name__ == "__main__":
    _measure_here(*json.loads(sys.argv[1]))
