"""A round of the federation: sample, send, collect, aggregate; again when too few replies are good.

The loop is our own instead of a subclass of Flower's `Strategy`: a client that lacks weights is
served again within its round, a round can be repeated, and replies are aggregated in stable-name
order, none of which that class's `start` has room for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedpft_core.adapter.ranks import narrowed
from fedpft_core.aggregation import Replies, RuleSettings
from fedpft_core.config import Config
from fedpft_core.errors import RunError
from fedpft_core.head.form import Sums
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import steps_of
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import Expected, ExpectedStatistics
from server_app.delivery import Holds, Shelf, servings
from server_app.rounds import ledger, widths
from server_app.rounds.chain import Asked
from server_app.rounds.changes import Changes, Sum
from server_app.rounds.collect import Awaited, Collection
from server_app.rounds.matching import Matching
from server_app.rounds.nodes import Node, Nodes
from server_app.rounds.outcome import Outcome, outcome
from server_app.rounds.patience import Patience
from server_app.rounds.private import ClientPrivacy
from server_app.rounds.remarks import Remarks
from server_app.rounds.requests import (
    ByNode,
    Request,
    by_node,
    expected,
    learning_rate,
    local_settings,
    most_bytes,
    requests,
    wanted,
)
from server_app.rounds.secure import Masked, Phase, Session, Summed
from server_app.rounds.statistics import Gathered, Guard, statistics_requests
from server_app.rounds.summed import MaskedStatistics, Total
from server_app.run import schema as ev
from server_app.state import Events, State
from server_app.transport import Meanwhile, Transport

_AGAIN = 0.25  # share of a round's time that a client served again has at least

Combine = Callable[[Replies], Tensors]

# The server's own adapter: trained from the one given, in the round of that number.
Own = Callable[[Tensors, int], Tensors]

Agreement = widths.Agreement


@dataclass(frozen=True)
class Prepared:
    """A round before it is asked for.

    Attributes:
        request: the message by the client and what it has.
        want: what a good reply looks like; its adapter is what clients start from.
        rule: what the rule of aggregation may know besides the replies.
        own: what a good reply of one client looks like.
    """

    request: ByNode
    want: Expected
    rule: RuleSettings
    own: Callable[[Node], Expected]


def _to(got: Awaited, request: ByNode) -> Callable[[int, Holds], Envelope]:
    """The message by a node's id, of those that are awaited, and what it has."""
    return lambda node_id, holds: request(got.nodes[node_id], holds)


