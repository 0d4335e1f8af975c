"""A client's part of a round of training, whatever the task: global weights in, local steps, the difference out.

Tensors of the message are the global weights. Parameters of the module that are not among them are personal: they come
from the client's disk and stay there. What a study adds to plain local steps are ``hooks``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from fedhubert_lib import batching, recipes, resources, seeds, threads, training, weights
from fedhubert_lib.federated import hooks
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.params import Federation


@dataclass(frozen=True)
class Lesson:
    """What is trained: ``module``, which holds the weights to start from, along ``objective``."""

    p: Federation
    module: nn.ModuleDict
    """Trained in place."""
    objective: training.Objective
    labels: Callable[[ClientHome], Path]
    """A client's folder of targets."""
    normalise: bool = False  # as in batching.batches


def train(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any], lesson: Lesson) -> Answer:
    """Local steps from the global weights ``arrays`` on the training utterances of ``home``; the change of every
    parameter that travels, and what was measured. The learning rate follows the round's number.
    """
    p, module = lesson.p, lesson.module
    module["model"].recompute = p.gradient_checkpointing
    steps = recipes.steps(home, p, config["round"])
    batches = _batches(home, "train", lesson, config["round"], steps)
    names, optimiser = dict(module.named_parameters()), training.adamw(module, p)
    update = hooks.Update(home, arrays, config, p, names, optimiser)
    around = [hook(update) for hook in hooks.chosen(hooks.AT_CLIENTS, p)]
    for hook in around:
        next(hook)
    with threads.limited(p.threads):
        update.measured = training.local_update(
            module,
            batches,
            lesson.objective,
            p,
            first_step=(config["round"] - 1) * steps,
            total_steps=p.rounds * steps,
            seed=seeds.derive(p.seed, config["round"], home.client, "dropout"),
            optimiser=optimiser,
            adjust=update.adjust,
        )
    update.measured["peak_memory_bytes"] = float(resources.peak_memory())
    start = weights.placed({name: arrays[name] for name in names if name in arrays}, next(iter(names.values())).device)
    update.change = weights.to_host({name: names[name].detach() - start[name] for name in start})
    for hook in around:
        next(hook, None)
    return update.change, update.measured


def validate(home: ClientHome, lesson: Lesson) -> dict[str, float]:
    """Sums of the objective on the validation utterances of ``home``; none where it has none to use."""
    steps = recipes.validation_steps(home, lesson.p)
    batches = _batches(home, "validation", lesson, 0, steps) if steps else ()
    with threads.limited(lesson.p.threads):
        return training.evaluate(lesson.module, batches, lesson.objective, lesson.p.precision)


def _batches(home: ClientHome, part: str, lesson: Lesson, number: int, steps: int) -> Iterator[batching.Batch]:
    table, labels = pd.read_parquet(home.data / f"{part}.parquet"), Labels(lesson.labels(home))
    keys = (lesson.p.seed, number, home.client)
    return batching.batches(table, labels, lesson.p, keys, steps, normalise=lesson.normalise, device=home.device)
