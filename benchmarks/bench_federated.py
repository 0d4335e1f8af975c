"""What the federation costs in process: start, a round beyond its clients' own work, memory of the whole
process.

    python benchmarks/bench_federated.py [--rounds 4] [--client-seconds 2] [--cases 1M 94M]

The clients do nothing but wait ``--client-seconds`` and return a change of every weight, as large as a model's.
FedAdam, four clients, checkpoint every round (written while the next round's clients wait, as it is while they train);
each case is a process of its own. Beside each figure stands what Flower 1.41's own engines were measured at on two
cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from fedhubert_lib import federated, files, hubert, params
from fedhubert_lib.federated import client_app, rounds

MIB = 2**20


def shapes(case: str) -> dict[str, torch.Size]:
    """Names and shapes of about a million weights, or of HuBERT base."""
    if case == "1M":
        return {f"model.{i}": torch.Size((256, 256)) for i in range(16)}
    with torch.device("meta"):
        model = hubert.Hubert(hubert.preset("base"))
    return {f"model.{name}": parameter.shape for name, parameter in model.named_parameters()}


def measure(case: str, cohort: int, clients: int, count: int, client_seconds: float) -> dict[str, float]:
    """One study of ``count`` rounds in this process; figures of the rounds after the first."""

    def update(home, arrays, config):
        began = time.perf_counter()
        time.sleep(client_seconds)
        change = {name: torch.full_like(tensor, 1e-3) for name, tensor in arrays.items()}
        seconds = time.perf_counter() - began
        return change, {
            "loss_sum": 1.0,
            "objective_count": 1.0,
            "audio_seconds": 1.0,
            "seconds": seconds,
            "learning_rate": 0.1,
        }

    def validate(home, arrays, config):
        return {}, {"loss_sum": 1.0, "objective_count": 1.0}

    client_app.HANDLERS |= {"bench.update": update, "bench.validate": validate}
    p = params.Pretrain(rounds=count, cohort=cohort)
    with tempfile.TemporaryDirectory(prefix="fedhubert-bench-") as folder:
        run = Path(folder)
        (run / "01_partition").mkdir()
        ids = [f"client-{number:04d}" for number in range(clients)]
        pd.DataFrame({"client": ids}).to_parquet(run / "01_partition" / "clients.parquet")
        weights = {name: torch.zeros(shape) for name, shape in shapes(case).items()}
        size = sum(tensor.numel() for tensor in weights.values()) * 4
        before = _peak()  # the zeros above take no memory until they are written to
        began = time.perf_counter()
        with federated.connect(run, "inprocess", "cpu") as connected:
            next(connected.ask("identify", clients=ids[:1]))
            started = time.perf_counter() - began
            task = rounds.Task("bench", {}, lambda sums: {"loss": sums["loss_sum"]})
            rounds.train(connected, p, task, weights, run / "out")
        ledger = [row for row in files.read_rows(run / "out" / "metrics.jsonl") if row["kind"] == "round"][1:]
    return {
        "start": started,
        "overhead": median(row["seconds"] - row["client_seconds"] for row in ledger),
        "server": median(row["server_seconds"] for row in ledger),
        "models": (_peak() - before) / size,
        "peak": _peak() / 2**30,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--client-seconds", type=float, default=2.0)
    parser.add_argument("--cases", nargs="+", default=["1M", "94M"], choices=["1M", "94M"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        case, cohort, seconds = given.one
        print(json.dumps(measure(case, int(cohort), 64, given.rounds, float(seconds))))
        return
    flower = {"1M": "0.3-0.6", "94M": "14-28"}
    print(
        f"{'weights':8}{'cohort':>7}{'start s':>10}{'round s':>10}{'Flower':>9}{'server s':>10}{'models':>8}{'GiB':>7}"
    )
    for case in given.cases:
        for cohort in (4, 32):
            # A long cohort need not wait as long: its clients together outlast the disk anyway.
            seconds = given.client_seconds * 4 / cohort
            command = [
                sys.executable,
                __file__,
                "--rounds",
                str(given.rounds),
                "--one",
                case,
                str(cohort),
                str(seconds),
            ]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figure = json.loads(result.splitlines()[-1])
            print(
                f"{case:8}{cohort:7}{figure['start']:10.3f}{figure['overhead']:10.3f}{flower[case]:>9}"
                f"{figure['server']:10.3f}{figure['models']:8.2f}{figure['peak']:7.2f}",
                flush=True,
            )
    print("round s: a round beyond its clients' own seconds. models: peak memory of the study in model sizes.")


if __name__ == "__main__":
    main()
