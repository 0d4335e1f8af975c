"""Clipping, noise and the accountant, against identities and against Google's dp-accounting 0.6."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from fedhubert_lib import files, params, seeds, training
from fedhubert_lib.federated import accounting, noise, privacy
from fedhubert_lib.federated.protocol import ClientHome


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
    spent = accounting.epsilon([(cohort / clients, multiplier, rounds)], delta)
    assert reference - 1e-9 <= spent <= 1.05 * reference


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    once = accounting.epsilon([(0.1, 1.0, 1)], 1e-5)
    assert accounting.epsilon([], 1e-5) == 0
    assert accounting.epsilon([(0.1, 1.0, 2)], 1e-5) > once > accounting.epsilon([(0.1, 2.0, 1)], 1e-5)
    assert accounting.epsilon([(0.1, 1.0, 2)], 1e-5) == accounting.epsilon([(0.1, 1.0, 1), (0.1, 1.0, 1)], 1e-5)
    assert accounting.epsilon([(0.1, 1.0, 1), (0.1, 0.0, 1)], 1e-5) == math.inf


def test_clip_bounds_the_norm_and_keeps_the_direction():
    for scale in (1e-4, 1.0, 1e4):
        update, clipped = arrays(scale), arrays(scale)
        before = noise.clip(clipped, 0.5)
        assert before == pytest.approx(math.sqrt(sum(float(v.double().square().sum()) for v in update.values())))
        assert noise.norm(clipped) <= 0.5
        if before > 0.5:
            assert noise.norm(clipped) == pytest.approx(0.5, rel=1e-5)
            assert torch.allclose(clipped["a"] / clipped["a"][0, 0], update["a"] / update["a"][0, 0], rtol=1e-4)
        else:
            assert all(torch.equal(clipped[name], update[name]) for name in update)
    with pytest.raises(ValueError, match="NaN"):
        noise.clip({"a": torch.tensor([math.nan])}, 1.0)


def test_a_client_does_not_tell_by_its_learning_rate_how_many_steps_its_speech_makes():
    told = []
    for steps in (3, 8):
        p = parameters(privacy="client", privacy_noise=1.0, local_epochs=1, local_steps=10, rounds=4)
        measured = {"learning_rate": training.rate(p.learning_rate, p.warmup_fraction, 2 * steps - 1, 4 * steps)}
        config = {"clip": 0.5, "round": 2}
        update = SimpleNamespace(p=p, change=arrays(), config=config, home=home(), measured=measured)
        list(privacy.protected(update))
        told.append(update.measured)
    assert told[0] == told[1] == {"learning_rate": training.rate(p.learning_rate, p.warmup_fraction, 19, 40)}


def test_noise_is_normal_and_only_a_seed_repeats_it():
    values = noise.generator(None)(100_001)
    assert values.dtype == torch.float64 and values.shape == (100_001,)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(values, noise.generator(None)(100_001))
    generator = noise.generator(0, 1, "client-0")
    first, second = generator(3, 5), generator(3, 5)
    assert not torch.equal(first, second)
    assert torch.equal(first, noise.generator(0, 1, "client-0")(3, 5))
    assert not torch.equal(first, noise.generator(0, 2, "client-0")(3, 5))


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
    secret = [privacy.poisson_cohort(clients, 20, None, 3) for _ in range(200)]
    assert sum(map(len, secret)) / 200 == pytest.approx(20, abs=6 * math.sqrt(20 / 200))
    assert secret[0] != secret[1]


def parameters(**changes) -> params.Pretrain:
    return params.Pretrain(
        **{"privacy": "server", "weighting": "clients", "cohort": 16, "privacy_clip": 0.5, **changes}
    )


def home(name: str = "client-0", simulated: bool = True) -> ClientHome:
    nowhere = Path("nowhere")
    return ClientHome(name, data=nowhere, labels=nowhere, state=nowhere, simulated=simulated)


def release(p: params.Pretrain, answered: int = 16, number: int = 1) -> tuple[torch.Tensor, float]:
    """The update and the next bound of a round in which every client's true update is of norm 3 along one axis."""
    mean, within = {"a": torch.zeros(300, 300)}, 0.0
    for index in range(answered):
        update = {"a": torch.full((300, 300), 0.01)}
        within += privacy.protect(update, p, 0.5, home(f"client-{index}"), number).get("within_bound", 0.0)
        mean["a"] += update["a"] / answered
    return mean["a"], privacy.release(mean, p, 0.5, number, answered, within)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("where", ["server", "client"])
