"""Cores, memory and devices that this machine grants to this process, and its peak memory."""

import os
import re
import resource
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # torch takes seconds to import, which commands that compute nothing need not wait for
    import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """Cores granted to this process: the least of its affinity, the quotas of its control groups, and Slurm's number.

    Slurm's number counts because a cluster may not enforce it: ``--cpus-per-task``, else its CPUs on this node.
    """
    granted = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    version_2 = (text.split() for text in _settings("", "cpu.max"))
    version_1 = zip(_settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us"), strict=True)
    for quota, period in (*version_2, *version_1):
        if quota.isdecimal() and int(period):  # max or -1: none
            granted.append(int(quota) // int(period))
    slurm = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    if slurm.isdecimal():
        granted.append(int(slurm))
    return max(1, min(granted))


def named(device: str) -> str:
    """``device``. Raises ValueError unless it names one that can compute this, here or elsewhere."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device) is None:
        raise ValueError(f"device {device!r}: auto, cpu, cuda or cuda:NUMBER is expected (mps lacks float64)")
    return device


def resolve(device: str) -> str:
    """``auto`` is the first GPU, or the CPU where there is none. Raises ValueError for a device that is not here."""
    import torch

    if named(device) == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= (count := torch.cuda.device_count()):
        seen = f" (CUDA_VISIBLE_DEVICES={chosen})" if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) else ""
        raise ValueError(f"device {device!r}: this process sees {count} GPUs{seen}; give cuda:0 or the like, auto, cpu")
    return device


def memory_limit() -> int:
    """Bytes of memory of the machine, or of the smallest limit of its control groups and of Slurm if that is less."""
    limits = [*_settings("", "memory.max"), *_settings("memory", "memory.limit_in_bytes")]
    return min([psutil.virtual_memory().total, *_slurm(), *(int(limit) for limit in limits if limit.isdecimal())])


def _slurm() -> list[int]:
    """Slurm's limit of memory on this node in bytes, if it has set one: a cluster may not enforce it."""
    node, core, cores = (
        int(os.environ.get(f"SLURM_{n}") or 0) for n in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    return [mebibytes << 20] if (mebibytes := node or core * cores) else []


def free_memory(device: "torch.device") -> int:
    """Bytes that this process could still allocate on ``device``."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = [psutil.virtual_memory().available, *(limit - psutil.Process().memory_info().rss for limit in _slurm())]
    for controller, *names in (("", "max", "current", "stat"), ("memory", "limit_in_bytes", "usage_in_bytes", "stat")):
        groups = zip_longest(*(_settings(controller, f"memory.{name}") for name in names), fillvalue="")
        for limit, used, stat in groups:
            # Files that were read count as used, and give way; version 1 has a line for the group alone before this.
            cached = sum(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)[-1:]))
            free += [int(limit) - int(used) + cached] if limit.isdecimal() and used.isdecimal() else []
    return max(0, min(free))


def _settings(controller: str, name: str) -> Iterator[str]:
    """The file ``name`` of this process' control group and of each above it, where it exists; version 2: no controller.

    In a container the path may be the host's, and the process' group lies at the root of the mounted tree.
    """
    lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = CONTROL_GROUPS / controllers
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root) and (folder / name).is_file():
                    yield (folder / name).read_text(encoding="utf-8").strip()


def autocast(device: "torch.device | str", precision: str) -> "torch.autocast":
    """bfloat16 autocast where ``precision`` asks for it, and for auto where the hardware has bfloat16 arithmetic."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" or precision == "auto" and fast)


def peak_memory(children: bool = False) -> int:
    """The largest number of bytes of main memory that this process, or one of its ``children`` that ended, has held.

    On Linux from /proc: ``getrusage`` gives a child no less than what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file() and not children:
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    used = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
