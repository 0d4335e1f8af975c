"""Keyword spotting with a frozen encoder: SUPERB's probe on Speech Commands clips.

s3prl learns a weighted sum of the encoder's layers, projects it to 256, averages over time and classifies. Averaging
over time commutes with the sum and with the projection, so the layers can be averaged first: one row of
[layers, width] per clip is extracted once, kept, and every probe trains on these rows alone.

Clips are brought to one second before they are encoded. A clip's features then depend on no other clip: with a
group-norm encoder, padding to the longest of a batch changes the features themselves.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from fedhubert_lib import audio, hubert, seeds

CLIP_SAMPLES = audio.SAMPLE_RATE
PROJECTION = 256
BATCH = 32
SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Each split with the part of every noise file that its silence is cut from."""
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
    for split, other in itertools.combinations(SPLITS, 2):
        both = set(clips.speaker[clips.split == split]) & set(clips.speaker[clips.split == other])
        if both:
            raise KeywordError(f"{path}: speaker {min(both)} is in {split} and in {other}; use the official lists")
    return clips


def superb(clips: pd.DataFrame, seed: int, *, silence: bool = True) -> pd.DataFrame:
    """SUPERB's twelve classes: ten commands, ``_unknown_`` and ``_silence_``, over the same speakers and splits.

    Of other words and of silence each split gets as many seeded clips as a command has on average. Silence is cut from
    the WAV files of ``_background_noise_`` beside the words' folders (``noise``): from their first 80 % for training, a
    tenth for validation, the last tenth for testing; its column ``start`` is the first sample. There are eleven
    classes without ``silence``. Raises KeywordError when a command is missing, or the noise cannot be used.
    """
    if missing := sorted(set(COMMANDS) - set(clips.word)):
        raise KeywordError(f"no clip of {', '.join(missing)}; SUPERB's keyword spotting needs its ten commands")
    files = noise(Path(clips.path.iloc[0]).parents[1]) if silence else {}
    is_command = clips.word.isin(COMMANDS)
    parts = [clips[is_command].assign(start=0)]
    for split in SPLITS:
        inside = clips.split == split
        count = round(clips[inside & is_command].groupby("word").size().mean())
        others = clips[inside & ~is_command]
        drawn = seeds.numpy_generator(seed, "unknown", split).permutation(len(others))[:count]
        parts.append(others.iloc[np.sort(drawn)].assign(word="_unknown_", start=0))
        if silence:
            parts.append(_silence(files, split, count, seed))
    return pd.concat(parts).sort_values("clip", ignore_index=True)