class Strategy:
    """The rounds of one federation of clients."""

    def __init__(
        self, config: Config, transport: Transport, events: Events, own: Own | None = None,
        agreement: Agreement | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.transport = transport
        self.events = events
        self.own = own
        self.agreement = agreement
        self.matching = Matching(config, events)
        self.private = ClientPrivacy(config, events) if config.privacy.client_noise else None
        self.remarks = Remarks(config.federation, events)
        self.patience = Patience(config.federation)
        self.nodes = Nodes(config.federation, transport, events, self.matching)
        self._shelf = Shelf()

    def run_round(
        self, state: State, round: int, count_rule: str, meanwhile: Meanwhile | None = None
    ) -> Outcome:
        """Train round `round` from `state`, trying again when too few replies are good.

        Args:
            state: where the run stands; what clients now have is noted in it.
            round: the round's number, from 1.
            count_rule: how clients are to count inactive neurons; empty = not at all.
            meanwhile: done once, while the clients of the first attempt train; not with
                privacy.secure. The state has to stay as it is.

        Returns:
            The next adapter and the round's figures. The state's adapter stays as it was.

        Raises:
            RunError: naming what was wrong, after `federation.attempts` tries.
        """
        f, private = self.config.federation, self.private
        for attempt in range(1, f.attempts + 1):
            if len(self.transport.nodes()) < f.min_clients:
                self.nodes.wait()
            start = time.perf_counter()
            met = self.nodes.meet(state, round)
            if private:
                private.afford(state, len(met), count_rule)
            nodes = self.sample(met, round, attempt)
            needed = private.needed(nodes) if private else f.min_clients
            self.events.emit(ev.RoundStarted(
                round=round, rounds=f.rounds, attempt=attempt,
                clients=[n.name for n in nodes],
                lr=learning_rate(self.config.train.lr, round, f.rounds),
            ))  # fmt: skip
            if self.config.privacy.secure:
                summed = self._summed(nodes, state, round, count_rule)
                if summed.change is not None:
                    return summed.outcome(start)
                text = self._too_few(f"round {round}", len(summed.good), summed.bad, attempt)
                continue
            work = self.prepare(state, round, count_rule)
            want = work.want
            with Replies(want.adapter, self._folder(), work.rule, want.beside) as replies:
                asked = Asked(want, f.clip_update_norm, replies, work.rule.scaling, own=work.own)
                got = Collection(asked, nodes, state, round, self.events, f.enough)
                self._exchange(got, _to(got, work.request), meanwhile and got.timed(meanwhile))
                meanwhile = None
                if not private:  # who is left out would depend on the others' rows
                    self.leave_out(got)
                if len(got.good) >= needed:
                    start_from = dict(want.adapter)
                    combine = (
                        private.combine(state, start_from, round, len(met)) if private else None
                    )
                    return self.conclude(got, start, combine)
            text = self._too_few(f"round {round}", len(got.good), got.bad, attempt)
        raise RunError(text)

    def prepare(self, state: State, round: int, count_rule: str = "") -> Prepared:
        """What clients are sent in a round, and what their replies are held against.

        Args:
            state: where the run stands.
            round: the round's number, from 1.
            count_rule: how clients are to count inactive neurons; empty = not at all.

        Returns:
            The messages by what a client has, what a good reply looks like, and what the rule of
            aggregation may know.
        """
        config, fmt = self.config, self.config.wire.adapter

        @cache
        def sent(rank: int) -> tuple[Tensors, Tensors]:
            """The adapter on the wire, and as clients decode it."""
            adapter = narrowed(state.adapter, rank) if rank else state.adapter
            wire = codec.encode(adapter, fmt)
            return wire, codec.decode(wire, fmt)

        def want(view: State, blocks: str, rank: int) -> Expected:
            return expected(config, view, round, sent(rank)[1], count_rule, blocks)

        def make(view: State, parcel: Parcel, blocks: str, rank: int) -> Request:
            return requests(
                config, view, parcel, round, sent(rank)[0], count_rule, blocks,
                want(view, blocks, rank).max_bytes,
            )  # fmt: skip

        return Prepared(
            by_node(state, self._parcel, make),
            want(state, "", 0),
            self._rule(state, sent(0)[1], round),
            wanted(state, want),
        )

    def conclude(self, got: Collection, start: float, combine: Combine | None = None) -> Outcome:
        """What a round's replies come to.

        Args:
            got: at least one good reply, unless `combine` can do without.
            start: when the round began, `time.perf_counter()`.
            combine: makes the next adapter in place of the rule of aggregation.

        Returns:
            The next adapter and the round's figures.
        """
        f, replies = self.config.federation, got.asked.replies
        self.remarks.of_replies(got.round, got.good)
        self.patience.learn(r.arrived for r in got.good.values())
        self.remarks.validation(got.asked.want.task, got.round, got.good)
        made = outcome(
            f, replies, got.good, len(got.bad), start, combine, widths.join(got.state), got.worked
        )
        if replies.figures:
            self.events.emit(
                ev.Aggregated(round=got.round, rule=f.aggregate, figures=dict(replies.figures))
            )
        return made

    def leave_out(self, got: Collection) -> None:
        """Leave out replies whose change is out of all proportion to the others'.

        Args:
            got: the replies of a round that are good so far.
        """
        work = local_settings(self.config, got.round)
        steps = {name: steps_of(r.examples, work) for name, r in got.good.items()}
        got.leave_out(steps, self.config.federation.largest_change)

    def gather(
        self, state: State, want: ExpectedStatistics, guard: Guard | None = None
    ) -> dict[str, Sums]:
        """Ask every connected client for the statistics of its rows.

        Args:
            state: where the run stands; what clients now have is noted in it.
            want: what a good reply looks like.
            guard: says whose statistics are left out; not with privacy.secure.

        Returns:
            By the width of the sub-FM (empty where there is one) the sum over all good replies that
            are not left out, with privacy.secure that of a session over all clients; who did not
            send any is named in a warning.

        Raises:
            RunError: fewer than federation.min-clients sent any, after federation.attempts tries,
                or a session's sum cannot be used.
        """
        f = self.config.federation
        for attempt in range(1, f.attempts + 1):
            if len(self.transport.nodes()) < f.min_clients:
                self.nodes.wait()
            got = self._gathered(self.nodes.meet(state, want.round), state, want)
            why = self.why(got.bad)
            if len(got.good) >= f.min_clients:
                if got.bad:
                    self.events.emit(ev.Warned(text=f"class statistics without {why}"))
                self.remarks.dominating("class statistics", got.rows)
                if guard and isinstance(got, Gathered):
                    got.leave_out(guard(got.parts(f)))
                return got.total(f)
            text = self._too_few("class statistics", len(got.good), got.bad, attempt)
        raise RunError(text)

    def sample(self, nodes: list[Node], round: int, attempt: int) -> list[Node]:
        """The clients of a round, drawn from those connected.

        Args:
            nodes: the connected nodes, in the order of their names.
            round: the round's number, from 1.
            attempt: the attempt at this round, from 1; each draws anew.

        Returns:
            `federation.clients-per-round` of them, or all where there are fewer, in the order of
            their names.
        """
        if self.private:
            return self.private.sample(nodes)
        f = self.config.federation
        size = min(f.clients_per_round, len(nodes))
        stream = numpy_stream(self.config.run.seed, "sample", round, attempt)
        if not size:
            return []
        return [nodes[i] for i in sorted(stream.choice(len(nodes), size=size, replace=False))]

    def why(self, bad: Mapping[str, str]) -> str:
        """Who does not take part, and why, in one line.

        Args:
            bad: reasons by the name of a client whose reply is not used.

        Returns:
            These, and the nodes that are left out because they could not say who they are; empty
            where there are none of either.
        """
        out = {f"node {i}": why for i, why in self.nodes.left_out.items()}
        return "; ".join(f"{name}: {reason}" for name, reason in sorted((out | dict(bad)).items()))

    def _summed(self, nodes: list[Node], state: State, round: int, count_rule: str) -> Sum:
        """An attempt at a round of secure aggregation, and what it spends."""
        sent = codec.encode(state.adapter, self.config.wire.adapter)
        base = codec.decode(sent, self.config.wire.adapter)
        work = Changes(
            self.config, nodes, state, round, self.events, count_rule, self._parcel, sent, base
        )
        summed = work.mean(self._session(nodes, state, round, work))
        if self.private and summed.change is not None:
            spend = self.private.masked(work.count)
            self.private.book(state, round, spend, self.config.privacy.client_clip)
        return summed

    def _too_few(self, what: str, good: int, bad: Mapping[str, str], attempt: int) -> str:
        """Warn of an attempt that failed; why, in one line."""
        f, why = self.config.federation, self.why(bad)
        text = (
            f"{what}: {good} good replies of the federation.min-clients = "
            f"{f.min_clients} needed ({why or 'no other clients are connected'})"
        )
        self.events.emit(ev.Warned(text=f"{text}; attempt {attempt} of {f.attempts}"))
        return text

    def _rule(self, state: State, start: Tensors, round: int) -> RuleSettings:
        """What the rule of aggregation may know besides the replies."""
        own = partial(self.own, start, round) if self.own else None
        f, spec = self.config.federation, state.package.meta.adapter
        return RuleSettings(
            f.weighting, f.weight_cap, f.attackers, f.distance, spec.alpha / spec.rank, f.density,
            derive(self.config.run.seed, "aggregate", state.round + 1), own,
            widths.factor(self.config, state, self.agreement),
        )  # fmt: skip

    def _folder(self) -> Path | None:
        """Where a round's replies lie until they are aggregated."""
        return Path(self.config.run.dir) if self.config.run.dir else None

    def servings(self, state: State) -> int:
        """How often a client may be served again in a round.

        Args:
            state: its package comes in one message or in parts.

        Returns:
            The number.
        """
        return servings(self._parcel(state), most_bytes(self.config))

    def _session(self, nodes: list[Node], state: State, round: int, work: Masked) -> Summed:
        args = self.config, nodes, state, round, self.events, self._exchange
        return Session(*args, work).run()

    def _gathered(
        self, nodes: list[Node], state: State, want: ExpectedStatistics
    ) -> Gathered | Total:
        """An attempt at class statistics."""
        sent = codec.encode(state.adapter, self.config.wire.adapter)
        if self.config.privacy.secure:
            work = MaskedStatistics(self.config, nodes, state, want, self._parcel, sent)
            return Total(work, self._session(nodes, state, want.round, work))
        got = Gathered(want, nodes, state, self.events)
        request = by_node(state, self._parcel, partial(self._statistics, sent, want))
        self._exchange(got, _to(got, request))
        return got

    def _statistics(
        self, sent: Tensors, want: ExpectedStatistics, view: State, parcel: Parcel, *_: Any
    ) -> Request:
        return statistics_requests(self.config, view, parcel, sent, want.head, want.max_bytes)

    def _parcel(self, state: State) -> Parcel:
        return self._shelf.parcel(state)

    def _exchange(
        self, got: Collection | Gathered | Phase, request: Callable[[int, Holds], Envelope],
        meanwhile: Meanwhile | None = None,
    ) -> None:  # fmt: skip
        """Send a round's requests, made of a node's id and what it has; collect the replies."""
        got.matching = self.matching
        timeout = self.patience.seconds(got.round)
        got.servings = self.servings(got.state)

        def send(
            wanted: Mapping[int, Holds], deadline: float, meanwhile: Meanwhile | None = None
        ) -> None:
            messages = {i: request(i, holds) for i, holds in wanted.items()}
            if isinstance(got, Phase):
                messages = {i: replace(m, answer=got.most) for i, m in messages.items()}
            for node_id, message in messages.items():
                name = got.nodes[node_id].name
                ledger.count_bytes(self.events, got.round, name, "down", message)
            left = max(1.0, deadline - time.monotonic())
            self.transport.exchange(messages, got.round, left, got.on_reply, meanwhile)

        have = got.state.have
        deadline = time.monotonic() + timeout
        send({i: Holds(have.get(n.name)) for i, n in got.nodes.items()}, deadline, meanwhile)
        while got.again and not got.done():
            # They lack the weights they were asked to train on: serve them within this round. What
            # a straggler left of its time is theirs, and a little where it left none.
            send(got.serve(), max(deadline, time.monotonic() + _AGAIN * timeout))
