"""The baseline of every federated figure: one trainer with everybody's data, for pretraining and for distillation.

As many optimiser steps as the federation makes, each on as much audio as a cohort has at most (on more where clients'
speech, or crops of short utterances, do not fill their batches); the same start, schedule and masking. It exists in
simulation only, where one machine can read all clients' folders.
"""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from fedhubert_lib import batching, checkpoints, distillation, pretraining, recipes, resources, seeds, training
from fedhubert_lib import weights as named
from fedhubert_lib.federated import client_ids, handlers, rounds
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.meter import Meter
from fedhubert_lib.params import Distill, Federation, Pretrain

F = TypeVar("F", bound=Federation)


def train(run: Path, p: Pretrain | Distill, on_row: checkpoints.OnRow | None = None) -> Path:
    """Train for rounds x local_steps steps, or resume where ``centralised`` of the stage's folder stands; returns the
    folder of the model there.

    Where clients train by epochs, a round has as many steps as a client makes on average. The clients that validate in
    the federation do so here. A checkpoint is written every ``local_steps`` steps, called a round so that curves lie
    over each other. Labels of objective ``hubert`` are those that the clients wrote for the federation, which comes
    first then.
    """
    device, ids = resources.resolve(p.device), client_ids(run, p.codebook)
    stage: Any = pretraining if isinstance(p, Pretrain) else distillation
    task, weights = stage.begin(run, p)
    folders, out = handlers.homes(run, ids, task.name, device), run / stage.STAGE / "centralised"
    message = {**task.config, "session": "centralised", "round": 0}
    lesson, panel = stage.lesson(folders[ids[0]], weights, message), [folders[one] for one in rounds.panel(ids, p)]
    table, targets = utterances(folders.values()), labels(map(lesson.labels, folders.values()))
    steps = round(mean(recipes.steps(home, p, 1) for home in folders.values()))
    large, total, module = merged(p), p.rounds * steps, lesson.module
    module["model"].recompute = p.gradient_checkpointing
    names, optimiser, meter = dict(module.named_parameters()), training.adamw(module, p), Meter(p.device)
    options = {"device": device, "normalise": lesson.normalise}
    with checkpoints.sole(out):
        state: dict[str, Any] = {"round": 0, "settings": checkpoints.decisive(p)}
        moments = named.moments(optimiser, names)
        state |= checkpoints.resume(out, state["settings"], weights, moments)
        named.restore_moments(optimiser, names, moments)
        named.fill(module, weights)
        plan = {"rounds": p.rounds, "local_steps": steps, "cohort": p.cohort, "clients": len(ids)}
        ledger = checkpoints.Ledger(out, state["round"], plan, on_row)
        for number in range(state["round"] + 1, p.rounds + 1):
            began = time.perf_counter()
            measured = training.local_update(
                module,
                batching.batches(table, targets, large, (p.seed, number, "all"), steps * large.cohort, **options),
                lesson.objective,
                p,
                first_step=(number - 1) * steps,
                total_steps=total,
                seed=seeds.derive(p.seed, number, "all", "dropout"),
                accumulate=large.cohort,
                optimiser=optimiser,
            )
            weights = {name: parameter.detach().cpu() for name, parameter in names.items()}
            row = {"round": number, **task.averages(measured), "clients": 1}
            if number % p.validate_every == 0 or number == p.rounds:
                sums: Counter[str] = Counter()
                for home in panel:
                    sums.update(stage.validate(home, weights, {**message, "round": number})[1])
                row |= {f"validation_{name}": value for name, value in task.averages(sums).items()} if sums else {}
            row |= {name: measured[name] for name in ("learning_rate", "gradient_norm", "audio_seconds")}
            row["seconds"] = time.perf_counter() - began
            row |= {"audio_seconds_per_second": measured["audio_seconds"] / row["seconds"], **meter.used()}
            state["round"] = number
            ledger.row("round", row)
            checkpoints.write(out, weights, named.moments(optimiser, names), state, task.documents)
    return checkpoints.save(out / "checkpoint", weights, task.documents)


def merged(p: F) -> F:
    """``p`` with a step's audio in fewer and larger batches of at most 32 s: what cores need to be busy with."""
    crops = [int(n * p.batch_seconds / p.crop_seconds) for n in range(p.cohort + 1)]  # that a batch of n batches holds
    counts = [n for n in range(2, p.cohort + 1) if p.cohort % n == 0 and n * p.batch_seconds <= 32]
    count = max((n for n in counts if crops[n] == n * crops[1]), default=1)
    return p.model_copy(update={"cohort": p.cohort // count, "batch_seconds": count * p.batch_seconds})


def utterances(homes: Iterable[ClientHome]) -> pd.DataFrame:
    """The training utterances of all clients, in order of utterance."""
    columns = ["utterance", "path", "samples"]
    tables = [pd.read_parquet(home.data / "train.parquet", columns=columns) for home in homes]
    return pd.concat(tables).sort_values("utterance", ignore_index=True)


def labels(folders: Iterable[Path]) -> dict[str, np.ndarray]:
    """Everybody's labels by utterance, from the clients' folders of them; in memory, 0.4 MB an hour.

    A memory map keeps its file open, and a process may open 1,024 where nobody has raised that.
    """
    books = map(Labels, folders)
    return {utterance: np.array(book[utterance]) for book in books for utterance in book.utterances}
