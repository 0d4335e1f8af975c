"""Public speech at the server, and which hidden layer to cluster: it decides where its phones are known."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyarrow import parquet
from torch import Tensor

from fedhubert_lib import audio, files, params, seeds, units
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.kmeans import clustering, reading, server
from fedhubert_lib.kmeans.server import Exchange, KmeansError, Log

FRAMES = 30_000
"""Frames that layers are compared on at most, in the server's public speech or at a client: ten minutes."""
MEASURE = "agreement (NMI) with the clusters of all other layers"
CLUSTERS = 100
"""Clusters of each layer that are compared, at most: an order among layers needs no more, and takes less speech."""


def choose(run: Path, p: params.Kmeans, exchange: Exchange, device: str, log: Log) -> int:
    """The hidden layer to cluster: ``p.layer``, or the one that scores best; 0 for MFCCs.

    Where phones of public speech are known, the score is PNMI there, on speakers that no client has: nothing that
    training uses has seen it. Elsewhere each client scores the layers on its own speech without phones (``rate``), and
    the mean over clients, weighted by frames, decides. Scores and reason go to ``layer.json``, which a restart reads.
    Raises KmeansError where noise is asked for and only the clients could tell.
    """
    if p.features == "mfcc" or p.layer != "auto":
        return 0 if p.features == "mfcc" else int(p.layer)
    path = run / "02_kmeans" / "layer.json"
    config, weights = server.describe(p, None)
    if path.exists() and (row := json.loads(path.read_text(encoding="utf-8")))["checkpoint"] == config["checkpoint"]:
        return row["layer"]
    config |= {"clusters": min(p.clusters, CLUSTERS)}
    table = public(run, config, FRAMES)
    phones = public_phones(run, table)
    if phones is not None:
        spoken = phones != ""
        sequences = [_labels(layer, config)[spoken] for layer in _layers(weights, config, table, device)]
        scores = [units.quality(sequence, phones[spoken], p.seed)["pnmi"] for sequence in sequences]
        reason = f"PNMI of {len(phones)} frames of {table.speaker.nunique()} held-out speakers"
    elif p.noise_multiplier:
        raise KmeansError("layer: auto asks clients for scores that no noise covers; set layer to a number")
    else:
        shapes = {"scores": (config["model"]["num_hidden_layers"],), "frames": ()}
        replies = list(exchange.ask("layers", weights, config, like=shapes))
        frames, rates = (torch.stack([reply.arrays[name] for reply in replies]) for name in ("frames", "scores"))
        scores = (rates * frames[:, None] / frames.sum()).sum(0).tolist()
        reason = f"mean over {len(replies)} clients of {MEASURE}"
    row = {"layer": 1 + int(np.argmax(scores)), "scores": scores, "reason": reason, "checkpoint": config["checkpoint"]}
    files.write_json(path, row)
    log({"kind": "layer", **row})
    return row["layer"]


def rate(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Arrays, dict[str, float]]:
    """How good this client finds each layer, on ten minutes of its speech: float64 [layers], and the frames used."""
    table = reading.within(reading.sampled(home, config), config, FRAMES)
    depth, frames = config["model"]["num_hidden_layers"], int(table.samples.map(audio.frame_count).sum())
    if frames < 2 * config["clusters"]:
        nothing = torch.zeros(depth, dtype=torch.float64)
        return {"scores": nothing, "frames": torch.tensor(0.0).double()}, {}
    layers = enumerate(_layers(arrays, config, table, home.device))
    sequences = {f"{number:02}": _labels(layer, config) for number, layer in layers}
    agreement = torch.from_numpy(units.agreement_matrices(sequences)["nmi"].to_numpy())
    scores = (agreement.sum(1) - 1) / max(depth - 1, 1)
    return {"scores": scores, "frames": torch.tensor(float(frames)).double()}, {}


def _layers(arrays: Arrays, config: Mapping[str, Any], table: pd.DataFrame, device: str) -> Iterator[Tensor]:
    """Frames of every layer from the first on, normalised per speaker or over all of ``table``: [N, D] each.

    All wait as float16, and one at a time is more: ten minutes of a base model's are 0.6 GB.
    """
    layers = range(1, config["model"]["num_hidden_layers"] + 1)
    parts = [part.half() for _, batch in reading.extracted(arrays, config, table, device, layers) for part in batch]
    speakers = list(table.speaker) if config["normalisation"] == "speaker" else [reading.EVERYBODY] * len(table)
    for number in range(len(layers)):
        states = [part[number].float() for part in parts]
        if config["normalisation"] != "none":
            states = scaled(states, speakers)
        yield torch.cat([torch.zeros(0, config["width"]), *states])


def scaled(parts: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
    """Features of utterances, [frames, D] each, normalised by what these utterances tell of their speakers."""
    scales = reading.speaker_statistics(zip(speakers, parts, strict=True))
    return reading.normalised(parts, speakers, scales)


def _labels(frames: Tensor, config: Mapping[str, Any]) -> np.ndarray:
    rng = seeds.numpy_generator(config["seed"], "kmeans-layers")
    centroids, _ = clustering.fit(frames, min(config["clusters"], len(frames)), rng)
    return clustering.nearest(frames, centroids).numpy()


def public(run: Path, config: Mapping[str, Any], frames: int) -> pd.DataFrame:
    """Held-out utterances, or those of the test split, with at most ``frames`` frames; those with phones first."""
    columns = ["utterance", "path", "speaker", "samples"]
    table = pd.DataFrame(columns=columns)
    heldout, manifest = run / "01_partition" / "heldout.parquet", run / "00_corpus" / "manifest.parquet"
    if heldout.exists():
        table = pd.read_parquet(heldout)
    if table.empty and manifest.exists():
        table = pd.read_parquet(manifest, filters=[("split", "==", "test")])
    table = table[columns]
    with_phones = table[table.utterance.isin(_phones(run, table).utterance)]
    return reading.within(table if with_phones.empty else with_phones, config, frames)


def _phones(run: Path, table: pd.DataFrame) -> pd.DataFrame:
    path = run / "00_corpus" / "phones.parquet"
    if table.empty or not path.exists() or not parquet.read_metadata(path).num_rows:
        return pd.DataFrame(columns=["utterance"])
    filters = [("utterance", "in", table.utterance.tolist())]
    return pd.read_parquet(path, filters=filters).sort_values("start_sample")


def public_phones(run: Path, table: pd.DataFrame) -> np.ndarray | None:
    """The phone of each frame of the utterances of ``table``, "" where none; None where fewer than two are known."""
    phones = _phones(run, table)
    if phones.empty or phones.phone.nunique() < 2:
        return None
    return units.frame_phones(phones, dict(zip(table.utterance, table.samples.map(audio.frame_count), strict=True)))
