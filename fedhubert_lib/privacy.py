"""Client-level differential privacy: what one client adds to a round is bounded, and noise hides what it added.

A client scales its update down to norm C. Who adds the noise is who is trusted, and nobody else can draw it again: it
comes from the system's entropy.

``privacy: server``. The server is trusted with updates, metrics and validation losses; whoever sees a model is not. It
draws a secret Poisson cohort (a client joins with probability q), sums the updates, adds noise of deviation z C and
divides by the expected cohort q N, not by the number of answers, which depends on who is there (McMahan et al. 2018,
arXiv 1710.06963). A small or empty cohort is a round like any other. Epsilon, of the sampled Gaussian, holds for adding
or removing one client, against all who see models of this run but not its ledger, which tells losses without noise.

``privacy: client``. The server is not trusted. It knows who takes part, so that sampling hides nobody, and it would see
each update: every client adds noise of deviation z C / sqrt(cohort) itself and tells no metrics. Epsilon is that of the
client which took part most often, for what its speech changes in its updates, against the server and all others. With
secure aggregation the server sees sums alone, and the noise of all k in a sum hides each: a multiplier of z sqrt(k /
cohort) instead of z / sqrt(cohort). Clients that pool what they know with the server take their noise out of it.

C is fixed, or follows a quantile of the norms (Andrew et al. 2021, arXiv 1905.03871). Every draw of a cohort is charged
before its first message goes out, whatever becomes of it. Not covered: cluster statistics of 02_kmeans, how long a
client takes, and the last bits of floating point (Mironov 2012).

``privacy_seeded: true`` draws cohorts and noise from the seed, so that a simulation can be repeated. Whoever knows the
seed can subtract such noise: ledger and card say "not private".
"""

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedhubert_lib import files, seeds
from fedhubert_lib.federated.protocol import ClientHome
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


def poisson_cohort(clients: Sequence[str], expected: int, seed: int | None, *keys: int | str) -> list[str]:
    """Clients that join with probability ``expected / len(clients)`` each, independently: what the accountant assumes.

    The cohort's size varies from round to round; it may be empty. It is drawn from the system's entropy, or by (seed,
    keys): who knows the cohort is not hidden from by the sampling.
    """
    if not 0 < expected <= len(clients):
        raise ValueError(
            f"a cohort of {expected} cannot be drawn from {len(clients)} clients; set cohort to 1..clients"
        )
    generator = random.SystemRandom() if seed is None else seeds.numpy_generator(seed, *keys, "poisson-cohort")
    return [client for client in sorted(clients) if generator.random() < expected / len(clients)]


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


def label(p: Federation) -> str:
    """What ledger and card call the privacy of a study."""
    return p.privacy if p.privacy == "none" or not p.privacy_seeded else "not private: noise drawn from the seed"


def _seed(p: Federation) -> int | None:
    return p.seed if p.privacy_seeded else None


def protect(
    update: Mapping[str, Tensor], p: Federation, bound: float, home: ClientHome, number: int
) -> dict[str, float]:
    """Make what a client sends in round ``number`` private, in place; return the metric that adaptive clipping needs.

    ``privacy: server`` clips; ``privacy: client`` adds the client's part of the noise, too: the parts of a cohort of
    the size asked for add up to what a trusted server would add. Raises ValueError when a real server asks for noise
    from its seed.
    """
    if p.privacy_seeded and not home.simulated:
        raise ValueError("the server asks for noise from a seed that it knows; refused outside of a simulation")
    within = float(clip(update, bound) <= bound) - 0.5
    if p.privacy == "client":
        part, normal = 1 / math.sqrt(p.cohort), noise(_seed(p), number, home.client)
        _add(update, update_multiplier(p) * bound * part, normal)
        within += count_deviation(p) * part * float(normal(1))
    return {"within_bound": within} if p.privacy_quantile > 0 else {}


def release(
    mean: Mapping[str, Tensor], p: Federation, bound: float, number: int, answered: int, within: float, fewest: int = 1
) -> float:
    """Make the ``mean`` of the updates of ``answered`` clients private in place; return the next clipping norm.

    ``within`` sums the clients' ``within_bound``. Below ``fewest`` clients nothing was asked for, and the mean is zero:
    then one client more or less could change the sum by ``fewest`` updates at once. So the sum of s clients is scaled
    by (s - fewest + 1) / s, which grows from zero at ``fewest`` - 1 clients by one update for each client.
    """
    if p.privacy == "client":  # who took part is known, and all noise is in
        return adapt(bound, within / max(answered, 1) + 0.5, p.privacy_quantile) if p.privacy_quantile else bound
    counted = max(answered - fewest + 1, 0)
    normal = noise(_seed(p), number)
    for value in mean.values():
        value.mul_(counted / p.cohort)
    _add(mean, update_multiplier(p) * bound / p.cohort, normal)
    if p.privacy_quantile == 0:
        return bound
    within = within * counted / max(answered, 1) + count_deviation(p) * float(normal(1))
    return adapt(bound, within / p.cohort + 0.5, p.privacy_quantile)


def _add(arrays: Mapping[str, Tensor], deviation: float, normal: Callable[..., Tensor]) -> None:
    for name in sorted(arrays):
        arrays[name].add_(normal(*arrays[name].shape), alpha=deviation)


class Account:
    """What a training run has spent, kept in a file of JSON lines: one for each draw of a cohort, written before the
    draw's first message and never taken back, so that a round which is repeated after a kill costs twice.

    Seeded draws that are repeated are the same draws: they count once.
    """

    def __init__(self, p: Federation, path: Path, following: tuple[int, int]) -> None:
        """The account of a run whose next draw is that of ``following``: round and attempt."""
        self._p, self._path = p, path
        self._draws: Counter[tuple[float, float]] = Counter()
        self._clients: Counter[str] = Counter()
        rows = files.read_rows(path)
        self._known = {(row["round"], row["attempt"]) for row in rows} if p.privacy_seeded else set()
        for row in rows:
            if not p.privacy_seeded or (row["round"], row["attempt"]) < following:
                self._count(row)

    def charge(self, draw: tuple[int, int], clients: int, asked: Sequence[str], peers: int = 1) -> None:
        """Note that ``draw`` (round, attempt) asks ``asked`` of ``clients``; the server sees sums of ``peers`` of them.

        Does so before anything is sent.
        """
        p = self._p
        row: dict[str, Any] = {"round": draw[0], "attempt": draw[1]}
        if p.privacy == "server":
            row |= {"probability": p.cohort / clients, "multiplier": p.privacy_noise}
        else:
            cost = p.cohort / peers * _inverse_square(update_multiplier(p))
            if p.privacy_quantile > 0:  # a bit of sensitivity 1/2, which each client tells by itself
                cost += p.cohort * _inverse_square(2 * count_deviation(p))
            row |= {"clients": list(asked), "multiplier": cost**-0.5}
        if draw not in self._known:
            files.append_row(self._path, row)
        self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        if "probability" in row:
            self._draws[row["probability"], row["multiplier"]] += 1
        for client in row.get("clients", ()):
            self._clients[client] += _inverse_square(row["multiplier"])

    def epsilon(self) -> float | None:
        """What is spent at ``privacy_delta``, by whom most is; None: infinite."""
        releases = [(probability, multiplier, count) for (probability, multiplier), count in self._draws.items()]
        if self._clients:
            releases.append((1.0, max(self._clients.values()) ** -0.5, 1))
        spent = epsilon(releases, self._p.privacy_delta)
        return spent if math.isfinite(spent) else None


def _inverse_square(multiplier: float) -> float:
    return multiplier**-2 if multiplier else math.inf
