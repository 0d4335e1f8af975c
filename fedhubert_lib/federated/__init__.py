"""Federated training and clustering over clients that never share audio: rounds, hooks, engines."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from fedhubert_lib import resources
from fedhubert_lib.federated.protocol import Clients


def client_ids(run: Path, codebook: str = "") -> list[str]:
    """The clients of a run, sorted, from the table that 01_partition makes public.

    With ``codebook`` those that have labels of it: all, but for what ``missing_clients`` of 02_kmeans let go.
    """
    table = run / "01_partition" / "clients.parquet"
    if not table.exists():
        raise FileNotFoundError(f"{table}: no clients yet; run 01_partition first")
    ids = sorted(pd.read_parquet(table, columns=["client"])["client"])
    fitted = run / "02_kmeans" / "codebooks" / codebook / "codebook.json"
    if codebook and fitted.exists():
        labelled = set(json.loads(fitted.read_text(encoding="utf-8")).get("labelled", ids))
        ids = [client for client in ids if client in labelled]
    return ids


@contextmanager
def connect(run: Path, engine: str = "inprocess", device: str = "cpu", codebook: str = "") -> Iterator[Clients]:
    """The clients of ``run`` over ``engine`` (``params.Engine``) until the ``with`` block ends; see ``client_ids``.

    ``device`` is where clients compute (``auto``, ``cpu``, ``cuda:0`` ...). Raises FileNotFoundError when 01_partition
    has not been written.
    """
    ids = client_ids(run, codebook)
    if engine not in ("ray", "deployment") or device == "auto":  # clients may have other devices
        device = resources.resolve(device)
    module = importlib.import_module(f"fedhubert_lib.federated.{engine}")  # Ray, and Flower, only where chosen
    with module.connect(run, ids, device) as clients:
        yield clients
