"""A round of the federation: sample, send, collect, aggregate; again when too few replies are good.

The loop is our own instead of a subclass of Flower's `Strategy`: a client that lacks weights is
served again within its round, a round can be repeated, and replies are aggregated in stable-name
order, none of which that class's `start` has room for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpft_core.aggregation import Replies, RuleSettings
from fedpft_core.config import Config
from fedpft_core.errors import RunError
from fedpft_core.head.statistics import Statistics
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.task import Task
from fedpft_core.wire import codec
from fedpft_core.wire.validate import Expected, ExpectedStatistics
from server_app.rounds import ledger
from server_app.rounds.chain import Asked
from server_app.rounds.collect import Collection
from server_app.rounds.nodes import Node, Nodes
from server_app.rounds.outcome import Good, Outcome, outcome
from server_app.rounds.requests import Request, expected, learning_rate, requests
from server_app.rounds.statistics import Sums, statistics_requests
from server_app.run import schema as ev
from server_app.state import Events, State
from server_app.transport import Transport


@dataclass(frozen=True)
class Prepared:
    """A round before it is asked for.

    Attributes:
        request: the message by what a client has.
        want: what a good reply looks like; its adapter is what clients start from.
        rule: what the rule of aggregation may know besides the replies.
    """

    request: Request
    want: Expected
    rule: RuleSettings


class Strategy:
    """The rounds of one federation of clients."""

    def __init__(self, config: Config, transport: Transport, events: Events) -> None:
        self.config = config
        self.transport = transport
        self.events = events
        self.nodes = Nodes(config.federation, transport, events)
        self._package_bytes: tuple[str, bytes] = ("", b"")

    def run_round(self, state: State, round: int, count_rule: str) -> Outcome:
        """Train round `round` from `state`, trying again when too few replies are good.

        Args:
            state: where the run stands; what clients now have is noted in it.
            round: the round's number, from 1.
            count_rule: how clients are to count inactive neurons; empty = not at all.

        Returns:
            The next adapter and the round's figures. The state's adapter stays as it was.

        Raises:
            RunError: naming what was wrong, after `federation.attempts` tries.
        """
        f = self.config.federation
        for attempt in range(1, f.attempts + 1):
            if len(self.transport.nodes()) < f.min_clients:
                self.nodes.wait()
            start = time.perf_counter()
            nodes = self.sample(self.nodes.meet(state, round), round, attempt)
            self.events.emit(ev.RoundStarted(
                round=round, rounds=f.rounds, attempt=attempt,
                clients=[n.name for n in nodes],
                lr=learning_rate(self.config.train.lr, round, f.rounds),
            ))  # fmt: skip
            work = self.prepare(state, round, count_rule)
            with Replies(work.want.adapter, self._folder(), work.rule) as replies:
                asked = Asked(work.want, f.clip_update_norm, replies)
                got = Collection(asked, nodes, state, round, self.events)
                self._exchange(got, work.request)
                if len(got.good) >= f.min_clients:
                    return self.conclude(got, start)
            why = self.why(got.bad)
            text = (
                f"round {round}: {len(got.good)} good replies of the federation.min-clients = "
                f"{f.min_clients} needed ({why or 'no other clients are connected'})"
            )
            self.events.emit(ev.Warned(text=f"{text}; attempt {attempt} of {f.attempts}"))
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
        config = self.config
        sent = codec.encode(state.adapter, config.wire.adapter)
        base = codec.decode(sent, config.wire.adapter)
        return Prepared(
            requests(config, state, self._blob(state), round, sent, count_rule),
            expected(config, state, round, base, count_rule),
            self._rule(state),
        )

    def conclude(self, got: Collection, start: float) -> Outcome:
        """What a round's replies come to.

        Args:
            got: at least one good reply.
            start: when the round began, `time.perf_counter()`.

        Returns:
            The next adapter and the round's figures.
        """
        self._report_validation(got.asked.want.task, got.round, got.good.values())
        replies, rule = got.asked.replies, self.config.federation.aggregate
        made = outcome(rule, replies, got.good, got.counts, len(got.bad), start)
        if replies.figures:
            self.events.emit(
                ev.Aggregated(round=got.round, rule=rule, figures=dict(replies.figures))
            )
        return made

    def gather(self, state: State, want: ExpectedStatistics) -> Statistics:
        """Ask every connected client for its class statistics.

        Args:
            state: where the run stands; what clients now have is noted in it.
            want: what a good reply looks like.

        Returns:
            The sum over all good replies; who did not send any is named in a warning.

        Raises:
            RunError: fewer than federation.min-clients sent any, after federation.attempts tries.
        """
        f = self.config.federation
        for attempt in range(1, f.attempts + 1):
            if len(self.transport.nodes()) < f.min_clients:
                self.nodes.wait()
            got = Sums(want, self.nodes.meet(state, want.round), state, self.events)
            sent = codec.encode(state.adapter, self.config.wire.adapter)
            self._exchange(got, statistics_requests(self.config, state, self._blob(state), sent))
            why = self.why(got.bad)
            if len(got.good) >= f.min_clients:
                if got.bad:
                    self.events.emit(ev.Warned(text=f"class statistics without {why}"))
                return got.total()
            text = (
                f"class statistics: {len(got.good)} good replies of the federation.min-clients = "
                f"{f.min_clients} needed ({why or 'no other clients are connected'})"
            )
            self.events.emit(ev.Warned(text=f"{text}; attempt {attempt} of {f.attempts}"))
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

    def _rule(self, state: State) -> RuleSettings:
        """What the rule of aggregation may know besides the replies."""
        f, spec = self.config.federation, state.package.meta.adapter
        return RuleSettings(
            f.weighting, f.weight_cap, f.attackers, f.distance, spec.alpha / spec.rank, f.density,
            derive(self.config.run.seed, "aggregate", state.round + 1),
        )  # fmt: skip

    def _folder(self) -> Path | None:
        """Where a round's replies lie until they are aggregated."""
        return Path(self.config.run.dir) if self.config.run.dir else None

    def _blob(self, state: State) -> bytes:
        # Packing is the same work every round until an alignment.
        if self._package_bytes[0] != state.digest:
            self._package_bytes = (state.digest, state.package.to_bytes())
        return self._package_bytes[1]

    def _exchange(self, got: Collection | Sums, request: Request) -> None:
        """Send a round's requests and collect the replies."""
        timeout = self.config.federation.round_timeout

        def send(wanted: Mapping[int, Iterable[str]], deadline: float) -> None:
            messages = {node_id: request(have) for node_id, have in wanted.items()}
            for node_id, message in messages.items():
                name = got.nodes[node_id].name
                ledger.count_bytes(self.events, got.round, name, "down", message)
            left = max(1.0, deadline - time.monotonic())
            self.transport.exchange(messages, got.round, left, got.on_reply)

        have = got.state.have
        send({i: have.get(n.name, ()) for i, n in got.nodes.items()}, time.monotonic() + timeout)
        if got.again:
            # They lack the weights they were asked to train on: serve them within this round.
            # A straggler may have used up the time, so they get as much again.
            got.served |= got.again.keys()
            send(got.again, time.monotonic() + timeout)

    def _report_validation(self, task: Task, round: int, replies: Iterable[Good]) -> None:
        """Report what clients found on rows they keep from training.

        That is of the adapter the round began with, so of the round before.
        """
        having = [r.validation_sums for r in replies if r.validation_rows]
        if having:
            # Exact, so that the order in which replies came in cannot change the last bit.
            total = {name: math.fsum(sums[name] for sums in having) for name in having[0]}
            fields = task.score(total).fields()
            self.events.emit(ev.ClientValidation(round=round - 1, clients=len(having), **fields))
