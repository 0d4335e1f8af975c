"""The training loop over the in-process engine, with clients that pull the weights towards targets of their own."""

import itertools
import json
import math
import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from federation import digest, pretrain, rows
from flwr.app import Array
from grid import InProcessGrid, Message

from fedhubert_lib import checkpoints, federated, files, seeds
from fedhubert_lib.federated import (
    accounting,
    client_state,
    flower,
    handlers,
    privacy,
    protocol,
    robust,
    rounds,
    scaffold,
    wire,
)

CLIENTS = [f"client-{number:03d}" for number in range(6)]
SERVERS = ["fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad", "scaffold", "trimmed-mean", "median"]


def initial() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"model.a": torch.randn(4, 3, generator=generator), "head.b": torch.randn(5, generator=generator)}


def pull(home, arrays, config):
    """A client whose update depends on the round, on itself, and on what it kept from its last round."""
    kept = client_state.load(home, config, "toy")
    generator = seeds.torch_generator(0, home.client, config["round"])
    change = {
        name: 0.1 * (torch.randn(tensor.shape, generator=generator) - tensor)
        for name, tensor in arrays.items()
        if not name.startswith(scaffold.CONTROL)
    }
    if kept is not None:
        change = {name: tensor + 0.01 * kept[name] for name, tensor in change.items()}
    client_state.save(home, config, "toy", change)
    for name in arrays:
        if name.startswith(scaffold.CONTROL):
            change[name] = 0.5 * change[name.removeprefix(scaffold.CONTROL)] - arrays[name]
    frames = 100.0 + CLIENTS.index(home.client)
    return change, {
        "loss_sum": frames * config["round"],
        "objective_count": frames,
        "audio_seconds": 4.0,
        "seconds": 0.01,
        "learning_rate": 0.1,
    }


def measure(home, arrays, config):
    return {}, {"loss_sum": 10.0 / config["round"], "objective_count": 1.0}


def averages(sums):
    return {"loss": sums["loss_sum"] / sums["objective_count"]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "01_partition").mkdir()
    pd.DataFrame({"client": CLIENTS}).to_parquet(tmp_path / "01_partition" / "clients.parquet")
    monkeypatch.setitem(handlers.HANDLERS, "toy.update", pull)
    monkeypatch.setitem(handlers.HANDLERS, "toy.validate", measure)
    monkeypatch.setitem(handlers.HANDLERS, "toy.forget", client_state.forget)
    return tmp_path


def train(run: Path, out: str = "toy", on_row=None, clients=None, **changes):
    p = pretrain(**{"cohort": 4, "rounds": 6, "batch_seconds": 16.0, **changes})
    task = rounds.Task("toy", {"any": [1, "thing"]}, averages, {"config.json": "{}\n"})
    with (
        federated.connect(run) as connected,
        rounds.serving(clients or connected, p, task, initial(), run / out, on_row) as server,
    ):
        rounds.run(server)
        return server.weights


def interrupted(run: Path, out: str, row: int, **changes) -> None:
    """Train until row number ``row`` has been written, then stop as Ctrl-C would."""
    count = itertools.count()

    def stop(_):
        if next(count) == row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, out, stop, **changes)


@pytest.mark.parametrize("server", SERVERS)
def test_k_rounds_and_then_the_rest_are_all_rounds(run, server):
    changes = {"server": server, "server_schedule": "clients"}
    whole = train(run, "whole", **changes)
    for row in (3, 13, 19):  # in round 1, between two clients' rows, just after a round's row
        interrupted(run, "parts", row, **changes)
    parts = train(run, "parts", **changes)
    assert digest(parts) == digest(whole)
    assert rows(run / "parts/metrics.jsonl") == rows(run / "whole/metrics.jsonl")
    assert digest(train(run, "parts", **changes)) == digest(whole)  # nothing is left to do


def test_saved_tensors_are_those_of_the_run(run):
    weights = train(run, server="fedadam")
    saved, server, state = checkpoints.read(run / "toy", 6)
    assert digest(saved) == digest(weights)
    assert state["round"] == 6
    assert {name.split("/")[0] for name in server} == {"first", "second"}
    assert (checkpoints.path(run / "toy", 6) / "config.json").read_text() == "{}\n"


def test_the_best_round_that_an_earlier_version_kept_goes_with_the_others(run):
    """And what its state says of it changes nothing."""
    interrupted(run, "toy", 19)
    last = checkpoints.path(run / "toy", checkpoints.rounds(run / "toy")[-1])
    shutil.copytree(last, checkpoints.path(run / "toy", 1))
    state = json.loads((last / "state.json").read_text())
    state |= {"best_round": 1, "best_loss": 1.0, "validations_since_best": 2, "validated": True, "panel": {}}
    (last / "state.json").write_text(json.dumps(state))
    assert digest(train(run)) == digest(train(run, "whole"))
    assert checkpoints.rounds(run / "toy") == [6]


def test_a_validation_is_that_of_the_clients_that_answer(run, monkeypatch):
    def validate(home, arrays, config):
        hard = home.client == "client-000"
        if hard and config["round"] == 2:
            raise OSError("the network is down")
        return {}, {"loss_sum": 1.0 + 6 * hard, "objective_count": 1}

    monkeypatch.setitem(handlers.HANDLERS, "toy.validate", validate)
    train(run, cohort=len(CLIENTS), rounds=3)
    ledger = [row for row in files.read_rows(run / "toy/metrics.jsonl") if row["kind"] == "round"]
    assert [row["validation_clients"] for row in ledger] == [6, 5, 6]
    assert [row["validation_loss"] for row in ledger] == [2.0, 1.0, 2.0]


def test_cohorts_come_from_seed_and_round_and_client_ids(run):
    drawn = [rounds.cohort(CLIENTS, 3, 0, number) for number in range(1, 40)]
    assert drawn == [rounds.cohort(list(reversed(CLIENTS)), 3, 0, number) for number in range(1, 40)]
    assert drawn != [rounds.cohort(CLIENTS, 3, 1, number) for number in range(1, 40)]
    assert drawn != [rounds.cohort(CLIENTS, 3, 0, number, 1) for number in range(1, 40)], "another attempt"
    assert all(len(set(chosen)) == 3 and chosen == sorted(chosen) for chosen in drawn)
    assert {client for chosen in drawn for client in chosen} == set(CLIENTS)


