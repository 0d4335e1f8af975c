"""The client as Flower's ClientApp: it reads the message, and hands it to ``handlers.answer``."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedhubert_lib.federated import handlers, messages

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Every request comes as Flower's message type ``train``; the action inside says what is asked.

    The node's configuration names the client, and the ``run`` folder on its machine.
    """
    action, arrays, config = messages.read_request(message.content)
    node = context.node_config
    run, device = Path(str(node["run"])), str(node.get("device", "cpu"))
    home = handlers.home(run, str(node["client"]), action, device, simulated=False)
    return Message(messages.reply(handlers.answer(home, action, arrays, config)), reply_to=message)
