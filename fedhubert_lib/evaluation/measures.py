"""One system on every measure: words, voices, units, phones, cost; each figure beside what chance would give.

``essentials`` are what checkpoints along a training and students that are compared are judged by, ``everything`` is
what the report says of a system. Features are computed once for each system and kept.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fedhubert_lib import params, threads
from fedhubert_lib.evaluation import cost, keywords, layers, probes
from fedhubert_lib.evaluation.intervals import Measure, measure
from fedhubert_lib.evaluation.systems import System

ABX_CLIPS = 400
ABX_TRIPLETS = 1000

MEASURES = {
    "keyword-accuracy": ("keyword accuracy", "higher", "s3prl's probe on all layers, test speakers unseen; chance"),
    "fine-tuned-accuracy": ("keyword accuracy, fine-tuned", "higher", "the whole model trained on the words; chance"),
    "moments-accuracy": (
        "keyword accuracy, mean and deviation",
        "higher",
        "linear least squares on mean and deviation over time of the best layer; chance",
    ),
    "s3prl-accuracy": ("keyword accuracy, s3prl", "higher", "s3prl's speech_commands on frozen layers; chance"),
    "s3prl-fine-tuned-accuracy": (
        "keyword accuracy, s3prl fine-tuned",
        "higher",
        "s3prl's speech_commands, the whole model trained; chance",
    ),
    "layer-accuracy": ("keyword accuracy, one layer", "higher", "linear least squares on one layer; chance"),
    "layer-weight": ("share of the layer", "neither", "in the keyword probe's weighted sum"),
    "nearest-accuracy": ("10 nearest neighbours", "higher", "keywords by cosine on the best layer; chance"),
    "unseen-speaker-accuracy": (
        "speakers left out",
        "higher",
        "linear probe over folds of speakers, best layer; chance",
    ),
    "abx-error": ("ABX error across speakers", "lower", "words by dynamic time warping on the best layer; chance"),
    "speaker-accuracy": ("speaker identified", "lower", "what a linear probe hears of the voice, best layer; chance"),
    "pnmi": ("PNMI of units", "higher", "phones known from the layer's clusters; shuffled labels"),
    "phone-accuracy": (
        "phone probe",
        "higher",
        "phones named from single frames by linear least squares, speakers left out in 3 folds; the commonest phone",
    ),
    "phone-purity": ("phone purity of units", "higher", "share of frames whose cluster's main phone is theirs"),
    "cluster-purity": ("cluster purity of units", "higher", "share of frames whose phone's main cluster is theirs"),
    "parameters": ("parameters", "lower", "of the encoder"),
    "macs": ("MACs per second of audio", "lower", "multiply-accumulates for one second"),
    "bytes": ("bytes on disk", "lower", "of the encoder's weights"),
}
"""Stable name to title, which way is better, and what it is with its baseline."""

ESSENTIALS = ("keyword-accuracy", "phone-accuracy", "pnmi", "abx-error")


@dataclass(frozen=True)
class Speech:
    """What every system is measured on."""

    clips: pd.DataFrame
    words: list[str]
    utterances: pd.DataFrame | None
    """Of speakers that nobody trained on; None where no phone of them is known."""
    phones: pd.DataFrame | None
    cache: Path
    """Where features are kept."""

    @property
    def abx_clips(self) -> np.ndarray:
        """Indices of test clips: of whole speakers, since a triplet needs two words of one of them."""
        return self.clips[self.clips.split == "test"].sort_values(["speaker", "clip"]).index[:ABX_CLIPS].to_numpy()


@dataclass
class Result:
    """What one system gave."""

    system: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    task: keywords.Task | None = None
    outcomes: list[keywords.Outcome] = field(default_factory=list)
    """Of the keyword probe on ``task``, one per evaluation seed."""
    layer: int = 0
    """The layer that is best on the validation clips: the ``best layer`` of every measure of words."""

    def add(self, name: str, values: Measure, *, layer: int | None = None, baseline: float | None = None) -> None:
        """Append a figure as report.json has it."""
        span = interval(values)
        self.figures.append(
            {
                "system": self.system,
                "measure": name,
                "layer": layer,
                **{key: span[key] for key in ("value", "low", "high")},
                "baseline": baseline,
                "seeds": len(values.values),
                "values": span["values"],
            }
        )

    def best(self, name: str) -> dict[str, Any] | None:
        """The figure of the measure at its best layer; None where it was not measured."""
        sign = -1 if MEASURES[name][1] == "lower" else 1
        own = [each for each in self.figures if each["measure"] == name]
        return max(own, key=lambda each: sign * each["value"], default=None)


def interval(values: Measure) -> dict[str, Any]:
    """``value``, ``low``, ``high`` (None for a single value) and ``values``, as report.json has them."""
    half = values.interval
    low, high = (None, None) if half is None else (values.mean - half, values.mean + half)
    return {"value": values.mean, "low": low, "high": high, "values": list(values.values)}


def essentials(
    system: System, speech: Speech, p: params.Evaluate, on_progress: Callable[[int, int], None] | None = None
) -> Result:
    """``ESSENTIALS`` of ``system``, and what comes with them."""
    return _essentials(system, speech, p, on_progress)[0]


def everything(
    system: System, speech: Speech, p: params.Evaluate, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Result, dict[str, float | None]]:
    """All ``MEASURES`` of ``system`` but s3prl's, and its speed."""
    result, means, deviations = _essentials(system, speech, p, on_progress)
    if system.frames:  # otherwise its one frame holds both
        _moments(result, np.concatenate([means[:, result.layer], deviations[:, result.layer]], axis=1), p)
    _words_without_training(result, np.ascontiguousarray(means[:, result.layer]), speech, p)
    if system.model is not None:
        if p.fine_tune_steps:
            options = {"steps": p.fine_tune_steps, "rate": p.fine_tune_rate}
            tuned = [
                keywords.fine_tune(system.model, speech.clips, speech.words, seed, **options) for seed in _seeds(p)
            ]
            values = measure([each.accuracy for each in tuned])
            result.add("fine-tuned-accuracy", values, baseline=1 / len(speech.words))
        result.add("parameters", measure([cost.parameters(system.model)]))
        result.add("macs", measure([cost.macs(system.model.config)]))
    if system.folder is not None:
        result.add("bytes", measure([cost.size(system.folder)]))
    return result, cost.speed(system.encoder)


