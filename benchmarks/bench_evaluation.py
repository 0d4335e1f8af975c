"""Evaluation of one checkpoint on 10,000 one-second clips: what it takes once the features are there.

The measures of 05_evaluate as the report computes them: keyword probes and the other measures of clips (nearest
neighbours, speakers left out, speaker probe, a linear probe per layer), and ABX with its own frames. Features are
drawn, of the shapes of the presets tiny and base, since no measure's time depends on their values. Target: all of it
under 120 s on two cores. Beside it, that features are extracted once: a second evaluation reads them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

from fedhubert_lib import hubert
from fedhubert_lib.evaluation import extraction, keywords, probes, systems
from fedhubert_lib.evaluation.measures import ABX_CLIPS

CLIPS, WORDS, SPEAKERS, SEEDS, TARGET = 10_000, 35, 200, 3, 120.0
SHAPES = {"tiny": (5, 192), "base": (13, 768)}
"""Hidden states and width."""


def main() -> None:
    """Print a line per part and the sum beside the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each part; the median is printed")
    parser.add_argument("--steps", type=int, default=1000, help="of each keyword probe")
    options = parser.parse_args()
    for name, (layers, width) in SHAPES.items():
        parts = _parts(layers, width, options.steps)
        seconds = {part: _median(function, options.repeats) for part, function in parts.items()}
        total = sum(seconds.values())
        print(f"{name}: {CLIPS} clips x {layers} layers x {width}, {SEEDS} seeds, {torch.get_num_threads()} threads")
        for part, spent in seconds.items():
            print(f"  {part:32} {spent:7.2f} s")
        print(f"  {'together':32} {total:7.2f} s   target {TARGET:.0f} s: {'met' if total < TARGET else 'missed'}")
    first, again = _extraction()
    print(f"features of 400 clips, tiny waveform model: {first:.2f} s, read back in {again:.3f} s")


def _parts(layers: int, width: int, steps: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    labels, speakers = rng.integers(WORDS, size=CLIPS), rng.integers(SPEAKERS, size=CLIPS).astype(str)
    rows = rng.standard_normal((CLIPS, layers, width), dtype=np.float32)
    rows += 0.2 * rng.standard_normal((WORDS, 1, width), dtype=np.float32)[labels]
    train, validation, test = np.split(rng.permutation(CLIPS), [int(0.8 * CLIPS), int(0.9 * CLIPS)])
    task = keywords.Task([str(word) for word in range(WORDS)], labels, train, validation, test)
    one, seeds = np.ascontiguousarray(rows[:, layers // 2]), range(SEEDS)
    frames = rng.standard_normal((ABX_CLIPS, 49, width), dtype=np.float32)
    some = labels[:ABX_CLIPS], rng.integers(10, size=ABX_CLIPS)

    def linear(layer: int) -> float:
        return probes.ridge(rows[train, layer], labels[train]).score(rows[test, layer], labels[test])

    return {
        f"keyword probe, {steps} steps": lambda: [keywords.probe(rows, task, i, steps=steps, rate=1e-2) for i in seeds],
        "linear probe per layer": lambda: [linear(layer) for layer in range(layers)],
        "10 nearest neighbours": lambda: probes.nearest(one, labels, train, test),
        "speakers left out": lambda: [probes.leave_speakers_out(one, labels, speakers, seed=i) for i in seeds],
        "speaker probe": lambda: [probes.speaker_accuracy(one, speakers, seed=i) for i in seeds],
        f"ABX of {ABX_CLIPS} clips": lambda: probes.abx_error(frames, *some),
    }


def _median(function: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(function) for _ in range(repeats))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _extraction() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.wav")
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
        clips = pd.DataFrame({"clip": map(str, range(400)), "path": str(path), "word": "yes", "samples": 16_000})
        encoder = systems.of_model(systems.untrained(hubert.preset("tiny"), 0), torch.device("cpu"))
        return tuple(_seconds(lambda: extraction.clips(encoder, clips, Path(folder, "rows"))) for _ in range(2))


if __name__ == "__main__":
    main()
