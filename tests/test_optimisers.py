"""Server optimisers against their references; collectors against numpy and scipy."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from federation import pretrain
from scipy import stats

from fedhubert_lib import params
from fedhubert_lib.federated import hooks, optimisers, robust


def updates(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a": (5, 7), "model.b": (3,), "head.c": (2, 3, 4)}
    return [{n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]


def trajectory(p, steps: list[dict[str, torch.Tensor]]) -> tuple[dict, dict]:
    """Weights and moments after ``steps``."""
    weights = {name: torch.ones_like(tensor) for name, tensor in steps[0].items()}
    moments = optimisers.moments(p, weights)
    for number, update in enumerate(steps, start=1):
        optimisers.step(p, number, weights, update, moments)
    return weights, moments


def test_every_server_has_a_function_and_default_rates():
    assert optimisers.OPTIMISERS.keys() == set(get_args(params.Optimiser))
    for server in optimisers.OPTIMISERS:
        pretrain(server=server, server_rate=None, local_state="reset")
    info = SimpleNamespace(data={"server": "fedlion"}, field_name="server_rate")
    with pytest.raises(ValueError, match="fedlion has no default; set one"):
        params._suited(None, info)
    assert params._suited(0.1, info) == 0.1


def test_a_new_server_begins_with_moments_of_0(monkeypatch):
    monkeypatch.setitem(optimisers.OPTIMISERS, "fedadamw", (optimisers.fedadam, ("first", "second", "third")))
    p = SimpleNamespace(server="fedadamw", server_tau=0.1)
    assert optimisers.moments(p, {"a": torch.ones(1)}) == {f"{kind}/a": 0 for kind in ("first", "second", "third")}


def test_what_changes_an_update_comes_before_what_protects_and_packs_it():
    order = [client.split(":")[0] for client, *_ in hooks.HOOKS if client]
    assert order[-3:] == ["privacy", "secure", "compression"]
    assert order.index("moments") < order.index("scaffold")
    undone = [server.split(":")[0] for server in hooks.AT_SERVER]
    assert undone[:3] == ["compression", "secure", "privacy"], "a server clips what it has decoded"


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
def test_a_server_optimiser_is_torchs_on_minus_the_update(changes, make, schedule):
    steps, chosen = updates(6), {"server_momentum": 0.9, "server_tau": 1e-3} | changes
    p = pretrain(server_rate=0.5, server_schedule=schedule, rounds=6, warmup_fraction=1 / 3, **chosen)
    weights, _ = trajectory(p, steps)
    rates = [0.25, 0.5, 0.5, 0.375, 0.25, 0.125] if schedule == "clients" else None  # up in 2 of 6, then down to 0
    for name, expected in reference(make, steps, rates).items():
        torch.testing.assert_close(weights[name], expected, rtol=2e-6, atol=2e-6)


def test_moments_are_those_of_adam():
    steps = updates(3)
    _, moments = trajectory(pretrain(server="fedadam", server_momentum=0.9), steps)
    for name in steps[0]:
        first = sum(0.1 * 0.9 ** (2 - i) * update[name] for i, update in enumerate(steps))
        torch.testing.assert_close(moments[f"first/{name}"], first)
        second = sum(0.01 * 0.99 ** (2 - i) * update[name].square() for i, update in enumerate(steps))
        torch.testing.assert_close(moments[f"second/{name}"], second)


@pytest.mark.parametrize("schedule", ["constant", "clients"])
def test_fedyogi_follows_reddi_et_al(schedule):
    steps = updates(6)
    settings = {"server": "fedyogi", "server_rate": 0.5, "server_momentum": 0.9, "server_tau": 1e-3}
    p = pretrain(**settings, server_schedule=schedule, rounds=6, warmup_fraction=0.0)
    weights, _ = trajectory(p, steps)
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


def test_fedadams_first_step_is_the_rate():
    """Stock Flower 1.41 corrects with t + 1: 0.74 of the rate."""
    weights, _ = trajectory(pretrain(server="fedadam", server_rate=0.1, server_tau=1e-9), updates(1))
    for weight in weights.values():
        torch.testing.assert_close((weight - 1).abs(), torch.full_like(weight, 0.1))


@pytest.mark.parametrize(
    "server", ["fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad", "scaffold", "median"]
)
def test_everything_stays_float32(server):
    """Stock Flower 1.41's FedAdam makes float64 of the weights from round 2 on."""
    weights, state = trajectory(pretrain(server=server), updates(3))
    assert {tensor.dtype for tensor in (weights | state).values()} == {torch.float32}


def test_the_running_mean_is_the_weighted_mean():
    steps, weights = updates(9), [3.0, 1000.0, 1.0, 7.0, 0.5, 20.0, 1e4, 2.0, 11.0]
    mean = optimisers.Collector()
    for update, weight in zip(steps, weights, strict=True):
        mean.add({name: tensor.clone() for name, tensor in update.items()}, weight)
    for name, tensor in mean.result().items():
        stacked = np.stack([update[name].double().numpy() for update in steps])
        np.testing.assert_allclose(tensor.numpy(), np.average(stacked, axis=0, weights=weights), rtol=1e-5, atol=1e-7)


def test_trimmed_mean_leaves_out_the_whole_number_that_a_fraction_is():
    trimmed = robust.Sorted(0.29)  # times 100 it is 28.999 in floating point
    for number in range(100):
        trimmed.add({"w": torch.tensor([float(number < 29) * 1e6])}, 1.0)
    assert trimmed.result()["w"] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_median_and_trimmed_mean(count):
    steps = updates(count)
    median, trimmed = robust.Sorted(0.5), robust.Sorted(0.3)
    for update in steps:
        median.add(update, 1.0)
        trimmed.add(update, 1.0)
    fraction = max(0.3, 1 / count) if count > 2 else 0
    for name, values in median.result().items():
        np.testing.assert_allclose(values.numpy(), np.median([u[name].numpy() for u in steps], 0), rtol=1e-6)
    for name, values in trimmed.result().items():
        expected = stats.trim_mean(np.stack([u[name].numpy() for u in steps]), fraction + 1e-9, 0)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_one_hostile_client_does_not_move_the_median():
    honest, hostile = updates(4), {name: torch.full_like(t, 1e6) for name, t in updates(1)[0].items()}
    collector = robust.Sorted(0.5)
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


def test_fedadagrad_with_momentum_adds_squares_up():
    steps = updates(6)
    p = pretrain(server="fedadagrad", server_rate=0.5, server_momentum=0.9, server_tau=1e-3)
    weights, _ = trajectory(p, steps)
    for name, end in weights.items():
        x = np.ones(end.shape)
        first, second = np.zeros_like(x), np.full_like(x, 1e-6)
        for update in steps:
            change = update[name].double().numpy()
            first, second = 0.9 * first + 0.1 * change, second + change**2
            x = x + 0.5 * first / (np.sqrt(second) + 1e-3)
        np.testing.assert_allclose(end.numpy(), x, rtol=1e-5, atol=1e-6)
