"""Secure aggregation: the sum is exact, a single update is noise, and what would unmask a client is refused."""

from pathlib import Path
from types import SimpleNamespace

import federation
import numpy as np
import pytest
import torch

from fedhubert_lib import params, pretrained, pretraining, seeds
from fedhubert_lib.federated import accounting, client_ids, client_state, handlers, privacy, secure
from fedhubert_lib.federated.optimisers import UpdateError
from fedhubert_lib.federated.protocol import ClientHome, Failure, Reply

CLIENTS = ["client-0", "client-1", "client-2", "client-3"]
P = params.Pretrain(secure_aggregation=True, weighting="clients", cohort=4)


def home(folder: Path, client: str) -> ClientHome:
    return ClientHome(client, data=folder, labels=folder, state=folder / client)


def config(**changes) -> dict:
    return {"session": "s", "round": 1, "durable": 0, "clip": 1.0, **changes}


def update(client: str) -> dict[str, torch.Tensor]:
    generator = seeds.torch_generator(0, client)
    values = {"weight": torch.randn(60, 11, generator=generator), "scale": torch.randn((), generator=generator)}
    return {name: value / 30 for name, value in values.items()}


def public_keys(folder: Path) -> dict[str, str]:
    return {client: secure.public_key(secure.keys(home(folder, client), {}, config())[0]) for client in CLIENTS}


def masked(folder: Path, peers: dict[str, str], **changes) -> dict[str, dict[str, torch.Tensor]]:
    message = config(peers=peers, **changes)
    return {client: secure.mask(update(client), home(folder, client), message, P) for client in peers}


def test_the_mean_is_that_of_the_updates(tmp_path):
    sent = masked(tmp_path, public_keys(tmp_path))
    collector, step = secure.Sum(update(CLIENTS[0]), secure.scale(P, 1.0, 4)), 1 / secure.scale(P, 1.0, 4)
    for client in reversed(CLIENTS):  # any order gives the same integers
        collector.norm(sent[client], update(client))
        collector.add(sent[client], 1.0)
    mean = collector.result()
    for name, value in mean.items():
        true = sum(update(client)[name].double() for client in CLIENTS) / 4
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), true, atol=2 * step)
        if name == "weight":  # rounded to the nearest step: no bias in 660 values
            assert abs(float((value.double() - true).mean())) < 0.1 * step


def test_one_update_alone_is_noise(tmp_path):
    sent = masked(tmp_path, public_keys(tmp_path))["client-1"]["weight"].numpy().view(np.uint32)
    # 660 uniform draws from 2^32: mean and spread, and nothing in common with the update.
    assert sent.mean() / 2**32 == pytest.approx(0.5, abs=4 / np.sqrt(12 * 660))
    assert abs(np.corrcoef(sent.ravel(), update("client-1")["weight"].numpy().ravel())[0, 1]) < 4 / np.sqrt(660)
    again = masked(tmp_path, public_keys(tmp_path))["client-1"]["weight"].numpy().view(np.uint32)
    assert (sent != again).mean() > 0.99


def test_without_one_client_the_sum_is_noise(tmp_path):
    sent = masked(tmp_path, public_keys(tmp_path))
    collector = secure.Sum(update(CLIENTS[0]), secure.scale(P, 1.0, 4))
    for client in CLIENTS[1:]:
        collector.add(sent[client], 1.0)
    assert float(collector.result()["weight"].abs().mean()) > 0.1  # the true one: 0.03 / sqrt(3)


def test_a_client_masks_only_among_enough_others_and_once_per_key(tmp_path):
    peers = public_keys(tmp_path)
    mine = home(tmp_path, "client-0")
    with pytest.raises(ValueError, match="hide nobody"):
        secure.mask(update("client-0"), mine, config(peers=dict(list(peers.items())[:2])), P)
    forged = {**peers, "client-0": peers["client-1"]}
    secure.mask(update("client-1"), home(tmp_path, "client-1"), config(peers=peers), P)
    with pytest.raises(ValueError, match="no unused key"):  # a second sum, of others, would tell them apart
        secure.mask(update("client-1"), home(tmp_path, "client-1"), config(peers=peers), P)
    with pytest.raises(ValueError, match="another key"):
        secure.mask(update("client-0"), mine, config(peers=forged), P)
    assert not list(mine.state.iterdir())  # of a spent key nothing stays


def test_an_update_is_clipped_before_it_is_masked(tmp_path):
    peers, like = public_keys(tmp_path), {"weight": torch.full((4,), 3.0)}
    collector = secure.Sum(like, secure.scale(P, 1.0, 4))
    for client in CLIENTS:
        change = {"weight": like["weight"].clone()}
        sent = SimpleNamespace(p=P, change=change, home=home(tmp_path, client), config=config(peers=peers), measured={})
        list(secure.masked(sent))
        assert sent.measured == {"update_norm": 6.0}, "before clipping"
        collector.add(sent.change, 1.0)
    torch.testing.assert_close(collector.result()["weight"], torch.full((4,), 0.5))


def test_values_beyond_the_clipping_norm_are_refused(tmp_path):
    with pytest.raises(ValueError, match="beyond the range"):
        masked(tmp_path, public_keys(tmp_path), clip=1e-3)


def test_malformed_answers_are_refused():
    with pytest.raises(UpdateError, match="public key"):
        secure.public_key({"public": torch.zeros(31, dtype=torch.uint8)})
    for low in (0, 1):  # points of low order, with which no peer could exchange a secret
        with pytest.raises(UpdateError, match="no secret can be agreed"):
            secure.public_key({"public": torch.tensor([low] + [0] * 31, dtype=torch.uint8)})
    like = {"weight": torch.zeros(3)}
    for wrong in ({}, {"weight": torch.zeros(3)}, {"weight": torch.zeros(4, dtype=torch.int32)}):
        with pytest.raises(UpdateError):
            secure.Sum(like, 1.0).norm(wrong, like)