@pytest.mark.parametrize("privacy", ["none", "server"])
def test_a_cohort_that_cannot_be_drawn_ends_nothing_but_the_start(run, privacy):
    with pytest.raises(ValueError, match="cohort of 7 cannot be drawn from 6"):
        train(run, cohort=7, privacy=privacy, weighting="clients")
    assert not list((run / "toy").glob("*.jsonl")), "nor is it charged"


class LateAndShuffled(InProcessGrid):
    """Answers when it likes, and its nodes have other numbers every time."""

    def __init__(self, run, clients, monkeypatch):
        super().__init__(run, random.sample(clients, len(clients)), monkeypatch)
        self.answers = {}

    def pull_messages(self, message_ids):
        waiting = [name for name in self._waiting if name not in self.answers]
        if waiting:
            chosen = random.choice(waiting)
            (self.answers[chosen],) = super().pull_messages([chosen])
        return [self.answers.pop(name) for name in message_ids if name in self.answers]


def test_weights_do_not_depend_on_node_ids_or_on_who_answers_first(run, monkeypatch):
    """And those over Flower's records are those of tensors by reference."""
    monkeypatch.setattr(flower, "POLL_SECONDS", 0)
    expected = digest(train(run, "one"))
    for name, grid in ("two", InProcessGrid), ("three", LateAndShuffled), ("four", LateAndShuffled):
        clients = flower.GridClients(grid(run, CLIENTS, monkeypatch), CLIENTS)
        assert digest(train(run, name, clients=clients)) == expected


class SlowToSay(InProcessGrid):
    """The first node it asks needs a while to say its name; the second fails at first."""

    def __init__(self, run, clients, monkeypatch):
        super().__init__(run, clients, monkeypatch)
        self.pulls = 0

    def pull_messages(self, message_ids):
        self.pulls += 1
        for name in message_ids:
            node = self._waiting[name].dst_node_id
            if self._waiting[name].content["request"]["action"] == "identify" and node <= 3 and self.pulls < 9:
                if node == 3:
                    yield Failed(None, reply_to=self._waiting.pop(name))
            else:
                yield from super().pull_messages([name])


class Failed(Message):
    error = SimpleNamespace(reason="Message Unavailable", code=1)

    def has_error(self):
        return True


class Forgetful(InProcessGrid):
    """As Flower: what was asked is forgotten, with its answer, when its message's time is over. The first never
    answers, the second sends what nobody can unpack."""

    def __init__(self, run, clients, monkeypatch):
        super().__init__(run, clients, monkeypatch)
        self.until = {}

    def push_messages(self, messages):
        pushed = super().push_messages(messages)
        self.until |= {name: time.monotonic() + (self._waiting[name].ttl or 43_200) for name in pushed}
        return pushed

    def pull_messages(self, message_ids):
        for name in message_ids:
            message = self._waiting.get(name)
            answered = message is None or message.content["request"]["action"] in ("identify", "toy.forget")
            node = 0 if answered else message.dst_node_id
            if time.monotonic() > self.until[name]:
                yield Failed(None, reply_to=message)
            elif node == 3:
                self.until[name] = 0.0
                raise ValueError("bytes of others")
            elif node != 2:
                yield from super().pull_messages([name])


def test_a_client_that_is_late_or_sends_rubbish_costs_its_own_answer_alone(run, monkeypatch):
    clients = flower.GridClients(Forgetful(run, CLIENTS, monkeypatch), CLIENTS)
    train(run, cohort=6, rounds=1, deadline_seconds=0.3, validate_every=9, centralised=False, clients=clients)
    rounds_failures = {row["client"]: row["reason"] for row in failures(run) if "validation" not in row["reason"]}
    assert rounds_failures == {CLIENTS[0]: "no answer before the deadline", CLIENTS[1]: "Message Unavailable"}
    clients._late[:] = ["answered"]
    clients._grid.until["answered"] = 0.0
    list(clients.ask("toy.validate", arrays={}, config={"round": 1}, clients=[]))
    assert not clients._late, "what came late is read, or Flower would keep it"


def test_a_node_that_is_slow_to_say_its_name_joins_a_later_round(run, monkeypatch):
    monkeypatch.setattr(flower, "POLL_SECONDS", 0)
    monkeypatch.setattr(flower, "IDENTIFY_SECONDS", 0)
    train(run, cohort=6, rounds=6, clients=flower.GridClients(SlowToSay(run, CLIENTS, monkeypatch), CLIENTS))
    ledger = files.read_rows(run / "toy/metrics.jsonl")
    for client in CLIENTS[:2]:
        first, *others = [row["kind"] for row in ledger if row.get("client") == client]
        assert first == "failure" and others[-1] == "client"
    assert {row["client"] for row in failures(run)} == set(CLIENTS[:2])


def test_nodes_that_say_nothing_cost_the_start_no_longer_than_it_waits(run, monkeypatch):
    """However late they connect: each new node used to have as long again to say its name."""
    clock = [0.0]
    monkeypatch.setattr(flower.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(flower.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + max(seconds, 0.5)))
    grid = InProcessGrid(run, CLIENTS, monkeypatch)
    grid.pull_messages = lambda identifiers: []
    grid.get_node_ids = lambda: [node for node in grid.configs if clock[0] >= 100 + node]
    clients = flower.GridClients(grid, CLIENTS)
    clients.wait(flower.WAIT_SECONDS)
    assert flower.WAIT_SECONDS <= clock[0] <= flower.WAIT_SECONDS + 2
    assert clients.connected(0) == {} and clock[0] <= flower.WAIT_SECONDS + 2


