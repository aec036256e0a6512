"""How the server's messages reach the nodes: through Flower, or in process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedpft_core.errors import ReplyError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure

OnReply = Callable[[int, "Envelope | Failure"], None]


class Transport(Protocol):
    """Nodes by id, and one exchange of messages with some of them."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are connected now."""

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply | None = None,
    ) -> dict[int, Envelope | Failure]:
        """Send one message to each node and wait for the replies, at most `timeout` seconds.

        Every node addressed is in the result; one that did not answer has a Failure.
        """


@dataclass
class FlowerTransport:
    """Messages over Flower's Grid."""

    grid: Grid
    poll_seconds: float = 0.05

    def nodes(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply | None = None,
    ) -> dict[int, Envelope | Failure]:
        if not messages:
            return {}
        replies: dict[int, Envelope | Failure] = {}
        waiting: dict[str, int] = {}
        for node, envelope in messages.items():
            message = Message(
                content=wire.to_record(envelope),
                dst_node_id=node,
                message_type=MessageType.QUERY if envelope.kind == "hello" else MessageType.TRAIN,
                ttl=timeout + 60,
                group_id=str(round),
            )
            # One by one: for a node that has just left Flower answers with an empty id or with
            # none at all, and in a longer list nobody could tell which one that was.
            sent = next(iter(self.grid.push_messages([message])), "")
            if sent:
                waiting[sent] = node
                continue
            replies[node] = Failure(_ERRORS[5])
            if on_reply:
                on_reply(node, replies[node])
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            got = False
            for reply in self.grid.pull_messages(list(waiting)):
                # By the id replied to: the error reply of a dead node has another source id.
                sent = reply.metadata.reply_to_message_id
                if sent not in waiting:
                    continue
                node = waiting.pop(sent)
                replies[node] = _opened(reply)
                got = True
                if on_reply:
                    on_reply(node, replies[node])
            if waiting and not got:
                time.sleep(self.poll_seconds)
        for node in waiting.values():
            replies[node] = Failure(f"no reply within {timeout:.1f} s")
            if on_reply:
                on_reply(node, replies[node])
        return replies


_ERRORS = {
    2: "the client raised an error",
    5: "the node is gone",
    8: "the client process died",
}
_GONE = (5, 8)


def _opened(reply: Message) -> Envelope | Failure:
    if reply.has_error():
        code = reply.error.code
        what = _ERRORS.get(code, "Flower reported an error")
        # Of a process or node that is gone Flower can only say so once more, at length.
        lines = [] if code in _GONE else (reply.error.reason or "").strip().splitlines()
        return Failure(f"{what} (code {code}{': ' + lines[-1] if lines else ''})")
    try:
        return wire.from_record(reply.content)
    except ReplyError as error:
        return Failure(f"unreadable reply: {error}")


@dataclass
class LocalTransport:
    """Clients in this process, for comparisons and tests: the same bytes, no network.

    `clients[i]` answers for node i. Every message takes the way through Flower's records.
    """

    clients: Mapping[int, Callable[[Envelope], Envelope]]

    def nodes(self) -> list[int]:
        return sorted(self.clients)

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply | None = None,
    ) -> dict[int, Envelope | Failure]:
        replies: dict[int, Envelope | Failure] = {}
        # Clients pin their threads, which in one process would be the server's as well.
        threads = torch.get_num_threads()
        for node, envelope in messages.items():
            sent = wire.from_record(wire.to_record(envelope))
            replies[node] = wire.from_record(wire.to_record(self.clients[node](sent)))
            if on_reply:
                on_reply(node, replies[node])
        torch.set_num_threads(threads)
        return replies
