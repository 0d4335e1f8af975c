"""Corpora and partition at LibriSpeech's full size: scanning, giving out, measuring skew, and speaking.

    python benchmarks/bench_corpora.py [--files 20000] [--utterances 281241] [--speakers 2338] [--minutes 5]
        [--repeats 5]

The scanned tree holds links to generated FLAC files of LibriSpeech's lengths, so that its headers are in the page cache
as after a first look. CPU seconds are what a busy machine does not change. Partition and statistics run in a process of
their own per scheme; its memory is its peak, imports included, of all but reading audio. Speech is timed in CPU
seconds: what one core makes. Each figure stands beside its target.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import soundfile

from fedhubert_lib import params, partition, skew
from fedhubert_lib.corpora import scan, synthetic

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import manifests  # noqa: E402

SCHEMES = get_args(params.Partition.model_fields["scheme"].annotation)
CLIENTS = 20
COLUMNS = ["speaker", "chapter", "subset", "sex", "samples", "sample_rate", "text"]


def tree(root: Path, files: int) -> None:
    """SUBSET/SPEAKER/CHAPTER folders of 48 links each to one of 50 FLAC files of 2 to 16 seconds."""
    rng = np.random.default_rng(0)
    originals = []
    for i, seconds in enumerate(np.linspace(2, 16, 50)):
        originals.append(root / "originals" / f"{i}.flac")
        originals[-1].parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(originals[-1], rng.normal(0, 0.05, int(16_000 * seconds)), 16_000, subtype="PCM_16")
    for i in range(files):
        speaker, chapter = str(i // 120), str(i // 48)
        path = root / "tree" / speaker / chapter / f"{speaker}-{chapter}-{i:06d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[i % 50], path)


def bench_scan(files: int, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree(root, files)
        scan.scan([root / "tree"])
        timings: dict[str, list[float]] = {"first": [], "first_cpu": [], "again": [], "again_cpu": []}
        for _ in range(repeats):
            cache = root / "scan.parquet"
            cache.unlink(missing_ok=True)
            for name in ("first", "again"):
                start, cpu = time.perf_counter(), time.process_time()
                table = scan.scan([root / "tree"], cache)
                timings[name].append(time.perf_counter() - start)
                timings[f"{name}_cpu"].append(time.process_time() - cpu)
            assert len(table) == files and (table["reason"] == "").all()
    rate = {name: files / statistics.median(seconds) for name, seconds in timings.items()}
    return {
        "files": files,
        "headers_per_second": rate["first"],
        "headers_per_cpu_second": rate["first_cpu"],
        "unchanged_files_per_second": rate["again"],
        "unchanged_files_per_cpu_second": rate["again_cpu"],
    }


def partition_once(scheme: str, run: Path, counts: Path) -> dict[str, float]:
    """One scheme in this process: partition, per-client statistics, distances, summary."""
    clients = 1_000_000 if scheme == "speaker" else CLIENTS
    p = params.Partition(scheme=scheme, clients=clients, heldout_speakers=0, small_clients="merge", alpha=0.5)
    start, cpu = time.perf_counter(), time.process_time()
    held = partition.assign(run, p)
    assigned = time.perf_counter()
    table = pd.read_parquet(run / "00_corpus" / "manifest.parquet", columns=COLUMNS)
    summary = skew.summary(table, partition.owners(table, p), np.load(counts), seed=0)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    return {
        "scheme": scheme,
        "clients": len(held),
        "partition_s": assigned - start,
        "statistics_s": end - assigned,
        "cpu_s": cpu,
        # As resources.peak_memory, which would import torch.
        "peak_GB": int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
        * 1024
        / 1e9,
        "largest_over_smallest": held["hours"].max() / held["hours"].min(),
        "skew": summary["skew"],
    }


def bench_partition(utterances: int, speakers: int) -> list[dict[str, float]]:
    """The manifest is generated; acoustic histograms, too: a random voice per speaker, six utterances of each read."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        table = manifests.librispeech960(utterances, speakers)
        (run / "00_corpus").mkdir()
        table.to_parquet(run / "00_corpus" / "manifest.parquet")
        rng = np.random.default_rng(0)
        voices = rng.dirichlet(np.full(50, 0.5), size=speakers)
        counts = np.zeros((utterances, 50), dtype=np.int32)
        number, speaker = table.groupby("speaker").cumcount().to_numpy(), pd.factorize(table["speaker"])[0]
        for row in np.flatnonzero(number < 6):
            counts[row] = rng.multinomial(400, voices[speaker[row]])
        np.save(run / "counts.npy", counts)
        results = []
        for scheme in SCHEMES:
            # A folder of its own each: removing the clients of the scheme before is not part of this one.
            (run / scheme).mkdir()
            (run / scheme / "00_corpus").symlink_to(run / "00_corpus")
            command = [sys.executable, __file__, "--once", scheme, str(run / scheme), str(run / "counts.npy")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout))
    return results


def bench_synthetic(minutes: float) -> dict[str, float | bool]:
    p = params.Corpus(speakers=8, minutes=minutes, test_speakers=1, test_minutes=0.5)
    sums = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("once", "again"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            synthetic.speech(Path(folder, name), p)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            audio = sorted(Path(folder, name).rglob("*.flac"))
            sums.append(hashlib.sha256(b"".join(path.read_bytes() for path in audio)).hexdigest())
        seconds = sum(soundfile.info(path).duration for path in audio)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"audio_s": seconds, "times_real_time_per_core": seconds / cpu, "same_bytes_again": sums[0] == sums[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--utterances", type=int, default=281_241)
    parser.add_argument("--speakers", type=int, default=2_338)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", nargs=3, metavar=("SCHEME", "RUN", "COUNTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(partition_once(options.once[0], Path(options.once[1]), Path(options.once[2])), default=float))
        return
    scanned = bench_scan(options.files, options.repeats)
    print(f"scan of {options.files:,} FLAC files, median of {options.repeats}, files a second:")
    say("first", scanned["headers_per_second"], ">= 5,000", f"{scanned['headers_per_cpu_second']:,.0f} a CPU second")
    cpu = f"{scanned['unchanged_files_per_cpu_second']:,.0f} a CPU second"
    say("nothing has changed", scanned["unchanged_files_per_second"], ">= 50,000", cpu)
    speech = bench_synthetic(options.minutes)
    print(f"synthetic speech, {speech['audio_s']:,.0f} s of it, twice:")
    say("times real time, per core", speech["times_real_time_per_core"], ">= 100")
    say("the same bytes again", speech["same_bytes_again"], "True")
    rows = pd.DataFrame(bench_partition(options.utterances, options.speakers))
    print(f"partition and statistics of {options.utterances:,} utterances, {options.speakers:,} speakers, per scheme:")
    print(rows.round(3).to_string(index=False))
    say("slowest, s", (rows["partition_s"] + rows["statistics_s"]).max(), "< 20")
    say("largest, GB", rows["peak_GB"].max(), "< 1")
    balance = rows.set_index("scheme")["largest_over_smallest"]["speakers"]
    say(f"hours of {CLIENTS} clients of whole speakers, largest over smallest", balance, "< 1.01")


def say(what: str, value: float | bool, target: str, more: str = "") -> None:
    shown = value if isinstance(value, bool) else f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    print(f"  {what}: {shown} (target {target})" + (f"; {more}" if more else ""))


if __name__ == "__main__":
    main()