def test_a_round_sums_clipped_updates_and_adds_the_noise_of_the_multiplier(where, seeded):
    p = parameters(privacy=where, privacy_noise=2.0, privacy_seeded=seeded)
    mean, bound = release(p)
    # Each update is clipped from 3 to 0.5: 0.5 / 300 per value. Noise on the sum 2 x 0.5, on the mean a 16th of it.
    assert float(mean.mean()) == pytest.approx(0.5 / 300, abs=5 * 2 * 0.5 / 16 / 300)
    assert float(mean.std()) == pytest.approx(2 * 0.5 / 16, rel=0.03)
    assert bound == 0.5
    assert torch.equal(mean, release(p)[0]) == seeded
    assert not torch.equal(mean, release(p, number=2)[0])


@pytest.mark.parametrize("where", ["server", "client"])
def test_updates_get_more_noise_where_a_noisy_count_takes_part_of_the_privacy(where):
    p = parameters(privacy=where, privacy_noise=2.0, privacy_quantile=0.5)
    multiplier = (1 / 2**2 - 1 / (2 * 2) ** 2) ** -0.5  # 2.31: the count of sensitivity 1/2 has noise of 2
    assert float(release(p)[0].std()) == pytest.approx(multiplier * 0.5 / 16, rel=0.03)


