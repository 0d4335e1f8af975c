"""Pretraining end to end on tones, over the in-process engine: it learns, resumes, keeps what is personal."""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from federation import CODEBOOK, TONES, digest, make, pretrain, rows
from grid import InProcessGrid
from safetensors.torch import load_file, save_file

from fedhubert_lib import (
    batching,
    checkpoints,
    distillation,
    federated,
    files,
    hubert,
    params,
    planning,
    pooled,
    pretrained,
    pretraining,
    recipes,
    threads,
    training,
    weights,
)
from fedhubert_lib.federated import compression, flower, handlers, local, moments, optimisers, rounds, wire
from fedhubert_lib.federated.protocol import ClientHome

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tones"))


def fresh(tones: Path, folder: Path) -> Path:
    """A run over the clients of ``tones``, before pretraining."""
    folder.mkdir(exist_ok=True)
    for name in ("01_partition", "02_kmeans"):
        (folder / name).symlink_to(tones / name)
    return folder


@pytest.fixture
def run(tones: Path, tmp_path: Path) -> Path:
    return fresh(tones, tmp_path)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    head = folder / "head.safetensors"
    return model | ({f"head.{n}": t for n, t in load_file(head).items()} if head.exists() else {})


def interrupt(stage, run: Path, p, row: int) -> None:
    count = itertools.count()

    def stop(_):
        if next(count) == row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(run, p, stop)


def test_federated_pretraining_learns_and_writes_a_model_folder(run):
    p = pretrain(rounds=6, local_steps=4, cohort=4, server="fedavg", server_rate=1.0, learning_rate=3e-3)
    folder = pretraining.run(run, p)
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    losses = [row["validation_loss"] for row in ledger if row["kind"] == "round"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    model, head = pretrained.load(folder)
    assert head.label_embeddings.shape[0] == TONES
    assert digest(weights_of(folder)) == digest(weights_of(checkpoints.path(run / "03_pretrain", 6)))
    assert model(torch.zeros(1, 16_000)).last.shape == (1, 49, model.config.hidden_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "personal"},
        {"server": "scaffold", "server_rate": 1.0},
        {"local_state": "keep", "proximal": 0.1, "server": "fedavg", "server_rate": 1.0},
        {"local_state": "cohort", "head": "personal"},
    ],
    ids=["personal head", "scaffold", "kept moments", "moments of the cohort"],
)
def test_interrupted_pretraining_ends_with_the_same_bits(run, tones, tmp_path, changes):
    p = pretrain(**changes)
    whole = digest(weights_of(pretraining.run(run, p)))
    other = fresh(tones, tmp_path / "other")
    for row in (2, 4):
        interrupt(pretraining.run, other, p, row)
    assert digest(weights_of(pretraining.run(other, p))) == whole
    assert rows(other / "03_pretrain/metrics.jsonl") == rows(run / "03_pretrain/metrics.jsonl")


@pytest.mark.parametrize("train", [pretraining.run, pooled.train])
def test_a_model_that_was_damaged_is_written_again(run, train):
    p = pretrain(rounds=2)
    folder = train(run, p)
    before = digest(weights_of(folder))
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").unlink()
    assert digest(weights_of(train(run, p))) == before


@pytest.mark.parametrize("train", [pretraining.run, pooled.train])
def test_gradient_checkpointing_gives_the_same_weights(run, monkeypatch, train):
    """Bit for bit with a log-mel front end; the waveform's convolutions differ in rounding."""
    monkeypatch.setitem(hubert.PRESETS, "tiny", {**hubert.PRESETS["tiny"], "num_hidden_layers": 2})
    recomputed = []
    original = hubert.checkpoint
    monkeypatch.setattr(hubert, "checkpoint", lambda f, *a, **k: recomputed.append(f) or original(f, *a, **k))
    digests = []
    for on in (False, True):
        folder = train(run, pretrain(rounds=1, gradient_checkpointing=on))
        assert bool(recomputed) is on
        digests.append(digest(weights_of(folder)))
        shutil.rmtree(run / "03_pretrain")
    assert digests[0] == digests[1]


def test_pooled_training_has_no_personal_head(run, tmp_path):
    """Validation on the clients must leave the head alone that is in training."""
    ends = []
    for head in ("shared", "personal"):
        ends.append(weights_of(pooled.train(run, pretrain(head=head, rounds=2))))
        shutil.rmtree(run / "03_pretrain")
    assert digest(ends[0]) == digest(ends[1])


def test_pooled_training_takes_over_no_setting_that_is_the_federations_alone(run, tmp_path):
    """A pooled baseline held near its start by FedProx, say, would make the federation look good."""
    federated_only = {
        "proximal": 10.0,
        "server": "fedadam",
        "server_rate": 0.5,
        "local_state": "reset",
        "weighting": "clients",
        "privacy": "server",
        "privacy_clip": 1e-3,
        "secure_aggregation": True,
        "cohort": 3,
    }
    plain = digest(weights_of(pooled.train(run, pretrain(rounds=2, cohort=3))))
    (run / "03_pretrain").rename(tmp_path / "plain")
    assert digest(weights_of(pooled.train(run, pretrain(rounds=2, **federated_only)))) == plain
    (run / "03_pretrain").rename(tmp_path / "private")
    compressed = pretrain(rounds=2, cohort=3, compression="top-k", top_k_fraction=0.01)
    assert digest(weights_of(pooled.train(run, compressed))) == plain


