"""What a client does for the codebooks: read its own audio, make features, answer with sums, write its labels.

Every function here that takes ``(home, arrays, config)`` is a handler: it reads the client's folder and the message,
and answers with arrays and metrics. ``config`` always holds the settings that ``server.prepare`` makes, and ``arrays``
its arrays: statistics of the ``global`` normalisation, weights of a checkpoint.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from fedhubert_lib import files, labels, seeds, units
from fedhubert_lib.federated import handlers, noise
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.kmeans import clustering, layers, reading

Answer = tuple[Arrays, dict[str, float]]


def moments(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Count, sum and sum of squares per dimension of the sampled frames: what ``global`` normalisation needs."""
    total, squares, count = 0.0, 0.0, 0
    for _, frames in reading.stream(home, arrays, config, reading.sampled(home, config), "none"):
        frames = frames.double()
        total, squares, count = total + frames.sum(0), squares + frames.square().sum(0), count + len(frames)
    _require(home, count, 1)
    return {"sum": total.cpu(), "squares": squares.cpu(), "count": torch.tensor(float(count)).double()}, {}


def compute(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Compute the features of all utterances, once, and keep them in the client's folder for all other messages."""
    reading.compute(home, arrays, config)
    return {}, {}


def forget(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Remove the features: all labels are written."""
    shutil.rmtree(home.state / "features", ignore_errors=True)
    return {}, {}


def local_centroids(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Centroids of this client's own k-means and the frames in each: float32 [k, D], float64 [k].

    k is ``config["local"]``, or the number of frames where those are fewer. Clusters below ``minimum_count`` are left
    out.
    """
    frames = reading.in_memory(home, arrays, config)
    _require(home, len(frames), 1)
    rng = seeds.numpy_generator(config["seed"], "kmeans-local", home.client)
    centroids, counts = clustering.fit(frames, min(config["local"], len(frames)), rng)
    kept = counts >= max(1, config["minimum_count"])
    return {"centroids": centroids[kept].float().cpu(), "counts": counts[kept].cpu()}, {}


def lloyd(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Sum [K, D], count [K] and inertia [K] of the sampled frames nearest to each of ``arrays["centroids"]``.

    Clusters below ``minimum_count`` are reported as empty. With ``noise_multiplier`` z, all that this client adds, sums
    and counts together, is scaled down to norm ``noise_clip``, and Gaussian noise of deviation z x ``noise_clip`` is
    added here, from the system's entropy, before anything leaves the client; no inertia is reported then.
    """
    centroids = arrays["centroids"].to(home.device)
    clusters, width = centroids.shape
    sums = torch.zeros(clusters, width, dtype=torch.float64)
    counts = torch.zeros(clusters, dtype=torch.float64)
    inertias = torch.zeros(clusters, dtype=torch.float64)
    for _, frames in reading.stream(home, arrays, config, reading.sampled(home, config)):
        added = clustering.statistics(frames, clustering.nearest(frames, centroids), centroids)
        for total, part in zip((sums, counts, inertias), added, strict=True):
            total += part.cpu()
    if private(config):
        # Sums are bounded in units of sqrt(D), the length of a frame whose dimensions have variance 1.
        released = {"sums": sums / width**0.5, "counts": counts}
        noise.clip(released, config["noise_clip"])
        normal = _noise(home, config)
        deviation = config["noise_multiplier"] * config["noise_clip"]
        sums = (released["sums"] + deviation * normal(*sums.shape)) * width**0.5
        counts = released["counts"] + deviation * normal(*counts.shape)
        inertias.zero_()
    if config["minimum_count"]:
        few = counts < config["minimum_count"]
        sums[few], counts[few], inertias[few] = 0, 0, 0
    return {"sums": sums, "counts": counts, "inertias": inertias}, {}


def private(config: Mapping[str, Any]) -> bool:
    """Whether nothing may leave a client but what noise covers."""
    return config["noise_multiplier"] > 0


def _noise(home: ClientHome, config: Mapping[str, Any]) -> Callable[..., Tensor]:
    if not config["noise_seeded"]:
        return noise.generator(None)
    if not home.simulated:
        raise ValueError("the server asks for noise from a seed that it knows; refused outside of a simulation")
    return noise.generator(config["seed"], config["round"], home.client, "kmeans")


def fit(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Fit this client's own codebook with fairseq's settings and keep it in the client's folder; nothing is sent.

    MiniBatchKMeans of scikit-learn: k-means++, 20 starts, batches of 10,000 frames, 100 passes at most, no
    reassignment.
    """
    start = time.perf_counter()
    folder = home.state / "own"
    reading.start_over_unless(folder, config)
    if not (folder / "centroids.npy").exists():
        frames = reading.in_memory(home, arrays, config)
        _require(home, len(frames), config["clusters"])
        model = MiniBatchKMeans(
            n_clusters=config["clusters"],
            init="k-means++",
            n_init=20,
            batch_size=10_000,
            max_iter=100,
            tol=0.0,
            max_no_improvement=100,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=seeds.derive(config["seed"], "kmeans-client", home.client) % 2**32,
        )
        # One thread: what several add up, they add in an order of their own.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct frames than clusters: see cluster_use
            model.fit(frames.cpu().numpy())
        centroids = torch.from_numpy(model.cluster_centers_).float()
        inertia = clustering.inertia(frames, centroids.to(frames.device))
        files.write_json(folder / "fit.json", {"frames": len(frames), "inertia": inertia})
        _save(folder / "centroids.npy", centroids)
    measured = {} if private(config) else json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    return {}, {**measured, "seconds": time.perf_counter() - start}


def own(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Take this client's own codebook as it is for ``config["kind"]``; nothing is sent."""
    _save(home.labels / config["kind"] / "centroids.npy", _own(home))
    return {}, {}


def lend(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Send this client's own codebook, for others to align theirs to: float32 [K, D]."""
    return {"centroids": _own(home)}, {}


def align(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Take this client's own codebook in the order that fits ``arrays["reference"]`` best; nothing is sent."""
    _save(home.labels / config["kind"] / "centroids.npy", clustering.matched(_own(home), arrays["reference"]))
    return {}, {}


def label(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Write the labels of all utterances of this client, training and validation, into its folder.

    Goes on at the first missing utterance when it was killed before, if the codebook is the same. Answers with what
    ``units`` needs: frames per label [K], the number of runs, and counts phone x label with the names of the
    phones (UTF-8, one a line) where the client knows the phones of its utterances. Nothing of it with
    ``noise_multiplier``: no noise covers it.
    """
    start = time.perf_counter()
    codebook = _codebook(home, arrays, config)
    folder = home.labels / config["kind"]
    reading.start_over_unless(folder, {**config, "codebook": _digest(codebook)}, keep="centroids.npy")
    table = reading.utterances(home)
    written = 0
    if not (folder / "index.parquet").exists():
        if any(name.startswith("model/") for name in arrays):
            reading.compute(home, arrays, config)
        with labels.writing(folder, "labels", labels.LABELS) as writer:
            missing = table[~table.utterance.isin(list(writer.done))]
            names = iter(missing.utterance.tolist())
            for lengths, frames in reading.stream(home, arrays, config, missing):
                nearest = assign(frames, codebook).cpu().numpy().astype(labels.LABELS)
                parts = np.split(nearest, np.cumsum(lengths)[:-1])
                writer.append({next(names): part for part in parts})
                written += len(nearest)
    seconds = time.perf_counter() - start
    counts = {} if private(config) else _counts(home, labels.Labels(folder), config["clusters"])
    return counts, {"frames": written, "seconds": seconds}


def probe(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """This client's labels of public frames, ``arrays["probe"]`` [N, D]: int32 [N]. No frame of its own is involved."""
    codebook = _codebook(home, arrays, config)
    return {"labels": assign(arrays["probe"].to(home.device), codebook).int().cpu()}, {}


handlers.HANDLERS |= {
    "kmeans.layers": layers.rate,
    "kmeans.features": compute,
    "kmeans.forget": forget,
    "kmeans.moments": moments,
    "kmeans.local_centroids": local_centroids,
    "kmeans.lloyd": lloyd,
    "kmeans.fit": fit,
    "kmeans.own": own,
    "kmeans.lend": lend,
    "kmeans.align": align,
    "kmeans.label": label,
    "kmeans.probe": probe,
}
"""What the server can ask of a client about codebooks."""


def _own(home: ClientHome) -> Tensor:
    return torch.from_numpy(np.load(home.state / "own" / "centroids.npy"))


def _save(path: Path, centroids: Tensor) -> None:
    with files.atomic(path) as temporary:
        np.save(temporary, centroids.numpy())


def _require(home: ClientHome, frames: int, needed: int) -> None:
    if frames < needed:
        raise ValueError(
            f"{home.client} has {frames} frames to fit {needed} clusters; lower clusters, raise sample_share, or give"
            " the client more speech (01_partition: minimum_minutes)"
        )


def _codebook(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Arrays:
    """The codebook of the message, or the client's own: ``centroids``, and ``projection`` for random-projection."""
    if "centroids" in arrays:
        names = [name for name in ("centroids", "projection") if name in arrays]
        return {name: arrays[name].to(home.device) for name in names}
    path = home.labels / config["kind"] / "centroids.npy"
    return {"centroids": torch.from_numpy(np.load(path)).to(home.device)}


def assign(frames: Tensor, codebook: Arrays) -> Tensor:
    """The label of each frame by ``codebook``: int64 [N]."""
    if "projection" in codebook:
        frames = torch.nn.functional.normalize(frames.double() @ codebook["projection"].double(), dim=1)
    return clustering.nearest(frames, codebook["centroids"])


def _digest(codebook: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(codebook):
        digest.update(codebook[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _counts(home: ClientHome, mine: labels.Labels, clusters: int) -> Arrays:
    """What quality needs of this client's labels, as sums."""
    counts, runs = np.zeros(clusters, np.int64), 0
    for utterance in mine.utterances:
        sequence = mine[utterance]
        counts += np.bincount(sequence, minlength=clusters)
        runs += units.runs(sequence)
    arrays = {"counts": torch.from_numpy(counts), "runs": torch.tensor(runs)}
    path = home.data / "phones.parquet"
    if path.exists():
        names, table = units.count_phones(pandas.read_parquet(path), mine, clusters)
        if names:
            arrays["phones"] = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
            arrays["contingency"] = torch.from_numpy(table)
    return arrays
