"""Quality of frame labels as units of speech: purity and PNMI of Hsu et al. 2021 (HuBERT, IV-C), and agreement.

Quality is computed from counts, phone x label, which clients can add up without showing a label. Every PNMI stands
beside that of shuffled labels: with few frames and many clusters, random labels look informative. Entropies are in
nats.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas
import scipy

from fedhubert_lib import seeds
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD


def quality(labels: np.ndarray, phones: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Unit quality of frame ``labels`` (int [N]) against ``phones`` (int or str [N]); see ``quality_of_counts``."""
    _, phone = np.unique(phones, return_inverse=True)
    return quality_of_counts(contingency(phone, labels, int(phone.max(initial=-1)) + 1, int(np.max(labels)) + 1), seed)


def contingency(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """How often row i and column j occur together: int64 [height, width]."""
    flat = np.asarray(rows, np.int64) * width + np.asarray(columns, np.int64)
    return np.bincount(flat, minlength=height * width).reshape(height, width)


def quality_of_counts(counts: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Unit quality from ``counts``, phone x label.

    ``pnmi`` is I(phone; label) / H(phone); ``phone_purity`` the fraction of frames whose phone is the most frequent one
    of their label; ``cluster_purity`` the fraction whose label is the most frequent one of their phone.
    ``shuffled_pnmi`` is that of the same labels in random order, about (P - 1)(K - 1) / (2 N H), of P phones and K
    labels that occur. Raises ValueError when no frame has a phone, or all have the same.
    """
    from sklearn.metrics import mutual_info_score  # here, since what only checks a study imports this module, too

    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    frames = int(counts.sum())
    if counts.shape[0] < 2:
        raise ValueError(f"{frames} frames of {counts.shape[0]} phones; unit quality needs at least two phones")
    phone_entropy = float(scipy.stats.entropy(counts.sum(1)))
    rng = seeds.numpy_generator(seed, "shuffled-units")
    shuffled = scipy.stats.random_table(counts.sum(1), counts.sum(0), seed=rng).rvs(method="patefield")
    return {
        "frames": frames,
        "phones": counts.shape[0],
        "pnmi": float(mutual_info_score(None, None, contingency=counts)) / phone_entropy,
        "phone_purity": float(counts.max(0).sum() / frames),
        "cluster_purity": float(counts.max(1).sum() / frames),
        "shuffled_pnmi": float(mutual_info_score(None, None, contingency=shuffled)) / phone_entropy,
    }


def runs(sequence: np.ndarray) -> np.ndarray:
    """The labels of one utterance without repetition: one of each maximal stretch of equal ones."""
    return sequence[np.diff(sequence.astype(np.int64), prepend=-1) != 0]


def frame_phones(phones: pandas.DataFrame, frames: Mapping[str, int]) -> np.ndarray:
    """The phone of each frame of the utterances in ``frames`` (utterance to number of frames), end to end.

    ``phones`` has the columns utterance, start_sample, end_sample and phone. A frame belongs to the phone that holds
    its middle, the sample 320 i + 200. Returns str [N], "" where no phone is known.
    """
    by_utterance = dict(iter(phones.sort_values("start_sample").groupby("utterance")))
    parts = [np.empty(0, object)]
    for utterance, count in frames.items():
        rows = by_utterance.get(utterance, phones[:0])
        middles = np.arange(count) * HOP + RECEPTIVE_FIELD // 2
        segment = np.searchsorted(rows.start_sample.to_numpy(), middles, side="right") - 1
        # Before the first phone the index is -1: that of the entry appended, a phone without name or samples.
        ends, names = np.append(rows.end_sample.to_numpy(), 0), np.append(rows.phone.to_numpy(object), "")
        parts.append(np.where(middles < ends[segment], names[segment], ""))
    return np.concatenate(parts).astype(str)


def count_phones(
    phones: pandas.DataFrame, labels: Mapping[str, np.ndarray], clusters: int
) -> tuple[list[str], np.ndarray]:
    """Phone x label counts over all utterances that have both: sorted names of phones, and int64 [phones, clusters].

    ``phones`` is as for ``frame_phones``, ``labels`` maps an utterance to its frame labels.
    """
    names = np.unique(phones.phone.to_numpy(str))
    sequences = {utterance: labels[utterance] for utterance in phones.utterance.unique() if utterance in labels}
    phone = frame_phones(phones, {utterance: len(sequence) for utterance, sequence in sequences.items()})
    labelled, label = phone != "", np.concatenate([np.empty(0, np.int64), *sequences.values()])
    return names.tolist(), contingency(np.searchsorted(names, phone[labelled]), label[labelled], len(names), clusters)


def added(tables: Sequence[tuple[Sequence[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """The sum of phone x label tables whose phones may differ: all names, sorted, and their counts."""
    names = sorted({name for table_names, _ in tables for name in table_names})
    total = np.zeros((len(names), tables[0][1].shape[1]), np.int64)
    for table_names, counts in tables:
        total[np.searchsorted(names, table_names)] += counts
    return names, total


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Agreement of two labellings of the same frames: int [N] each.

    ``nmi`` is 2 I / (H1 + H2), blind to names; ``match`` the fraction of frames with the same label once the second's
    are renamed in the best way (Hungarian); ``same`` the fraction with the same label as they are.
    """
    from sklearn.metrics import normalized_mutual_info_score

    counts = contingency(first, second, int(first.max()) + 1, int(second.max()) + 1)
    rows, columns = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    return {
        "nmi": float(normalized_mutual_info_score(first, second)),
        "match": float(counts[rows, columns].sum() / len(first)),
        "same": float((first == second).mean()),
    }


def agreement_matrices(labels: Mapping[str, np.ndarray]) -> dict[str, pandas.DataFrame]:
    """``agreement`` of every pair of clients that labelled the same frames: a clients x clients table per measure."""
    clients = sorted(labels)
    tables = {name: pandas.DataFrame(1.0, clients, clients) for name in ("nmi", "match", "same")}
    for other, client in itertools.combinations(clients, 2):
        for name, value in agreement(labels[client], labels[other]).items():
            tables[name].loc[client, other] = tables[name].loc[other, client] = value
    return tables
