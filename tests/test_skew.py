"""Distance of clients: zero for IID, one for clients with nothing in common."""

import manifests
import numpy as np
import pandas as pd
import pytest
import soundfile
from sklearn.cluster import MiniBatchKMeans

from fedhubert_lib import audio, params, partition, skew


def test_distances_of_equal_and_of_disjoint_clients():
    owner = np.repeat(np.arange(3), 40)
    disjoint = np.zeros((120, 6), dtype=int)
    disjoint[np.arange(120), 2 * owner] = 7
    matrix = skew.distances(disjoint, owner, seed=0)
    np.testing.assert_allclose(matrix, 1 - np.eye(3), atol=1e-7)
    assert skew.apart(matrix) == pytest.approx({"within": 0, "between": 1, "skew": 1})
    assert skew.apart(np.array([[0.2]])) == {"within": 0.2, "between": 0.2, "skew": 0}
    assert np.isnan(skew.apart(np.full((3, 3), np.nan))["skew"])  # and numpy warns of nothing


def test_summary_of_iid_and_of_whole_speakers():
    table = manifests.librispeech960(utterances=4_000, speakers=80)
    rng = np.random.default_rng(0)
    voices = rng.dirichlet(np.full(50, 0.3), size=80)
    counts = np.stack([rng.multinomial(800, voices[code]) for code in pd.factorize(table.speaker)[0]])
    summaries = {
        scheme: skew.summary(
            table, partition.owners(table, params.Partition(scheme=scheme, clients=count)), counts, seed=0
        )
        for scheme, count in (("iid", 10), ("speakers", 10), ("speaker", 80))
    }
    assert abs(summaries["iid"]["skew"]) < 0.01
    assert summaries["speaker"]["skew"] > 2 * summaries["speakers"]["skew"] > 0.1
    assert summaries["speaker"]["clients"] == 80 and summaries["speaker"]["speakers"] == 1


def test_distances_ignore_utterances_that_were_not_read():
    owner = np.array([0, 0, 0, 0, 1, 1, 1])
    counts = np.zeros((7, 2), dtype=int)
    counts[[0, 1, 4, 5]] = [[4, 0], [4, 0], [4, 0], [4, 0]]
    np.testing.assert_allclose(skew.distances(counts, owner, seed=0), 0, atol=1e-9)
    counts[[4, 5]] = 0
    matrix = skew.distances(counts, owner, seed=0)
    assert np.isnan(matrix[1]).all() and np.isnan(matrix[0, 1]) and matrix[0, 0] == 0


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Four speakers, five utterances of five seconds each: low, high, low and high noise."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        path = tmp_path_factory.getbasetemp() / f"{i}.flac"
        noise = rng.normal(0, 0.1, 80_000)
        soundfile.write(path, np.cumsum(noise) / 50 if i % 2 else np.diff(noise, prepend=0), 16_000)
        rows.append((str(path), f"speaker {i % 4}", 80_000))
    return pd.DataFrame(rows, columns=["path", "speaker", "samples"])


def test_acoustic_counts_separate_sounds(spoken):
    steps = []
    counts = skew.acoustic_counts(
        spoken, seed=0, clusters=8, per_speaker=4, on_progress=lambda *step: steps.append(step)
    )
    assert counts.shape == (20, 8) and steps[-1] == ("listen", 16, 16)
    read = counts.sum(1) > 0
    assert (pd.Series(read).groupby(spoken.speaker).sum() == 4).all()
    assert (counts[read].sum(1) == 398).all(), "every frame of the four seconds in the middle"
    distance = skew.distances(counts, np.arange(20) % 4, seed=0)
    assert distance[0, 2] < 0.4 and distance[1, 3] < 0.4 and distance[0, 1] > 0.95
    assert np.array_equal(counts, skew.acoustic_counts(spoken, seed=0, clusters=8, per_speaker=4))
    assert not np.array_equal(counts, skew.acoustic_counts(spoken, seed=1, clusters=8, per_speaker=4))


def test_acoustic_counts_fit_on_a_sample(spoken, monkeypatch):
    read = []
    plain = audio.read
    monkeypatch.setattr(audio, "read", lambda *place: read.append(place) or plain(*place))
    monkeypatch.setattr(skew, "FIT_UTTERANCES", 7)
    counts = skew.acoustic_counts(spoken, seed=0, clusters=4)
    paths = [path for path, *_ in read]
    assert len(paths) == 7 + 20 and len(set(paths[:7])) == 7 and set(paths[7:]) == set(spoken.path)
    assert {(start, stop) for _, start, stop, _ in read} == {(8_000, 72_000)}, "the middle of five seconds"
    assert (counts.sum(1) == 398).all()


def test_acoustic_clusters_hear_the_scale_that_they_were_fitted_on(spoken, monkeypatch):
    heard, predict = [], MiniBatchKMeans.predict
    monkeypatch.setattr(MiniBatchKMeans, "predict", lambda self, rows: heard.append(rows) or predict(self, rows))
    skew.acoustic_counts(spoken, seed=0, clusters=4)
    frames = np.concatenate(heard)
    np.testing.assert_allclose([frames.mean(0), frames.std(0)], [[0] * 39, [1] * 39], atol=1e-2)


def test_clients_table():
    table = pd.DataFrame(
        {
            "speaker": ["a", "a", "b", "c"],
            "sex": ["F", "F", "M", ""],
            "samples": [16_000, 48_000, 64_000, 32_000],
            "sample_rate": 16_000,
            "text": ["ONE TWO", "THREE FOUR FIVE SIX", "SEVEN", None],
        }
    )
    held = skew.clients(table, np.array([0, 0, 0, 1]))
    assert held.hours.tolist() == [8 / 3600, 2 / 3600]
    assert held.speakers.tolist() == [2, 1] and held.utterances.tolist() == [3, 1]
    assert held.female[0] == 0.5 and np.isnan(held.female[1])
    assert held["median"].tolist() == [3, 2] and held.longest[0] == 3
    assert held.words_per_minute[0] == pytest.approx(7 / 8 * 60) and np.isnan(held.words_per_minute[1])


def test_imbalance_is_the_standard_deviation_of_hours_over_their_mean():
    table = manifests.librispeech960(utterances=40, speakers=4).assign(samples=16_000)
    row = skew.summary(table, np.repeat([0, 1], [30, 10]), np.ones((40, 3), int), seed=0)
    assert row["imbalance"] == pytest.approx(0.5)


def test_distances_are_the_same_from_both_sides():
    counts = np.random.default_rng(0).integers(5, size=(40, 6))
    distance = skew.distances(counts, np.repeat([0, 1, 2, 3], 10), seed=0)
    np.testing.assert_array_equal(distance, distance.T)
