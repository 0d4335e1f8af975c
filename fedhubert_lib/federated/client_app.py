"""The client as Flower's ClientApp: it reads the message, and hands it to ``handlers.answer``."""

import importlib
from pathlib import Path

from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from fedhubert_lib.federated import handlers, messages
from fedhubert_lib.federated.protocol import Failure

MODULES = {"kmeans": "kmeans", "pretrain": "pretraining", "distill": "distillation"}
"""The stages whose clients answer. A SuperNode imports in each message's process what the message is for, no more."""

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Every request comes as Flower's message type ``train``; the action inside says what is asked.

    The node's configuration names the client, and the ``run`` folder on its machine.
    """
    action, arrays, config = messages.read_request(message.content)
    if module := MODULES.get(action.partition(".")[0]):
        importlib.import_module(f"fedhubert_lib.{module}")
    node = context.node_config
    simulated = bool(node.get("by_reference", False))
    where, device = Path(str(node["run"])), str(node.get("device", "cpu"))
    home = handlers.home(where, str(node["client"]), action, device, simulated)
    reply = handlers.answer(home, action, arrays, config)
    if isinstance(reply, Failure):
        content = messages.failure(reply.client, reply.reason)
    else:
        pack = messages.SharedArray if simulated else Array
        content = messages.reply(reply.client, reply.arrays, reply.metrics, pack)
    return Message(content, reply_to=message)
