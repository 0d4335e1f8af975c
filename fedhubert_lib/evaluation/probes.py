"""Measures that need no long training and move with the quality of a representation.

Measured on real digits (six speakers): nearest neighbours, a probe on unseen speakers and ABX rank MFCC, random and
trained layers alike; the rank of the feature matrix (RankMe) does not, it is highest for random weights, and is not
offered. A speaker probe says how much of the voice is left.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedhubert_lib import seeds


class TooFewClipsError(ValueError):
    """Clips that do not allow a measure: too few speakers, or too few clips of each."""


def nearest(
    rows: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, *, neighbours: int = 10
) -> float:
    """Accuracy on ``test`` of the majority of the ``neighbours`` closest rows of ``train``, by cosine.

    ``rows``: [clips, width] of one layer; ties go to the nearer neighbours. Memory is test chunk x train.
    """
    known = functional.normalize(torch.from_numpy(rows[train]), dim=1)
    classes = torch.from_numpy(labels[train])
    count = int(labels.max()) + 1
    # A vote of 1 plus a little for nearness: the majority wins, and among equals the nearer.
    votes = 1 + torch.linspace(0.01, 0, neighbours)
    right = 0
    for start in range(0, len(test), 512):
        part = test[start : start + 512]
        near = (functional.normalize(torch.from_numpy(rows[part]), dim=1) @ known.T).topk(neighbours, dim=1).indices
        ballot = torch.zeros(len(part), count).scatter_add_(1, classes[near], votes.expand(len(part), -1))
        right += int((ballot.argmax(1).numpy() == labels[part]).sum())
    return right / len(test)


def ridge(rows: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, *, penalty: float = 1e-2) -> float:
    """Accuracy on ``test`` of a linear least-squares classifier fitted on ``train`` in closed form.

    ``rows``: [clips, width] of one layer, standardised by the training rows; ``penalty`` is the ridge, a share of the
    number of training clips. No step count or rate to tune, so layers and folds compare evenly.
    """
    x, y = torch.from_numpy(rows[train]).double(), torch.from_numpy(labels[train])
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    deviation[deviation == 0] = 1
    x = (x - mean) / deviation
    classes, y = y.unique(return_inverse=True)
    targets = functional.one_hot(y).double()
    level = targets.mean(0)
    weights = torch.linalg.solve(x.T @ x + penalty * len(x) * torch.eye(x.shape[1]).double(), x.T @ (targets - level))
    scores = (torch.from_numpy(rows[test]).double() - mean) / deviation @ weights + level
    return float((classes[scores.argmax(1)].numpy() == labels[test]).mean())


def leave_speakers_out(
    rows: np.ndarray, labels: np.ndarray, speakers: np.ndarray, *, seed: int, folds: int = 5
) -> float:
    """Accuracy of ``ridge`` on speakers it never saw: each speaker is tested once, in one of ``folds`` groups.

    Raises TooFewClipsError with fewer than two speakers.
    """
    right = 0.0
    for group in _speaker_folds(speakers, seed, folds):
        test = np.flatnonzero(np.isin(speakers, group))
        train = np.flatnonzero(~np.isin(speakers, group))
        right += ridge(rows, labels, train, test) * len(test)
    return right / len(speakers)


def frame_accuracy(
    rows: np.ndarray, labels: np.ndarray, speakers: np.ndarray, *, draws: Sequence[int], folds: int = 3
) -> tuple[list[float], list[float]]:
    """How well a linear classifier names the phone of a single frame of a voice it never heard, and chance; by seed.

    ``ridge`` on frames: ``rows`` [frames, width] of one layer, ``labels`` int64 (-1: no phone is known, left out), and
    ``speakers`` of each. Each speaker is tested once, in one of ``folds`` groups that the seed draws. Sums of products
    are taken once for each speaker, so that folds and seeds cost a solution of the normal equations each. Chance is the
    accuracy of the training speakers' commonest phone. Raises TooFewClipsError with fewer than two speakers.
    """
    known = labels >= 0
    x, speakers = torch.from_numpy(rows[known]), speakers[known]
    phones, y = torch.from_numpy(labels[known]).unique(return_inverse=True)
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], dim=1)  # around their mean float32 holds the products
    parts = {name: torch.from_numpy(np.flatnonzero(speakers == name)) for name in np.unique(speakers)}
    sums = {}
    for name, part in parts.items():
        products = x[part].T @ torch.cat([x[part], functional.one_hot(y[part], len(phones)).float()], dim=1)
        sums[name] = products.double()
    total = sum(sums.values())
    accuracies, chances = [], []
    for seed in draws:
        right = common = 0
        for group in _speaker_folds(speakers, seed, folds):
            test = torch.cat([parts[name] for name in group])
            weights, level = _normal_equations(total - sum(sums[name] for name in group), x.shape[1] - 1)
            right += int(((x[test] @ weights.float()).argmax(1) == y[test]).sum())
            common += int((level.argmax() == y[test]).sum())
        accuracies.append(right / len(y))
        chances.append(common / len(y))
    return accuracies, chances


def _normal_equations(sums: Tensor, width: int, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """The solution of ``ridge`` from [x, 1]ᵀ [x, 1, targets]: weights [width + 1, classes], and the classes' shares."""
    count, mean, level = sums[-1, width], sums[-1, :width] / sums[-1, width], sums[-1, width + 1 :] / sums[-1, width]
    covariance = sums[:width, :width] - count * torch.outer(mean, mean)
    deviation = (covariance.diagonal() / count).clamp(min=0).sqrt()
    deviation[deviation == 0] = 1
    covariance = covariance / torch.outer(deviation, deviation) + penalty * count * torch.eye(width).double()
    targets = (sums[:width, width + 1 :] - count * torch.outer(mean, level)) / deviation[:, None]
    weights = torch.linalg.solve(covariance, targets) / deviation[:, None]
    return torch.cat([weights, (level - mean @ weights)[None]]), level


