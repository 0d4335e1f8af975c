"""Features from a hidden layer of a checkpoint, for a second iteration: which layer, its weights, its frames."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhubert_lib import audio, files, params, pretrained, resources, seeds, threads, units
from fedhubert_lib.federated.protocol import Arrays, digest
from fedhubert_lib.hubert import Hubert, HubertConfig
from fedhubert_lib.kmeans import clustering, public, server
from fedhubert_lib.kmeans.server import KmeansError, Log

CLUSTERS = 100
"""Clusters of each layer that are compared, at most: an order among layers needs no more, and takes less speech."""
FORWARD_SAMPLES = 5000 * audio.HOP
"""Longest stretch that one forward pass of a checkpoint sees: 100 s, as in fairseq's feature dump."""

_MODELS: dict[str, Hubert] = {}


def describe(p: params.Kmeans, layer: int | None) -> tuple[dict[str, Any], Arrays]:
    """The settings that every message carries, and the weights that features of ``layer`` take.

    Weights go up to ``layer`` (None: the last), so that clients need no file of the server's.
    """
    model, _ = pretrained.load(p.features)
    depth = model.config.num_hidden_layers
    layer = depth if layer is None else layer
    if layer > depth:
        raise KmeansError(f"layer {layer} of {p.features}, which has {depth}; set layer to 1..{depth}")
    # The last layer of a pre-norm model is normalised, others are not: one more keeps this one as it is.
    kept = min(depth, layer + model.config.do_stable_layer_norm)
    del model.encoder.layers[kept:]
    weights = model.state_dict()
    config = server.settings(p) | {
        "features": "hidden",
        "layer": layer,
        "checkpoint": digest(weights),
        "width": model.config.hidden_size,
        "model": dataclasses.asdict(dataclasses.replace(model.config, num_hidden_layers=kept)),
    }
    return config, {f"model/{name}": weight for name, weight in weights.items()}


def width(p: params.Kmeans) -> int:
    """Size of the checkpoint's frames, by its configuration alone."""
    return pretrained.read_config(Path(p.features)).hidden_size


def choose(run: Path, p: params.Kmeans, device: str, log: Log) -> int:
    """The hidden layer to cluster: ``p.layer``, or the one that scores best on public speech.

    The score is PNMI where phones of that speech are known, otherwise the mean NMI of a layer's clusters with those of
    the other layers. Scores go to ``layer.json``, which a restart reads. Raises KmeansError without public speech.
    """
    if p.layer != "auto":
        return int(p.layer)
    path = run / "02_kmeans" / "layer.json"
    config, weights = describe(p, None)
    if path.exists() and (row := json.loads(path.read_text(encoding="utf-8")))["checkpoint"] == config["checkpoint"]:
        return row["layer"]
    table, phones = public.speech(run, config)
    if table.empty:
        raise KmeansError("layer: auto measures layers on speech of no client, and the run has none; set layer")
    layers, sequences = range(1, config["model"]["num_hidden_layers"] + 1), []
    parts = public.extracted(weights, config, table, device, layers)
    for number in range(len(layers)):  # one layer at a time is more than float16: ten minutes of base's are 0.6 GB
        frames = torch.cat(public.normalised([part[number].float() for part in parts], table.speaker, config))
        rng = seeds.numpy_generator(p.seed, "kmeans-layers")
        centroids = clustering.fit(frames, min(p.clusters, CLUSTERS, len(frames)), rng)
        sequences.append(clustering.nearest(frames, centroids).numpy())
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


def model_of(arrays: Mapping[str, Tensor], config: Mapping[str, Any], device: str) -> Hubert:
    """The checkpoint whose hidden layer is clustered, out of the message; the last one stays loaded in this process."""
    key = json.dumps([config["checkpoint"], config["model"], device])
    if key not in _MODELS:
        _MODELS.clear()
        model = Hubert(HubertConfig(**config["model"]))
        prefix = "model/"
        model.load_state_dict({n.removeprefix(prefix): value for n, value in arrays.items() if n.startswith(prefix)})
        _MODELS[key] = model.to(device).eval()
    return _MODELS[key]


def states(model: Hubert, waveforms: Sequence[Tensor], layers: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Outputs of transformer ``layers`` (1 is the first; 0 is its input) for each waveform: float32 [L, frames, D].

    In bfloat16 where the device is faster with it. Utterances pass one by one, without padding, which a group-norm
    front end would take for speech; on a CPU one on each core, so that neither company nor cores change a bit. One
    longer than 100 s passes in equal pieces of at most 5,000 frames; its frames are as many as in one pass. As in
    fairseq's feature dump it is normalised as a whole before, where the model asks for it.
    """

    def of(waveform: Tensor) -> Tensor:
        waveform = audio.normalise(waveform) if model.config.do_normalize else waveform
        pieces, frames = [torch.zeros(len(layers), 0, model.config.hidden_size)], audio.frame_count(len(waveform))
        count = max(1, -(-frames * audio.HOP // FORWARD_SAMPLES))
        step = -(-frames // count) * audio.HOP or 1  # equal ones: a rest of a few frames is no speech to a model
        length = step + audio.RECEPTIVE_FIELD - 1  # as long as makes no frame more
        with torch.inference_mode(), resources.autocast(device, "auto"):
            for start in range(0, frames * audio.HOP, step):
                piece = waveform[start : start + length].to(device)
                hidden = model(piece[None], hidden_states=True, normalised=True).hidden
                pieces.append(torch.stack([hidden[layer][0].float() for layer in layers]).cpu())
        return torch.cat(pieces, dim=1)

    return threads.each(of, waveforms) if torch.device(device).type == "cpu" else map(of, waveforms)
