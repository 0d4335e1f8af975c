"""Client-level differential privacy: what one client adds to a round is bounded, and noise hides whether it was there.

A client scales its update down to norm C; the server sums the updates of a Poisson cohort (each client joins with
probability q), adds Gaussian noise of standard deviation z C and divides by the expected cohort q N, not by the number
of answers, which depends on who is there (McMahan et al. 2018, arXiv 1710.06963). C is fixed, or follows a quantile of
the norms (Andrew et al. 2021, arXiv 1905.03871). The privacy spent is counted in Renyi divergence.

The noise is drawn from the seed, as everything is, so that a study can be repeated: whoever knows the seed can subtract
it. A federation that must protect real people keeps its seed secret from those who see the model.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedhubert_lib import seeds
from fedhubert_lib.params import Federation

ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 1024)
"""Renyi orders tried. Integers only, for which the sampled Gaussian has a closed form: the bound is valid, and up to
5 % above that of dp-accounting's fractional orders."""


def noise(seed: int | None, *keys: int | str) -> Callable[..., Tensor]:
    """A generator of standard normal noise: called with a shape, it gives float64 values of that shape, new each time.

    With ``seed`` None its key is 32 bytes of the system's entropy: nobody, this process included, can draw the noise
    again. With a seed it is drawn by (seed, keys), for simulations that must repeat: that protects nobody, since who
    knows the seed can subtract it. The generator is AES-256 in counter mode, then Box and Muller's transform: torch's
    own has 32 bits of seed, few enough to try them all.
    """
    key = os.urandom(32) if seed is None else seeds.derive(seed, *keys, "noise").to_bytes(32, "little")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def normal(*shape: int) -> Tensor:
        count = math.prod(shape)
        pairs = -(-count // 2)
        bits = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs) >> 11
        radius, angle = torch.from_numpy((bits + 0.5) * 2.0**-53)  # uniform, of 53 bits and never 0
        radius, angle = radius.log_().mul_(-2).sqrt_(), angle.mul_(2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(shape)

    return normal


def norm(arrays: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64 and in sorted order of names."""
    return math.sqrt(sum(float(arrays[name].double().square().sum()) for name in sorted(arrays)))


def clip(arrays: Mapping[str, Tensor], bound: float) -> float:
    """Scale ``arrays`` in place to norm ``bound`` where longer; return the norm before. NaN and infinity are errors."""
    before = norm(arrays)
    if not math.isfinite(before):
        raise ValueError("the update has a NaN or infinite norm; nothing of it can be sent under a privacy bound")
    if before > bound:
        # One part in a million short of the bound: float32 rounding must not carry the result beyond it.
        for value in arrays.values():
            value.mul_(bound / before * (1 - 1e-6))
    return before


def add_noise(arrays: Mapping[str, Tensor], deviation: float, seed: int, *keys: int | str) -> None:
    """Add Gaussian noise of standard deviation ``deviation`` in place, drawn by (seed, keys, tensor name)."""
    for name, value in arrays.items():
        generator = seeds.torch_generator(seed, *keys, "privacy-noise", name)
        value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float32), alpha=deviation)


def poisson_cohort(clients: Sequence[str], expected: int, seed: int, *keys: int | str) -> list[str]:
    """Clients that join with probability ``expected / len(clients)`` each, independently: what the accountant assumes.

    The cohort's size varies from round to round; it may be empty.
    """
    if not 0 < expected <= len(clients):
        raise ValueError(
            f"a cohort of {expected} cannot be drawn from {len(clients)} clients; set cohort to 1..clients"
        )
    draws = seeds.numpy_generator(seed, *keys, "poisson-cohort").random(len(clients))
    return [client for client, draw in zip(sorted(clients), draws, strict=True) if draw < expected / len(clients)]


def adapt(bound: float, within: float, quantile: float, rate: float = 0.2) -> float:
    """The next round's clipping norm, given the (noisy) share of updates that were ``within`` the present one.

    Geometric steps to the ``quantile`` of the norms (Andrew et al. 2021, their rate 0.2).
    """
    return bound * math.exp(-rate * (within - quantile))


def count_deviation(p: Federation) -> float:
    """Deviation of the noise on the number of clients within the bound: a twentieth of the cohort, as in Andrew et al.,
    but enough for half of the privacy to remain where cohorts are small."""
    return max(p.cohort / 20, p.privacy_noise)


def update_multiplier(p: Federation) -> float:
    """The noise multiplier of the updates. With adaptive clipping the count takes its share of the privacy: both
    releases together cost what one of ``privacy_noise`` costs (Andrew et al. 2021, theorem 1; a client's bit, centred
    to -1/2 or 1/2, has sensitivity 1/2)."""
    if p.privacy_quantile == 0 or p.privacy_noise == 0:
        return p.privacy_noise
    return (p.privacy_noise**-2 - (2 * count_deviation(p)) ** -2) ** -0.5


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


# --------------------------------------------------------------------------------------------------- a round's two ends


def protect(update: Mapping[str, Tensor], p: Federation, bound: float, client: str, number: int) -> dict[str, float]:
    """Make what a client sends in round ``number`` private, in place; return the metric that adaptive clipping needs.

    ``privacy: server`` clips; ``privacy: client`` adds the client's share of the noise, too, so that the server sees no
    update bare: the shares of an expected cohort add up to the server's noise.
    """
    within = float(clip(update, bound) <= bound) - 0.5
    if p.privacy == "client":
        share = 1 / math.sqrt(p.cohort)
        add_noise(update, update_multiplier(p) * bound * share, p.seed, number, client)
        within += _count_noise(p, number, client) * share
    return {"within_bound": within}


def initial_state(p: Federation) -> dict[str, Any]:
    """What the server keeps from round to round: the clipping norm, and what was released so far. JSON-like."""
    return {"bound": p.privacy_clip, "releases": []}


def release(
    mean: Mapping[str, Tensor],
    p: Federation,
    state: dict[str, Any],
    clients: int,
    number: int,
    answered: Sequence[float],
) -> dict[str, float | None]:
    """Make the mean of bounded updates private in place; count its cost in ``state``; return part of a row.

    ``clients`` are all that could have been drawn; ``answered`` has the ``within_bound`` of those that gave an update.
    The row's epsilon is None where it is infinite.
    """
    bound, present = state["bound"], len(answered) / p.cohort
    for value in mean.values():
        value.mul_(present)
    if p.privacy == "server":
        add_noise(mean, update_multiplier(p) * bound / p.cohort, p.seed, number)
        within, spent = sum(answered) + _count_noise(p, number), p.privacy_noise
    else:  # what hides a client is the noise of the others that answered
        within, spent = sum(answered), p.privacy_noise * math.sqrt((len(answered) - 1) / p.cohort)
    if p.privacy_quantile > 0:
        state["bound"] = adapt(bound, within / p.cohort + 0.5, p.privacy_quantile)
    _count(state["releases"], p.cohort / clients, spent)
    total = epsilon(state["releases"], p.privacy_delta)
    return {"clip": bound, "epsilon": total if math.isfinite(total) else None}


def _count_noise(p: Federation, *keys: int | str) -> float:
    return count_deviation(p) * float(seeds.numpy_generator(p.seed, *keys, "privacy-count").standard_normal())


def _count(releases: list[list[float]], probability: float, multiplier: float) -> None:
    if releases and releases[-1][:2] == [probability, multiplier]:
        releases[-1][2] += 1
    else:
        releases.append([probability, multiplier, 1])
