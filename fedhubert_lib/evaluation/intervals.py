"""A measure is a mean over seeds with a 95 % interval, never a single number; it says over which seeds.

Evaluation seeds vary what is drawn to measure one model: training clips of a probe, its start, k-means' start, folds of
speakers. Training seeds vary the model itself: its weights, batches, masks and cohorts. A ranking of methods needs the
latter; neither covers the choice of the test speech.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Seeds = Literal["evaluation seeds", "training seeds"]


@dataclass(frozen=True)
class Measure:
    """One figure of one system, over seeds."""

    mean: float
    interval: float | None
    """Half-width of the 95 % interval of the mean (Student's t); None for a single value, which has none."""
    values: tuple[float, ...]
    """One per seed, in the order of the seeds."""
    over: Seeds
    """What the interval spans."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.interval is None else f"{self.mean:.3f} ± {self.interval:.3f}"


def measure(values: Sequence[float], over: Seeds = "evaluation seeds") -> Measure:
    """Mean of ``values`` with the half-width t(n-1) s / sqrt(n) of its 95 % interval over these seeds.

    Raises ValueError when there is no value or one is not finite.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"cannot average {list(values)}: at least one value is needed and all must be finite")
    half = None
    if array.size > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return Measure(float(array.mean()), half, tuple(float(value) for value in array), over)
