"""A figure is a mean over seeds with a 95 % interval.

Evaluation seeds vary what is drawn to measure one model: training clips of a probe, its start, k-means' start, folds of
speakers. Training seeds vary the model itself: its weights, batches, masks and cohorts. A ranking of methods needs the
latter; neither covers the choice of the test speech.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval."""

    value: float
    low: float | None
    """None, as ``high``, for a single value, and for values that no seed changes: they have no interval."""
    high: float | None
    values: list[float]
    """One per seed, in the order of the seeds."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.high is None else f"{self.value:.3f} ± {self.high - self.value:.3f}"


def measure(values: Sequence[float]) -> Interval:
    """Mean of ``values`` and its 95 % interval by Student's t: mean ± t(n-1) s / sqrt(n).

    Raises ValueError when there is no value or one is not finite.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"cannot average {list(values)}: at least one value is needed and all must be finite")
    mean = float(array.mean())
    if np.ptp(array) < 1e-12:
        return Interval(mean, None, None, array.tolist())
    half = float(scipy.stats.t.ppf(0.975, array.size - 1) * scipy.stats.sem(array))
    return Interval(mean, mean - half, mean + half, array.tolist())
