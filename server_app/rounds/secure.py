"""A round of secure aggregation: four exchanges, after which the server has the sum alone.

Keys, shares, masked changes, and what takes the masks off. Whoever fails in one exchange is left
out of those that follow; the round succeeds as long as enough neighbours of each client stay. Sums
in the ring do not depend on their order.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpft_core.config import Config
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.secure import graph, keys, masks, ring
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import Envelope, seal
from fedpft_core.wire.messages import (
    Failure,
    KeysReply,
    KeysRequest,
    Message,
    RevealReply,
    RevealRequest,
    SecureTrainReply,
    SharesReply,
    SharesRequest,
)
from fedpft_core.wire.parcel import Parcel
from server_app.delivery import Holds
from server_app.rounds.chain import opened
from server_app.rounds.collect import Awaited
from server_app.rounds.ledger import printable
from server_app.rounds.nodes import Node
from server_app.rounds.outcome import Good, Outcome, training_wall
from server_app.rounds.requests import secure_request
from server_app.run import schema as ev
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


@dataclass
class Sum:
    """What a round has come to; without `change` it has failed, and `bad` says who with."""

    bad: dict[str, str]
    good: dict[str, Good] = field(default_factory=dict)
    change: Tensors | None = None  # the mean, float64
    loss: float = 0.0

    def outcome(self, start: Tensors, began: float) -> Outcome:
        """The finished round.

        Args:
            start: the adapter that clients were sent, as they decoded it.
            began: when the round began, `time.perf_counter()`.

        Returns:
            The next adapter and the round's figures.
        """
        assert self.change is not None
        now = time.perf_counter()
        good = [self.good[name] for name in sorted(self.good)]
        return Outcome(
            adapter={k: (t.double() + self.change[k]).float() for k, t in start.items()},
            before=start,
            counts=None,
            loss=self.loss,
            examples=sum(r.examples for r in good),
            good=len(good),
            bad=len(self.bad),
            train_seconds=sum(r.seconds for r in good),
            busy_seconds=training_wall(good),
            seconds=now - began,
        )


class SecureRound:
    """One session with one sample of clients, who are numbered in the order of their names."""

    def __init__(
        self,
        config: Config,
        nodes: Sequence[Node],
        state: State,
        round: int,
        events: Events,
        exchange: Exchange,
    ) -> None:
        self.config, self.state, self.round = config, state, round
        self.events, self.exchange = events, exchange
        self.session = secrets.token_hex(16)
        self.nodes = sorted(nodes, key=lambda n: n.name)
        self.number = {n.name: i for i, n in enumerate(self.nodes)}
        self.bad: dict[str, str] = {}
        self.public: dict[int, keys.Public] = {}
        self.graph: dict[int, tuple[int, ...]] = {}
        self.threshold: dict[int, int] = {}
        self.sealed: dict[int, dict[int, str]] = {}  # by receiver, by sender
        self.shared: set[int] = set()

    def run(self, parcel: Callable[[State], Parcel], sent: Tensors, base: Tensors) -> Sum:
        """Take the clients through the four exchanges.

        Args:
            parcel: gives a state's package as it travels.
            sent: the adapter to start from, in the wire's format.
            base: the same as clients decode it, float32.

        Returns:
            What came of it.

        Raises:
            RunError: the sum with its noise does not fit the ring.
        """
        least = self.config.federation.min_clients
        self._ask_keys()
        if len(self.public) < least:
            return Sum(self.bad)
        self._ask_shares()
        if len(self.shared) < least:
            return Sum(self.bad)
        count = sum(t.numel() for t in base.values()) + 1  # and the loss
        k = ring.width(
            self.config.privacy.secure_bits, len(self.nodes),
            math.sqrt(len(self.nodes) * self._variance(count)),
        )  # fmt: skip
        if k > ring.MOST_BITS:
            raise RunError(
                f"the sum of a round needs {k} bits: lower privacy.secure-bits or "
                "privacy.client-noise, or raise privacy.secure-range"
            )
        total = np.zeros(count, np.uint32)
        good = self._ask_changes(parcel, sent, total, k)
        if len(good) < least:
            return Sum(self.bad, good)
        try:
            found = self._unmask(total, k, {self.number[name] for name in good})
        except ValueError as error:
            self.bad["secure aggregation"] = str(error)
            return Sum(self.bad)
        return self._restored(ring.unwrap(found, k), good, base)

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
            self.events.emit(ev.Reply(
                round=self.round, client=name, status="refused", seconds=0.0, reason=why,
            ))  # fmt: skip

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
            lambda _: KeysRequest(self.session, self.round),
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
                self.session, self.round, i, self.threshold[i],
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

    def _ask_changes(
        self, parcel: Callable[[State], Parcel], sent: Tensors, total: np.ndarray, k: int
    ) -> dict[str, Good]:
        """Add up the masked changes, into `total`."""
        p, config, state = self.config.privacy, self.config, self.state
        began = time.perf_counter()
        alive = {i: tuple(n for n in self.graph[i] if n in self.shared) for i in self.shared}
        ready = [i for i in sorted(alive) if len(alive[i]) >= self.threshold[i]]

        def take(node: Node, reply: SecureTrainReply) -> Good:
            self._same_session(reply.session)
            if reply.round != self.round or reply.digest != state.of(node.name).digest:
                raise ReplyError("the reply is for another round or sub-FM")
            if reply.steps < 1 or not 0 <= reply.seconds < 2**32:
                raise ReplyError("steps or seconds are not positive, finite numbers")
            values = reply.adapter.get("masked")
            if reply.adapter.keys() != {"masked"} or values is None or values.dtype != torch.uint8:
                raise ReplyError("the adapter is not the one tensor of a masked change")
            try:
                got = ring.unpack(values.reshape(-1).numpy().tobytes(), len(total), k)
            except ValueError as error:
                raise ReplyError(str(error)) from error
            np.copyto(total, (total + got) & np.uint32(2**k - 1))
            state.have[node.name] = (reply.digest,)
            arrived = time.perf_counter() - began
            self.events.emit(ev.Reply(
                round=self.round, client=node.name, status="ok", seconds=arrived,
                examples=node.examples, steps=reply.steps, train_seconds=reply.seconds,
            ))  # fmt: skip
            return Good(node.examples, 0.0, reply.seconds, arrived)

        def make(node_id: int, holds: Holds) -> Envelope:
            i = self.number[phase.nodes[node_id].name]
            view = state.of(phase.nodes[node_id].name)
            return secure_request(
                config, view, parcel(view), self.round, sent, session=self.session, alive=alive[i],
                bits=p.secure_bits, reach=p.secure_range, modulus_bits=k,
                variance=self._variance(len(total)),
                longest=p.client_clip if p.client_noise else 0.0,
            )(holds)  # fmt: skip

        most = ring.packed_bytes(len(total), k) + _SLACK
        phase = Phase(
            [self.nodes[i] for i in ready], state, self.round, self.events, SecureTrainReply,
            most, take,
        )  # fmt: skip
        self.exchange(phase, make)
        self._note(phase)
        return {name: g for name, g in phase.good.items() if isinstance(g, Good)}

    def _unmask(self, total: np.ndarray, k: int, present: set[int]) -> np.ndarray:
        gone = self.shared - present
        of_own: dict[int, dict[int, bytes]] = {i: {} for i in present}
        of_pairs: dict[int, dict[int, bytes]] = {i: {} for i in gone}

        def near(i: int, among: set[int]) -> tuple[int, ...]:
            return tuple(n for n in self.graph[i] if n in among)

        def make(i: int) -> RevealRequest:
            answered, dropped = near(i, present), near(i, gone)
            shares = {str(n): self.sealed[i][n] for n in (*answered, *dropped)}
            return RevealRequest(self.session, self.round, answered, dropped, shares)

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
        session = bytes.fromhex(self.session)
        return masks.unmasked(
            total, k, of_own, of_pairs, self.graph, self.public, self.threshold, session
        )

    def _restored(self, total: np.ndarray, good: Mapping[str, Good], base: Tensors) -> Sum:
        p = self.config.privacy
        change = ring.restore(total[:-1], p.secure_bits, p.secure_range, base, len(good))
        step = ring.LOSS_REACH / ring.largest(p.secure_bits)
        loss = math.nan if p.client_noise else float(total[-1]) * step / len(good)
        return Sum(self.bad, dict(good), change, loss)

    def _variance(self, count: int) -> float:
        """Of each client's noise: those that a round needs have enough of it together."""
        p = self.config.privacy
        if not p.client_noise:
            return 0.0
        most = ring.sensitivity(p.client_clip, p.secure_bits, p.secure_range, count)
        return (p.client_noise * most) ** 2 / self.config.federation.min_clients

    def _same_session(self, session: str) -> None:
        if session != self.session:
            raise ReplyError("the reply is of another session")
