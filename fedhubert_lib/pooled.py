"""The yardstick of every federated figure: one trainer with everybody's data, for pretraining and distillation alike.

As many optimiser steps as the federation makes, each on as much audio as a cohort has; the same start, schedule and
masking. It exists in simulation only, where one machine can read all clients' folders.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from safetensors.torch import save_file
from torch import nn

from fedhubert_lib import federated, files, resources, seeds, training
from fedhubert_lib.batching import Batch
from fedhubert_lib.federated import checkpoints, local, rounds
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.params import Federation

F = TypeVar("F", bound=Federation)
Averages = Callable[[Mapping[str, float]], dict[str, float]]


def train(
    run: Path,
    p: Federation,
    out: Path,
    *,
    module: nn.ModuleDict,
    weights: Arrays,
    batches: Callable[[int, int], Iterable[Batch]],
    objective: training.Objective,
    validate: Callable[[ClientHome, Arrays, int], dict[str, float]],
    averages: Averages,
    documents: Mapping[str, str],
    on_row: checkpoints.OnRow | None = None,
) -> Arrays:
    """Train ``module`` from ``weights`` for rounds x local_steps steps, or go on where ``out`` stands.

    Where clients train by epochs, a round has as many steps as a client makes on average.

    Args:
        batches: (round, how many) to batches of the pooled data as ``merged(p)`` says; a step takes its ``cohort``.
        validate: (home, weights, round) to the sums a client's validation utterances give; asked of the same panel of
            clients as the federation's.
        averages, documents: as in ``rounds.Task``.

    Returns the last weights. A checkpoint is written every ``local_steps`` steps, called a round so that curves lie
    over each other.
    """
    ids = federated.client_ids(run, p.codebook)
    each = [local.steps(home, p, 1) for home in homes(run, ids, out, "cpu")]
    steps = round(sum(each) / len(each))
    total = p.rounds * steps
    parts = merged(p).cohort
    settings = local.settings(p, total, accumulate=parts)
    module["model"].gradient_checkpointing(p.gradient_checkpointing)
    names, optimiser = dict(module.named_parameters()), training.adamw(module, settings)
    meter = resources.Meter(p.device)
    with checkpoints.sole(out):
        state = {"round": 0, "settings": rounds.decisive(p), **checkpoints.UNJUDGED}
        if (saved := checkpoints.resume(out, state["settings"])) is not None:
            weights, moments, state = saved
            local.restore_moments(optimiser, names, moments)
        local.fill(module, weights, None)
        plan = {"rounds": p.rounds, "local_steps": steps, "cohort": p.cohort, "clients": len(ids)}
        ledger = checkpoints.Ledger(out, state["round"], plan, on_row)
        # With patience the federation may have stopped early: as many updates here.
        done = [row["round"] for row in files.read_rows(out.parent / "metrics.jsonl") if row["kind"] == "round"]
        last = max(done) if p.patience and done else p.rounds
        for number in range(state["round"] + 1, last + 1):
            began = time.perf_counter()
            measured = training.local_update(
                module,
                batches(number, steps * parts),
                objective,
                settings,
                first_step=(number - 1) * steps,
                total_steps=total,
                seed=seeds.derive(p.seed, number, "all", "dropout"),
                optimiser=optimiser,
            )
            weights = {name: parameter.detach().cpu() for name, parameter in names.items()}
            row = {"round": number, **averages(measured)}
            if number % p.validate_every == 0 or number == last:
                sums: Counter[str] = Counter()
                for home in homes(run, rounds.panel(ids, p), out, federated.resolve(p.device)):
                    sums.update(validate(home, weights, number))
                row |= {f"validation_{name}": value for name, value in averages(sums).items()} if sums else {}
            seconds = time.perf_counter() - began
            row |= {
                "learning_rate": measured["learning_rate"],
                "gradient_norm": measured["gradient_norm"],
                "clients": 1,
                "seconds": seconds,
                "audio_seconds": measured["audio_seconds"],
                "audio_seconds_per_second": measured["audio_seconds"] / seconds,
                **meter.used(),
            }
            checkpoints.judge(state, number, row)
            state["round"] = number
            ledger.row("round", row)
            kept = functools.partial(save_file, local.moments(optimiser, names))
            checkpoints.write(out, number, weights, kept, state, documents)
        return weights


def merged(p: F) -> F:
    """``p`` with a step's audio in fewer and larger batches of at most 32 s: what cores need to be busy with."""
    count = max(n for n in range(1, p.cohort + 1) if p.cohort % n == 0 and (n == 1 or n * p.batch_seconds <= 32))
    return p.model_copy(update={"cohort": p.cohort // count, "batch_seconds": count * p.batch_seconds})


def homes(run: Path, clients: Iterable[str], state: Path, device: str) -> Iterator[ClientHome]:
    """The folders of ``clients``, whose own state lies under ``state``."""
    for client in clients:
        yield ClientHome(
            client,
            data=run / "01_partition" / "clients" / client,
            labels=run / "02_kmeans" / "clients" / client,
            state=state / "clients" / client,
            device=device,
        )


def check(run: Path, codebook: str) -> None:
    """Raise FileNotFoundError unless every client's lists and labels are on this machine: a simulation."""
    for home in homes(run, federated.client_ids(run, codebook), run, "cpu"):
        for place in (home.data / "train.parquet", home.labels):
            if not place.exists():
                raise FileNotFoundError(f"{place}: not here, and pooled training needs it; set centralised: false")


def utterances(run: Path, codebook: str) -> tuple[dict[str, str], pd.DataFrame]:
    """Who owns each training utterance, and the table of all, in order of utterance; of clients with labels."""
    columns = ["utterance", "path", "samples"]
    tables = {
        client: pd.read_parquet(run / "01_partition" / "clients" / client / "train.parquet", columns=columns)
        for client in federated.client_ids(run, codebook)
    }
    owners = {utterance: client for client, table in tables.items() for utterance in table["utterance"]}
    return owners, pd.concat(tables.values()).sort_values("utterance", ignore_index=True)


class PooledLabels:
    """Everybody's labels: ``labels[utterance]``, each client's opened when it is first needed."""

    def __init__(self, owners: Mapping[str, str], folder: Callable[[str], Path]) -> None:
        """``owners`` as of ``utterances``; ``folder`` says where a client's labels are."""
        self._owners = owners
        self._labels = functools.cache(lambda client: Labels(folder(client)))

    def __getitem__(self, utterance: str) -> np.ndarray:
        return self._labels(self._owners[utterance])[utterance]
