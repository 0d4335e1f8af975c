"""Stage 03_pretrain: HuBERT learns to predict the cluster labels of masked frames, over clients or on pooled data.

``update`` and ``validate`` run at a client: its audio, its labels and the global weights in, a change of weights out.
``run`` is the stage: the federated rounds, then the model folder. ``centralised`` is the yardstick that every federated
figure stands beside: one trainer with everybody's data, as many optimiser steps, as much audio in each as a cohort has.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from fedhubert_lib import (
    audio,
    batching,
    federated,
    hubert,
    objectives,
    params,
    planning,
    pooled,
    secure,
    seeds,
    threads,
    training,
)
from fedhubert_lib.federated import checkpoints, client_state, handlers, local, rounds
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Clients
from fedhubert_lib.labels import Labels

STAGE = "03_pretrain"
VALIDATION_BATCHES = 4
"""At most so many batches of a client's validation utterances tell its validation loss."""

# ---------------------------------------------------------------------------------------------------------- at a client


def update(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """Train the global weights on this client's utterances; return how they changed, and what was measured."""
    p = params.Pretrain.model_validate(config["params"])
    module = _filled(home, arrays, config, p)
    steps = local.steps(home, p, config["round"])
    stream = _client_batches(home, "train", p, config, config["round"], steps)
    return local.train(home, arrays, config, p, module, stream, functools.partial(_objective, module, p), steps)


def validate(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """Loss and accuracy sums of the global weights on this client's validation utterances; none: no sums."""
    p = params.Pretrain.model_validate(config["params"])
    if not (steps := validation_steps(home, p)):
        return {}, {}
    # A personal head is that of the round just done, so ask for what was kept before the next.
    module = _filled(home, arrays, {**config, "round": config["round"] + 1}, p)
    stream = _client_batches(home, "validation", p, config, 0, steps)
    return {}, training.evaluate(module, stream, functools.partial(_objective, module, p), p.precision)


handlers.HANDLERS |= {"pretrain.update": update, "pretrain.validate": validate, "pretrain.keys": secure.keys}
"""What the server can ask of a client in pretraining."""


def validation_steps(home: ClientHome, p: params.Federation) -> int:
    """Batches that this client's validation utterances fill, at most VALIDATION_BATCHES; 0 where it has none to use."""
    samples = pd.read_parquet(home.data / "validation.parquet", columns=["samples"])["samples"]
    samples = samples[samples >= audio.SAMPLE_RATE]  # batching uses nothing shorter than a second
    if samples.empty:
        return 0
    seconds = samples.clip(upper=int(p.crop_seconds * audio.SAMPLE_RATE)).sum() / audio.SAMPLE_RATE
    return int(np.clip(seconds // p.batch_seconds, 1, VALIDATION_BATCHES))


def _filled(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any], p: params.Pretrain
) -> nn.ModuleDict:
    """Model and head with the global weights; a personal head from disk, or as drawn at first."""
    module = _modules(json.dumps(config["model"]), config["clusters"], home.device)
    personal = client_state.load(home, config, "personal")
    if p.head == "personal" and personal is None and "head.label_embeddings" not in arrays:  # on pooled data it is
        hubert.initialise(module["head"], seeds.torch_generator(p.seed, "head"))
    local.fill(module, arrays, personal)
    return module


@functools.lru_cache(maxsize=1)
def _modules(model: str, clusters: int, device: str) -> nn.ModuleDict:
    """Model and head on ``device``, kept from one client to the next: one model in a process, filled anew for each."""
    config = hubert_config(json.loads(model))
    return nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, clusters)}).to(device)


def hubert_config(values: Mapping[str, Any]) -> hubert.HubertConfig:
    """The configuration that came as JSON, which has lists for tuples."""
    return hubert.HubertConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def _objective(module: nn.ModuleDict, p: params.Pretrain, batch: batching.Batch, progress: float) -> objectives.Sums:
    weight = objectives.unmasked_weight(p.unmasked_weight, p.unmasked_decay, progress)
    return objectives.masked_prediction(module["model"], module["head"], batch, unmasked_weight=weight)


