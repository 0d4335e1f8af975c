"""Federated training and clustering over clients that never share audio: one client app, one server app, engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from fedhubert_lib.federated.protocol import Clients


@contextmanager
def connect(run: Path, engine: str = "inprocess", device: str = "cpu") -> Iterator[Clients]:
    """The clients of ``run`` over ``engine``, for as long as the ``with`` block lasts.

    ``device`` is where clients compute (``cpu``, ``cuda:0`` ...). Raises FileNotFoundError when 01_partition has not been
    written.
    """
    table = run / "01_partition" / "clients.parquet"
    if not table.exists():
        raise FileNotFoundError(f"{table}: no clients yet; run 01_partition first")
    ids = sorted(pd.read_parquet(table, columns=["client"])["client"])
    if engine == "inprocess":
        from fedhubert_lib.federated import inprocess

        with inprocess.connect(run, ids, device) as clients:
            yield clients
    else:
        raise ValueError(f"engine {engine!r}: not one of inprocess")
