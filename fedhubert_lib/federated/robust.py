"""Trimmed mean and median of the updates: one hostile client cannot move them. They need a cohort's updates at once."""

import torch

from fedhubert_lib import resources
from fedhubert_lib.federated.hooks import Hook
from fedhubert_lib.federated.optimisers import Collector
from fedhubert_lib.federated.protocol import Arrays, size


class Sorted(Collector):
    """Coordinate-wise trimmed mean, or median, of the updates (Yin et al. 2018, arXiv 1803.01498), without weights.

    ``trim`` is the fraction left out at each end, rounded down to whole clients but at least one where three or more
    answered; 0.5 is the median.
    """

    def __init__(self, trim: float) -> None:
        self._trim = trim
        self._updates: list[Arrays] = []

    def add(self, update: Arrays, weight: float) -> None:
        self._updates.append(dict(update))

    def result(self) -> Arrays:
        """The trimmed mean or median of all, a tensor at a time."""
        count = len(self._updates)
        lowest = min(max(int(self._trim * count + 1e-9), 1), (count - 1) // 2)
        result: Arrays = {}
        for name in sorted(self._updates[0]):
            values = torch.stack([update.pop(name) for update in self._updates]).sort(0).values
            result[name] = values[lowest : count - lowest].mean(0)
        return result


class SortedUpdates(Hook):
    """``server: trimmed-mean`` and ``median``."""

    def message(self, round) -> None:
        """Of two answers either may be the hostile one."""
        round.quorum = max(round.quorum, 3)

    def collector(self, round) -> Sorted:
        """Raises MemoryError, before anybody is asked, where the cohort's updates do not fit into free memory."""
        needed, free = size(round.payload) * len(round.asked), resources.free_memory(torch.device("cpu"))
        if needed > free:
            raise MemoryError(
                f"server: {self.p.server} holds the updates of {len(round.asked)} clients at once,"
                f" {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; lower cohort, or take server: fedavg"
            )
        return Sorted(0.5 if self.p.server == "median" else self.p.server_trim)
