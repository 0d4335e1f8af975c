"""A small run for tests, as 01 and 02 would leave it: utterances are sequences of tones, labelled by tone."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

from fedhubert_lib import files, hubert, labels, params, seeds
from fedhubert_lib.audio import HOP, frame_count

TONES = 6
CODEBOOK = "federated"


def make(run: Path, clients: int = 4, utterances: int = 5, seconds: float = 1.6) -> Path:
    """Write a run folder with ``clients`` clients of ``utterances`` training and 2 validation utterances each."""
    rows = []
    for number in range(clients):
        client = f"client-{number:03d}"
        generator = seeds.numpy_generator(0, "tones", client)
        tables: dict[str, list] = {"train": [], "validation": []}
        own = {}
        for index in range(utterances + 2):
            utterance = f"{client}-{index:02d}"
            path = run / "audio" / client / f"{utterance}.flac"
            waveform, own[utterance] = _tones(generator, int(seconds * 16_000) + HOP * number)
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, waveform, 16_000)
            part = "train" if index < utterances else "validation"
            tables[part].append(
                {"utterance": utterance, "path": str(path), "speaker": client, "samples": len(waveform)}
            )
        for part, table in tables.items():
            folder = run / "01_partition" / "clients" / client
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(table).to_parquet(folder / f"{part}.parquet")
        lists = pd.DataFrame(tables["train"] + tables["validation"])
        folder = run / "02_kmeans" / "clients" / client / CODEBOOK
        labels.write(folder, "labels", lists, labels.LABELS, None, lambda missing, own=own: [list(own.values())])
        rows.append({"client": client, "train_utterances": utterances, "hours": 0.01})
    pd.DataFrame(rows).to_parquet(run / "01_partition" / "clients.parquet")
    files.write_json(run / "02_kmeans" / "codebooks" / CODEBOOK / "codebook.json", {"clusters": TONES})
    return run


def _tones(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    frames = frame_count(samples)
    tone = np.repeat(generator.integers(0, TONES, frames // 8 + 1), 8)[:frames]  # 160 ms each
    pitch = np.repeat(300.0 * 1.5**tone, HOP)
    pitch = np.pad(pitch, (0, samples - len(pitch)), mode="edge")
    waveform = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.01 * generator.standard_normal(samples)
    return waveform.astype(np.float32), tone.astype(np.uint16)


def pretrain(**changes) -> params.Pretrain:
    """Parameters of seconds."""
    chosen = {"rounds": 3, "cohort": 2, "local_steps": 2, "batch_seconds": 4.0, "crop_seconds": 1.5, "device": "cpu"}
    return params.Pretrain(**{**chosen, "precision": "float32", "learning_rate": 1e-3, **changes})


NARROW = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
"""A model for tests of seconds, in place of the preset tiny's sizes."""


def train_narrow(stage: Callable, run: Path, p: params.Federation) -> None:
    """Run ``stage`` with one thread and a narrow model: what a process of its own does, to be killed."""
    torch.set_num_threads(1)
    hubert.PRESETS["tiny"] = {**hubert.PRESETS["tiny"], **NARROW}
    stage(run, p)


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """One name for all bits of ``weights``."""
    result = hashlib.sha256()
    for name in sorted(weights):
        result.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return result.hexdigest()


def rows(path: Path) -> list[dict]:
    """The rows of a metrics file without what differs from one machine, moment or load to another."""
    timed = {"time", "seconds", "audio_seconds_per_second", "client_seconds", "server_seconds"}
    timed |= {"peak_memory_bytes", "gpu_memory_bytes", "gpu_joules"}
    return [{k: v for k, v in row.items() if k not in timed} for row in files.read_rows(path)]