def _speaker_folds(speakers: np.ndarray, seed: int, folds: int) -> list[np.ndarray]:
    """The names of ``speakers`` in at most ``folds`` groups of like size, drawn by ``seed``."""
    names = np.unique(speakers)
    if len(names) < 2:
        raise TooFewClipsError(f"leaving speakers out needs at least two speakers, and there is {len(names)}")
    order = seeds.numpy_generator(seed, "leave-speakers-out").permutation(names)
    return np.array_split(order, min(folds, len(names)))


def speaker_accuracy(
    rows: np.ndarray, speakers: np.ndarray, *, seed: int, most: int = 100, fewest_clips: int = 4
) -> tuple[float, float]:
    """How well ``ridge`` names the speaker of a clip, and chance: 1 / speakers.

    Over at most ``most`` seeded speakers with ``fewest_clips`` or more; a quarter of each speaker's clips is tested.
    Raises TooFewClipsError when fewer than two speakers have that many.
    """
    rng = seeds.numpy_generator(seed, "speaker-probe")
    names, counts = np.unique(speakers, return_counts=True)
    names = rng.permutation(names[counts >= fewest_clips])[:most]
    if len(names) < 2:
        raise TooFewClipsError(
            f"a speaker probe needs two speakers with {fewest_clips} clips, and there are {len(names)}"
        )
    train, test = [], []
    labels = np.full(len(speakers), -1, dtype=np.int64)
    for index, name in enumerate(names):
        clips = rng.permutation(np.flatnonzero(speakers == name))
        labels[clips] = index
        test.append(clips[: len(clips) // 4])
        train.append(clips[len(clips) // 4 :])
    return ridge(rows, labels, np.concatenate(train), np.concatenate(test)), 1 / len(names)


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
        if len(drawn) == count:
            return np.array(drawn)
        a = int(rng.integers(len(labels)))
        others = by_speaker[speakers[a]]
        others = others[labels[others] != labels[a]]
        same = by_word[labels[a]]
        same = same[speakers[same] != speakers[a]]
        if len(others) and len(same):
            drawn.append((a, int(rng.choice(others)), int(rng.choice(same))))
    raise TooFewClipsError(
        "too few clips for ABX: it needs words that two speakers said, and speakers who said two words"
    )


def abx_error(frames: Sequence[Tensor], triples: np.ndarray, *, chunk: int = 256) -> float:
    """Share of triplets whose X is closer to B, the wrong word, than to A; ties count half. Chance is 0.5.

    ``frames``: [frames, width] per clip. The distance is dynamic time warping over angles between frames, averaged
    along the path, as in ZeroSpeech's ABX; here every triplet weighs the same, where ZeroSpeech averages per context.
    """
    units = [functional.normalize(clip.float(), dim=1) for clip in frames]
    wrong = 0.0
    for start in range(0, len(triples), chunk):
        part = triples[start : start + chunk]
        right_word = _warped([units[a] for a in part[:, 0]], [units[x] for x in part[:, 2]])
        wrong_word = _warped([units[b] for b in part[:, 1]], [units[x] for x in part[:, 2]])
        wrong += float((wrong_word < right_word).sum() + 0.5 * (wrong_word == right_word).sum())
    return wrong / len(triples)


def _warped(left: list[Tensor], right: list[Tensor]) -> np.ndarray:
    """Mean angle along the best warping path between each pair of unit-length sequences of one shape, [pairs]."""
    angles = torch.stack(left) @ torch.stack(right).transpose(1, 2)
    angles = torch.arccos(angles.clamp(-1, 1)).numpy() / np.pi  # rounding leaves cosines a little beyond 1
    pairs, rows, columns = angles.shape
    # One antidiagonal at a time: cell i of diagonal d is (i, d - i), its neighbours lie on the two diagonals before.
    cost = [np.full((pairs, rows + 1), np.inf) for _ in range(2)]
    steps = [np.zeros((pairs, rows + 1)) for _ in range(2)]
    cost[0][:, 0] = 0  # the corner before both sequences
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        ways = np.stack([cost[0][:, i], cost[1][:, i], cost[1][:, i + 1]])
        counts = np.stack([steps[0][:, i], steps[1][:, i], steps[1][:, i + 1]])
        best = ways.argmin(0)[None]
        new_cost, new_steps = np.full((pairs, rows + 1), np.inf), np.zeros((pairs, rows + 1))
        new_cost[:, i + 1] = np.take_along_axis(ways, best, 0)[0] + angles[:, i, diagonal - i]
        new_steps[:, i + 1] = np.take_along_axis(counts, best, 0)[0] + 1
        cost, steps = [cost[1], new_cost], [steps[1], new_steps]
    return cost[1][:, -1] / steps[1][:, -1]
