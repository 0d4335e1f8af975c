"""Cheap measures and intervals: exact on cases with a known answer, blind to what they must not see."""

import subprocess
from pathlib import Path

import fastabx_score
import numpy as np
import pytest
import torch
from scipy import stats

from fedhubert_lib.evaluation import intervals, layers, probes


def clips(words=5, speakers=6, takes=6, width=16, noise=0.3, seed=0):
    """Rows that are word + speaker + noise, so that every probe has something to find."""
    rng = np.random.default_rng(seed)
    word = np.repeat(np.arange(words), speakers * takes)
    speaker = np.tile(np.repeat(np.arange(speakers), takes), words)
    rows = rng.normal(size=(words, width))[word] + rng.normal(size=(speakers, width))[speaker]
    return (rows + noise * rng.normal(size=rows.shape)).astype(np.float32), word, np.array([f"s{i}" for i in speaker])


def test_interval_is_students():
    values = [0.61, 0.64, 0.60]
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    measured = intervals.measure(values)
    assert (measured.low, measured.high) == pytest.approx(expected) and measured.values == values
    assert intervals.measure([0.5])[:3] == (0.5, None, None) == (0.5, *intervals.measure([0.1 + 0.2, 0.3])[1:3])
    with pytest.raises(ValueError, match="finite"):
        intervals.measure([0.5, float("nan")])


def test_nearest_is_a_majority_and_breaks_ties_by_nearness():
    angle = np.radians([0, 1, 10, 11, 12, 2])  # the last row is tested
    rows = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 1, 1])
    train, test = np.arange(5), np.array([5])
    assert probes.nearest(rows, labels, train, test, neighbours=5) == 1
    assert probes.nearest(rows, labels, train, test, neighbours=4) == 0


def test_leave_speakers_out_is_harder_than_known_speakers():
    rng = np.random.default_rng(1)
    word, speaker = np.repeat(np.arange(4), 60), np.tile(np.repeat(np.arange(6), 10), 4)
    # Each speaker has a way of saying each word: known voices are easy, new ones hard.
    rows = (rng.normal(size=(4, 6, 40))[word, speaker] + 0.1 * rng.normal(size=(240, 40))).astype(np.float32)
    order = rng.permutation(240)
    assert probes.ridge(rows[order[:180]], word[order[:180]]).score(rows[order[180:]], word[order[180:]]) > 0.95
    accuracy, commonest = probes.leave_speakers_out(rows, word, speaker.astype(str), seed=0)
    assert accuracy < 0.6 and commonest == 0.25


def test_leave_speakers_out_never_sees_the_voices_it_is_tested_on():
    """Rows that identify the speaker, and labels that each speaker has alone: nothing to learn from the others."""
    rows, _, speakers = clips(noise=0.1)
    labels = np.unique(speakers, return_inverse=True)[1]
    assert probes.leave_speakers_out(rows, labels, speakers, seed=0, folds=3) == (0.0, 0.0)
    with pytest.raises(probes.TooFewClipsError, match="at least two speakers"):
        probes.leave_speakers_out(rows, labels, np.full(len(rows), "one"), seed=0)


def test_speaker_probe_finds_the_voice_and_not_noise():
    rows, _, speakers = clips()
    accuracy, chance = probes.speaker_accuracy(rows, speakers, seed=0)
    assert chance == pytest.approx(1 / 6)
    assert accuracy > 0.9
    noise = np.random.default_rng(0).normal(size=(len(rows), 400)).astype(np.float32)  # clips can be learned by heart
    assert probes.speaker_accuracy(noise, speakers, seed=0)[0] < 0.4


def test_units_weigh_dimensions_alike():
    """Phones are told apart by a dimension a thousandth as wide as another, of noise."""
    rng, phones = np.random.default_rng(0), np.arange(200) % 2
    rows = np.stack([1e-2 * (phones + 0.05 * rng.normal(size=200)), 10 * rng.normal(size=200)], 1).astype(np.float32)
    assert layers.unit_quality(rows, phones, clusters=2, seed=0)["pnmi"] > 0.9


