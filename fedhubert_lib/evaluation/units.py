"""How good frame labels are as units of speech: purity and PNMI of Hsu et al. 2021 (HuBERT, IV-C), and agreement.

Everything is computed from counts, phone x label, which clients can add up without showing a label. Every PNMI stands
beside the number of frames N, what shuffled labels score, and what they are expected to: with few frames and many
clusters, random labels look informative.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas
from scipy.optimize import linear_sum_assignment
from scipy.stats import random_table

from fedhubert_lib import seeds
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD


def quality(labels: np.ndarray, phones: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Unit quality of frame ``labels`` (int [N]) against ``phones`` (int or str [N]); see ``quality_of_counts``."""
    _, phone = np.unique(np.asarray(phones), return_inverse=True)
    return quality_of_counts(contingency(phone, labels, int(phone.max(initial=-1)) + 1, int(np.max(labels)) + 1), seed)


def contingency(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """How often row i and column j occur together: int64 [height, width]."""
    flat = np.asarray(rows, np.int64) * width + np.asarray(columns, np.int64)
    return np.bincount(flat, minlength=height * width).reshape(height, width)


def quality_of_counts(counts: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Unit quality from ``counts``, phone x label.

    ``pnmi`` is I(phone; label) / H(phone); ``phone_purity`` the share of frames whose phone is the most frequent one of
    their label; ``cluster_purity`` the share whose label is the most frequent one of their phone. ``shuffled_pnmi`` is
    that of the same labels in random order, ``bias`` its expected value (P - 1)(K - 1) / (2 N H), with P phones and K
    labels that occur. Raises ValueError when no frame has a phone, or all have the same.
    """
    counts = np.asarray(counts, np.int64)
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    frames = int(counts.sum())
    if counts.shape[0] < 2:
        raise ValueError(f"{frames} frames of {counts.shape[0]} phones; unit quality needs at least two phones")
    phone_entropy = entropy(counts.sum(1))
    rng = seeds.numpy_generator(seed, "shuffled-units")
    shuffled = random_table(counts.sum(1), counts.sum(0), seed=rng).rvs(method="patefield")
    return {
        "frames": frames,
        "phones": counts.shape[0],
        "pnmi": mutual_information(counts) / phone_entropy,
        "phone_purity": float(counts.max(0).sum() / frames),
        "cluster_purity": float(counts.max(1).sum() / frames),
        "shuffled_pnmi": mutual_information(shuffled) / phone_entropy,
        "bias": (counts.shape[0] - 1) * (counts.shape[1] - 1) / (2 * frames * phone_entropy),
    }


def usage(counts: np.ndarray, runs: int) -> dict[str, float]:
    """How labels are used, from frames per label ``counts`` [K] and the number of ``runs`` of equal labels.

    ``label_entropy`` in nats (ln K when all are used alike), ``cluster_use`` the share of the K labels that occur,
    ``mean_run`` in frames. Raises ValueError when there is no frame.
    """
    frames = int(counts.sum())
    if not frames:
        raise ValueError("no labelled frame: every utterance is shorter than 400 samples")
    return {
        "labelled_frames": frames,
        "label_entropy": entropy(counts),
        "cluster_use": float((counts > 0).mean()),
        "mean_run": frames / int(runs),
    }


def entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution that ``counts`` (any shape) is proportional to, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(counts: np.ndarray) -> float:
    """Mutual information of rows and columns of ``counts``, in nats."""
    return max(0.0, entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts))


def runs(sequence: np.ndarray) -> int:
    """Number of maximal stretches of equal labels in one utterance; 0 if it has no frame."""
    return int(np.count_nonzero(np.diff(sequence.astype(np.int64))) + 1) if len(sequence) else 0


def frame_phones(starts: np.ndarray, ends: np.ndarray, frames: int) -> np.ndarray:
    """Which segment each frame of an utterance is in: int64 [frames], -1 where in none.

    Segments [start, end) are samples, sorted and not overlapping; a frame belongs to the one that holds its middle, the
    sample 320 i + 200.
    """
    middles = np.arange(frames) * HOP + RECEPTIVE_FIELD // 2
    segment = np.searchsorted(starts, middles, side="right") - 1
    inside = (segment >= 0) & (middles < np.asarray(ends)[segment]) if len(starts) else np.zeros(frames, bool)
    return np.where(inside, segment, -1)


def count_phones(
    phones: pandas.DataFrame, labels: Mapping[str, np.ndarray], clusters: int
) -> tuple[list[str], np.ndarray]:
    """Phone x label counts over all utterances that have both: sorted names of phones, and int64 [phones, clusters].

    ``phones`` has columns utterance, start_sample, end_sample and phone.
    """
    names, codes = np.unique(phones.phone.to_numpy(dtype=str), return_inverse=True)
    counts = np.zeros((len(names), clusters), np.int64)
    phones = phones.assign(code=codes).sort_values(["utterance", "start_sample"], kind="stable")
    for utterance, rows in phones.groupby("utterance", sort=False):
        if utterance not in labels:
            continue
        sequence = labels[utterance]
        segment = frame_phones(rows.start_sample.to_numpy(), rows.end_sample.to_numpy(), len(sequence))
        known = segment >= 0
        counts += contingency(rows.code.to_numpy()[segment[known]], sequence[known], len(names), clusters)
    return names.tolist(), counts


def added(tables: Sequence[tuple[Sequence[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """The sum of phone x label tables whose phones may differ: all names, sorted, and their counts."""
    names = sorted({name for table_names, _ in tables for name in table_names})
    row = {name: index for index, name in enumerate(names)}
    total = np.zeros((len(names), tables[0][1].shape[1] if tables else 0), np.int64)
    for table_names, counts in tables:
        total[[row[name] for name in table_names]] += counts
    return names, total


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How far two labellings of the same frames say the same: int [N] each.

    ``nmi`` is 2 I / (H1 + H2), blind to names; ``match`` the share of frames with the same label once the second's are
    renamed in the best way (Hungarian); ``same`` the share with the same label as they are.
    """
    counts = contingency(first, second, int(first.max()) + 1, int(second.max()) + 1)
    entropies = entropy(counts.sum(1)) + entropy(counts.sum(0))
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return {
        "nmi": 2 * mutual_information(counts) / entropies if entropies else 1.0,
        "match": float(counts[rows, columns].sum() / len(first)),
        "same": float((first == second).mean()),
    }


def agreement_matrices(labels: Mapping[str, np.ndarray]) -> dict[str, pandas.DataFrame]:
    """``agreement`` of every pair of clients that labelled the same frames: a clients x clients table per measure."""
    clients = sorted(labels)
    tables = {name: pandas.DataFrame(1.0, clients, clients) for name in ("nmi", "match", "same")}
    for i, one in enumerate(clients):
        for other in clients[:i]:
            for name, value in agreement(labels[one], labels[other]).items():
                tables[name].loc[one, other] = tables[name].loc[other, one] = value
    return tables
