"""Client-level differential privacy: what one client adds to a round is bounded, and noise hides whether it was there.

A client scales its update down to norm C; the server sums the updates of a Poisson cohort (each client joins with
probability q), adds Gaussian noise of standard deviation z C and divides by the expected cohort q N, not by the number
of answers, which depends on who is there (McMahan et al. 2018, arXiv 1710.06963). C is fixed, or follows a quantile of
the norms (Andrew et al. 2021, arXiv 1905.03871). The privacy spent is counted in Renyi divergence.

The noise is drawn from the seed, as everything is, so that a study can be repeated: whoever knows the seed can subtract
it. A federation that must protect real people keeps its seed secret from those who see the model.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaln, logsumexp
from torch import Tensor

from fedhubert_lib import seeds
from fedhubert_lib.federated.protocol import Arrays

ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 1024)
"""Renyi orders tried. Integers only, for which the sampled Gaussian has a closed form: the bound is valid, and up to
5 % above that of dp-accounting's fractional orders."""


def norm(arrays: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64 and in sorted order of names."""
    return math.sqrt(sum(float(arrays[name].double().square().sum()) for name in sorted(arrays)))


def clip(arrays: Mapping[str, Tensor], bound: float) -> tuple[Arrays, float]:
    """``arrays`` scaled down to norm ``bound`` where longer, and their norm before. NaN and infinity are errors."""
    before = norm(arrays)
    if not math.isfinite(before):
        raise ValueError("the update has a NaN or infinite norm; nothing of it can be sent under a privacy bound")
    if before <= bound:
        return dict(arrays), before
    # One part in a million short of the bound: float32 rounding must not carry the result beyond it.
    factor = bound / before * (1 - 1e-6)
    return {name: value * factor for name, value in arrays.items()}, before


def add_noise(arrays: Mapping[str, Tensor], deviation: float, seed: int, *keys: int | str) -> Arrays:
    """``arrays`` plus Gaussian noise of standard deviation ``deviation``, drawn by (seed, keys, tensor name)."""
    noisy = {}
    for name, value in arrays.items():
        generator = seeds.torch_generator(seed, *keys, "privacy-noise", name)
        noisy[name] = value + deviation * torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return noisy


def poisson_cohort(clients: Sequence[str], expected: int, seed: int, round: int) -> list[str]:
    """Clients that join with probability ``expected / len(clients)`` each, independently: what the accountant assumes.

    The cohort's size varies from round to round; it may be empty.
    """
    if not 0 < expected <= len(clients):
        raise ValueError(
            f"a cohort of {expected} cannot be drawn from {len(clients)} clients; set cohort to 1..clients"
        )
    draws = seeds.numpy_generator(seed, round, "poisson-cohort").random(len(clients))
    return [client for client, draw in zip(sorted(clients), draws, strict=True) if draw < expected / len(clients)]


def adapt(bound: float, within: float, quantile: float, rate: float = 0.2) -> float:
    """The next round's clipping norm, given the (noisy) share of updates that were ``within`` the present one.

    Geometric steps to the ``quantile`` of the norms (Andrew et al. 2021, their rate 0.2).
    """
    return bound * math.exp(-rate * (within - quantile))


def split_noise(multiplier: float, count_deviation: float) -> float:
    """The noise multiplier for the updates, when counting who was within the bound takes its share of the privacy.

    Each client's bit, centred to -1/2 or 1/2, is summed with noise of standard deviation ``count_deviation``; both
    releases together then cost what one of ``multiplier`` costs (Andrew et al. 2021, theorem 1).
    """
    if multiplier == 0:
        return 0.0
    rest = multiplier**-2 - (2 * count_deviation) ** -2
    if rest <= 0:
        raise ValueError(
            f"noise of {count_deviation:g} on the count is too little for a noise multiplier of {multiplier:g}: "
            f"take more than {multiplier / 2:g}, or a larger cohort"
        )
    return rest**-0.5


@lru_cache(maxsize=4096)
def renyi(probability: float, multiplier: float) -> tuple[float, ...]:
    """Renyi divergence of one round at each of ``ORDERS``: the Poisson-sampled Gaussian (Mironov et al. 2019,
    arXiv 1908.10530, equation 10), add-or-remove-one-client adjacency."""
    if not 0 < probability <= 1:
        raise ValueError(f"a client joins a round with a probability in (0, 1], not {probability}")
    if multiplier <= 0:
        return (math.inf,) * len(ORDERS)
    if probability == 1:
        return tuple(order / (2 * multiplier**2) for order in ORDERS)
    result = []
    for order in ORDERS:
        k = np.arange(order + 1)
        log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        log_weight = k * math.log(probability) + (order - k) * math.log1p(-probability)
        log_moment = logsumexp(log_binomial + log_weight + k * (k - 1) / (2 * multiplier**2))
        result.append(max(float(log_moment), 0.0) / (order - 1))
    return tuple(result)


def epsilon(rounds: Sequence[tuple[float, float]], delta: float) -> float:
    """The epsilon spent by ``rounds`` of (probability to join, noise multiplier), at ``delta``.

    Composition adds Renyi divergences; the conversion is that of Canonne et al. 2020 (arXiv 2004.00010, proposition
    12). A round without noise makes it infinite.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), well below one over the number of clients; it is {delta}")
    if not rounds:
        return 0.0
    total = np.zeros(len(ORDERS))
    for (probability, multiplier), count in sorted(Counter(rounds).items()):
        total += count * np.asarray(renyi(probability, multiplier))
    orders = np.asarray(ORDERS)
    spent = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return max(float(spent.min()), 0.0)
