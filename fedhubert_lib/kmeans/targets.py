"""Targets of objective ``hubert`` in 04_distill: clusters of a hidden layer of the teacher, and clients' labels."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import distillation, files, params
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import ClientHome, Clients
from fedhubert_lib.kmeans import client, hidden, reading, server

ACTIONS = ("features", "local_centroids", "lloyd", "forget")
"""Handlers of k-means that work on the teacher's features as on others, in clients' parts of 04_distill."""


def label(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Label this client's utterances with the clusters of the teacher's features, for 04_distill; answer nothing."""
    client.label(replace(home, labels=home.state / "labels"), arrays, config)
    return {}, {}


handlers.HANDLERS |= {"targets.label": label}
handlers.HANDLERS |= {f"targets.{action}": handlers.HANDLERS[f"kmeans.{action}"] for action in ACTIONS}


def run(run: Path, p: params.Distill, clients: Clients) -> None:
    """Federated k-means of layer ``teacher_layer`` (none: the middle one), then every client's labels.

    Done before ``distillation.run``. The centroids stay in 04_distill/clusters. Raises TeacherError as that does.
    """
    teacher = distillation.read_teacher(run, p)
    path, depth = distillation.centroids(run, p, teacher), teacher.model.config.num_hidden_layers
    features = str(distillation.teacher_folder(run, p).resolve())
    kmeans = params.Kmeans(seed=p.seed, features=features, clusters=p.teacher_clusters, normalisation="none")
    kmeans = kmeans.model_copy(update={"engine": p.engine})
    config, weights = hidden.describe(kmeans, p.teacher_layer or max(1, depth // 2))
    config |= {"kind": path.stem}
    log = functools.partial(files.append_row, run / distillation.STAGE / "clusters.jsonl")
    quorum = 1.0 if p.centralised else p.quorum  # pooled training needs all labels
    missing = len(clients.ids) - math.ceil(quorum * len(clients.ids) - 1e-9)
    exchange = server.Exchange(clients, log, missing, stage="targets")
    if not path.exists():
        reading.state_space(run / distillation.STAGE, kmeans, log)
        exchange.ids = [reply.client for reply in exchange.ask("features", weights, config)]  # others are not asked
        start, _ = server.start(exchange, config)
        rounds, tolerance = kmeans.lloyd_rounds, kmeans.tolerance
        centroids, _ = server.lloyd(exchange, config, start, rounds=rounds, tolerance=tolerance)
        with files.atomic(path) as temporary:
            save_file({"centroids": centroids}, temporary)
    # A client whose labels are of these centroids computes nothing; another one may have to compute its features again.
    exchange.require(len(list(exchange.ask("label", {**weights, **load_file(path)}, config))))
    list(clients.ask("targets.forget"))