def _essentials(
    system: System, speech: Speech, p: params.Evaluate, on_progress: Callable[[int, int], None] | None
) -> tuple[Result, np.ndarray, np.ndarray]:
    result, abx_clips = Result(system.name), speech.abx_clips if system.frames else keywords.NONE
    path = _cache(speech, system, speech.clips)
    (means, deviations), units = keywords.features(
        system.encoder, speech.clips, path, whole=abx_clips, on_progress=on_progress
    )
    result.task = keywords.task(means, speech.clips, speech.words)
    _words(result, result.task, p)
    if system.frames:
        _try(result, _abx, units, speech, abx_clips, p)
        if speech.utterances is not None:
            path = _cache(speech, system, speech.utterances).with_suffix(".npy")
            frames = layers.frames(system.encoder, speech.utterances, path, on_progress)
            _units(result, frames, speech, p)
            _try(result, _phones, frames, speech, p)
    return result, means, deviations


def _try(result: Result, work: Callable[..., None], *arguments: Any) -> None:
    """``work``, or a note of what the speech does not allow."""
    try:
        work(result, *arguments)
    except probes.TooFewClipsError as error:
        result.notes.append(f"{work.__name__.removeprefix('_')}: {error}")


def _words(result: Result, task: keywords.Task, p: params.Evaluate) -> None:
    """The keyword probe, and a linear one on each layer, which finds the best."""
    chance = 1 / task.classes
    options = {"steps": p.probe_steps, "rate": p.probe_rate, "share": p.train_share, "standardise": p.standardise}
    result.outcomes = list(threads.each(lambda seed: keywords.probe(task, seed, **options), _seeds(p)))
    result.add("keyword-accuracy", measure([each.accuracy for each in result.outcomes]), baseline=chance)

    def linear(layer: int) -> tuple[float, float]:
        parts = task.validation, task.test
        return tuple(probes.ridge(task.rows[:, layer], task.labels, task.train, part) for part in parts)

    every = range(task.rows.shape[1])
    accuracies = list(threads.each(linear, every))
    for layer, (_, accuracy) in zip(every, accuracies, strict=True):
        weights = [float(each.layer_weights[layer]) for each in result.outcomes]
        result.add("layer-weight", measure(weights), layer=layer)
        result.add("layer-accuracy", measure([accuracy]), layer=layer, baseline=chance)
    result.layer = int(np.argmax([validation for validation, _ in accuracies]))


