"""Keyword spotting with a frozen encoder: SUPERB's probe on Speech Commands clips.

s3prl learns a weighted sum of the encoder's layers, projects it to 256, averages over time and classifies. Averaging
over time commutes with the sum and with the projection, so the layers can be averaged first: one row of
[layers, width] per clip is extracted once, kept, and every probe trains on these rows alone.

Clips are brought to one second before they are encoded. A clip's figures then depend on no other clip: with a
group-norm encoder, padding to the longest of a batch changes the features themselves.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhubert_lib import audio, files, seeds
from fedhubert_lib.evaluation.encoders import Encoder

CLIP_SAMPLES = audio.SAMPLE_RATE
PROJECTION = 256
SPLITS = ("train", "validation", "test")


class KeywordError(ValueError):
    """Clips that no fair figure can be computed from."""


def read_clips(path: Path) -> pd.DataFrame:
    """The table of clips, ``keywords.parquet``: clip, path, word, speaker, split, sorted by clip.

    Raises KeywordError when a split is empty, when a word is missing from a split, or when a speaker is in two splits
    (the official lists never do this; the accuracy would then not be that of unseen voices).
    """
    if not path.is_file():
        raise KeywordError(f"{path} is missing; run the corpus stage with a keywords corpus first")
    clips = pd.read_parquet(path).sort_values("clip", ignore_index=True)
    words = set(clips.word)
    for split in SPLITS:
        missing = words - set(clips.word[clips.split == split])
        if missing == words:
            raise KeywordError(
                f"{path}: no clip in the {split} split; are validation_list.txt and testing_list.txt there?"
            )
        if missing:
            raise KeywordError(f"{path}: no {split} clip of {', '.join(sorted(missing))}; fetch the corpus again")
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        both = set(clips.speaker[clips.split == one]) & set(clips.speaker[clips.split == other])
        if both:
            raise KeywordError(f"{path}: speaker {min(both)} is in {one} and in {other}; use the official lists")
    return clips


def one_second(waveform: Tensor) -> Tensor:
    """``waveform`` [samples] as exactly 16,000 samples: zeros after it, or its middle second."""
    spare = len(waveform) - CLIP_SAMPLES
    return waveform[spare // 2 : spare // 2 + CLIP_SAMPLES] if spare > 0 else functional.pad(waveform, (0, -spare))


def pooled(
    encoder: Encoder,
    clips: pd.DataFrame,
    path: Path,
    *,
    batch: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Layers of every clip averaged over time, float32 [clips, layers, width], memory-mapped from ``path`` (.npy).

    ``path`` is written whole or not at all; when it is there it is read back, so its name must say what made it.
    """
    if not path.exists():
        with files.atomic(path) as temporary:
            rows = None
            for start, waveforms in _batches(clips, batch):
                block = torch.stack([layer.float().mean(1) for layer in encoder(waveforms)], dim=1).cpu().numpy()
                if not np.isfinite(block).all():
                    raise KeywordError(
                        f"features of clip {clips['clip'].iloc[start]} are not finite; is the checkpoint sound?"
                    )
                if rows is None:
                    shape = (len(clips), *block.shape[1:])
                    rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
                rows[start : start + len(block)] = block
                if on_progress:
                    on_progress(start + len(block), len(clips))
            rows.flush()
            del rows
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(rows) != len(clips):
        raise KeywordError(f"{path} holds {len(rows)} clips where the table has {len(clips)}; remove the file")
    return rows


def _batches(clips: pd.DataFrame, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(clips), size):
        yield start, torch.stack([one_second(audio.read(path)) for path in clips.path.iloc[start : start + size]])


class Probe(nn.Module):
    """s3prl's weighted sum (softmax of ``layer_logits``), projection and classifier, on layers averaged over time."""

    def __init__(self, layers: int, width: int, classes: int) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.projection = nn.Linear(width, PROJECTION)
        self.classifier = nn.Linear(PROJECTION, classes)

    @property
    def layer_weights(self) -> Tensor:
        """Share of each layer in the weighted sum, [layers]."""
        return self.layer_logits.softmax(0)

    def forward(self, rows: Tensor) -> Tensor:
        """[clips, layers, width] to logits [clips, classes]."""
        return self.classifier(self.projection(torch.einsum("nlw,l->nw", rows, self.layer_weights)))