def final(run: Path, rows: list[dict], **changes) -> dict[str, torch.Tensor]:
    chosen = {"rounds": 2, "cohort": 4, "weighting": "clients", "privacy_clip": 100.0, "server": "fedavg", **changes}
    p = federation.pretrain(**chosen, server_rate=1.0)
    pretraining.run(run, p, rows.append)
    model, head = pretrained.load(run / "03_pretrain" / "checkpoint")
    return dict(model.named_parameters())


def test_rounds_give_the_weights_of_plain_sums(tmp_path, narrow):
    rows: list[dict] = []
    of_plain: list[dict] = []
    plain = final(federation.make(tmp_path / "plain"), of_plain)
    hidden = final(federation.make(tmp_path / "hidden"), rows, secure_aggregation=True)
    assert not [row for row in rows if row["kind"] == "failure"]
    for name, value in plain.items():
        assert torch.allclose(value, hidden[name], atol=2e-6), name
    assert any(not torch.equal(value, hidden[name]) for name, value in plain.items())
    norms, expected = ([r["update_norm"] for r in of if r["kind"] == "client"] for of in (rows, of_plain))
    assert norms == pytest.approx(expected, rel=1e-4)


def test_private_rounds_of_too_few_for_a_sum_are_rounds_of_noise(tmp_path):
    """A cohort of 3 expected of 4 is often smaller; to draw again stopped for ever, and was not what epsilon counts."""
    rows: list[dict] = []
    private = {"privacy": "server", "privacy_seeded": True, "privacy_noise": 0.5, "cohort": 3}
    run = federation.make(tmp_path)
    final(run, rows, secure_aggregation=True, rounds=8, validate_every=8, **private)
    done = [row for row in rows if row["kind"] == "round"]
    drawn = [privacy.poisson_cohort(client_ids(run), 3, 0, number, 0) for number in range(1, 9)]
    assert min(map(len, drawn)) < privacy.SMALLEST_SUM <= max(map(len, drawn))
    assert [row["clients"] for row in done] == [len(c) if len(c) >= privacy.SMALLEST_SUM else 0 for c in drawn]
    assert not [row for row in rows if row["kind"] == "failure"]
    assert done[-1]["epsilon"] == accounting.epsilon([(3 / 4, 0.5, 8)], 1e-5)


def test_a_client_lost_after_its_key_costs_the_attempt_not_the_round(tmp_path, monkeypatch, narrow):
    rows: list[dict] = []
    run = federation.make(tmp_path)
    answer, lost = handlers.answer, []

    def lose_one(home, action, arrays, config):
        reply = answer(home, action, arrays, config)
        if action.endswith(".update") and not lost:
            lost.append(home.client)
            return Failure(home.client, "gone")
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(handlers, "answer", lose_one)
        weights = final(run, rows, secure_aggregation=True)
    failures = [row["client"] for row in rows if row["kind"] == "failure"]
    assert failures == [lost[0], ""]  # the client, then its cohort
    undisturbed = final(federation.make(tmp_path / "undisturbed"), [], secure_aggregation=True)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights.items())


def test_values_whose_sum_would_overflow_are_refused(tmp_path):
    peers = public_keys(tmp_path)
    with pytest.raises(ValueError, match="beyond the range"):
        secure.mask({"weight": torch.full((1,), 1.5)}, home(tmp_path, "client-0"), config(peers=peers), P)


def test_no_two_tensors_share_a_mask(tmp_path):
    tensors = {"a": torch.zeros(9), "b": torch.zeros(9)}
    sent = secure.mask(tensors, home(tmp_path, "client-0"), config(peers=public_keys(tmp_path)), P)
    assert not torch.equal(sent["a"], sent["b"])


def test_the_noise_of_clients_has_room():
    private = {"privacy": "client", "privacy_noise": 2.0}
    p = params.Pretrain(secure_aggregation=True, weighting="clients", cohort=4, **private)
    assert secure.scale(p, 1.0, 4) == pytest.approx(secure.scale(P, 1.0, 4) / (1 + 10 * 2.0 / 2))


@pytest.mark.parametrize("answering", ["ab", "abc"])
def test_two_keys_are_no_round_and_three_are_scaled_by_the_clip_of_the_message(answering, tmp_path):
    p = params.Pretrain(secure_aggregation=True, weighting="clients", cohort=4)
    key, _ = secure.keys(home(tmp_path, "client-0"), {}, config())
    server = SimpleNamespace(p=p, weights={"w": torch.zeros(2)}, ask=lambda *_: [Reply(one, key) for one in answering])
    hook, round = secure.Summing(server), SimpleNamespace(message={}, row={}, cohort=list("abc"), quorum=2, number=1)
    hook.message(round)
    round.message["clip"] = 0.25
    if answering == "ab":
        assert (round.asked, round.quorum, hook.collector(round)) == ([], 3, None), "repeated"
    else:
        assert hook.collector(round)._factor == secure.scale(p, 0.25, 3) != secure.scale(p, p.privacy_clip, 3)


def test_clients_keep_state_of_rounds_that_the_server_may_go_back_to(tmp_path):
    kept = home(tmp_path, "client-0")
    for number in (1, 2, 3):
        place = {"session": "s", "round": number, "durable": 1}
        client_state.save(kept, place, "moments", {"a": torch.full((1,), float(number))})
    assert set(client_state.saved(kept, {"session": "s"}, "moments")) == {1, 2, 3}
    assert client_state.load(kept, {"session": "s", "round": 2}, "moments")["a"] == 1
