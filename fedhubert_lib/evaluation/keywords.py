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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhubert_lib import audio, hubert, seeds

CLIP_SAMPLES = audio.SAMPLE_RATE
PROJECTION = 256
BATCH, CHUNK = 32, 4096
"""Clips per training step, and clips that are standardised or tested at once."""
SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Each split with the part of every noise file that its silence is cut from."""
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten words of SUPERB's keyword spotting."""
NOISE = "_background_noise_"
"""The folder of Speech Commands that silence is cut from, beside those of the words."""
SILENCE = "_silence_"
"""The word of a clip of that noise."""
_DRAWING = threading.Lock()
"""Held while a probe draws its weights: torch has one generator for all threads."""


class KeywordError(ValueError):
    """Clips that no fair figure can be computed from."""


def read_clips(path: Path) -> pd.DataFrame:
    """The table of clips, ``keywords.parquet``: clip, path, word, speaker, split, sorted by clip.

    Raises KeywordError when there is none, or, of a part of the corpus, no clip to validate on.
    """
    if not path.is_file():
        raise KeywordError(f"{path} is missing; run the corpus stage with a keywords corpus first")
    clips = pd.read_parquet(path).sort_values("clip", ignore_index=True)
    if "validation" not in set(clips.split):  # as 00 of an earlier version may have left it
        raise KeywordError(f"{path}: no clip of the validation split; fetch the corpus again, with its lists")
    return clips


def superb(clips: pd.DataFrame, seed: int, *, silence: bool = True) -> pd.DataFrame:
    """SUPERB's twelve classes: ten commands, ``_unknown_`` and ``_silence_``, over the same speakers and splits.

    Of other words and of silence each split gets as many seeded clips as a command has on average, at most. The column
    ``start`` is the first sample. There are eleven classes without ``silence``. Raises KeywordError when a command or
    all other words are missing, a split has none, or the noise that silence is cut from cannot be used.
    """
    if missing := sorted({*COMMANDS, "other words"} - set(clips.word.where(clips.word.isin(COMMANDS), "other words"))):
        raise KeywordError(f"no clip of {', '.join(missing)}; SUPERB needs its ten commands and other words")
    commands = clips[clips.word.isin(COMMANDS)].assign(start=0)
    others = {"unknown": clips[~clips.word.isin(COMMANDS)].assign(word="_unknown_", start=0)}
    if silence:
        others["silence"] = _silence(Path(clips.path.iloc[0]).parents[1])
    parts = [commands]
    for split in SPLITS:
        counts = commands[commands.split == split].groupby("word").size()
        if counts.empty:
            raise KeywordError(f"no {split} clip of the ten commands; unpack the lists again, or give task: words")
        count = round(counts.mean())
        for name, table in others.items():
            table = table[table.split == split]
            parts.append(table.iloc[seeds.numpy_generator(seed, name, split).permutation(len(table))[:count]])
    return pd.concat(parts).sort_values("clip", ignore_index=True)