class Restarted(InProcessGrid):
    """The third client's node is away for a moment, while the first one's answer is waited for. As Flower, it hands no
    message out again."""

    pulls = 0

    def get_node_ids(self):
        return [node for node in self.configs if node != 4 or self.pulls != 2]

    def pull_messages(self, message_ids):
        for name in message_ids:
            marked = self._waiting[name].content["request"]["action"] == "toy.mark"
            node = self._waiting[name].dst_node_id if marked else 0
            self.pulls += node == 2
            if node != 4 and (node != 2 or self.pulls > 3):
                yield from super().pull_messages([name])


def test_a_node_that_was_restarted_while_it_worked_holds_up_no_round(run, monkeypatch):
    for name in ("POLL_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(flower, name, 0)
    monkeypatch.setitem(handlers.HANDLERS, "toy.mark", lambda *_: ({}, {"mark": 1.0}))
    clients = flower.GridClients(Restarted(run, CLIENTS, monkeypatch), CLIENTS)
    answers = list(clients.ask("toy.mark", timeout=30))
    assert [answer.client for answer in answers if isinstance(answer, protocol.Reply)] == CLIENTS[:2] + CLIENTS[3:]
    assert answers[2].reason == "its node left while it worked"


def test_a_node_whose_name_was_lost_is_asked_again(run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(flower, "POLL_SECONDS", 0)
    grid, lost = Forgetful(run, CLIENTS, monkeypatch), []

    def pulled(identifiers):
        for name in identifiers:
            lost.extend([name] if not lost and grid._waiting[name].dst_node_id == 2 else [])
            if name not in lost:
                yield from pull_messages([name])
            elif time.monotonic() > grid.until[name]:
                yield Failed(None, reply_to=grid._waiting[name])

    pull_messages = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", pulled)
    clients, seen = flower.GridClients(grid, CLIENTS), []
    for clock[0] in (1.0, 100.0, 300.0):
        seen.append(CLIENTS[0] in clients.connected(-1))
    assert seen == [False, False, True]


def test_rubbish_of_two_nodes_at_one_time_costs_nobody_else(run, monkeypatch):
    grid, dropped = InProcessGrid(run, CLIENTS, monkeypatch), set()

    def pulled(identifiers):
        for name in identifiers:
            node = grid._waiting[name].dst_node_id
            if node in (2, 3) and node not in dropped:
                dropped.add(node)
                raise ValueError("bytes of others")
        for name in identifiers:
            if (node := grid._waiting[name].dst_node_id) in dropped - refused:  # as Flower says of what it dropped
                refused.add(node)
                yield Failed(None, reply_to=grid._waiting[name])
            else:
                yield from pull_messages([name])

    refused, pull_messages = set(), grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", pulled)
    clients = flower.GridClients(grid, CLIENTS)
    assert sorted(clients.connected(0)) == CLIENTS[2:]
    assert sorted(clients.connected(0)) == CLIENTS, "asked again"


def test_a_node_that_was_busy_joins_however_seldom_it_is_looked_for(run, monkeypatch):
    """Its name comes within its message's time, and the next round begins after that."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(flower, "POLL_SECONDS", 0)
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 20.0))
    grid = Forgetful(run, CLIENTS, monkeypatch)

    def pulled(identifiers):
        for name in identifiers:
            message = grid._waiting.get(name)
            action = message.content["request"]["action"] if message else ""
            busy = message and message.dst_node_id == 2 and action == "identify" and clock[0] < 150
            slow = message and message.dst_node_id == 5 and action == "toy.mark" and clock[0] < 600
            if not busy and not slow:
                yield from pull_messages([name])

    pull_messages = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", pulled)
    monkeypatch.setattr(grid, "configs", {n: c for n, c in grid.configs.items() if n != 3})
    monkeypatch.setitem(handlers.HANDLERS, "toy.mark", lambda *_: ({}, {"mark": 1.0}))
    clients = flower.GridClients(grid, CLIENTS)
    first = {answer.client for answer in clients.ask("toy.mark") if isinstance(answer, protocol.Reply)}
    assert CLIENTS[0] not in first and CLIENTS[3] in first and clock[0] >= 600
    assert CLIENTS[0] in clients.connected(-1)


def test_requests_to_clients_that_are_not_connected_are_no_bytes(run, monkeypatch):
    grid = InProcessGrid(run, CLIENTS[:2], monkeypatch)
    clients = flower.GridClients(grid, CLIENTS)
    monkeypatch.setitem(handlers.HANDLERS, "toy.mark", lambda *_: ({}, {"mark": 1.0}))
    assert len(list(clients.ask("toy.mark", arrays={"a": torch.zeros(250)}))) == 6
    assert clients.bytes == {"bytes_down": 2_000, "bytes_up": 0}


def failures(run: Path) -> list[dict]:
    return [row for row in files.read_rows(run / "toy/metrics.jsonl") if row["kind"] == "failure"]


def spoilt(how):
    """The client 002 answers with ``how(change, metrics)`` instead."""

    def handler(home, arrays, config):
        change, metrics = pull(home, arrays, config)
        return how(change, metrics) if home.client == "client-002" else (change, metrics)

    return handler


def explode(change, metrics):
    raise RuntimeError("no disk")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (explode, "RuntimeError: no disk"),
        (lambda c, m: ({**c, "head.b": c["head.b"] * float("nan")}, m), "NaN or an infinity"),
        (lambda c, m: ({**c, "head.b": c["head.b"][:2]}, m), r"head.b of the update is torch.float32 (2,)"),
        (lambda c, m: ({"model.a": c["model.a"]}, m), "lacks ['head.b']"),
        (lambda c, m: ({name: 500 * t for name, t in c.items()}, m), "times as large as is usual"),
        (lambda c, m: (c, {**m, "loss_sum": float("nan")}), "not finite, or larger than they can be (['loss_sum'])"),
        (lambda c, m: (c, {**m, "objective_count": 0.0}), "it claims objective_count of 0; up to"),
        (lambda c, m: (c, {"loss_sum": 1.0}), "metrics lack audio_seconds, learning_rate, objective_count, seconds"),
        (lambda c, m: (c, {name: m[name] for name in m if name != "loss_sum"}), "its metrics lack loss_sum"),
        (lambda c, m: (c, {**m, "objective_count": 1e9}), "it claims objective_count of 1e+09; up to"),
        (lambda c, m: (c, {**m, "audio_seconds": 1.0}), "it claims objective_count of 102; up to 50 are possible"),
        (lambda c, m: (c, {**m, "audio_seconds": -1.0}), "it claims audio_seconds of -1; up to"),
        (lambda c, m: (c, {**m, "audio_seconds": 1e9}), "it claims audio_seconds of 1e+09; up to"),
    ],
)
def test_a_bad_update_is_left_out_and_recorded(run, monkeypatch, how, reason):
    """The others' mean is what would have come without the bad client."""
    monkeypatch.setitem(handlers.HANDLERS, "toy.update", spoilt(how))
    weights = train(run, server="fedavg", server_rate=1.0, cohort=6, rounds=1)
    (failure,) = failures(run)
    assert failure["client"] == "client-002" and reason in failure["reason"]
    expected, total = initial(), sum(100.0 + number for number in range(6) if number != 2)
    for name in expected:
        for number in (0, 1, 3, 4, 5):
            generator = seeds.torch_generator(0, CLIENTS[number], 1)
            noise = {n: torch.randn(t.shape, generator=generator) for n, t in initial().items()}
            expected[name] = expected[name] + (100.0 + number) / total * 0.1 * (noise[name] - initial()[name])
        torch.testing.assert_close(weights[name], expected[name])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda m: {name: float("inf") for name in m}, "validation: its metrics are not finite"),
        (lambda m: {name: m[name] for name in m if name != "loss_sum"}, "validation: its metrics lack loss_sum"),
    ],
)
def test_a_validation_that_cannot_be_used_is_left_out_and_recorded(run, monkeypatch, how, reason):
    def handler(home, arrays, config):
        _, metrics = measure(home, arrays, config)
        return {}, how(metrics) if home.client == "client-002" else metrics

    monkeypatch.setitem(handlers.HANDLERS, "toy.validate", handler)
    train(run, cohort=6, rounds=1)
    (failure,) = failures(run)
    assert failure["client"] == "client-002" and reason in failure["reason"]


