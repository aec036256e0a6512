"""Clients train without common rounds; every few replies are merged, stale ones weighing less."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedpft_core.adapter import lora as adapters
from fedpft_core.aggregation import Replies
from fedpft_core.errors import RunError
from fedpft_core.seeds import numpy_stream
from fedpft_core.wire.messages import Failure
from server_app.delivery import Holds
from server_app.phases import align
from server_app.phases.reporting import phase
from server_app.rounds.chain import Asked
from server_app.rounds.nodes import Node
from server_app.rounds.requests import learning_rate
from server_app.run import schema as ev
from server_app.schedule.flight import Aloft, Buffer, duration
from server_app.schedule.post import Post
from server_app.schedule.session import Session, settle
from server_app.strategy import Prepared


def federate(session: Session) -> Callable[[], None]:
    """Make all merges that are left, with a checkpoint after each.

    federation.clients-per-round clients are at work at any time. One that has replied is asked
    again after the next merge, for which federation.buffer replies are needed; its change counts
    by how many merges were made since it was asked. By the simulated clock replies are taken in an
    order that follows from the seed, and clients at work are in the checkpoint, so that a run
    repeats to the bit and is resumed to the bit.

    Source: FedBuff, arXiv:2106.06639.

    Args:
        session: the state is brought to the end of the last merge.

    Returns:
        Nothing to do afterwards: whoever is still at work is not waited for.

    Raises:
        RunError: too few replies are good, or the run is to stop early.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    config = session.bench.config
    rounds = config.federation.rounds
    last = min(rounds, config.run.stop_after or rounds)
    session.strategy.nodes.wait()
    going = Continuous(session)
    for version in range(session.state.round + 1, last + 1):
        with phase(session.events, "round", round=version):
            going.merge(version)
        going.note()
        session.save()
    if last < rounds:
        raise RunError(f"stopped after round {last} as run.stop-after asks; resume to go on")
    return lambda: None


