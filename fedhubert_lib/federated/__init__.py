"""Federated training and clustering over clients that never share audio: one client app, one server app, engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from fedhubert_lib.federated.protocol import Clients


def client_ids(run: Path) -> list[str]:
    """The clients of a run, sorted, from the table that 01_partition makes public."""
    table = run / "01_partition" / "clients.parquet"
    if not table.exists():
        raise FileNotFoundError(f"{table}: no clients yet; run 01_partition first")
    return sorted(pd.read_parquet(table, columns=["client"])["client"])


def resolve(device: str) -> str:
    """``auto`` is the first GPU, or the CPU where there is none."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def connect(run: Path, engine: str = "inprocess", device: str = "cpu") -> Iterator[Clients]:
    """The clients of ``run`` over ``engine``, for as long as the ``with`` block lasts.

    ``device`` is where clients compute (``auto``, ``cpu``, ``cuda:0`` ...). Raises FileNotFoundError when 01_partition
    has not been written.
    """
    ids, device = client_ids(run), resolve(device)
    if engine == "inprocess":
        from fedhubert_lib.federated import inprocess

        with inprocess.connect(run, ids, device) as clients:
            yield clients
    elif engine == "pool":
        from fedhubert_lib.federated import pool

        with pool.connect(run, ids, device) as clients:
            yield clients
    elif engine == "ray":
        from fedhubert_lib.federated import ray

        with ray.connect(run, ids, device) as clients:
            yield clients
    elif engine == "deployment":
        from fedhubert_lib.federated import deployment

        with deployment.connect(run, ids) as clients:
            yield clients
    else:
        raise ValueError(f"engine {engine!r}: not one of inprocess, pool, ray, deployment")
