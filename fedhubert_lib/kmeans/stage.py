"""The stage 02_kmeans: fit each kind of codebook, have clients write their labels, measure what these are worth."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor

from fedhubert_lib import audio, federated, files, params, seeds, units
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients, Reply
from fedhubert_lib.kmeans import client, clustering, layers, reading, server
from fedhubert_lib.kmeans.server import Exchange, KmeansError, Log

PER_CLIENT = ("client", "aligned")
"""Kinds whose codebooks stay with the clients."""
PUBLIC_FRAMES = 30_000
"""Public frames at most whose features are computed: ten minutes, for the mean and deviation of their speakers."""
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
    codebook that was fitted with the same settings is kept, and features and labels resume where they stopped. Each row
    of metrics.jsonl is also given to ``on_row``. Raises KmeansError, with what to change; when more than
    ``missing_clients`` clients failed, the next start asks those alone for what is missing.
    """
    folder = run / "02_kmeans"
    for later in (run / "03_pretrain", run / "04_distill"):
        if p.features != "mfcc" and Path(p.features).resolve().is_relative_to(later.resolve()):
            raise KmeansError(
                f"features: {later} will be trained on these labels; give the second iteration a run of its own"
            )
    folder.mkdir(parents=True, exist_ok=True)

    def log(row: dict[str, Any]) -> None:
        row = {**row, "time": time.time()}
        files.append_row(folder / "metrics.jsonl", row)
        if on_row is not None:
            on_row(row)

    exchange, started = Exchange(clients, log, p.missing_clients), time.perf_counter()
    device = federated.resolve(p.device)
    layer = layers.choose(run, p, exchange, device, log)
    settings = server.describe(p, layer)[0] | p.model_dump(include={"codebooks", "lloyd_rounds", "tolerance"})
    finished = folder / "quality.json"
    if finished.exists() and (stored := json.loads(finished.read_text(encoding="utf-8"))).get("settings") == _as_json(
        settings
    ):
        list(exchange.ask("forget", {}, {}))  # a start that was killed here had nothing else to do
        return _table(stored["codebooks"])
    _state_space(run, p, layer, log)
    config, arrays, weights = server.prepare(p, layer, exchange)
    log({"kind": "features", **_bytes(exchange), "seconds": time.perf_counter() - started})
    probe = _probe(run, arrays | weights, config, device)
    rows, matrices = {}, {}
    for kind in p.codebooks:
        mine = {**config, "kind": kind}
        codebook, cost = _codebook(run, p, exchange, kind, arrays, mine, log)
        rows[kind] = _label(run, p, exchange, {**arrays, **codebook}, mine) | cost
        if "fit_frames" in cost and "labelled_frames" in rows[kind]:
            rows[kind]["fit_share"] = cost["fit_frames"] / rows[kind]["labelled_frames"]
        if probe is not None and (codebook or not p.noise_multiplier):
            agreement, heldout = _agreement(exchange, probe, codebook, mine, p.seed)
            matrices[kind] = {name: table.to_numpy().tolist() for name, table in agreement.items()}
            matrices[kind]["clients"] = agreement["nmi"].index.tolist()
            rows[kind] |= {f"agreement_{name}": _off_diagonal(table) for name, table in agreement.items()} | heldout
        log({"kind": "quality", "codebook": kind, **rows[kind]})
    files.write_json(finished, {"codebooks": rows, "agreement": matrices, "settings": settings})
    list(exchange.ask("forget", {}, config))
    return _table(rows)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> pandas.DataFrame:
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("codebook")


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _state_space(run: Path, p: params.Kmeans, layer: int, log: Log) -> None:
    """Say what features will take of this disk, and refuse where it does not hold them: all clients', in a simulation.

    A client of a real federation looks at its own disk.
    """
    table = run / "01_partition" / "clients.parquet"
    if p.engine == "deployment" or not table.exists():
        return
    config, _ = server.describe(p, layer)
    seconds = 3600 * float(pandas.read_parquet(table, columns=["hours"]).hours.sum())
    size = seconds * audio.SAMPLE_RATE / audio.HOP * config["width"] * reading.dtype_of(config).itemsize
    log({"kind": "disk", "feature_bytes": int(size)})
    reading.require_space(run / "02_kmeans", size - _written(run / "02_kmeans"))


