"""What the server does for the codebooks: it sees clients' sums (of one frame: that frame), counts and centroids."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedhubert_lib import features, files, seeds
from fedhubert_lib.federated.protocol import Arrays, Clients, Failure, Reply
from fedhubert_lib.kmeans import clustering

if TYPE_CHECKING:
    from fedhubert_lib.params import Kmeans

LOCAL_POINTS = 50
"""Local centroids per cluster that all clients send together, so that their number does not grow with clients."""
LOCAL_LEAST = 16
"""Local centroids that a client sends at least."""
PROJECTED = 16
"""Dimensions of a random-projection codebook (Chiu et al. 2022, BEST-RQ, arXiv 2202.01855)."""

LARGEST, MOST = 1e15, 2**30
"""Numbers of an answer, whose squares must be float32; and what a client may count, frames of 6,000 hours."""
COUNTS = {"count", "squares", "counts", "inertias", "runs", "labels", "contingency"}
"""Arrays of answers that nothing but noise makes negative."""

PATIENCE = 10.0
"""Seconds between two rows that say how many clients have answered."""

Log = Callable[[dict[str, Any]], None]


class KmeansError(RuntimeError):
    """Codebooks cannot be fitted: too few clients answered, or they hold too little speech."""


class Exchange:
    """Asks clients; records those that fail, and goes without ``missing`` of them."""

    def __init__(self, clients: Clients, log: Log, missing: int = 0, stage: str = "kmeans") -> None:
        self.clients, self._log, self._missing, self._stage = clients, log, missing, stage
        self.ids = list(clients.ids)

    def ask(
        self,
        action: str,
        arrays: Mapping[str, Tensor],
        config: Mapping[str, Any],
        clients: Sequence[str] | None = None,
        like: Mapping[str, tuple[int | None, ...]] = MappingProxyType({}),
        metrics: Sequence[str] = (),
    ) -> Iterator[Reply]:
        """Usable replies, in order of client id: all finite, no count below 0, no label above K, with ``metrics`` and
        with arrays of the shapes in ``like`` (None: any length, of all arrays the same).

        Raises KmeansError, once all have been asked, when more than ``missing`` clients do not answer so, or none does.
        """
        asked = self.ids if clients is None else clients
        reasons, due = [], time.monotonic() + PATIENCE
        answers = self.clients.ask(f"{self._stage}.{action}", arrays=arrays, config=config, clients=asked)
        for number, reply in enumerate(answers, 1):
            if time.monotonic() > due:  # features of hundreds of hours take hours
                self._log({"kind": "answers", "action": action, "clients": number, "of": len(asked)})
                due = time.monotonic() + PATIENCE
            reason = reply.reason if isinstance(reply, Failure) else _unusable(reply, config, like, metrics)
            if reason:
                self._log({"kind": "failure", "action": action, "client": reply.client, "reason": reason})
                reasons.append(f"{reply.client}: {reason}")
            else:
                yield reply
        if len(reasons) > self._missing or len(reasons) == len(asked):
            more = f"\nand {len(reasons) - 5} more: see metrics.jsonl" if len(reasons) > 5 else ""
            raise KmeansError(
                f"{self._stage}.{action}: {len(reasons)} of {len(asked)} clients failed, and {self._missing} may (see"
                " missing_clients, in 04_distill quorum). The same command tries these again and keeps what the others"
                " have done.\n" + "\n".join(reasons[:5]) + more
            )

    def require(self, labelled: int) -> None:
        """Raise KmeansError where more than ``missing`` clients have no labels: in each step others may have failed."""
        if (absent := len(self.clients.ids) - labelled) > self._missing:
            raise KmeansError(
                f"{absent} of {len(self.clients.ids)} clients have no labels, and {self._missing} may be without (see"
                " missing_clients, in 04_distill quorum). The same command asks those for what is missing."
            )


def _unusable(
    reply: Reply, config: Mapping[str, Any], like: Mapping[str, tuple[int | None, ...]], metrics: Sequence[str]
) -> str:
    """Why a reply cannot be used; empty when it can."""
    arrays, clusters, lengths, like = reply.arrays, config["clusters"], set[int](), dict(like)
    if "phones" in arrays:
        names = phone_names(arrays["phones"])
        if len({*names}) < len(names):
            return "its answer names a phone twice"
        like["contingency"] = (len(names), clusters)
    for name, shape in like.items():
        if name not in arrays:
            return f"its answer has no {name}"
        sizes = tuple(arrays[name].shape)
        if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(shape, sizes, strict=True)):
            return f"{name} of its answer is {list(sizes)}, not {list(shape)}"
        lengths |= {size for n, size in zip(shape, sizes, strict=True) if n is None}
    if len(lengths) > 1:
        return f"{' and '.join(like)} of its answer differ in length: {sorted(lengths)}"
    # Codebooks are float32, in which a larger float64 is an infinity.
    unusable = [name for name, array in arrays.items() if array.is_complex() or not array.float().isfinite().all()]
    unusable += [name for name in metrics if not 0 <= reply.metrics.get(name, -1) < math.inf]
    if unusable:
        return f"its answer holds a NaN or an infinity, is complex, or lacks a figure ({', '.join(unusable)})"
    counted = {name: arrays[name].double().sum() for name in {"counts", "runs", "contingency"} & arrays.keys()}
    if large := [n for n, a in arrays.items() if (a.double().abs() > LARGEST).any() or counted.get(n, 0) > MOST]:
        return f"its answer holds numbers that no speech gives ({', '.join(large)})"
    if config["noise_multiplier"]:  # under which counts may be negative, and nothing but counts and sums is looked at
        return ""
    counts = {name: arrays[name].double() for name in sorted(COUNTS & arrays.keys())}
    if negative := [name for name, array in counts.items() if (array < 0).any()]:
        return f"its answer holds numbers below 0 ({', '.join(negative)})"
    if "labels" in counts and (counts["labels"] >= clusters).any():
        return f"its answer holds labels above {clusters - 1}"
    if "inertias" in like and (counts["inertias"][counts["counts"] == 0] > 0).any():
        return "its answer holds inertias of clusters without a frame"
    return ""


def phone_names(array: Tensor) -> list[str]:
    """Names that a client sends as UTF-8, uint8 [bytes], one a line."""
    return bytes(array.byte().flatten().tolist()).decode(errors="replace").split("\n")


def settings(p: "Kmeans") -> dict[str, Any]:
    """The settings that every message carries, for MFCCs; ``hidden.describe`` gives those for a checkpoint's layer."""
    names = {"normalisation", "sample_fraction", "seed", "clusters", "minimum_count"}
    names |= {"noise_multiplier", "noise_clip", "noise_seeded"}
    mfcc = {"features": "mfcc", "layer": 0, "checkpoint": "", "width": features.MFCC_DIMENSION}
    return p.model_dump(include=names) | mfcc