def test_moments_of_a_layer_that_was_always_dropped_are_those_of_the_start(tmp_path):
    """And can be saved: safetensors refuses tensors that share memory."""
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "dropped": torch.nn.Linear(2, 2)})
    names = dict(module.named_parameters())
    optimiser = training.adamw(module, pretrain())
    module["used"](torch.ones(1, 2)).sum().backward()
    optimiser.step()
    kept = weights.moments(optimiser, names)
    assert {name.split("/")[0] for name in kept} == set(names)
    assert kept["dropped.weight/step"] == 0 and kept["used.weight/step"] == 1
    save_file(kept, tmp_path / "moments.safetensors")
    again = training.adamw(module, pretrain())
    weights.restore_moments(again, names, kept)
    module["dropped"](module["used"](torch.ones(1, 2))).sum().backward()
    again.step()
    assert weights.moments(again, names)["dropped.weight/step"] == 1


@pytest.mark.slow
def test_the_plan_counts_the_steps_of_both_trainings(run):
    """Of 4 clients in 3 rounds, half of which take part: 2 steps each, and as many on the pooled data."""
    p = pretrain(cohort=2)
    for centralised in (True, False):
        plan = planning.plan(run, p.model_copy(update={"centralised": centralised}))
        assert plan.steps == 3 * 2 * 2 and (plan.pooled > 0) == centralised
        assert plan.seconds == pytest.approx(12 * plan.step.seconds + plan.pooled)


def test_local_epochs_are_passes_over_what_each_client_has(run):
    """Two of four clients in each round; the last step is the schedule's last."""
    one = {"local_epochs": 1, "local_steps": 99, "cohort": 2, "warmup_fraction": 0.0}
    pretraining.run(run, pretrain(**one))
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    entries = [row for row in ledger if row["kind"] == "client"]
    assert len(entries) == 2 * 3
    # Five utterances of 1.6 s and more, cropped to 1.5 s, two to a batch: three steps.
    assert [row["audio_seconds"] for row in entries] == pytest.approx([5 * 1.5] * 6, abs=0.2)
    last = [row for row in ledger if row["kind"] == "round"][-1]
    assert last["steps"] == 2 * 3
    assert last["learning_rate"] == pytest.approx(1e-3 / (3 * 3))


@pytest.mark.parametrize(
    ("seconds", "steps"), [([0.5] * 9, 0), ([1.0, 0.5, 0.5], 1), ([1.5] * 9, 3), ([30.0] * 9, 3), ([1.5] * 99, 4)]
)
def test_validation_batches_are_those_that_crops_of_usable_utterances_fill(tmp_path, seconds, steps):
    pd.DataFrame({"samples": [int(16_000 * one) for one in seconds]}).to_parquet(tmp_path / "validation.parquet")
    home = ClientHome("client-000", data=tmp_path, labels=tmp_path, state=tmp_path)
    assert recipes.validation_steps(home, pretrain(batch_seconds=4.0, crop_seconds=1.5)) == steps


def test_threads_are_those_of_the_study_at_a_client_whose_process_has_others(run, monkeypatch):
    """In training and in validation."""
    seen, (task, weights) = [], pretraining.begin(run, pretrain(threads=1))

    def counted(function):
        return lambda *values, **options: seen.append(torch.get_num_threads()) or function(*values, **options)

    for function in (training.local_update, training.evaluate):
        monkeypatch.setattr(training, function.__name__, counted(function))
    client = "client-001"
    folders = (run / "01_partition/clients", run / "02_kmeans/clients", run / "03_pretrain/clients")
    home = ClientHome(client, *(folder / client for folder in folders))
    with threads.limited(2):
        for handler in (pretraining.update, pretraining.validate):
            handler(home, weights, task.config | {"round": 1, "session": "a", "durable": 0})
    assert seen == [1, 1]


def test_local_steps_bound_local_epochs(run):
    p = pretrain(local_epochs=2, local_steps=4, rounds=1)
    pretraining.run(run, p)
    pooled.train(run, p)
    entries = [row for row in files.read_rows(run / "03_pretrain/metrics.jsonl") if row["kind"] == "client"]
    assert all(row["audio_seconds"] < 4 * 2 * 1.6 for row in entries)
    (plan, *_) = files.read_rows(run / "03_pretrain/centralised/metrics.jsonl")
    assert plan["local_steps"] == 4


def test_moments_of_a_cohort_of_one_are_those_that_it_keeps(tmp_path):
    """Through the server and back to the bit: all the rounds are then one run of AdamW."""
    run, ends = make(tmp_path / "one", clients=1), []
    for state in ("keep", "cohort", "reset"):
        p = pretrain(cohort=1, server="fedavg", server_rate=1.0, local_state=state)
        ends.append(digest(weights_of(pretraining.run(run, p))))
        shutil.rmtree(run / "03_pretrain")
    assert ends[0] == ends[1] != ends[2]


