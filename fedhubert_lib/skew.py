"""How non-IID a partition is: what each client holds, and the distance of clients, beside that of one from itself.

Clients are compared by a histogram: which of K acoustic clusters (k-means on MFCCs) their frames fall into. Two halves
of one client differ by chance alone; that distance is the baseline. The distance of two clients beyond it is skew, and
its mean is the one number by which schemes are compared: 0 for IID, towards 1 for clients with no sound in common.

Only a researcher who holds all the audio can measure this; nothing here is sent in a federation.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial.distance import cdist

from fedhubert_lib import audio, seeds

FIT_UTTERANCES, FIT_FRAMES = 1_000, 100_000
"""Utterances, and frames of them, that the acoustic clusters are fitted on, at most."""
EXCERPT = 4 * audio.SAMPLE_RATE
"""Samples from the middle of an utterance that stand for it."""


def clients(table: pd.DataFrame, owner: np.ndarray) -> pd.DataFrame:
    """Statistics of each client. ``table`` has the manifest's rows, ``owner`` [utterances] their clients 0 … C-1.

    Columns: hours; utterances; speakers; female, the fraction of its speech (NaN where no sex is known); shortest,
    median and longest, the 5 %, 50 % and 95 % quantile of its utterances' lengths in seconds; words_per_minute, of
    utterances with a transcript.
    """
    seconds = table["samples"] / table["sample_rate"]
    words = table["text"].str.count(r"\S+").fillna(0)

    def total(amounts: pd.Series) -> pd.Series:
        return amounts.groupby(owner).sum()

    quantiles = seconds.groupby(owner).quantile([0.05, 0.5, 0.95], interpolation="lower").unstack()
    return pd.DataFrame(
        {
            "hours": total(seconds) / 3600,
            "utterances": seconds.groupby(owner).size(),
            "speakers": table["speaker"].groupby(owner).nunique(),
            "female": total(seconds * (table["sex"] == "F")) / total(seconds * table["sex"].isin(["F", "M"])),
            "shortest": quantiles[0.05],
            "median": quantiles[0.5],
            "longest": quantiles[0.95],
            "words_per_minute": 60 * total(words) / total(seconds * (words > 0)),
        }
    )


def acoustic_counts(
    table: pd.DataFrame,
    *,
    seed: int,
    clusters: int = 50,
    per_speaker: int = 6,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> np.ndarray:
    """Frames of each utterance in each of ``clusters`` clusters of MFCCs: int32 [utterances, clusters].

    Four seconds from the middle of ``per_speaker`` utterances of each speaker, drawn from the seed, are read; the rows
    of the others stay zero. K-means is fitted on at most 100,000 frames of 1,000 of them, in 39 dimensions standardised
    over all speakers, so that a different voice or recording shows.
    """
    from sklearn.cluster import MiniBatchKMeans  # these here: tables do without the half gigabyte that they take

    from fedhubert_lib import features

    rng = seeds.numpy_generator(seed, "skew", "utterances")
    order = rng.permutation(len(table))
    rows = np.sort(order[table.iloc[order].groupby("speaker").cumcount() < per_speaker])
    samples = table["samples"].to_numpy()
    fitted = rows if len(rows) <= FIT_UTTERANCES else np.sort(rng.choice(rows, FIT_UTTERANCES, replace=False))
    fraction = min(1.0, FIT_FRAMES * features.MFCC_HOP / np.minimum(samples[fitted], EXCERPT).sum())

    def mfcc(row: int) -> np.ndarray:
        start = max(0, samples[row] - EXCERPT) // 2
        excerpt = audio.read(table["path"].iat[row], start, min(samples[row], start + EXCERPT), samples[row])
        return features.mfcc([excerpt])[0].numpy()

    # Read a second time below: the frames of all of LibriSpeech's speakers would not fit in memory.
    sample = np.concatenate([frames[rng.random(len(frames)) < fraction] for frames in map(mfcc, fitted)])
    mean, std = sample.mean(0), sample.std(0)
    kmeans = MiniBatchKMeans(clusters, n_init=1, random_state=seeds.derive(seed, "skew", "kmeans") % 2**32)
    kmeans.fit((sample - mean) / std)
    counts = np.zeros((len(table), clusters), dtype=np.int32)
    for done, row in enumerate(rows, start=1):
        counts[row] = np.bincount(kmeans.predict((mfcc(row) - mean) / std), minlength=clusters)
        on_progress("listen", done, len(rows))
    return counts


def distances(counts: np.ndarray, owner: np.ndarray, *, seed: int) -> np.ndarray:
    """Jensen–Shannon distance (square root of the divergence in bits, 0 … 1) of clients' halves: [clients, clients].

    Each client's utterances are dealt to two halves; element [i, j] is the mean of the first half of i with the second
    of j and the second of i with the first of j. So the diagonal is the distance of a client from itself, from as much
    speech as the others: the baseline. NaN where a half is empty. ``counts`` [utterances, K], ``owner`` [utterances].
    """
    count = owner.max() + 1
    used = np.flatnonzero(counts.any(axis=1))
    draw = pd.Series(seeds.numpy_generator(seed, "skew", "halves").random(len(used)))
    turn = draw.groupby(owner[used]).rank(method="first").to_numpy(np.int64) - 1
    half = 2 * owner[used] + turn % 2
    halves = sparse.csr_array((np.ones(len(used)), (half, used)), shape=(2 * count, len(counts))) @ counts
    distance = cdist(halves[0::2], halves[1::2], "jensenshannon") / np.sqrt(np.log(2))
    distance = (distance + distance.T) / 2
    return np.where(np.isfinite(distance), distance, np.nan)  # of an empty half it is infinite


def summary(table: pd.DataFrame, owner: np.ndarray, counts: np.ndarray, *, seed: int) -> dict[str, float]:
    """One row of a comparison of schemes: ``apart``, and the clients' number, hours and median number of speakers.

    imbalance is the standard deviation of the clients' hours over their mean.
    """
    held = clients(table, owner)
    hours = held["hours"]
    return {
        "clients": len(held),
        "hours_smallest": hours.min(),
        "hours_median": hours.median(),
        "hours_largest": hours.max(),
        "imbalance": hours.std(ddof=0) / hours.mean(),
        "speakers": held["speakers"].median(),
    } | apart(distances(counts, owner, seed=seed))


def apart(distance: np.ndarray) -> dict[str, float]:
    """Means of a matrix from ``distances``: within (its diagonal), between (the rest), skew (their difference).

    One client alone differs from nobody: its skew is 0. NaN unless two clients have two utterances to compare.
    """
    within = pd.Series(np.diagonal(distance)).mean()  # pandas leaves NaN out
    between = pd.Series(distance[~np.eye(len(distance), dtype=bool)]).mean() if len(distance) > 1 else within
    return {"within": within, "between": between, "skew": between - within}
