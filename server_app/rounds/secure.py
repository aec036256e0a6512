"""A session of secure aggregation: four exchanges, after which the server has the sum alone.

Keys, shares, masked numbers, and what takes the masks off. Whoever fails in one exchange is left
out of those that follow; the session succeeds as long as enough neighbours of each client stay.
Sums in the ring do not depend on their order. What the numbers are is for `Masked` to say: the
changes of a round (`server_app.rounds.changes`) or class statistics (`server_app.rounds.summed`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpft_core.config import Config
from fedpft_core.errors import ReplyError
from fedpft_core.secure import graph, keys, masks, ring
from fedpft_core.wire.envelope import Envelope, seal
from fedpft_core.wire.messages import (
    Failure,
    KeysReply,
    KeysRequest,
    Message,
    RevealReply,
    RevealRequest,
    SharesReply,
    SharesRequest,
)
from server_app.delivery import Holds
from server_app.rounds.chain import opened
from server_app.rounds.collect import Awaited
from server_app.rounds.ledger import printable
from server_app.rounds.nodes import Node
from server_app.rounds.outcome import Good
from server_app.rounds.requests import Request
from server_app.state import Events, State

_SMALL = 2**12  # bytes of a reply without shares
_PER_PEER = 200  # bytes of a reply for each neighbour
_SLACK = 2**16

# Sends each node of a phase its message, made of its id and what sub-FMs it has.
Exchange = Callable[["Phase", Callable[[int, Holds], Envelope]], None]


class Phase(Awaited):
    """The replies to one of the four exchanges; `take(node, message)` is what is kept of each."""

    def __init__(
        self,
        nodes: Sequence[Node],
        state: State,
        round: int,
        events: Events,
        kind: type[Any],
        most: int,
        take: Callable[[Node, Any], object],
    ) -> None:
        super().__init__(nodes, state, round, events)
        self.kind, self.most, self.take = kind, most, take
        self.good: dict[str, object] = {}  # by client name

    def judge(self, node: Node, reply: Envelope | Failure) -> None:
        """Keep what a reply is good for, or why it is good for nothing.

        Args:
            node: the client it came from.
            reply: what came, or why nothing did.
        """  # noqa: DOC501  # the ReplyError below does not leave this function
        if isinstance(reply, Failure):
            self.bad[node.name] = printable(reply.reason)
            return
        try:
            message = opened(reply, self.most, self.kind)
            if message.name != node.name:
                raise ReplyError(f"the reply is signed {message.name[:40]!r}, not {node.name!r}")
            self.good[node.name] = self.take(node, message)
        except ReplyError as error:
            self.refused(node, error)


class Masked(Protocol):
    """What the clients of a session are asked for, and send under masks."""

    kind: type[Any]  # of the reply
    count: int  # numbers that a client sends
    bits: int  # k of the ring

    def request(self, name: str, session: str, alive: tuple[int, ...]) -> Request:
        """The message to one client.

        Args:
            name: the client's.
            session: names the session.
            alive: its neighbours that have shared their secrets.

        Returns:
            A function from what the client has to the message.
        """

    def sent(self, node: Node, reply: Any, arrived: float) -> tuple[Mapping[str, Tensor], Good]:
        """Hold a reply against what was asked for.

        Args:
            node: the client it came from.
            reply: of the kind that is waited for, and of this session.
            arrived: seconds since the clients were asked.

        Returns:
            The tensors that should be the one of masked numbers, and the reply's figures.

        Raises:
            ReplyError: it is the answer to something else.
        """

    def took(self, node: Node, reply: Any, good: Good) -> None:
        """Note a reply whose numbers are in the sum; by itself nothing is noted.

        Args:
            node: the client it came from.
            reply: what it sent.
            good: the reply's figures.
        """
        return

    def lost(self, name: str, why: str) -> None:
        """Note a client that is left out of what follows; by itself nothing is noted.

        Args:
            name: the client's.
            why: what it said, or did not.
        """
        return


@dataclass
class Summed:
    """What a session has come to; without `total` it has failed, and `bad` says who with."""

    bad: dict[str, str]
    good: dict[str, Good] = field(default_factory=dict)  # whose numbers are in the sum, by name
    total: np.ndarray | None = None  # int64 [count]


class Session:
    """One session with some clients, who are numbered in the order of their names."""

    def __init__(
        self,
        config: Config,
        nodes: Sequence[Node],
        state: State,
        round: int,
        events: Events,
        exchange: Exchange,
        work: Masked,
    ) -> None:
        self.config, self.state, self.round = config, state, round
        self.events, self.exchange, self.work = events, exchange, work
        self.name = secrets.token_hex(16)
        self.nodes = sorted(nodes, key=lambda n: n.name)
        self.number = {n.name: i for i, n in enumerate(self.nodes)}
        self.bad: dict[str, str] = {}
        self.public: dict[int, keys.Public] = {}
        self.graph: dict[int, tuple[int, ...]] = {}
        self.threshold: dict[int, int] = {}
        self.sealed: dict[int, dict[int, str]] = {}  # by receiver, by sender
        self.shared: set[int] = set()

    def run(self) -> Summed:
        """Take the clients through the four exchanges.

        Returns:
            What came of it.
        """
        least = self.config.federation.min_clients
        self._ask_keys()
        if len(self.public) < least:
            return Summed(self.bad)
        self._ask_shares()
        if len(self.shared) < least:
            return Summed(self.bad)
        total = np.zeros(self.work.count, ring.kind(self.work.bits))
        good = self._ask_numbers(total)
        if len(good) < least:
            return Summed(self.bad, good)
        try:
            found = self._unmask(total, {self.number[name] for name in good})
        except ValueError as error:
            self.bad["secure aggregation"] = str(error)
            return Summed(self.bad)
        return Summed(self.bad, good, ring.unwrap(found, self.work.bits))

    def _ask(
        self, numbers: Iterable[int], kind: type[Any], most: int,
        take: Callable[[Node, Any], object], make: Callable[[int], Message],
    ) -> Phase:  # fmt: skip
        """One of the exchanges that need no package."""
        nodes = [self.nodes[i] for i in sorted(numbers)]
        phase = Phase(nodes, self.state, self.round, self.events, kind, most, take)
        self.exchange(phase, lambda i, _: seal(make(self.number[phase.nodes[i].name])))
        self._note(phase)
        return phase

    def _note(self, phase: Phase) -> None:
        for name, why in phase.bad.items():
            self.bad[name] = why
            self.work.lost(name, why)

    def _ask_keys(self) -> None:
        def take(node: Node, reply: KeysReply) -> None:
            self._same_session(reply.session)
            parts = (reply.sealing, reply.masking, reply.own)
            shown = keys.Public(*(bytes.fromhex(part) for part in parts))
            if not shown.usable:
                raise ReplyError("a public key is none")
            self.public[self.number[node.name]] = shown

        self._ask(
            range(len(self.nodes)), KeysReply, _SMALL, take,
            lambda _: KeysRequest(self.name, self.round),
        )  # fmt: skip

    def _ask_shares(self) -> None:
        p = self.config.privacy
        order = sorted(self.public)
        secrets.SystemRandom().shuffle(order)
        degree = p.secure_neighbours or graph.degree_for(len(order))
        self.graph = graph.neighbours(order, degree)
        self.threshold = {
            i: graph.threshold_for(len(near), p.secure_threshold) for i, near in self.graph.items()
        }

        def make(i: int) -> SharesRequest:
            shown = {str(p): self.public[p] for p in self.graph[i]}
            return SharesRequest(
                self.name, self.round, i, self.threshold[i],
                {p: [k.sealing.hex(), k.masking.hex()] for p, k in shown.items()},
            )  # fmt: skip

        def take(node: Node, reply: SharesReply) -> None:
            self._same_session(reply.session)
            i = self.number[node.name]
            if reply.shares.keys() != {str(p) for p in self.graph[i]}:
                raise ReplyError("the shares are not one for each neighbour")
            for p, sealed in reply.shares.items():
                self.sealed.setdefault(int(p), {})[i] = sealed
            self.shared.add(i)

        most = _SMALL + _PER_PEER * max(map(len, self.graph.values()))
        self._ask(self.graph, SharesReply, most, take, make)

    def _ask_numbers(self, total: np.ndarray) -> dict[str, Good]:
        """Add up the masked numbers, into `total`."""
        work, k = self.work, self.work.bits
        began = time.perf_counter()
        alive = {i: tuple(n for n in self.graph[i] if n in self.shared) for i in self.shared}
        ready = [i for i in sorted(alive) if len(alive[i]) >= self.threshold[i]]

        def take(node: Node, reply: Any) -> Good:
            self._same_session(reply.session)
            if reply.round != self.round or reply.digest != self.state.of(node.name).digest:
                raise ReplyError("the reply is for another round or sub-FM")
            tensors, good = work.sent(node, reply, time.perf_counter() - began)
            values = tensors.get("masked")
            if tensors.keys() != {"masked"} or values is None or values.dtype != torch.uint8:
                raise ReplyError("the reply is not the one tensor of masked numbers")
            try:
                got = ring.unpack(values.reshape(-1).numpy().tobytes(), work.count, k)
            except ValueError as error:
                raise ReplyError(str(error)) from error
            np.copyto(total, ring.reduced(total + got, k))
            self.state.have[node.name] = (reply.digest,)
            work.took(node, reply, good)
            return good

        def make(node_id: int, holds: Holds) -> Envelope:
            name = phase.nodes[node_id].name
            return work.request(name, self.name, alive[self.number[name]])(holds)

        most = ring.packed_bytes(work.count, k) + _SLACK
        phase = Phase(
            [self.nodes[i] for i in ready], self.state, self.round, self.events, work.kind,
            most, take,
        )  # fmt: skip
        self.exchange(phase, make)
        self._note(phase)
        return {name: g for name, g in phase.good.items() if isinstance(g, Good)}

    def _unmask(self, total: np.ndarray, present: set[int]) -> np.ndarray:
        gone = self.shared - present
        of_own: dict[int, dict[int, bytes]] = {i: {} for i in present}
        of_pairs: dict[int, dict[int, bytes]] = {i: {} for i in gone}

        def near(i: int, among: set[int]) -> tuple[int, ...]:
            return tuple(n for n in self.graph[i] if n in among)

        def make(i: int) -> RevealRequest:
            answered, dropped = near(i, present), near(i, gone)
            shares = {str(n): self.sealed[i][n] for n in (*answered, *dropped)}
            return RevealRequest(self.name, self.round, answered, dropped, shares)

        def take(node: Node, reply: RevealReply) -> None:
            self._same_session(reply.session)
            i = self.number[node.name]
            for found, among, into in (
                (reply.own_shares, present, of_own), (reply.pair_shares, gone, of_pairs),
            ):  # fmt: skip
                if found.keys() != {str(n) for n in near(i, among)}:
                    raise ReplyError("the shares revealed are not those asked for")
                for n, share in found.items():
                    into[int(n)][i] = bytes.fromhex(share)

        most = _SMALL + _PER_PEER * max(map(len, self.graph.values()))
        self._ask(present, RevealReply, most, take, make)
        return masks.unmasked(
            total, self.work.bits, of_own, of_pairs, self.graph, self.public, self.threshold,
            bytes.fromhex(self.name),
        )  # fmt: skip

    def _same_session(self, session: str) -> None:
        if session != self.name:
            raise ReplyError("the reply is of another session")
