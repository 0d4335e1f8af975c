"""The privacy that a training run has spent: Renyi accounting of sampled Gaussians, and the file of its draws."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedhubert_lib import files

ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 1024)
"""Renyi orders tried. Integers only, for which the sampled Gaussian has a closed form: the bound is valid, and above
that of dp-accounting's fractional orders by up to 5 % where epsilon is 20 or less, by 15 % at 98, by 58 % at 728."""


@lru_cache(maxsize=4096)
def renyi(probability: float, multiplier: float) -> tuple[float, ...]:
    """Renyi divergence of one round at each of ``ORDERS``: the Poisson-sampled Gaussian (Mironov et al. 2019,
    arXiv 1908.10530, equation 10), add-or-remove-one-client adjacency."""
    if multiplier <= 0:
        return (math.inf,) * len(ORDERS)
    if probability == 1:
        return tuple(order / (2 * multiplier**2) for order in ORDERS)
    result = []
    for order in ORDERS:
        k = torch.arange(order + 1, dtype=torch.float64)
        log_binomial = math.lgamma(order + 1) - torch.lgamma(k + 1) - torch.lgamma(order - k + 1)
        log_weight = k * math.log(probability) + (order - k) * math.log1p(-probability)
        log_moment = torch.logsumexp(log_binomial + log_weight + k * (k - 1) / (2 * multiplier**2), 0)
        result.append(max(float(log_moment), 0.0) / (order - 1))
    return tuple(result)


def epsilon(releases: Iterable[tuple[float, float, int]], delta: float) -> float:
    """The epsilon spent by ``releases`` of (probability to join, noise multiplier, rounds), at ``delta``.

    Composition adds Renyi divergences; the conversion is that of Canonne et al. 2020 (arXiv 2004.00010, proposition
    12). A round without noise makes it infinite.
    """
    total = np.zeros(len(ORDERS))
    for probability, multiplier, count in releases:
        total += count * np.asarray(renyi(probability, multiplier))
    orders = np.asarray(ORDERS)
    spent = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return max(float(spent.min()), 0.0) if total.any() else 0.0


def charge(path: Path, row: Mapping[str, Any], repeatable: bool) -> None:
    """Note the draw of a cohort in the file of JSON lines ``path``, before updates are asked for. It is never taken
    back: a round that is repeated after a kill costs twice.

    A row is ``round``, ``attempt`` and either ``probability`` and ``multiplier`` of a sampled Gaussian, or ``clients``
    that took part and the ``multiplier`` for each. A ``repeatable`` draw (from a seed) is noted once.
    """
    if not (repeatable and any(place(row) == place(earlier) for earlier in files.read_rows(path))):
        files.append_row(path, dict(row), durable=True)  # a model on disk must not outlive what it cost


def place(row: Mapping[str, Any]) -> tuple[int, int]:
    """Round and attempt of a draw."""
    return row["round"], row["attempt"]


def spent(paths: Iterable[Path], delta: float, until: tuple[int, int] | None = None) -> float | None:
    """The epsilon of all draws in ``paths`` together, by the client that spent most; None: infinite.

    ``until`` is the place of the present draw where draws repeat: later ones were taken before a kill.
    """
    rows = [row for path in paths for row in files.read_rows(path) if until is None or place(row) <= until]
    draws = Counter((row["probability"], row["multiplier"]) for row in rows if "probability" in row)
    clients: dict[str, float] = defaultdict(float)
    for row in rows:
        for client in row.get("clients", ()):
            clients[client] += inverse_square(row["multiplier"])
    releases = [(probability, multiplier, count) for (probability, multiplier), count in draws.items()]
    if clients:
        releases.append((1.0, max(clients.values()) ** -0.5, 1))
    total = epsilon(releases, delta)
    return total if math.isfinite(total) else None


def inverse_square(multiplier: float) -> float:
    """The cost of a Gaussian release of sensitivity 1; infinite without noise."""
    return multiplier**-2 if multiplier else math.inf
