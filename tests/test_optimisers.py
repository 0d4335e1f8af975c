"""Server optimisers against their references; collectors against numpy and scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import pretrain
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import stats

from fedhubert_lib import training
from fedhubert_lib.federated import local, optimisers


def updates(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a": (5, 7), "model.b": (3,), "head.c": (2, 3, 4)}
    return [{n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]


def trajectory(p, steps: list[dict[str, torch.Tensor]], folder: Path) -> tuple[dict, dict]:
    """Weights after ``steps``, and the moments in the file of the last."""
    weights = {name: torch.ones_like(tensor) for name, tensor in steps[0].items()}
    moments = optimisers.Moments(p, None, weights)
    for number, update in enumerate(steps, start=1):
        moments.step(weights, update, number)
        file = folder / f"{number}.safetensors"
        moments.write(file, update, number)
        moments = optimisers.Moments(p, file, weights)
    return weights, load_file(file)


def reference(make, steps: list[dict[str, torch.Tensor]], rates: list[float] | None = None) -> dict[str, torch.Tensor]:
    """A torch optimiser that takes minus the update as its gradient, at ``rates`` where given."""
    weights = {name: torch.nn.Parameter(torch.ones_like(tensor)) for name, tensor in steps[0].items()}
    optimiser = make(list(weights.values()))
    for number, update in enumerate(steps):
        for name, weight in weights.items():
            weight.grad = -update[name]
        if rates:
            optimiser.param_groups[0]["lr"] = rates[number]
        optimiser.step()
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"server": "fedavg"}, lambda w: torch.optim.SGD(w, lr=0.5)),
        ({"server": "scaffold"}, lambda w: torch.optim.SGD(w, lr=0.5)),
        ({"server": "fedavgm"}, lambda w: torch.optim.SGD(w, lr=0.5, momentum=0.9)),
        ({"server": "nesterov"}, lambda w: torch.optim.SGD(w, lr=0.5, momentum=0.9, nesterov=True)),
        ({"server": "fedadam"}, lambda w: torch.optim.Adam(w, lr=0.5, betas=(0.9, 0.99), eps=1e-3)),
        (
            {"server": "fedadagrad", "server_momentum": 0.0},
            lambda w: torch.optim.Adagrad(w, lr=0.5, initial_accumulator_value=1e-6, eps=1e-3),
        ),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "clients"])
def test_a_server_optimiser_is_torchs_on_minus_the_update(changes, make, schedule, tmp_path):
    steps, p = updates(6), pretrain(server_rate=0.5, server_schedule=schedule, rounds=6, warmup_share=1 / 3, **changes)
    weights, _ = trajectory(p, steps, tmp_path)
    rates = [0.25, 0.5, 0.5, 0.375, 0.25, 0.125] if schedule == "clients" else None  # up in 2 of 6, then down to 0
    for name, expected in reference(make, steps, rates).items():
        torch.testing.assert_close(weights[name], expected, rtol=2e-6, atol=2e-6)


def test_the_servers_schedule_is_that_of_a_client_with_one_step_in_a_round():
    p = pretrain(server_rate=0.5, server_schedule="clients", rounds=40, learning_rate=1e-3)
    clients = [training.rate(local.settings(p, p.rounds), step, p.rounds) for step in range(p.rounds)]
    assert [optimisers.rate(p, number) / 0.5 for number in range(1, 41)] == pytest.approx([r / 1e-3 for r in clients])


def test_moments_are_the_same_in_blocks_of_any_size(tmp_path, monkeypatch):
    """And the file holds what torch's Adam holds."""
    steps, p = updates(3), pretrain(server="fedadam")
    whole = trajectory(p, steps, tmp_path)
    monkeypatch.setattr(optimisers, "BLOCK", 4)
    blocks = trajectory(p, steps, tmp_path)
    for one, other in zip(whole, blocks, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name in steps[0]:
        first = sum(0.1 * 0.9 ** (2 - i) * update[name] for i, update in enumerate(steps))
        torch.testing.assert_close(whole[1][f"first/{name}"], first)
        second = sum(0.01 * 0.99 ** (2 - i) * update[name].square() for i, update in enumerate(steps))
        torch.testing.assert_close(whole[1][f"second/{name}"], second)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (b"first/", b"fourth", "does not hold first and second moments"),
        (b"F32", b"I32", "other moments than float32"),
        (b"F32", b"F16", "header"),
        (b"[0, ", b"[4, ", "header"),
        (b'{"__metadata__"', b'["__metadata__"', "header"),
    ],
)
def test_moments_of_another_model_or_damaged_ones_are_refused(before, after, told, tmp_path):
    p, update = pretrain(server="fedadam"), updates(1)[0]
    file = tmp_path / "server.safetensors"
    optimisers.Moments(p, None, update).write(file, update, 1)
    assert optimisers.Moments(p, file, update).names
    whole = file.read_bytes()
    for content, why in (whole.replace(before, after, 1), told), (whole[:-4], "header"), (whole + b"0", "header"):
        file.write_bytes(content)
        with pytest.raises((ValueError, SafetensorError), match=why):
            optimisers.Moments(p, file, update)


