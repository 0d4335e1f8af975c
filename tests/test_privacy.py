"""Clipping, noise and the accountant, against identities and against Google's dp-accounting 0.6."""

import math

import pytest
import torch
from scipy import stats

from fedhubert_lib import params, privacy, seeds


def arrays(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = seeds.torch_generator(0, "privacy-test")
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in {"a": (40, 30), "b": (7,)}.items()}


@pytest.mark.parametrize(
    ("clients", "cohort", "multiplier", "rounds", "delta", "reference"),
    [
        (2338, 20, 1.0, 100, 1e-5, 1.1306660436600926),
        (2338, 20, 0.6, 1000, 1e-5, 7.667905784957252),
        (100, 100, 2.0, 50, 1e-6, 23.70389051398901),
        (251, 16, 1.0, 300, 1e-5, 8.357823152447605),
        (4, 4, 5.0, 2, 1e-5, 1.1581505950444586),
    ],
)
def test_epsilon_is_that_of_dp_accounting(clients, cohort, multiplier, rounds, delta, reference):
    spent = privacy.epsilon([(cohort / clients, multiplier, rounds)], delta)
    assert reference - 1e-9 <= spent <= 1.05 * reference


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    once = privacy.epsilon([(0.1, 1.0, 1)], 1e-5)
    assert privacy.epsilon([], 1e-5) == 0
    assert privacy.epsilon([(0.1, 1.0, 2)], 1e-5) > once > privacy.epsilon([(0.1, 2.0, 1)], 1e-5)
    assert privacy.epsilon([(0.1, 1.0, 2)], 1e-5) == privacy.epsilon([(0.1, 1.0, 1), (0.1, 1.0, 1)], 1e-5)
    assert privacy.epsilon([(0.1, 1.0, 1), (0.1, 0.0, 1)], 1e-5) == math.inf


def test_clip_bounds_the_norm_and_keeps_the_direction():
    for scale in (1e-4, 1.0, 1e4):
        update, clipped = arrays(scale), arrays(scale)
        before = privacy.clip(clipped, 0.5)
        assert before == pytest.approx(math.sqrt(sum(float(v.double().square().sum()) for v in update.values())))
        assert privacy.norm(clipped) <= 0.5
        if before > 0.5:
            assert privacy.norm(clipped) == pytest.approx(0.5, rel=1e-5)
            assert torch.allclose(clipped["a"] / clipped["a"][0, 0], update["a"] / update["a"][0, 0], rtol=1e-4)
        else:
            assert all(torch.equal(clipped[name], update[name]) for name in update)
    with pytest.raises(ValueError, match="NaN"):
        privacy.clip({"a": torch.tensor([math.nan])}, 1.0)


def test_noise_is_normal_and_only_a_seed_repeats_it():
    values = privacy.noise(None)(100_001)
    assert values.dtype == torch.float64 and values.shape == (100_001,)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(values, privacy.noise(None)(100_001))
    generator = privacy.noise(0, 1, "client-0")
    first, second = generator(3, 5), generator(3, 5)
    assert not torch.equal(first, second)
    assert torch.equal(first, privacy.noise(0, 1, "client-0")(3, 5))
    assert not torch.equal(first, privacy.noise(0, 2, "client-0")(3, 5))


def noise(*keys) -> dict[str, torch.Tensor]:
    values = {"a": torch.zeros(200, 500), "b": torch.zeros(200, 500)}
    privacy.add_noise(values, 0.25, 0, *keys)
    return values


def test_noise_has_the_deviation_asked_for_and_its_own_draw_per_key():
    drawn = noise(3)
    for value in drawn.values():
        assert float(value.mean()) == pytest.approx(0, abs=0.25 * 4 / math.sqrt(100_000))
        assert float(value.std()) == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(drawn["a"], drawn["b"])
    assert torch.equal(drawn["a"], noise(3)["a"])
    assert not torch.equal(drawn["a"], noise(4)["a"])


def test_adaptive_clipping_finds_the_quantile():
    norms = seeds.numpy_generator(0, "norms").lognormal(mean=1.0, sigma=0.7, size=500)
    bound = 0.01
    for _ in range(200):
        bound = privacy.adapt(bound, float((norms <= bound).mean()), 0.8)
    assert (norms <= bound).mean() == pytest.approx(0.8, abs=0.02)