def test_second_moments_of_a_cohort_are_those_of_its_batches_together():
    """Eight clients whose gradients are one gradient and noise of their own, beside AdamW on the mean of them all."""
    steps, clients, size = 200, 8, 4000
    generator = torch.Generator().manual_seed(0)
    signal = torch.logspace(-3, 1, size)
    weight = [torch.nn.Linear(size, 1, bias=False) for _ in range(clients + 1)]
    optimisers = [training.adamw(module, pretrain()) for module in weight]
    for _ in range(steps):
        gradients = signal + torch.randn(clients, 1, size, generator=generator)
        for module, gradient in zip(weight, [*gradients, gradients.mean(0)], strict=True):
            module.weight.grad = gradient.clone()
        for optimiser in optimisers:
            optimiser.step()
    states = [weights.moments(o, {"w": m.weight}) for o, m in zip(optimisers, weight, strict=True)]
    mean = {f"moments/{name}": torch.stack([one[name] for one in states[:-1]]).mean(0) for name in states[0]}
    sent, wanted = moments.pooled(mean, clients)["moments/w/exp_avg_sq"], states[-1]["w/exp_avg_sq"]
    ratio = (sent / wanted).view(8, -1).mean(1)  # from noise alone to signal alone
    torch.testing.assert_close(ratio, torch.ones(8), atol=0.12, rtol=0)
    assert float((mean["moments/w/exp_avg_sq"] / wanted).view(8, -1).mean(1)[0]) > 6, "the mean's is that of one client"
    assert moments.pooled(mean, 1)["moments/w/exp_avg_sq"] is mean["moments/w/exp_avg_sq"]


def test_moments_of_a_cohort_travel_and_stay_with_no_client(run, monkeypatch):
    monkeypatch.setitem(handlers.HANDLERS, "pretrain.forget", lambda *_: ({}, {}))
    for state, kept in (("keep", 4), ("cohort", 0)):
        trained = weights_of(pretraining.run(run, pretrain(local_state=state, cohort=4, rounds=2)))
        values = sum(t.numel() for t in trained.values())
        values += (2 * values + len(trained)) * (state == "cohort")  # two moments, and a number of steps for each
        ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
        assert {row["bytes_up"] for row in ledger if row["kind"] == "round"} == {4 * 4 * values}
        assert len(list((run / "03_pretrain/clients").glob("*/session-*/moments-000002.safetensors"))) == kept
        shutil.rmtree(run / "03_pretrain")


def test_moments_of_a_cohort_whose_clients_drop_layers_are_accepted(run, monkeypatch):
    """Their counts of steps differ; the mean is a fraction, which float32 rounds as clients count on."""
    config = replace(recipes.model_config(pretrain()), layerdrop=0.2)
    monkeypatch.setattr(recipes, "model_config", lambda p: config)
    pretraining.run(run, pretrain(local_state="cohort", cohort=4, rounds=5, local_steps=5))
    rows = files.read_rows(run / "03_pretrain/metrics.jsonl")
    assert not [row["reason"] for row in rows if row["kind"] == "failure"]
    assert [row["clients"] for row in rows if row["kind"] == "round"] == [4] * 5


def sharing(p) -> moments.Sharing:
    return moments.Sharing(SimpleNamespace(weights={"w": torch.zeros(3)}, tensors={}, p=p))


@pytest.mark.parametrize("taken", [(2, 2), (1, 2)])
def test_second_moments_are_averaged_as_if_clients_had_started_from_their_mean(taken):
    """What was sent in their place is no part of the mean: two rounds of two clients, beside moments by hand."""
    hook, generator, beta = sharing(pretrain(local_state="cohort")), torch.Generator().manual_seed(0), training.BETAS[1]
    expected, name = torch.zeros(3), "moments/w/exp_avg_sq"
    for _ in range(2):
        round = SimpleNamespace(asked=["a", "b"], payload={})
        hook.message(round)
        ends, by_hand = [], []
        for steps in taken:
            one, moment = {key: tensor.clone() for key, tensor in round.payload.items()}, expected
            for _ in range(steps):
                square = torch.rand(3, generator=generator)
                one[name], moment = beta * one[name] + (1 - beta) * square, beta * moment + (1 - beta) * square
            one["moments/w/step"] += steps
            ends.append(one)
            by_hand.append(moment)
        hook.step(round, {key: (ends[0][key] + ends[1][key]) / 2 for key in ends[0]})
        expected = sum(by_hand) / 2
    tolerance = 1e-6 if taken[0] == taken[1] else 1e-3  # beta to the mean number of steps is nearly the mean power
    torch.testing.assert_close(hook.server.tensors[name], expected, atol=0, rtol=tolerance)


