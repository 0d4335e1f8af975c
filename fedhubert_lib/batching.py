"""Batches of a client's speech, by seconds of audio: cropped to a few fixed lengths, never padded, drawn from seeds.

An utterance is as long as the longest of ``LENGTHS`` sixteenths of ``crop_seconds`` that it holds. Shuffled utterances
of one length make a batch of ``batch_seconds``; what is left over of a length joins the next shorter one, so that all
batches of a length have the same shape, and one batch of a pass may be smaller. Kernels compile for each new shape:
with a length for every batch that took a sixth of a small model's training. A pass takes a crop of each utterance, 90
to 99 % of it (of twelve utterances 63 %): with crops of 4, 5 and 15.6 s 31, 38 and 90 % of Mini LibriSpeech.

Each crop starts at a multiple of 320 samples, so that its labels are an exact slice: frame i covers samples
[320 i, 320 i + 400). Models with LayerNorm extractors could be padded, but the recipe crops them, too
(``pad_audio: false`` at every size).

Planning reads no audio; threads decode ahead of the training step (libsndfile releases the GIL), and what they have
decoded stays in memory as long as there is room: later rounds and passes decode nothing.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedhubert_lib import audio, masking, resources, seeds
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, frame_count
from fedhubert_lib.labels import Labels
from fedhubert_lib.params import LocalTraining

LENGTHS = 16
"""Lengths of crops, in equal steps up to ``crop_seconds``: more crop less away, fewer make fewer shapes of batches."""
AHEAD = 3
"""Batches kept ready, beside those that are being decoded."""
LONG = 40 * SAMPLE_RATE
"""Samples beyond which a recording counts as several utterances, one for each such stretch, and is read in slices."""

Keys = tuple[int, int, str]
"""Seed, round and client, from which every draw derives."""
LabelsByUtterance = Labels | Mapping[str, np.ndarray]
"""Integers [frames] at 50 Hz."""


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
    masked: int = -1
    """Masked frames, counted before the batch moves to a GPU, which need not be asked then; -1: to be counted."""

    def __post_init__(self) -> None:
        if self.masked < 0:
            object.__setattr__(self, "masked", int(self.mask.sum()))

    @property
    def seconds(self) -> float:
        """Seconds of audio in the batch."""
        return self.waveforms.numel() / SAMPLE_RATE

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with ``change`` of its tensors."""
        return replace(self, **{name: change(getattr(self, name)) for name in ("waveforms", "labels", "mask")})


class Plan(NamedTuple):
    """Which utterances make a batch, and which part of each: nothing read yet.

    ``rows`` of the table and the first sample of each crop, a multiple of 320: int64 [B]; every crop is of ``samples``:
    320 (T - 1) + 400.
    """

    rows: np.ndarray
    starts: np.ndarray
    samples: int


