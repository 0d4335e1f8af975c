"""Hidden layers and phones: the speech they are compared on, and the quality of a layer's clusters as units.

No client trained on that speech: held-out speakers and test subsets, as far as its phones are known. K-means is fitted
on these frames and scored on them: it sees no phone (HuBERT, table IV: fitting on 1 h or 100 h moves PNMI by 0.01).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from fedhubert_lib import audio, seeds, units

LONGEST = 30 * audio.SAMPLE_RATE
"""Samples of an utterance that are used: attention over minutes of speech would need more memory than training did."""


class NoPhonesError(ValueError):
    """There is no untrained-on speech with known phones."""


def held_out(run: Path, minutes: float, seed: int, clusters: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Utterances no client has, about ``minutes`` of them drawn by ``seed``, and their phones.

    Raises NoPhonesError where there are none, with the reason, and ValueError where they have fewer frames than
    ``clusters``.
    """
    manifest = pd.read_parquet(run / "00_corpus" / "manifest.parquet")
    table = manifest[manifest.split == "test"]
    if (heldout := run / "01_partition" / "heldout.parquet").is_file():
        table = pd.concat([table, pd.read_parquet(heldout)]).drop_duplicates("utterance")
    path = run / "00_corpus" / "phones.parquet"  # 35 million rows for all of LibriSpeech
    phones = pd.DataFrame(columns=["utterance", "phone"])
    if path.is_file() and len(table):
        phones = pd.read_parquet(path, filters=[("utterance", "in", set(table.utterance))])
    table = table[table.utterance.isin(set(phones.utterance)) & (table.samples >= audio.RECEPTIVE_FIELD)]
    if table.empty:
        raise NoPhonesError(
            "no utterance of a test subset or of a held-out speaker has phones; give corpus.alignments that cover some,"
            " or keep more speakers out with partition.heldout_speakers"
        )
    table = table.sort_values("utterance").iloc[seeds.numpy_generator(seed, "held-out").permutation(len(table))]
    seconds = table.samples.clip(upper=LONGEST).cumsum() / audio.SAMPLE_RATE
    table = table[seconds.shift(fill_value=0) < 60 * minutes].sort_values("utterance", ignore_index=True)
    counts = dict(zip(table.utterance, frame_counts(table), strict=True))
    if (frames := int(sum(counts.values()))) < clusters:
        raise ValueError(
            f"evaluate.clusters: {clusters} given, but the held-out speech with phones has {frames} frames; give fewer,"
            " or raise evaluate.unit_minutes"
        )
    phones = phones[phones.utterance.isin(set(table.utterance))]
    if len(said := set(units.frame_phones(phones, counts)) - {""}) < 2:
        raise NoPhonesError(f"all that the held-out speech says is {''.join(said)!r}; look at corpus.alignments")
    return table, phones


def frame_counts(table: pd.DataFrame) -> np.ndarray:
    """Frames of each utterance of ``table``, cut at ``LONGEST``: int64."""
    return np.array([audio.frame_count(min(int(samples), LONGEST)) for samples in table.samples])


def phone_labels(table: pd.DataFrame, phones: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The phone of each frame, end to end: int64, -1 where unknown; and the speaker of each frame."""
    counts = frame_counts(table)
    of_frames = units.frame_phones(phones, dict(zip(table.utterance, counts, strict=True)))
    names, codes = np.unique(of_frames, return_inverse=True)
    return codes - (names[0] == ""), np.repeat(table.speaker.to_numpy(dtype=str), counts)


def unit_quality(rows: np.ndarray, phones: np.ndarray, *, clusters: int, seed: int) -> dict[str, float]:
    """Quality of the units of one layer, ``rows`` [frames, width], against ``phones`` as of ``phone_labels``.

    Lloyd's k-means, 30 rounds at most from a k-means++ start; on these few minutes it ends at a lower inertia and a
    higher PNMI than the MiniBatchKMeans of fairseq's ``simple_kmeans``, in a fifth of the time. Below 100 clusters the
    best of several starts is taken. Each dimension is first divided by its standard deviation.

    >>> round(unit_quality(np.eye(3)[[0, 0, 1, 2]], np.array([5, 5, 6, -1]), clusters=3, seed=0)["pnmi"], 3)
    1.0
    """
    from sklearn.cluster import KMeans  # here, since what only checks a study imports this module, too

    scale = rows.std(0)
    scale[scale == 0] = 1
    model = KMeans(clusters, n_init=-(-100 // clusters), max_iter=30, random_state=seeds.derive(seed, "units") % 2**32)
    labels, labelled = model.fit_predict(rows / scale), phones >= 0
    return units.quality(labels[labelled], phones[labelled], seed)