def _silence(root: Path) -> pd.DataFrame:
    """Seconds of noise, a sixteenth of a second apart, as clips of the split whose part of the file they lie in."""
    rows = []
    for path, samples in noise(root).items():
        for split, (begin, end) in SPLITS.items():
            speaker = f"silence-{split}-{path.stem}"  # another in each split: no voice is in it
            for start in range(int(begin * samples), int(end * samples) - CLIP_SAMPLES + 1, CLIP_SAMPLES // 16):
                rows.append((f"{SILENCE}/{path.stem}-{start}", str(path), start, SILENCE, speaker, split))
    table = pd.DataFrame(rows, columns=["clip", "path", "start", "word", "speaker", "split"])
    if missing := [split for split in SPLITS if split not in set(table.split)]:
        raise KeywordError(f"{root / NOISE}: too short to cut a second of {missing[0]} silence from")
    return table


def noise(root: Path) -> dict[Path, int]:
    """The WAV files in ``_background_noise_`` of a Speech Commands folder, with their samples.

    Raises KeywordError if there is none, AudioError if one is no readable 16 kHz mono.
    """
    paths = sorted((root / NOISE).glob("[!.]*.wav"))  # macOS: ._NAME
    if not paths:
        raise KeywordError(f"{root / NOISE}: no WAV file to cut SUPERB's silence from; unpack it, or give task: words")
    return {path: len(audio.read(path)) for path in paths}


def waveforms(clips: pd.DataFrame, normalise: bool = False) -> Tensor:
    """The clips as float32 [clips, 16000], ``normalise`` d before zeros fill them up; silence from its ``start`` on."""
    spans = [
        (clip.start, clip.start + CLIP_SAMPLES) if clip.word == SILENCE else (0, None, int(clip.samples))
        for clip in clips.itertuples()
    ]
    parts = (audio.read(path, *span) for path, span in zip(clips.path, spans, strict=True))
    return torch.stack([one_second(audio.normalise(part) if normalise else part) for part in parts])


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

    def forward(self, rows: Tensor) -> Tensor:
        """[clips, layers, width] to logits [clips, classes]."""
        return self.classifier(self.projection(torch.einsum("nlw,l->nw", rows, self.layer_logits.softmax(0))))


class Task(NamedTuple):
    """Keyword spotting: ``train``, ``validation`` and ``test`` are indices of clips."""

    words: list[str]
    """The classes, sorted."""
    labels: np.ndarray
    """Of each clip, an index into ``words``: int64 [clips]."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Outcome(NamedTuple):
    """The result of training with one seed."""

    accuracy: float
    predicted: np.ndarray
    """The class of each test clip, in the order of ``Task.test``."""
    validation_accuracy: float
    layer_weights: np.ndarray | None = None


def task(clips: pd.DataFrame) -> Task:
    """Keyword spotting of all words in ``clips`` over the official splits."""
    words, labels = np.unique(clips.word.to_numpy(str), return_inverse=True)
    return Task(words.tolist(), labels, **{split: np.flatnonzero(clips.split == split) for split in SPLITS})


def probe(
    rows: np.ndarray, task: Task, seed: int, *, steps: int, rate: float, fraction: float = 1.0, standardise: bool = True
) -> Outcome:
    """Train one probe on a ``fraction`` of the training clips and test it where its validation accuracy was best.

    ``rows``: float32 [clips, layers, width]. As s3prl's ``speech_commands``: Adam at ``rate``, batches of 32, gradient
    norm 1, cross entropy, the checkpoint that is best on validation (looked at 20 times). ``standardise`` first scales
    each layer and dimension by the mean and standard deviation of the training rows: a short training at one rate would
    otherwise judge the scale of the features (MFCC in tens, layers near one); False: as they are, as in s3prl.
    """
    from sklearn.preprocessing import StandardScaler  # here, since what only checks a study imports this module, too

    module, train, batches = draws(rows, task, seed, fraction)
    mean, scale = np.float32(0), np.float32(1)
    if standardise:
        scaler = StandardScaler()
        for part in np.split(train, range(CHUNK, len(train), CHUNK)):
            scaler.partial_fit(rows[part].reshape(len(part), -1))
        mean, scale = (moment.reshape(rows.shape[1:]).astype(np.float32) for moment in (scaler.mean_, scaler.scale_))

    def logits(clips: np.ndarray) -> Tensor:
        return module(torch.from_numpy((rows[clips] - mean) / scale))

    outcome = _fit(module, logits, task, batches, steps=steps, rate=rate, looks=20)
    return outcome._replace(layer_weights=module.layer_logits.detach().softmax(0).numpy())


def training_clips(task: Task, seed: int, fraction: float) -> tuple[np.ndarray, np.random.Generator]:
    """``fraction`` of the training clips, sorted, drawn by ``seed``; and the generator for what is drawn next."""
    rng = seeds.numpy_generator(seed, "probe", "clips")
    return np.sort(rng.permutation(task.train)[: max(1, round(fraction * len(task.train)))]), rng


def draws(rows: np.ndarray, task: Task, seed: int, fraction: float) -> tuple[Probe, np.ndarray, Iterator[np.ndarray]]:
    """Draws of ``seed`` for ``probe``: its first weights, its training clips, and batches of them without end."""
    train, rng = training_clips(task, seed, fraction)
    with _DRAWING, torch.random.fork_rng(devices=[]):
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
            heard = waveforms(clips.iloc[indices], model.config.do_normalize).to(device)
            return module["head"](module["model"](heard, normalised=True).last.mean(1)).cpu()

        batches = _batches(task.train, seeds.numpy_generator(seed, "fine-tune", "clips"))
        return _fit(module, logits, task, batches, steps=steps, rate=rate, looks=5, chunk=BATCH)


def _batches(train: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of indices without end: every clip once, in random order, then again."""
    order = (clip for _ in itertools.count() for clip in rng.permutation(train))
    while True:
        yield np.fromiter(order, np.int64, BATCH)


def _fit(
    module: nn.Module,
    logits: Callable[[np.ndarray], Tensor],
    task: Task,
    batches: Iterator[np.ndarray],
    *,
    steps: int,
    rate: float,
    looks: int,
    chunk: int = CHUNK,
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
