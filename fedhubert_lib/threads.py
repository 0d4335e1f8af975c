"""The number of threads to compute with, and work that is spread over them without one waiting for another.

A library's thread that waits for others spins, and where a core is shared with another process it spins in place of the
thread that it waits for: two runs on two cores then take not twice but many times as long. Threads that sleep at once
take as long to wake as the small operations of a small model. So OpenMP's threads spin for some microseconds
(``GOMP_SPINCOUNT``, set when the package is imported, since it is read when torch is), their number is what has been
granted, and independent pieces of work go through ``each``: one thread from end to end on each core.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fedhubert_lib.resources import cores, free_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def count() -> int:
    """Threads to compute with: ``OMP_NUM_THREADS`` where somebody has set it, else the granted cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(chosen) if chosen.isdecimal() and int(chosen) else cores()


def configure() -> None:
    """Set the environment for the libraries that are still to be loaded, and for every process that this one starts."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    if "torch" in sys.modules:  # imported before, so that it has looked at neither
        sys.modules["torch"].set_num_threads(count())


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


def each(work: Callable[[Item], Result], items: Iterable[Item], memory: int = 0) -> Iterator[Result]:
    """``work`` of every item, in their order: ``count`` threads, in each of which every library computes alone; fewer
    where so many items, of ``memory`` bytes each, would not fit.

    No result depends on how many cores there are. An error ends it once the items under way are done.
    """
    import torch  # here, since commands that compute nothing import this module
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController()
    threads = min(count(), max(1, free_memory(torch.device("cpu")) // memory)) if memory else count()

    def alone() -> None:  # OpenMP's number of threads is each thread's own
        torch.set_num_threads(1)
        libraries.limit(limits=1)

    with limited(0), libraries.limit(limits=1), ThreadPoolExecutor(threads, initializer=alone) as pool:
        yield from pool.map(work, items)