@pytest.mark.parametrize("schedule", ["constant", "clients"])
def test_fedyogi_follows_reddi_et_al(schedule, tmp_path):
    steps = updates(6)
    p = pretrain(server="fedyogi", server_rate=0.5, server_schedule=schedule, rounds=6, warmup_share=0.0)
    weights, _ = trajectory(p, steps, tmp_path)
    for name in weights:
        x = np.ones(weights[name].shape)
        m, v = np.zeros_like(x), np.full_like(x, 1e-6)
        for done, update in enumerate(steps):
            d = update[name].double().numpy()
            m = 0.9 * m + 0.1 * d
            v = v - 0.01 * d**2 * np.sign(v - d**2)
            rate = 0.5 if schedule == "constant" else 0.5 * (6 - done) / 6
            x = x + rate * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(weights[name].numpy(), x, rtol=1e-5, atol=1e-6)


def test_fedadams_first_step_is_the_rate(tmp_path):
    """Stock Flower 1.41 corrects with t + 1: 0.74 of the rate."""
    weights, _ = trajectory(pretrain(server="fedadam", server_rate=0.1, server_tau=1e-9), updates(1), tmp_path)
    for weight in weights.values():
        torch.testing.assert_close((weight - 1).abs(), torch.full_like(weight, 0.1))


@pytest.mark.parametrize(
    "server", ["fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad", "scaffold", "median"]
)
def test_everything_stays_float32(server, tmp_path):
    """Stock Flower 1.41's FedAdam makes float64 of the weights from round 2 on."""
    weights, state = trajectory(pretrain(server=server), updates(3), tmp_path)
    assert {tensor.dtype for tensor in (weights | state).values()} == {torch.float32}


def test_the_running_mean_is_the_weighted_mean():
    steps, weights = updates(9), [3.0, 1000.0, 1.0, 7.0, 0.5, 20.0, 1e4, 2.0, 11.0]
    mean = optimisers.Mean()
    for update, weight in zip(steps, weights, strict=True):
        mean.add({name: tensor.clone() for name, tensor in update.items()}, weight)
    for name, tensor in mean.result().items():
        stacked = np.stack([update[name].double().numpy() for update in steps])
        np.testing.assert_allclose(tensor.numpy(), np.average(stacked, axis=0, weights=weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_median_and_trimmed_mean(count, tmp_path, monkeypatch):
    monkeypatch.setattr(optimisers, "STRETCH", 8)  # several stretches even here
    steps = updates(count)
    median = optimisers.collector(pretrain(server="median"), tmp_path / "updates")
    trimmed = optimisers.collector(pretrain(server="trimmed-mean", server_trim=0.3, cohort=3), tmp_path / "others")
    for update in steps:
        median.add(update, 1.0)
        trimmed.add(update, 1.0)
    share = max(0.3, 1 / count) if count > 2 else 0
    for name, values in median.result().items():
        np.testing.assert_allclose(values.numpy(), np.median([u[name].numpy() for u in steps], 0), rtol=1e-6)
    for name, values in trimmed.result().items():
        expected = stats.trim_mean(np.stack([u[name].numpy() for u in steps]), share + 1e-9, 0)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert not list(tmp_path.iterdir())  # nothing stays on disk


def test_one_hostile_client_does_not_move_the_median(tmp_path):
    honest, hostile = updates(4), {name: torch.full_like(t, 1e6) for name, t in updates(1)[0].items()}
    collector = optimisers.collector(pretrain(server="median"), tmp_path / "updates")
    for update in [*honest, hostile]:
        collector.add(update, 1.0)
    for name, values in collector.result().items():
        assert values.abs().max() <= max(update[name].abs().max() for update in honest)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u: u.pop("head.c"), "lacks .'head.c'."),
        (lambda u: u.update(extra=torch.zeros(1)), "has .'extra'."),
        (lambda u: u.update({"model.b": torch.zeros(4)}), r"model.b of the update is torch.float32 \(4,\)"),
        (lambda u: u.update({"model.b": u["model.b"].double()}), "model.b of the update is torch.float64"),
        (lambda u: u["model.a"][0].fill_(float("nan")), "NaN or an infinity"),
        (lambda u: u["model.a"][0].fill_(float("inf")), "NaN or an infinity"),
    ],
)
def test_an_update_that_does_not_fit_is_named(spoil, message):
    like, update = updates(2)
    together = torch.cat([tensor.flatten() for tensor in like.values()])
    assert optimisers.checked_norm(like, like) == pytest.approx(together.norm().item())
    spoil(update)
    with pytest.raises(optimisers.UpdateError, match=message):
        optimisers.checked_norm(update, like)


def test_moments_of_layers_that_layerdrop_left_out_of_every_step_can_be_saved(tmp_path):
    """safetensors refuses tensors that share memory; the client would be left out of the round."""
    module = torch.nn.Linear(3, 2)
    names = dict(module.named_parameters())
    kept = local.moments(torch.optim.AdamW(module.parameters()), names)
    save_file(kept, tmp_path / "moments.safetensors")
    assert {name: tensor.any().item() for name, tensor in load_file(tmp_path / "moments.safetensors").items()} == {
        f"{name}/{key}": False for name in names for key in ("exp_avg", "exp_avg_sq", "step")
    }
