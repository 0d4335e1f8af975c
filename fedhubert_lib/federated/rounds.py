"""Federated training, round by round: pretraining and distillation share it, and ``run`` is all of it.

The server knows clients through ``protocol.Clients`` only. Every draw comes from (seed, round), updates are added in
the order of client ids, and each round ends with a checkpoint: a run that is killed resumes and ends with the same
weights. What a study adds to this (SCAFFOLD, privacy, secure aggregation, compression, robust means) are ``hooks``.
"""

import itertools
import logging
import math
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedhubert_lib import checkpoints, federated, files, seeds, threads
from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.federated import handlers, hooks, optimisers
from fedhubert_lib.federated.protocol import Arrays, Clients, Failure, Reply
from fedhubert_lib.meter import Meter
from fedhubert_lib.params import Distill, Federation, Pretrain

ATTEMPTS = 3
"""Attempts at a round below its quorum before the run stops."""

logger = logging.getLogger(__name__)


class QuorumError(RuntimeError):
    """Too few clients gave a usable update, several times over. The same command tries again."""


@dataclass(frozen=True)
class Task:
    """What is trained."""

    name: str
    """Clients are asked for NAME.update, NAME.validate and NAME.forget, and NAME.keys for secure aggregation."""
    config: Mapping[str, Any]
    """Sent with each message, JSON-like; the loop adds round, session and durable."""
    averages: Callable[[Mapping[str, float]], dict[str, float]]
    """From added-up metrics of clients to the columns of a row: loss (lower is better) and others."""
    documents: Mapping[str, str] = field(default_factory=dict)
    """Small files that belong beside the weights, by name."""


def cohort(ids: Sequence[str], count: int, seed: int, number: int, attempt: int = 0) -> list[str]:
    """The clients of round ``number``, sorted: drawn by client id without replacement, again for each attempt.

    >>> cohort(["a", "b", "c"], 3, seed=0, number=1)
    ['a', 'b', 'c']
    """
    generator = seeds.numpy_generator(seed, number, "cohort", attempt)
    return sorted(generator.choice(sorted(ids), count, replace=False).tolist())


def panel(ids: Sequence[str], p: Federation) -> list[str]:
    """The clients that validate, the same in every round: as many as a cohort."""
    return cohort(ids, p.cohort, p.seed, 0)


def run(server: "Server") -> None:
    """All rounds that are left, of the server that ``serving`` yields."""
    for round in server.rounds():
        cohort = round.draw()
        replies = round.ask(cohort)
        update = round.collect(replies)
        if update is not None:  # enough clients gave a usable update
            round.step(update)
            round.save()


@contextmanager
def connected(run: Path, p: Pretrain | Distill, clients: Clients | None = None) -> Iterator[Clients]:
    """The clients of a training over ``p.engine``, or ``clients``, with the number of threads that ``p`` asks for.

    Raises FileNotFoundError where the baseline, which is to follow, would lack data of clients on this machine.
    """
    if p.centralised and p.engine == "deployment":
        handlers.homes(run, federated.client_ids(run, p.codebook), "pretrain", p.device)
    connection = federated.connect(run, p.engine, p.device, p.codebook) if clients is None else nullcontext(clients)
    with threads.limited(p.threads), connection as clients:
        yield clients


@contextmanager
def serving(
    clients: Clients, p: Federation, task: Task, weights: Arrays, out: Path, on_row: checkpoints.OnRow | None = None
) -> Iterator["Server"]:
    """The server of a training of ``weights`` (float32 CPU, changed in place), or of the one that ``out`` holds.

    Writes ``out/metrics.jsonl``, of which ``on_row`` sees each row as it is written, and ``out/checkpoints``. Raises
    CheckpointError when ``out`` holds a run with other parameters, RuntimeError when another process trains there. A
    KeyboardInterrupt at any moment leaves a state to resume from. After the last round clients are asked, for two
    minutes at most, to forget what they kept.
    """
    with checkpoints.sole(out):
        server = Server(clients, p, task, weights, out, on_row)
        with server.writer:
            yield server
            server.settle()
        if server.durable == p.rounds:  # no round can follow; each start asks, since a kill may have come before
            list(clients.ask(f"{task.name}.forget", config=server.message(p.rounds), timeout=120.0))