def _silence(files: dict[Path, int], split: str, count: int, seed: int) -> pd.DataFrame:
    """At most ``count`` seconds of noise, half a second apart or more, as clips of ``split``."""
    begin, end = SPLITS[split]
    rows = []
    for path, samples in files.items():
        for start in range(int(begin * samples), int(end * samples) - CLIP_SAMPLES + 1, CLIP_SAMPLES // 2):
            # Each file is another speaker in each split: no voice is in it.
            speaker = f"silence-{split}-{path.stem}"
            rows.append((f"_silence_/{path.stem}-{start}", str(path), start, "_silence_", speaker, split))
    if not rows:
        raise KeywordError(f"{min(files).parent}: too short to cut a second of {split} silence from")
    drawn = seeds.numpy_generator(seed, "silence", split).permutation(len(rows))[:count]
    table = pd.DataFrame(rows, columns=["clip", "path", "start", "word", "speaker", "split"])
    return table.iloc[drawn]


_GENERATOR = threading.Lock()
"""Held while a probe draws its weights: torch's generator is one for all threads, which ``measures`` works in."""


def noise(root: Path) -> dict[Path, int]:
    """The WAV files in ``_background_noise_`` of a Speech Commands folder, with their samples.

    Raises KeywordError if there is none, AudioError if one is no 16 kHz mono.
    """
    folder = root / "_background_noise_"
    paths = [path for path in sorted(folder.glob("*.wav")) if not path.name.startswith(".")]  # ._NAME.wav of macOS
    if not paths:
        raise KeywordError(
            f"{folder}: no WAV file; SUPERB's silence is cut from them. Unpack that folder, or give task: words"
        )
    return {path: len(audio.read(path)) for path in paths}


def waveforms(clips: pd.DataFrame) -> Tensor:
    """The clips as float32 [clips, 16000]; silence from its ``start`` on."""
    starts = clips.start if "start" in clips else itertools.repeat(0, len(clips))
    read = []
    for path, start, word in zip(clips.path, starts, clips.word, strict=True):
        read.append(one_second(audio.read(path, start, start + CLIP_SAMPLES if word == "_silence_" else None)))
    return torch.stack(read)


def one_second(waveform: Tensor) -> Tensor:
    """``waveform`` [samples] as exactly 16,000 samples: zeros after it, or its middle second."""
    spare = len(waveform) - CLIP_SAMPLES
    return waveform[spare // 2 : spare // 2 + CLIP_SAMPLES] if spare > 0 else functional.pad(waveform, (0, -spare))


class Probe(nn.Module):
    """s3prl's weighted sum (softmax of ``layer_logits``), projection and classifier, on layers averaged over time."""

    def __init__(self, layers: int, width: int, classes: int) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.projection = nn.Linear(width, PROJECTION)
        self.classifier = nn.Linear(PROJECTION, classes)

    @property
    def layer_weights(self) -> Tensor:
        """Weight of each layer in the sum, [layers]; together 1."""
        return self.layer_logits.softmax(0)

    def forward(self, rows: Tensor) -> Tensor:
        """[clips, layers, width] to logits [clips, classes]."""
        return self.classifier(self.projection(torch.einsum("nlw,l->nw", rows, self.layer_weights)))


@dataclass(frozen=True)
class Task:
    """Classes of clips, and which clips to train on, choose by and test on."""

    words: list[str]
    """The classes, sorted."""
    labels: np.ndarray
    """Of each clip, an index into ``words``: int64 [clips]."""
    train: np.ndarray
    """Indices of clips, as ``validation`` and ``test``."""
    validation: np.ndarray
    test: np.ndarray


class Outcome(NamedTuple):
    """The result of training with one seed."""

    accuracy: float
    predicted: np.ndarray
    """class of each test clip, in the order of ``Task.test``"""
    validation_accuracy: float
    layer_weights: np.ndarray | None = None


def task(clips: pd.DataFrame) -> Task:
    """Keyword spotting of all words in ``clips`` over the official splits."""
    words, labels = np.unique(clips.word.to_numpy(str), return_inverse=True)
    return Task(words.tolist(), labels, **{split: np.flatnonzero(clips.split == split) for split in SPLITS})


def probe(
    rows: np.ndarray,
    task: Task,
    seed: int,
    *,
    steps: int,
    rate: float,
    fraction: float = 1.0,
    standardise: bool = True,
) -> Outcome:
    """Train one probe on a ``fraction`` of the training clips and test it where its validation accuracy was best.

    ``rows``: float32 [clips, layers, width]. As s3prl's ``speech_commands``: Adam at ``rate``, batches of 32, gradient
    norm 1, cross entropy, the checkpoint that is best on validation (looked at 20 times). ``standardise`` first scales
    each layer and dimension by the mean and standard deviation of the training rows, the same for every encoder, since
    a short training at one rate would otherwise judge the scale of the features (MFCC in tens, layers near one); False
    is s3prl to the letter.
    """
    module, train, batches = draws(rows, task, seed, fraction)
    mean, scale = np.float32(0), np.float32(1)
    if standardise:
        scaler = StandardScaler()
        for part in np.split(train, range(4096, len(train), 4096)):
            scaler.partial_fit(rows[part].reshape(len(part), -1))
        mean, scale = (each.reshape(rows.shape[1:]).astype(np.float32) for each in (scaler.mean_, scaler.scale_))

    def logits(clips: np.ndarray) -> Tensor:
        return module(torch.from_numpy((rows[clips] - mean) / scale))

    outcome = _fit(module, logits, task, batches, steps=steps, rate=rate, looks=20)
    return outcome._replace(layer_weights=module.layer_weights.detach().numpy())


def training_clips(task: Task, seed: int, fraction: float) -> tuple[np.ndarray, np.random.Generator]:
    """``fraction`` of the training clips, sorted, drawn by ``seed``; and the generator for what is drawn next."""
    rng = seeds.numpy_generator(seed, "probe", "clips")
    return np.sort(rng.permutation(task.train)[: max(1, round(fraction * len(task.train)))]), rng


def draws(rows: np.ndarray, task: Task, seed: int, fraction: float) -> tuple[Probe, np.ndarray, Iterator[np.ndarray]]:
    """Draws of ``seed`` for ``probe``: its first weights, its training clips, and batches of them without end."""
    train, rng = training_clips(task, seed, fraction)
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "probe", "weights"))
        module = Probe(*rows.shape[1:], len(task.words))
    return module, train, _batches(train, rng)


