"""Measures of one system: words, voices, units, phones, cost; each figure beside its baseline."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedhubert_lib import pretrained, threads
from fedhubert_lib.evaluation import cost, extraction, keywords, layers, probes
from fedhubert_lib.evaluation.extraction import OnProgress
from fedhubert_lib.evaluation.intervals import measure
from fedhubert_lib.evaluation.systems import System

if TYPE_CHECKING:
    from fedhubert_lib.params import Evaluate

ABX_CLIPS = 400


@dataclass(frozen=True)
class Speech:
    """The speech that every system is measured on."""

    clips: pd.DataFrame
    task: keywords.Task
    cache: Path
    """The folder of cached features."""
    utterances: pd.DataFrame | None = None
    """Of speakers that nobody trained on; None where no phone of them is known."""
    phones: np.ndarray | None = None
    """Of each frame of ``utterances``: int64, -1 where unknown."""
    speakers: np.ndarray | None = None
    """Of each frame of ``utterances``."""

    @property
    def abx_clips(self) -> np.ndarray:
        """Indices of test clips: of whole speakers, since a triplet needs two words of one of them."""
        single = (self.clips.split == "test") & ~self.clips.word.str.startswith("_")  # _unknown_ is many words
        return self.clips[single].sort_values(["speaker", "clip"]).index[:ABX_CLIPS].to_numpy()

    def features(self, system: System, table: pd.DataFrame) -> Path:
        """Where the features that ``system`` gives for ``table`` are cached."""
        text = table.drop(columns="word", errors="ignore").to_csv()
        return self.cache / f"{system.digest}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@dataclass
class Result:
    """The figures of one system, as report.json has them."""

    system: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    outcomes: list[keywords.Outcome] = field(default_factory=list)
    """Of the keyword probe, one per evaluation seed."""
    layer: int = 0
    """The layer that is best on the validation clips: the ``best layer`` of every measure of words."""

    def add(self, name: str, values: Sequence[float], layer: int | None = None, baseline: float | None = None) -> None:
        """Append the figure of ``values``, one per seed."""
        figure = {"system": self.system, "measure": name, "layer": layer} | measure(values)._asdict()
        self.figures.append(figure | {"baseline": baseline, "seeds": len(values)})

    @contextlib.contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Make a note of what the speech does not allow."""
        try:
            yield
        except probes.TooFewClipsError as error:
            self.notes.append(f"{name}: {error}")


def of_system(
    system: System, speech: Speech, p: "Evaluate", on_progress: OnProgress = lambda *_: None, essentials: bool = False
) -> Result:
    """All ``tables.MEASURES`` of ``system`` but s3prl's; or ``tables.ESSENTIALS`` and what comes with them."""
    result = Result(system.name)
    normalise = system.model is not None and system.model.config.do_normalize
    path, whole = speech.features(system, speech.clips), speech.abx_clips if system.frames else ()
    moments, units = extraction.clips(
        system.encoder, speech.clips, path, whole=whole, normalise=normalise, on_progress=on_progress
    )
    _words(result, moments[:, 0], speech, p)
    if system.frames:
        with result.noting("abx"):
            _abx(result, np.array(units[:, result.layer]), speech)
        if speech.utterances is not None:
            path = speech.features(system, speech.utterances).with_suffix(".npy")
            frames = extraction.utterances(system.encoder, speech.utterances, path, on_progress)
            _units(result, frames, speech, p)
            with result.noting("phones"):
                _phones(result, frames, speech, p)
    if not essentials:
        _more_words(result, system, np.ascontiguousarray(moments[:, :, result.layer]), speech, p)
        if system.model is not None:
            result.add("parameters", [cost.parameters(system.model)])
            result.add("macs", [cost.macs(system.model.config)])
        if system.folder is not None:
            result.add("bytes", [sum(path.stat().st_size for path in pretrained.weight_files(system.folder))])
    return result


MEMORY = 8
"""Memory that least squares or k-means of rows takes, in sizes of these rows in float32: at most 7.5, measured."""


def _of_seeds(work: Callable[[int], Any], p: "Evaluate", memory: int = 0) -> list[Any]:
    """What ``work`` makes of each evaluation seed."""
    return list(threads.each(work, range(p.seed, p.seed + p.seeds), memory))


def _words(result: Result, rows: np.ndarray, speech: Speech, p: "Evaluate") -> None:
    """The keyword probe, and a linear one on each layer, which finds the best."""
    task, chance = speech.task, 1 / len(speech.task.words)
    options = {"steps": p.probe_steps, "rate": p.probe_rate, "fraction": p.train_fraction, "standardise": p.standardise}
    result.outcomes = _of_seeds(lambda seed: keywords.probe(rows, task, seed, **options), p)  # in batches
    result.add("keyword-accuracy", [outcome.accuracy for outcome in result.outcomes], baseline=chance)

    def linear(layer: int) -> tuple[float, float]:
        model = probes.ridge(rows[task.train, layer], task.labels[task.train])
        return tuple(model.score(rows[part, layer], task.labels[part]) for part in (task.validation, task.test))

    accuracies = list(threads.each(linear, range(rows.shape[1]), MEMORY * rows[:, 0].nbytes))
    for layer, (_, accuracy) in enumerate(accuracies):
        result.add("layer-weight", [float(outcome.layer_weights[layer]) for outcome in result.outcomes], layer=layer)
        result.add("layer-accuracy", [accuracy], layer=layer, baseline=chance)
    result.layer = int(np.argmax([validation for validation, _ in accuracies]))