def _client_batches(
    home: ClientHome, part: str, p: params.Pretrain, config: Mapping[str, Any], number: int, steps: int
) -> Iterator[batching.Batch]:
    table, labels = pd.read_parquet(home.data / f"{part}.parquet"), Labels(home.labels / p.codebook)
    return batches(table, labels, p, number, home.client, steps, normalise=config["model"]["do_normalize"])


def batches(
    table: pd.DataFrame,
    labels: Mapping[str, np.ndarray],
    p: params.Federation,
    number: int,
    client: str,
    steps: int,
    *,
    normalise: bool = False,
) -> Iterator[batching.Batch]:
    """``steps`` batches of ``table`` for round ``number``, as the parameters say; distillation's are made here, too.

    They are not normalised there, since teacher and student may differ in that: each then normalises its crops.
    """
    return batching.batches(
        table,
        labels,
        seed=p.seed,
        round=number,
        client=client,
        steps=steps,
        batch_seconds=p.batch_seconds,
        crop_seconds=p.crop_seconds,
        mask_probability=p.mask_probability,
        mask_length=p.mask_length,
        normalise=normalise,
    )


# -------------------------------------------------------------------------------------------------------- at the server


def run(run: Path, p: params.Pretrain, on_row: checkpoints.OnRow | None = None) -> Path:
    """The stage: federated pretraining over ``p.engine``. Returns the folder of the model, 03_pretrain/checkpoint.

    Goes on where an earlier start stopped. ``on_row`` sees each row of 03_pretrain/metrics.jsonl as it is written.
    """
    if p.centralised and p.engine == "deployment":
        pooled.check(run, p.codebook)
    with threads.limited(p.threads), federated.connect(run, p.engine, p.device, p.codebook) as clients:
        return federate(run, p, clients, on_row)


def federate(run: Path, p: params.Pretrain, clients: Clients, on_row: checkpoints.OnRow | None = None) -> Path:
    """What ``run`` does, over ``clients`` that are connected already."""
    p = rounds.sized(p, len(clients.ids))
    config, weights = initial(run, p)
    if p.head == "personal":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    task = rounds.Task("pretrain", _client_config(run, p, config), objectives.averages, hubert.documents(config))
    weights, _ = rounds.train(clients, p, task, weights, run / STAGE, on_row)
    return save(run / STAGE / "checkpoint", config, weights)


def _client_config(run: Path, p: params.Pretrain, config: hubert.HubertConfig) -> dict[str, Any]:
    return {"params": p.model_dump(mode="json"), "model": asdict(config), "clusters": clusters(run, p.codebook)}


def clusters(run: Path, codebook: str) -> int:
    """K of a codebook. Raises FileNotFoundError when 02_kmeans has not made it."""
    path = run / "02_kmeans" / "codebooks" / codebook / "codebook.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such codebook; name it in codebooks of 02_kmeans and run that first")
    return int(json.loads(path.read_text(encoding="utf-8"))["clusters"])


def model_config(p: params.Federation) -> hubert.HubertConfig:
    """Preset ``p.model`` with the sizes that ``p`` gives in place of its.

    Where only ``hidden_size`` is given, the feed-forward layers are four times as wide, and there are as many attention
    heads as in the preset or the next smaller number that divides the size. Raises ValueError when sizes do not fit.
    """
    chosen = {
        "hidden_size": p.hidden_size,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.attention_heads,
        "intermediate_size": p.feed_forward_size,
        "conv_dim": p.conv_width and (p.conv_width,) * 7,
    }
    if p.hidden_size and not p.feed_forward_size:
        chosen["intermediate_size"] = 4 * p.hidden_size
    if p.hidden_size and not p.attention_heads:
        heads = hubert.preset(p.model).num_attention_heads
        chosen["num_attention_heads"] = next(n for n in range(heads, 0, -1) if p.hidden_size % n == 0)
    changes = {name: value for name, value in chosen.items() if value}
    return hubert.preset(p.model, p.front_end, position_embedding=p.position_embedding, **changes)


