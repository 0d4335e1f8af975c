"""What the clients of one cohort send, collected as it arrives: unusable answers are recorded and left out."""

import itertools
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedhubert_lib import compression, privacy, secure
from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.federated import checkpoints, optimisers
from fedhubert_lib.federated.protocol import Failure, Reply
from fedhubert_lib.params import Federation

logger = logging.getLogger(__name__)

METRICS = {"objective_count", "audio_seconds", "seconds", "learning_rate"}
"""What every client tells, unless the server is not trusted with it."""


@dataclass
class Collected:
    """The usable updates of one cohort, as far as they have come."""

    p: Federation
    number: int
    """Of the round."""
    clip: float
    """Norm that private updates are scaled down to."""
    reference_norm: float | None
    """Usual norm of an update; None where no earlier round says it."""
    averages: Callable[[Mapping[str, float]], dict[str, float | None]]
    ledger: checkpoints.Ledger
    collector: optimisers.Collector = field(default_factory=optimisers.Mean)
    clients: int = 0
    norms: list[float] = field(default_factory=list)
    within_bound: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)
    learning_rate: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0

    def add(self, reply: Reply, norm: float) -> None:
        """Add one usable update to what is collected, and its row to the ledger."""
        began = time.perf_counter()
        metrics = reply.metrics
        weight = metrics["objective_count"] if self.p.weighting == "masked-frames" else 1.0
        self.collector.add(reply.arrays, weight)
        self.clients += 1
        self.norms.append(norm)
        self.within_bound += metrics.get("within_bound", 0.0)
        self.learning_rate = metrics["learning_rate"]
        self.sums.update(metrics)
        self.server_seconds += time.perf_counter() - began
        row = {"round": self.number, "client": reply.client, **self.averages(metrics)}
        row |= {name: metrics[name] for name in ("audio_seconds", "seconds", "peak_memory_bytes") if name in metrics}
        row |= {"masked_frames": metrics["objective_count"]} if "objective_count" in metrics else {}
        self.ledger.row("client", row if self.p.secure_aggregation else row | {"update_norm": norm})

    def usable(self, answers: Iterator[Reply | Failure], like: Mapping[str, Tensor]) -> Iterator[tuple[Reply, float]]:
        """Replies whose updates fit ``like`` and are no outliers, with their norms."""
        replies = self._sound(answers, like)
        # Bounded updates need no outlier test, and must have none: whether one client's counted would depend on others.
        bounded = self.p.privacy != "none" or self.p.secure_aggregation
        reference = 0.0 if bounded else self.reference_norm
        if reference is None:
            # No earlier round says how large an update is. The first two do, or the first three if these disagree.
            held = list(itertools.islice(replies, 2))
            norms = [norm for _, norm in held]
            if held and max(norms) > self.p.outlier * min(norms):
                held += itertools.islice(replies, 1)
            reference = statistics.median_low(norm for _, norm in held) if held else 0.0
            replies = itertools.chain(held, replies)
            del held
        for reply, norm in replies:
            if norm > self.p.outlier * reference > 0:
                reason = f"its update is {norm / reference:.3g} times as large as is usual"
                fail(self.ledger, self.number, reply.client, reason)
            else:
                yield reply, norm

    def _sound(self, answers: Iterator[Reply | Failure], like: Mapping[str, Tensor]) -> Iterator[tuple[Reply, float]]:
        for answer in answers:
            if isinstance(answer, Failure):
                fail(self.ledger, self.number, answer.client, answer.reason)
                continue
            began = time.perf_counter()
            self.bytes_up += size(answer.arrays)
            try:
                update, norm = self._checked(answer, like)
            except optimisers.UpdateError as error:
                fail(self.ledger, self.number, answer.client, str(error))
                continue
            self.server_seconds += time.perf_counter() - began
            yield replace(answer, arrays=update), norm

    def _checked(self, answer: Reply, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        update, norm = answer.arrays, 0.0  # of a masked update nobody here can know the norm
        if self.p.compression != "none":
            update = compression.decode(update, self.p.compression, like)
        if self.p.secure_aggregation:
            secure.check(update, like)
        else:
            norm = optimisers.checked_norm(update, like)
        check_metrics(answer.metrics, self.p)
        # Rounding may have carried it beyond the bound; and who says that it clipped? A mask tells nothing.
        if self.p.privacy == "server" and not self.p.secure_aggregation:
            privacy.clip(update, self.clip)
        return update, norm


def check_metrics(metrics: Mapping[str, float], p: Federation) -> None:
    """Raise UpdateError when metrics lack something, are not finite, or claim a weight that cannot be."""
    needed = {"learning_rate"} if p.privacy == "client" else METRICS
    needed = needed | {"within_bound"} if p.privacy != "none" and p.privacy_quantile > 0 else needed
    if missing := needed - metrics.keys():
        raise optimisers.UpdateError(f"its metrics lack {', '.join(sorted(missing))}")
    if unusable := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise optimisers.UpdateError(f"its metrics are not finite ({unusable})")
    possible = p.local_steps * p.batch_seconds * SAMPLE_RATE / HOP
    if not 0 < (claimed := metrics.get("objective_count", 1)) <= possible:
        raise optimisers.UpdateError(f"it claims {claimed:g} masked frames; from 1 to {possible:g} are possible")


def fail(ledger: checkpoints.Ledger, number: int, client: str, reason: str) -> None:
    """Record who was left out of round ``number``, and why; no client: the whole cohort."""
    logger.warning("round %d: %s left out: %s", number, client or "cohort", reason)
    ledger.row("failure", {"round": number, "client": client, "reason": reason})


def size(arrays: Mapping[str, Tensor]) -> int:
    """Bytes of ``arrays``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in arrays.values())