def _written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("clients/*/features/features.bin"))


def _label(run: Path, p: params.Kmeans, exchange: Exchange, arrays: Arrays, config: dict[str, Any]) -> dict[str, Any]:
    """Have every client write its labels; note who has them; quality and cost of that."""
    started, before = time.perf_counter(), _bytes(exchange)
    path = run / "02_kmeans" / "codebooks" / config["kind"] / "codebook.json"
    like = {} if p.noise_multiplier else {"counts": (p.clusters,), "runs": ()}
    replies = list(exchange.ask("label", arrays, config, like=like))
    files.write_json(
        path, json.loads(path.read_text(encoding="utf-8")) | {"labelled": [reply.client for reply in replies]}
    )
    row = _quality(path.parent, replies, p) if not p.noise_multiplier else {"clients": len(replies)}
    row |= {f"label_{name}": value - before[name] for name, value in _bytes(exchange).items()}
    return row | {"label_seconds": time.perf_counter() - started}


def _bytes(exchange: Exchange) -> dict[str, int]:
    return {"bytes_down": exchange.bytes_down, "bytes_up": exchange.bytes_up}


def _codebook(
    run: Path, p: params.Kmeans, exchange: Exchange, kind: str, arrays: Arrays, config: dict, log: Log
) -> tuple[Arrays, dict[str, Any]]:
    """What messages need to label with this codebook (nothing, where it is the client's own), and what it cost."""
    folder = run / "02_kmeans" / "codebooks" / kind
    settings = _as_json({**config, "lloyd_rounds": p.lloyd_rounds, "tolerance": p.tolerance})
    reading.start_over_unless(folder, settings)
    path = folder / "codebook.json"
    if path.exists():
        stored = {name: folder / f"{name}.npy" for name in ("centroids", "projection")}
        codebook = {name: torch.from_numpy(np.load(file)) for name, file in stored.items() if file.exists()}
        return codebook, json.loads(path.read_text(encoding="utf-8"))["cost"]
    started, before = time.perf_counter(), _bytes(exchange)
    codebook, cost = _fit(run, p, exchange, kind, arrays, config, log)
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
    run: Path, p: params.Kmeans, exchange: Exchange, kind: str, arrays: Arrays, config: dict, log: Log
) -> tuple[Arrays, dict[str, Any]]:
    progress = run / "02_kmeans" / "codebooks" / kind / "lloyd.safetensors"

    def named(row: dict[str, Any]) -> None:
        log({**row, "codebook": kind})

    if kind == "random-projection":
        return server.random_projection(config), {"rounds": 0}
    if kind in PER_CLIENT:
        fitted = list(exchange.ask("fit", arrays, {**config, "kind": "own"}))
        cost: dict[str, Any] = {"rounds": 0}
        if not p.noise_multiplier:
            frames = sum(reply.metrics["frames"] for reply in fitted)
            cost |= {"fit_frames": frames, "inertia": sum(reply.metrics["inertia"] for reply in fitted) / frames}
        if kind == "client":
            list(exchange.ask("own", {}, config))
            return {}, cost
        lender = max(fitted, key=lambda reply: reply.metrics["frames"]).client
        (lent,) = exchange.ask("lend", {}, config, [lender], like={"centroids": (p.clusters, config["width"])})
        list(exchange.ask("align", {"reference": lent.arrays["centroids"]}, config))
        return {}, {**cost, "rounds": 1, "reference": lender}
    if kind == "central":
        alone = exchange.uncounted(named)  # its bytes are nobody's
        config = {**config, "minimum_count": 0}
        start = _pooled_start(run, exchange.ids, arrays, config, federated.resolve(p.device))
        return _federated(p, alone, arrays, config, progress, named, start)
    if kind == "one-shot":
        centroids, cost = server.start(exchange, arrays, config)
        return {"centroids": centroids}, {"rounds": 1, "fit_frames": cost["frames"]}
    return _federated(p, exchange, arrays, config, progress, named)


