"""What this machine has, and what was used of it. Found by asking, not by tables of devices."""

import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from fedhubert_lib.memory import peak_memory
from fedhubert_lib.threads import cores


def describe() -> dict[str, Any]:
    """Processor, memory (bytes) and GPUs that this process may use, and what decides the speed of training on them."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": memory_limit(),
        "fast_bfloat16": fast_bfloat16(torch.device("cpu")),
        "gpus": [
            {
                "name": (properties := torch.cuda.get_device_properties(index)).name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "fast_bfloat16": fast_bfloat16(torch.device("cuda", index)),
            }
            for index in range(torch.cuda.device_count())
        ],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """bfloat16 autocast where ``precision`` asks for it; a context that does nothing for float32."""
    device = torch.device(device)
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; it must be auto, float32 or bfloat16")
    enabled = precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


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


# ------------------------------------------------------------------------------------------------------- what was used


USED = ("peak_memory_bytes", "gpu_memory_bytes", "cpu_joules", "gpu_joules")
"""What a ``Meter`` may tell: columns of a ledger of rounds."""


class Meter:
    """What this process used since it was last asked: one per run, asked after each round.

    Children (a pool's workers) count themselves. What a machine does not tell is left out: no meter stops a training.
    """

    def __init__(self, device: str) -> None:
        self.device = "cuda" if device == "auto" else device
        self.has_gpu = self.device.startswith("cuda") and torch.cuda.is_available()  # a server may have none
        self.last = time.monotonic(), _processor_joules(), self._watts()

    def used(self) -> dict[str, float]:
        """Of ``USED`` what can be read: peak_memory_bytes (of the process, since it began), gpu_memory_bytes (peak of
        this process), cpu_joules (processor packages' counters), gpu_joules (mean of the power at both times)."""
        then, joules_then, watts_then = self.last
        self.last = now, joules, watts = time.monotonic(), _processor_joules(), self._watts()
        row = {"peak_memory_bytes": float(peak_memory())}
        if joules is not None and joules_then is not None and joules >= joules_then:  # the counters wrap around
            row["cpu_joules"] = joules - joules_then
        if watts is not None and watts_then is not None:
            row["gpu_joules"] = (watts + watts_then) / 2 * (now - then)
        if self.has_gpu and torch.cuda.is_initialized():
            row["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        return row

    def _watts(self) -> float | None:
        """Power of the GPU by nvidia-smi; None without one, and where it does not know (a part of a GPU) or hangs."""
        if not self.has_gpu or (hasattr(self, "last") and self.last[2] is None):
            return None  # who did not know before is not asked again: asking takes up to seconds
        uuid = torch.cuda.get_device_properties(self.device).uuid  # indices are others under CUDA_VISIBLE_DEVICES
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
        try:
            watts = float(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout)
        except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: [N/A], or an older driver's words
            return None
        return watts if math.isfinite(watts) else None


def _processor_joules() -> float | None:
    """Joules counted so far by the processor packages, or None where they are not readable (often by root alone)."""
    counters = list(Path("/sys/class/powercap").glob("*-rapl:?/energy_uj"))
    if not counters or not all(os.access(counter, os.R_OK) for counter in counters):
        return None
    return sum(int(counter.read_text(encoding="utf-8")) for counter in counters) / 1e6


def _control_group(name: str) -> str | None:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
