"""One message to each client and one reply, merged as they arrive until a deadline or a count."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedpft_core.errors import RunError
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure
from server_app.delivery import Holds
from server_app.phases.reporting import phase
from server_app.rounds import ledger
from server_app.rounds.chain import Asked
from server_app.rounds.collect import Collection
from server_app.rounds.nodes import Node
from server_app.rounds.requests import learning_rate
from server_app.run import schema as ev
from server_app.run.replies import KeptReplies
from server_app.schedule.merge import Merging
from server_app.schedule.post import Post
from server_app.schedule.session import Session, settle
from server_app.state import Given

_ROUND = 1


def federate(session: Session) -> Callable[[], None]:
    """Ask every client once, and merge what comes until the deadline or the count.

    Clients that connect meanwhile are asked as well; those that do not answer hold up nobody. The
    final merge is made of the replies kept on disk, in the order of the clients' names, so that it
    is the same to the bit whatever order they came in. A server that is killed goes on from the
    replies it has kept.

    Source: Wang et al., arXiv:2412.04650, section 4.

    Args:
        session: the state is brought to the end of the one round.

    Returns:
        What books the replies that have come since the deadline.

    Raises:
        RunError: too few replies are good when the time is up.
    """
    if session.state.round >= _ROUND:
        return lambda: None  # resumed after the final merge
    if not session.checkpoints.all():
        session.save()  # what clients are about to start from
    shot = OneShot(session)
    with phase(session.events, "round", round=_ROUND):
        shot.collect()
        shot.finish()
    session.save()
    shot.kept.remove()
    return shot.late


class OneShot:
    """The one round of a federation, open to whoever connects in time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        config, state = session.bench.config, session.state
        self.settings = config.federation
        self.start = time.perf_counter()
        self.work = session.strategy.prepare(state, _ROUND)
        self.kept = KeptReplies(
            self.work.want.adapter, Path(config.run.dir) / "replies", self.work.rule,
            f"{state.run} {state.digest}", self.work.want.beside,
        )  # fmt: skip
        self.resumed = list(self.kept.good)
        if state.others:
            # Who has replied weighs by the width it had, whatever it would be given now.
            widths = {name: good.width for name, good in self.kept.good.items()}
            state.given |= {name: Given(w, most=w) for name, w in widths.items()}
        asked = Asked(
            self.work.want, self.settings.clip_update_norm, self.kept, self.work.rule.scaling,
            own=self.work.own,
        )  # fmt: skip
        self.got = Collection(asked, [], state, _ROUND, session.events)
        self.got.servings = session.strategy.servings(state)
        self.got.good = dict(self.kept.good)
        self.got.matching = session.strategy.matching
        self.merging = Merging(session, self.kept, _ROUND)
        self.post = Post(session.strategy, state, self.settings.round_timeout)
        self.waiting: set[int] = set()  # nodes whose reply is still to come

    @property
    def over(self) -> bool:
        """Whether there is nothing left to wait for."""
        good, f = len(self.got.good), self.settings
        if self.post.left <= 0 or good >= (f.enough_replies or f.clients):
            return True
        return not self.waiting and good + len(self.got.bad) >= f.clients

    def collect(self) -> None:
        """Ask whoever connects, and take replies until it is over."""
        self.ask(self.post.settle(_ROUND))
        while not self.over:
            came = False
            for node_id, reply in self.post.replies(_ROUND):
                came = True
                self.take(node_id, reply)
                if self.over:
                    return
            if not came or self.waiting != self.got.nodes.keys():
                self.ask(self.post.connected())

    def ask(self, nodes: list[Node]) -> None:
        """Send the message to those of some nodes that have not had it.

        Args:
            nodes: who is connected. A client that is back under a new node id is asked again,
                unless its reply is there.
        """
        new = [n for n in nodes if n.id not in self.got.nodes and n.name not in self.got.good]
        first = not self.got.nodes and not self.resumed
        if new and first:
            f = self.settings
            self.session.events.emit(ev.RoundStarted(
                round=_ROUND, rounds=f.rounds, attempt=1, clients=[n.name for n in new],
                lr=learning_rate(self.session.bench.config.train.lr, _ROUND, f.rounds),
            ))  # fmt: skip
        for node in new:
            if not first and node.name not in self.got.bad:
                self.session.events.emit(ev.Joined(round=_ROUND, client=node.name))
            self.got.bad.pop(node.name, None)
            self.got.nodes[node.id] = node
            self.send(node, Holds(self.session.state.have.get(node.name)))

    def send(self, node: Node, holds: Holds) -> None:
        """Send a client its message, with what it lacks.

        Args:
            node: the client.
            holds: what is known of its store.
        """
        self.waiting.add(node.id)
        self.post.send(node, self.work.request(node, holds), _ROUND)

    def take(self, node_id: int, reply: Envelope | Failure) -> None:
        """Take a reply through the chain, keep it, and merge it.

        Args:
            node_id: whose reply it is.
            reply: what came, or why nothing did.
        """
        got = self.got
        node = got.nodes.get(node_id)
        if node is None:
            return
        self.waiting.discard(node_id)
        if node.name in got.good:
            self.book(node, reply, "again", "a reply of this client is merged already")
            return
        got.on_reply(node_id, reply)
        if node_id in got.again:
            self.send(node, got.serve()[node_id])
        elif node.name in got.good:
            log = self.session.events
            self.kept.commit(node.name, got.good[node.name], log.offset())
            self.merging.take(node.name)

    def finish(self) -> None:
        """Merge for the last time, in the order of the clients' names.

        Raises:
            RunError: too few replies are good.
        """
        got, f, log = self.got, self.settings, self.session.events
        absent = {got.nodes[i].name: "no reply by the deadline" for i in self.waiting}
        for name in sorted(absent):
            log.emit(ev.Warned(text=f"merged without client {name}: {absent[name]}"))
        got.bad |= {name: why for name, why in absent.items() if name not in got.good}
        self.session.strategy.leave_out(got)
        if len(got.good) < f.min_clients:
            why = self.session.strategy.why(got.bad) or "no other clients have connected"
            raise RunError(
                f"{len(got.good)} good replies of the federation.min-clients = {f.min_clients} "
                f"needed within federation.round-timeout = {f.round_timeout:g} s ({why})"
            )
        settle(self.session, _ROUND, self.session.strategy.conclude(got, self.start), self.start)

    def late(self) -> None:
        """Book the replies that have come since the deadline; they are not merged."""
        for node_id, reply in self.post.replies(_ROUND):
            node = self.got.nodes.get(node_id)
            if node is not None:
                self.book(node, reply, "late", "it came after the final merge and is not used")

    def book(self, node: Node, reply: Envelope | Failure, status: str, why: str) -> None:
        """Note a reply that is not merged, and say so.

        Args:
            node: whose reply it is.
            reply: what came, or why nothing did; then there is nothing to note.
            status: as the event has it.
            why: why it is not merged.
        """
        if isinstance(reply, Failure):
            return
        log = self.session.events
        ledger.count_bytes(log, _ROUND, node.name, "up", reply)
        log.emit(ev.Reply(
            round=_ROUND, client=node.name, status=status,
            seconds=time.perf_counter() - self.start, reason=why,
        ))  # fmt: skip


__all__ = ["OneShot", "federate"]
