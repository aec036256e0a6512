"""Asking clients one by one, and greeting those that connect meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedpft_core.wire.envelope import Envelope, seal
from fedpft_core.wire.messages import Failure, Hello
from server_app.rounds import ledger
from server_app.rounds.nodes import HELLO_BYTES, Node
from server_app.state import State
from server_app.strategy import Strategy

_SETTLE_SECONDS = 60.0  # a fresh process has to import torch, on a machine that may be busy


class Post:
    """Messages to the clients of one federation while it goes on.

    Nothing here waits for a client: a node that does not answer the first query holds up nobody.

    Args:
        strategy: the federation.
        state: which sub-FMs a new client has is noted in it.
        timeout: how long replies can be of use, seconds from now.
    """

    def __init__(self, strategy: Strategy, state: State, timeout: float) -> None:
        self.nodes = strategy.nodes
        self.events = strategy.events
        self.state = state
        self.box = strategy.transport.mailbox()
        self.began = self.box.now()
        self.deadline = self.began + timeout
        self._transport = strategy.transport
        self._hello = replace(seal(Hello()), answer=HELLO_BYTES)
        self._greeted: set[int] = set()  # asked who they are, and not heard from yet
        self._strange: set[int] = set()  # heard from, and left out

    @property
    def left(self) -> float:
        """Seconds until the deadline; below 0 after it."""
        return self.deadline - self.box.now()

    def connected(self) -> list[Node]:
        """Who is there now and has said who it is; nodes not seen before are asked that.

        Returns:
            The nodes, by name.
        """
        ids = self._transport.nodes()
        for node_id in ids:
            if node_id not in {*self.nodes.known, *self._greeted, *self._strange}:
                self._greeted.add(node_id)
                self.box.send(node_id, self._hello, max(1.0, self.left))
        return self.nodes.present(ids)

    def settle(self, round: int) -> list[Node]:
        """Wait a little for the answers of the nodes that are there at the start.

        Args:
            round: the round that their answers are booked to.

        Returns:
            Those that have said who they are, by name; others can join later.
        """
        present = self.connected()
        until = self.box.now() + _SETTLE_SECONDS
        while self._greeted and self.box.now() < min(until, self.deadline):
            for _ in self.replies(round):
                pass  # nobody was asked for anything else yet
            present = self.connected()
        return present

    def send(self, node: Node, message: Envelope, round: int) -> None:
        """Send a client a message.

        Args:
            node: the client.
            message: what it is asked.
            round: the round it is booked to.
        """
        ledger.count_bytes(self.events, round, node.name, "down", message)
        self.box.send(node.id, message, max(1.0, self.left))

    def replies(self, round: int) -> Iterator[tuple[int, Envelope | Failure]]:
        """What has come since the last call, without answers to the first query.

        Args:
            round: the round that those answers are booked to.

        Yields:
            Node ids, and what came from each.
        """
        for node_id, reply in self.box.fetch():
            if node_id not in self._greeted:
                yield node_id, reply
                continue
            self._greeted.discard(node_id)
            self.nodes.hear(node_id, self._hello, reply, self.state, round)
            if node_id in self.nodes.known:
                self.nodes.announce(self.nodes.present(self._transport.nodes()))
            else:
                self._strange.add(node_id)


__all__ = ["Post"]
