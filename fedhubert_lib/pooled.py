"""The baseline of every federated figure: one trainer with everybody's data, for pretraining and for distillation.

As many optimiser steps as the federation makes, each on as much audio as a cohort has; the same start, schedule and
masking. It exists in simulation only, where one machine can read all clients' folders.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import nn

from fedhubert_lib import batching, checkpoints, federated, files, recipes, resources, seeds, threads, training
from fedhubert_lib import weights as named
from fedhubert_lib.federated import handlers, rounds
from fedhubert_lib.federated.protocol import ClientHome, Clients
from fedhubert_lib.labels import Labels
from fedhubert_lib.meter import Meter
from fedhubert_lib.params import FOLDERS, Distill, Federation, Pretrain
from fedhubert_lib.weights import Arrays

F = TypeVar("F", bound=Federation)


@dataclass(frozen=True)
class Task:
    """What is trained, and with what."""

    module: nn.ModuleDict
    weights: Arrays
    """To begin with, by name in ``module``."""
    objective: training.Objective
    labels: Callable[[ClientHome], Path]
    """A client's folder of targets."""
    validate: handlers.Handler
    message: Mapping[str, Any]
    """The configuration with which ``validate`` gives the sums of a client's validation utterances."""
    averages: Callable[[Mapping[str, float]], dict[str, float]]
    documents: Mapping[str, str]
    """As in ``rounds.Task``, as are ``averages``."""
    normalise: bool = False
    """As in ``batching.batches``."""


@contextmanager
def connected(run: Path, p: Pretrain | Distill, clients: Clients | None = None) -> Iterator[Clients]:
    """The clients of a training over ``p.engine``, or ``clients``, with the number of threads that ``p`` asks for.

    Raises FileNotFoundError where the baseline, which is to follow, would lack data of clients on this machine.
    """
    if p.centralised and p.engine == "deployment":
        homes(run, federated.client_ids(run, p.codebook), "pretrain", p.device)
    connection = federated.connect(run, p.engine, p.device, p.codebook) if clients is None else nullcontext(clients)
    with threads.limited(p.threads), connection as clients:
        yield clients


def train(run: Path, p: Pretrain | Distill, stage: str, task: Task, on_row: checkpoints.OnRow | None = None) -> Arrays:
    """Train for rounds x local_steps steps, or resume where ``centralised`` of the ``stage``'s folder stands; returns
    the last weights.

    Where clients train by epochs, a round has as many steps as a client makes on average. The clients that validate in
    the federation do so here. A checkpoint is written every ``local_steps`` steps, called a round so that curves lie
    over each other.
    """
    device, ids = resources.resolve(p.device), federated.client_ids(run, p.codebook)
    p, folders, out = rounds.sized(p, len(ids)), homes(run, ids, stage, device), run / FOLDERS[stage] / "centralised"
    panel = [folders[client] for client in rounds.panel(ids, p)]
    table = utterances(folders.values())
    targets = labels(map(task.labels, folders.values()))
    steps = round(mean(recipes.steps(home, p, 1) for home in folders.values()))
    large, total, module, weights = merged(p), p.rounds * steps, task.module, task.weights
    settings, recipe = recipes.settings(p, total, accumulate=large.cohort), recipes.recipe(large)
    module["model"].gradient_checkpointing(p.gradient_checkpointing)
    names, optimiser = dict(module.named_parameters()), training.adamw(module, settings)
    meter, draw = Meter(p.device), functools.partial(batching.batches, device=device, normalise=task.normalise)
    with checkpoints.sole(out):
        state: dict[str, Any] = {"round": 0, "settings": checkpoints.decisive(p), **checkpoints.UNJUDGED}
        if (saved := checkpoints.resume(out, state["settings"], weights, named.moments(optimiser, names))) is not None:
            weights, moments, state = saved
            named.restore_moments(optimiser, names, moments)
        named.fill(module, weights)
        plan = {"rounds": p.rounds, "local_steps": steps, "cohort": p.cohort, "clients": len(ids)}
        ledger = checkpoints.Ledger(out, state["round"], plan, on_row)
        last = _last_round(p, out)
        for number in range(state["round"] + 1, last + 1):
            began = time.perf_counter()
            measured = training.local_update(
                module,
                draw(table, targets, recipe, (p.seed, number, "all"), steps * large.cohort),
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
                row |= _validated(task, weights, panel, number)
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
        sums.update(task.validate(home, weights, {**task.message, "session": "centralised", "round": number})[1])
    return {f"validation_{name}": value for name, value in task.averages(sums).items()} if sums else {}


def merged(p: F) -> F:
    """``p`` with a step's audio in fewer and larger batches of at most 32 s: what cores need to be busy with."""
    count = max(n for n in range(1, p.cohort + 1) if p.cohort % n == 0 and (n == 1 or n * p.batch_seconds <= 32))
    return p.model_copy(update={"cohort": p.cohort // count, "batch_seconds": count * p.batch_seconds})


def _last_round(p: Federation, out: Path) -> int:
    """The last round: that of the federation beside ``out``, which with ``patience`` may have stopped early."""
    rows = files.read_rows(out.parent / "metrics.jsonl") if p.patience else []
    return max((row["round"] for row in rows if row["kind"] == "round"), default=p.rounds)


def homes(run: Path, ids: Iterable[str], stage: str, device: str) -> dict[str, ClientHome]:
    """The folders of the clients ``ids`` in ``stage``.

    Raises FileNotFoundError unless every client's lists and labels are on this machine: a simulation.
    """
    folders = {client: handlers.home(run, client, stage, device, simulated=True) for client in ids}
    needed = (place for home in folders.values() for place in (home.data / "train.parquet", home.labels))
    if missing := [place for place in needed if not place.exists()]:
        raise FileNotFoundError(f"{missing[0]}: not here, and pooled training needs it; set centralised: false")
    return folders


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