@pytest.mark.parametrize("hostile", ["client-000", "client-001", "client-002"])
def test_an_outlier_is_recognised_in_the_first_round_wherever_it_stands(run, monkeypatch, hostile):
    def handler(home, arrays, config):
        change, metrics = pull(home, arrays, config)
        return {n: 500 * t for n, t in change.items()} if home.client == hostile else change, metrics

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", handler)
    train(run, cohort=6, rounds=1)
    assert [row["client"] for row in failures(run)] == [hostile]


def test_clients_can_have_equal_weights(run):
    weights = train(run, server="fedavg", server_rate=1.0, cohort=6, rounds=1, weighting="clients")
    expected = initial()
    for client in CLIENTS:
        generator = seeds.torch_generator(0, client, 1)
        for name, start in initial().items():
            expected[name] += 0.1 * (torch.randn(start.shape, generator=generator) - start) / 6
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name])


def test_a_late_answer_is_left_out(run, monkeypatch):
    monotonic, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + ahead[0])

    def slow(change, metrics):
        ahead[0] += 200.0  # seconds, to this engine's clock: no machine is so busy that the others take them
        return change, metrics

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", spoilt(slow))
    train(run, cohort=6, rounds=1, deadline_seconds=100.0)
    (failure,) = failures(run)
    assert failure["client"] == "client-002"
    assert "later than the deadline of 100.0 s" in failure["reason"]


def test_a_round_below_its_quorum_stops_the_run_which_then_resumes_with_other_draws(run, monkeypatch):
    def broken(home, arrays, config):
        if config["round"] == 4:
            raise OSError("the network is down")
        return pull(home, arrays, config)

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", broken)
    with pytest.raises(rounds.QuorumError, match="round 4: 3 times.* Most often: OSError: the network is down$"):
        train(run)
    assert [row["reason"] for row in failures(run)].count("0 of 4 clients gave a usable update; 2 needed") == 3
    assert checkpoints.rounds(run / "toy")[-1] == 3
    with pytest.raises(rounds.QuorumError, match="round 4: 3 times"):
        train(run)
    monkeypatch.setitem(handlers.HANDLERS, "toy.update", pull)
    train(run)
    ledger = files.read_rows(run / "toy/metrics.jsonl")
    assert len([row for row in failures(run) if not row["client"]]) == 6
    (fourth,) = [row for row in ledger if row["kind"] == "round" and row["round"] == 4]
    size = 4 * (12 + 5)
    assert (fourth["bytes_down"], fourth["bytes_up"]) == ((6 + 2) * 4 * size, 4 * size)  # nothing came back six times
    for number, attempt in ((3, 0), (4, 6), (5, 0)):
        took_part = [row["client"] for row in ledger if row["kind"] == "client" and row["round"] == number]
        assert took_part == rounds.cohort(CLIENTS, 4, 0, number, attempt)
    assert rounds.cohort(CLIENTS, 4, 0, 4, 6) != rounds.cohort(CLIENTS, 4, 0, 4, 0)


def test_a_quorum_is_rounded_up_to_whole_clients(run):
    task = rounds.Task("toy", {}, averages)
    for quorum, needed in ((0.5, 3), (0.4, 2), (0.41, 3), (0.0, 1)):
        p, out = pretrain(cohort=5, quorum=quorum), run / str(quorum)
        with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), out) as server:
            this_round = next(server.rounds())
            this_round.ask(this_round.draw())
            assert this_round.quorum == needed


