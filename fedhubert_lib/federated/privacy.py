"""Client-level differential privacy: what one client adds to a round is bounded, and noise hides what it added.

A client scales its update down to norm C, which is fixed, or follows a quantile of the norms (Andrew et al. 2021, arXiv
1905.03871). Every draw of a cohort is charged before updates are asked for, whatever becomes of it.

``privacy: server``: the server draws a secret Poisson cohort (a client joins with probability q), sums the updates,
adds noise of standard deviation z C and divides by the expected cohort q N, not by the number of answers, which depends
on who is there (McMahan et al. 2018, arXiv 1710.06963). A small or empty cohort is a round like any other. Epsilon is
that of the sampled Gaussian, for adding or removing one client.

``privacy: client``: every client adds noise of z C / sqrt(cohort) itself and sends no metrics. The server knows who
takes part, so that sampling hides nobody: epsilon is that of the client which took part most often, at a multiplier of
z / sqrt(cohort). With secure aggregation, which shows sums alone, the noise of all k in a sum hides each, but from
another client, which knows its own: z sqrt((k - 1) / cohort).

docs/privacy.md says who is hidden from whom, where the noise comes from, and what epsilon does not cover.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from fedhubert_lib import seeds, training
from fedhubert_lib.federated import accounting, noise, optimisers
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.params import Federation

ACCOUNT = "privacy.jsonl"
"""File of a private run: ``accounting.charge``."""
SMALLEST_SUM = 3
"""Clients below which a sum reveals too much: with two, each could subtract its own update."""


def poisson_cohort(clients: Sequence[str], expected: int, seed: int | None, *keys: int | str) -> list[str]:
    """Clients that join with probability ``expected / len(clients)`` each, independently: what the accountant assumes.

    It may be empty. It is drawn from the system's entropy, or by (seed, keys): sampling hides no client from those who
    know the cohort.
    """
    generator = random.SystemRandom() if seed is None else seeds.numpy_generator(seed, *keys, "poisson-cohort")
    return [client for client in sorted(clients) if generator.random() < expected / len(clients)]


def adapt(bound: float, within: float, quantile: float) -> float:
    """The next round's clipping norm, from the (noisy) fraction of updates that were ``within`` the present one.

    Geometric steps to the ``quantile`` of the norms (Andrew et al. 2021, their rate 0.2); of quantile 0 none.
    """
    return bound * math.exp(-0.2 * (within - quantile)) if quantile else bound


def count_std(p: Federation) -> float:
    """Standard deviation of the noise on the number of clients within the bound: a twentieth of the cohort, as in
    Andrew et al., but enough for three quarters of the privacy (1/z²) to remain where cohorts are small."""
    return max(p.cohort / 20, p.privacy_noise)


def update_multiplier(p: Federation) -> float:
    """The noise multiplier of the updates. With adaptive clipping the count takes its part of the privacy: both
    releases together cost what one of ``privacy_noise`` costs (Andrew et al. 2021, theorem 1; a client's bit, centred
    to -1/2 or 1/2, has sensitivity 1/2)."""
    if p.privacy_quantile == 0 or p.privacy_noise == 0:
        return p.privacy_noise
    return (p.privacy_noise**-2 - (2 * count_std(p)) ** -2) ** -0.5


def _seed(p: Federation) -> int | None:
    return p.seed if p.privacy_seeded else None


def _add_noise(arrays: Mapping[str, Tensor], std: float, normal: Callable[..., Tensor]) -> None:
    for name in sorted(arrays):
        arrays[name].add_(normal(*arrays[name].shape), alpha=std)


# ---------------------------------------------------------------------------------------------------------- at a client


def protected(update: Update) -> Iterator[None]:
    """Bound the update, add the client's part of the noise, and keep back the metrics, as the study asks."""
    yield
    p = update.p
    if p.privacy == "client":  # nothing else is for a server that is not trusted, nor how many steps `local_epochs` are
        last = update.config["round"] * p.local_steps - 1
        rate = training.rate(p.learning_rate, p.warmup_fraction, last, p.rounds * p.local_steps)
        update.measured = {"learning_rate": rate}
    update.measured |= protect(update.change, p, update.config["clip"], update.home, update.config["round"])


def protect(
    update: Mapping[str, Tensor], p: Federation, bound: float, home: ClientHome, number: int
) -> dict[str, float]:
    """Make what a client sends in round ``number`` private, in place; return the metric that adaptive clipping needs
    and, for a trusted server, the norm before clipping.

    Raises ValueError when a real server asks for noise from its seed.
    """
    if p.privacy_seeded and not home.simulated:
        raise ValueError("the server asks for noise from a seed that it knows; refused outside of a simulation")
    norm = noise.clip(update, bound)
    within = float(norm <= bound) - 0.5
    if p.privacy == "client":
        part, normal = 1 / math.sqrt(p.cohort), noise.generator(_seed(p), number, home.client)
        _add_noise(update, update_multiplier(p) * bound * part, normal)
        within += count_std(p) * part * float(normal(1))
    measured = {"update_norm": norm} if p.privacy == "server" else {}
    return measured | ({"within_bound": within} if p.privacy_quantile > 0 else {})