def test_abx_is_zero_for_words_apart_and_half_for_noise():
    rng = np.random.default_rng(0)
    _, labels, speakers = clips(takes=2)
    noise = rng.normal(size=(len(labels), 12, 8))
    assert probes.abx_error(rng.normal(size=(5, 12, 8))[labels] + 0.05 * noise, labels, speakers) == 0
    assert 0.4 < probes.abx_error(noise, labels, speakers) < 0.6
    assert probes.abx_error(np.ones_like(noise), labels, speakers) == 0.5  # all ties
    with pytest.raises(probes.TooFewClipsError, match="ABX"):
        probes.abx_error(noise, labels, np.full(len(labels), "one"))


def test_abx_is_that_of_fastabx():
    """Words that some speakers miss and others repeat, so that another order of averaging gives another figure.

    ``fastabx_score.py`` says how the expected figure was made; with `make fastabx` it is made anew.
    """
    assert probes.abx_error(*fastabx_score.items()) == pytest.approx(fastabx_score.SCORE, abs=1e-6)


@pytest.mark.slow
def test_recorded_figure_is_what_fastabx_gives():
    python = Path(__file__).parents[1] / ".venv-fastabx" / "bin" / "python"
    if not python.exists():
        pytest.skip("fastabx needs Python 3.12 and an environment of its own: make fastabx")
    done = subprocess.run([python, fastabx_score.__file__], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(fastabx_score.SCORE, abs=1e-6)


def test_warping_is_that_of_a_plain_implementation():
    rng = np.random.default_rng(0)
    left, right = (torch.tensor(rng.normal(size=(6, 4)), dtype=torch.float32) for _ in range(2))
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (left, right)]
    angle = torch.arccos(unit[0] @ unit[1].T).numpy() / np.pi
    table = {}

    def best(i, j):  # (cost, steps), as the recursion is written in a textbook
        if (i, j) not in table:
            ways = [best(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
            cost, steps = min(ways, key=lambda way: way[0]) if ways else (0, 0)
            table[i, j] = cost + angle[i, j], steps + 1
        return table[i, j]

    cost, steps = best(5, 5)
    assert probes._warped(unit[0], unit[1][None])[0] == pytest.approx(cost / steps, rel=1e-5)

    # A sequence played slower is no further away.
    slow = unit[0].repeat_interleave(2, 0)[:6]
    assert probes._warped(unit[0][:3], slow[None])[0] == pytest.approx(0, abs=1e-3)


def test_every_measure_draws_by_its_seed():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(200, 8)).astype(np.float32), rng.integers(4, size=200)
    speakers = rng.integers(20, size=200).astype(str)
    assert len({probes.leave_speakers_out(rows, labels, speakers, seed=seed)[0] for seed in range(4)}) > 1
    assert len({probes.speaker_accuracy(rows, speakers, seed=seed)[0] for seed in range(4)}) > 1
    assert len({layers.unit_quality(rows, labels, clusters=100, seed=seed)["pnmi"] for seed in range(3)}) > 1


def test_neighbours_are_near_by_angle():
    angle = np.radians([0, 1, 10, 11, 12, 2])
    rows = np.stack([np.cos(angle), np.sin(angle)], 1) * np.array([9, 9, 1, 1, 1, 1])[:, None]
    labels = np.array([0, 0, 1, 1, 1, 1])
    assert probes.nearest(rows.astype(np.float32), labels, np.arange(5), np.array([5]), neighbours=4) == 0


def test_ridge_is_that_of_the_normal_equations():
    rows, labels, _ = clips(noise=2.0)
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[:120], order[120:]
    mean, std = rows[train].mean(0), rows[train].std(0)
    x, targets = (rows[train].astype(float) - mean) / std, np.eye(5)[labels[train]]
    weights = np.linalg.solve(x.T @ x + 1e-2 * len(train) * np.eye(x.shape[1]), x.T @ (targets - targets.mean(0)))
    scores = (rows[test] - mean) / std @ weights + targets.mean(0)
    fitted = probes.ridge(rows[train], labels[train])
    np.testing.assert_allclose(fitted.decision_function(rows[test]), 2 * scores - 1, atol=1e-4)