@pytest.mark.parametrize(
    "change",
    [{"exp_avg": 1e19}, {"exp_avg_sq": 61.0}, {"exp_avg_sq": -0.1}, {"step": 3.0}, {"step": 99.0}],
    ids=["a gradient beyond the clipping norm", "its square", "a square below 0", "steps undone", "too many steps"],
)
def test_moments_that_no_training_has_are_refused(change):
    p = pretrain(local_state="cohort", local_steps=2, clip_norm=10.0)
    like = {"w": torch.ones(2), "moments/w/exp_avg": torch.ones(2), "moments/w/exp_avg_sq": torch.ones(2)}
    like |= {"moments/w/step": torch.tensor(4.0)}
    norm = sharing(p).collector(None).norm
    assert norm(like | {"moments/w/step": torch.tensor(6.0)}, like) == pytest.approx(2**0.5), "the update's alone"
    mean = torch.tensor(15.2)  # of clients whose layers layerdrop leaves out
    counted = mean + 1 + 1
    assert counted - mean > 2 and norm(like | {"moments/w/step": counted}, like | {"moments/w/step": mean})
    ((key, value),) = change.items()
    with pytest.raises(optimisers.UpdateError, match="its moments are not those of so many steps"):
        norm(like | {f"moments/w/{key}": torch.full_like(like[f"moments/w/{key}"], value)}, like)


def test_a_personal_head_never_leaves_its_client(run):
    p = pretrain(head="personal", cohort=4)
    trunk = sum(t.numel() for t in weights_of(pretraining.run(run, p)).values())
    assert not (run / "03_pretrain/checkpoint/head.safetensors").exists()
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    assert {row["bytes_up"] for row in ledger if row["kind"] == "round"} == {4 * trunk * 4}
    kept = sorted((run / "03_pretrain/clients").glob("*/session-*/personal-000003.safetensors"))
    assert len(kept) == 4
    heads = [load_file(path) for path in kept]
    assert all(
        set(head) == {"head.label_embeddings", "head.final_proj.weight", "head.final_proj.bias"} for head in heads
    )
    assert len({digest(head) for head in heads}) == 4


def test_labels_of_another_codebook_are_refused(tones, tmp_path):
    """As of a client that a real federation's server has given another one since."""
    run = fresh(tones, tmp_path)
    (run / "02_kmeans").unlink()
    shutil.copytree(tones / "02_kmeans", run / "02_kmeans")
    path = run / "02_kmeans/codebooks" / CODEBOOK / "codebook.json"
    files.write_json(path, json.loads(path.read_text()) | {"made": "now"})
    for number, made in enumerate(["now", "before", "now", "now"]):
        files.write_json(run / f"02_kmeans/clients/client-{number:03d}" / CODEBOOK / "settings.json", {"made": made})
    pretraining.run(run, pretrain(cohort=4, rounds=1))
    failures = [row for row in files.read_rows(run / "03_pretrain/metrics.jsonl") if row["kind"] == "failure"]
    assert {row["client"] for row in failures} == {"client-001"}
    assert all("labels of another codebook" in row["reason"] for row in failures)


def test_a_personal_head_starts_alike_over_clients_and_on_pooled_data(run, tmp_path):
    """Not from the checkpoint that the model begins with: clients draw theirs from the seed."""
    pretraining.run(run, pretrain(rounds=1))
    p = pretrain(head="personal", initial=str(run / "03_pretrain/checkpoint"), seed=1)
    _, weights = pretraining.begin(run, p)
    _, drawn = pretraining.begin(run, pretrain(seed=1))
    assert torch.equal(weights["head.label_embeddings"], drawn["head.label_embeddings"])
    assert not torch.equal(weights["model.masked_spec_embed"], drawn["model.masked_spec_embed"])


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_scaffolds_variates_cancel_and_come_from_the_gradients(run, monkeypatch, kind):
    """With everybody asked in every round c stays the mean of the c_i, by clients, whatever their updates weigh, but
    for what compression keeps back; after an answer that was lost, too."""

    def lossy(home, arrays, config):
        answer = pretraining.update(home, arrays, config)
        if (home.client, config["round"]) == ("client-001", 2):
            raise TimeoutError("too late")
        return answer

    monkeypatch.setitem(handlers.HANDLERS, "pretrain.forget", lambda *_: ({}, {}))
    monkeypatch.setitem(handlers.HANDLERS, "pretrain.update", lossy)
    p = pretrain(server="scaffold", server_rate=1.0, cohort=4, rounds=3, compression=kind)
    pretraining.run(run, p)
    _, server, _ = checkpoints.read(run / "03_pretrain", 3)
    paths = sorted((run / "03_pretrain/clients").glob("*/session-*/control-000003.safetensors"))
    variates = [load_file(file) for file in paths]
    lost = [load_file(file.with_name("lost-000003.safetensors")) if kind != "none" else {} for file in paths]
    assert len(paths) == 4
    for name, tensor in variates[0].items():
        sent = [
            of_client[name] - rest.get(f"control/{name}", 0) for of_client, rest in zip(variates, lost, strict=True)
        ]
        torch.testing.assert_close(server[f"control/{name}"], torch.stack(sent).mean(0), rtol=1e-4, atol=1e-6)
        assert tensor.abs().max() > 0


SCAFFOLD = {"server": "scaffold", "local_state": "reset", "clip_norm": 1e9, "learning_rate": 0.05}


