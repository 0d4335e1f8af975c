"""K-means targets against fairseq's way of making them, same audio and cores: extraction, fit, labelling, memory.

    python benchmarks/bench_kmeans.py [--minutes 10] [--clusters 100] [--repeats 5] [--hours 1] [--device cpu]

fairseq's way is ``simple_kmeans``: kaldi.mfcc and compute_deltas utterance by utterance, scikit-learn's MiniBatchKMeans
with n_init 20, its predict. The contenders, each in a process of its own, take turns within each repetition and ratios
are medians of the per-repetition ratios, so that a busy machine is busy for both. ``--hours 100`` is the memory figure
in full: a client labels that much audio, in one more process, from files that are read again and again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from fedhubert_lib import audio, features, resources, seeds
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.kmeans import clustering
from fedhubert_lib.kmeans.clustering import nearest

SECONDS = (2.0, 16.0)
"""Lengths of the generated utterances."""


def utterances(minutes: float) -> list[Tensor]:
    """Speech-like sound: voiced and noisy stretches of 50 to 200 ms through resonances that change with each."""
    rng, made, total = seeds.numpy_generator(0, "bench"), [], 0
    while total < minutes * 60 * audio.SAMPLE_RATE:
        pieces, samples = [], int(rng.uniform(*SECONDS) * audio.SAMPLE_RATE)
        while sum(map(len, pieces)) < samples:
            time_axis = np.arange(int(rng.uniform(0.05, 0.2) * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
            source = 0.02 * rng.standard_normal(len(time_axis))
            if rng.random() < 0.7:
                pitch, formants = rng.uniform(80, 250), rng.uniform((300, 800, 2_000), (900, 2_400, 3_500))
                for harmonic in pitch * np.arange(1, 20):
                    gain = sum(1 / (1 + ((harmonic - formant) / 150) ** 2) for formant in formants)
                    source += gain * np.sin(2 * np.pi * harmonic * time_axis)
            pieces.append(0.05 * rng.uniform(0.1, 1) * source)
        made.append(torch.from_numpy(np.concatenate(pieces)[:samples]).float())
        total += samples
    return made


def fairseq_mfcc(waveform: Tensor) -> Tensor:
    """One utterance, as fairseq's dump_mfcc_feature: [frames, 39]."""
    static = kaldi.mfcc(waveform[None], sample_frequency=audio.SAMPLE_RATE, use_energy=False).T
    delta = compute_deltas(static)
    return torch.cat([static, delta, compute_deltas(delta)]).T


def batched_mfcc(waveforms: list[Tensor]) -> list[Tensor]:
    """As a client reads them: about a minute at a time."""
    return [frames for start in range(0, len(waveforms), 8) for frames in features.mfcc(waveforms[start : start + 8])]