class Server:
    """What the server holds between rounds: the weights, the tensors of its optimiser and hooks, and the ledger."""

    def __init__(
        self, clients: Clients, p: Federation, task: Task, weights: Arrays, out: Path, on_row: checkpoints.OnRow | None
    ) -> None:
        self.clients, self.p, self.task, self.out, count = clients, p, task, out, len(clients.ids)
        if p.cohort > count:
            raise ValueError(f"a cohort of {p.cohort} cannot be drawn from {count} clients; lower cohort")
        self.weights, self.tensors = weights, optimisers.moments(p, weights)
        settings = checkpoints.decisive(p) | {"task": task.name, "clients": count, "first_client": min(clients.ids)}
        session = out / "checkpoints" / "session"  # on disk before clients keep state under it, which no start may lose
        if not session.exists():
            files.write_text(session, uuid.uuid4().hex)
        self.state: dict[str, Any] = {"round": 0, "session": session.read_text(encoding="utf-8"), "settings": settings}
        self.plan = {"rounds": p.rounds, "local_steps": p.local_steps, "cohort": p.cohort, "clients": count}
        # What hooks may change:
        self.bounded = False
        """Whether the norm of every update is bounded: outliers are then not left out."""
        self.trusted = True
        """Whether clients send metrics, and validate."""
        self.metrics = dict.fromkeys(("objective_count", "audio_seconds", "seconds", "learning_rate"), math.inf)
        """Metrics of every client's update, and what each is below."""
        self.hooks: list[hooks.Hook] = [hook(self) for hook in hooks.chosen(hooks.AT_SERVER, p)]
        self.state |= checkpoints.resume(out, settings, self.weights, self.tensors)
        self.durable = self.state["round"]
        """The last round that is on disk."""
        self.ledger = checkpoints.Ledger(out, self.durable, self.plan, on_row)
        self.meter, self.writer = Meter(p.device, p.engine), ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.saving: Future[None] | None = None
        self._counted: Mapping[str, int] = {}
        if any((sent := self.sent()).values()):  # to the connected clients before: a teacher, clusters of its features
            self.ledger.row("sent", sent)

    def rounds(self) -> Iterator["Round"]:
        """The rounds that are left.

        One that was not saved comes again, with another cohort. Raises QuorumError after ``ATTEMPTS`` of them.

        >>> this_round = next(server.rounds())
        >>> update = this_round.collect(this_round.ask(this_round.draw()))
        >>> update.keys() == server.weights.keys()
        True
        """
        while self.state["round"] < self.p.rounds:
            number, began = self.state["round"] + 1, time.perf_counter()
            for _ in range(ATTEMPTS):
                yield Round(self, number, began)
                if self.state["round"] == number:
                    break
            else:
                self.settle()
                failures = [row for row in files.read_rows(self.out / "metrics.jsonl") if "reason" in row]
                reasons = Counter(row["reason"] for row in failures if row["round"] == number and row["client"])
                raise QuorumError(
                    f"round {number}: {ATTEMPTS} times too few usable updates, see {self.out / 'metrics.jsonl'} (kind:"
                    f" failure); the same command resumes after round {number - 1}, with another cohort"
                    + "".join(f". Most often: {reason}" for reason, _ in reasons.most_common(1))
                )

    def message(self, number: int) -> dict[str, Any]:
        """The configuration of a message of round ``number``."""
        return {**self.task.config, "round": number, "session": self.state["session"], "durable": self.durable}

    def ask(self, action: str, config: Mapping[str, Any], clients: Sequence[str], arrays: Arrays | None = None):
        """``Clients.ask`` for an action of the task, with the study's deadline."""
        action, deadline = f"{self.task.name}.{action}", self.p.deadline_seconds or None
        return self.clients.ask(action, arrays=arrays, config=config, clients=clients, timeout=deadline)

    def averages(self, sums: Mapping[str, float]) -> Mapping[str, float | None]:
        """The clients' metrics for a row; no loss where nobody answered, or sent any."""
        return self.task.averages(sums) if sums and self.trusted else {"loss": None}

    def fail(self, number: int, client: str, reason: str, **more: float) -> None:
        """Record who was left out of round ``number``, and why; no client: the whole cohort."""
        logger.warning("round %d: %s left out: %s", number, client or "cohort", reason)
        self.ledger.row("failure", {"round": number, "client": client, "reason": reason, **more})

    def sent(self) -> dict[str, int]:
        """Bytes up and down since the last call."""
        sent, self._counted = self.clients.since(self._counted), dict(self.clients.bytes)
        return sent

    def save(self) -> None:
        """Start to write the checkpoint of the round, in a second thread while the next round's clients work."""
        arguments = (self.out, self.weights, self.tensors, dict(self.state), self.task.documents)
        self.saving = self.writer.submit(checkpoints.write, *arguments)

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk: before the weights and tensors change that it is written from."""
        if self.saving is not None:
            self.saving.result()
            self.saving = None
            self.durable = self.state["round"]


class Round:
    """One attempt at a round: its cohort, the message, and what came back."""

    def __init__(self, server: Server, number: int, began: float) -> None:
        self.server, self.p, self.number, self.began = server, server.p, number, began
        self.attempt = len(server.ledger.failed)
        """Attempts at this round that failed before, in earlier starts, too: no cohort is drawn twice."""
        self.fewest = 1  # usable updates below which the round is no round, whatever the quorum
        self.clients: list[str] = []  # whose updates were usable
        self.norms: list[float] = []
        self.sums: Counter[str] = Counter()
        self.server_seconds = 0.0
        self.row: dict[str, Any] = {"learning_rate": None}
        """Columns of the ledger that are known so far."""

    def draw(self) -> list[str]:
        """The clients of this round, sorted."""
        for hook in self.server.hooks:
            if (drawn := hook.draw(self)) is not None:
                return drawn
        return cohort(self.server.clients.ids, self.p.cohort, self.p.seed, self.number, self.attempt)

    def ask(self, cohort: Sequence[str]) -> Iterator[Reply | Failure]:
        """Send the weights to ``cohort``; the clients' updates, as they arrive, in the order of client ids."""
        self.cohort = self.asked = list(cohort)
        self.server.ledger.row("cohort", {"round": self.number, "clients": self.cohort})
        self.quorum = max(self.fewest, math.ceil(self.p.quorum * len(self.cohort) - 1e-9))
        self.message, self.payload = self.server.message(self.number), dict(self.server.weights)
        for hook in self.server.hooks:
            hook.message(self)
        collectors = (hook.collector(self) for hook in self.server.hooks)
        self.collector = next(filter(None, collectors), None) or optimisers.Collector()
        return self.server.ask("update", self.message, self.asked, self.payload) if self.asked else iter(())

    def collect(self, replies: Iterator[Reply | Failure]) -> Arrays | None:
        """The collected update, of the usable ones; None below the quorum. Each client gets a row of the ledger."""
        for reply, norm in self._without_outliers(self._usable(replies)):
            self._add(reply, norm)
            reply.arrays.clear()  # several loops still hold this reply while the next client works
        if len(self.clients) < self.quorum:
            reason = f"{len(self.clients)} of {len(self.cohort)} clients gave a usable update; {self.quorum} needed"
            self.server.fail(self.number, "", reason, **self.server.sent())
            return None
        return self.collector.result() or {name: torch.zeros_like(w) for name, w in self.server.weights.items()}

    def step(self, update: Arrays) -> None:
        """Move the weights along ``update``."""
        server, working = self.server, time.perf_counter()
        server.settle()
        for hook in server.hooks:
            hook.step(self, update)
        self.row["update_norm"] = optimisers.checked_norm(update, server.weights)
        optimisers.step(self.p, self.number, server.weights, update, server.tensors)
        self.server_seconds += time.perf_counter() - working

    def save(self) -> None:
        """Validate, write the round's row, and begin to write its checkpoint."""
        server, number = self.server, self.number
        row = {"round": number, **server.averages(self.sums), **self.row, **self._validated()} | self._cost()
        if not server.bounded:
            server.state["reference_norm"] = statistics.median(self.norms)
        server.state["round"] = number
        server.ledger.row("round", row)
        server.save()

    def _usable(self, replies: Iterator[Reply | Failure]) -> Iterator[tuple[Reply, float]]:
        """Replies whose updates fit, with their norms; others are recorded."""
        for reply in replies:
            if isinstance(reply, Failure):
                self.server.fail(self.number, reply.client, reply.reason)
                continue
            began = time.perf_counter()
            try:
                update = reply.arrays
                for hook in self.server.hooks:
                    update = hook.received(self, update)
                norm = self.collector.norm(update, self.payload)
                check_metrics(reply.metrics, self.server.metrics, self.server)
            except optimisers.UpdateError as error:
                self.server.fail(self.number, reply.client, str(error))
                continue
            self.server_seconds += time.perf_counter() - began
            yield replace(reply, arrays=update), norm

    def _without_outliers(self, replies: Iterator[tuple[Reply, float]]) -> Iterator[tuple[Reply, float]]:
        """Replies whose updates are not ``outlier`` times as large as usual.

        Bounded updates need no such test, and must have none: whether one client counts would depend on others.
        """
        if self.server.bounded:
            yield from replies
            return
        usual: Any = self.server.state.get("reference_norm")
        if usual is None and (first := list(itertools.islice(replies, 2))):
            # No earlier round says how large an update is. The first two do, or the first three if these disagree.
            norms = [norm for _, norm in first]
            if max(norms) > self.p.outlier * min(norms):
                first += itertools.islice(replies, 1)
            usual = statistics.median_low(norm for _, norm in first)
            replies = itertools.chain(first, replies)
            del first
        for reply, norm in replies:
            if norm > self.p.outlier * usual > 0:
                reason = f"its update is {norm / usual:.3g} times as large as is usual"
                self.server.fail(self.number, reply.client, reason)
            else:
                yield reply, norm

    def _add(self, reply: Reply, norm: float) -> None:
        began, metrics = time.perf_counter(), reply.metrics
        self.collector.add(reply.arrays, metrics["objective_count"] if self.p.weighting == "masked-frames" else 1.0)
        self.clients.append(reply.client)
        self.row["learning_rate"] = metrics["learning_rate"]
        self.sums.update(metrics)
        self.server_seconds += time.perf_counter() - began
        row = {"round": self.number, "client": reply.client, **self.server.averages(metrics)}
        names = "gradient_norm", "audio_seconds", "seconds", "peak_memory_bytes"
        row |= {name: metrics[name] for name in names if name in metrics}
        if "objective_count" in metrics:
            row["masked_frames"] = metrics["objective_count"]
        if self.server.bounded:  # as the client sent it, if it says so
            norm = metrics.get("update_norm", norm)
        if not math.isnan(norm):
            self.norms.append(norm)
            row["update_norm"] = norm
        self.server.ledger.row("client", row)

    def _validated(self) -> dict[str, float]:
        """Loss and accuracy of the new weights on validation utterances of a panel of clients, the same every round."""
        server, number = self.server, self.number
        if not server.trusted or (number % self.p.validate_every and number != self.p.rounds):
            return {}
        clients, sums, count = panel(server.clients.ids, self.p), Counter[str](), 0
        for reply in server.ask("validate", server.message(number), clients, server.weights):
            try:
                if isinstance(reply, Failure):
                    raise optimisers.UpdateError(reply.reason)
                check_metrics(reply.metrics, {}, server)
                if reply.metrics:  # none: it has no validation utterances
                    sums.update(reply.metrics)
                    count += 1
            except optimisers.UpdateError as error:
                server.fail(number, reply.client, f"validation: {error}")
        averages = server.task.averages(sums) | {"clients": count} if count else {}
        return {f"validation_{name}": value for name, value in averages.items()}

    def _cost(self) -> dict[str, Any]:
        """Rates, times, and bytes, of validation and of attempts that failed, too; None where clients do not say."""
        seconds, sums = time.perf_counter() - self.began, self.sums if self.server.trusted else {}
        audio_seconds = sums.get("audio_seconds", 0.0 if self.server.trusted else None)  # 0: nobody was drawn
        failed = self.server.ledger.failed
        return self.server.meter.used() | {
            "server_rate": optimisers.rate(self.p, self.number),
            **{name: n + sum(row.get(name, 0) for row in failed) for name, n in self.server.sent().items()},
            "clients": len(self.clients),
            "server_seconds": self.server_seconds,
            "seconds": seconds,
            "steps": sums.get("steps"),
            "client_seconds": sums.get("seconds"),
            "audio_seconds": audio_seconds,
            "audio_seconds_per_second": audio_seconds / seconds if audio_seconds else None,
        }


def check_metrics(metrics: Mapping[str, float], needed: Mapping[str, float], server: Server) -> None:
    """Raise UpdateError when metrics lack something, are not finite, or claim what cannot be."""
    if missing := needed.keys() - metrics.keys():
        raise optimisers.UpdateError(f"its metrics lack {', '.join(sorted(missing))}")
    if unusable := [name for name, value in metrics.items() if not abs(value) < min(needed.get(name, math.inf), 1e30)]:
        raise optimisers.UpdateError(f"its metrics are not finite, or larger than they can be ({unusable})")
    seconds = server.p.local_steps * server.p.batch_seconds
    frames = min(seconds, metrics.get("audio_seconds", seconds)) * SAMPLE_RATE / HOP
    for name, most in ("audio_seconds", 1.001 * seconds), ("objective_count", frames):
        if name in needed and not 0 < metrics[name] <= most:
            raise optimisers.UpdateError(f"it claims {name} of {metrics[name]:g}; up to {most:g} are possible")
    try:
        server.averages(metrics)
    except KeyError as name:
        raise optimisers.UpdateError(f"its metrics lack {name.args[0]}") from None