def initial(run: Path, p: params.Pretrain) -> tuple[hubert.HubertConfig, Arrays]:
    """Configuration and weights before round 1, named model.NAME and head.NAME: from the seed, or ``p.initial``.

    A head is taken from ``p.initial`` where that has one for as many clusters.
    """
    count = clusters(run, p.codebook)
    head = None
    if p.initial:
        model, head = hubert.load(p.initial)
        if head is not None and len(head.label_embeddings) != count:
            head = None
    else:
        model = hubert.Hubert(model_config(p))
        hubert.initialise(model, seeds.torch_generator(p.seed, "model"))
    if head is None:
        head = hubert.Head(model.config, count)
        hubert.initialise(head, seeds.torch_generator(p.seed, "head"))
    module = nn.ModuleDict({"model": model, "head": head})
    return model.config, {name: parameter.detach() for name, parameter in module.named_parameters()}


def save(folder: Path, config: hubert.HubertConfig, weights: Mapping[str, Tensor]) -> Path:
    """Write ``weights`` as a model folder (``hubert.save``), with the head if it is among them."""
    model, head = hubert.Hubert(config), None
    if "head.label_embeddings" in weights:
        head = hubert.Head(config, len(weights["head.label_embeddings"]))
        local.fill(nn.ModuleDict({"head": head}), weights, None)
    local.fill(nn.ModuleDict({"model": model}), weights, None)
    hubert.save(folder, model, head)
    return folder


def plan(run: Path, p: params.Pretrain) -> planning.Plan:
    """What the stage will take on this machine, from a measured training step: see ``planning.plan``.

    Twice the federation's steps with ``p.centralised``; epochs are counted as ``local_steps``, the most that they are.
    """
    p = rounds.sized(p, len(federated.client_ids(run, p.codebook)))
    config, _ = initial(run, p)
    with threads.limited(p.threads):
        return planning.plan(
            config,
            clusters=clusters(run, p.codebook),
            batch_seconds=p.batch_seconds,
            crop_seconds=p.crop_seconds,
            steps=p.rounds * p.cohort * p.local_steps * (1 + p.centralised),
            device=federated.resolve(p.device),
            precision=p.precision,
            gradient_checkpointing=p.gradient_checkpointing,
            workers=federated.side_by_side(p.engine, p.device),
        )


# --------------------------------------------------------------------------------------------------------- on all data


def centralised(run: Path, p: params.Pretrain, on_row: checkpoints.OnRow | None = None) -> Path:
    """Train on the pooled data, under 03_pretrain/centralised; returns the folder of the model there.

    rounds x local_steps optimiser steps, each on cohort x batch_seconds of audio; see ``pooled.train``.
    """
    out, p = run / STAGE / "centralised", rounds.sized(p, len(federated.client_ids(run, p.codebook)))
    config, weights = initial(run, p)
    module = _modules(json.dumps(asdict(config)), clusters(run, p.codebook), federated.resolve(p.device))
    owners, table = pooled.utterances(run, p.codebook)
    labels = pooled.PooledLabels(owners, lambda client: run / "02_kmeans" / "clients" / client / p.codebook)
    message = {**_client_config(run, p, config), "session": "centralised"}
    weights = pooled.train(
        run,
        p,
        out,
        module=module,
        weights=weights,
        batches=lambda number, count: batches(
            table, labels, pooled.merged(p), number, "all", count, normalise=config.do_normalize
        ),
        objective=functools.partial(_objective, module, p),
        validate=lambda home, arrays, number: validate(home, arrays, {**message, "round": number})[1],
        averages=objectives.averages,
        documents=hubert.documents(config),
        on_row=on_row,
    )
    return save(out / "checkpoint", config, weights)