def _federated(
    p: params.Kmeans,
    exchange: Exchange,
    arrays: Arrays,
    config: dict,
    progress: Path,
    log: Log,
    start: Tensor | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    private = p.noise_multiplier > 0
    if start is None:
        start = torch.empty(0)  # not needed where rounds are done already
        if not progress.exists():
            start = server.random_start(config) if private else server.start(exchange, arrays, config)[0]
    limits = {"rounds": p.lloyd_rounds, "tolerance": p.tolerance}
    centroids, last = server.lloyd(exchange, arrays, config, start, **limits, log=log, progress=progress)
    cost = {"rounds": last["round"] + (not private), "fit_frames": last["frames"]}
    if private:
        label = "not private: noise drawn from the seed" if p.noise_seeded else "client"
        spent = {"epsilon": server.epsilon(last["asked"], p.noise_multiplier), "delta": server.DELTA, "privacy": label}
        return {"centroids": centroids}, cost | spent
    return {"centroids": centroids}, cost | {"inertia": last["inertia"]}


def _pooled_start(run: Path, ids: Sequence[str], arrays: Arrays, config: dict, device: str) -> Tensor:
    """K-means of frames of all clients in one memory: where the yardstick begins; possible in simulation only.

    Its Lloyd rounds are the clients' sums, which are those of the pooled frames.
    """
    parts = []
    for client_id in ids:
        data, state = run / "01_partition" / "clients" / client_id, run / "02_kmeans" / "clients" / client_id
        if not (data / "train.parquet").exists():
            raise KmeansError(f"{data}: codebook central needs all clients' data here; leave it out of codebooks")
        home = ClientHome(client_id, data, state, state, device)
        parts.append(reading.in_memory(home, arrays, config, reading.FIT_FRAMES // len(ids)))
    rng = seeds.numpy_generator(config["seed"], "kmeans-central")
    return clustering.fit(torch.cat(parts), config["clusters"], rng)[0].float().cpu()


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
    """Frames of public speech; None where there is none."""
    table = layers.public(run, config, PUBLIC_FRAMES)
    if table.empty:
        return None
    with tempfile.TemporaryDirectory(dir=run / "02_kmeans", prefix=".public-") as scratch:
        folder = Path(scratch)
        for part, rows in (("train", table), ("validation", table.iloc[:0])):
            rows.to_parquet(folder / f"{part}.parquet", index=False)
        home = ClientHome("public", data=folder, labels=folder, state=folder, device=device)
        reading.compute(home, arrays, config)
        chosen = reading.within(table, config, PROBE_FRAMES)
        parts = list(reading.stream(home, arrays, config, chosen))
    if not parts:
        return None
    lengths = [length for batch, _ in parts for length in batch]
    frames = torch.cat([frames.cpu() for _, frames in parts])
    return _Probe(frames, layers.public_phones(run, chosen.utterance.tolist(), lengths))


def _agreement(
    exchange: Exchange, probe: _Probe, codebook: Arrays, config: dict, seed: int
) -> tuple[dict[str, pandas.DataFrame], dict[str, float]]:
    """Agreement matrices, and the mean unit quality of the clients' labels of the probe where its phones are known."""
    asked = list(exchange.ids)[:: -(-len(exchange.ids) // AGREEMENT_CLIENTS)]
    if codebook:  # one for all, so all clients label alike
        labels = dict.fromkeys(asked, client.assign(probe.frames, codebook).numpy())
    else:
        message, like = {"probe": probe.frames}, {"labels": (len(probe.frames),)}
        replies = exchange.ask("probe", message, config, asked, like=like)
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