@pytest.fixture
def plain_sgd(monkeypatch) -> float:
    """The rate of SGD in place of AdamW, without momentum or schedule."""
    rate = SCAFFOLD["learning_rate"]
    monkeypatch.setattr(training, "adamw", lambda module, p: torch.optim.SGD(module.parameters(), lr=rate))
    monkeypatch.setattr(training, "rate", lambda peak, warmup, step, total: rate)
    return rate


def test_scaffolds_variate_under_plain_sgd_is_option_ii(run, plain_sgd):
    """Without momentum c_i - c + (x - y) / (K eta) is what the client keeps."""
    rate, (task, weights) = plain_sgd, pretraining.begin(run, pretrain(**SCAFFOLD, local_epochs=1, local_steps=9))
    arrays = weights | {f"control/{name}": torch.full_like(t, 1e-3) for name, t in weights.items()}
    client = "client-001"
    home = ClientHome(
        client,
        data=run / "01_partition/clients" / client,
        labels=run / "02_kmeans/clients" / client,
        state=run / "03_pretrain/clients" / client,
    )
    message = dict(task.config) | {"round": 1, "session": "a", "durable": 0, "counted": {client: 0}}
    change, measured = pretraining.update(home, arrays, message)
    kept = load_file(home.state / "session-a/control-000001.safetensors")
    assert measured["steps"] == 3, "an epoch"
    for name in weights:
        expected = -1e-3 - change[name] / (measured["steps"] * rate)
        torch.testing.assert_close(kept[name], expected, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(change[f"control/{name}"], kept[name])


def test_scaffold_adds_c_minus_c_i_to_every_gradient(run, plain_sgd):
    """One step each, in sessions of their own: round 2 of session a alone has a c_i, the gradient of round 1."""
    rate, client, (task, weights) = plain_sgd, "client-001", pretraining.begin(run, pretrain(**SCAFFOLD, local_steps=1))
    home = handlers.homes(run, [client], "pretrain", "cpu")[client]

    def change(session, number, c):
        arrays = weights | {f"control/{name}": torch.full_like(tensor, c) for name, tensor in weights.items()}
        counted = {client: 1 if (session, number) == ("a", 2) else 0}
        message = {"round": number, "session": session, "durable": 0, "counted": counted}
        return pretraining.update(home, arrays, task.config | message)[0]

    plain, corrected = change("a", 1, 0.0), change("b", 1, 1e-2)
    second, without = change("a", 2, 0.0), change("c", 2, 0.0)
    for name, tensor in plain.items():
        if not name.startswith("control/"):
            c = torch.full_like(tensor, 1e-2)
            torch.testing.assert_close(corrected[name] - tensor, -rate * c, rtol=1e-3, atol=2e-7)
            torch.testing.assert_close(second[name] - without[name], -tensor, rtol=1e-3, atol=2e-6)
    shutil.rmtree(home.state / "session-a")
    with pytest.raises(ValueError, match="its control variate is gone"):  # whose mean still counts it
        change("a", 2, 0.0)


def test_what_compression_lost_comes_with_the_next_update(run):
    home = handlers.homes(run, ["client-000"], "pretrain", "cpu")["client-000"]

    def change(session, number, kind):
        p = pretrain(local_state="reset", local_steps=1, compression=kind, top_k_fraction=0.05)
        task, weights = pretraining.begin(run, p)
        message = {"round": number, "session": session, "durable": 0}
        return pretraining.update(home, weights, task.config | message)[0]

    change("a", 1, "top-k")
    sent, plain = change("a", 2, "top-k"), change("b", 2, "none")
    before, after = (load_file(home.state / f"session-a/lost-00000{number}.safetensors") for number in (1, 2))
    assert len(sent["values"]) == round(0.05 * sum(tensor.numel() for tensor in plain.values()))
    for name, value in compression.decode(sent, "top-k", plain).items():
        torch.testing.assert_close(value + after[name], plain[name] + before[name])


def test_proximal_and_compressed_rounds_are_others_than_plain_ones(tones, tmp_path):
    ends, sizes = [], []
    for number, changes in enumerate(({}, {"proximal": 5.0}, {"compression": "int8"})):
        run = fresh(tones, tmp_path / str(number))
        p = pretrain(rounds=1, cohort=1, server="fedavg", server_rate=1.0, **changes)
        ends.append(torch.cat([tensor.flatten() for tensor in weights_of(pretraining.run(run, p)).values()]))
        sizes.append(files.rounds(run / "03_pretrain/metrics.jsonl")[0]["bytes_up"])
    plain, proximal, compressed = ends
    assert not torch.equal(proximal, plain) and not torch.equal(compressed, plain)
    torch.testing.assert_close(compressed, plain, atol=1e-4, rtol=0)
    assert sizes[2] < 0.3 * sizes[0]


def test_dropout_is_another_in_every_round_and_at_every_client(run, monkeypatch):
    drawn, update = [], training.local_update
    monkeypatch.setattr(training, "local_update", lambda *a, **o: drawn.append(o["seed"]) or update(*a, **o))
    pretraining.run(run, pretrain(rounds=2, local_steps=1))
    assert len(set(drawn)) == len(drawn) == 4


def test_validation_reads_no_training_speech(tmp_path):
    run, client = make(tmp_path, clients=1, utterances=1), "client-000"
    task, weights = pretraining.begin(run, pretrain())
    home = handlers.homes(run, [client], "pretrain", "cpu")[client]
    (run / "audio" / client / f"{client}-00.flac").unlink()
    message = {"round": 1, "session": "a", "durable": 0}
    assert pretraining.validate(home, weights, task.config | message)[1]["masked_frames"] > 0


ROUND = {"round": 1, "session": "a", "durable": 0}


def test_a_client_gives_unmasked_frames_the_weight_that_the_study_sets(run):
    home = handlers.homes(run, ["client-000"], "pretrain", "cpu")["client-000"]
    task, weights = pretraining.begin(run, pretrain(unmasked_weight=2.0, unmasked_decay=0.5))
    lesson = pretraining.lesson(home, weights, task.config | ROUND)
    (batch,) = local._batches(home, "train", lesson, 1, 1)
    measured = lesson.objective(batch, 0.25).measured  # half of the decay: half of unmasked_weight
    expected = measured["loss_sum"] + 1.0 * measured["unmasked_loss_sum"] + 10 * measured["penalty_sum"]
    torch.testing.assert_close(measured["objective"], expected)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_clients_normalise_utterances_for_a_model_that_wants_it(run, part):
    home = handlers.homes(run, ["client-000"], "pretrain", "cpu")["client-000"]
    task, weights = pretraining.begin(run, pretrain())
    for wanted in (False, True):
        model = {"model": task.config["model"] | {"do_normalize": wanted}}
        lesson = pretraining.lesson(home, weights, task.config | model | ROUND)
        (batch,) = local._batches(home, part, lesson, 1, 1)
        assert batch.normalised == wanted


def test_validation_is_with_the_personal_head_of_the_round_just_done(run):
    home = handlers.homes(run, ["client-000"], "pretrain", "cpu")["client-000"]
    task, weights = pretraining.begin(run, pretrain(head="personal"))
    shared = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    losses = [pretraining.validate(home, shared, task.config | ROUND)[1]["loss_sum"]]  # with the head as drawn
    pretraining.update(home, shared, task.config | ROUND)
    losses.append(pretraining.validate(home, shared, task.config | ROUND)[1]["loss_sum"])
    assert losses[0] != losses[1]


def test_clients_leave_the_servers_tensors_alone(run):
    task, weights = pretraining.begin(run, pretrain())
    before = digest(weights)
    message = dict(task.config) | {"round": 1, "session": "a", "durable": 0, "first_step": 0, "total_steps": 6}
    with federated.connect(run) as clients:
        answers = list(clients.ask("pretrain.update", arrays=weights, config=message))
    assert digest(weights) == before
    assert len({digest(answer.arrays) for answer in answers}) == 4


def test_centralised_training_resumes_and_ends_with_the_same_bits(run, tmp_path, tones):
    p = pretrain()
    whole = digest(weights_of(pooled.train(run, p)))
    other = fresh(tones, tmp_path / "other")
    interrupt(pooled.train, other, p, 2)
    assert digest(weights_of(pooled.train(other, p))) == whole
    ledger = rows(other / "03_pretrain/centralised/metrics.jsonl")
    assert ledger == rows(run / "03_pretrain/centralised/metrics.jsonl")
    assert [row["round"] for row in ledger if row["kind"] == "round"] == [1, 2, 3]


def test_the_baseline_has_the_federations_start_updates_and_audio(run, monkeypatch):
    steps = []
    original = training.local_update

    def counted(*arguments, **options):
        measured = original(*arguments, **options)
        steps.append((measured["steps"], measured["audio_seconds"], measured["learning_rate"]))
        return measured

    monkeypatch.setattr(training, "local_update", counted)
    p = pretrain(batch_seconds=1.6, crop_seconds=1.6)  # one clip in each batch
    pretraining.run(run, p)
    federated_steps, steps[:] = steps[:], []
    pooled.train(run, p)
    assert len(steps) == p.rounds
    assert sum(s for s, _, _ in steps) == p.rounds * p.local_steps
    assert sum(s for s, _, _ in federated_steps) == p.cohort * p.rounds * p.local_steps
    assert sum(a for _, a, _ in steps) == pytest.approx(sum(a for _, a, _ in federated_steps), rel=0.05)
    assert [r for _, _, r in steps] == [r for _, _, r in federated_steps[:: p.cohort]]
    _, kept, _ = checkpoints.read(run / "03_pretrain/centralised", p.rounds)
    counts = {int(tensor) for name, tensor in kept.items() if name.endswith("/step")}
    assert counts == {p.rounds * p.local_steps}, "one AdamW from start to end"


def test_pretraining_can_start_from_a_checkpoint(run, tmp_path):
    first = pretraining.run(run, pretrain(rounds=1))
    _, weights = pretraining.begin(run, pretrain(initial=str(first)))
    assert digest(weights) == digest(weights_of(first))


def test_another_seed_starts_from_another_model_and_head(run):
    first, second = (pretraining.begin(run, pretrain(seed=seed))[1] for seed in (0, 1))
    for part in ("model.", "head."):
        assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith(part))