def test_noise_that_a_seed_gives_is_not_what_is_added():
    """Neither the server nor a client, which all know the seed and every key, can take it away again."""
    p = parameters(privacy="client", privacy_noise=2.0)
    update = {"a": torch.zeros(300, 300)}
    privacy.protect(update, p, 0.5, home(), 1)
    for guess in (
        noise.generator(p.seed, 1, "client-0")(300, 300),
        torch.randn(300, 300, generator=seeds.torch_generator(p.seed, 1, "client-0", "privacy-noise", "a")),
    ):
        pair = torch.stack([guess.double().flatten(), update["a"].double().flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / 300


def test_a_client_of_a_real_federation_refuses_noise_from_a_seed():
    update = {"a": torch.zeros(3)}
    with pytest.raises(ValueError, match="refused outside of a simulation"):
        privacy.protect(update, parameters(privacy="client", privacy_seeded=True), 0.5, home(simulated=False), 1)


def test_the_mean_is_over_the_expected_cohort():
    quiet = parameters(privacy_noise=0.0)
    assert torch.allclose(release(quiet)[0], 4 * release(quiet, answered=4)[0])
    assert not release(quiet, answered=0)[0].any()


def test_one_client_more_changes_the_sum_by_no_more_than_its_bound_even_at_the_fewest():
    """With secure aggregation nobody is asked below three: the third client would bring in the two others' updates."""
    quiet = parameters(privacy_noise=0.0, secure_aggregation=True)
    sums = [release(quiet, answered=count if count > 2 else 0)[0] * 16 for count in range(8)]
    assert not sums[2].any() and sums[3].any()
    for fewer, more in itertools.pairwise(sums):
        assert float((more - fewer).norm()) <= 0.5 + 1e-6
    p = parameters(secure_aggregation=True, privacy_quantile=0.5, privacy_seeded=True)
    bounds = [privacy.release({"a": torch.zeros(1)}, p, 0.5, 1, count, count / 2) for count in (0, 3)]
    assert math.log(bounds[0] / bounds[1]) == pytest.approx(0.2 / 2 / 16), "nor the count of those within it by more"


@pytest.mark.parametrize("where", ["server", "client"])
def test_the_count_of_clients_within_the_bound_is_noised(where):
    p, bounds = parameters(privacy=where, privacy_quantile=0.5, privacy_seeded=True, cohort=4), []
    for number in range(150):
        homes = [home(f"client-{index}") for index in range(4)]
        within = sum(privacy.protect({"a": torch.zeros(1)}, p, 0.5, one, number)["within_bound"] for one in homes)
        bounds.append(privacy.release({"a": torch.zeros(1)}, p, 0.5, number, 4, within))
    moved, std = (torch.tensor(bounds) / 0.5).log(), 0.2 * privacy.count_std(p) / 4
    assert moved.mean() == pytest.approx(-0.2 * 0.5, abs=4 * std / 150**0.5)  # all were within it, half should be
    assert moved.std() == pytest.approx(std, rel=0.2)


def test_bound_and_updates_together_cost_what_the_multiplier_says():
    p = parameters(privacy_quantile=0.5, privacy_noise=0.3)
    # Two Gaussian releases of sensitivities 1 and 1/2 cost alpha/2 (1/z^2 + (1/2)^2/s^2) together.
    together = privacy.update_multiplier(p) ** -2 + 0.25 * privacy.count_std(p) ** -2
    assert together == pytest.approx(0.3**-2)


def test_clients_that_stay_away_are_half_within_the_bound():
    """Divided by the expected cohort, as the updates are: the number of answers is not to be told."""
    p = parameters(privacy_quantile=0.5, privacy_seeded=True)
    bounds = [privacy.release({"a": torch.zeros(1)}, p, 0.5, n, 4, -2.0) for n in range(100)]  # four, none within
    noise_std = 0.2 * privacy.count_std(p) / 16
    assert (torch.tensor(bounds) / 0.5).log().mean() == pytest.approx(0.2 * 2 / 16, abs=4 * noise_std / 10)


def test_a_trusted_server_clips_what_it_receives(tmp_path):
    server = SimpleNamespace(p=parameters(), out=tmp_path, state={}, plan={}, clients=None)
    received = privacy.Bounding(server).received(SimpleNamespace(payload={"a": torch.zeros(9)}), {"a": torch.ones(9)})
    assert noise.norm(received) == pytest.approx(0.5, rel=1e-5)


def spent(folder: Path, p: params.Pretrain, asked: list[list[str]]) -> float | None:
    """Epsilon after rounds of a federation of 64 clients that ask ``asked``."""
    clients = SimpleNamespace(ids=[f"client-{number}" for number in range(64)])
    server = SimpleNamespace(p=p, state={}, plan={}, metrics=frozenset(), out=folder, clients=clients)
    hook = privacy.Bounding(server)
    for number, cohort in enumerate(asked, 1):
        round = SimpleNamespace(number=number, attempt=0, message={}, asked=cohort)
        round.cohort = hook.draw(round)
        hook.message(round)
    return accounting.spent([folder / privacy.ACCOUNT], p.privacy_delta)


def test_a_trusted_servers_rounds_cost_what_the_sampled_gaussian_does(tmp_path):
    p = parameters(privacy_noise=2.0)
    assert spent(tmp_path, p, [["a"], [], ["b"]]) == accounting.epsilon([(16 / 64, 2.0, 3)], 1e-5)
    twice = accounting.spent([tmp_path / privacy.ACCOUNT] * 2, 1e-5)  # as teacher and student
    assert twice == accounting.epsilon([(16 / 64, 2.0, 6)], 1e-5)
    assert spent(tmp_path / "none", parameters(privacy_noise=0.0), [["a"]]) is None  # infinite


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_an_untrusted_server_knows_who_took_part_and_sees_each_update(tmp_path, quantile):
    """Without secure aggregation a client has its own noise alone, a quarter of a cohort of 16's; with it, that of all
    but of the client that looks. The epsilon is that of the client that took part most often."""
    p = parameters(privacy="client", privacy_noise=8.0, privacy_quantile=quantile)
    asked = [["a", *(f"{number}-{other}" for other in range(11))] for number in range(3)]
    alone = spent(tmp_path / "alone", p, asked)
    assert alone == pytest.approx(accounting.epsilon([(1.0, 8.0 / 4, 3)], 1e-5))
    hidden = spent(tmp_path / "hidden", p.model_copy(update={"secure_aggregation": True}), asked)
    if quantile == 0:
        assert hidden == pytest.approx(accounting.epsilon([(1.0, 8.0 * math.sqrt(11 / 16), 3)], 1e-5))
    assert hidden < alone  # with a quantile each still sends a noisy bit by itself


def test_no_draw_is_forgotten_but_one_that_a_seed_repeats(tmp_path):
    """A server killed after its noise was sent draws other noise for the same round: both have been seen."""
    for repeatable, draws in ((False, 4), (True, 2)):
        path = tmp_path / f"{repeatable}.jsonl"
        for number in (1, 2, 1, 2):  # killed after round 2
            row = {"round": number, "attempt": 0, "probability": 16 / 64, "multiplier": 1.0}
            accounting.charge(path, row, repeatable)
        assert accounting.spent([path], 1e-5) == accounting.epsilon([(16 / 64, 1.0, draws)], 1e-5)
        assert len(files.read_rows(path)) == draws
        assert accounting.spent([path], 1e-5, until=(1, 0)) == accounting.epsilon([(16 / 64, 1.0, draws // 2)], 1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weighting": "masked-frames"}, "privacy"),
        ({"server": "median"}, "privacy"),
        ({"privacy": "client", "compression": "int8"}, "compression"),
        ({"privacy_seeded": True, "engine": "deployment"}, "privacy_seeded"),
    ],
)
def test_combinations_without_a_guarantee_are_refused(changes, named):
    p = params.Pretrain.model_construct(**{**parameters().model_dump(), **changes})
    assert named in dict(p.conflicts())


def test_the_norm_that_is_followed_is_the_one_that_clips(tmp_path, monkeypatch):
    p = parameters(privacy_quantile=0.5, cohort=2)
    clients = SimpleNamespace(ids=list("abcd"))
    hook = privacy.Bounding(SimpleNamespace(p=p, out=tmp_path, state={}, plan={}, clients=clients, metrics={}))
    hook.server.state["clip"] = 0.25
    received = hook.received(SimpleNamespace(payload={"a": torch.zeros(9)}), {"a": torch.ones(9)})
    assert received["a"].norm() == pytest.approx(0.25, rel=1e-5)
    round = SimpleNamespace(message={}, number=1, attempt=0, clients=["a"], row={}, sums={"within_bound": 0.5})
    round.cohort = hook.draw(round)
    hook.message(round)
    assert round.message["clip"] == 0.25
    bounds: list[float] = []
    monkeypatch.setattr(privacy, "release", lambda update, p, bound, *more: bounds.append(bound) or 0.125)
    hook.step(round, {})
    assert bounds == [0.25] and hook.server.state["clip"] == 0.125


def test_what_was_beyond_the_bound_says_so_after_clipping():
    measured = privacy.protect({"a": torch.full((9,), 3.0)}, parameters(privacy_quantile=0.5), 0.5, home(), 1)
    assert measured == {"within_bound": -0.5, "update_norm": 9.0}


def test_each_attempt_at_a_round_is_charged(tmp_path):
    for attempt in (0, 1, 0):
        row = {"round": 1, "attempt": attempt, "probability": 0.25, "multiplier": 1.0}
        accounting.charge(tmp_path / "account", row, True)
    assert len(files.read_rows(tmp_path / "account")) == 2
