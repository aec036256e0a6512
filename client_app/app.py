"""ClientApp: unpack → train → pack.

In simulation a node is a partition of the run's training rows; in deployment its own node
config names it and its data. Either way nothing here names, needs or opens the FM.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.startup import collector_paused

# In a deployment each message starts a new process, and most of its cost are these imports. The
# model's own module belongs to them, though it is used only once a message names its family.
with collector_paused(freeze=True):
    import transformers.modeling_utils  # noqa: F401

    from client_app.disclosure import reason
    from client_app.means import out_of_memory
    from client_app.node import client_for
    from fedpft_core.errors import ReplyError, UserError
    from fedpft_core.wire import flower as wire
    from fedpft_core.wire.envelope import Envelope, seal
    from fedpft_core.wire.messages import OUT_OF_MEMORY, RefusalReply

app = ClientApp()


def _answer(message: Message, context: Context) -> Message:
    name = "?"
    own_rows = bool(context.node_config.get("data-path"))
    try:
        client = client_for(dict(context.node_config), dict(context.run_config))
        name = client.name
        reply: Envelope = client.handle(wire.from_record(message.content))
    except (UserError, ReplyError, OSError) as error:
        reply = seal(RefusalReply(name, reason(error, name, own_rows)))
    except Exception as error:
        if out_of_memory(error):
            reply = seal(RefusalReply(name, OUT_OF_MEMORY))
        elif not own_rows:
            raise
        else:
            reply = seal(RefusalReply(name, reason(error, name)))
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
