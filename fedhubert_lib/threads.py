"""How many threads are right here, and work that is spread over them without one waiting for another.

A library's thread that waits for others spins, and where a core is shared with another process it spins in place of the
thread that it waits for: two runs on two cores then take not twice but many times as long. Threads that sleep at once
need as long to wake as the small operations of a small model take. So OpenMP's threads spin for some microseconds
(``GOMP_SPINCOUNT``, set when the package is imported, since it is read when torch is), their number is what has been
granted, and what falls into pieces is worked on by ``each``: one thread from end to end on each core.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """Cores granted to this process: by its affinity, the quotas of its control groups, and Slurm; the least of them.

    Slurm's word counts because a cluster may not enforce it: ``--cpus-per-task``, else its CPUs on this node.
    """
    granted = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, *_quotas()]
    slurm = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    if slurm.isdecimal():
        granted.append(int(slurm))
    return max(1, min(granted))


def count() -> int:
    """Threads to compute with: ``OMP_NUM_THREADS`` where somebody has set it, else ``cores``."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(chosen) if chosen.isdecimal() and int(chosen) else cores()


def configure() -> None:
    """Tell the libraries that are still to be loaded, and every process that this one starts."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


@contextlib.contextmanager
def limited(number: int) -> Iterator[None]:
    """Let torch compute with ``number`` threads as long as the ``with`` block lasts; 0: as many as it does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` of every item, in their order: ``count`` threads, in each of which every library computes alone.

    No result depends on how many cores there are. An error ends it once the items under way are done.
    """
    import torch  # here, since commands that compute nothing import this module
    from threadpoolctl import ThreadpoolController

    before, libraries = torch.get_num_threads(), ThreadpoolController()

    def alone() -> None:  # OpenMP's number of threads is each thread's own
        torch.set_num_threads(1)
        libraries.limit(limits=1)

    try:
        with libraries.limit(limits=1), ThreadPoolExecutor(count(), initializer=alone) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(before)


def _quotas() -> Iterator[int]:
    """Whole cores that the quota of each control group above this process allows, of either version."""
    lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, and its own group lies at the root of what is mounted.
        root = CONTROL_GROUPS / controllers if controllers else CONTROL_GROUPS
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    yield from _quota(folder, controllers)


def _quota(folder: Path, controllers: str) -> Iterator[int]:
    if controllers:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
        )
    else:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    if quota.isdecimal() and int(period):  # otherwise max, or -1: no quota
        yield max(1, int(quota) // int(period))