class Continuous:
    """The clients at work, from one merge to the next."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.bench.config
        self.settings = f = self.config.federation
        self.simulated = f.clock == "simulated"
        self.size = f.buffer or max(f.min_clients, math.ceil(f.clients_per_round / 2))
        self.post = Post(session.strategy, session.state, f.round_timeout)
        self.aloft: dict[int, Aloft] = {}  # by node id
        self.begun = time.perf_counter()
        self._works: dict[int, Prepared] = {}
        present = self.post.settle(session.state.round + 1)
        if self.simulated:
            self._go_on({n.name: n for n in present})

    def _go_on(self, present: dict[str, Node]) -> None:
        """Send those clients off again that were at work when the checkpoint was written."""
        for flight in self.session.state.flights:
            if flight.client in present:
                node = present[flight.client]
                self.send(node, flight.version, flight.due, self.session.state.round + 1)

    def work(self, version: int) -> Prepared:
        """What clients are asked that start from a version.

        Args:
            version: merges done.

        Returns:
            The message and what a good reply looks like; made once.
        """
        if version not in self._works:
            state = self.session.state
            adapter = state.adapter if version == state.round else state.bases[version]
            then = replace(state, adapter=adapter, round=version)
            self._works[version] = self.session.strategy.prepare(then, version + 1)
            state.bases[version] = adapter
        return self._works[version]

    def send(self, node: Node, version: int, due: float, round: int) -> None:
        """Ask a client to train from a version.

        Args:
            node: the client.
            version: merges done, of the adapter it starts from.
            due: when it is done by the simulated clock.
            round: the merge its messages are booked to.
        """
        post, work = self.post, self.work(version)
        post.deadline = post.box.now() + self.settings.round_timeout
        self.aloft[node.id] = Aloft(node, work, version, due, post.box.now())
        holds = Holds(self.session.state.have.get(node.name))
        post.send(node, work.request(node, holds), round)

    def ask(self, got: Buffer) -> None:
        """Keep as many clients at work as federation.clients-per-round says.

        Args:
            got: whoever has a reply in it is not asked before the merge.
        """
        state, f = self.session.state, self.settings
        flying = {a.node.name for a in self.aloft.values()}
        settled = {*got.good, *got.bad, *flying}
        idle = [n for n in self.post.connected() if n.name not in settled]
        stream = numpy_stream(self.config.run.seed, "async", got.round, len(got.good))
        for i in stream.permutation(len(idle))[: max(0, f.clients_per_round - len(flying))]:
            due = state.clock + duration(self.config, idle[i])
            self.send(idle[i], got.round - 1, due, got.round)

    def merge(self, version: int) -> None:
        """Collect a buffer of replies and merge it.

        Args:
            version: the merge's number, from 1.

        Raises:
            RunError: too few replies are good.
        """
        session, state, f = self.session, self.session.state, self.settings
        start = time.perf_counter()
        work = self.work(version - 1)
        # A sub-FM that is about to change takes in all that is under way, so that nobody trains
        # on one that is gone.
        drain = align.due(self.config, session.bench.models.plan, version)
        folder = Path(self.config.run.dir) if self.config.run.dir else None
        with Replies(work.want.adapter, folder, work.rule, work.want.beside) as replies:
            asked = Asked(work.want, f.clip_update_norm, replies, work.rule.scaling, own=work.own)
            got = Buffer(asked, f.staleness_exponent, state, version, session.events)
            got.servings = session.strategy.servings(state)
            got.matching = session.strategy.matching
            self.ask(got)
            session.events.emit(ev.RoundStarted(
                round=version, rounds=f.rounds, attempt=1,
                clients=sorted(a.node.name for a in self.aloft.values()),
                lr=learning_rate(self.config.train.lr, version, f.rounds),
            ))  # fmt: skip
            self.fill(got, drain)
            session.strategy.leave_out(got)
            began = time.perf_counter()
            outcome = session.strategy.conclude(got, start)
        merged = time.perf_counter()
        settle(session, version, outcome, start)
        session.events.emit(ev.Merged(
            round=version, replies=len(got.good), examples=outcome.examples,
            seconds=merged - self.begun, norm=adapters.norm(outcome.adapter),
            merge_seconds=merged - began,
            clock=state.clock if self.simulated else None,
        ))  # fmt: skip

    def fill(self, got: Buffer, drain: bool) -> None:
        """Take replies until there are enough.

        Args:
            got: the buffer.
            drain: whether to take in all that is under way as well.

        Raises:
            RunError: nobody is left to wait for, and too few replies are good.
        """
        f, tries = self.settings, 1
        while len(got.good) < self.size or (drain and self.aloft):
            if not self.aloft:
                if len(got.good) >= f.min_clients:
                    return
                why = self.session.strategy.why(got.bad) or "no other clients are connected"
                text = (
                    f"round {got.round}: {len(got.good)} good replies of the "
                    f"federation.min-clients = {f.min_clients} needed ({why})"
                )
                if tries >= f.attempts:
                    raise RunError(text)
                text = f"{text}; attempt {tries} of {f.attempts}"
                self.session.events.emit(ev.Warned(text=text))
                tries += 1
                got.bad.clear()
                self.ask(got)
                continue
            flight = self.next(got)
            state = self.session.state
            state.clock = max(state.clock, flight.due) if self.simulated else 0.0
            got.take(flight)
            node = flight.node
            if node.id in got.again:
                flight.reply, flight.sent = None, self.post.box.now()
                self.post.send(node, flight.work.request(node, got.serve()[node.id]), got.round)
                continue
            del self.aloft[node.id]
            if len(got.good) < self.size:
                self.ask(got)

    def next(self, got: Buffer) -> Aloft:
        """The client whose reply is to be taken next, once its reply is there.

        Args:
            got: says which round messages are booked to.

        Returns:
            By the simulated clock the one that is done first, of equals by name; otherwise the
            first to arrive. Its reply is a failure where it has taken too long.
        """
        while True:
            waiting = sorted(self.aloft.values(), key=lambda a: (a.due, a.node.name))
            turn = waiting[:1] if self.simulated else waiting
            for flight in turn:
                if flight.reply is not None:
                    return flight
                if self.post.box.now() - flight.sent > self.settings.round_timeout:
                    seconds = self.settings.round_timeout
                    flight.reply = Failure(f"no reply within {seconds:.1f} s")
                    return flight
            for node_id, reply in self.post.replies(got.round):
                if node_id in self.aloft:
                    self.aloft[node_id].reply = reply
            if not self.simulated:
                self.ask(got)

    def note(self) -> None:
        """Bring who is at work into the state, for the checkpoint."""
        state = self.session.state
        state.flights = [a.kept() for _, a in sorted(self.aloft.items())]
        versions = {a.version for a in self.aloft.values()}
        state.bases = {v: t for v, t in state.bases.items() if v in versions}
        self._works = {v: w for v, w in self._works.items() if v in versions}


__all__ = ["Continuous", "federate"]