def fine_tune(model: hubert.Hubert, clips: pd.DataFrame, task: Task, seed: int, *, steps: int, rate: float) -> Outcome:
    """Train a copy of the whole ``model`` on the training clips and test it where its validation accuracy was best.

    As s3prl with ``-f -s last_hidden_state``: the last layer, averaged over time, through the same two linear layers;
    Adam, gradient norm 1. Validation is looked at five times. On the device of ``model``.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "fine-tune"))
        head = nn.Sequential(nn.Linear(model.config.hidden_size, PROJECTION), nn.Linear(PROJECTION, len(task.words)))
        module = nn.ModuleDict({"model": copy.deepcopy(model), "head": head}).to(device)

        def logits(indices: np.ndarray) -> Tensor:
            return module["head"](module["model"](waveforms(clips.iloc[indices]).to(device)).last.mean(1)).cpu()

        batches = _batches(task.train, seeds.numpy_generator(seed, "fine-tune", "clips"))
        return _fit(module, logits, task, batches, steps=steps, rate=rate, looks=5, chunk=BATCH)


def _batches(train: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of indices: every clip once, in random order, then again."""
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(train)])
        yield order[:BATCH]
        order = order[BATCH:]


def _fit(
    module: nn.Module,
    logits: Callable[[np.ndarray], Tensor],
    task: Task,
    batches: Iterator[np.ndarray],
    *,
    steps: int,
    rate: float,
    looks: int,
    chunk: int = 4096,
) -> Outcome:
    """Train ``module``, leave it as it was when its validation accuracy was best, and test it."""
    optimiser, labels = torch.optim.Adam(module.parameters(), lr=rate), torch.from_numpy(task.labels)

    @torch.no_grad()
    def tested(clips: np.ndarray) -> tuple[float, np.ndarray]:
        module.eval()
        parts = np.split(clips, range(chunk, len(clips), chunk))
        predicted = np.concatenate([logits(part).argmax(1).numpy() for part in parts])
        return float((predicted == task.labels[clips]).mean()), predicted

    best, chosen = -1.0, module.state_dict()
    for step, drawn in enumerate(itertools.islice(batches, steps), start=1):
        module.train()
        optimiser.zero_grad()
        functional.cross_entropy(logits(drawn), labels[drawn]).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step % max(1, steps // looks) == 0 or step == steps:
            accuracy, _ = tested(task.validation)
            if accuracy > best:
                best, chosen = accuracy, copy.deepcopy(module.state_dict())
    module.load_state_dict(chosen)
    return Outcome(*tested(task.test), validation_accuracy=best)