def _moments(result: Result, rows: np.ndarray, p: params.Evaluate) -> None:
    """What the probe's mean over time leaves out, on the training clips that each seed draws."""
    task = result.task
    drawn = [keywords.draws(task, seed, p.train_share, 1)[1] for seed in _seeds(p)]
    accuracies = threads.each(lambda train: probes.ridge(rows, task.labels, train, task.test), drawn)
    result.add("moments-accuracy", measure(list(accuracies)), layer=result.layer, baseline=1 / task.classes)


def _abx(result: Result, units: np.ndarray, speech: Speech, abx_clips: np.ndarray, p: params.Evaluate) -> None:
    own = speech.clips.iloc[abx_clips]
    labels, speakers = own.word.to_numpy(dtype=str), own.speaker.to_numpy(dtype=str)
    drawn = [probes.triplets(labels, speakers, seed=seed, count=ABX_TRIPLETS) for seed in _seeds(p)]
    frames = list(torch.from_numpy(np.array(units[:, result.layer])))
    errors = list(threads.each(lambda triples: probes.abx_error(frames, triples), drawn))
    result.add("abx-error", measure(errors), layer=result.layer, baseline=0.5)


def _words_without_training(result: Result, rows: np.ndarray, speech: Speech, p: params.Evaluate) -> None:
    """Measures without training steps, on the best layer."""
    clips, layer = speech.clips, result.layer
    labels, words = pd.factorize(clips.word, sort=True)
    speakers, chance = clips.speaker.to_numpy(dtype=str), 1 / len(words)
    train, test = (np.flatnonzero(clips.split == split) for split in ("train", "test"))
    nearest = probes.nearest(rows, labels, train, test, neighbours=min(10, len(train)))
    result.add("nearest-accuracy", measure([nearest]), layer=layer, baseline=chance)

    def unseen(result: Result) -> None:
        accuracies = [probes.leave_speakers_out(rows, labels, speakers, seed=seed) for seed in _seeds(p)]
        result.add("unseen-speaker-accuracy", measure(accuracies), layer=layer, baseline=chance)

    def voice(result: Result) -> None:
        heard = [probes.speaker_accuracy(rows, speakers, seed=seed) for seed in _seeds(p)]
        result.add("speaker-accuracy", measure([each for each, _ in heard]), layer=layer, baseline=heard[0][1])

    _try(result, unseen)
    _try(result, voice)


def _units(result: Result, frames: np.ndarray, speech: Speech, p: params.Evaluate) -> None:
    """Units of every layer from one start of k-means, and of the best layer from a start per evaluation seed."""

    def quality(which: tuple[int, int]) -> dict[str, float]:
        layer, seed = which
        rows = np.ascontiguousarray(frames[:, layer])
        return layers.unit_quality(rows, speech.utterances, speech.phones, clusters=p.clusters, seed=seed)

    first, *others = _seeds(p)
    every = range(frames.shape[1])
    found = [[each] for each in threads.each(quality, [(layer, first) for layer in every])]
    best = int(np.argmax([each[0]["pnmi"] for each in found]))
    found[best] += threads.each(quality, [(best, seed) for seed in others])
    for layer, qualities in enumerate(found):
        shuffled = float(np.mean([each["shuffled_pnmi"] for each in qualities]))
        for name in ("pnmi", "phone_purity", "cluster_purity"):
            values = measure([each[name] for each in qualities])
            baseline = shuffled if name == "pnmi" else None
            result.add(name.replace("_", "-"), values, layer=layer, baseline=baseline)


def _phones(result: Result, frames: np.ndarray, speech: Speech, p: params.Evaluate) -> None:
    labels, speakers = layers.phone_labels(speech.utterances, speech.phones)
    # Of three speakers or fewer each is a fold whatever is drawn: there is no interval to tell.
    draws = _seeds(p) if len(np.unique(speakers)) > 3 else _seeds(p)[:1]

    def probe(layer: int) -> tuple[list[float], list[float]]:
        rows = np.ascontiguousarray(frames[:, layer])
        return probes.frame_accuracy(rows, labels, speakers, draws=draws)

    for layer, (accuracies, chances) in enumerate(threads.each(probe, range(frames.shape[1]))):
        result.add("phone-accuracy", measure(accuracies), layer=layer, baseline=float(np.mean(chances)))


def _seeds(p: params.Evaluate) -> range:
    return range(p.seed, p.seed + p.seeds)


def _cache(speech: Speech, system: System, table: pd.DataFrame) -> Path:
    key = hashlib.blake2b(table.drop(columns="word", errors="ignore").to_csv().encode(), digest_size=8).hexdigest()
    return speech.cache / f"{system.digest}-{key}"
