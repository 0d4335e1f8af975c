"""The server of a real federation: Flower's ServerApp, which runs one stage over the SuperNodes that are connected.

``flwr run`` starts it with a run configuration of ``run`` (the run folder on the server's machine) and ``stage``
(kmeans, pretrain or distill). Parameters are those in the stage's ``params.yaml``. The same code as in a notebook then
talks to the clients: a restarted server goes on from its last checkpoint.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedhubert_lib import distillation, federated, kmeans, params, pretraining, yaml12
from fedhubert_lib.federated import messages

logger = logging.getLogger(__name__)

TASKS: dict[str, Callable] = {
    "kmeans": kmeans.run,
    "pretrain": pretraining.federate,
    "distill": distillation.federate,
}
"""What a server can run, as (run, parameters, clients)."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the clients of the run, then run the stage over them.

    ``wait_seconds`` of the run configuration (default 300) is how long to wait for all; those still missing then are
    left out of their rounds until they come.
    """
    run, stage = Path(str(context.run_config["run"])), str(context.run_config["stage"])
    if stage not in TASKS:
        raise ValueError(f"stage {stage!r} cannot be run over a federation; it must be one of {', '.join(TASKS)}")
    values, _, wrong = yaml12.read(run / params.FOLDERS[stage] / "params.yaml")
    if wrong:
        raise ValueError("\n".join(wrong))
    p = params.SECTIONS[stage].model_validate(values)
    ids = federated.client_ids(run)
    nodes = wait(grid, ids, float(context.run_config.get("wait_seconds", 300)))
    TASKS[stage](run, p, messages.GridClients(grid, nodes, ids=ids))


def wait(grid: Grid, ids: Sequence[str], seconds: float) -> dict[str, int]:
    """Nodes by client id, once all of ``ids`` are connected or ``seconds`` have passed. Raises TimeoutError if none is.

    A node list that is empty at first is Flower's way: nodes appear as they activate.
    """
    deadline = time.monotonic() + seconds
    nodes: dict[str, int] = {}
    while True:
        if unknown := set(grid.get_node_ids()) - set(nodes.values()):
            nodes |= messages.identify(grid, unknown)
        missing = sorted(set(ids) - set(nodes))
        if not missing:
            break
        if time.monotonic() > deadline:
            if len(missing) == len(ids):
                raise TimeoutError(f"no client connected within {seconds:.0f} s; start the SuperNodes, then flwr run")
            logger.warning("going on without %s, not connected within %.0f s", ", ".join(missing), seconds)
            break
        time.sleep(1)
    return {client: node for client, node in nodes.items() if client in ids}
