"""ClientApp: unpack → train → pack.

In simulation a node is a partition of the run's training rows; in deployment its own node
config names it and its data. Either way nothing here names, needs or opens the FM.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.warm.ask import ask
from fedpft_core.errors import ReplyError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.form import Envelope

app = ClientApp()


def _answer(message: Message, context: Context) -> Message:
    node, run = dict(context.node_config), dict(context.run_config)
    try:
        reply = ask(node, run, wire.from_record(message.content))
    except ReplyError:
        reply = None  # refused below, in words
    if reply is None:
        # Here alone, since it takes seconds: a worker that answers has done it before.
        from client_app.answer import answer

        def envelope() -> Envelope:
            return wire.from_record(message.content)

        reply = answer(node, run, envelope)
    return Message(wire.to_record(reply), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this node is and how many rows it holds.

    Args:
        message: a `hello`.
        context: Flower's; its node config names the node and its data.

    Returns:
        The answer, or a refusal with the reason.
    """
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune the adapter on this node's rows, or sum its class statistics, as the message asks.

    Args:
        message: a request for training or for statistics.
        context: Flower's; its node config names the node and its data.

    Returns:
        The reply, or a refusal with the reason.
    """
    return _answer(message, context)
