"""Federated training, round by round: draw a cohort, ask, collect, step, save. Pretraining and distillation share it.

The server knows clients through ``protocol.Clients`` only. Every draw comes from (seed, round), updates are added in
the order of client ids, and each round ends with a checkpoint: a run that is killed goes on and ends with the same
weights.
"""

import functools
import math
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedhubert_lib import identity, params, privacy, resources, secure, seeds
from fedhubert_lib.federated import checkpoints, optimisers
from fedhubert_lib.federated.collecting import Collected, fail, size
from fedhubert_lib.federated.protocol import Arrays, Clients, Failure
from fedhubert_lib.params import Federation

ATTEMPTS = 3
"""Times that a round below its quorum is tried before the run stops."""
ACCOUNT = "privacy.jsonl"
"""What a private run has spent: ``privacy.Account``."""


class QuorumError(RuntimeError):
    """Too few clients gave a usable update, several times over. The same command goes on from there."""


@dataclass(frozen=True)
class Task:
    """What is trained."""

    name: str
    """Clients are asked for NAME.update and NAME.validate, and NAME.keys for secure aggregation."""
    config: Mapping[str, Any]
    """Sent with each message, JSON-like; the loop adds round, session, durable and clip."""
    averages: Callable[[Mapping[str, float]], dict[str, float]]
    """From added-up metrics of clients to what a row shows: loss (lower is better) and others."""
    documents: Mapping[str, str] = field(default_factory=dict)
    """Small files that belong beside the weights, by name."""


def sized(p: Federation, clients: int) -> Federation:
    """``p`` with the cohort that its share of ``clients`` clients is, within cohort_minimum and cohort."""
    if p.cohort_share == 1:
        return p
    size = max(p.cohort_minimum, min(p.cohort, round(p.cohort_share * clients)))
    return p.model_copy(update={"cohort": size, "cohort_share": 1.0})


def cohort(ids: Sequence[str], size: int, seed: int, number: int, attempt: int = 0) -> list[str]:
    """The clients of round ``number``, sorted: drawn by client id without replacement, again for each attempt."""
    if size > len(ids):
        raise ValueError(
            f"a cohort of {size} cannot be drawn from {len(ids)} clients; set cohort to {len(ids)} or less"
        )
    generator = seeds.numpy_generator(seed, number, "cohort", attempt)
    return sorted(generator.choice(sorted(ids), size, replace=False).tolist())


def decisive(p: Federation) -> dict[str, Any]:
    """The parameters that must not change when training resumes: not where it runs, nor where a checkpoint lies."""
    return p.model_dump(mode="json", exclude={*identity.HOW, *identity.ADDITIONS, *params.places(p)})


def panel(ids: Sequence[str], p: Federation) -> list[str]:
    """The clients that validate, the same in every round: as many as a cohort."""
    return cohort(ids, p.cohort, p.seed, 0)


def train(
    clients: Clients, p: Federation, task: Task, weights: Arrays, out: Path, on_row: checkpoints.OnRow | None = None
) -> tuple[Arrays, Path]:
    """Train ``weights`` (float32 CPU, changed in place) for ``p.rounds`` rounds, or resume where ``out`` stands.

    Writes ``out/metrics.jsonl`` and ``out/checkpoints``; returns the last weights and the folder of the best round.
    ``on_row`` sees each row as it is written. Raises QuorumError when a round fails ``ATTEMPTS`` times; ValueError when
    ``out`` holds a run with other parameters. A KeyboardInterrupt at any moment leaves a state to resume from.
    """
    with checkpoints.sole(out), ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as writer:
        server = _Server(clients, p, task, weights, out, on_row, writer)
        for _ in server.rounds():
            pass
        server.settle()
        return server.weights, checkpoints.path(out, server.state["best_round"])


