"""Stage 04_distill: a smaller student learns from the pretrained teacher, over the same federation.

``update`` and ``validate`` run at a client, as in pretraining; the objectives are in ``teaching``. The teacher is
frozen, so it need not travel with every round: clients read its public folder, or keep what was sent to them once, and
check its digest. ``run`` is the stage; ``pooled`` trains its baseline.
"""

import functools
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from fedhubert_lib import checkpoints, hubert, objectives, params, pretrained, recipes, records, seeds, teaching
from fedhubert_lib import weights as named
from fedhubert_lib.batching import Batch
from fedhubert_lib.federated import handlers, local, protocol, rounds
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients, Failure
from fedhubert_lib.objectives import Sums
from fedhubert_lib.teaching import Teacher, TeacherError

STAGE = "04_distill"

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------- at a client


def update(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Train the global student on this client's utterances; return how it changed, and what was measured."""
    return local.train(home, arrays, config, lesson(home, arrays, config))


def validate(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Sums of the global student on this client's validation utterances; none: no sums."""
    return {}, local.validate(home, lesson(home, arrays, config))


def receive(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Whether the teacher of ``config["digest"]`` is kept here (metric ``held``); one that comes along is kept, in
    place of earlier ones.

    Raises TeacherError when what came is not what the digest names.
    """
    folder = home.state / "teacher" / config["digest"]
    if arrays and not folder.exists():
        model = hubert.HubertConfig(**config["model"])
        teacher = Teacher(hubert.Hubert(model), hubert.Head(model, config["clusters"]) if config["clusters"] else None)
        named.fill(teacher.modules, arrays)
        _require(teacher, config["digest"], f"what {home.client} received")
        pretrained.save(folder, teacher.model, teacher.head)
        for other in set(folder.parent.iterdir()) - {folder}:  # copies of the server's, which sends them again
            shutil.rmtree(other)
    return {}, {"held": float(folder.exists())}


handlers.HANDLERS |= {"distill.update": update, "distill.validate": validate, "distill.receive": receive}
"""What the server can ask of a client in distillation."""


def lesson(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> local.Lesson:
    """The student with the global weights, and what it learns of the teacher that the message names."""
    p, module = params.Distill.model_validate(config["params"]), _modules(json.dumps(config["student"]), home.device)
    named.fill(module, arrays)
    teacher = _teacher(home, config)
    objective = functools.partial(_objective, module, teacher, p)
    normalise = module["model"].config.do_normalize and teacher.model.config.do_normalize  # else those that do, do it
    return local.Lesson(p, module, objective, lambda home: _labels(home, config, p), normalise)


@functools.lru_cache(maxsize=1)
def _modules(student: str, device: str) -> nn.ModuleDict:
    """The student, with head and regressors where it has any, of its ``_sizes``; kept from one client to the next."""
    sizes = json.loads(student)
    config = hubert.HubertConfig(**sizes["model"])
    module = nn.ModuleDict({"model": hubert.Hubert(config)})
    if sizes["clusters"]:
        module["head"] = hubert.Head(config, sizes["clusters"])
    if sizes["regression"]:
        module["regressors"] = teaching.Regressors(config.hidden_size, *sizes["regression"])
    return module.to(device)


def _teacher(home: ClientHome, config: Mapping[str, Any]) -> Teacher:
    """The teacher that the message names, from this client's disk or its public folder; the last one is kept loaded."""
    folder = home.state / "teacher" / config["teacher"]["digest"]
    if home.simulated and not folder.exists():  # over a network no path of the server's is followed
        folder = Path(config["teacher"]["folder"])
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{home.client} has no teacher in {folder}; set send_teacher: true, or start 04 again")
    return _load(folder, config["teacher"]["digest"], home.device)


@functools.lru_cache(maxsize=1)
def _load(folder: Path, announced: str, device: str) -> Teacher:
    teacher = Teacher(*pretrained.load(folder))
    _require(teacher, announced, str(folder))
    teacher.modules.to(device)
    return teacher


def _require(teacher: Teacher, announced: str, place: str) -> None:
    if (received := digest(teacher)) != announced:
        raise TeacherError(f"{place}: is teacher {received}, not the announced {announced}; was it replaced?")


def digest(teacher: Teacher) -> str:
    """One name for all bits of a teacher: configuration, weights and head."""
    config = json.dumps(asdict(teacher.model.config), sort_keys=True)
    return protocol.digest({config + name: tensor for name, tensor in teacher.modules.state_dict().items()})


def _objective(module: nn.ModuleDict, teacher: Teacher, p: params.Distill, batch: Batch, progress: float) -> Sums:
    student, weight = module["model"], objectives.unmasked_weight(p.unmasked_weight, p.unmasked_decay, progress)
    parts: list[tuple[float, Sums]] = []
    if "soft-targets" in p.objectives:
        weights = {"soft_weight": p.soft_weight, "label_weight": p.label_weight, "unmasked_weight": weight}
        sums = teaching.soft_targets(student, module["head"], teacher, batch, temperature=p.temperature, **weights)
        parts.append((1.0, sums))
    if "hubert" in p.objectives:
        sums = objectives.masked_prediction(student, module["head"], batch, unmasked_weight=weight)
        parts.append((p.hubert_weight, sums))
    if "distilhubert" in p.objectives:
        sums = teaching.layer_regression(student, module["regressors"], teacher, batch)
        parts.append((p.regression_weight, sums))
    return parts[0][1] if len(parts) == 1 else teaching.summed(parts)


def _labels(home: ClientHome, config: Mapping[str, Any], p: params.Distill) -> Path:
    """The labels that the student predicts: of a codebook, or of the clusters of the teacher's features."""
    if "hubert" in p.objectives:
        folder = home.state / "labels" / target_name(p, config["teacher"]["digest"])
        return recipes.labelled(folder, config["labels"], "codebook")
    return recipes.labelled(home.labels / p.codebook, config["labels"])


# -------------------------------------------------------------------------------------------------------- at the server


def run(run: Path, p: params.Distill, on_row: checkpoints.OnRow | None = None, clients: Clients | None = None) -> Path:
    """The stage: federated distillation over ``p.engine``, or over ``clients`` that are connected already.

    Resumes where an earlier start stopped. ``on_row`` sees each row of 04_distill/metrics.jsonl as it is written.
    Returns the folder of the student, 04_distill/checkpoint. Raises TeacherError, before a round begins, when the
    teacher does not fit what is to be learned from it, or, for objective ``hubert``, its features have no clusters yet.
    """
    with rounds.connected(run, p, clients) as clients:
        teacher = read_teacher(run, p)
        if "hubert" in p.objectives and not centroids(run, p, teacher).exists():
            raise TeacherError(f"{centroids(run, p, teacher)}: not here; run kmeans.targets.run first")
        task, weights = begin(run, p, teacher)
        if p.send_teacher or p.engine == "deployment":  # whose clients read no folder of the server's
            send(clients, teacher)
        with rounds.serving(clients, p, task, weights, run / STAGE, on_row) as server:
            rounds.run(server)
            return checkpoints.save(run / STAGE / "checkpoint", server.weights, task.documents)


def teacher_folder(run: Path, p: params.Distill) -> Path:
    """Where the teacher is: ``p.teacher``, or what 03_pretrain of this run wrote."""
    return Path(p.teacher) if p.teacher else run / "03_pretrain" / "checkpoint"


def read_teacher(run: Path, p: params.Distill) -> Teacher:
    """The teacher, after a look at whether it can teach what ``p`` asks. Raises TeacherError."""
    teacher = Teacher(*pretrained.load(teacher_folder(run, p)))
    check_teacher(run, p, teacher)
    learned = p.codebook if p.teacher else records.parameters(run / "03_pretrain").get("codebook", p.codebook)
    if "soft-targets" in p.objectives and p.soft_weight and p.label_weight and learned != p.codebook:
        raise TeacherError(
            f"{teacher_folder(run, p)}: predicts codebook {learned}, and the labels are of {p.codebook}, whose numbers"
            " mean other sounds; give the same codebook, or one of soft_weight and label_weight as 0"
        )
    return teacher


def check_teacher(run: Path, p: params.Distill, teacher: Teacher, clusters: int | None = None) -> None:
    """Raise TeacherError unless ``teacher`` can teach what ``p`` asks.

    ``clusters`` is K of the run's codebooks where 02_kmeans is still to make them.
    """
    folder, depth = teacher_folder(run, p), teacher.model.config.num_hidden_layers
    if p.initial == "teacher":
        teaching.student_from(teacher.model, student_config(p, teacher))
    if "hubert" in p.objectives and (p.teacher_layer or 1) > depth:
        raise TeacherError(f"{folder}: has {depth} layers, but teacher_layer is {p.teacher_layer}; give one of them")
    if "soft-targets" not in p.objectives or not p.soft_weight:
        return
    if teacher.head is None:
        raise TeacherError(
            f"{folder}: has no head.safetensors, so it predicts no clusters (it is public, or its heads are personal);"
            " give soft_weight: 0, or objectives: [hubert]"
        )
    predicted, clusters = len(teacher.head.label_embeddings), clusters or recipes.clusters(run, p.codebook)
    if p.label_weight and predicted != clusters:
        raise TeacherError(
            f"{folder}: predicts {predicted} clusters, and codebook {p.codebook} of this run has {clusters}; give the"
            " codebook that it was pretrained on, or label_weight: 0"
        )


def target_name(p: params.Distill, teacher: str) -> str:
    """Name of the clusters that objective ``hubert`` predicts, of features of the teacher with this digest."""
    return f"{teacher}-layer-{p.teacher_layer or 'middle'}-clusters-{p.teacher_clusters}-seed-{p.seed}"


def centroids(run: Path, p: params.Distill, teacher: Teacher) -> Path:
    """Where ``kmeans.targets`` puts the centroids of those clusters."""
    return run / STAGE / "clusters" / f"{target_name(p, digest(teacher))}.safetensors"


def _sizes(run: Path, p: params.Distill, teacher: Teacher) -> dict[str, Any]:
    """The student's configuration, K of its head, and width and number of the layers that its regressors predict."""
    clusters, regression, config = 0, [], teacher.model.config
    if "soft-targets" in p.objectives:
        clusters = len(teacher.head.label_embeddings) if p.soft_weight else recipes.clusters(run, p.codebook)
    if "hubert" in p.objectives:
        clusters = p.teacher_clusters
    if "distilhubert" in p.objectives:
        regression = [config.hidden_size, len(teaching.target_layers(config.num_hidden_layers))]
    return {"model": asdict(student_config(p, teacher)), "clusters": clusters, "regression": regression}


def student_config(p: params.Distill, teacher: Teacher) -> hubert.HubertConfig:
    """The student's configuration. One that starts as the teacher takes over what its weights do not show.

    DistilHuBERT leaves no layer out: its student has two.
    """
    config, source = recipes.model_config(p), teacher.model.config
    if p.objectives == ["distilhubert"]:
        config = replace(config, layerdrop=0.0)
    heard = {"do_normalize": source.do_normalize, "conv_bias": source.conv_bias}
    return replace(config, **heard) if p.initial == "teacher" else config


def begin(run: Path, p: params.Distill, teacher: Teacher | None = None) -> tuple[rounds.Task, Arrays]:
    """What is trained, and the student's weights before round 1, named model.NAME, head.NAME and regressors.NAME."""
    teacher = teacher or read_teacher(run, p)
    sizes = _sizes(run, p, teacher)
    module = _modules(json.dumps(sizes), "cpu")
    config = module["model"].config
    for name, key in {"model": "student", "head": "student-head", "regressors": "regressors"}.items():
        if name in module:
            hubert.initialise(module[name], seeds.torch_generator(p.seed, key))
    if p.initial == "teacher":
        module["model"].load_state_dict(teaching.student_from(teacher.model, config).state_dict())
    source = {"digest": digest(teacher), "folder": str(teacher_folder(run, p).resolve())}
    message = {"params": p.model_dump(mode="json"), "student": sizes, "teacher": source}
    clusters = load_file(centroids(run, p, teacher)) if "hubert" in p.objectives else None
    message |= {"labels": protocol.digest(clusters) if clusters else recipes.provenance(run, p.codebook)}
    task = rounds.Task("distill", message, teaching.averages, pretrained.documents(config))
    return task, {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def send(clients: Clients, teacher: Teacher) -> int:
    """Send the teacher to those clients that do not keep it yet; returns how many. The log names one that fails."""
    config: dict[str, Any] = {"digest": digest(teacher)}
    answers = [answer for answer in clients.ask("distill.receive", config=config) if not isinstance(answer, Failure)]
    lacking = [answer.client for answer in answers if not answer.metrics.get("held")]
    config |= {"model": asdict(teacher.model.config)}
    config |= {"clusters": len(teacher.head.label_embeddings) if teacher.head is not None else 0}
    arrays = dict(teacher.modules.named_parameters())
    for answer in clients.ask("distill.receive", arrays=arrays, config=config, clients=lacking) if lacking else ():
        if isinstance(answer, Failure):
            logger.warning("%s did not take the teacher: %s", answer.client, answer.reason)
    return len(lacking)
