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

from fedhubert_lib import seeds, threads, units

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
    classifier = RidgeClassifier(alpha=PENALTY * len(rows), copy_X=False)  # rows are many: one copy in float64 will do
    return make_pipeline(StandardScaler(copy=False), classifier).fit(rows.astype(np.float64), labels)


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


def abx_error(frames: np.ndarray, words: np.ndarray, speakers: np.ndarray) -> float:
    """ABX error ON the word, ACROSS speakers, over all triplets of clips; chance is 0.5, and a tie counts half.

    A and B are different words of one speaker, X is A's word by another one: an error where X is closer to B. Errors
    are averaged over the triplets of two words and two speakers, then over speakers, then over pairs of words, as
    fastabx does (``Task(on="word", across=["speaker"])``, ``Score(task, "angular").collapse(levels=["speaker"])``) and
    ZeroSpeech before it. Distances are angles between frames, averaged along the best path of dynamic time warping.

    ``frames`` is [clips, frames, width]. Raises TooFewClipsError when the clips allow no such triplet.
    """
    unit = functional.normalize(torch.from_numpy(frames).float(), dim=-1)
    (names, word), (_, speaker) = (np.unique(labels, return_inverse=True) for labels in (words, speakers))
    takes = units.contingency(speaker, word, speaker.max() + 1, len(names))
    # X is compared with all that is said by others who say its word; distances are the same both ways.
    compared = (speaker[:, None] != speaker) & (takes[speaker][:, word].T > 0)
    compared = np.triu(compared | compared.T)

    def to_later(x: int) -> np.ndarray:
        distances, later = np.full(len(unit), np.nan), np.flatnonzero(compared[x])
        distances[later] = _warped(unit[x], unit[later])
        return distances

    distances = np.stack(list(threads.each(to_later, range(len(unit)))))
    distances = np.fmax(distances, distances.T)  # whichever is not NaN
    totals, counts = np.zeros((2, len(names), len(names)))
    for voice, said in zip(*np.nonzero(takes), strict=True):
        x = np.flatnonzero((word == said) & (speaker != voice))
        a = np.flatnonzero((word == said) & (speaker == voice))
        b = np.flatnonzero((word != said) & (speaker == voice))
        if len(x) and len(b):
            to_a, to_b = distances[x][:, a, None], distances[x][:, None, b]
            wrong = ((to_b < to_a) + 0.5 * (to_b == to_a)).mean(1)  # [X, B]
            per_voice = _means(wrong, np.unique(speaker[x], return_inverse=True)[1])
            cells = _means(per_voice.T, word[b], len(names))  # [words, voices of X]
            totals[said] += np.nansum(cells, 1)
            counts[said] += np.isfinite(cells).sum(1)
    if not counts.any():
        raise TooFewClipsError("ABX needs words that two speakers said, and speakers who said two words")
    return float((totals[counts > 0] / counts[counts > 0]).mean())


def _means(rows: np.ndarray, groups: np.ndarray, count: int | None = None) -> np.ndarray:
    """Mean of the rows of each group: [groups, columns]; NaN for a group without rows."""
    member = np.eye(count or groups.max() + 1)[:, groups]
    with np.errstate(invalid="ignore"):
        return member @ rows / member.sum(1, keepdims=True)


def _warped(one: Tensor, many: Tensor) -> np.ndarray:
    """Mean angle along the best path, of ``one`` [frames, width] and ``many`` [pairs, frames, width]: [pairs]."""
    rows, columns, pairs = len(one), many.shape[1], len(many)
    cosines = (one @ many.transpose(0, 1).flatten(0, 1).T).clamp_(-1, 1)  # rounding leaves them a little beyond 1
    angle = cosines.arccos_().div_(np.pi).view(rows, columns, pairs).numpy()
    # One antidiagonal at a time: cell i of diagonal d is (i, d - i); its neighbours lie on the two diagonals before.
    paths = [np.full((2, rows + 1, pairs), np.inf, np.float32) for _ in range(2)]  # cost and steps of each cell
    paths[0][:, 0] = 0  # the corner before both sequences
    for diagonal in range(rows + columns - 1):
        first, last = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        way, i = paths[0][:, first:last], np.arange(first, last)
        for other in (paths[1][:, first + 1 : last + 1], paths[1][:, first:last]):
            way = np.where(other[0] < way[0], other, way)
        paths = [paths[1], np.full_like(paths[1], np.inf)]
        paths[1][:, first + 1 : last + 1] = way[0] + angle[i, diagonal - i], way[1] + 1
    return np.divide(*paths[1][:, -1])
