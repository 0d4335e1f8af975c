"""A client's half of every message, whatever carries it: the handler that a stage registered, and the client's folders.

Whatever reads audio, features or labels runs below ``answer``.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedhubert_lib.federated.protocol import Arrays, ClientHome, Failure, Reply

Answer = tuple[Arrays, dict[str, float]]
"""Tensors, and what was measured."""
Handler = Callable[[ClientHome, Mapping[str, Tensor], Mapping[str, Any]], Answer]

HANDLERS: dict[str, Handler] = {"identify": lambda home, arrays, config: ({}, {})}
"""Everything that a server can ask of a client, by ``stage.action``. Modules of stages add theirs."""

MODULES = {"kmeans": "kmeans", "pretrain": "pretraining", "distill": "distillation", "targets": "kmeans.targets"}
MODULES |= dict.fromkeys(("pretrain.keys", "distill.keys"), "federated.secure")
MODULES |= dict.fromkeys(("pretrain.forget", "distill.forget"), "federated.client_state")
"""Where handlers of a stage, or a single one, are: a process imports what its messages are for, no more."""

FOLDERS = {"kmeans": "02_kmeans", "pretrain": "03_pretrain", "distill": "04_distill", "targets": "04_distill"}
"""Where a client's state is, by the first word of an action."""

logger = logging.getLogger(__name__)


def home(run: Path, client: str, action: str, device: str, simulated: bool) -> ClientHome:
    """The folders of ``client`` in the run folder ``run`` of its machine; state is kept by stage.

    In simulation that is the one run folder, in deployment one of the same layout that holds this client's part alone.
    """
    stage = FOLDERS.get(action.partition(".")[0], "")
    data, labels, state = (run / folder / "clients" / client for folder in ("01_partition", "02_kmeans", stage))
    return ClientHome(client, data, labels, state, device, simulated)


def homes(run: Path, ids: Iterable[str], stage: str, device: str) -> dict[str, ClientHome]:
    """The folders of the clients ``ids`` in ``stage``.

    Raises FileNotFoundError unless every client's lists and labels are on this machine: a simulation.
    """
    folders = {client: home(run, client, stage, device, simulated=True) for client in ids}
    needed = (place for home in folders.values() for place in (home.data / "train.parquet", home.labels))
    if missing := [place for place in needed if not place.exists()]:
        raise FileNotFoundError(f"{missing[0]}: not here, and pooled training needs it; set centralised: false")
    return folders


def answer(home: ClientHome, action: str, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Reply | Failure:
    """The answer of the handler of ``action``. What it raises becomes a Failure: the round continues."""
    try:
        if action not in HANDLERS and (module := MODULES.get(action) or MODULES.get(action.partition(".")[0])):
            importlib.import_module(f"fedhubert_lib.{module}")
        if action not in HANDLERS:
            raise ValueError(f"no handler {action!r}; this client knows {', '.join(sorted(HANDLERS))}")
        arrays, metrics = HANDLERS[action](home, arrays, config)
        arrays = {name: tensor.detach() for name, tensor in arrays.items()}
        return Reply(home.client, arrays, {name: float(value) for name, value in metrics.items()})
    except Exception as error:  # whatever a client's code raises is that client's failure, never the federation's
        if home.simulated:
            return Failure(home.client, f"{type(error).__name__}: {error}")
        # Over a network: the text may name files and utterances, which are not the server's to know.
        logger.error("%s failed at %s", home.client, action, exc_info=True)
        return Failure(home.client, f"{type(error).__name__}; the client's own log says more")
