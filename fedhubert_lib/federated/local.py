"""A client's part of a round of training, whatever the task: global weights in, local steps, the difference out.

Tensors of the message are the global weights. Parameters of the module that are not among them are personal: they come
from the client's disk and stay there. What a study adds to plain local steps are ``hooks``.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from fedhubert_lib import batching, recipes, resources, seeds, threads, training, weights
from fedhubert_lib.federated import client_state, compression, fedprox, privacy, scaffold, secure
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.hooks import Update
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.params import Federation

HOOKS: list[tuple[Callable[[Update], Iterator[None]], Callable[[Federation], bool]]] = [
    (client_state.personal, lambda p: True),
    (client_state.moments, lambda p: p.local_state == "keep"),
    (fedprox.proximal, lambda p: p.proximal > 0),
    (scaffold.corrected, lambda p: p.server == "scaffold"),
    (privacy.protected, lambda p: p.privacy != "none"),
    (secure.masked, lambda p: p.secure_aggregation),
    (compression.encoded, lambda p: p.compression != "none"),
]
"""The client's half of each hook, and whether a study chooses it."""


def train(
    home: ClientHome,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    p: Federation,
    module: nn.ModuleDict,
    objective: training.Objective,
    labels: Path,
    normalise: bool = False,
) -> Answer:
    """Local steps from the global weights on the training utterances of ``home``, with the targets in the folder
    ``labels``; the change of every parameter that travels, and what was measured. ``module`` must be filled
    (``weights.fill``); it is trained in place.

    The learning rate follows the round's number, not how many rounds the client had a part in.
    """
    module["model"].gradient_checkpointing(p.gradient_checkpointing)
    steps = recipes.steps(home, p, config["round"])
    batches = _batches(home, "train", labels, p, config["round"], steps, normalise)
    settings = recipes.settings(p, p.rounds * steps)
    names, optimiser = dict(module.named_parameters()), training.adamw(module, settings)
    update = Update(home, arrays, config, p, names, optimiser)
    hooks = [hook(update) for hook, chosen in HOOKS if chosen(p)]
    for hook in hooks:
        next(hook)
    with threads.limited(p.threads):
        update.measured = training.local_update(
            module,
            batches,
            objective,
            settings,
            first_step=(config["round"] - 1) * steps,
            total_steps=p.rounds * steps,
            seed=seeds.derive(p.seed, config["round"], home.client, "dropout"),
            optimiser=optimiser,
            adjust=update.adjust,
        )
    update.measured["peak_memory_bytes"] = float(resources.peak_memory())
    start = weights.placed(arrays, next(iter(names.values())).device)
    update.change = weights.to_host({name: names[name].detach() - start[name] for name in names if name in arrays})
    for hook in hooks:
        next(hook, None)
    return update.change, update.measured


def validate(
    home: ClientHome,
    p: Federation,
    module: nn.ModuleDict,
    objective: training.Objective,
    labels: Path,
    normalise: bool = False,
) -> dict[str, float]:
    """Sums of ``objective`` on the validation utterances of ``home``; none where it has none to use."""
    steps = recipes.validation_steps(home, p)
    batches = _batches(home, "validation", labels, p, 0, steps, normalise) if steps else ()
    return training.evaluate(module, batches, objective, p.precision)


def _batches(
    home: ClientHome, part: str, labels: Path, p: Federation, number: int, steps: int, normalise: bool
) -> Iterator[batching.Batch]:
    table = pd.read_parquet(home.data / f"{part}.parquet")
    keys, recipe = (p.seed, number, home.client), recipes.recipe(p)
    return batching.batches(table, Labels(labels), recipe, keys, steps, normalise=normalise, device=home.device)