def test_of_two_answers_there_is_no_median(run, monkeypatch):
    def handler(home, arrays, config):
        return pull(home, arrays, config) if home.client in CLIENTS[:2] else explode(arrays, config)

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", handler)
    with pytest.raises(rounds.QuorumError):
        train(run, server="median", cohort=3, rounds=1)
    assert all("; 3 needed" in row["reason"] for row in failures(run) if not row["client"])
    p, task = pretrain(cohort=4, rounds=2, server="median", batch_seconds=16.0), rounds.Task("toy", {}, averages)
    with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), run / "loop") as server:
        this_round = next(server.rounds())
        assert this_round.collect(this_round.ask(CLIENTS[:2])) is None, "a cohort of one's own is no other"


def test_state_of_an_attempt_that_failed_is_there_after_a_kill_before_the_first_checkpoint(run):
    """Clients keep state by session: one that a start made anew would lose what an attempt at round 1 left there."""
    p, task = pretrain(cohort=4, rounds=2), rounds.Task("toy", {}, averages)
    sessions = []
    for out in ("toy", "toy", "other"):
        with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), run / out) as server:
            sessions.append(server.message(1)["session"])
    assert sessions[0] == sessions[1] != sessions[2]


def test_a_median_that_does_not_fit_into_memory_is_refused_before_anybody_is_asked(run, monkeypatch):
    monkeypatch.setattr(robust.resources, "free_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="lower cohort"):
        train(run, server="median")
    assert not (run / "clients").exists()


PRIVATE = {"privacy": "server", "weighting": "clients", "cohort": 1, "server": "fedadam"}


def test_a_private_round_of_nobody_is_a_round(run):
    """Drawn again it would be a cohort that is never empty, which is not what epsilon counts."""
    train(run, **PRIVATE, rounds=12, privacy_seeded=True)
    ledger = files.read_rows(run / "toy/metrics.jsonl")
    done = [row for row in ledger if row["kind"] == "round"]
    drawn = [len(privacy.poisson_cohort(CLIENTS, 1, 0, number, 0)) for number in range(1, 13)]
    assert [row["clients"] for row in done] == drawn and {0, 1} <= set(drawn)
    assert not [row for row in ledger if row["kind"] == "failure"]
    for row in done:
        assert row["epsilon"] == pytest.approx(accounting.epsilon([(1 / 6, 1.0, row["round"])], 1e-5))
        assert row["update_norm"] > 0.1  # the noise
        assert (row["loss"] is None) == (row["learning_rate"] is None) == (row["clients"] == 0)
        assert row["audio_seconds"] is not None and (row["audio_seconds"] == 0) == (row["clients"] == 0)
    assert checkpoints.rounds(run / "toy") == [12]  # the best by a loss without noise is not told


def test_private_updates_are_asked_of_the_cohort_that_chance_has_drawn(run):
    """Any other one would cost nothing in the account, whatever it tells."""
    p = pretrain(batch_seconds=16.0, privacy_seeded=True, **PRIVATE | {"cohort": 5})
    task = rounds.Task("toy", {}, averages)
    with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), run / "toy") as server:
        this_round = next(server.rounds())
        with pytest.raises(ValueError, match="has drawn"):
            this_round.ask(CLIENTS[:2])
        drawn = this_round.draw()
        with pytest.raises(ValueError, match="has drawn"):
            this_round.ask(drawn[1:])
        update = this_round.collect(this_round.ask(drawn[::-1]))
        assert update is not None
        with pytest.raises(ValueError, match="once"):
            this_round.ask(drawn)


def test_clients_that_do_not_answer_cost_as_much_as_if_they_did(run, monkeypatch):
    monkeypatch.setitem(handlers.HANDLERS, "toy.update", lambda *_: explode(None, None))
    with pytest.raises(rounds.QuorumError):
        train(run, **PRIVATE | {"cohort": 5})
    charged = len(files.read_rows(run / "toy" / privacy.ACCOUNT))
    assert charged == 3
    monkeypatch.setitem(handlers.HANDLERS, "toy.update", pull)
    train(run, **PRIVATE | {"cohort": 5}, rounds=6)
    (*_, last) = files.read_rows(run / "toy/metrics.jsonl")
    assert last["epsilon"] == accounting.epsilon([(5 / 6, 1.0, 6 + charged)], 1e-5)


def test_seeded_noise_repeats_after_any_kill_and_secret_noise_is_paid_twice(run):
    changes = PRIVATE | {"cohort": 3, "privacy_seeded": True}
    whole = train(run, "whole", **changes)
    for row in (1, 9):
        interrupted(run, "parts", row, **changes)
    assert digest(train(run, "parts", **changes)) == digest(whole)
    ledger = rows(run / "parts/metrics.jsonl")
    assert ledger == rows(run / "whole/metrics.jsonl")
    assert all("not private" in row["privacy"] for row in ledger if row["kind"] in ("plan", "round"))
    changes["privacy_seeded"] = False
    interrupted(run, "secret", 1, **changes)
    secret = train(run, "secret", **changes)
    assert digest(secret) not in (digest(whole), digest(train(run, "other", **changes)))
    epsilons = [files.read_rows(run / name / "metrics.jsonl")[-1]["epsilon"] for name in ("secret", "other")]
    assert epsilons[0] > epsilons[1] == ledger[-1]["epsilon"]


def test_a_client_that_comes_back_is_welcome(run, monkeypatch):
    def away(home, arrays, config):
        if home.client == "client-002" and config["round"] == 1:
            raise OSError("away")
        return pull(home, arrays, config)

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", away)
    train(run, cohort=6, rounds=2)
    took_part = [row["round"] for row in rows(run / "toy/metrics.jsonl") if row.get("client") == "client-002"]
    assert took_part == [1, 2]  # once as a failure, then as a client


def test_a_client_may_not_answer_for_another(run, monkeypatch):
    grid = InProcessGrid(run, CLIENTS, monkeypatch)
    clients = flower.GridClients(grid, CLIENTS)
    nodes = clients.connected()
    grid.configs[nodes["client-002"]]["client"] = "client-001"
    answers = {answer.client: answer for answer in clients.ask("identify")}
    assert "in the name of 'client-001'" in answers["client-002"].reason
    assert not hasattr(answers["client-001"], "reason")


