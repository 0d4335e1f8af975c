"""Measures that need no long training and move with the quality of a representation.

On real digits, nearest neighbours, a probe on unseen speakers and ABX rank MFCC, random and trained layers equally; the
rank of the feature matrix (RankMe) is highest for random weights, and is not offered.
"""

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from fedhubert_lib import seeds

PENALTY = 1e-2
"""Ridge penalty of linear probes, per training row."""


class TooFewClipsError(ValueError):
    """Clips that do not allow a measure: too few speakers, or too few clips of each."""


def nearest(rows: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, neighbours: int = 10) -> float:
    """Accuracy on ``test`` of the majority of the ``neighbours`` closest rows of ``train``, by cosine.

    ``rows``: [clips, width] of one layer. Of classes with equally many neighbours, that of the nearer ones wins.
    """

    def votes(distances: np.ndarray) -> np.ndarray:  # sorted, the nearest first
        return np.tile(1 + np.linspace(0.01, 0, distances.shape[1]), (len(distances), 1))

    model = KNeighborsClassifier(min(neighbours, len(train)), weights=votes, metric="cosine")
    return float(model.fit(rows[train], labels[train]).score(rows[test], labels[test]))


def ridge(rows: np.ndarray, labels: np.ndarray) -> Pipeline:
    """A linear least-squares classifier of ``rows`` [N, width], standardised, with a ridge of ``PENALTY`` per row.

    Its solution is closed: no step count or rate to tune, so layers and folds compare evenly.
    """
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=PENALTY * len(rows)))
    return model.fit(rows.astype(np.float64), labels)


def leave_speakers_out(
    rows: np.ndarray, labels: np.ndarray, speakers: np.ndarray, *, seed: int, folds: int = 5
) -> tuple[float, float]:
    """Accuracy of ``ridge`` on speakers that it was not fitted on, and that of their commonest training label.

    Each speaker is tested once, in one of at most ``folds`` groups of similar size that ``seed`` draws. Raises
    TooFewClipsError with fewer than two speakers.
    """
    names = np.unique(speakers)
    if len(names) < 2:
        raise TooFewClipsError(f"leaving speakers out needs at least two speakers, and there is {len(names)}")
    order = seeds.numpy_generator(seed, "leave-speakers-out").permutation(names)
    correct = commonest = 0
    for group in np.array_split(order, min(folds, len(names))):
        test = np.isin(speakers, group)
        model = ridge(rows[~test], labels[~test])
        correct += int((model.predict(rows[test]) == labels[test]).sum())
        values, counts = np.unique(labels[~test], return_counts=True)
        commonest += int((labels[test] == values[counts.argmax()]).sum())
    return correct / len(labels), commonest / len(labels)


def speaker_accuracy(rows: np.ndarray, speakers: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Accuracy of ``ridge`` in naming the speaker of a clip, and chance: 1 / speakers.

    Over at most 100 seeded speakers with four clips or more; a quarter of each speaker's clips is tested. Raises
    TooFewClipsError when fewer than two speakers have that many.
    """
    rng = seeds.numpy_generator(seed, "speaker-probe")
    names, counts = np.unique(speakers, return_counts=True)
    names = rng.permutation(names[counts >= 4])[:100]
    if len(names) < 2:
        raise TooFewClipsError(f"a speaker probe needs two speakers with four clips, and there are {len(names)}")
    clips = [rng.permutation(np.flatnonzero(speakers == name)) for name in names]
    test = np.concatenate([part[: len(part) // 4] for part in clips])
    train = np.concatenate([part[len(part) // 4 :] for part in clips])
    return float(ridge(rows[train], speakers[train]).score(rows[test], speakers[test])), 1 / len(names)


def triplets(labels: np.ndarray, speakers: np.ndarray, *, seed: int, count: int) -> np.ndarray:
    """``count`` seeded (A, B, X) for ABX across speakers, int64 [count, 3], as indices of clips.

    A and B are of one speaker and of different words; X is A's word by another speaker. Raises TooFewClipsError when
    the clips allow no such triplet.
    """
    rng = seeds.numpy_generator(seed, "abx")
    by_word = {word: np.flatnonzero(labels == word) for word in np.unique(labels)}
    by_speaker = {speaker: np.flatnonzero(speakers == speaker) for speaker in np.unique(speakers)}
    drawn: list[tuple[int, int, int]] = []
    for _ in range(20 * count):
        a = int(rng.integers(len(labels)))
        others, same = by_speaker[speakers[a]], by_word[labels[a]]
        others, same = others[labels[others] != labels[a]], same[speakers[same] != speakers[a]]
        if len(others) and len(same):
            drawn.append((a, int(rng.choice(others)), int(rng.choice(same))))
        if len(drawn) == count:
            return np.array(drawn)
    raise TooFewClipsError("ABX needs words that two speakers said, and speakers who said two words")


def abx_error(frames: np.ndarray, triples: np.ndarray, chunk: int = 256) -> float:
    """Fraction of triplets whose X is closer to B, the wrong word, than to A; ties count half. Chance is 0.5.

    ``frames``: [clips, frames, width]. The distance is dynamic time warping over angles between frames, averaged along
    the path, as in ZeroSpeech's ABX; here every triplet weighs the same, where ZeroSpeech averages per context.
    """
    unit = functional.normalize(torch.from_numpy(frames).float(), dim=-1)
    wrong = 0.0
    for start in range(0, len(triples), chunk):
        a, b, x = (unit[column] for column in triples[start : start + chunk].T)
        to_a, to_b = _warped(a, x), _warped(b, x)
        wrong += float((to_b < to_a).sum() + 0.5 * (to_b == to_a).sum())
    return wrong / len(triples)


def _warped(left: Tensor, right: Tensor) -> np.ndarray:
    """Mean angle along the best warping path between pairs of unit-length sequences [pairs, frames, width]: [pairs]."""
    cosines = (left @ right.transpose(1, 2)).clamp(-1, 1)  # rounding leaves them a little beyond 1
    angles = torch.arccos(cosines).permute(1, 2, 0).numpy() / np.pi
    rows, columns, pairs = angles.shape
    # One antidiagonal at a time: cell i of diagonal d is (i, d - i); its neighbours lie on the two diagonals before.
    costs, steps = [np.full((rows + 1, pairs), np.inf) for _ in range(2)], [np.zeros((rows + 1, pairs))] * 2
    costs[0][0] = 0  # the corner before both sequences
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        cost, step = costs[0][i], steps[0][i]
        for neighbour in (i, i + 1):
            shorter = costs[1][neighbour] < cost
            cost = np.where(shorter, costs[1][neighbour], cost)
            step = np.where(shorter, steps[1][neighbour], step)
        costs, steps = [costs[1], np.full((rows + 1, pairs), np.inf)], [steps[1], np.zeros((rows + 1, pairs))]
        costs[1][i + 1], steps[1][i + 1] = cost + angles[i, diagonal - i], step + 1
    return costs[1][-1] / steps[1][-1]
