"""Stage 03_pretrain: HuBERT learns to predict the cluster labels of masked frames, over clients.

``update`` and ``validate`` run at a client: its audio, its labels and the global weights in, a change of weights out.
``run`` is the stage: the federated rounds, then the model folder. ``pooled`` trains its baseline.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedhubert_lib import batching, checkpoints, hubert, objectives, params, pretrained, recipes, seeds
from fedhubert_lib import weights as named
from fedhubert_lib.federated import client_state, handlers, local, rounds
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients

STAGE = "03_pretrain"

# ---------------------------------------------------------------------------------------------------------- at a client


def update(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Train the global weights on this client's utterances; return how they changed, and what was measured."""
    return local.train(home, arrays, config, lesson(home, arrays, config))


def validate(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Loss and accuracy sums of the global weights on this client's validation utterances; none: no sums."""
    # A personal head is that of the round just done, so ask for what was kept before the next.
    return {}, local.validate(home, lesson(home, arrays, {**config, "round": config["round"] + 1}))


handlers.HANDLERS |= {"pretrain.update": update, "pretrain.validate": validate}
"""What the server can ask of a client in pretraining."""


def lesson(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> local.Lesson:
    """Model and head with the global weights, and what they learn; a personal head from disk, or as drawn at first."""
    p = params.Pretrain.model_validate(config["params"])
    module = _modules(json.dumps(config["model"]), config["clusters"], home.device)
    personal = client_state.load(home, config, "personal")
    if p.head == "personal" and personal is None and "head.label_embeddings" not in arrays:  # on pooled data it is
        hubert.initialise(module["head"].cpu(), seeds.torch_generator(p.seed, "head"))  # a CPU's draws on every device
        module["head"].to(home.device)
    named.fill(module, arrays, personal)
    objective, normalise = functools.partial(_objective, module, p), config["model"]["do_normalize"]
    return local.Lesson(
        p, module, objective, lambda home: recipes.labelled(home.labels / p.codebook, config["labels"]), normalise
    )


@functools.lru_cache(maxsize=1)
def _modules(model: str, clusters: int, device: str) -> nn.ModuleDict:
    """Model and head on ``device``, kept from one client to the next: one model in a process, filled anew for each."""
    config = hubert.HubertConfig(**json.loads(model))
    return nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, clusters)}).to(device)


def _objective(module: nn.ModuleDict, p: params.Pretrain, batch: batching.Batch, progress: float) -> objectives.Sums:
    weight = objectives.unmasked_weight(p.unmasked_weight, p.unmasked_decay, progress)
    return objectives.masked_prediction(module["model"], module["head"], batch, unmasked_weight=weight)


# -------------------------------------------------------------------------------------------------------- at the server


def run(run: Path, p: params.Pretrain, on_row: checkpoints.OnRow | None = None, clients: Clients | None = None) -> Path:
    """The stage: federated pretraining, see ``serving``. Returns the folder of the model, 03_pretrain/checkpoint."""
    with serving(run, p, on_row, clients) as server:
        rounds.run(server)
        return save(run, server)


@contextmanager
def serving(
    run: Path, p: params.Pretrain, on_row: checkpoints.OnRow | None = None, clients: Clients | None = None
) -> Iterator[rounds.Server]:
    """The stage's server, over ``p.engine`` or ``clients`` that are connected already; it resumes where an earlier one
    stopped. ``on_row`` sees each row of 03_pretrain/metrics.jsonl as it is written.

    Raises FileNotFoundError, before a round begins, where pooled training will need what is not on this machine.
    """
    with rounds.connected(run, p, clients) as clients:
        task, weights = begin(run, p)
        if p.head == "personal":
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        with rounds.serving(clients, p, task, weights, run / STAGE, on_row) as server:
            yield server


def save(run: Path, server: rounds.Server) -> Path:
    """Write the trained model as a model folder, 03_pretrain/checkpoint."""
    return checkpoints.save(run / STAGE / "checkpoint", server.weights, server.task.documents)


def begin(run: Path, p: params.Pretrain) -> tuple[rounds.Task, Arrays]:
    """What is trained, and the weights before round 1, named model.NAME and head.NAME: from the seed, or ``p.initial``.

    A shared head is taken from ``p.initial`` where that has one for as many clusters.
    """
    clusters, head = recipes.clusters(run, p.codebook), None
    if p.initial:
        model, head = pretrained.load(p.initial)
    else:
        model = hubert.Hubert(recipes.model_config(p))
        hubert.initialise(model, seeds.torch_generator(p.seed, "model"))
    if head is None or p.head == "personal" or len(head.label_embeddings) != clusters:
        head = hubert.Head(model.config, clusters)
        hubert.initialise(head, seeds.torch_generator(p.seed, "head"))
    module = nn.ModuleDict({"model": model, "head": head})
    message = {"params": p.model_dump(mode="json"), "model": asdict(model.config), "clusters": clusters}
    message |= {"labels": recipes.provenance(run, p.codebook)}
    task = rounds.Task("pretrain", message, objectives.averages, pretrained.documents(model.config))
    return task, {name: parameter.detach() for name, parameter in module.named_parameters()}
