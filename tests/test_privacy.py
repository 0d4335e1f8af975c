"""Clipping, noise and the accountant, against identities and against Google's dp-accounting 0.6."""

import math

import pytest
import torch

from fedhubert_lib import privacy, seeds


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
    spent = privacy.epsilon([(cohort / clients, multiplier)] * rounds, delta)
    assert reference - 1e-9 <= spent <= 1.05 * reference


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    once = privacy.epsilon([(0.1, 1.0)], 1e-5)
    assert privacy.epsilon([], 1e-5) == 0
    assert privacy.epsilon([(0.1, 1.0)] * 2, 1e-5) > once > privacy.epsilon([(0.1, 2.0)], 1e-5)
    assert privacy.epsilon([(0.1, 1.0), (0.1, 0.0)], 1e-5) == math.inf
    # The order of rounds does not matter.
    assert privacy.epsilon([(0.1, 1.0), (0.2, 3.0)], 1e-5) == privacy.epsilon([(0.2, 3.0), (0.1, 1.0)], 1e-5)


def test_clip_bounds_the_norm_and_keeps_the_direction():
    for scale in (1e-4, 1.0, 1e4):
        update = arrays(scale)
        clipped, before = privacy.clip(update, 0.5)
        assert before == pytest.approx(math.sqrt(sum(float(v.double().square().sum()) for v in update.values())))
        assert privacy.norm(clipped) <= 0.5
        if before > 0.5:
            assert privacy.norm(clipped) == pytest.approx(0.5, rel=1e-5)
            assert torch.allclose(clipped["a"] / clipped["a"][0, 0], update["a"] / update["a"][0, 0], rtol=1e-4)
        else:
            assert all(torch.equal(clipped[name], update[name]) for name in update)
    with pytest.raises(ValueError, match="NaN"):
        privacy.clip({"a": torch.tensor([math.nan])}, 1.0)


def test_noise_has_the_deviation_asked_for_and_its_own_draw_per_key():
    zeros = {"a": torch.zeros(200, 500), "b": torch.zeros(200, 500)}
    noisy = privacy.add_noise(zeros, 0.25, 0, 3)
    for name in zeros:
        assert float(noisy[name].mean()) == pytest.approx(0, abs=0.25 * 4 / math.sqrt(100_000))
        assert float(noisy[name].std()) == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(noisy["a"], noisy["b"])
    assert torch.equal(noisy["a"], privacy.add_noise(zeros, 0.25, 0, 3)["a"])
    assert not torch.equal(noisy["a"], privacy.add_noise(zeros, 0.25, 0, 4)["a"])
    # Noise split over m clients sums to noise of sqrt(m) times its deviation.
    total = sum(privacy.add_noise(zeros, 0.25, 0, 3, f"client-{i}")["a"] for i in range(16))
    assert float(total.std()) == pytest.approx(1.0, rel=0.02)


def test_adaptive_clipping_finds_the_quantile():
    norms = seeds.numpy_generator(0, "norms").lognormal(mean=1.0, sigma=0.7, size=500)
    bound = 0.01
    for _ in range(200):
        bound = privacy.adapt(bound, float((norms <= bound).mean()), 0.8)
    assert (norms <= bound).mean() == pytest.approx(0.8, abs=0.02)


def test_split_noise_composes_to_the_multiplier():
    for_updates = privacy.split_noise(1.0, 5.0)
    # Two Gaussian releases of sensitivities 1 and 1/2 cost alpha/2 (1/z^2 + (1/2)^2/s^2) together.
    assert for_updates**-2 + 0.25 * 5.0**-2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match="too little"):
        privacy.split_noise(10.0, 5.0)


def test_poisson_cohort_is_seeded_and_of_the_expected_size():
    clients = [f"client-{i:04d}" for i in range(2338)]
    cohorts = [privacy.poisson_cohort(clients, 20, 0, round) for round in range(200)]
    sizes = torch.tensor([len(cohort) for cohort in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(20, abs=4 * math.sqrt(20 / 200))
    assert float(sizes.var()) == pytest.approx(20, rel=0.4)
    assert cohorts[3] == privacy.poisson_cohort(clients[::-1], 20, 0, 3) != cohorts[4]
    with pytest.raises(ValueError, match="cohort"):
        privacy.poisson_cohort(clients, 3000, 0, 1)
