"""MFCC as they are, per speaker and per utterance: what the baseline of 05_evaluate would be with normalised features.

``python benchmarks/study_mfcc.py outputs/RUN params/STUDY.yaml`` measures speech and words of a run whose 00_corpus and
01_partition are done, as 05_evaluate does with the parameters of the study, and prints a row for each. The targets of
02_kmeans are made from those per speaker.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedhubert_lib import audio, features, params, studies
from fedhubert_lib.evaluation import keywords, layers, measures, probes, tables
from fedhubert_lib.kmeans import reading

SEEDS = range(3)


def normalised(parts: Sequence[Tensor], speakers: Sequence[str], by: str) -> list[Tensor]:
    """``parts`` [frames, D], scaled ``by`` nothing, the speaker or the utterance."""
    if by == "nothing":
        return list(parts)
    names = speakers if by == "speaker" else [str(number) for number in range(len(parts))]
    return reading.normalised(parts, names, reading.speaker_statistics(zip(names, parts, strict=True)))


def mfcc(waveforms: Sequence[Tensor]) -> list[Tensor]:
    """MFCCs at 50 Hz, float32 [frames, 39] for each waveform."""
    return [frames[::2] for frames in features.mfcc(waveforms)]


def of_frames(run: Path, p: params.Evaluate, by: str) -> dict[str, float]:
    """PNMI and the phone probe on the run's speech of no client."""
    table, phones = layers.held_out(run, p.unit_minutes, p.seed, p.clusters)
    labels, speakers = layers.phone_labels(table, phones)
    waveforms = [audio.read(row.path, 0, min(row.samples, layers.LONGEST), row.samples) for row in table.itertuples()]
    frames, known = torch.cat(normalised(mfcc(waveforms), table.speaker, by)).numpy(), labels >= 0
    pnmi = [layers.unit_quality(frames, labels, clusters=p.clusters, seed=seed)["pnmi"] for seed in SEEDS]
    folds = [
        probes.leave_speakers_out(frames[known], labels[known], speakers[known], seed=seed, folds=3)[0]
        for seed in SEEDS
    ]
    return {"phones": float(np.mean(folds)), "PNMI": float(np.mean(pnmi))}


def of_words(run: Path, p: params.Evaluate, by: str) -> dict[str, float]:
    """Accuracy of the keyword probe, of ridge regression on mean and standard deviation, and ABX error."""
    clips = keywords.read_clips(run / "00_corpus/keywords.parquet")
    task = keywords.task(clips)
    parts = [
        part for s in range(0, len(clips), 256) for part in mfcc(list(keywords.waveforms(clips.iloc[s : s + 256])))
    ]
    frames = torch.stack(normalised(parts, clips.speaker, by))
    mean = frames.mean(1).numpy()
    both = np.concatenate([mean, frames.std(1, unbiased=False).numpy()], 1)
    words, moments = [], []
    for seed in SEEDS:
        probe = keywords.probe(
            mean[:, None], task, seed, steps=p.probe_steps, rate=p.probe_rate, fraction=p.train_fraction
        )
        words.append(probe.accuracy)
        drawn, _ = keywords.training_clips(task, seed, p.train_fraction)
        fitted = probes.ridge(both[drawn], task.labels[drawn])
        moments.append(fitted.score(both[task.test], task.labels[task.test]))
    chosen = np.array(measures.Speech(clips, task, run).abx_clips)
    names, speakers = (clips.iloc[chosen][column].to_numpy(str) for column in ("word", "speaker"))
    error = probes.abx_error(frames[chosen].numpy(), names, speakers)
    return {"words": float(np.mean(words)), "mean and std": float(np.mean(moments)), "ABX error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("study", type=Path)
    arguments = parser.parse_args()
    run, p = arguments.run, studies.load(arguments.study).evaluate
    rows = {by: of_words(run, p, by) | of_frames(run, p, by) for by in ("nothing", "speaker", "utterance")}
    print(tables.markdown(pd.DataFrame(rows).T.map("{:.3f}".format), "MFCC, normalised by"))


if __name__ == "__main__":
    main()