def _abx(result: Result, units: np.ndarray, speech: Speech) -> None:
    clips = speech.clips.iloc[speech.abx_clips]
    error = probes.abx_error(units, clips.word.to_numpy(dtype=str), clips.speaker.to_numpy(dtype=str))
    result.add("abx-error", [error], layer=result.layer, baseline=0.5)


def _units(result: Result, frames: np.ndarray, speech: Speech, p: "Evaluate") -> None:
    """Units of every layer from one start of k-means, and of the best layer from a start per evaluation seed."""

    def quality(start: tuple[int, int]) -> dict[str, float]:
        layer, seed = start
        rows = np.ascontiguousarray(frames[:, layer])
        return layers.unit_quality(rows, speech.phones, clusters=p.clusters, seed=seed)

    starts, memory = [(layer, p.seed) for layer in range(frames.shape[1])], MEMORY * frames[:, 0].nbytes
    qualities = [[first] for first in threads.each(quality, starts, memory)]
    best = int(np.argmax([of_layer[0]["pnmi"] for of_layer in qualities]))
    others = [(best, seed) for seed in range(p.seed + 1, p.seed + p.seeds)]
    qualities[best] += threads.each(quality, others, memory)
    for layer, of_layer in enumerate(qualities):
        shuffled = float(np.mean([quality["shuffled_pnmi"] for quality in of_layer]))
        for name, baseline in (("pnmi", shuffled), ("phone-purity", None), ("cluster-purity", None)):
            values = [quality[name.replace("-", "_")] for quality in of_layer]
            result.add(name, values, layer=layer, baseline=baseline)


def _phones(result: Result, frames: np.ndarray, speech: Speech, p: "Evaluate") -> None:
    """The phone probe of every layer."""
    labelled = speech.phones >= 0
    phones, speakers = speech.phones[labelled], speech.speakers[labelled]

    def probe(layer: int) -> list[tuple[float, float]]:
        rows, seeds = frames[labelled, layer], range(p.seed, p.seed + p.seeds)
        return [probes.leave_speakers_out(rows, phones, speakers, seed=seed, folds=3) for seed in seeds]

    for layer, outcomes in enumerate(threads.each(probe, range(frames.shape[1]), MEMORY * frames[:, 0].nbytes)):
        accuracies, chances = zip(*outcomes, strict=True)
        result.add("phone-accuracy", accuracies, layer=layer, baseline=float(np.mean(chances)))


def _more_words(result: Result, system: System, moments: np.ndarray, speech: Speech, p: "Evaluate") -> None:
    """Measures of the best layer's ``moments`` [clips, 2, width]: mean and standard deviation; and fine-tuning."""
    task, chance = speech.task, 1 / len(speech.task.words)
    rows, both, layer = moments[:, 0], moments.reshape(len(moments), -1), result.layer
    voiced = (speech.clips.word != keywords.SILENCE).to_numpy()
    speakers, spoken, words = speech.clips.speaker.to_numpy(dtype=str)[voiced], rows[voiced], task.labels[voiced]
    memory = MEMORY * rows.nbytes

    def linear(seed: int) -> float:
        train, _ = keywords.training_clips(task, seed, p.train_fraction)
        return probes.ridge(both[train], task.labels[train]).score(both[task.test], task.labels[task.test])

    if system.frames:  # otherwise its one frame holds both
        result.add("moments-accuracy", _of_seeds(linear, p, MEMORY * both.nbytes), layer=layer, baseline=chance)
    nearest = probes.nearest(rows, task.labels, task.train, task.test)
    result.add("nearest-accuracy", [nearest], layer=layer, baseline=chance)
    with result.noting("unseen"):
        unseen = _of_seeds(lambda seed: probes.leave_speakers_out(spoken, words, speakers, seed=seed), p, memory)
        accuracies, of_words = [accuracy for accuracy, _ in unseen], 1 / len(np.unique(words))  # without silence
        result.add("unseen-speaker-accuracy", accuracies, layer=layer, baseline=of_words)
    with result.noting("voice"):
        voice = _of_seeds(lambda seed: probes.speaker_accuracy(spoken, speakers, seed=seed), p, memory)
        result.add("speaker-accuracy", [accuracy for accuracy, _ in voice], layer=layer, baseline=voice[0][1])
    if system.model is not None and p.fine_tune_steps:
        options = {"steps": p.fine_tune_steps, "rate": p.fine_tune_rate}
        seeds = range(p.seed, p.seed + p.seeds)
        tuned = [keywords.fine_tune(system.model, speech.clips, task, seed, **options) for seed in seeds]
        result.add("fine-tuned-accuracy", [outcome.accuracy for outcome in tuned], baseline=chance)