def test_poisson_cohort_is_seeded_and_of_the_expected_size():
    clients = [f"client-{i:04d}" for i in range(2338)]
    cohorts = [privacy.poisson_cohort(clients, 20, 0, round) for round in range(200)]
    sizes = torch.tensor([len(cohort) for cohort in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(20, abs=4 * math.sqrt(20 / 200))
    assert float(sizes.var()) == pytest.approx(20, rel=0.4)
    assert cohorts[3] == privacy.poisson_cohort(clients[::-1], 20, 0, 3) != cohorts[4]
    with pytest.raises(ValueError, match="cohort"):
        privacy.poisson_cohort(clients, 3000, 0, 1)


def parameters(**changes) -> params.Pretrain:
    return params.Pretrain(
        **{"privacy": "server", "weighting": "clients", "cohort": 16, "privacy_clip": 0.5, **changes}
    )


def release(p: params.Pretrain, clients: int = 64, answered: int = 16, number: int = 1) -> tuple[dict, dict, dict]:
    """A round in which every client's true update is of norm 3 along the same axis, and no validation."""
    state, mean, within = privacy.initial_state(p), None, []
    for index in range(answered):
        update = {"a": torch.full((300, 300), 0.01)}
        within.append(privacy.protect(update, p, state["bound"], f"client-{index}", number)["within_bound"])
        mean = update if mean is None else {"a": mean["a"] + update["a"]}
    mean = {"a": mean["a"] / answered}
    return mean, state, privacy.release(mean, p, state, clients, number, within)


@pytest.mark.parametrize("where", ["server", "client"])
def test_a_round_sums_clipped_updates_and_adds_the_noise_of_the_multiplier(where):
    mean, _, row = release(parameters(privacy=where, privacy_noise=2.0))
    # Each update is clipped from 3 to 0.5: 0.5 / 300 per value. Noise on the sum 2 x 0.5, on the mean a 16th of it.
    assert float(mean["a"].mean()) == pytest.approx(0.5 / 300, abs=4 * 2 * 0.5 / 16 / 300)
    assert float(mean["a"].std()) == pytest.approx(2 * 0.5 / 16, rel=0.02)
    assert row["clip"] == 0.5
    hidden_by = 2.0 if where == "server" else 2.0 * math.sqrt(15 / 16)
    assert row["epsilon"] == privacy.epsilon([(16 / 64, hidden_by, 1)], 1e-5)


def test_the_mean_is_over_the_expected_cohort():
    quiet = parameters(privacy_noise=0.0)
    full, few = release(quiet)[0], release(quiet, answered=4)[0]
    assert torch.allclose(full["a"], 4 * few["a"])
    assert release(quiet)[2]["epsilon"] is None  # infinite


def test_a_lone_client_has_nobody_to_hide_behind():
    assert release(parameters(privacy="client"), answered=1)[2]["epsilon"] is None


@pytest.mark.parametrize("where", ["server", "client"])
def test_adaptive_clipping_moves_the_bound_and_costs_no_more(where):
    p = parameters(privacy=where, privacy_quantile=0.5, privacy_noise=0.3)
    _, state, row = release(p)
    assert state["bound"] > 0.5  # nobody was within it
    assert row["clip"] == 0.5
    # Two Gaussian releases of sensitivities 1 and 1/2 cost alpha/2 (1/z^2 + (1/2)^2/s^2) together.
    together = privacy.update_multiplier(p) ** -2 + 0.25 * privacy.count_deviation(p) ** -2
    assert together == pytest.approx(0.3**-2)
    fixed = release(parameters(privacy=where, privacy_noise=0.3))[2]
    assert row["epsilon"] == fixed["epsilon"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weighting": "masked-frames"}, "weighting"),
        ({"server": "median"}, "median"),
        ({"privacy": "client", "compression": "int8"}, "exact sum"),
    ],
)
def test_combinations_without_a_guarantee_are_refused(changes, named):
    p = params.Pretrain.model_construct(**{**parameters().model_dump(), **changes})
    assert any(named in message for _, message in p.conflicts())
