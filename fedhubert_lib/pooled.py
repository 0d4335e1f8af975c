"""The baseline of every federated figure: one trainer with everybody's data, for pretraining and for distillation.

As many optimiser steps as the federation makes, each on as much audio as a cohort has; the same start, schedule and
masking. It exists in simulation only, where one machine can read all clients' folders.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import nn

from fedhubert_lib import checkpoints, files, recipes, seeds, training
from fedhubert_lib import weights as named
from fedhubert_lib.batching import Batch
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.meter import Meter
from fedhubert_lib.params import Federation
from fedhubert_lib.weights import Arrays

F = TypeVar("F", bound=Federation)


@dataclass(frozen=True)
class Task:
    """What is trained, and with what."""

    module: nn.ModuleDict
    weights: Arrays
    """To begin with, by name in ``module``."""
    batches: Callable[[int, int], Iterable[Batch]]
    """(round, how many) to batches of the pooled data as ``merged(p)`` says; a step takes its ``cohort``."""
    objective: training.Objective
    validate: Callable[[ClientHome, Arrays, int], Mapping[str, float]]
    """(home, weights, round) to the sums of a client's validation utterances."""
    averages: Callable[[Mapping[str, float]], dict[str, float]]
    documents: Mapping[str, str]
    """As in ``rounds.Task``, as are ``averages``."""


def train(
    p: Federation,
    homes: Mapping[str, ClientHome],
    panel: Sequence[str],
    out: Path,
    task: Task,
    on_row: checkpoints.OnRow | None = None,
) -> Arrays:
    """Train for rounds x local_steps steps, or resume where ``out`` stands; returns the last weights.

    Where clients train by epochs, a round has as many steps as a client makes on average. ``homes`` are those of all
    clients; ``panel`` validates, as in the federation. A checkpoint is written every ``local_steps`` steps, called a
    round so that curves lie over each other.
    """
    steps = round(mean(recipes.steps(home, p, 1) for home in homes.values()))
    parts, total, module, weights = merged(p).cohort, p.rounds * steps, task.module, task.weights
    settings = recipes.settings(p, total, accumulate=parts)
    module["model"].gradient_checkpointing(p.gradient_checkpointing)
    names, optimiser = dict(module.named_parameters()), training.adamw(module, settings)
    meter = Meter(p.device)
    with checkpoints.sole(out):
        state: dict[str, Any] = {"round": 0, "settings": checkpoints.decisive(p), **checkpoints.UNJUDGED}
        if (saved := checkpoints.resume(out, state["settings"], weights, named.moments(optimiser, names))) is not None:
            weights, moments, state = saved
            named.restore_moments(optimiser, names, moments)
        named.fill(module, weights)
        plan = {"rounds": p.rounds, "local_steps": steps, "cohort": p.cohort, "clients": len(homes)}
        ledger = checkpoints.Ledger(out, state["round"], plan, on_row)
        last = _last_round(p, out)
        for number in range(state["round"] + 1, last + 1):
            began = time.perf_counter()
            measured = training.local_update(
                module,
                task.batches(number, steps * parts),
                task.objective,
                settings,
                first_step=(number - 1) * steps,
                total_steps=total,
                seed=seeds.derive(p.seed, number, "all", "dropout"),
                optimiser=optimiser,
            )
            weights = {name: parameter.detach().cpu() for name, parameter in names.items()}
            row = {"round": number, **task.averages(measured), "clients": 1}
            if number % p.validate_every == 0 or number == last:
                row |= _validated(task, weights, [homes[client] for client in panel], number)
            row |= {name: measured[name] for name in ("learning_rate", "gradient_norm", "audio_seconds")}
            row["seconds"] = time.perf_counter() - began
            row |= {"audio_seconds_per_second": measured["audio_seconds"] / row["seconds"], **meter.used()}
            checkpoints.judge(state, number, row)
            state["round"] = number
            ledger.row("round", row)
            checkpoints.write(out, number, weights, named.moments(optimiser, names), state, task.documents)
        return weights


def _validated(task: Task, weights: Arrays, homes: Iterable[ClientHome], number: int) -> dict[str, float]:
    """Averages over the validation utterances of ``homes``; none where they have none."""
    sums: Counter[str] = Counter()
    for home in homes:
        sums.update(task.validate(home, weights, number))
    return {f"validation_{name}": value for name, value in task.averages(sums).items()} if sums else {}


def merged(p: F) -> F:
    """``p`` with a step's audio in fewer and larger batches of at most 32 s: what cores need to be busy with."""
    count = max(n for n in range(1, p.cohort + 1) if p.cohort % n == 0 and (n == 1 or n * p.batch_seconds <= 32))
    return p.model_copy(update={"cohort": p.cohort // count, "batch_seconds": count * p.batch_seconds})


def _last_round(p: Federation, out: Path) -> int:
    """The last round: that of the federation beside ``out``, which with ``patience`` may have stopped early."""
    rows = files.read_rows(out.parent / "metrics.jsonl") if p.patience else []
    return max((row["round"] for row in rows if row["kind"] == "round"), default=p.rounds)


def homes(run: Path, ids: Iterable[str], state: Path, device: str) -> dict[str, ClientHome]:
    """The folders of the clients ``ids``, whose state lies under ``state``.

    Raises FileNotFoundError unless every client's lists and labels are on this machine: a simulation.
    """
    folders = {}
    for client in ids:
        data, labels = run / "01_partition" / "clients" / client, run / "02_kmeans" / "clients" / client
        for place in (data / "train.parquet", labels):
            if not place.exists():
                raise FileNotFoundError(f"{place}: not here, and pooled training needs it; set centralised: false")
        folders[client] = ClientHome(client, data, labels, state / "clients" / client, device)
    return folders


def utterances(homes: Mapping[str, ClientHome]) -> pd.DataFrame:
    """The training utterances of all clients, in order of utterance."""
    columns = ["utterance", "path", "samples"]
    tables = [pd.read_parquet(home.data / "train.parquet", columns=columns) for home in homes.values()]
    return pd.concat(tables).sort_values("utterance", ignore_index=True)


def labels(folders: Iterable[Path]) -> Mapping[str, np.ndarray]:
    """Everybody's labels by utterance, from the clients' folders of them; in memory, 0.4 MB an hour.

    A memory map keeps its file open, and a process may open 1,024 where nobody has raised that.
    """
    books = map(Labels, folders)
    return {utterance: np.array(book[utterance]) for book in books for utterance in book.utterances}