class _Server:
    """One run of ``train``: what the server holds between its rounds."""

    def __init__(
        self,
        clients: Clients,
        p: Federation,
        task: Task,
        weights: Arrays,
        out: Path,
        on_row: checkpoints.OnRow | None,
        writer: ThreadPoolExecutor,
    ) -> None:
        self.clients, self.p, self.task, self.out, self.writer = clients, p, task, out, writer
        self.weights = weights
        self.control = (
            {optimisers.CONTROL + n: torch.zeros_like(w) for n, w in weights.items()} if self.scaffold else {}
        )
        self.state: dict[str, Any] = {
            "round": 0,
            "session": uuid.uuid4().hex,
            "reference_norm": None,
            "clip": p.privacy_clip,
            "settings": _settings(clients, p, task),
            **checkpoints.UNJUDGED,
        }
        if (saved := checkpoints.resume(out, self.state["settings"], self.scaffold)) is not None:
            # In the order of a fresh start, which a file does not keep: sums over tensors then round alike.
            self.weights = {name: saved[0][name] for name in self.weights}
            self.control = {name: saved[1][name] for name in self.control}
            self.state |= saved[2]
        self.meter = resources.Meter(p.device)
        self.saving: Future[None] | None = None
        self.durable = self.state["round"]
        """The last round that is on disk."""
        self.moments = self.saved_moments()
        plan = {"rounds": p.rounds, "local_steps": p.local_steps, "cohort": p.cohort, "clients": len(clients.ids)}
        plan["parameters"] = sum(tensor.numel() for tensor in self.weights.values())
        if self.private:
            plan["privacy"] = privacy.label(p)
        self.ledger = checkpoints.Ledger(out, self.durable, plan, on_row)
        self.attempt = self.ledger.failed_attempts
        """Draws of the next round that gave no quorum, in earlier starts, too: none is made twice."""
        if self.private:
            self.account = privacy.Account(p, out / ACCOUNT, (self.durable + 1, self.attempt))

    def finished(self) -> bool:
        """All rounds done, or none better for too long."""
        exhausted = 0 < self.p.patience <= self.state["validations_since_best"]
        return self.state["round"] >= self.p.rounds or exhausted

    def rounds(self) -> Iterator[dict[str, Any]]:
        """The rounds that are left, one at a time, as their rows of the ledger."""
        while not self.finished():
            number, began = self.state["round"] + 1, time.perf_counter()
            collected = self.collect(number)  # draws a cohort and asks it
            update, stepped = self.step(collected)
            row = {"round": number, **self.averages(collected.sums), **stepped, **self.validate(number)}
            row |= self.spent(collected, time.perf_counter() - began)
            self.close(collected, row)
            self.save(number, update)  # written while the next round's clients work
            yield row

    def step(self, collected: Collected) -> tuple[Arrays, dict[str, Any]]:
        """Move the weights along what is collected; return the update, and what a row tells of it."""
        number, working = collected.number, time.perf_counter()
        update = collected.collector.result() or {name: torch.zeros_like(w) for name, w in self.weights.items()}
        change = {name: update.pop(optimisers.CONTROL + name) for name in self.weights} if self.scaffold else {}
        self.settle()  # the last checkpoint still reads the weights and the state that are about to change
        row: dict[str, Any] = {}
        if self.private:
            row = {"clip": self.state["clip"], "epsilon": self.account.epsilon(), "privacy": privacy.label(self.p)}
            self.state["clip"] = privacy.release(
                update, self.p, self.state["clip"], number, collected.clients, collected.within_bound, self.fewest
            )
        row |= {"update_norm": optimisers.checked_norm(update, self.weights)}
        self.moments.step(self.weights, update, number)
        if self.scaffold:
            optimisers.step_control(self.control, change, collected.clients / len(self.clients.ids))
        collected.server_seconds += time.perf_counter() - working
        return update, row | {"learning_rate": collected.learning_rate, "server_rate": optimisers.rate(self.p, number)}

    def spent(self, collected: Collected, seconds: float) -> dict[str, Any]:
        """What a row tells of the cost of a round that took ``seconds``."""
        row = self.meter.used() | {
            "bytes_up": collected.bytes_up,
            "bytes_down": collected.bytes_down,
            "clients": collected.clients,
            "server_seconds": collected.server_seconds,
            "seconds": seconds,
        }
        told = {
            "steps": collected.sums["steps"],
            "client_seconds": collected.sums["seconds"],
            "audio_seconds": collected.sums["audio_seconds"],
            "audio_seconds_per_second": collected.sums["audio_seconds"] / seconds,
        }
        return row | (dict.fromkeys(told) if self.p.privacy == "client" else told)

    def close(self, collected: Collected, row: Mapping[str, Any]) -> None:
        """Judge the round, and write its row."""
        number = collected.number
        if self.private:  # to keep the best of several models by a loss without noise would tell of that loss
            self.state["best_round"] = number
        else:
            checkpoints.judge(self.state, number, row)
            self.state["reference_norm"] = statistics.median(collected.norms)
        self.state["round"], self.attempt = number, 0
        self.ledger.row("round", row)

    @property
    def scaffold(self) -> bool:
        """Whether control variates travel beside the weights."""
        return self.p.server == "scaffold"

    @property
    def private(self) -> bool:
        """Whether updates are bounded and hidden in noise."""
        return self.p.privacy != "none"

    @property
    def fewest(self) -> int:
        """Clients below which none is asked for an update."""
        return secure.FEWEST if self.p.secure_aggregation else 1

    def averages(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """What a row shows of the clients' metrics; no loss where nobody answered, or told any."""
        return self.task.averages(sums) if "objective_count" in sums else {"loss": None}

    def message(self, number: int) -> dict[str, Any]:
        """The configuration of a message of round ``number``."""
        return {
            **self.task.config,
            "round": number,
            "session": self.state["session"],
            "durable": self.durable,
            "clip": self.state["clip"],
        }

    def collect(self, number: int) -> Collected:
        """Draw cohorts until one gives a quorum of usable updates."""
        for _ in range(ATTEMPTS):
            drawn = self.draw(number)
            # By chance a Poisson cohort is small, or empty: to draw again would draw its clients more often than is
            # accounted for.
            fewest = 0 if self.p.privacy == "server" else self.fewest
            quorum = max(fewest, math.ceil(self.p.quorum * len(drawn)))
            message = self.message(number)
            if self.p.secure_aggregation:
                message["peers"] = self.public_keys(number, message, drawn)
            asked = sorted(message.get("peers", drawn))
            if quorum <= len(asked) < self.fewest:
                return self.nothing(number)
            collected = self.nothing(number)
            if len(asked) >= quorum:
                collected = self.ask(number, message, asked)
                if self.p.secure_aggregation:  # a sum is of all or of nobody: without one, the masks do not cancel
                    quorum = len(asked)
            if collected.clients >= quorum:
                return collected
            count = f"{collected.clients} of {len(drawn)}"
            fail(self.ledger, number, "", f"{count} clients gave a usable update; {quorum} needed")
            self.attempt += 1
        self.settle()
        raise QuorumError(
            f"round {number}: {ATTEMPTS} times too few usable updates; the reasons are in {self.out / 'metrics.jsonl'} "
            f"(kind: failure). The state after round {number - 1} is saved: the same command goes on from it, with "
            "another cohort"
        )

    def draw(self, number: int) -> list[str]:
        """The cohort that is asked next."""
        ids, p = self.clients.ids, self.p
        if p.privacy != "server":
            return cohort(ids, p.cohort, p.seed, number, self.attempt)
        drawn = privacy.poisson_cohort(ids, p.cohort, p.seed if p.privacy_seeded else None, number, self.attempt)
        self.account.charge((number, self.attempt), len(ids), drawn)
        return drawn

    def ask(self, number: int, message: Mapping[str, Any], asked: Sequence[str]) -> Collected:
        """Ask for updates, and collect those that can be used."""
        if self.p.privacy == "client":
            peers = len(asked) if self.p.secure_aggregation else 1
            self.account.charge((number, self.attempt), len(self.clients.ids), asked, peers)
        collected = self.nothing(number)
        collected.collector = self.collector(message, len(asked))
        payload = {**self.weights, **self.control}
        collected.bytes_down = size(payload) * len(asked)
        answers = self.clients.ask(
            f"{self.task.name}.update",
            arrays=payload,
            config=message,
            clients=asked,
            timeout=self.p.deadline_seconds or None,
        )
        for reply, norm in collected.usable(answers, payload):
            if not collected.clients:
                self.settle()  # the writer still holds the last update: there are never two besides a client's
            collected.add(reply, norm)
            reply.arrays.clear()  # several loops still know this reply while the next client works
        return collected

    def nothing(self, number: int) -> Collected:
        """What is collected before the first answer."""
        state = self.state
        return Collected(self.p, number, state["clip"], state["reference_norm"], self.averages, self.ledger)

    def collector(self, message: Mapping[str, Any], clients: int) -> optimisers.Collector:
        """What takes the updates of one cohort."""
        if self.p.secure_aggregation:
            return secure.Sum(self.weights, secure.scale(self.p, message["clip"], clients))
        return optimisers.collector(self.p, self.out / "updates")

    def public_keys(self, number: int, message: Mapping[str, Any], asked: Sequence[str]) -> dict[str, str]:
        """The public keys of those of ``asked`` that are there, by client."""
        found = {}
        for answer in self.clients.ask(
            f"{self.task.name}.keys", config=message, clients=asked, timeout=self.p.deadline_seconds or None
        ):
            try:
                if isinstance(answer, Failure):
                    raise optimisers.UpdateError(answer.reason)
                found[answer.client] = secure.public_key(answer.arrays)
            except optimisers.UpdateError as error:
                fail(self.ledger, number, answer.client, str(error))
        return found

    def validate(self, number: int) -> dict[str, float]:
        """Loss and accuracy of the new weights on validation utterances of a panel of clients, the same every round."""
        if self.p.privacy == "client" or number % self.p.validate_every and number != self.p.rounds:
            return {}
        sums: Counter[str] = Counter()
        answers = self.clients.ask(
            f"{self.task.name}.validate",
            arrays=self.weights,
            config=self.message(number),
            clients=panel(self.clients.ids, self.p),
            timeout=self.p.deadline_seconds or None,
        )
        for answer in answers:
            if isinstance(answer, Failure):
                fail(self.ledger, number, answer.client, f"validation: {answer.reason}")
            else:
                sums.update(answer.metrics)
        if not sums:  # nobody on the panel has validation utterances
            return {}
        return {f"validation_{name}": value for name, value in self.task.averages(sums).items()}

    def save(self, number: int, update: Arrays) -> None:
        """Start to write the checkpoint of round ``number``, with the moments after its ``update``: in a second thread,
        since disks are slow and nothing changes the tensors before the next step, which waits for it."""
        if self.scaffold:
            server = functools.partial(save_file, self.control)
        else:
            # Where there are no moments nothing of the update is kept alive.
            kept = update if self.moments.names else {}
            server = functools.partial(self.moments.write, update=kept, number=number)
        state = dict(self.state)
        arguments = (self.out, number, self.weights, server, state, self.task.documents)
        self.saving = self.writer.submit(checkpoints.write, *arguments)

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self.saving is not None:
            self.saving.result()
            self.saving = None
            self.durable = self.state["round"]
            self.moments = self.saved_moments()

    def saved_moments(self) -> optimisers.Moments:
        """The moments in the last checkpoint; before the first, those to begin with."""
        if not self.durable or self.scaffold:
            return optimisers.Moments(self.p, None, self.weights)
        folder = checkpoints.path(self.out, self.durable)
        with checkpoints.reading(folder):
            return optimisers.Moments(self.p, folder / checkpoints.SERVER, self.weights)


def _settings(clients: Clients, p: Federation, task: Task) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return decisive(p) | {"task": task.name, "clients": len(clients.ids), "first_client": min(clients.ids)}