def test_a_node_may_not_slip_in_the_answer_of_another(run, monkeypatch):
    """Flower hands on what a registered node pushes by itself, whatever the server asked for."""

    def pulled(identifiers):
        records = {"client": {"id": "client-000"}, "metrics": {}, "arrays": flower.ArrayRecord({})}
        yield Message(records)
        yield from pull_messages(identifiers)

    grid = InProcessGrid(run, CLIENTS, monkeypatch)
    pull_messages = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", pulled)
    clients = flower.GridClients(grid, CLIENTS)
    monkeypatch.setitem(handlers.HANDLERS, "toy.mark", lambda *_: ({}, {"mark": 1.0}))
    assert [(answer.client, answer.metrics) for answer in clients.ask("toy.mark")] == [
        (c, {"mark": 1.0}) for c in CLIENTS
    ]


def test_a_client_that_two_nodes_say_they_are_is_neither_and_ends_nothing(run, monkeypatch):
    grid = InProcessGrid(run, [*CLIENTS, CLIENTS[2]], monkeypatch)
    clients = flower.GridClients(grid, CLIENTS)
    left_out = [answer.client for answer in clients.ask("identify") if isinstance(answer, protocol.Failure)]
    assert left_out == ["client-002"]
    del grid.configs[2 + CLIENTS.index("client-002")]
    assert not any(isinstance(answer, protocol.Failure) for answer in clients.ask("identify"))


@pytest.mark.parametrize("claim", [0.5, 1e9])
def test_an_untrusted_server_follows_a_quantile_that_no_false_claim_runs_away_with(run, monkeypatch, claim):
    """Clients send their rate and a bit, and no metric besides."""

    def within(home, arrays, config):
        change, metrics = pull(home, arrays, config)
        return change, {"learning_rate": 0.1, "within_bound": claim if home.client == "client-002" else 0.5}

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", within)
    changes = {"privacy": "client", "privacy_quantile": 0.5, "weighting": "clients", "cohort": 6, "rounds": 2}
    train(run, **changes)
    assert {failure["client"] for failure in failures(run)} == ({"client-002"} if claim > 1e3 else set())
    done = [row for row in files.read_rows(run / "toy/metrics.jsonl") if row["kind"] == "round"]
    assert [row["clip"] for row in done] == pytest.approx([1.0, math.exp(-0.1)])
    assert [row["loss"] for row in done] == [None, None]


def test_a_client_that_adds_its_own_noise_is_held_to_the_bound_and_the_noise(run, monkeypatch):
    """What it sends cannot be clipped without a part of the noise, and must not carry the model away."""

    def boundless(home, arrays, config):
        change, _ = pull(home, arrays, config)
        factor = 1e3 if home.client == "client-002" else 1.0
        return {name: factor * tensor for name, tensor in change.items()}, {"learning_rate": 0.1}

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", boundless)
    train(run, privacy="client", weighting="clients", cohort=6, rounds=2)
    assert [failure["client"] for failure in failures(run)] == 2 * ["client-002"]
    assert all("beyond the clipping norm" in failure["reason"] for failure in failures(run))


def test_a_control_variate_that_no_gradients_give_is_refused(run, monkeypatch):
    def hostile(home, arrays, config):
        change, metrics = pull(home, arrays, config)
        factor = 1e3 if home.client == "client-002" else 1.0
        return {n: factor * t if n.startswith(scaffold.CONTROL) else t for n, t in change.items()}, metrics

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", hostile)
    train(run, server="scaffold", cohort=6, rounds=1, clip_norm=1.0)
    assert [failure["client"] for failure in failures(run)] == ["client-002"]
    assert all("control variate" in failure["reason"] for failure in failures(run))
    train(run, "plain", cohort=6, rounds=1)
    norms = [
        {row["client"]: row["update_norm"] for row in rows(run / out / "metrics.jsonl") if row["kind"] == "client"}
        for out in ("plain", "toy")
    ]
    del norms[0]["client-002"]
    assert norms[0].items() <= norms[1].items()  # of the weights alone


def test_scaffolds_variate_moves_by_the_fraction_of_all_clients_that_answered(run):
    """Half of them here, three of a cohort of four: only so it stays the mean of every client's."""
    p, task = pretrain(server="scaffold", cohort=4), rounds.Task("toy", {}, averages)
    with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), run / "toy") as server:
        (hook,) = server.hooks
        server.state["counted"] = {}
        change = {name: torch.ones_like(control) for name, control in hook.control.items()}
        hook.step(SimpleNamespace(clients=CLIENTS[:3], number=1), change)
        assert {float(value) for c in hook.control.values() for value in c.flatten()} == {0.5}