def fairseq_fit(frames: np.ndarray, clusters: int) -> MiniBatchKMeans:
    """The settings of fairseq's learn_kmeans."""
    model = MiniBatchKMeans(
        clusters,
        init="k-means++",
        n_init=20,
        batch_size=10_000,
        max_iter=100,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(frames)


def contend(pipe: Connection, side: str, waveforms: list[Tensor], clusters: int) -> None:
    """One side in a process of its own: answers each job, a name and a fitted model, with its seconds and CPU seconds.

    What a side leaves behind in the allocator changes the other's page faults, and with them its time by half.
    """
    frames = torch.cat(batched_mfcc(waveforms))
    rng = seeds.numpy_generator(0, "bench-fit")
    jobs: dict[str, Callable[[MiniBatchKMeans], object]] = {
        "fairseq extraction": lambda model: [fairseq_mfcc(waveform) for waveform in waveforms],
        "fairseq fit": lambda model: fairseq_fit(frames.numpy(), clusters),
        "fairseq labelling": lambda model: [model.predict(frames.numpy()) for _ in range(10)],
        "ours extraction": lambda model: batched_mfcc(waveforms),
        "ours fit": lambda model: clustering.fit(frames, clusters, rng),
        "ours labelling": lambda model: [nearest(frames, torch.from_numpy(model.cluster_centers_)) for _ in range(10)],
    }
    while job := pipe.recv():
        name, model = job
        start, cpu = time.perf_counter(), time.process_time()
        jobs[f"{side} {name}"](model)
        pipe.send((time.perf_counter() - start, time.process_time() - cpu))


def compare(title: str, sides: list[Connection], model: MiniBatchKMeans, repeats: int, target: str) -> dict[str, float]:
    """Median seconds of both, in turn, and the median ratios of seconds and of CPU seconds; printed."""
    rows = []
    for repeat in range(repeats + 1):
        row = []
        for side in sides:
            side.send((title, model))
            row += side.recv()
        if repeat or title == "fit":  # first calls make constants and touch memory
            rows.append(row)
    a, _, b, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio, cpu_ratio = (statistics.median(row[i] / row[i + 2] for row in rows) for i in (0, 1))
    print(f"{title:<12} fairseq's way {a:8.4f} s   here {b:8.4f} s   {ratio:5.2f} x as fast (target {target}), "
          f"{cpu_ratio:.2f} x in CPU", flush=True)  # fmt: skip
    return {"theirs": a, "ours": b, "ratio": ratio, "cpu_ratio": cpu_ratio}


def label_hours(hours: float, clusters: int) -> dict[str, float]:
    """A client labels ``hours`` of audio: its seconds and the peak memory of its process, in a process of its own."""
    command = [sys.executable, __file__, "--label", "--hours", str(hours), "--clusters", str(clusters)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout)


def label(hours: float, clusters: int) -> None:
    """What ``label_hours`` runs; prints JSON."""
    waveforms = utterances(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, waveform in enumerate(waveforms):
            soundfile.write(folder / f"{number}.flac", waveform.numpy(), audio.SAMPLE_RATE)
        minute = sum(map(len, waveforms)) / audio.SAMPLE_RATE / 60
        rounds = max(1, round(hours * 60 / minute))
        table = pd.DataFrame(
            [
                (f"{turn}-{number}", str(folder / f"{number}.flac"), f"speaker-{turn % 50}", len(waveform))
                for turn in range(rounds)
                for number, waveform in enumerate(waveforms)
            ],
            columns=["utterance", "path", "speaker", "samples"],
        )
        table.to_parquet(folder / "train.parquet")
        table.iloc[:0].to_parquet(folder / "validation.parquet")
        config = {"kind": "federated", "features": "mfcc", "layer": 0, "checkpoint": "", "normalisation": "speaker"}
        config |= {"seed": 0, "clusters": clusters, "width": features.MFCC_DIMENSION, "noise_multiplier": 0.0}
        home = ClientHome("client", folder, folder / "labels", folder / "state")
        frames = torch.cat(features.mfcc(waveforms))
        centroids = frames[seeds.numpy_generator(0, "bench").choice(len(frames), clusters, replace=False)]
        before = {"imports_mib": peak_mib()}
        start = time.perf_counter()
        handlers.HANDLERS["kmeans.features"](home, {}, config)
        handlers.HANDLERS["kmeans.label"](home, {"centroids": centroids}, config)
        seconds = time.perf_counter() - start
    print(json.dumps({"hours": rounds * minute / 60, "seconds": seconds, "peak_mib": peak_mib()} | before))


def peak_mib() -> float:
    """Peak memory of this process so far, shared libraries included."""
    return resources.peak_memory() / 2**20


def main() -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="audio for extraction, fit and labelling")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hours", type=float, default=1, help="audio for the memory figure; 100: in full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--label", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.label:
        label(options.hours, options.clusters)
        return
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {options.minutes:g} minutes of audio")
    waveforms = utterances(options.minutes)
    figures = {}

    ours = batched_mfcc(waveforms)
    worst = max(float((fairseq_mfcc(w) - mine).abs().max()) for w, mine in zip(waveforms, ours, strict=True))
    frames = torch.cat(ours)
    model = fairseq_fit(frames.numpy(), options.clusters)
    theirs_centroids = torch.from_numpy(model.cluster_centers_)
    centroids = clustering.fit(frames, options.clusters, seeds.numpy_generator(0, "bench-fit"))
    inertia = clustering.inertia(frames, centroids) / clustering.inertia(frames, theirs_centroids)
    same = torch.from_numpy(model.predict(frames.numpy())) == nearest(frames, theirs_centroids)

    context = multiprocessing.get_context("spawn")
    sides, processes = [], []
    for side in ("fairseq", "ours"):
        here, there = context.Pipe()
        processes.append(context.Process(target=contend, args=(there, side, waveforms, options.clusters), daemon=True))
        processes[-1].start()
        sides.append(here)
    for title, target in (("extraction", ">= 3"), ("fit", ">= 3"), ("labelling", ">= 1")):
        figures[title] = compare(title, sides, model, options.repeats, target)
    for side, process in zip(sides, processes, strict=True):
        side.send(None)
        process.join()
    figures |= {"mfcc_difference": worst, "inertia_ratio": inertia, "labels_equal": float(same.float().mean())}
    print(f"largest difference of MFCCs {worst:.1e} (target <= 1e-4); {len(frames)} frames, inertia {inertia:.4f} of "
          f"fairseq's (target <= 1.01); {figures['labels_equal']:.6f} of labels equal")  # fmt: skip

    if options.device != "cpu":
        figures["device"] = on_device(waveforms, centroids, options.device, options.repeats)

    figures["memory"] = memory = label_hours(options.hours, options.clusters)
    speed = memory["hours"] * 3600 / memory["seconds"]
    print(f"a client labels {memory['hours']:.1f} h: peak {memory['peak_mib']:.0f} MiB (target < 954 MiB = 1 GB; "
          f"{memory['imports_mib']:.0f} MiB of it before it starts), {speed:,.0f} x real time")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def on_device(waveforms: list[Tensor], centroids: Tensor, device: str, repeats: int) -> dict[str, float]:
    """Extraction and labelling on an accelerator, audio decoded already: times real time."""
    there = [waveform.to(device) for waveform in waveforms] * 10
    centroids = centroids.to(device)
    seconds = sum(map(len, there)) / audio.SAMPLE_RATE
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        nearest(torch.cat([frames[::2] for frames in features.mfcc(there)]), centroids)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    speed = seconds / statistics.median(times[1:])
    print(f"extraction and labelling on {torch.cuda.get_device_name(device)}: {speed:,.0f} x real time "
          "(target >= 50,000)")  # fmt: skip
    return {"real_time": speed}


if __name__ == "__main__":
    main()