def start(exchange: Exchange, config: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Centroids from one message of each client: k-means of its count-weighted local centroids. float32 [K, D].

    Greedy k-means++ over them and Lloyd on them until it stands still: one-shot federated k-means after k-FED (Dennis
    et al. 2021, arXiv 2103.00697), which takes the farthest of them and a single step.
    """
    clusters = config["clusters"]
    local = min(clusters, max(LOCAL_LEAST, math.ceil(LOCAL_POINTS * clusters / len(exchange.ids))))
    like = {"centroids": (None, config["width"]), "counts": (None,)}
    replies = list(exchange.ask("local_centroids", {}, {**config, "local": local}, like=like))
    points = torch.cat([reply.arrays["centroids"] for reply in replies])
    weights = torch.cat([reply.arrays["counts"] for reply in replies])
    if len(points) < clusters:
        raise KmeansError(f"clients sent {len(points)} local centroids for {clusters} clusters; lower clusters")
    rng = seeds.numpy_generator(config["seed"], "kmeans-start")
    centroids = clustering.plus_plus(points, clusters, rng, weights)
    centroids = clustering.lloyd(points, centroids, rng, weights=weights).float()
    return centroids, {"rounds": 1, "fit_frames": float(weights.sum())}


def lloyd(
    exchange: Exchange,
    config: dict[str, Any],
    centroids: Tensor,
    *,
    rounds: int,
    tolerance: float,
    log: Log = lambda row: None,
    progress: Path | None = None,
    before: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Tensor, dict[str, Any]]:
    """Federated Lloyd from ``centroids``: each round clients send (sum, count, inertia) per cluster, the server adds.

    Equal to Lloyd on the pooled frames. Stops when the inertia of the same number of clients changes by a smaller
    fraction than ``tolerance`` and no cluster is empty. Returns centroids float32 [K, D] and, of the last round, its
    number, frames and inertia per frame. ``progress``, a file, is written before each round and at the end, and rounds
    in it are not done again; nor are bytes forgotten that travelled since ``clients.bytes`` was ``before``. Of private
    rounds ``asked`` counts those that clients were asked for, repeated ones included.
    """

    def save() -> None:
        if progress is not None:
            told = json.dumps(stats | {"bytes": exchange.clients.since(before)})
            with files.atomic(progress) as temporary:
                save_file({"centroids": centroids}, temporary, {"stats": told})

    private, stats = config["noise_multiplier"] > 0, {"round": 0, "asked": 0}
    if progress is not None and progress.exists():
        with safe_open(progress, "pt") as stored:
            centroids, stats = stored.get_tensor("centroids"), json.loads(stored.metadata()["stats"])
        for name, count in stats.pop("bytes", {}).items():
            exchange.clients.bytes[name] += count
    while stats["round"] < rounds and not stats.get("settled"):
        number, last, travelled = stats["round"] + 1, stats, dict(exchange.clients.bytes)
        stats = {**stats, "asked": stats["asked"] + 1}
        save()
        like = {"sums": centroids.shape, "counts": centroids.shape[:1], "inertias": centroids.shape[:1]}
        message, totals, clients = {**config, "round": number}, dict.fromkeys(like, 0.0), 0
        for reply in exchange.ask("lloyd", {"centroids": centroids}, message, like=like):
            totals = {name: total + reply.arrays[name] for name, total in totals.items()}
            clients += 1
        sums, counts, inertias = totals.values()
        frames, total = float(counts.sum()), float(inertias.sum())
        if private:  # the counts alone show which clusters are large; one within the noise is no cluster
            noise = config["noise_multiplier"] * config["noise_clip"] * clients**0.5
            inertias = counts = torch.where(counts > noise, counts, 0)
        elif not frames:
            raise KmeansError(
                f"no client has a cluster of minimum_count: {config['minimum_count']} frames; lower it, or clusters"
            )
        rng = seeds.numpy_generator(config["seed"], number, "kmeans-reseed")
        centroids = clustering.update(sums, counts, inertias, centroids, rng).float()
        stats |= {"round": number, "frames": frames, "empty": int((counts == 0).sum()), "clients": clients}
        if not private:  # whose rounds cost nothing: the file of a run that was killed is that of one that was not
            stats |= {"asked": number, "inertia": total / frames}
            change = abs(last["inertia"] - stats["inertia"]) if last.get("clients") == clients else math.inf
            stats["settled"] = not stats["empty"] and change <= tolerance * stats["inertia"]
        log({"kind": "lloyd", **stats, **exchange.clients.since(travelled)})
    save()
    return centroids, stats


def random_projection(config: Mapping[str, Any]) -> Arrays:
    """BEST-RQ's quantiser: a Xavier-uniform projection [D, 16] and unit-norm normal codes [K, 16]; nothing is fitted.

    Frames are projected, scaled to unit length and given the nearest code.
    """
    generator = seeds.torch_generator(config["seed"], "kmeans-random-projection")
    bound = math.sqrt(6 / (config["width"] + PROJECTED))
    projection = (2 * torch.rand(config["width"], PROJECTED, generator=generator) - 1) * bound
    codes = torch.randn(config["clusters"], PROJECTED, generator=generator)
    return {"centroids": torch.nn.functional.normalize(codes, dim=1), "projection": projection}
