"""What this machine has, a plan that fits it, and what was used. Found by measuring, not by tables of devices."""

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fedhubert_lib import hubert, masking, objectives, seeds, training
from fedhubert_lib.audio import SAMPLE_RATE, frame_count
from fedhubert_lib.batching import Batch
from fedhubert_lib.threads import cores


def describe() -> dict[str, Any]:
    """Processor, memory (bytes) and GPUs that this process may use, and what decides the speed of training on them."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": memory_limit(),
        "fast_bfloat16": training.fast_bfloat16(torch.device("cpu")),
        "gpus": [
            {
                "name": (properties := torch.cuda.get_device_properties(index)).name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "fast_bfloat16": training.fast_bfloat16(torch.device("cuda", index)),
            }
            for index in range(torch.cuda.device_count())
        ],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def memory_limit() -> int:
    """Bytes of memory of the machine, or of the control group if that is less."""
    total = psutil.virtual_memory().total
    limit = _control_group("memory.max")
    return min(total, int(limit)) if limit and limit != "max" else total


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    used = _control_group("memory.current")
    in_group = memory_limit() - int(used) if used else memory_limit()
    return min(psutil.virtual_memory().available, in_group)


# ------------------------------------------------------------------------------------------------------------- a plan


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
    clients_at_once: int
    """Clients that train side by side on the device: one on a GPU, else what memory and cores hold."""
    threads: int
    """Threads for each of them."""
    workers: int
    """Decoding threads for each of them."""
    steps: int
    """Optimiser steps of the whole run, over all clients."""

    @property
    def seconds(self) -> float:
        """Expected duration of the run's training steps, one after the other."""
        return self.steps * self.step.seconds

    def __str__(self) -> str:
        step, speed = self.step, self.step.audio_seconds / self.step.seconds
        return (
            f"{self.parameters / 1e6:.1f} M parameters on {self.device}: a step of {step.audio_seconds:.0f} s of audio"
            f" takes {step.seconds:.2f} s ({speed:.0f} audio s/s) and {step.bytes / 2**30:.2f} GiB.\n"
            f"{self.steps} steps, one after the other: about {_duration(self.seconds)}. There is room for"
            f" {self.clients_at_once} client(s) at once, with {self.threads} thread(s) and {self.workers} decoding"
            " thread(s) each."
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
) -> Plan:
    """Measure a training step and say what ``steps`` of them need. Takes two steps' time; print it before long work.

    Raises MemoryError when a single step does not fit, with the largest batch that does.
    """
    place = torch.device(device)
    clips = max(1, int(batch_seconds / crop_seconds))
    free = free_memory(place)
    chosen = precision, gradient_checkpointing
    try:
        step = measure_step(config, clusters, clips, crop_seconds, place, *chosen)
    except torch.OutOfMemoryError:
        most = largest_batch(config, clusters, crop_seconds, device, *chosen, at_most=batch_seconds)
        raise MemoryError(f"batch_seconds {batch_seconds} does not fit on {device}; {most:.0f} does") from None
    many = 1 if place.type == "cuda" else max(1, min(cores(), int(0.8 * free / max(step.bytes, 1))))
    threads = max(1, cores() // many)
    workers = 1 if place.type == "cpu" else max(1, min(8, cores() - 1))
    parameters = sum(p.numel() for p in hubert.Hubert(config).parameters())
    return Plan(device, step, parameters, many, threads, workers, steps)


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
    budget, most = share * free_memory(place), max(1, int(at_most / crop_seconds))

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
    config = hubert.HubertConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    process = psutil.Process()
    before = process.memory_info().rss
    duration = _two_steps(config, clusters, clips, seconds, torch.device("cpu"), *chosen)
    print(json.dumps([duration, max(peak_memory() - before, 0)]))


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


# ------------------------------------------------------------------------------------------------------- what was used


USED = ("peak_memory_bytes", "gpu_memory_bytes", "cpu_joules", "gpu_joules")
"""Of what ``Meter.read`` gives: what belongs into a ledger of rounds."""


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most so far.

    On Linux from /proc: ``getrusage`` would tell a child no less than what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Meter:
    """What this process used since the last ``read``: one per run, read after each round.

    Children (a pool's workers) count themselves.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.process = psutil.Process()
        self.last = (time.monotonic(), time.process_time(), _processor_joules(), _gpu_query("power.draw", self.device))

    def read(self) -> dict[str, float]:
        """cpu_seconds, cpu_share (of the cores this process may use), memory_bytes (now), peak_memory_bytes (of the
        process, since it began), and where they can be read:
        gpu_memory_bytes (peak), gpu_utilisation (share, at this moment), cpu_joules (processor packages' counters),
        gpu_joules (mean of the power at both reads, times the time between)."""
        then, cpu_then, joules_then, watts_then = self.last
        now, cpu, joules = time.monotonic(), time.process_time(), _processor_joules()
        watts = _gpu_query("power.draw", self.device)
        self.last = now, cpu, joules, watts
        row = {
            "cpu_seconds": cpu - cpu_then,
            "cpu_share": (cpu - cpu_then) / max(now - then, 1e-9) / cores(),
            "memory_bytes": float(self.process.memory_info().rss),
            "peak_memory_bytes": float(peak_memory()),
        }
        if joules is not None and joules_then is not None and joules >= joules_then:  # the counters wrap around
            row["cpu_joules"] = joules - joules_then
        if watts is not None and watts_then is not None:
            row["gpu_joules"] = (watts + watts_then) / 2 * (now - then)
        if self.device.type == "cuda":
            row["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
            if (percent := _gpu_query("utilization.gpu", self.device)) is not None:
                row["gpu_utilisation"] = percent / 100
        return row

    def used(self) -> dict[str, float]:
        """``USED`` of ``read``, as far as this machine tells."""
        return {name: value for name, value in self.read().items() if name in USED}


def usage(device: str = "cpu") -> dict[str, float]:
    """Memory (and GPU memory, utilisation) of this process now; ``Meter`` gives what a stretch of work took."""
    row = Meter(torch.device(device)).read()
    return {
        name: value for name, value in row.items() if name in ("memory_bytes", "gpu_memory_bytes", "gpu_utilisation")
    }


def _processor_joules() -> float | None:
    """Joules counted so far by the processor packages, or None where they are not readable (often by root alone)."""
    counters = list(Path("/sys/class/powercap").glob("*-rapl:?/energy_uj"))
    if not counters or not all(os.access(counter, os.R_OK) for counter in counters):
        return None
    return sum(int(counter.read_text(encoding="utf-8")) for counter in counters) / 1e6


def _gpu_query(what: str, device: torch.device) -> float | None:
    """A number from nvidia-smi; None on a CPU, and where it is not installed or does not know."""
    if device.type != "cuda":
        return None
    index = str(device.index if device.index is not None else torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", index]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return float(answer)


def _control_group(name: str) -> str | None:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


if __name__ == "__main__":
    _measure_here(sys.argv[1])