HUGE = b"\x93NUMPY\x01\x00F\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}".ljust(70)


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04", HUGE, b"\x93NUMPY\x01\x00\x10\x00{'descr':(((((("])
def test_bytes_that_are_no_array_are_their_clients_failure(data):
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
    records = {"client": {"id": "client-001"}, "metrics": {}, "arrays": flower.ArrayRecord({"a": array})}
    answer = flower.read_reply("client-001", Message(records))
    assert answer.client == "client-001" and "its answer is not understood: " in answer.reason


def test_a_clients_reason_steers_no_terminal():
    records = {"client": {"id": "client-001", "failure": "\x1b[2J\nround 7 of 7 \u202e"}}
    assert flower.read_reply("client-001", Message(records)).reason == " [2J round 7 of 7  "


def test_what_safetensors_does_not_hold_ends_no_stage(tmp_path):
    records = {"client": {"id": "client-001"}, "metrics": {}}
    arrays = {"__metadata__": torch.ones(2), "ordinary": torch.zeros(1)}
    answer = flower.read_reply("client-001", Message(records | {"arrays": flower.ArrayRecord(arrays)}))
    wire.write_answer(tmp_path / "answer", answer)
    assert list(wire.read_answer(tmp_path / "answer").arrays) == list(arrays)
    arrays = flower.ArrayRecord({"a": Array(np.ones(2, np.complex128))})
    answer = flower.read_reply("client-001", Message(records | {"arrays": arrays}))
    assert answer.reason == "its answer is not understood: ValueError: a is complex"


def test_names_that_no_file_holds_are_their_clients_failure(tmp_path):
    """Of arrays and metrics: they are a client's, of any length."""

    class Talkative(protocol.Clients):
        def answers(self, request):
            yield protocol.Reply("client-000", {}, {"x" * 101_000_000: 1.0})
            yield protocol.Reply("client-001", {}, {"x": 1.0})

    stage, server = multiprocessing.Pipe()
    request = {"action": "a", "config": {}, "clients": CLIENTS[:2], "timeout": None}
    wire.write(path := tmp_path / "request-0", request, {})
    answers = []

    def asking():
        wire.send(stage, str(path))
        for _ in CLIENTS[:2]:
            wire.send(stage, wire.NEXT)
            answers.append(wire.read_answer(Path(wire.receive(stage))))
        wire.send(stage, wire.END)

    threading.Thread(target=asking, daemon=True).start()
    wire.serve(server, Talkative(CLIENTS[:2]))
    assert "its answer is not passed on" in answers[0].reason
    assert answers[1].metrics == {"x": 1.0}


def test_an_unknown_action_is_a_failure(run):
    with federated.connect(run) as clients:
        (answer,) = clients.ask("toy.nothing", clients=["client-001"])
        assert "no handler 'toy.nothing'" in answer.reason


def test_a_message_that_a_client_changes_stays_as_it_was_for_the_others(run, monkeypatch):
    seen = []

    def greedy(home, arrays, config):
        seen.append((sorted(arrays), dict(config)))
        arrays.clear()
        config.clear()
        return {}, {}

    monkeypatch.setitem(handlers.HANDLERS, "toy.greedy", greedy)
    with federated.connect(run) as clients:
        list(clients.ask("toy.greedy", arrays=initial(), config={"a": 1}))
    assert seen == [(["head.b", "model.a"], {"a": 1})] * 6


def test_a_run_with_other_parameters_does_not_resume(run):
    train(run, rounds=2)
    with pytest.raises(checkpoints.CheckpointError, match="learning_rate: 0.001 -> 0.01"):
        train(run, rounds=2, learning_rate=0.01)
    with pytest.raises(checkpoints.CheckpointError, match="initial: .* -> a folder"):
        train(run, rounds=2, initial=str(run))
    train(run, "other", rounds=2, initial=str(run))
    train(run, "other", rounds=2, initial=str(run / "moved"))


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "server.safetensors"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_works(run, file):
    whole = train(run, "whole", server="fedadam")
    train(run, server="fedadam")
    path = checkpoints.path(run / "toy", 6) / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(checkpoints.CheckpointError, match="round-00006: cannot be read"):
        train(run, server="fedadam")
    assert digest(train(run, "whole", server="fedadam")) == digest(whole)


def test_two_processes_do_not_train_in_one_folder(run):
    with checkpoints.sole(run / "toy"), pytest.raises(RuntimeError, match="another process trains"):
        train(run)


def test_what_a_killed_process_left_half_written_goes(run):
    leftover = run / "toy" / "checkpoints" / ".round-00003.4711.partial"
    leftover.mkdir(parents=True)
    train(run)
    assert not leftover.exists()


def test_state_of_clients_stays_small_and_leaves_other_sessions_alone(run):
    other = run / "clients" / CLIENTS[0] / "session-other" / "toy-000003.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"days of work")
    copied = other.with_name("toy-000003-copy.safetensors")
    copied.write_bytes(b"made by hand")

    def look(row):
        if row["kind"] == "round" and row["round"] == 7:
            for client in CLIENTS:
                (session,) = (path for path in (run / "clients" / client).iterdir() if path != other.parent)
                assert 1 <= len(list(session.iterdir())) <= 3

    train(run, cohort=6, rounds=8, on_row=look)
    assert other.read_bytes() == b"days of work"
    assert client_state.saved(handlers.home(run, CLIENTS[0], "toy", "cpu", True), {"session": "other"}, "toy") == {
        3: other
    }


def test_what_a_client_that_was_killed_has_half_written_goes(run):
    home, config = handlers.home(run, CLIENTS[0], "toy", "cpu", True), {"session": "s", "round": 2, "durable": 0}
    client_state.save(home, config | {"round": 1}, "toy", {"a": torch.ones(1)})
    (session,) = (run / "clients" / CLIENTS[0]).iterdir()
    (session / ".toy-000001.77.partial.safetensors").write_bytes(b"half")
    client_state.save(home, config, "toy", {"a": torch.ones(1)})
    assert sorted(path.name for path in session.iterdir()) == ["toy-000001.safetensors", "toy-000002.safetensors"]


def test_a_client_does_not_begin_anew_for_a_server_that_was_restored(run):
    home, config = handlers.home(run, CLIENTS[0], "toy", "cpu", True), {"session": "s"}
    for number in range(1, 11):
        client_state.save(home, config | {"round": number, "durable": number - 1}, "toy", {"a": torch.ones(1)})
    assert client_state.load(home, config | {"round": 10, "durable": 9}, "toy") is not None
    with pytest.raises(ValueError, match="restored. To begin anew, remove session"):
        client_state.load(home, config | {"round": 6, "durable": 5}, "toy")
    assert client_state.load(home, {"session": "t", "round": 6, "durable": 5}, "toy") is None
    assert client_state.load(home, {"session": "s", "round": 0}, "toy") is None  # of pooled training


def test_a_client_keeps_what_it_had_before_a_round_that_may_be_repeated(run):
    """However long ago it was last asked: it had no part in rounds 2 to 4."""
    home, config = handlers.home(run, CLIENTS[0], "toy", "cpu", True), {"session": "s"}
    for number, durable in ((1, 0), (5, 3)):
        message = config | {"round": number, "durable": durable}
        client_state.save(home, message, "toy", {"a": torch.tensor(number)})
    assert client_state.load(home, message, "toy") == {"a": 1}


def test_a_server_calls_no_round_durable_that_is_not_on_disk(run, monkeypatch):
    def look(home, arrays, config):
        assert config["durable"] == max(config["round"] - 2, 0) <= max(checkpoints.rounds(run / "toy"), default=0)
        return pull(home, arrays, config)

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", look)
    train(run, rounds=4)
    assert not failures(run)


def test_only_personal_heads_stay_after_the_last_round(run, monkeypatch):
    def keeps_a_head(home, arrays, config):
        client_state.save(home, config, "personal", {"head.a": torch.ones(1)})
        return pull(home, arrays, config)

    monkeypatch.setitem(handlers.HANDLERS, "toy.update", keeps_a_head)
    train(run, cohort=6, rounds=3)
    for client in CLIENTS:
        (session,) = (run / "clients" / client).iterdir()
        assert {file.stem for file in session.iterdir()} >= {"personal-000003"}
        assert {file.stem.partition("-")[0] for file in session.iterdir()} == {"personal"}


def test_what_clients_did_not_forget_at_the_end_goes_with_the_next_start(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(handlers.HANDLERS, "toy.forget", lambda *_: ({}, {}))  # as after a kill before they were asked
        train(run, rounds=1)
    assert list((run / "clients").glob("*/session-*/*"))
    train(run, rounds=1)
    assert not list((run / "clients").glob("*/session-*/*"))


def test_clients_forget_nothing_while_rounds_are_left(run):
    p, task = pretrain(cohort=6, rounds=2, batch_seconds=16.0), rounds.Task("toy", {}, averages)
    with federated.connect(run) as clients, rounds.serving(clients, p, task, initial(), run / "toy") as server:
        this_round = next(server.rounds())
        this_round.step(this_round.collect(this_round.ask(this_round.draw())))
        this_round.save()
    assert len(list((run / "clients").glob("*/session-*/toy-000001.safetensors"))) == 6


def test_a_copy_beside_the_checkpoints_is_none_of_them(run):
    train(run, rounds=2)
    shutil.copytree(checkpoints.path(run / "toy", 2), run / "toy/checkpoints/round-00002-copy")
    assert checkpoints.rounds(run / "toy")[-1] == 2
    train(run, rounds=2)


def test_the_last_round_is_validated_whatever_comes_before(run):
    train(run, rounds=5, validate_every=2)
    done = [row for row in files.read_rows(run / "toy/metrics.jsonl") if row["kind"] == "round"]
    assert [row["round"] for row in done if "validation_loss" in row] == [2, 4, 5]


def test_the_ledger_adds_up(run):
    train(run, cohort=3, rounds=2)
    ledger = files.read_rows(run / "toy/metrics.jsonl")
    assert [row["kind"] for row in ledger] == ["plan", *2 * ["cohort", *["client"] * 3, "round"]]
    last = ledger[-1]
    size = 4 * (12 + 5)
    assert (last["bytes_down"], last["bytes_up"]) == (6 * size, 3 * size)  # three clients train, and three validate
    assert last["audio_seconds"] == 12.0
    assert 2**25 < last["peak_memory_bytes"] < 2**40
    assert last["client_seconds"] == pytest.approx(0.03)
    assert last["loss"] == 2.0
    assert last["validation_loss"] == 5.0
    norms = [row["update_norm"] for row in ledger[-4:-1]]
    assert checkpoints.read(run / "toy", 2)[2]["reference_norm"] == sorted(norms)[1], "outliers are told by it"


def test_a_server_takes_the_median_where_it_says_so(run):
    ends = {name: train(run, name, server=name, server_rate=1.0, cohort=6, rounds=1) for name in SERVERS[-2:]}
    pulls: list[list[np.ndarray]] = [[], []]
    for client in CLIENTS:
        generator = seeds.torch_generator(0, client, 1)
        for kept, tensor in zip(pulls, initial().values(), strict=True):
            kept.append(0.1 * (torch.randn(tensor.shape, generator=generator) - tensor).numpy())
    for kept, (name, tensor) in zip(pulls, initial().items(), strict=True):
        expected = tensor.numpy() + np.median(kept, 0)
        np.testing.assert_allclose(ends["median"][name], expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ends["median"][name], ends["trimmed-mean"][name])


def test_a_run_of_another_seed_does_not_resume(run):
    train(run, rounds=2)
    with pytest.raises(checkpoints.CheckpointError, match="seed: 0 -> 1"):
        train(run, rounds=2, seed=1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [(CLIENTS[:5], "clients: 6 -> 5"), (["client-006", *CLIENTS[1:]], "first_client: client-000 -> client-001")],
)
def test_a_run_of_other_clients_does_not_resume(run, ids, message):
    train(run, rounds=2)
    pd.DataFrame({"client": ids}).to_parquet(run / "01_partition" / "clients.parquet")
    with pytest.raises(checkpoints.CheckpointError, match=message):
        train(run, rounds=2)


def test_a_run_of_another_task_does_not_resume(run):
    train(run, rounds=2)
    p, task = pretrain(cohort=4, rounds=2, batch_seconds=16.0), rounds.Task("distill", {}, averages)
    with (
        federated.connect(run) as clients,
        pytest.raises(checkpoints.CheckpointError, match="task: toy -> distill"),
        rounds.serving(clients, p, task, initial(), run / "toy"),
    ):
        raise AssertionError("weights of another task were taken up")


def test_checkpoints_of_other_shapes_kinds_or_names_are_refused(tmp_path):
    weights, server = {"model.a": torch.ones(3)}, {"m": torch.ones(2)}
    checkpoints.write(tmp_path, weights, server, {"round": 1, "settings": {}}, {})
    wrong = [({"model.a": torch.ones(1)}, server), (weights, server | {"n": torch.ones(1)})]
    for others in (*wrong, (weights, {"m": torch.ones(2, dtype=torch.float64)})):
        with pytest.raises(checkpoints.CheckpointError, match="does not hold this model's tensors"):
            checkpoints.resume(tmp_path, {}, *others)
