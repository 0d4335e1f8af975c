"""The server of a real federation: Flower's ServerApp, which carries the messages of one stage to the SuperNodes.

``flwr run`` starts it with a run configuration of ``socket``: where the process that runs the stage listens. The stage
is the same code as over any other engine; see ``relay``.
"""

import logging
import time
from collections.abc import Sequence
from multiprocessing.connection import Client

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedhubert_lib.federated import messages, relay

logger = logging.getLogger(__name__)

WAIT_SECONDS = 120
"""How long to wait for all clients; those still missing then are left out until they come."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the clients of the run, then pass on the stage's messages until it ends."""
    with Client(str(context.run_config["socket"]), family="AF_UNIX") as pipe:
        header, _ = relay.receive(pipe)
        nodes = wait(grid, header["ids"], WAIT_SECONDS)
        relay.send(pipe, {"connected": sorted(nodes)}, {})
        if nodes:
            relay.serve(pipe, messages.GridClients(grid, nodes, ids=header["ids"]))


def wait(grid: Grid, ids: Sequence[str], seconds: float) -> dict[str, int]:
    """Nodes by client id, once all of ``ids`` are connected or ``seconds`` have passed.

    A node list that is empty at first is Flower's way: nodes appear as they activate.
    """
    deadline = time.monotonic() + seconds
    nodes: dict[str, int] = {}
    while missing := sorted(set(ids) - set(nodes)):
        if unknown := set(grid.get_node_ids()) - set(nodes.values()):
            nodes |= messages.identify(grid, unknown)
        if time.monotonic() > deadline:
            logger.warning("%s: not connected within %.0f s; left out until they come", ", ".join(missing), seconds)
            break
        time.sleep(0.5)
    return {client: node for client, node in nodes.items() if client in ids}
