"""Stage 04_distill: a smaller student learns from the pretrained teacher, over the same federation.

``update`` and ``validate`` run at a client, as in pretraining; what the student learns is in ``teaching``. The teacher
is frozen, so it need not travel with every round: clients read its public folder, or keep what was sent to them once,
and know it by its digest. ``run`` is the stage, ``centralised`` its yardstick on pooled data.
"""

import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedhubert_lib import (
    batching,
    checkpoints,
    federated,
    files,
    hubert,
    objectives,
    params,
    pooled,
    pretrained,
    recipes,
    resources,
    seeds,
    teaching,
    threads,
    training,
)
from fedhubert_lib import weights as named
from fedhubert_lib.federated import handlers, local, rounds, secure
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients, Failure
from fedhubert_lib.kmeans import client as kmeans_client
from fedhubert_lib.kmeans import server as kmeans_server
from fedhubert_lib.kmeans.reading import folder_for
from fedhubert_lib.labels import Labels
from fedhubert_lib.objectives import Sums
from fedhubert_lib.teaching import Teacher, TeacherError

STAGE = "04_distill"
TEACHER_LABELS = "teacher"
"""Folder of the clusters of the teacher's features, in a client's own part of 04_distill."""

TEACHER_CLUSTERING = ("features", "local_centroids", "lloyd", "forget")
"""What of k-means clients do for the clusters of the teacher's features, in their part of 04_distill."""

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------- at a client


