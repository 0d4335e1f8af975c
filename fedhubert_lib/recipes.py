"""What a study's parameters mean to the stages that train: the model, its steps, and batches of a client's speech."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from fedhubert_lib import audio, batching, hubert, params
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import LabelsError

VALIDATION_BATCHES = 4
"""Batches of a client's validation utterances, at most, that its validation loss is measured on."""


def clusters(run: Path, codebook: str) -> int:
    """K of a codebook. Raises FileNotFoundError when 02_kmeans has not made it, ValueError when it cannot be read."""
    path = run / "02_kmeans" / "codebooks" / codebook / "codebook.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such codebook; name it in codebooks of 02_kmeans and run that first")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["clusters"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error!r}); remove it and run 02_kmeans again") from error


def provenance(run: Path, codebook: str) -> str:
    """One name for what labels of a codebook are made with; empty where an earlier version has made them."""
    path = run / "02_kmeans" / "codebooks" / codebook / "codebook.json"
    return json.loads(path.read_text(encoding="utf-8")).get("made", "")


def labelled(folder: Path, made: str, key: str = "made") -> Path:
    """A client's ``folder`` of labels. Raises LabelsError where another study or codebook left others than ``made``."""
    path = folder / "settings.json"
    if made and path.exists() and json.loads(path.read_text(encoding="utf-8")).get(key) != made:
        raise LabelsError(f"{folder}: labels of another codebook; run the stage that makes them again, with --force")
    return folder


def model_config(p: params.Federation) -> hubert.HubertConfig:
    """Preset ``p.model`` with the sizes that ``p`` gives in place of its.

    Where only ``hidden_size`` is given, the feed-forward layers are four times as wide, and there are as many attention
    heads as in the preset or the next smaller number that divides the size. Raises ValueError when sizes do not fit.
    """
    chosen = {
        "hidden_size": p.hidden_size,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.attention_heads,
        "intermediate_size": p.feed_forward_size or (p.hidden_size and 4 * p.hidden_size),
        "conv_dim": p.conv_width and (p.conv_width,) * 7,
    }
    if p.hidden_size and not p.attention_heads:
        heads = hubert.preset(p.model).num_attention_heads
        chosen["num_attention_heads"] = next(n for n in range(heads, 0, -1) if p.hidden_size % n == 0)
    changes = {name: value for name, value in chosen.items() if value}
    return hubert.preset(p.model, p.front_end, **changes)


def steps(home: ClientHome, p: params.Federation, number: int) -> int:
    """Optimiser steps of a client in round ``number``: ``local_steps``, or ``local_epochs`` passes if fewer."""
    if not p.local_epochs:
        return p.local_steps
    samples = pd.read_parquet(home.data / "train.parquet", columns=["samples"])["samples"].to_numpy(dtype=np.int64)
    return min(p.local_steps, batching.steps_of(samples, p.local_epochs, p, (p.seed, number, home.client)))


def validation_steps(home: ClientHome, p: params.Federation) -> int:
    """Batches that this client's validation utterances fill, at most VALIDATION_BATCHES; 0 where it has none to use."""
    samples = pd.read_parquet(home.data / "validation.parquet", columns=["samples"])["samples"]
    samples = samples[samples >= audio.SHORTEST]
    if samples.empty:
        return 0
    seconds = samples.clip(upper=int(p.crop_seconds * audio.SAMPLE_RATE)).sum() / audio.SAMPLE_RATE
    return int(np.clip(seconds // p.batch_seconds, 1, VALIDATION_BATCHES))
