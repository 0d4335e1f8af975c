"""The stage 02_kmeans: fit each kind of codebook, have clients write their labels, measure what these are worth."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

from fedhubert_lib import files, resources, seeds, units
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import Arrays, Clients, digest
from fedhubert_lib.kmeans import client, clustering, public, reading, server
from fedhubert_lib.kmeans.server import Exchange, KmeansError, Log

if TYPE_CHECKING:
    from fedhubert_lib.params import Kmeans

PROBE_FRAMES = 6000
"""Public frames that clients label with codebooks of their own, at most: two minutes."""
AGREEMENT_CLIENTS = 40
"""Clients that agreement is measured between at most: pairs grow with the square."""


def run(
    run: Path, p: "Kmeans", clients: Clients, on_row: Callable[[dict[str, Any]], None] | None = None
) -> pd.DataFrame:
    """Fit the codebooks ``p.codebooks``, write all labels; the table of quality and cost, a row per codebook.

    Writes below ``run/02_kmeans``: ``codebooks/KIND/`` (codebook.json, centroids.npy where shared, counts of labels and
    of phone x label), ``clients/CID/KIND/`` (by the clients: see ``labels``), ``metrics.jsonl`` and ``quality.json``. A
    codebook that was fitted with the same settings is kept, and features and labels resume where they stopped. Each row
    of metrics.jsonl is also given to ``on_row``. Raises KmeansError, with what to change; when more than
    ``missing_clients`` clients failed, the next start asks those alone for what is missing.
    """
    folder = run / "02_kmeans"

    def log(row: dict[str, Any]) -> None:
        row = {**row, "time": time.time()}
        files.append_row(folder / "metrics.jsonl", row)
        if on_row is not None:
            on_row(row)

    exchange, started = Exchange(clients, log, p.missing_clients), time.perf_counter()
    device, finished = resources.resolve(p.device), folder / "quality.json"
    if not finished.exists():
        reading.state_space(folder, p, log)
    config, weights = server.settings(p), {}
    if p.features != "mfcc":
        hidden = reading.optional("hidden")
        config, weights = hidden.describe(p, hidden.choose(run, p, device, log))
    settings = json.loads(json.dumps(config | p.model_dump(include={"codebooks", "lloyd_rounds", "tolerance"})))
    if finished.exists():
        stored = json.loads(finished.read_text(encoding="utf-8"))
        if stored["settings"] == settings and all(_labelled(folder, kind, p, clients.ids) for kind in p.codebooks):
            list(clients.ask("kmeans.forget"))  # a start that was killed here had nothing else to do
            return _table(stored["codebooks"])
        finished.unlink()  # codebooks and labels of other settings take the place of those that it is of
        reading.state_space(folder, p, log)
    exchange.ids = [reply.client for reply in exchange.ask("features", weights, config)]  # others are not asked
    log({"kind": "features", **exchange.clients.bytes, "seconds": time.perf_counter() - started})
    probe = _probe(run, weights, config, device)
    rows, matrices = {}, {}
    for kind in p.codebooks:
        codebook, row = _codebook(run, p, exchange, {**config, "kind": kind}, log)
        row = _label(run, p, exchange, codebook, {**config, "kind": kind}) | row
        if "fit_frames" in row and "labelled_frames" in row and not p.minimum_count:
            row["fit_fraction"] = row["fit_frames"] / row["labelled_frames"]
        if probe is not None and ("centroids" in codebook or not p.noise_multiplier):
            matrices[kind], figures = _agreement(exchange, *probe, codebook, {**config, "kind": kind})
            row |= figures
        log({"kind": "quality", "codebook": kind, **row})
        rows[kind] = row
    files.write_json(finished, {"codebooks": rows, "agreement": matrices, "settings": settings})
    list(clients.ask("kmeans.forget"))  # a client that is away keeps features that it does not need
    return _table(rows)


def _labelled(folder: Path, kind: str, p: "Kmeans", ids: Sequence[str]) -> bool:
    """Whether a codebook and its labels are still there, those of all ``ids`` but as many as may be missing. Of
    labels in a real federation the clients alone know."""
    path = folder / "codebooks" / kind / "codebook.json"
    if not path.exists():
        return False
    labelled = json.loads(path.read_text(encoding="utf-8")).get("labelled", ids)
    if len(ids) - len(labelled) > p.missing_clients:
        return False
    folders = (folder / "clients" / client / kind for client in labelled)
    return p.engine == "deployment" or all((of_client / "index.parquet").exists() for of_client in folders)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("codebook")


# ------------------------------------------------------------------------------------------------------------ codebooks


def _codebook(
    run: Path, p: "Kmeans", exchange: Exchange, config: dict[str, Any], log: Log
) -> tuple[Arrays, dict[str, Any]]:
    """What messages need to label with this codebook (no centroids, where they are the clients'), and what it cost."""
    kind, started, before = config["kind"], time.perf_counter(), dict(exchange.clients.bytes)
    settings = {**config, "lloyd_rounds": p.lloyd_rounds, "tolerance": p.tolerance}
    folder = reading.folder_for(run / "02_kmeans" / "codebooks" / kind, settings)
    path = folder / "codebook.json"
    if path.exists():
        stored = {name: folder / f"{name}.npy" for name in client.ARRAYS}
        codebook = {name: torch.from_numpy(np.load(file)) for name, file in stored.items() if file.exists()}
        return codebook, json.loads(path.read_text(encoding="utf-8"))["cost"]
    codebook, cost = _fit(run, p, exchange, config, lambda row: log({**row, "codebook": kind}))
    if kind != "central":  # whose cost would be that of pooling the data
        cost |= exchange.clients.since(before)
    cost["fit_seconds"] = time.perf_counter() - started
    if unknown := codebook.keys() - set(client.ARRAYS):  # clients and a resumed run would do without them
        raise KmeansError(f"codebook {kind}: name its {', '.join(sorted(unknown))} in ARRAYS of kmeans/client.py, too")
    for name, array in codebook.items():
        with files.atomic(folder / f"{name}.npy") as temporary:
            np.save(temporary, array.numpy())
    facts = {"kind": kind, "clusters": p.clusters, "settings": settings, "cost": cost, "clients": exchange.ids}
    facts["made"] = digest({**codebook, json.dumps(settings, sort_keys=True): torch.zeros(0)})
    files.write_json(path, facts)
    log({"kind": "codebook", "codebook": kind, **cost})
    return codebook, cost


def _fit(run: Path, p: "Kmeans", exchange: Exchange, config: dict[str, Any], log: Log) -> tuple[Arrays, dict[str, Any]]:
    kind, before = config["kind"], dict(exchange.clients.bytes)
    progress = run / "02_kmeans" / "codebooks" / kind / "lloyd.safetensors"
    if kind == "random-projection":
        return server.random_projection(config), {"rounds": 0}
    if kind in ("client", "aligned"):
        return _of_each_client(p, exchange, config)
    if kind == "one-shot":
        centroids, cost = server.start(exchange, config)
        return {"centroids": centroids}, cost
    if kind == "central":
        config = {**config, "minimum_count": 0}
    elif kind != "federated":
        raise KmeansError(f"codebook {kind}: kmeans/stage.py does not fit it yet")
    if progress.exists():
        start = torch.empty(0)  # not needed where rounds are done already
    elif kind == "central":
        start = _pooled_start(run, exchange.ids, config, resources.resolve(p.device))
    elif config["noise_multiplier"]:
        start = reading.optional("private").random_start(config)
    else:
        start, _ = server.start(exchange, config)
    limits = {"rounds": p.lloyd_rounds, "tolerance": p.tolerance, "before": before}
    centroids, last = server.lloyd(exchange, config, start, **limits, log=log, progress=progress)
    cost = {"rounds": last["round"], "fit_frames": last["frames"]}
    if config["noise_multiplier"]:
        return {"centroids": centroids}, cost | reading.optional("private").cost(p, last["asked"])
    return {"centroids": centroids}, cost | {"rounds": last["round"] + 1, "inertia": last["inertia"]}


def _of_each_client(p: "Kmeans", exchange: Exchange, config: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Have every client fit a codebook and keep it; for ``aligned`` that of the one with most frames is a reference."""
    told = () if p.noise_multiplier else ("frames", "inertia")
    replies = list(exchange.ask("fit", {}, config, metrics=told))
    cost: dict[str, Any] = {"rounds": 0}
    if not p.noise_multiplier:
        frames = sum(reply.metrics["frames"] for reply in replies)
        cost |= {"fit_frames": frames, "inertia": sum(reply.metrics["inertia"] for reply in replies) / frames}
    if config["kind"] == "client":
        return {}, cost
    lender = max(replies, key=lambda reply: reply.metrics["frames"]).client
    (lent,) = exchange.ask("lend", {}, config, [lender], like={"centroids": (p.clusters, config["width"])})
    return {"reference": lent.arrays["centroids"]}, cost | {"rounds": 1, "reference": lender}


def _pooled_start(run: Path, ids: Iterable[str], config: dict[str, Any], device: str) -> Tensor:
    """K-means of frames of all clients in one memory, as a simulation alone has them: where the baseline begins."""
    homes = [handlers.home(run, client_id, "kmeans", device, simulated=True) for client_id in ids]
    # One draw from all: of many clients a part of FIT_FRAMES each would be less than an utterance.
    tables = pd.concat({number: reading.sampled(home, config) for number, home in enumerate(homes)})
    tables = reading.within(tables, config, reading.FIT_FRAMES).groupby(level=0)
    parts = [reading.in_memory(homes[number], config, table) for number, table in tables]
    if not parts:
        raise KmeansError("no client has speech to fit codebook central on; leave it out of codebooks")
    rng = seeds.numpy_generator(config["seed"], "kmeans-central")
    return clustering.fit(torch.cat(parts), config["clusters"], rng).float().cpu()


# -------------------------------------------------------------------------------------------------------------- quality


def _label(run: Path, p: "Kmeans", exchange: Exchange, arrays: Arrays, config: dict[str, Any]) -> dict[str, Any]:
    """Have every client write its labels; note who has them; what that cost, and what the labels are worth.

    Usage and unit quality come from the clients' counts, over all of them and as the mean of each alone.
    """
    started, before, labelled, row = time.perf_counter(), dict(exchange.clients.bytes), [], {}
    folder = run / "02_kmeans" / "codebooks" / config["kind"]
    facts = json.loads((path := folder / "codebook.json").read_text(encoding="utf-8"))
    if "made" in facts:  # else labels of an earlier version stay as they are
        config = {**config, "made": facts["made"]}
    counts, runs = np.zeros(p.clusters, np.int64), 0
    total, alone = ([], np.zeros((0, p.clusters), np.int64)), []
    like = {} if p.noise_multiplier else {"counts": (p.clusters,), "runs": ()}
    for reply in exchange.ask("label", arrays, config, like=like):
        labelled.append(reply.client)
        if p.noise_multiplier:  # which covers no counts of labels
            continue
        counts += reply.arrays["counts"].long().numpy()
        runs += int(reply.arrays["runs"])
        if "phones" in reply.arrays:
            phones = server.phone_names(reply.arrays["phones"]), reply.arrays["contingency"].long().numpy()
            total = units.added([total, phones])
            if (phones[1].sum(1) > 0).sum() > 1:
                alone.append(units.quality_of_counts(phones[1], p.seed))
    exchange.require(len(labelled))
    if not p.noise_multiplier:
        if counts.any() or not p.minimum_count:
            row = usage(counts, runs)
        with files.atomic(folder / "counts.npy") as temporary:
            np.save(temporary, counts)
    if alone:
        row |= units.quality_of_counts(total[1], p.seed)
        for name in ("pnmi", "shuffled_pnmi"):
            values, frames = [quality[name] for quality in alone], [quality["frames"] for quality in alone]
            row[f"{name}_within"] = float(np.average(values, weights=frames))
        with files.atomic(folder / "phones.parquet") as temporary:
            pd.DataFrame(total[1], total[0]).rename(columns=str).to_parquet(temporary)
    files.write_json(path, facts | {"labelled": labelled})
    row |= {f"label_{name}": count for name, count in exchange.clients.since(before).items()}
    return {**row, "clients": len(labelled), "label_seconds": time.perf_counter() - started}


def usage(counts: np.ndarray, runs: int) -> dict[str, float]:
    """How labels are used, from frames per label ``counts`` [K] and the number of ``runs`` of equal labels.

    ``label_entropy`` (ln K when all are equally frequent), ``cluster_use`` the fraction of the K labels that occur,
    ``mean_run`` in frames. Raises ValueError when there is no frame.
    """
    frames = int(counts.sum())
    if not frames:
        raise ValueError("no labelled frame: every utterance is shorter than 400 samples")
    return {
        "labelled_frames": frames,
        "label_entropy": float(scipy.stats.entropy(counts)),
        "cluster_use": float((counts > 0).mean()),
        "mean_run": frames / max(1, runs),
    }


def _probe(run: Path, weights: Arrays, config: dict[str, Any], device: str) -> tuple[Tensor, np.ndarray | None] | None:
    """Public frames, normalised, and their phones where known; None without public speech."""
    table, phones = public.speech(run, config)
    if table.empty:
        return None
    parts = [part[0].float() for part in public.extracted(weights, config, table, device)]
    return torch.cat(public.normalised(parts, table.speaker, config)), phones


def _agreement(
    exchange: Exchange, frames: Tensor, phones: np.ndarray | None, codebook: Arrays, config: dict[str, Any]
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Agreement matrices with their clients, JSON-like; their means over pairs, and the mean unit quality of the
    clients' labels of ``frames`` where ``phones`` are known."""
    asked = exchange.ids[:: -(-len(exchange.ids) // AGREEMENT_CLIENTS)]
    if "centroids" in codebook:  # one for all, by which all clients give the same labels
        labels = {asked[0]: client.assign(frames, codebook).numpy()}
        agreement = dict.fromkeys(("nmi", "match", "same"), pd.DataFrame(1.0, asked, asked))
    else:
        frames, phones = frames[:PROBE_FRAMES], None if phones is None else phones[:PROBE_FRAMES]
        replies = exchange.ask("probe", {"probe": frames, **codebook}, config, asked, like={"labels": (len(frames),)})
        labels = {reply.client: reply.arrays["labels"].long().numpy() for reply in replies}
        agreement = units.agreement_matrices(labels)
    matrices = {name: table.to_numpy() for name, table in agreement.items()}
    pairs = ~np.eye(len(agreement["nmi"]), dtype=bool)
    figures = {f"agreement_{name}": float(m[pairs].mean()) if pairs.any() else 1.0 for name, m in matrices.items()}
    if phones is not None and len({*phones} - {""}) > 1:  # of the first two minutes, too
        spoken = phones != ""
        qualities = [units.quality(labels[one][spoken], phones[spoken], config["seed"]) for one in labels]
        means = pd.DataFrame(qualities).mean()
        figures |= {f"heldout_{name}": float(means[name]) for name in ("frames", "pnmi", "shuffled_pnmi")}
    return {name: m.tolist() for name, m in matrices.items()} | {"clients": list(agreement["nmi"].index)}, figures