def plans(samples: np.ndarray, p: LocalTraining, keys: Keys) -> Iterator[Plan]:
    """Plans without end over utterances of ``samples`` [N] samples; a new shuffle whenever all have been used.

    Raises ValueError when no utterance is long enough, or a crop does not fit into a batch.
    """
    for generator, cut in _passes(samples, p, keys):
        for index in generator.permutation(len(cut)):
            rows, length = cut[index]
            yield Plan(rows, HOP * generator.integers(0, (samples[rows] - length) // HOP + 1), length)


def steps_of(samples: np.ndarray, passes: int, p: LocalTraining, keys: Keys) -> int:
    """How many ``plans`` make up ``passes`` passes over all utterances that are used."""
    return sum(len(cut) for _, cut in islice(_passes(samples, p, keys), passes))


def _passes(
    samples: np.ndarray, p: LocalTraining, keys: Keys
) -> Iterator[tuple[np.random.Generator, list[tuple[np.ndarray, int]]]]:
    """One shuffle of the usable utterances after another: its generator, and its batches (rows, length of crops)."""
    if p.crop_seconds > p.batch_seconds:
        raise ValueError(f"crop_seconds {p.crop_seconds} is more than batch_seconds {p.batch_seconds}: no clip fits")
    usable = np.flatnonzero(samples >= audio.SHORTEST)
    if not len(usable):
        raise ValueError(f"{keys[2]}: none of its {len(samples)} utterances is 1 s or longer")
    usable = np.repeat(usable, -(-samples[usable] // LONG))
    longest = p.crop_seconds * SAMPLE_RATE
    steps = np.clip(longest * np.arange(LENGTHS, 0, -1) / LENGTHS, min(audio.SHORTEST, longest), None)
    lengths = [HOP * (frame_count(int(length)) - 1) + RECEPTIVE_FIELD for length in steps]
    for shuffle in count():
        generator = seeds.numpy_generator(*keys, "batches", shuffle)
        order = generator.permutation(usable)
        yield generator, _cut(order, samples[order], lengths, int(p.batch_seconds * SAMPLE_RATE))


def _cut(order: np.ndarray, samples: np.ndarray, lengths: list[int], budget: int) -> list[tuple[np.ndarray, int]]:
    """Batches of the rows ``order``, which are ``samples`` long: of ``budget`` samples, cropped to one of ``lengths``
    (falling). Rows that fill no batch of their length go to the next; the last ones make a smaller batch."""
    fits = np.searchsorted(-np.array(lengths), -samples)
    batches, left = [], order[:0]
    for index in np.unique(fits):
        rows, clips = np.concatenate([left, order[fits == index]]), budget // lengths[index]
        full = len(rows) // clips * clips
        batches += [(some, lengths[index]) for some in rows[:full].reshape(-1, clips)]
        left = rows[full:]
    return [*batches, (left, lengths[index])] if len(left) else batches


def batches(
    table: pd.DataFrame,
    labels: LabelsByUtterance,
    p: LocalTraining,
    keys: Keys,
    steps: int,
    *,
    device: str = "cpu",
    normalise: bool = False,
) -> Iterator[Batch]:
    """``steps`` training batches of one client.

    Args:
        table, p: columns utterance, path, samples (``train.parquet``); sizes of batches and crops, and what is masked.
        keys: equal keys give equal batches, whatever else ran before.
        device: where they will be used. A GPU trains faster than one core decodes: for it as many threads as torch
            takes decode, and batches lie in pinned memory. A CPU's cores train.
        normalise: give each utterance zero mean and unit variance before it is cropped, as the recipe does for models
            with ``do_normalize``; the whole file is then read for it, or of a long recording a stretch of ``LONG``.

    Raises audio.AudioError on a file that cannot be read, and ValueError when an utterance has no labels, or another
    number of them than frames.
    >>> next(batches(table, labels, p, (0, 1, "client-000"), steps=1)).waveforms.shape
    torch.Size([2, 23760])
    """
    utterances, paths = table["utterance"].to_numpy(), table["path"].to_numpy()
    samples = table["samples"].to_numpy(dtype=np.int64)
    on_gpu = torch.device(device).type == "cuda"
    workers = torch.get_num_threads() if on_gpu else 1

    def load(step: int, plan: Plan) -> Batch:
        frames = frame_count(plan.samples)
        waveforms = torch.empty(len(plan.rows), plan.samples)
        targets = np.empty((len(plan.rows), frames), dtype=np.int64)
        mask = np.empty((len(plan.rows), frames), dtype=bool)
        for i, (row, start) in enumerate(zip(plan.rows, plan.starts, strict=True)):
            first, last, whole = int(start), int(start) + plan.samples, int(samples[row])
            begin = max(0, min(first, whole - LONG)) if normalise else first
            end = max(last, min(whole, begin + LONG)) if normalise else last
            stretch = _read(paths[row], begin, end, whole)
            waveforms[i] = (audio.normalise(stretch) if normalise else stretch)[first - begin : last - begin]
            targets[i] = _crop_labels(labels, utterances[row], whole, first, frames)
            draw = seeds.numpy_generator(*keys, "mask", step, i)
            mask[i] = masking.spans(frames, draw, p.mask_probability, p.mask_length)
        names = tuple(utterances[plan.rows])
        batch = Batch(waveforms, torch.from_numpy(targets), torch.from_numpy(mask), names, normalise)
        return batch.mapped(Tensor.pin_memory) if on_gpu else batch  # from where a GPU copies without anybody waiting

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for step, plan in enumerate(islice(plans(samples, p, keys), steps)):
                pending.append(pool.submit(load, step, plan))
                if len(pending) > workers + AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # the consumer may stop early
            pool.shutdown(cancel_futures=True)


_decoded: dict[tuple[str, int, int], Tensor] = {}
"""Audio by path, length and time of change: int16 where that is exact, as of FLAC and WAV; 115 MB hold an hour."""


@lru_cache(maxsize=1)
def _has_room(second: int) -> bool:
    """Half of the memory is free; the rest is for training and other workers. Once a ``second``: it takes time."""
    return resources.free_memory(torch.device("cpu")) > resources.memory_limit() // 2


def _read(path: str, start: int, stop: int, samples: int) -> Tensor:
    """``audio.read``, from memory where the file was decoded before; nothing is dropped, so what fits stays."""
    key = (path, samples, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)  # audio.read says that it is gone
    if (whole := _decoded.get(key)) is None:
        if samples > LONG or not _has_room(int(time.monotonic())):
            return audio.read(path, start, stop, samples)
        whole = audio.read(path, samples=samples)
        integers = (whole * 32_768).to(torch.int16)
        whole = _decoded[key] = integers if torch.equal(integers.float() / 32_768, whole) else whole
    return whole[start:stop] if whole.dtype == torch.float32 else whole[start:stop].float().div_(32_768)


def _crop_labels(labels: LabelsByUtterance, utterance: str, samples: int, start: int, frames: int) -> np.ndarray:
    """The labels of ``frames`` frames from sample ``start`` (a multiple of 320) on."""
    try:
        whole = labels[utterance]
    except KeyError:
        raise ValueError(f"{utterance}: has no labels; run 02_kmeans again for this partition") from None
    if len(whole) != frame_count(samples):
        raise ValueError(f"{utterance}: {len(whole)} labels for {frame_count(samples)} frames; run 02_kmeans again")
    return whole[start // HOP : start // HOP + frames]