def test_a_codebook_that_was_not_made_is_named(run):
    with pytest.raises(FileNotFoundError, match="aligned.*name it in codebooks of 02_kmeans"):
        pretraining.run(run, pretrain(codebook="aligned"))


_opened: list[str] | None = None
"""Paths that Python code opens or lists while a test watches. An audit hook cannot be removed, so there is one."""
_client_acts = False
"""Whether code of a client runs, its decoding threads included."""


def _watch(event: str, arguments: tuple) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and not _client_acts:
        _opened.append(os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else "")


def test_server_code_opens_no_file_of_a_client(run, tmp_path, monkeypatch):
    """Clients' folders, and the audio, are there only while their client acts: for Python, Arrow, libsndfile and all.

    And while it does, only its own are. An audit hook watches what Python itself opens.
    """
    global _opened
    base = make(tmp_path / "base")
    hidden = tmp_path / "hidden"
    places = ["01_partition/clients", "02_kmeans/clients", "03_pretrain/clients", "audio"]

    def move(client: str, there: Path, here: Path) -> None:
        for place in places:
            if (there / place / client).exists():
                (here / place).mkdir(parents=True, exist_ok=True)
                (there / place / client).rename(here / place / client)

    for client in (ids := federated.client_ids(base)):
        move(client, base, hidden)
    acted = []
    answer = handlers.answer

    def present(home, *message):
        global _client_acts
        acted.append(home.client)
        move(home.client, hidden, base)
        _client_acts = True
        try:
            return answer(home, *message)
        finally:
            _client_acts = False
            move(home.client, base, hidden)

    monkeypatch.setattr(handlers, "answer", present)
    sys.addaudithook(_watch)
    _opened = []
    try:
        pretraining.run(base, pretrain(cohort=4, rounds=2, head="personal", local_state="keep"))
        opened = _opened
    finally:
        _opened = None
    assert set(acted) == set(ids)
    ledger = files.read_rows(base / "03_pretrain/metrics.jsonl")
    assert not [row for row in ledger if row["kind"] == "failure"]
    assert any(path.endswith("metrics.jsonl") for path in opened)  # the hook does see what the server opens
    assert not [path for path in opened if any(f"{place}/client-" in path for place in places)]