@dataclass(frozen=True)
class Task:
    """Rows, their classes, and which of them to train on, choose by and test on."""

    rows: np.ndarray
    """float32 [clips, layers, width]"""
    labels: np.ndarray
    """int64 [clips]"""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    classes: int


@dataclass(frozen=True)
class Outcome:
    """What one seed's probe gave."""

    accuracy: float
    validation_accuracy: float
    layer_weights: np.ndarray
    predicted: np.ndarray
    """class of each test clip, in the order of ``Task.test``"""


def task(rows: np.ndarray, clips: pd.DataFrame, words: list[str]) -> Task:
    """Keyword spotting over the official splits; class i is ``words[i]``."""
    where = {split: np.flatnonzero(clips.split == split) for split in SPLITS}
    labels = pd.Index(words).get_indexer(clips.word).astype(np.int64)
    if (labels < 0).any():
        raise KeywordError(f"word {clips.word[labels < 0].iloc[0]!r} is not among the classes {', '.join(words)}")
    return Task(rows, labels, **where, classes=len(words))


def probe(
    task: Task, seed: int, *, steps: int, rate: float, share: float = 1.0, batch: int = 32, standardise: bool = True
) -> Outcome:
    """Train one probe on ``share`` of the training clips and test it where its validation accuracy was best.

    As s3prl's ``speech_commands``: Adam at ``rate``, batches of 32, gradient norm 1, cross entropy, the checkpoint
    that is best on validation (looked at 20 times). ``standardise`` first scales each layer and dimension by the mean
    and deviation of the training rows, the same for every encoder, since a short training at one rate would
    otherwise judge the scale of the features (MFCC in tens, layers near one); False is s3prl to the letter.
    """
    rng = seeds.numpy_generator(seed, "probe", "clips")
    train = np.sort(rng.permutation(task.train)[: max(1, round(share * len(task.train)))])
    mean, deviation = _statistics(task.rows, train) if standardise else (np.float32(0), np.float32(1))

    def rows(of: np.ndarray) -> Tensor:
        return torch.from_numpy((task.rows[of] - mean) / deviation)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "probe", "weights"))
        module = Probe(*task.rows.shape[1:], task.classes)
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    labels = torch.from_numpy(task.labels)
    best, chosen = -1.0, copy.deepcopy(module)
    order = np.empty(0, dtype=np.int64)
    for step in range(1, steps + 1):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(train)])
        drawn, order = order[:batch], order[batch:]
        loss = functional.cross_entropy(module(rows(drawn)), labels[drawn])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step % max(1, steps // 20) == 0 or step == steps:
            accuracy = (_predict(module, rows, task.validation) == task.labels[task.validation]).mean()
            if accuracy > best:
                best, chosen = float(accuracy), copy.deepcopy(module)
    predicted = _predict(chosen, rows, task.test)
    return Outcome(
        accuracy=float((predicted == task.labels[task.test]).mean()),
        validation_accuracy=best,
        layer_weights=chosen.layer_weights.detach().numpy(),
        predicted=predicted,
    )


def confusion(outcomes: list[Outcome], task: Task) -> np.ndarray:
    """Test clips of class i taken for class j, int64 [classes, classes], summed over the seeds."""
    table = np.zeros((task.classes, task.classes), dtype=np.int64)
    for outcome in outcomes:
        np.add.at(table, (task.labels[task.test], outcome.predicted), 1)
    return table


def _statistics(rows: np.ndarray, train: np.ndarray, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    chunks = [train[start : start + chunk] for start in range(0, len(train), chunk)]
    mean = sum(rows[part].sum(0, dtype=np.float64) for part in chunks) / len(train)
    variance = sum(((rows[part] - mean) ** 2).sum(0) for part in chunks) / len(train)
    deviation = np.sqrt(variance)
    deviation[deviation == 0] = 1  # a constant dimension says nothing: it becomes 0
    return mean.astype(np.float32), deviation.astype(np.float32)


@torch.no_grad()
def _predict(module: Probe, rows: Callable[[np.ndarray], Tensor], of: np.ndarray, chunk: int = 4096) -> np.ndarray:
    return np.concatenate(
        [module(rows(of[start : start + chunk])).argmax(1).numpy() for start in range(0, len(of), chunk)]
    )
