"""Keyword spotting with a frozen encoder: SUPERB's probe on Speech Commands clips.

s3prl learns a weighted sum of the encoder's layers, projects it to 256, averages over time and classifies. Averaging
over time commutes with the sum and with the projection, so the layers can be averaged first: one row of
[layers, width] per clip is extracted once, kept, and every probe trains on these rows alone. Kept beside it is the
deviation over time, which the published probe leaves out and which says much of a word.

Clips are brought to one second before they are encoded. A clip's figures then depend on no other clip: with a
group-norm encoder, padding to the longest of a batch changes the features themselves.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhubert_lib import audio, files, hubert, seeds, threads
from fedhubert_lib.corpora import scan
from fedhubert_lib.evaluation.encoders import Encoder

CLIP_SAMPLES = audio.SAMPLE_RATE
PROJECTION = 256
SPLITS = ("train", "validation", "test")
NONE = np.empty(0, dtype=np.int64)
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten words of SUPERB's keyword spotting."""


class KeywordError(ValueError):
    """Clips that no fair figure can be computed from."""


def read_clips(path: Path) -> pd.DataFrame:
    """The table of clips, ``keywords.parquet``: clip, path, word, speaker, split, sorted by clip.

    Raises KeywordError when a split is empty, when a word has no clip to train or to test on, or when a speaker is in
    two splits (the official lists never do this; the accuracy would then not be that of unseen voices).
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
        if missing and split != "validation":
            raise KeywordError(f"{path}: no {split} clip of {', '.join(sorted(missing))}; fetch the corpus again")
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        both = set(clips.speaker[clips.split == one]) & set(clips.speaker[clips.split == other])
        if both:
            raise KeywordError(f"{path}: speaker {min(both)} is in {one} and in {other}; use the official lists")
    return clips


def superb(clips: pd.DataFrame, seed: int) -> pd.DataFrame:
    """SUPERB's twelve classes: ten commands, ``_unknown_`` and ``_silence_``, over the same speakers and splits.

    Of other words and of silence each split gets as many seeded clips as a command has on average. Silence is cut from
    the WAV files of ``_background_noise_`` beside the words' folders: from their first 80 % for training, a tenth for
    validation, the last tenth for testing; its column ``start`` is the first sample. Raises KeywordError when a command
    is missing, or the noise cannot be used.
    """
    if missing := sorted(set(COMMANDS) - set(clips.word)):
        raise KeywordError(f"no clip of {', '.join(missing)}; SUPERB's keyword spotting needs its ten commands")
    paths = noise(Path(clips.path.iloc[0]).parents[1])
    parts = [clips[clips.word.isin(COMMANDS)].assign(start=0)]
    for split, begin, end in (("train", 0.0, 0.8), ("validation", 0.8, 0.9), ("test", 0.9, 1.0)):
        own = clips[clips.split == split]
        count = round(own[own.word.isin(COMMANDS)].groupby("word").size().mean())
        others = own[~own.word.isin(COMMANDS)]
        drawn = seeds.numpy_generator(seed, "unknown", split).permutation(len(others))[:count]
        parts.append(others.iloc[np.sort(drawn)].assign(word="_unknown_", start=0))
        starts = [
            (path, start)
            for path in paths
            for samples in [soundfile.info(path).frames]
            for start in range(int(begin * samples), int(end * samples) - CLIP_SAMPLES + 1, CLIP_SAMPLES // 2)
        ]
        if not starts:
            raise KeywordError(f"{paths[0].parent}: too short to cut a second of {split} silence from")
        chosen = [starts[i] for i in seeds.numpy_generator(seed, "silence", split).permutation(len(starts))[:count]]
        silence = {
            "clip": [f"_silence_/{path.stem}-{start}" for path, start in chosen],
            "path": [str(path) for path, _ in chosen],
            "start": [start for _, start in chosen],
        }
        # Each file is a speaker of its own in each split: no voice is in it.
        speaker = [f"silence-{split}-{path.stem}" for path, _ in chosen]
        parts.append(pd.DataFrame(silence).assign(word="_silence_", speaker=speaker, split=split))
    return pd.concat(parts).sort_values("clip", ignore_index=True)


def noise(root: Path) -> list[Path]:
    """The WAV files in ``_background_noise_`` of a Speech Commands folder. Raises KeywordError if one is of no use."""
    folder = root / "_background_noise_"
    paths = [path for path in sorted(folder.glob("*.wav")) if not path.name.startswith(".")]  # ._NAME.wav of macOS
    if not paths:
        raise KeywordError(
            f"{folder}: no WAV file; SUPERB's silence is cut from them. Unpack that folder, or give task: words"
        )
    for path in paths:
        if reason := scan.header(str(path)).reason:
            raise KeywordError(f"{path}: {reason}; SUPERB's silence is cut from it. Convert it, or remove it")
    return paths


def waveforms(clips: pd.DataFrame) -> Tensor:
    """The clips as float32 [clips, 16000]; where there is a column ``start``, from there on."""
    if "start" not in clips:
        return torch.stack([one_second(audio.read(path)) for path in clips.path])
    read = []
    for path, start, word in zip(clips.path, clips.start, clips.word, strict=True):
        stop = start + CLIP_SAMPLES if word == "_silence_" else None
        read.append(one_second(audio.read(path, start, stop)))
    return torch.stack(read)


def one_second(waveform: Tensor) -> Tensor:
    """``waveform`` [samples] as exactly 16,000 samples: zeros after it, or its middle second."""
    spare = len(waveform) - CLIP_SAMPLES
    return waveform[spare // 2 : spare // 2 + CLIP_SAMPLES] if spare > 0 else functional.pad(waveform, (0, -spare))


def features(
    encoder: Encoder,
    clips: pd.DataFrame,
    path: Path,
    *,
    whole: np.ndarray = NONE,
    batch: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What every measure of words needs of ``encoder``, from one pass over the clips.

    Mean and deviation over time of the layers of every clip, float32 [2, clips, layers, width]; and the frames of the
    clips ``whole`` (indices), scaled to unit length, float16 [whole, layers, frames, width]. Both are memory-mapped
    from PATH-moments.npy and PATH-frames.npy, which are written whole or not at all; when they are there they are read
    back, so the name must say what made them.
    """
    paths = [path.with_name(f"{path.name}-{what}.npy") for what in ("moments", "frames")]
    kept = np.isin(np.arange(len(clips)), whole)

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        layers = encoder(waveforms(clips.iloc[start : start + batch]))
        frames = torch.stack([layer.float() for layer in layers], dim=1)
        block = torch.stack([frames.mean(2), frames.std(2, unbiased=False)]).cpu().numpy()
        if not np.isfinite(block).all():
            raise KeywordError(f"features of clip {clips['clip'].iloc[start]} are not finite; is the checkpoint sound?")
        units = functional.normalize(frames[torch.from_numpy(kept[start : start + batch])], dim=-1)
        return block, units.half().cpu().numpy()

    if not all(each.exists() for each in paths):
        with files.atomic(paths[0]) as moments, files.atomic(paths[1]) as frames:
            starts, filled = range(0, len(clips), batch), 0
            place = np.argsort(whole)  # of each kept clip, as the clips come
            for start, (block, own) in zip(starts, threads.each(encode, starts), strict=True):
                if start == 0:
                    shapes = (2, len(clips), *block.shape[2:]), (len(whole), *own.shape[1:])
                    rows = np.lib.format.open_memmap(moments, "w+", np.float32, shapes[0])
                    units = np.lib.format.open_memmap(frames, "w+", np.float16, shapes[1])
                rows[:, start : start + block.shape[1]] = block
                units[place[filled : filled + len(own)]] = own
                filled += len(own)
                if on_progress:
                    on_progress(start + block.shape[1], len(clips))
            del rows, units  # writes them
    rows, units = (np.load(each, mmap_mode="r", allow_pickle=False) for each in paths)
    if rows.shape[1] != len(clips) or len(units) != len(whole):
        raise KeywordError(f"{paths[0]} holds {rows.shape[1]} clips where the table has {len(clips)}; remove the file")
    return rows, units


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
    module, train, batches = draws(task, seed, share, batch)
    mean, deviation = _statistics(task.rows, train) if standardise else (np.float32(0), np.float32(1))

    def rows(of: np.ndarray) -> Tensor:
        return torch.from_numpy((task.rows[of] - mean) / deviation)

    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    labels = torch.from_numpy(task.labels)
    best, chosen = -1.0, copy.deepcopy(module)
    for step, drawn in enumerate(itertools.islice(batches, steps), start=1):
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


