"""Every hidden layer held against phones: by the units that its clusters are, and by a linear probe.

Speech that no client trained on: held-out speakers and test subsets, as far as its phones are known. One k-means per
layer and seed is fitted on these frames and scored on them; neither sees a phone, and with thousands of frames per
cluster fitting elsewhere changes nothing (HuBERT, Fig. 2: 1 h against 100 h moves PNMI by 0.01).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import MiniBatchKMeans

from fedhubert_lib import audio, files, seeds
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
    if not path.exists():
        with files.atomic(path) as temporary:
            rows, start = None, 0
            for index, (name, count) in enumerate(zip(table.path, counts, strict=True)):
                waveform = audio.read(name)[:LONGEST]
                block = torch.stack([layer[0].float() for layer in encoder(waveform[None])], dim=1).cpu().numpy()
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

    MiniBatchKMeans as in fairseq's ``simple_kmeans`` (k-means++, batches of 10,000 frames), with 5 starts, not 20. Each
    dimension is first divided by its deviation, for every system alike.
    """
    if len(rows) < clusters:
        raise ValueError(f"{len(rows)} frames cannot make {clusters} clusters; raise unit_minutes or lower clusters")
    deviation = rows.std(0)
    deviation[deviation == 0] = 1
    scaled = rows / deviation
    model = MiniBatchKMeans(
        clusters,
        batch_size=10_000,
        n_init=5,
        max_no_improvement=100,
        reassignment_ratio=0,
        random_state=seeds.derive(seed, "units") % 2**32,
    )
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
