"""Cheap measures: exact on cases with a known answer, and blind to nothing they should see."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from fedhubert_lib import seeds
from fedhubert_lib.evaluation import intervals, probes


def clips(words=5, speakers=6, takes=6, width=16, noise=0.3, seed=0):
    """Rows that are word + speaker + noise, so that every probe has something to find."""
    rng = np.random.default_rng(seed)
    word = np.repeat(np.arange(words), speakers * takes)
    speaker = np.tile(np.repeat(np.arange(speakers), takes), words)
    rows = rng.normal(size=(words, width))[word] + rng.normal(size=(speakers, width))[speaker]
    return (rows + noise * rng.normal(size=rows.shape)).astype(np.float32), word, np.array([f"s{i}" for i in speaker])


def test_interval_is_students():
    values = [0.61, 0.64, 0.60]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    measured = intervals.measure(values)
    assert measured.mean - measured.interval == pytest.approx(low)
    assert measured.mean + measured.interval == pytest.approx(high)
    assert intervals.measure([0.5]).interval is None
    with pytest.raises(ValueError, match="finite"):
        intervals.measure([0.5, float("nan")])


def test_nearest_neighbour_agrees_with_scikit_learn():
    rows, labels, _ = clips(noise=1.5)
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[:120], order[120:]
    peer = KNeighborsClassifier(1, metric="cosine").fit(rows[train], labels[train])
    assert probes.nearest(rows, labels, train, test, neighbours=1) == peer.score(rows[test], labels[test])


def test_nearest_is_a_majority_and_breaks_ties_by_nearness():
    angle = np.radians([0, 1, 10, 11, 12, 2])  # the last row is tested
    rows = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 1, 1])
    train, test = np.arange(5), np.array([5])
    assert probes.nearest(rows, labels, train, test, neighbours=5) == 1
    assert probes.nearest(rows, labels, train, test, neighbours=4) == 0


def test_ridge_agrees_with_scikit_learn():
    rows, labels, _ = clips(noise=2.0)
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[:120], order[120:]
    scaler = StandardScaler().fit(rows[train])
    peer = RidgeClassifier(alpha=1e-2 * len(train)).fit(scaler.transform(rows[train]), labels[train])
    expected = peer.score(scaler.transform(rows[test]), labels[test])
    assert probes.ridge(rows, labels, train, test) == pytest.approx(expected, abs=1 / len(test))


def test_phone_probe_is_scikit_learns_ridge_on_voices_left_out():
    rows, labels, speakers = clips(words=6, takes=20, noise=3.0)
    rows = rows * np.linspace(0.01, 100, rows.shape[1], dtype=np.float32) + 50
    labels[::7] = -1  # no phone is known there
    known, right, common = labels >= 0, 0, 0
    order = seeds.numpy_generator(3, "leave-speakers-out").permutation(np.unique(speakers))
    for group in np.array_split(order, 3):
        test, train = np.isin(speakers, group) & known, ~np.isin(speakers, group) & known
        scaler = StandardScaler().fit(rows[train])
        peer = RidgeClassifier(alpha=1e-2 * train.sum()).fit(scaler.transform(rows[train]), labels[train])
        right += (peer.predict(scaler.transform(rows[test])) == labels[test]).sum()
        common += (labels[test] == np.bincount(labels[train]).argmax()).sum()
    accuracies, chances = probes.frame_accuracy(rows, labels, speakers, draws=[3, 4])
    assert accuracies[0] == pytest.approx(right / known.sum(), abs=2 / known.sum())
    assert chances[0] == common / known.sum() and len(accuracies) == len(chances) == 2
    assert np.mean(chances) < 0.25 < 0.4 < np.mean(accuracies) < 1


def test_phone_probe_never_hears_the_voices_it_is_tested_on():
    """Rows that tell who speaks, and phones that each speaker has alone: nothing to learn from the others."""
    rows, _, speakers = clips(noise=0.1)
    labels = np.unique(speakers, return_inverse=True)[1]
    assert probes.frame_accuracy(rows, labels, speakers, draws=[0])[0] == [0.0]
    with pytest.raises(probes.TooFewClipsError, match="at least two speakers, and there is 1"):
        probes.frame_accuracy(rows, labels, np.full(len(rows), "one"), draws=[0])


def test_leave_speakers_out_is_harder_than_known_speakers():
    rng = np.random.default_rng(1)
    word, speaker = np.repeat(np.arange(4), 60), np.tile(np.repeat(np.arange(6), 10), 4)
    # Each speaker has a way of saying each word: known voices are easy, new ones hard.
    rows = (rng.normal(size=(4, 6, 40))[word, speaker] + 0.1 * rng.normal(size=(240, 40))).astype(np.float32)
    order = rng.permutation(240)
    assert probes.ridge(rows, word, order[:180], order[180:]) > 0.95
    assert probes.leave_speakers_out(rows, word, speaker.astype(str), seed=0) < 0.6
    with pytest.raises(ValueError, match="two speakers"):
        probes.leave_speakers_out(rows, word, np.full(240, "one"), seed=0)


def test_speaker_probe_finds_the_voice_and_not_noise():
    rows, _, speakers = clips()
    accuracy, chance = probes.speaker_accuracy(rows, speakers, seed=0)
    assert chance == pytest.approx(1 / 6)
    assert accuracy > 0.9
    noise = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    assert probes.speaker_accuracy(noise, speakers, seed=0)[0] < 0.4


def test_triplets_are_across_speakers():
    _, labels, speakers = clips()
    drawn = probes.triplets(labels, speakers, seed=0, count=200)
    a, b, x = drawn.T
    assert drawn.shape == (200, 3)
    assert (speakers[a] == speakers[b]).all() and (labels[a] != labels[b]).all()
    assert (labels[a] == labels[x]).all() and (speakers[a] != speakers[x]).all()
    assert (drawn == probes.triplets(labels, speakers, seed=0, count=200)).all()
    with pytest.raises(ValueError, match="ABX"):
        probes.triplets(labels, np.full(len(labels), "one"), seed=0, count=5)


def test_abx_is_zero_for_words_apart_and_half_for_noise():
    rng = np.random.default_rng(0)
    _, labels, speakers = clips(takes=2)
    drawn = probes.triplets(labels, speakers, seed=0, count=400)
    words = rng.normal(size=(5, 12, 8))
    apart = [torch.tensor(words[label] + 0.05 * rng.normal(size=(12, 8))) for label in labels]
    noise = [torch.tensor(rng.normal(size=(12, 8))) for _ in labels]
    same = [torch.ones(12, 8) for _ in labels]
    assert probes.abx_error(apart, drawn) == 0
    assert 0.4 < probes.abx_error(noise, drawn) < 0.6
    assert probes.abx_error(same, drawn) == 0.5  # all ties


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
    assert probes._warped([unit[0]], [unit[1]])[0] == pytest.approx(cost / steps, rel=1e-5)

    # A sequence played slower is no further away.
    slow = unit[0].repeat_interleave(2, 0)[:6]
    assert probes._warped([unit[0][:3]], [slow[:6]])[0] == pytest.approx(0, abs=1e-3)