def update(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """Train the global student on this client's utterances; return how it changed, and what was measured."""
    p = params.Distill.model_validate(config["params"])
    module = _filled(home, arrays, config)
    steps = recipes.steps(home, p, config["round"])
    stream = _client_batches(home, "train", p, config["round"], steps)
    return local.train(home, arrays, config, p, module, stream, _objective(module, _teacher(home, config), p), steps)


def validate(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """What the global student measures on this client's validation utterances; none: no sums."""
    p = params.Distill.model_validate(config["params"])
    if not (steps := recipes.validation_steps(home, p)):
        return {}, {}
    module = _filled(home, arrays, config)
    stream = _client_batches(home, "validation", p, 0, steps)
    objective = _objective(module, _teacher(home, config), p)
    return {}, training.evaluate(module, stream, objective, p.precision)


def receive(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """Say whether the teacher of ``config["digest"]`` is kept here (metric ``held``); one that comes along is kept, in
    place of earlier ones.

    Raises TeacherError when what came is not what the digest names.
    """
    folder = home.state / "teacher" / config["digest"]
    if arrays and not folder.exists():
        teacher = Teacher(*_build(config["model"], config["clusters"]))
        named.fill(_modules_of(teacher), arrays)
        if (found := digest(teacher)) != config["digest"]:
            raise TeacherError(f"{home.client}: received a teacher {found} where {config['digest']} was announced")
        pretrained.save(folder, teacher.model, teacher.head)
        for other in set(folder.parent.iterdir()) - {folder}:  # copies of the server's, which sends them again
            shutil.rmtree(other)
    return {}, {"held": float(folder.exists())}


def label(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Arrays, dict[str, float]]:
    """Label this client's utterances with the clusters of the teacher's features, in its part of 04_distill."""
    return kmeans_client.label(replace(home, labels=home.state / "labels"), arrays, config)


handlers.HANDLERS |= {
    "distill.update": update,
    "distill.validate": validate,
    "distill.keys": secure.keys,
    "distill.receive": receive,
    "distill.label": label,
    **{f"distill.{action}": handlers.HANDLERS[f"kmeans.{action}"] for action in TEACHER_CLUSTERING},
}
"""What the server can ask of a client in distillation."""


def _teacher(home: ClientHome, config: Mapping[str, Any]) -> Teacher:
    """The teacher that the message names, from this client's disk or its public folder; the last one is kept loaded."""
    kept = home.state / "teacher" / config["teacher"]["digest"]
    folder = str(kept) if kept.exists() else config["teacher"]["folder"]
    if not Path(folder, "config.json").is_file():
        raise TeacherError(f"{home.client} cannot read the teacher's folder {folder}; set send_teacher: true")
    return _load(folder, config["teacher"]["digest"], home.device)


@functools.lru_cache(maxsize=1)
def _load(folder: str, expected: str, device: str) -> Teacher:
    teacher = Teacher(*pretrained.load(folder))
    if (found := digest(teacher)) != expected:
        raise TeacherError(f"{folder}: holds teacher {found}, not the announced {expected}; it was changed or replaced")
    _modules_of(teacher).to(device)
    return teacher


def digest(teacher: Teacher) -> str:
    """One name for all bits of a teacher: configuration, weights and head."""
    result = hashlib.sha256(json.dumps(asdict(teacher.model.config), sort_keys=True).encode())
    for name, tensor in sorted(_modules_of(teacher).state_dict().items()):
        result.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return result.hexdigest()[:16]


def _modules_of(teacher: Teacher) -> nn.ModuleDict:
    modules = nn.ModuleDict({"model": teacher.model})
    if teacher.head is not None:
        modules["head"] = teacher.head
    return modules


def _build(model: Mapping[str, Any], clusters: int) -> tuple[hubert.Hubert, hubert.Head | None]:
    config = hubert.HubertConfig(**model)
    return hubert.Hubert(config), hubert.Head(config, clusters) if clusters else None


@functools.lru_cache(maxsize=1)
def _modules(model: str, clusters: int, regression: tuple[int, int], device: str) -> nn.ModuleDict:
    """The student, its head (if ``clusters``) and its regressors (if ``regression``: the teacher's width, layers)."""
    student, head = _build(json.loads(model), clusters)
    module = nn.ModuleDict({"model": student})
    if head is not None:
        module["head"] = head
    if regression[1]:
        module["regressors"] = teaching.Regressors(student.config.hidden_size, *regression)
    return module.to(device)


def _filled(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.ModuleDict:
    module = _modules(json.dumps(config["model"]), config["clusters"], tuple(config["regression"]), home.device)
    named.fill(module, arrays)
    return module


def _objective(module: nn.ModuleDict, teacher: Teacher, p: params.Distill) -> training.Objective:
    student = module["model"]

    def objective(batch: batching.Batch, progress: float) -> Sums:
        weight = objectives.unmasked_weight(p.unmasked_weight, p.unmasked_decay, progress)
        parts: list[tuple[float, Sums]] = []
        if "soft-targets" in p.objectives:
            weights = {"soft_weight": p.soft_weight, "label_weight": p.label_weight, "unmasked_weight": weight}
            sums = teaching.soft_targets(student, module["head"], teacher, batch, temperature=p.temperature, **weights)
            parts.append((1.0, sums))
        if "hubert" in p.objectives:
            sums = teaching.hubert_units(student, module["head"], batch, unmasked_weight=weight)
            parts.append((p.hubert_weight, sums))
        if "distilhubert" in p.objectives:
            layers = teaching.target_layers(teacher.model.config.num_hidden_layers)
            sums = teaching.layer_regression(student, module["regressors"], teacher, batch, layers=layers)
            parts.append((p.regression_weight, sums))
        return parts[0][1] if len(parts) == 1 else teaching.summed(parts)

    return objective


def _client_batches(
    home: ClientHome, part: str, p: params.Distill, number: int, steps: int
) -> Iterator[batching.Batch]:
    table = pd.read_parquet(home.data / f"{part}.parquet")
    return recipes.batches(table, Labels(_labels(home, p)), p, number, home.client, steps, device=home.device)


def _labels(home: ClientHome, p: params.Distill) -> Path:
    return home.state / "labels" / TEACHER_LABELS if "hubert" in p.objectives else home.labels / p.codebook


# -------------------------------------------------------------------------------------------------------- at the server


def run(run: Path, p: params.Distill, on_row: checkpoints.OnRow | None = None) -> Path:
    """The stage: federated distillation over ``p.engine``. Returns the folder of the student, 04_distill/checkpoint.

    Goes on where an earlier start stopped. ``on_row`` sees each row of 04_distill/metrics.jsonl as it is written.
    Raises TeacherError, before a round begins, when the teacher does not fit what is to be learned from it.
    """
    if p.centralised and p.engine == "deployment":
        pooled.homes(run, federated.client_ids(run, p.codebook), run, p.device)
    with threads.limited(p.threads), federated.connect(run, p.engine, p.device, p.codebook) as clients:
        return federate(run, p, clients, on_row)


def federate(
    run: Path,
    p: params.Distill,
    clients: Clients,
    on_row: checkpoints.OnRow | None = None,
    out: Path | None = None,
) -> Path:
    """What ``run`` does, over ``clients`` that are connected already; into ``out``, if not 04_distill."""
    p = rounds.sized(p, len(clients.ids))
    teacher, out = read_teacher(run, p), out or run / STAGE
    if "hubert" in p.objectives:
        cluster_teacher(run, p, clients, out)
    config, weights = initial(run, p, teacher)
    if p.send_teacher or p.engine == "deployment":  # whose clients read no folder of the server's
        send(clients, teacher)
    task = rounds.Task("distill", _message(run, p, teacher, config), teaching.averages, pretrained.documents(config))
    with rounds.serving(clients, p, task, weights, out, on_row) as server:
        rounds.run(server)
        return recipes.save(out / "checkpoint", config, server.weights)


def compare(run: Path, p: params.Distill, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Train a student with each objective of ``p.compare`` by itself, at equal updates, over ``p.compare_seeds`` seeds.

    Each federated and, if ``p.centralised``, on the pooled data. ``labels`` is the student that has no teacher: HuBERT
    on the labels of ``p.codebook``. Returns 04_distill/compared, which holds a folder OBJECTIVE/SEED for each, and
    untrained/SEED: the students as they began. ``on_progress`` is told how many are done. Goes on where an earlier
    start stopped.
    """
    folder = run / STAGE / "compared"
    pairs = list(itertools.product(range(p.seed, p.seed + p.compare_seeds), p.compare))
    for done, (seed, name) in enumerate(pairs):
        if on_progress:
            on_progress("objectives compared", done, len(pairs))
        alone, out = _alone(p, name, seed), folder / name / str(seed)
        with threads.limited(p.threads), federated.connect(run, p.engine, p.device, p.codebook) as clients:
            federate(run, alone, clients, out=out)
        if p.centralised:
            centralised(run, alone, out=out)
    teacher = read_teacher(run, p)
    for seed in range(p.seed, p.seed + p.compare_seeds):
        # Of all objectives the student begins alike; this one's needs no clusters to be drawn.
        start = initial(run, _alone(p, "distilhubert", seed), teacher)
        recipes.save(folder / "untrained" / str(seed) / "checkpoint", *start)
    if on_progress:
        on_progress("objectives compared", len(pairs), len(pairs))
    return folder


def _alone(p: params.Distill, name: str, seed: int) -> params.Distill:
    # What else is compared is no setting of this student: more can be compared later.
    changes: dict[str, Any] = {"seed": seed, "objectives": [name], "compare": [], "compare_seeds": 1}
    if name == "labels":
        changes |= {"objectives": ["soft-targets"], "soft_weight": 0.0, "label_weight": 1.0}
    return p.model_copy(update=changes)


def teacher_folder(run: Path, p: params.Distill) -> Path:
    """Where the teacher is: ``p.teacher``, or what 03_pretrain of this run wrote."""
    return Path(p.teacher) if p.teacher else run / "03_pretrain" / "checkpoint"


def read_teacher(run: Path, p: params.Distill) -> Teacher:
    """The teacher, after a look at whether it can teach what ``p`` asks. Raises TeacherError."""
    teacher = Teacher(*pretrained.load(teacher_folder(run, p)))
    check_teacher(run, p, teacher)
    return teacher


def check_teacher(run: Path, p: params.Distill, teacher: Teacher, clusters: int | None = None) -> None:
    """Raise TeacherError unless ``teacher`` can teach what ``p`` asks, and each objective that it compares.

    ``clusters`` is K of the run's codebooks where 02_kmeans is still to make them.
    """
    folder, depth = teacher_folder(run, p), teacher.model.config.num_hidden_layers
    if p.initial == "teacher":
        teaching.student_from(teacher.model, recipes.model_config(p))
    for alone in (_alone(p, name, p.seed) for name in p.compare):
        check_teacher(run, alone, teacher, clusters)
    if "hubert" in p.objectives and (p.teacher_layer or 1) > depth:
        raise TeacherError(f"{folder}: has {depth} layers, but teacher_layer is {p.teacher_layer}; give one of them")
    if "soft-targets" not in p.objectives or not p.soft_weight:
        return
    if teacher.head is None:
        raise TeacherError(
            f"{folder}: has no head.safetensors, so it predicts no clusters (it is public, or its heads are personal);"
            " give objectives: [distilhubert] or [hubert]"
        )
    known, found = len(teacher.head.label_embeddings), clusters or recipes.clusters(run, p.codebook)
    if p.label_weight and known != found:
        raise TeacherError(
            f"{folder}: predicts {known} clusters, and codebook {p.codebook} of this run has {found}; give the codebook"
            " that it was pretrained on, or label_weight: 0"
        )


def initial(run: Path, p: params.Distill, teacher: Teacher) -> tuple[hubert.HubertConfig, Arrays]:
    """The student's configuration and weights before round 1, named model.NAME, head.NAME and regressors.NAME."""
    config = recipes.model_config(p)
    module = _modules(json.dumps(asdict(config)), _clusters(run, p, teacher), _regression(p, teacher), "cpu")
    hubert.initialise(module["model"], seeds.torch_generator(p.seed, "student"))
    if p.initial == "teacher":
        module["model"].load_state_dict(teaching.student_from(teacher.model, config).state_dict())
    if "head" in module:
        hubert.initialise(module["head"], seeds.torch_generator(p.seed, "student-head"))
    if "regressors" in module:
        hubert.initialise(module["regressors"], seeds.torch_generator(p.seed, "regressors"))
    return config, {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _clusters(run: Path, p: params.Distill, teacher: Teacher) -> int:
    """K of the student's head; 0: it needs none."""
    if "soft-targets" in p.objectives:
        return len(teacher.head.label_embeddings) if p.soft_weight else recipes.clusters(run, p.codebook)
    return p.teacher_clusters if "hubert" in p.objectives else 0


def _regression(p: params.Distill, teacher: Teacher) -> tuple[int, int]:
    config = teacher.model.config
    layers = len(teaching.target_layers(config.num_hidden_layers)) if "distilhubert" in p.objectives else 0
    return config.hidden_size, layers


def _message(run: Path, p: params.Distill, teacher: Teacher, config: hubert.HubertConfig) -> dict[str, Any]:
    return {
        "params": p.model_dump(mode="json"),
        "model": asdict(config),
        "clusters": _clusters(run, p, teacher),
        "regression": _regression(p, teacher),
        "teacher": {"digest": digest(teacher), "folder": str(teacher_folder(run, p).resolve())},
    }


def send(clients: Clients, teacher: Teacher) -> int:
    """Send the teacher to those clients that do not keep it yet; returns how many. The log names one that fails."""
    announced = {"digest": digest(teacher)}
    lacking = [
        answer.client
        for answer in clients.ask("distill.receive", config=announced)
        if not isinstance(answer, Failure) and not answer.metrics["held"]
    ]
    announced |= {
        "model": asdict(teacher.model.config),
        "clusters": len(teacher.head.label_embeddings) if teacher.head is not None else 0,
    }
    arrays = {name: parameter.detach() for name, parameter in _modules_of(teacher).named_parameters()}
    for answer in clients.ask("distill.receive", arrays=arrays, config=announced, clients=lacking) if lacking else ():
        if isinstance(answer, Failure):
            logger.warning("%s did not take the teacher: %s", answer.client, answer.reason)
    return len(lacking)


def cluster_teacher(run: Path, p: params.Distill, clients: Clients, folder: Path) -> None:
    """Federated k-means of a hidden layer of the teacher, and every client's labels: the targets of ``hubert``.

    The centroids go to ``folder``. Every client's labels lie in its own part of 04_distill, those of the last call.
    """
    chosen = params.Kmeans(
        run=p.run,
        seed=p.seed,
        features=str(teacher_folder(run, p)),
        clusters=p.teacher_clusters,
        normalisation="none",
        device=p.device,
    )
    layer = p.teacher_layer or max(1, pretrained.read_config(teacher_folder(run, p)).num_hidden_layers // 2)
    config, weights = kmeans_server.describe(chosen, layer)
    config |= {"kind": TEACHER_LABELS}
    log = functools.partial(files.append_row, folder / "clusters.jsonl")
    exchange = kmeans_server.Exchange(clients, log, stage="distill")
    path = folder_for(folder / "clusters", config) / "centroids.safetensors"
    if not path.exists():
        arrays = kmeans_server.prepare(exchange, config, weights)
        start, _ = kmeans_server.start(exchange, arrays, config)
        limits = {"rounds": chosen.lloyd_rounds, "tolerance": chosen.tolerance}
        centroids, _ = kmeans_server.lloyd(exchange, arrays, config, start, **limits)
        with files.atomic(path) as temporary:
            save_file({"centroids": centroids}, temporary)
    # A client whose labels are of these centroids computes nothing; another one may have to compute its features again.
    list(exchange.ask("label", {**weights, **load_file(path)}, config))
    list(exchange.ask("forget", {}, config))


# --------------------------------------------------------------------------------------------------------- on all data


def centralised(run: Path, p: params.Distill, on_row: checkpoints.OnRow | None = None, out: Path | None = None) -> Path:
    """The same distillation on the pooled data, in ``centralised`` under ``out`` (04_distill); see ``pooled.train``.

    With objective ``hubert`` the labels are those that the clients wrote in ``federate``, which comes first then.
    """
    ids = federated.client_ids(run, p.codebook)
    out, p = (out or run / STAGE) / "centralised", rounds.sized(p, len(ids))
    teacher = read_teacher(run, p)
    config, weights = initial(run, p, teacher)
    message = {**_message(run, p, teacher, config), "session": "centralised"}
    device = resources.resolve(p.device)
    teacher = _load(message["teacher"]["folder"], message["teacher"]["digest"], device)
    module = _modules(json.dumps(asdict(config)), message["clusters"], message["regression"], device)
    homes = pooled.homes(run, ids, run / STAGE, device)
    table = pooled.utterances(homes)
    labels = pooled.labels(_labels(home, p) for home in homes.values())
    task = pooled.Task(
        module=module,
        weights=weights,
        batches=lambda number, count: recipes.batches(
            table, labels, pooled.merged(p), number, "all", count, device=device
        ),
        objective=_objective(module, teacher, p),
        validate=lambda home, arrays, number: validate(home, arrays, {**message, "round": number})[1],
        averages=teaching.averages,
        documents=pretrained.documents(config),
    )
    weights = pooled.train(p, homes, rounds.panel(ids, p), out, task, on_row)
    return recipes.save(out / "checkpoint", config, weights)