def draws(task: Task, seed: int, share: float, batch: int) -> tuple[Probe, np.ndarray, Iterator[np.ndarray]]:
    """What ``probe`` takes from ``seed``: its first weights, its training clips, and batches of them without end."""
    rng = seeds.numpy_generator(seed, "probe", "clips")
    train = np.sort(rng.permutation(task.train)[: max(1, round(share * len(task.train)))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "probe", "weights"))
        module = Probe(*task.rows.shape[1:], task.classes)
    return module, train, _drawn(train, rng, batch)


def _drawn(train: np.ndarray, rng: np.random.Generator, batch: int) -> Iterator[np.ndarray]:
    """Batches of indices: every clip once, in random order, then again."""
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(train)])
        yield order[:batch]
        order = order[batch:]


def fine_tune(
    model: hubert.Hubert, clips: pd.DataFrame, words: list[str], seed: int, *, steps: int, rate: float, batch: int = 32
) -> Outcome:
    """Train a copy of the whole ``model`` on the training clips and test it where its validation accuracy was best.

    As s3prl with ``-f -s last_hidden_state``: the last layer, averaged over time, through the same two linear layers;
    Adam, gradient norm 1. Validation is looked at five times. On the device of ``model``.
    """
    where = {split: np.flatnonzero(clips.split == split) for split in SPLITS}
    labels = torch.from_numpy(pd.Index(words).get_indexer(clips.word).astype(np.int64))
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "fine-tune"))
        head = nn.Sequential(nn.Linear(model.config.hidden_size, PROJECTION), nn.Linear(PROJECTION, len(words)))
        module = nn.ModuleDict({"model": copy.deepcopy(model), "head": head}).to(device)
        optimiser = torch.optim.Adam(module.parameters(), lr=rate)

        def logits(of: np.ndarray) -> Tensor:
            return module["head"](module["model"](waveforms(clips.iloc[of]).to(device)).last.mean(1)).cpu()

        @torch.no_grad()
        def predict(of: np.ndarray) -> np.ndarray:
            module.eval()
            parts = [logits(of[start : start + batch]).argmax(1) for start in range(0, len(of), batch)]
            return torch.cat(parts).numpy()

        batches = _drawn(where["train"], seeds.numpy_generator(seed, "fine-tune", "clips"), batch)
        best, chosen = -1.0, copy.deepcopy(module.state_dict())
        for step, drawn in enumerate(itertools.islice(batches, steps), start=1):
            module.train()
            optimiser.zero_grad()
            functional.cross_entropy(logits(drawn), labels[drawn]).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            if step % max(1, steps // 5) == 0 or step == steps:
                accuracy = (predict(where["validation"]) == labels[where["validation"]].numpy()).mean()
                if accuracy > best:
                    best, chosen = float(accuracy), copy.deepcopy(module.state_dict())
        module.load_state_dict(chosen)
        predicted = predict(where["test"])
    accuracy = float((predicted == labels[where["test"]].numpy()).mean())
    return Outcome(accuracy, best, np.eye(model.config.num_hidden_layers + 1)[-1], predicted)


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
