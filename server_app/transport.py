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

OnWait = Callable[[int, int, float], None]
"""Told what is there, what is waited for, and the seconds until the wait is given up."""

_AT_ONCE = 4  # replies asked of Flower at once, which it gives all together


class Transport(Protocol):
    """Nodes by id, and one exchange of messages with some of them."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are connected now.

        Returns:
            The ids, in ascending order.
        """

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
    ) -> None:
        """Send one message to each node and wait for the replies, at most `timeout` seconds.

        Each reply is handed to `on_reply` as it comes and is not kept. That is called for every
        node addressed; for one that did not answer with a Failure.

        Args:
            messages: what each node gets, by node id.
            round: the round the messages belong to.
            timeout: the longest wait, seconds.
            on_reply: takes a node's id and its reply.
        """


def _silently() -> OnWait:
    return lambda done, total, seconds_left: None


@dataclass
class FlowerTransport:
    """Messages over Flower's Grid; each wait for replies is told to what `waits` then makes."""

    grid: Grid
    poll_seconds: float = 0.05
    waits: Callable[[], OnWait] = _silently

    def nodes(self) -> list[int]:
        """Ids of the nodes that Flower says are connected.

        Returns:
            The ids, in ascending order.
        """
        return sorted(self.grid.get_node_ids())

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
    ) -> None:
        """Push one message to each node, and pull the replies until all are there or time is up.

        Args:
            messages: what each node gets, by node id; a `hello` goes as a query, others to train.
            round: becomes Flower's group id of the messages.
            timeout: the longest wait, seconds; Flower drops a message 60 s after it.
            on_reply: takes a node's id and its reply, or the Failure that stands for it.
        """
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
            on_reply(node, Failure(_ERRORS[5]))
        deadline, waits = time.monotonic() + timeout, self.waits()
        while waiting and time.monotonic() < deadline:
            got = False
            asked = list(waiting)
            for start in range(0, len(asked), _AT_ONCE):
                for reply in self.grid.pull_messages(asked[start : start + _AT_ONCE]):
                    # By the id replied to: the error reply of a dead node has another source id.
                    sent = reply.metadata.reply_to_message_id
                    if sent in waiting:
                        got = True
                        on_reply(waiting.pop(sent), _opened(reply))
            if waiting and not got:
                left = max(0.0, deadline - time.monotonic())
                waits(len(messages) - len(waiting), len(messages), left)
                time.sleep(self.poll_seconds)
        for node in waiting.values():
            on_reply(node, Failure(f"no reply within {timeout:.1f} s"))


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
        """Ids of the clients in this process.

        Returns:
            The ids, in ascending order.
        """
        return sorted(self.clients)

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
    ) -> None:
        """Ask one client after the other, and keep the server's thread count as it was.

        Args:
            messages: what each client gets, by node id.
            round: not looked at.
            timeout: not looked at: every client answers.
            on_reply: takes a client's id and its reply.
        """
        # Clients pin their threads, which in one process would be the server's as well.
        threads = torch.get_num_threads()
        for node, envelope in messages.items():
            sent = wire.from_record(wire.to_record(envelope))
            on_reply(node, wire.from_record(wire.to_record(self.clients[node](sent))))
        torch.set_num_threads(threads)
