"""Answer a message in this process, with all the libraries that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from client_app.startup import collector_paused

# Most of what a message costs a new process are these imports. The model's own module belongs to
# them, though it is used only once a message names its family.
with collector_paused(freeze=True):
    import transformers.modeling_utils  # noqa: F401

    from client_app.disclosure import reason
    from client_app.means import out_of_memory
    from client_app.node import client_for
    from fedpft_core.errors import ReplyError, UserError
    from fedpft_core.wire.envelope import seal
    from fedpft_core.wire.form import Envelope
    from fedpft_core.wire.messages import OUT_OF_MEMORY, RefusalReply


def answer(
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    envelope: Callable[[], Envelope],
) -> Envelope:
    """Answer one message as the node that the node config names.

    Args:
        node_config: as Flower has it.
        run_config: the run's configuration, flat.
        envelope: gives what came; it may raise ReplyError.

    Returns:
        The sealed answer: a reply, what the client lacks, or a refusal with the reason.
    """
    name = "?"
    own_rows = bool(node_config.get("data-path"))
    try:
        client = client_for(node_config, run_config)
        name = client.name
        return client.handle(envelope())
    except (UserError, ReplyError, OSError) as error:
        return seal(RefusalReply(name, reason(error, name, own_rows)))
    except Exception as error:
        if out_of_memory(error):
            return seal(RefusalReply(name, OUT_OF_MEMORY))
        if not own_rows:
            raise
        return seal(RefusalReply(name, reason(error, name)))
