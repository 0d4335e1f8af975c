"""Public speech at the server, of speakers that no client has: what units are measured on, and a layer is chosen by."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyarrow import parquet
from torch import Tensor

from fedhubert_lib import audio, files, params, seeds, units
from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.kmeans import clustering, reading, server
from fedhubert_lib.kmeans.server import KmeansError, Log

FRAMES = 30_000
"""Frames of public speech whose features are computed, at most: ten minutes."""
CLUSTERS = 100
"""Clusters of each layer that are compared, at most: an order among layers needs no more, and takes less speech."""


def choose(run: Path, p: params.Kmeans, device: str, log: Log) -> int:
    """The hidden layer to cluster: ``p.layer``, or the one that scores best on public speech; 0 for MFCCs.

    The score is PNMI where phones of that speech are known, otherwise the mean NMI of a layer's clusters with those of
    the other layers. Scores go to ``layer.json``, which a restart reads. Raises KmeansError without public speech.
    """
    if p.features == "mfcc" or p.layer != "auto":
        return 0 if p.features == "mfcc" else int(p.layer)
    path = run / "02_kmeans" / "layer.json"
    config, weights = server.describe(p, None)
    if path.exists() and (row := json.loads(path.read_text(encoding="utf-8")))["checkpoint"] == config["checkpoint"]:
        return row["layer"]
    table, phones = speech(run, config, FRAMES)
    if table.empty:
        raise KmeansError("layer: auto measures layers on speech of no client, and the run has none; set layer")
    layers, sequences = range(1, config["model"]["num_hidden_layers"] + 1), []
    parts = extracted(weights, config, table, device, layers)
    for number in range(len(layers)):  # one layer at a time is more than float16: ten minutes of base's are 0.6 GB
        states = normalised([part[number].float() for part in parts], table.speaker, config)
        sequences.append(_labels(torch.cat(states), config))
    if phones is not None:
        scores = [units.quality(labels[phones != ""], phones[phones != ""], p.seed)["pnmi"] for labels in sequences]
        reason = f"PNMI of {len(phones)} frames of {table.speaker.nunique()} held-out speakers"
    else:
        agreement = units.agreement_matrices({f"{number:02}": labels for number, labels in enumerate(sequences)})["nmi"]
        scores = ((agreement.sum() - 1) / max(len(layers) - 1, 1)).tolist()
        reason = "agreement (NMI) with the clusters of all other layers"
    row = {"layer": 1 + int(np.argmax(scores)), "scores": scores, "reason": reason, "checkpoint": config["checkpoint"]}
    files.write_json(path, row)
    log({"kind": "layer", **row})
    return row["layer"]


def _labels(frames: Tensor, config: dict[str, Any]) -> np.ndarray:
    rng = seeds.numpy_generator(config["seed"], "kmeans-layers")
    centroids, _ = clustering.fit(frames, min(config["clusters"], CLUSTERS, len(frames)), rng)
    return clustering.nearest(frames, centroids).numpy()


def speech(run: Path, config: dict[str, Any], frames: int) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Held-out utterances, or those of the test split, with at most ``frames`` frames, and the phone of each frame.

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
        return reading.within(table, config, frames), None
    table = reading.within(table[table.utterance.isin(phones.utterance)], config, frames)
    counts = table.samples.map(audio.frame_count)
    names = units.frame_phones(phones, dict(zip(table.utterance, counts, strict=True)))
    return table, names if len({*names} - {""}) > 1 else None


def extracted(
    weights: Arrays, config: dict[str, Any], table: pd.DataFrame, device: str, layers: Sequence[int] | None = None
) -> list[Tensor]:
    """Features of each utterance of ``table``, [layers, frames, D], in the type in which clients keep them."""
    dtype = torch.float16 if config["features"] == "hidden" else torch.float32
    batches = reading.extracted(weights, config, table, device, layers)
    return [part.cpu().to(dtype) for _, batch in batches for part in batch]


def normalised(
    parts: Sequence[Tensor], speakers: Iterable[str], config: dict[str, Any], scales: reading.Scales | None = None
) -> list[Tensor]:
    """``parts``, [frames, D] of each utterance, scaled as ``config`` says: by ``scales``, otherwise by the
    statistics of their speakers in these utterances, or of all of them."""
    if config["normalisation"] == "none":
        return list(parts)
    if not scales:
        names = speakers if config["normalisation"] == "speaker" else [reading.EVERYBODY] * len(parts)
        scales = reading.speaker_statistics(zip(names, parts, strict=True))
    return reading.normalised(parts, speakers, scales)
