"""Public speech at the server, of speakers that no client has: what units are measured on, and a layer is chosen by."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyarrow import parquet
from torch import Tensor

from fedhubert_lib import audio, units
from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.kmeans import reading

FRAMES = 30_000
"""Frames of public speech whose features are computed, at most: ten minutes."""


def speech(run: Path, config: dict[str, Any]) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Held-out utterances, or those of the test split, with at most ``FRAMES`` frames, and the phone of each frame.

    A phone is "" where none is known. Only utterances that have phones count if any has; where fewer than two phones
    are known there is None.
    """
    table = pd.DataFrame(columns=["utterance", "path", "speaker", "samples"])
    heldout, manifest = run / "01_partition" / "heldout.parquet", run / "00_corpus" / "manifest.parquet"
    if heldout.exists():
        table = pd.read_parquet(heldout, columns=list(table))
    if table.empty and manifest.exists():
        table = pd.read_parquet(manifest, columns=list(table), filters=[("split", "==", "test")])
    path, phones = run / "00_corpus" / "phones.parquet", None
    if len(table) and path.exists() and parquet.read_metadata(path).num_rows:
        phones = pd.read_parquet(path, filters=[("utterance", "in", table.utterance.tolist())])
    if phones is None or phones.empty:
        return reading.within(table, config, FRAMES), None
    table = reading.within(table[table.utterance.isin(phones.utterance)], config, FRAMES)
    counts = table.samples.map(audio.frame_count)
    names = units.frame_phones(phones, dict(zip(table.utterance, counts, strict=True)))
    return table, names if len({*names} - {""}) > 1 else None


def extracted(
    weights: Arrays, config: Mapping[str, Any], table: pd.DataFrame, device: str, layers: Sequence[int] | None = None
) -> list[Tensor]:
    """Features of each utterance of ``table``, [layers, frames, D], in the type in which clients keep them."""
    dtype = torch.float16 if config["features"] == "hidden" else torch.float32
    batches = reading.extracted(weights, config, table, device, layers)
    return [part.cpu().to(dtype) for _, batch in batches for part in batch]


def normalised(parts: Sequence[Tensor], speakers: Sequence[str], config: Mapping[str, Any]) -> list[Tensor]:
    """``parts``, [frames, D] of each utterance, scaled as ``config`` says, by the statistics of their speakers here."""
    none = config["normalisation"] == "none"
    scales = {} if none else reading.speaker_statistics(zip(speakers, parts, strict=True))
    return reading.normalised(parts, speakers, scales)
