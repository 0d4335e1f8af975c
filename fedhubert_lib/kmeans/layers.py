"""Which hidden layer to cluster, and the public speech that says so where its phones are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
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
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8")))["checkpoint"] == config["checkpoint"]:
        return known["layer"]
    config |= {"clusters": min(p.clusters, CLUSTERS)}
    table = public(run, config, FRAMES)
    phones = public_phones(run, table.utterance.tolist(), table.samples.map(audio.frame_count).tolist())
    if phones is not None:
        scores = _pnmi(_states(weights, config, table, device), phones, config)
        reason = f"PNMI of {len(phones)} frames of {table.speaker.nunique()} held-out speakers"
    elif p.noise_multiplier:
        raise KmeansError("layer: auto asks clients for scores that no noise covers; set layer to a number")
    else:
        depth = config["model"]["num_hidden_layers"]
        replies = list(exchange.ask("layers", weights, config, like={"scores": (depth,), "frames": ()}))
        frames = torch.stack([reply.arrays["frames"] for reply in replies]).double()
        each = torch.stack([reply.arrays["scores"] for reply in replies])
        scores = (each * frames[:, None] / frames.sum()).sum(0).tolist()
        reason = f"mean over {len(replies)} clients of {MEASURE}"
    row = {"layer": 1 + int(np.argmax(scores)), "scores": scores, "reason": reason, "checkpoint": config["checkpoint"]}
    files.write_json(path, row)
    log({"kind": "layer", **row})
    return row["layer"]


def rate(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Arrays, dict[str, float]]:
    """How good this client finds each layer, on ten minutes of its speech: float64 [layers], and the frames used."""
    table = reading.within(reading.sampled(home, config), config, FRAMES)
    states = _states(arrays, config, table, home.device)
    lengths = [audio.frame_count(samples) for samples in table.samples]
    if sum(lengths) < 2 * config["clusters"]:
        return {"scores": torch.zeros(len(states), dtype=torch.float64), "frames": torch.tensor(0.0)}, {}
    labels = [_labels(frames, config) for frames in states]
    agreement = units.agreement_matrices({f"{layer:02}": sequence for layer, sequence in enumerate(labels)})["nmi"]
    scores = ((agreement.to_numpy().sum(1) - 1) / max(len(states) - 1, 1)).tolist()
    return {"scores": torch.tensor(scores, dtype=torch.float64), "frames": torch.tensor(float(sum(lengths)))}, {}


def _states(arrays: Arrays, config: Mapping[str, Any], table: pandas.DataFrame, device: str) -> list[Tensor]:
    """Frames of every layer from the first on, normalised per speaker or over all as labels will be: [N, D] each."""
    model = reading.model_of(arrays, config, device)
    waveforms = [audio.read(path) for path in table.path]
    parts = list(reading.hidden(model, waveforms, range(1, model.config.num_hidden_layers + 1), device))
    states = torch.cat([part.half() for part in parts], dim=1)
    speaker = table.speaker if config["normalisation"] == "speaker" else table.speaker.map(lambda name: "")
    owner = np.repeat(speaker.to_numpy(dtype=object), [part.shape[1] for part in parts])
    result = []
    for layer in states:
        frames = layer.float()
        for name in set(owner) if config["normalisation"] != "none" else ():
            rows = torch.from_numpy(owner == name)
            some = frames[rows].double()
            mean, deviation = reading.standardiser(some.sum(0), some.square().sum(0), len(some))
            frames[rows] = (frames[rows] - mean) / deviation
        result.append(frames)
    return result


def _centroids(frames: Tensor, config: Mapping[str, Any]) -> Tensor:
    rng = seeds.numpy_generator(config["seed"], "kmeans-layers")
    return clustering.fit(frames, min(config["clusters"], len(frames)), rng)[0]


def _labels(frames: Tensor, config: Mapping[str, Any]) -> np.ndarray:
    return clustering.nearest(frames, _centroids(frames, config)).numpy()


def _pnmi(states: list[Tensor], phones: np.ndarray, config: Mapping[str, Any]) -> list[float]:
    known = phones != ""
    return [units.quality(_labels(frames, config)[known], phones[known], config["seed"])["pnmi"] for frames in states]


def public(run: Path, config: Mapping[str, Any], frames: int) -> pandas.DataFrame:
    """Held-out utterances, or those of the test split, with at most ``frames`` frames; those with phones first."""
    columns = ["utterance", "path", "speaker", "samples"]
    table = pandas.DataFrame(columns=columns)
    heldout, manifest = run / "01_partition" / "heldout.parquet", run / "00_corpus" / "manifest.parquet"
    if heldout.exists():
        table = pandas.read_parquet(heldout)
    if table.empty and manifest.exists():
        table = pandas.read_parquet(manifest, filters=[("split", "==", "test")])
    table = table[columns]
    with_phones = table[table.utterance.isin(_phones(run, table.utterance.tolist()).utterance)]
    return reading.within(table if with_phones.empty else with_phones, config, frames)


def _phones(run: Path, utterances: list[str]) -> pandas.DataFrame:
    path = run / "00_corpus" / "phones.parquet"
    if not path.exists() or not parquet.read_metadata(path).num_rows or not utterances:
        return pandas.DataFrame(columns=["utterance"])
    return pandas.read_parquet(path, filters=[("utterance", "in", utterances)]).sort_values("start_sample")


def public_phones(run: Path, utterances: list[str], lengths: list[int]) -> np.ndarray | None:
    """The phone of each frame of ``utterances``, "" where unknown; None where no phones are."""
    table = _phones(run, utterances)
    if table.empty:
        return None
    return units.frame_phones(table, dict(zip(utterances, lengths, strict=True)))
