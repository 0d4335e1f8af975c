"""Batches of a client's speech, by seconds of audio: cropped to the shortest clip, never padded, drawn from seeds.

Utterances are shuffled, sorted by length within pools of some batches, cut into batches of ``batch_seconds``, and the
batches of a pool shuffled again. Each clip is cropped to the length of the shortest of its batch, at a start that is a
multiple of 320 samples, so that its labels are an exact slice: frame i covers samples [320 i, 320 i + 400).

Models with LayerNorm extractors could be padded, but the recipe crops them, too (``pad_audio: false`` at every size).

Planning reads no audio; threads decode ahead of the training step (libsndfile releases the GIL).
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedhubert_lib import audio, files, masking, seeds
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, frame_count

POOL = 32
"""Batches per pool of similar lengths: larger crops less away, smaller mixes lengths more."""


@dataclass(frozen=True)
class Batch:
    """Clips of equal length with their targets."""

    waveforms: Tensor
    """float32 [B, S]."""
    labels: Tensor
    """int64 [B, T], one label per 50 Hz frame."""
    mask: Tensor
    """bool [B, T], True where the frame is hidden from the model."""
    utterances: tuple[str, ...]
    """Names of the B utterances, for error messages."""
    normalised: bool = False
    """Whether each clip was cut out of an utterance of zero mean and unit variance."""

    @property
    def seconds(self) -> float:
        """Seconds of audio in the batch."""
        return self.waveforms.numel() / SAMPLE_RATE

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``."""
        return replace(
            self,
            waveforms=self.waveforms.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Plan:
    """Which utterances make a batch, and which part of each: nothing read yet."""

    step: int
    rows: np.ndarray
    """int64 [B], rows of the table."""
    starts: np.ndarray
    """int64 [B], first sample of each crop, a multiple of 320."""
    samples: int
    """Length of every crop: 320 (T - 1) + 400."""


def plans(
    samples: np.ndarray,
    *,
    seed: int,
    round: int,
    client: str,
    steps: int,
    batch_seconds: float,
    crop_seconds: float,
    minimum_seconds: float = 1.0,
) -> Iterator[Plan]:
    """``steps`` plans over utterances of ``samples`` [N] samples; a new shuffle whenever all have been used.

    An utterance shorter than ``minimum_seconds`` is not used: it would crop the whole batch (fairseq drops below 2 s).
    Raises ValueError when none is left, or a crop does not fit into a batch.
    """
    lengths = np.minimum(samples, int(crop_seconds * SAMPLE_RATE))
    step = 0
    for generator, pools in _passes(samples, seed, round, client, batch_seconds, crop_seconds, minimum_seconds):
        for pool in pools:
            for index in generator.permutation(len(pool)):
                rows = pool[index]
                length = HOP * (frame_count(int(lengths[rows].min())) - 1) + RECEPTIVE_FIELD
                starts = HOP * generator.integers(0, (samples[rows] - length) // HOP + 1)
                yield Plan(step, rows, starts, length)
                step += 1
                if step == steps:
                    return


def steps_of(
    samples: np.ndarray,
    passes: int,
    *,
    seed: int,
    round: int,
    client: str,
    batch_seconds: float,
    crop_seconds: float,
    minimum_seconds: float = 1.0,
) -> int:
    """How many ``plans`` make up ``passes`` passes over all utterances that are used."""
    every = _passes(samples, seed, round, client, batch_seconds, crop_seconds, minimum_seconds)
    return sum(len(pool) for _, pools in islice(every, passes) for pool in pools)


def _passes(
    samples: np.ndarray,
    seed: int,
    round: int,
    client: str,
    batch_seconds: float,
    crop_seconds: float,
    minimum_seconds: float,
) -> Iterator[tuple[np.random.Generator, Iterator[list[np.ndarray]]]]:
    """One shuffle of the usable utterances after another: its generator, and its pools of batches."""
    if crop_seconds > batch_seconds:
        raise ValueError(f"crop_seconds {crop_seconds} is more than batch_seconds {batch_seconds}: no clip would fit")
    usable = np.flatnonzero(samples >= max(minimum_seconds * SAMPLE_RATE, RECEPTIVE_FIELD))
    if not len(usable):
        raise ValueError(f"{client}: none of its {len(samples)} utterances is {minimum_seconds} s or longer")
    lengths = np.minimum(samples, int(crop_seconds * SAMPLE_RATE))
    for shuffle in count():
        generator = seeds.numpy_generator(seed, round, client, "batches", shuffle)
        yield generator, _pools(generator.permutation(usable), lengths, int(batch_seconds * SAMPLE_RATE))


def _pools(order: np.ndarray, lengths: np.ndarray, budget: int) -> Iterator[list[np.ndarray]]:
    """Lists of batches (arrays of rows) of similar length, each at most ``budget`` samples once cropped."""
    cumulated = np.cumsum(lengths[order])
    edges = np.searchsorted(cumulated, np.arange(POOL * budget, cumulated[-1], POOL * budget))
    for pool in np.split(order, edges):
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        batches, first = [], 0
        for last in range(1, len(pool) + 1):
            # Sorted from long to short, so the next row is the shortest and sets the crop.
            if last == len(pool) or (last + 1 - first) * lengths[pool[last]] > budget:
                batches.append(pool[first:last])
                first = last
        if batches:
            yield batches


def batches(
    table: pd.DataFrame,
    labels: Mapping[str, np.ndarray],
    *,
    seed: int,
    round: int,
    client: str,
    steps: int,
    batch_seconds: float,
    crop_seconds: float,
    mask_probability: float = 0.8,
    mask_length: int = 10,
    minimum_seconds: float = 1.0,
    workers: int = 1,
    ahead: int = 4,
    decoded: Path | None = None,
    normalise: bool = False,
) -> Iterator[Batch]:
    """``steps`` training batches of one client.

    Args:
        table: columns utterance, path, samples (the client's ``train.parquet``).
        labels: utterance to its 50 Hz labels, ``labels.Labels`` or a dict.
        seed, round, client: what every draw derives from; equal keys give equal batches, whatever else ran before.
        batch_seconds: audio per batch, at most.
        crop_seconds: longest crop of an utterance.
        mask_probability, mask_length: as in ``masking.spans``.
        workers: decoding threads.
        ahead: batches kept decoded in advance.
        decoded: a folder that ``decode`` filled with this table's audio; default: the files are decoded each time.
        normalise: give each utterance zero mean and unit variance before it is cropped, as the recipe does for models
            with ``do_normalize``; the whole file is then read for it.

    Raises audio.AudioError on a file that cannot be read, and ValueError when an utterance has no labels, or another
    number of them than frames.
    """
    utterances, paths = table["utterance"].to_numpy(), table["path"].to_numpy()
    samples = table["samples"].to_numpy(dtype=np.int64)
    cache = _Decoded(decoded) if decoded else None

    def load(plan: Plan) -> Batch:
        frames = frame_count(plan.samples)
        waveforms = torch.empty(len(plan.rows), plan.samples)
        targets = np.empty((len(plan.rows), frames), dtype=np.int64)
        mask = np.empty((len(plan.rows), frames), dtype=bool)
        for i, (row, start) in enumerate(zip(plan.rows, plan.starts, strict=True)):
            first, last = int(start), int(start) + plan.samples
            read = partial(cache.read, utterances[row]) if cache else partial(audio.read, paths[row])
            if normalise:
                waveforms[i] = audio.normalise(read(0, int(samples[row])))[first:last]
            else:
                waveforms[i] = read(first, last)
            targets[i] = _crop_labels(labels, utterances[row], int(samples[row]), int(start), frames)
            draw = seeds.numpy_generator(seed, round, client, "mask", plan.step, i)
            mask[i] = masking.spans(frames, draw, mask_probability, mask_length)
        names = tuple(utterances[plan.rows])
        return Batch(waveforms, torch.from_numpy(targets), torch.from_numpy(mask), names, normalise)

    planned = plans(
        samples,
        seed=seed,
        round=round,
        client=client,
        steps=steps,
        batch_seconds=batch_seconds,
        crop_seconds=crop_seconds,
        minimum_seconds=minimum_seconds,
    )
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for plan in planned:
                pending.append(pool.submit(load, plan))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # the consumer may stop early
            for future in pending:
                future.cancel()


def decode(table: pd.DataFrame, folder: Path) -> None:
    """Write the decoded audio of a client's ``table`` into ``folder``, for ``batches(decoded=folder)``: 115 MB an hour.

    Pays where a GPU takes more than the processor's cores decode (a few hundred seconds of FLAC per second and core).
    ``samples.i16`` holds all clips one after the other as 16-bit integers, which FLAC and WAV speech are;
    ``index.parquet`` says where each begins. Raises ValueError on a file of finer samples.
    """
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        with (temporary / "samples.i16").open("wb") as stream:
            for path in table["path"]:
                integers = audio.read(path).mul_(32_768)
                if not torch.equal(integers, integers.round()):
                    raise ValueError(f"{path}: its samples are finer than 16 bits; train from the files themselves")
                stream.write(integers.to(torch.int16).numpy().astype("<i2").tobytes())
        offsets = np.concatenate([[0], np.cumsum(table["samples"].to_numpy(dtype=np.int64))[:-1]])
        index = pd.DataFrame({"utterance": table["utterance"].to_numpy(), "offset": offsets})
        index.to_parquet(temporary / "index.parquet", index=False)


class _Decoded:
    """Audio that ``decode`` wrote, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        index = pd.read_parquet(folder / "index.parquet")
        self.offsets = dict(zip(index["utterance"], index["offset"], strict=True))
        self.samples = np.memmap(folder / "samples.i16", dtype="<i2", mode="r")

    def read(self, utterance: str, start: int, stop: int) -> Tensor:
        offset = self.offsets[utterance]
        return torch.from_numpy(self.samples[offset + start : offset + stop].astype(np.float32)) / 32_768


def _crop_labels(labels: Mapping[str, np.ndarray], utterance: str, samples: int, start: int, frames: int) -> np.ndarray:
    """The labels of ``frames`` frames from sample ``start`` (a multiple of 320) on."""
    try:
        whole = labels[utterance]
    except KeyError:
        raise ValueError(f"{utterance}: has no labels; run 02_kmeans again for this partition") from None
    if len(whole) != frame_count(samples):
        raise ValueError(
            f"{utterance}: {len(whole)} labels for {frame_count(samples)} frames ({samples} samples); labels must be at"
            " 50 Hz and made from the same audio: run 02_kmeans again"
        )
    return whole[start // HOP : start // HOP + frames]
