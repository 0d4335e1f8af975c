"""The stage 02_kmeans: fit each kind of codebook, have clients write their labels, measure what these are worth."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from pyarrow import parquet
from torch import Tensor

from fedhubert_lib import federated, files, params
from fedhubert_lib.evaluation import units
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients, Reply
from fedhubert_lib.kmeans import reading, server
from fedhubert_lib.kmeans.server import Exchange, KmeansError, Log

PER_CLIENT = ("client", "aligned")
"""Kinds whose codebooks stay with the clients."""
PROBE_FRAMES = 6000
"""Public frames that agreement is measured on at most: two minutes."""
AGREEMENT_CLIENTS = 40
"""Clients that agreement is measured between at most: pairs grow with the square."""


def run(
    run: Path, p: params.Kmeans, clients: Clients, on_row: Callable[[dict[str, Any]], None] | None = None
) -> pandas.DataFrame:
    """Fit the codebooks ``p.codebooks``, write all labels; the table of quality and cost, a row per codebook.

    Writes below ``run/02_kmeans``: ``codebooks/KIND/`` (codebook.json, centroids.npy where shared, counts of labels and
    of phone x label), ``clients/CID/KIND/`` (by the clients: see ``labels``), ``metrics.jsonl`` and ``quality.json``. A
    codebook that was fitted with the same settings is kept, and labelling goes on where it stopped. Each row of
    metrics.jsonl is also given to ``on_row``. Raises KmeansError, with what to change.
    """
    folder, features = run / "02_kmeans", Path(p.features).resolve()
    for later in (run / "03_pretrain", run / "04_distill"):
        if p.features != "mfcc" and features.is_relative_to(later.resolve()):
            raise KmeansError(
                f"features: {later} will be trained on these labels; give the second iteration a run of its own"
            )
    folder.mkdir(parents=True, exist_ok=True)

    def log(row: dict[str, Any]) -> None:
        row = {**row, "time": time.time()}
        files.append_row(folder / "metrics.jsonl", row)
        if on_row is not None:
            on_row(row)

    exchange, started = Exchange(clients, log), time.perf_counter()
    config, arrays, weights = server.prepare(p, exchange)
    if exchange.bytes_up or exchange.bytes_down:  # shared by all codebooks
        log({"kind": "features", **_bytes(exchange), "seconds": time.perf_counter() - started})
    probe = _probe(run, arrays | weights, {**config, "cache_features": False}, federated.resolve(p.device))
    rows, matrices = {}, {}
    for kind in p.codebooks:
        mine = {**config, "kind": kind}
        codebook, cost = _codebook(run, p, exchange, kind, arrays, mine, weights, log)
        started, before = time.perf_counter(), _bytes(exchange)
        like = {"counts": (p.clusters,), "runs": ()}
        replies = exchange.ask("kmeans.label", {**arrays, **codebook}, mine, like=like)
        rows[kind] = {**_quality(folder / "codebooks" / kind, replies, p), **cost}
        rows[kind] |= {f"label_{name}": value - before[name] for name, value in _bytes(exchange).items()}
        rows[kind]["label_seconds"] = time.perf_counter() - started
        if "fit_frames" in cost:
            rows[kind]["fit_share"] = cost["fit_frames"] / rows[kind]["labelled_frames"]
        if probe is not None:
            agreement, heldout = _agreement(exchange, probe, codebook, mine, p.seed)
            matrices[kind] = {name: table.to_numpy().tolist() for name, table in agreement.items()}
            matrices[kind]["clients"] = agreement["nmi"].index.tolist()
            rows[kind] |= {f"agreement_{name}": _off_diagonal(table) for name, table in agreement.items()} | heldout
        log({"kind": "quality", "codebook": kind, **rows[kind]})
    files.write_json(folder / "quality.json", {"codebooks": rows, "agreement": matrices})
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("codebook")


def _bytes(exchange: Exchange) -> dict[str, int]:
    return {"bytes_down": exchange.bytes_down, "bytes_up": exchange.bytes_up}


def _codebook(
    run: Path, p: params.Kmeans, exchange: Exchange, kind: str, arrays: Arrays, config: dict, weights: Arrays, log: Log
) -> tuple[Arrays, dict[str, Any]]:
    """What messages need to label with this codebook (nothing, where it is the client's own), and what it cost."""
    folder = run / "02_kmeans" / "codebooks" / kind
    settings = json.loads(json.dumps({**config, "lloyd_rounds": p.lloyd_rounds, "tolerance": p.tolerance}))
    reading.start_over_unless(folder, settings)
    path = folder / "codebook.json"
    if path.exists():
        stored = {name: folder / f"{name}.npy" for name in ("centroids", "projection")}
        codebook = {name: torch.from_numpy(np.load(file)) for name, file in stored.items() if file.exists()}
        return codebook, json.loads(path.read_text(encoding="utf-8"))["cost"]
    started, before = time.perf_counter(), _bytes(exchange)
    codebook, cost = _fit(run, p, exchange, kind, arrays, config, weights, log)
    cost |= {name: value - before[name] for name, value in _bytes(exchange).items()}
    cost["fit_seconds"] = time.perf_counter() - started
    for name, array in codebook.items():
        with files.atomic(folder / f"{name}.npy") as temporary:
            np.save(temporary, array.numpy())
    for name in ("mean", "deviation"):
        if name in arrays:
            with files.atomic(folder / f"{name}.npy") as temporary:
                np.save(temporary, arrays[name].numpy())
    files.write_json(
        path,
        {"kind": kind, "clusters": p.clusters, "settings": settings, "cost": cost, "clients": list(exchange.ids)},
    )
    log({"kind": "codebook", "codebook": kind, **cost})
    return codebook, cost


def _fit(
    run: Path, p: params.Kmeans, exchange: Exchange, kind: str, arrays: Arrays, config: dict, weights: Arrays, log: Log
) -> tuple[Arrays, dict[str, Any]]:
    progress = run / "02_kmeans" / "codebooks" / kind / "lloyd.safetensors"

    def named(row: dict[str, Any]) -> None:
        log({**row, "codebook": kind})

    if kind == "random-projection":
        return server.random_projection(config), {"rounds": 0}
    if kind in PER_CLIENT:
        fitted = list(exchange.ask("kmeans.fit", arrays, {**config, "kind": "own"}))
        frames = sum(reply.metrics["frames"] for reply in fitted)
        cost = {"rounds": 0, "fit_frames": frames, "inertia": sum(r.metrics["inertia"] for r in fitted) / frames}
        if kind == "client":
            list(exchange.ask("kmeans.own", {}, config))
            return {}, cost
        lender = max(fitted, key=lambda reply: reply.metrics["frames"]).client
        (lent,) = exchange.ask("kmeans.lend", {}, config, [lender], like={"centroids": (p.clusters, config["width"])})
        list(exchange.ask("kmeans.align", {"reference": lent.arrays["centroids"]}, config))
        return {}, {**cost, "rounds": 1, "reference": lender}
    if kind == "central":
        with _pooled(run, exchange.ids, federated.resolve(p.device)) as pooled:
            alone = Exchange(pooled, log)
            return _federated(p, alone, arrays | weights, {**config, "cache_features": False}, progress, named)
    if kind == "one-shot":
        centroids, cost = server.start(exchange, arrays, config)
        return {"centroids": centroids}, {"rounds": 1, "fit_frames": cost["frames"]}
    return _federated(p, exchange, arrays, config, progress, named)


def _federated(
    p: params.Kmeans, exchange: Exchange, arrays: Arrays, config: dict, progress: Path, log: Log
) -> tuple[Arrays, dict[str, Any]]:
    private = p.noise_multiplier > 0
    start = torch.empty(0)
    if not progress.exists():
        start = server.random_start(config) if private else server.start(exchange, arrays, config)[0]
    centroids, last = server.lloyd(
        exchange,
        arrays,
        config,
        start,
        rounds=p.lloyd_rounds,
        tolerance=p.tolerance,
        log=log,
        progress=progress,
    )
    cost = {"rounds": last["round"] + (not private), "fit_frames": last["frames"]}
    if private:
        cost |= {"epsilon": server.epsilon(last["round"], p.noise_multiplier), "delta": server.DELTA}
    else:
        cost["inertia"] = last["inertia"]
    return {"centroids": centroids}, cost


class _pooled:
    """One client that owns everything, for as long as the block lasts: the yardstick, possible in simulation only."""

    def __init__(self, run: Path, ids: Sequence[str], device: str) -> None:
        self.ids = ["pooled"]
        self._device = device
        self._sources = [run / "01_partition" / "clients" / client_id for client_id in ids]
        for source in self._sources:
            if not (source / "train.parquet").exists():
                raise KmeansError(f"{source}: codebook central needs all clients' data here; leave it out of codebooks")
        self._scratch = tempfile.TemporaryDirectory(dir=run / "02_kmeans", prefix=".pooled-")

    def __enter__(self) -> Clients:
        folder = Path(self._scratch.name)
        for part in ("train", "validation"):
            table = pandas.concat([pandas.read_parquet(source / f"{part}.parquet") for source in self._sources])
            table.sort_values("utterance").to_parquet(folder / f"{part}.parquet", index=False)
        self._home = ClientHome("pooled", data=folder, labels=folder, state=folder, device=self._device)
        return self

    def __exit__(self, *error: object) -> None:
        self._scratch.cleanup()

    def ask(self, action: str, *, arrays: Arrays, config: Mapping[str, Any], clients: object = None) -> Iterator[Reply]:
        """The pooled client's answer. An error is raised, not reported: there is no other client to go on with."""
        yield Reply("pooled", *handlers.HANDLERS[action](self._home, arrays, config))


def _quality(folder: Path, replies: Iterable[Reply], p: params.Kmeans) -> dict[str, Any]:
    """Usage and unit quality of a codebook from its clients' counts, over all of them and as the mean of each alone."""
    counts, runs, clients = np.zeros(p.clusters, np.int64), 0, 0
    names, total, alone = [], np.zeros((0, p.clusters), np.int64), []
    for reply in replies:
        counts += reply.arrays["counts"].numpy()
        runs += int(reply.arrays["runs"])
        clients += 1
        if (mine := server.phone_counts(reply)) is not None:
            names, total = units.added([(names, total), mine])
            if (mine[1].sum(1) > 0).sum() > 1:
                alone.append(units.quality_of_counts(mine[1], p.seed))
    row = {**units.usage(counts, runs), "clients": clients}
    with files.atomic(folder / "counts.npy") as temporary:
        np.save(temporary, counts)
    if alone:
        row |= units.quality_of_counts(total, p.seed)
        for name in ("pnmi", "shuffled_pnmi"):
            values, frames = [quality[name] for quality in alone], [quality["frames"] for quality in alone]
            row[f"{name}_within"] = float(np.average(values, weights=frames))
        with files.atomic(folder / "phones.parquet") as temporary:
            pandas.DataFrame(total, names).rename(columns=str).to_parquet(temporary)
    return row


class _Probe:
    """Public frames that all clients label, and their phones where known."""

    def __init__(self, frames: Tensor, phones: np.ndarray | None) -> None:
        self.frames, self.phones = frames, phones


def _probe(run: Path, arrays: Arrays, config: dict, device: str) -> _Probe | None:
    """Frames of held-out utterances, or of the test split; None where there are neither."""
    table = pandas.DataFrame()
    heldout = run / "01_partition" / "heldout.parquet"
    if heldout.exists():
        table = pandas.read_parquet(heldout)
    if table.empty and (run / "00_corpus" / "manifest.parquet").exists():
        table = pandas.read_parquet(run / "00_corpus" / "manifest.parquet", filters=[("split", "==", "test")])
    if table.empty:
        return None
    with tempfile.TemporaryDirectory(dir=run / "02_kmeans", prefix=".public-") as scratch:
        folder = Path(scratch)
        for part, rows in (("train", table), ("validation", table.iloc[:0])):
            rows.to_parquet(folder / f"{part}.parquet", index=False)
        home = ClientHome("public", data=folder, labels=folder, state=folder, device=device)
        everything = {**config, "sample_share": 1.0}
        chosen = reading.within(home, everything, PROBE_FRAMES)
        parts = list(reading.stream(home, arrays, everything, chosen))
    if not parts:
        return None
    lengths = [length for batch, _ in parts for length in batch]
    return _Probe(
        torch.cat([frames.cpu() for _, frames in parts]), _public_phones(run, chosen.utterance.tolist(), lengths)
    )


def _public_phones(run: Path, utterances: list[str], lengths: list[int]) -> np.ndarray | None:
    path = run / "00_corpus" / "phones.parquet"
    if not path.exists() or not parquet.read_metadata(path).num_rows:
        return None
    table = pandas.read_parquet(path, filters=[("utterance", "in", utterances)]).sort_values("start_sample")
    if table.empty:
        return None
    by_utterance = dict(iter(table.groupby("utterance")))
    found = []
    for utterance, length in zip(utterances, lengths, strict=True):
        rows = by_utterance.get(utterance, table.iloc[:0])
        segment = units.frame_phones(rows.start_sample.to_numpy(), rows.end_sample.to_numpy(), length)
        names = np.append(rows.phone.to_numpy(dtype=object), "")
        found.append(names[segment])  # segment -1 is the appended "", no phone
    return np.concatenate(found).astype(str)


def _agreement(
    exchange: Exchange, probe: _Probe, codebook: Arrays, config: dict, seed: int
) -> tuple[dict[str, pandas.DataFrame], dict[str, float]]:
    """Agreement matrices, and the mean unit quality of the clients' labels of the probe where its phones are known."""
    asked = list(exchange.ids)[:: -(-len(exchange.ids) // AGREEMENT_CLIENTS)]
    replies = exchange.ask(
        "kmeans.probe", {**codebook, "probe": probe.frames}, config, asked, like={"labels": (len(probe.frames),)}
    )
    labels = {reply.client: reply.arrays["labels"].numpy() for reply in replies}
    heldout = {}
    if probe.phones is not None:
        known = probe.phones != ""
        each = [units.quality(sequence[known], probe.phones[known], seed) for sequence in labels.values()]
        heldout = {
            "heldout_frames": int(known.sum()),
            "heldout_pnmi": float(np.mean([quality["pnmi"] for quality in each])),
            "heldout_shuffled_pnmi": float(np.mean([quality["shuffled_pnmi"] for quality in each])),
        }
    return units.agreement_matrices(labels), heldout


def _off_diagonal(table: pandas.DataFrame) -> float:
    values = table.to_numpy()
    return float(values[~np.eye(len(values), dtype=bool)].mean()) if len(values) > 1 else 1.0