# -------------------------------------------------------------------------------------------------------- at the server


class Bounding(Hook):
    """Draw secret cohorts, charge the account, add the server's noise, move the clipping norm."""

    def __init__(self, server) -> None:
        super().__init__(server)
        p = self.p
        self._account = server.out / ACCOUNT
        self._drawn: list[str] | None = None
        server.state["clip"] = p.privacy_clip
        server.plan["privacy"] = "not private: noise drawn from the seed" if p.privacy_seeded else p.privacy
        server.bounded = True
        if p.privacy == "client":
            server.trusted, server.metrics = False, {"learning_rate": math.inf}
        if p.privacy_quantile > 0:
            of_noise = 8 * count_std(p) / math.sqrt(p.cohort) if p.privacy == "client" else 0.0
            server.metrics = {**server.metrics, "within_bound": 0.51 + of_noise}  # beyond, no client keeps to it

    def draw(self, round) -> list[str] | None:
        """With a trusted server a Poisson cohort; to draw another in place of a small one is not accounted for."""
        p, ids = self.p, self.server.clients.ids
        if p.privacy == "client":
            return None
        round.fewest = 0
        self._drawn = poisson_cohort(ids, p.cohort, _seed(p), round.number, round.attempt)
        self._charge(round, probability=p.cohort / len(ids), multiplier=p.privacy_noise)
        return self._drawn

    def message(self, round) -> None:
        """Send the bound. A server that is not trusted sees who is asked, and each update, or their sum."""
        p, round.message["clip"] = self.p, self.server.state["clip"]
        if p.privacy == "server" and sorted(round.cohort) != self._drawn:
            raise ValueError("privacy: server: ask the cohort that round.draw() has drawn, once: epsilon rests on that")
        self._drawn = None
        if p.privacy == "client" and round.asked:
            peers = len(round.asked) - 1 if p.secure_aggregation else 1  # each of whom can take its own noise off
            cost = p.cohort / peers * accounting.inverse_square(update_multiplier(p))
            if p.privacy_quantile > 0:  # a bit of sensitivity 1/2, which each client sends by itself
                cost += p.cohort * accounting.inverse_square(2 * count_std(p))
            self._charge(round, clients=list(round.asked), multiplier=cost**-0.5)

    def received(self, round, update: Arrays) -> Arrays:
        """Clip again: rounding may have carried an update beyond the bound, and clients need not have clipped. With
        the client's noise in it an update cannot be clipped, but refused."""
        if self.p.secure_aggregation:
            return update
        norm, bound = optimisers.checked_norm(update, round.payload), self.server.state["clip"]
        # A norm that standard normal values in place of those of the update do not reach (once in 10^21).
        longest = math.sqrt(sum(value.numel() for value in update.values())) + 10
        if self.p.privacy == "server":
            noise.clip(update, bound)
        elif norm > bound * (1.01 + update_multiplier(self.p) * longest / math.sqrt(self.p.cohort)):
            raise optimisers.UpdateError(f"its norm of {norm:.3g} is beyond the clipping norm and the noise")
        return update

    def step(self, round, update: Arrays) -> None:
        """Add the noise; the ledger says what the run has spent."""
        state, p = self.server.state, self.p
        until = (round.number, round.attempt) if p.privacy_seeded else None
        epsilon = accounting.spent([self._account], p.privacy_delta, until)
        round.row |= {"clip": state["clip"], "epsilon": epsilon, "privacy": self.server.plan["privacy"]}
        state["clip"] = release(update, p, state["clip"], round.number, len(round.clients), round.sums["within_bound"])

    def _charge(self, round, **row) -> None:
        row |= {"round": round.number, "attempt": round.attempt}
        accounting.charge(self._account, row, self.p.privacy_seeded)


def release(
    mean: Mapping[str, Tensor], p: Federation, bound: float, number: int, answered: int, within: float
) -> float:
    """Make the ``mean`` of the updates of ``answered`` clients private in place; return the next clipping norm.

    ``within`` sums the clients' ``within_bound``. With secure aggregation nothing was asked of fewer than SMALLEST_SUM
    clients, and the mean is zero: then one client more or less could change the sum by so many updates at once. So the
    sum of s clients is scaled by (s - SMALLEST_SUM + 1) / s, which grows from zero by one update for each client.
    """
    if p.privacy == "client":  # who took part is public, and all noise is in
        return adapt(bound, within / max(answered, 1) + 0.5, p.privacy_quantile)
    counted = max(answered - SMALLEST_SUM + 1, 0) if p.secure_aggregation else answered
    normal = noise.generator(_seed(p), number)
    for value in mean.values():
        value.mul_(counted / p.cohort)
    _add_noise(mean, update_multiplier(p) * bound / p.cohort, normal)
    within = within * counted / max(answered, 1) + count_std(p) * float(normal(1))
    return adapt(bound, within / p.cohort + 0.5, p.privacy_quantile)
