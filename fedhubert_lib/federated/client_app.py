"""The client: one Flower ClientApp on every engine.

It finds the client's own folders from the node's configuration and hands the message to one of ``HANDLERS``. Whatever
reads audio, features or labels happens below ``answer``; ``acting`` says so to the audit that proves it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedhubert_lib import distillation, kmeans, pretraining, secure
from fedhubert_lib.federated import messages
from fedhubert_lib.federated.protocol import Arrays, ClientHome

Handler = Callable[[ClientHome, Mapping[str, Tensor], Mapping[str, Any]], tuple[Arrays, dict[str, float]]]

logger = logging.getLogger(__name__)

_acting: str | None = None


def acting() -> str | None:
    """The client whose code runs in this process now, its decoding threads included; None while server code runs."""
    return _acting


@contextmanager
def _act(client: str) -> Iterator[None]:
    global _acting
    _acting = client
    try:
        yield
    finally:
        _acting = None


def identify(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """Say who is there: every reply carries the client's id."""
    return {}, {}


HANDLERS: dict[str, Handler] = {
    "identify": identify,
    **kmeans.HANDLERS,
    "pretrain.update": pretraining.update,
    "pretrain.validate": pretraining.validate,
    "pretrain.keys": secure.keys,
    **distillation.HANDLERS,
    "distill.keys": secure.keys,
}
"""Everything that a server can ask of a client. Names are ``stage.action``; the stage says where state is kept."""

STAGES = {"kmeans": "02_kmeans", "pretrain": "03_pretrain", "distill": "04_distill"}


def home(context: Context, action: str) -> ClientHome:
    """The folders of this node's client.

    The node's configuration names the client, and the ``run`` folder on its machine: in simulation the one run folder,
    in deployment a folder of the same layout that holds this client's part alone.
    """
    settings = {**context.run_config, **context.node_config}
    client, run = str(settings["client"]), Path(str(settings["run"]))
    stage = STAGES.get(action.partition(".")[0], "")
    return ClientHome(
        client=client,
        data=run / "01_partition" / "clients" / client,
        labels=run / "02_kmeans" / "clients" / client,
        state=run / stage / "clients" / client,
        device=str(settings.get("device", "cpu")),
        simulated=bool(context.node_config.get("by_reference", False)),  # not from the server's run_config
    )


def answer(message: Message, context: Context, pack: messages.Pack = Array) -> Message:
    """Run the handler that ``message`` asks for. What it raises becomes a reply that says so: the round goes on."""
    action, arrays, config = messages.read_request(message.content)
    mine = home(context, action)
    try:
        if action not in HANDLERS:
            raise ValueError(f"no handler {action!r}; this client knows {', '.join(sorted(HANDLERS))}")
        with _act(mine.client):
            content = messages.reply(mine.client, *HANDLERS[action](mine, arrays, config), pack)
    except Exception as error:  # whatever a client's code raises is that client's failure, never the federation's
        reason = f"{type(error).__name__}: {error}"
        if pack is Array:  # over a network: the text may name files and utterances, which are not the server's to know
            logger.error("%s failed at %s", mine.client, action, exc_info=True)
            reason = f"{type(error).__name__}; the client's own log says more"
        content = messages.failure(mine.client, reason)
    return Message(content, reply_to=message)


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Every request comes as Flower's message type ``train``; the action inside says what is asked."""
    shared = bool(context.node_config.get("by_reference", False))
    return answer(message, context, messages.SharedArray if shared else Array)
