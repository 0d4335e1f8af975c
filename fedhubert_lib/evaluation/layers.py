"""Every hidden layer held against phones: by the units that its clusters are, and by a linear probe.

Speech that no client trained on: held-out speakers and test subsets, as far as its phones are known. K-means is fitted
on these frames and scored on them; it sees no phone, and with hundreds of frames per cluster fitting elsewhere changes
little (HuBERT, Fig. 2: 1 h against 100 h moves PNMI by 0.01).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans

from fedhubert_lib import audio, files, seeds, threads
from fedhubert_lib.evaluation import units
from fedhubert_lib.evaluation.encoders import Encoder

LONGEST = 30 * audio.SAMPLE_RATE
"""Samples of an utterance that are used: attention over minutes of speech would need more memory than training did."""


class NoPhonesError(ValueError):
    """There is no untrained-on speech with known phones."""


def held_out(run: Path, minutes: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Utterances no client has, about ``minutes`` of them drawn by ``seed``, and their phones.

    Raises NoPhonesError, which says what is missing.
    """
    path = run / "00_corpus" / "phones.parquet"
    phones = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=["utterance"])
    manifest = pd.read_parquet(run / "00_corpus" / "manifest.parquet")
    table = manifest[manifest.split == "test"]
    heldout = run / "01_partition" / "heldout.parquet"
    if heldout.is_file():
        table = pd.concat([table, pd.read_parquet(heldout)]).drop_duplicates("utterance")
    table = table[table.utterance.isin(set(phones.utterance)) & (table.samples >= audio.RECEPTIVE_FIELD)]
    if table.empty:
        raise NoPhonesError(
            "no utterance of a test subset or of a held-out speaker has phones; give corpus.alignments, or keep"
            " speakers out with partition.heldout_speakers"
        )
    table = table.sort_values("utterance").iloc[seeds.numpy_generator(seed, "held-out").permutation(len(table))]
    seconds = table.samples.clip(upper=LONGEST).cumsum() / audio.SAMPLE_RATE
    table = table[seconds.shift(fill_value=0) < 60 * minutes].sort_values("utterance", ignore_index=True)
    return table, phones[phones.utterance.isin(set(table.utterance))]


def frames(
    encoder: Encoder, table: pd.DataFrame, path: Path, on_progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Frames of all utterances end to end, float32 [frames, layers, width], memory-mapped from ``path`` (.npy).

    Utterances pass one by one, so that none depends on another; each is cut at 30 s. As with ``keywords.pooled``, the
    file is read back when it is there.
    """
    counts = frame_counts(table)

    def encode(name: str) -> np.ndarray:
        layers = encoder(audio.read(name)[None, :LONGEST])
        return torch.stack([layer[0].float() for layer in layers], dim=1).cpu().numpy()

    if not path.exists():
        with files.atomic(path) as temporary:
            rows, start = None, 0
            blocks = threads.each(encode, table.path)
            for index, (name, count, block) in enumerate(zip(table.path, counts, blocks, strict=True)):
                if len(block) != count:
                    raise ValueError(f"{name}: {len(block)} frames where {count} were expected; scan the corpus again")
                if rows is None:
                    shape = (int(counts.sum()), *block.shape[1:])
                    rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
                rows[start : start + count] = block
                start += count
                if on_progress:
                    on_progress(index + 1, len(table))
            rows.flush()
            del rows
    return np.load(path, mmap_mode="r", allow_pickle=False)


def frame_counts(table: pd.DataFrame) -> np.ndarray:
    """Frames of each utterance as ``frames`` lays them out, int64."""
    return np.array([audio.frame_count(min(int(samples), LONGEST)) for samples in table.samples])


def unit_quality(
    rows: np.ndarray, table: pd.DataFrame, phones: pd.DataFrame, *, clusters: int, seed: int
) -> dict[str, float]:
    """Quality of the units of one layer, ``rows`` [frames, width], laid out as by ``frames``; see ``units``.

    Lloyd's k-means, 30 rounds at most from a k-means++ start; on these few minutes it ends at a lower inertia and a
    higher PNMI than the MiniBatchKMeans of fairseq's ``simple_kmeans``, in a fifth of the time. Below 100 clusters a
    start matters more: the best of several is taken. Each dimension is first divided by its deviation, for every system
    alike.
    """
    if len(rows) < clusters:
        raise ValueError(f"{len(rows)} frames cannot make {clusters} clusters; raise unit_minutes or lower clusters")
    deviation = rows.std(0)
    deviation[deviation == 0] = 1
    scaled = rows / deviation
    model = KMeans(clusters, n_init=-(-100 // clusters), max_iter=30, random_state=seeds.derive(seed, "units") % 2**32)
    sequence = model.fit_predict(scaled)
    labels = dict(zip(table.utterance, np.split(sequence, np.cumsum(frame_counts(table))[:-1]), strict=True))
    return units.quality_of_counts(units.count_phones(phones, labels, clusters)[1], seed)


def phone_labels(table: pd.DataFrame, phones: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The phone of each frame, int64, -1 where none is known, and its speaker; laid out as by ``frames``."""
    codes = pd.factorize(phones.phone, sort=True)[0]
    by_utterance = dict(list(phones.assign(code=codes).groupby("utterance")))
    counts, labels = frame_counts(table), []
    for utterance, count in zip(table.utterance, counts, strict=True):
        rows = by_utterance[utterance].sort_values("start_sample")
        segment = units.frame_phones(rows.start_sample.to_numpy(), rows.end_sample.to_numpy(), count)
        labels.append(np.where(segment < 0, -1, rows.code.to_numpy()[segment]))
    return np.concatenate(labels), np.repeat(table.speaker.to_numpy(dtype=str), counts)