def test_the_watch_would_see_a_server_that_looks(run):
    global _opened
    sys.addaudithook(_watch)
    _opened = []
    try:
        (run / "02_kmeans/clients/client-000" / CODEBOOK / "labels.bin").read_bytes()
        seen = _opened
    finally:
        _opened = None
    assert any("02_kmeans/clients/client-000" in path for path in seen)


class Gathering(InProcessGrid):
    """Its nodes connect one after another, as SuperNodes do; the last one only in the middle of the run."""

    looks = 0

    def get_node_ids(self):
        self.looks += 1
        return list(super().get_node_ids())[: min(self.looks - 1, 3 if self.looks < 8 else 4)]


@contextmanager
def through_the_server_app(grid: InProcessGrid, ids: list[str]) -> Iterator[wire.RemoteClients]:
    """The clients of ``grid`` over the ServerApp's function, which Flower would call in a process of its own."""
    with (
        wire.folder() as folder,
        Listener(f"{folder}/socket", family="AF_UNIX") as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        ended = pool.submit(flower.main, grid, SimpleNamespace(run_config={"socket": listener.address}))
        with listener.accept() as pipe:
            yield wire.RemoteClients(pipe, ids, folder)
            wire.send(pipe, wire.END)
            ended.result(timeout=60)


def test_the_server_app_does_what_the_notebooks_do(run, tones, tmp_path, monkeypatch):
    p = pretrain()
    small = {"rounds": 1, "cohort": 2, "local_steps": 1, "batch_seconds": 4.0, "crop_seconds": 1.5, "layers": 1}
    student = params.Distill(**small, hidden_size=96, device="cpu", precision="float32", send_teacher=True)
    expected = digest(weights_of(pretraining.run(run, p)))
    distilled = digest(weights_of(distillation.run(run, student)))
    other = fresh(tones, tmp_path / "other")
    ids = federated.client_ids(other)
    with through_the_server_app(InProcessGrid(other, ids, monkeypatch), ids) as clients:
        assert digest(weights_of(pretraining.run(other, p, clients=clients))) == expected
        assert digest(weights_of(distillation.run(other, student, clients=clients))) == distilled


def test_the_server_app_resumes_without_a_late_client_and_welcomes_it(run, monkeypatch):
    monkeypatch.setattr(flower, "WAIT_SECONDS", 0.03)
    ids = federated.client_ids(run)
    with through_the_server_app(Gathering(run, ids, monkeypatch), ids) as clients:
        pretraining.run(run, pretrain(cohort=4, rounds=4), clients=clients)
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    absent = {row["round"] for row in ledger if row["kind"] == "failure" and row["reason"] == "not connected"}
    present = {row["round"] for row in ledger if row["kind"] == "client" and row["client"] == "client-003"}
    assert absent
    assert present
    assert max(absent) <= min(present)


def test_panel_and_cohort_are_draws_of_their_own():
    ids = [f"client-{number:03d}" for number in range(50)]
    p = pretrain(cohort=5)
    assert rounds.panel(ids, p) == rounds.panel(ids, p) != rounds.cohort(ids, 5, p.seed, 1)
    assert rounds.panel(ids, p) != rounds.panel(ids, pretrain(cohort=5, seed=1))


@pytest.mark.parametrize(
    ("cohort", "batch_seconds", "batches"),
    [(2, 4.0, (1, 8.0)), (8, 8.0, (2, 32.0)), (3, 16.0, (3, 16.0)), (6, 8.0, (2, 24.0)), (8, 90.0, (8, 90.0))],
)
def test_a_pooled_step_has_the_cohorts_audio_in_fewer_batches(cohort, batch_seconds, batches):
    merged = pooled.merged(pretrain(cohort=cohort, batch_seconds=batch_seconds, crop_seconds=1.0))
    assert (merged.cohort, merged.batch_seconds) == batches


@pytest.mark.parametrize(
    ("batch_seconds", "crop_seconds"), [(8.0, 5.0), (16.0, 9.0), (8.0, 4.0), (4.0, 3.0), (6.0, 4.0)]
)
def test_a_pooled_step_has_as_many_crops_as_the_cohorts_steps(batch_seconds, crop_seconds):
    """8 s hold one crop of 5 s, and 32 s six."""
    p = pretrain(cohort=8, batch_seconds=batch_seconds, crop_seconds=crop_seconds)
    large = pooled.merged(p)
    assert large.cohort * (large.batch_seconds // crop_seconds) == 8 * (batch_seconds // crop_seconds)


@pytest.mark.usefixtures("narrow")
def test_draws_of_batches_and_steps_come_from_seed_round_and_client(tmp_path, monkeypatch):
    run, keys, drawn, original, update = make(tmp_path), [], [], batching.batches, training.local_update
    monkeypatch.setattr(batching, "batches", lambda *a, **o: keys.append(a[3]) or original(*a, **o))
    monkeypatch.setattr(training, "local_update", lambda *a, **o: drawn.append(o["seed"]) or update(*a, **o))
    pretraining.run(run, pretrain(rounds=2, local_steps=1, seed=3))
    asked = [row for row in files.read_rows(run / "03_pretrain/metrics.jsonl") if row["kind"] == "client"]
    cohorts = [rounds.cohort(federated.client_ids(run), 2, 3, number) for number in (1, 2)]
    assert [row["client"] for row in asked] == [client for cohort in cohorts for client in cohort]
    assert [key for key in keys if key[1]] == [(3, row["round"], row["client"]) for row in asked]
    assert len({key[2] for key in keys if not key[1]}) > 1, "each client validates on batches of its own"
    assert len(set(drawn)) == len(asked), "dropout"


def test_each_round_of_pooled_training_draws_batches_and_dropout_anew(run, monkeypatch):
    keys, drawn, original, update = [], [], batching.batches, training.local_update
    monkeypatch.setattr(batching, "batches", lambda *a, **o: keys.append(a[3]) or original(*a, **o))
    monkeypatch.setattr(training, "local_update", lambda *a, **o: drawn.append(o["seed"]) or update(*a, **o))
    pooled.train(run, pretrain(rounds=3, local_steps=1, seed=5))
    assert [key for key in keys if key[2] == "all"] == [(5, number, "all") for number in (1, 2, 3)]
    assert len(set(drawn)) == 3


def test_a_cohorts_second_moment_is_that_of_one_large_batch(tmp_path):
    """g² + s² / M, under the bias of AdamW's few steps; it is what the server sends."""
    first, second = training.BETAS
    step, mean, noise, clients = 3, 2.0, 5.0, 4
    biased = {"exp_avg": mean * (1 - first**step), "exp_avg_sq": (mean**2 + noise) * (1 - second**step), "step": step}
    shared = {f"moments/w/{name}": torch.full((3,), float(value)) for name, value in biased.items()}
    shared["moments/w/step"] = torch.tensor(float(step))
    expected = torch.full((3,), (mean**2 + noise / clients) * (1 - second**step))
    torch.testing.assert_close(moments.pooled(shared, clients)["moments/w/exp_avg_sq"], expected)
    hook, round = sharing(pretrain(local_state="cohort")), SimpleNamespace(asked=list("abcd"), payload={})
    for name, value in shared.items():
        hook.moments[name].copy_(value)
    hook.message(round)
    torch.testing.assert_close(round.payload["moments/w/exp_avg_sq"], expected)


@pytest.mark.usefixtures("narrow")
def test_a_personal_head_keeps_its_moments_where_the_others_are_the_cohorts(tmp_path, monkeypatch):
    run = make(tmp_path, clients=1)
    monkeypatch.setitem(handlers.HANDLERS, "pretrain.forget", lambda *_: ({}, {}))
    pretraining.run(run, pretrain(cohort=1, local_state="cohort", head="personal", rounds=3, local_steps=2))
    (path,) = (run / "03_pretrain/clients").glob("*/session-*/moments-000003.safetensors")
    kept = load_file(path)
    assert {name.split(".")[0] for name in kept} == {"head"}
    assert {int(value) for name, value in kept.items() if name.endswith("/step")} == {6}
