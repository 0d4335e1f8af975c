"""Time and memory that pretraining will need on this machine, from one measured training step."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fedhubert_lib import hubert, objectives, pooled, pretrained, recipes, resources, threads, training
from fedhubert_lib.audio import SAMPLE_RATE, frame_count
from fedhubert_lib.batching import Batch
from fedhubert_lib.federated import pool
from fedhubert_lib.params import Pretrain


@dataclass(frozen=True)
class Step:
    """One measured training step."""

    audio_seconds: float
    seconds: float
    bytes: int
    """Peak memory that the step added to what the process held before the model was made."""


@dataclass(frozen=True)
class Plan:
    device: str
    step: Step
    parameters: int
    steps: int
    """Optimiser steps, over all clients."""
    turns: int
    """How many of them follow one another: a round waits for the worker that has most of its clients."""
    pooled: float
    """Seconds of as many steps on the pooled data, in one process; 0: none."""
    workers: int
    """Processes of engine ``pool``, each on its own device or cores, that share a cohort's clients; else 1."""

    @property
    def seconds(self) -> float:
        """Expected duration of the training steps."""
        return self.turns * self.step.seconds + self.pooled

    def __str__(self) -> str:
        step, speed = self.step, self.step.audio_seconds / self.step.seconds
        return (
            f"{self.parameters / 1e6:.1f} M parameters on {self.device}: a step of {step.audio_seconds:.0f} s of audio"
            f" takes {step.seconds:.2f} s ({speed:.0f} audio s/s) and {step.bytes / 2**30:.2f} GiB.\n"
            f"{self.steps} steps, {f'by {self.workers} workers' if self.workers > 1 else 'one after the other'}"
            f"{', and as many in one process on pooled data' * bool(self.pooled)}: about"
            f" {timedelta(seconds=round(self.seconds))}."
        )


def plan(run: Path, p: Pretrain) -> Plan:
    """Measure a training step, of clients and on pooled data, which takes two steps' time each, and say what all need.

    Epochs are counted as ``local_steps``, the most that they are. Raises MemoryError: see ``fitting_step``.
    """
    config = pretrained.read_config(Path(p.initial)) if p.initial else recipes.model_config(p)
    device, clusters = resources.resolve(p.device), recipes.clusters(run, p.codebook)
    with threads.limited(p.threads):
        workers = min(pool.side_by_side(p.engine, p.device), p.cohort)
        step = fitting_step(p, config, clusters, device, workers)
    steps, seconds = p.rounds * p.local_steps, 0.0
    if p.centralised:  # on all cores, in larger batches
        large = pooled.merged(p)
        try:
            seconds = steps * large.cohort * fitting_step(large, config, clusters, device).seconds
        except MemoryError as error:
            raise MemoryError(f"{error}; or centralised: false, whose batches are {large.batch_seconds:g} s") from None
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in hubert.Hubert(config).parameters())
    turns = steps * math.ceil(p.cohort / workers)
    return Plan(device, step, parameters, steps * p.cohort, turns, seconds, workers)


def fitting_step(p: Pretrain, config: hubert.HubertConfig, clusters: int, device: str, workers: int = 1) -> Step:
    """A measured step on ``p.batch_seconds`` of audio. ``workers`` run side by side: on a CPU they share its memory,
    while each GPU has but one.

    Raises MemoryError when a step does not fit, or when the steps of all workers together do not.
    """
    free = resources.free_memory(torch.device(device))
    try:
        clips = math.ceil(p.batch_seconds / p.crop_seconds)  # where full crops fill no batch, shorter ones do
        full = p.model_copy(update={"crop_seconds": p.batch_seconds / clips})
        step = measure_step(full, config, clusters, clips, device)
    except torch.OutOfMemoryError:
        raise MemoryError(
            f"batch_seconds {p.batch_seconds} does not fit on {device}, of which {free / 2**30:.1f} GiB are free:"
            " set it or crop_seconds lower, or gradient_checkpointing: true"
        ) from None
    if device == "cpu" and workers > 1 and workers * step.bytes > free:
        raise MemoryError(
            f"{workers} workers' steps need {workers * step.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free:"
            " set OMP_NUM_THREADS higher for fewer workers, or batch_seconds lower"
        )
    return step


def measure_step(p: Pretrain, config: hubert.HubertConfig, clusters: int, clips: int, device: str) -> Step:
    """Duration (second of two) and peak memory of a training step on ``clips`` clips of noise.

    On a CPU a fresh process does it: this one's memory says little, since what it freed stays with it. Raises
    torch.OutOfMemoryError when it does not fit.
    """
    audio_seconds = clips * p.crop_seconds
    if device != "cpu":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        duration = _two_steps(p, config, clusters, clips, device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()  # which workers, other processes, need
        return Step(audio_seconds, duration, peak - before)
    order = json.dumps([torch.get_num_threads(), p.model_dump(), asdict(config), clusters, clips])
    child = subprocess.run([sys.executable, "-m", __name__, order], capture_output=True, text=True, check=False)
    if child.returncode == -signal.SIGKILL or "can't allocate memory" in child.stderr:
        raise torch.OutOfMemoryError(f"{clips} clips of {p.crop_seconds} s do not fit into memory")
    if child.returncode:
        raise RuntimeError(f"measuring a training step failed: {child.stderr}")
    return Step(audio_seconds, *json.loads(child.stdout))


def _measure_here(threads: int, values: dict[str, Any], config: dict[str, Any], clusters: int, clips: int) -> None:
    """Child of ``measure_step``: prints [seconds, bytes]."""
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    duration = _two_steps(Pretrain.model_construct(**values), hubert.HubertConfig(**config), clusters, clips, "cpu")
    print(json.dumps([duration, max(resources.peak_memory() - before, 0)]))


def _two_steps(p: Pretrain, config: hubert.HubertConfig, clusters: int, clips: int, device: str) -> float:
    """Seconds of the second of two training steps."""
    samples = int(p.crop_seconds * SAMPLE_RATE)
    frames = frame_count(samples)
    with torch.random.fork_rng():
        batch = Batch(
            torch.randn(clips, samples) * 0.1,
            torch.randint(clusters, (clips, frames)),
            torch.rand(clips, frames) < 0.57,  # as many as spans hide
            tuple(f"noise {number}" for number in range(clips)),
        )
        module = nn.ModuleList([hubert.Hubert(config), hubert.Head(config, clusters)]).to(device)
        module[0].recompute = p.gradient_checkpointing
        optimiser, seconds = training.adamw(module, p), 0.0
        for _ in range(2):
            seconds = training.local_update(
                module,
                [batch],
                lambda one, _: objectives.masked_prediction(module[0], module[1], one),
                p,
                first_step=0,
                total_steps=2,
                seed=0,
                optimiser=optimiser,
            )["seconds"]
    return seconds


if __name__ == "__main__":
    _measure_here(*json.loads(sys.argv[1]))
