"""What a client does for the codebooks: read its own audio, make features, answer with sums, write its labels.

Every function here that takes ``(home, arrays, config)`` is a handler: it reads the client's folder and the message,
and answers with arrays and metrics. ``config`` always holds what ``server.settings`` or ``hidden.describe`` makes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import files, labels, seeds, units
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import Arrays, ClientHome, digest
from fedhubert_lib.kmeans import clustering, reading

ARRAYS = ("centroids", "projection", "reference")
"""Arrays of a codebook: kept in its folder, and sent to clients that label with it."""


def forget(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Remove the features, of earlier settings, too: all labels are written."""
    for folder in [home.state / "features", *home.state.glob(".previous/features-*")]:
        shutil.rmtree(folder, ignore_errors=True)
    return {}, {}


def local_centroids(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Centroids of this client's own k-means and the frames in each: float32 [k, D], float64 [k].

    k is ``config["local"]``, or the number of frames where those are fewer. Clusters below ``minimum_count`` are left
    out. Frames are those of two hours at most, so that no client counts for more.
    """
    frames = reading.in_memory(home, config)
    if not len(frames):
        raise ValueError(f"{home.client} has no frame to fit clusters on; give it speech, its samples at 16 kHz")
    rng = seeds.numpy_generator(config["seed"], "kmeans-local", home.client)
    centroids = clustering.fit(frames, min(config["local"], len(frames)), rng)
    counts = torch.bincount(clustering.nearest(frames, centroids), minlength=len(centroids)).double()
    kept = counts >= max(1, config["minimum_count"])
    return {"centroids": centroids[kept].float().cpu(), "counts": counts[kept].cpu()}, {}


def lloyd(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Sum [K, D], count [K] and inertia [K] of the sampled frames nearest to each of ``arrays["centroids"]``.

    Clusters below ``minimum_count`` are reported as empty. With ``noise_multiplier`` sums and counts are clipped and
    noised here (``private.released``), before anything leaves the client; no inertia is reported then.
    """
    centroids = arrays["centroids"].to(home.device)
    clusters, width = centroids.shape
    sums = torch.zeros(clusters, width, dtype=torch.float64)
    counts, inertias = torch.zeros(2, clusters, dtype=torch.float64)
    for parts in reading.stream(home, config, reading.sampled(home, config)):
        frames = torch.cat(parts)
        added = clustering.statistics(frames, clustering.nearest(frames, centroids), centroids)
        for total, part in zip((sums, counts, inertias), added, strict=True):
            total += part.cpu()
    if config["noise_multiplier"]:
        sums, counts = reading.optional("private").released(home, config, sums, counts)
        inertias.zero_()
    if config["minimum_count"]:
        few = counts < config["minimum_count"]
        sums[few], counts[few], inertias[few] = 0, 0, 0
    return {"sums": sums, "counts": counts, "inertias": inertias}, {}


def fit(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Fit this client's codebook ``client`` and keep it in the client's folder; nothing of it is sent."""
    path = _kept(home, config)
    if not path.exists():
        frames = reading.in_memory(home, config)
        if len(frames) < config["clusters"]:
            raise ValueError(
                f"{home.client} has {len(frames)} frames to fit {config['clusters']} clusters; lower clusters, raise"
                " sample_fraction, or give the client more speech (01_partition: minimum_minutes)"
            )
        rng = seeds.numpy_generator(config["seed"], "kmeans-client", home.client)
        centroids = clustering.fit(frames, config["clusters"], rng).float()
        facts = {"frames": len(frames), "inertia": clustering.inertia(frames, centroids)}
        with files.atomic(path) as temporary:
            save_file({"centroids": centroids.cpu()}, temporary, {"fit": json.dumps(facts)})
    with safe_open(path, "pt") as stored:
        return {}, {} if config["noise_multiplier"] else json.loads(stored.metadata()["fit"])


def lend(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Send this client's codebook ``client``, for others to align theirs to: float32 [K, D]."""
    return load_file(_kept(home, config)), {}


def label(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Write the labels of all utterances of this client, training and validation, into its folder.

    Resumes at the first missing utterance when it was killed before, if the codebook is the same. Answers with what
    ``units`` needs: frames per label [K], the number of runs, and counts phone x label with the names of the
    phones (UTF-8, one a line) where the client knows the phones of its utterances; counts below ``minimum_count`` as 0.
    Nothing of it with ``noise_multiplier``: no noise covers it.
    """
    table, codebook = reading.utterances(home), _codebook(home, arrays, config)
    settings = {**config, "codebook": digest(codebook), "utterances": reading.digest(table)}
    folder = reading.folder_for(home.labels / config["kind"], settings)

    def sequences(missing: pd.DataFrame) -> Iterator[list[np.ndarray]]:
        if any(name.startswith("model/") for name in arrays):
            reading.compute(home, arrays, config)
        for parts in reading.stream(home, config, missing):
            sequence = assign(torch.cat(parts), codebook).cpu()
            yield [part.numpy() for part in sequence.split([len(part) for part in parts])]

    labels.write(folder, "labels", table, labels.LABELS, None, sequences)
    return {} if config["noise_multiplier"] else _counts(home, labels.Labels(folder), config), {}


def probe(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """This client's labels of public frames, ``arrays["probe"]`` [N, D]: int32 [N]. No frame of its own is involved."""
    codebook = _codebook(home, arrays, config)
    return {"labels": assign(arrays["probe"].to(home.device), codebook).int().cpu()}, {}


handlers.HANDLERS |= {
    "kmeans.features": reading.compute,
    "kmeans.forget": forget,
    "kmeans.local_centroids": local_centroids,
    "kmeans.lloyd": lloyd,
    "kmeans.fit": fit,
    "kmeans.lend": lend,
    "kmeans.label": label,
    "kmeans.probe": probe,
}
"""What the server can ask of a client about codebooks."""


def _kept(home: ClientHome, config: Mapping[str, Any]) -> Path:
    """The file of the codebook ``client``, which stays with this client."""
    settings = {**config, "kind": "client", "utterances": reading.digest(reading.utterances(home))}
    settings.pop("made", None)  # of the labels
    return reading.folder_for(home.state / "codebook", settings) / "client.safetensors"


def _codebook(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Arrays:
    """The codebook of the message, or the one kept here, in the order that fits the message's ``reference`` best."""
    if "centroids" not in arrays:
        fit(home, {}, config)  # nothing to do unless this client was away when the others fitted theirs
        kept, reference = load_file(_kept(home, config)), arrays.get("reference")
        arrays = kept if reference is None else {"centroids": clustering.matched(kept["centroids"], reference)}
    return {name: arrays[name].to(home.device) for name in ARRAYS if name in arrays}


def assign(frames: Tensor, codebook: Arrays) -> Tensor:
    """The label of each frame by ``codebook``: int64 [N]."""
    if "projection" in codebook:
        frames = torch.nn.functional.normalize(frames.double() @ codebook["projection"].double(), dim=1)
    return clustering.nearest(frames, codebook["centroids"])


def _counts(home: ClientHome, sequences: labels.Labels, config: Mapping[str, Any]) -> Arrays:
    """What quality needs of this client's labels, as sums."""
    clusters = config["clusters"]
    counts = np.bincount(sequences.flat, minlength=clusters)
    told = counts >= config["minimum_count"]
    runs = sum(told[units.runs(sequences[utterance])].sum() for utterance in sequences.utterances)
    arrays = {"counts": torch.from_numpy(counts * told), "runs": torch.tensor(int(runs))}
    path = home.data / "phones.parquet"
    if path.exists() and not config["minimum_count"]:  # without rare pairs units would look far better than they are
        names, table = units.count_phones(pd.read_parquet(path), sequences, clusters)
        if names:
            arrays["phones"] = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
            arrays["contingency"] = torch.from_numpy(table)
    return arrays
