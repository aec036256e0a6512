"""A round's replies as they come in: each passes the chain once, and is booked."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedpft_core.errors import ReplyError
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import OUT_OF_MEMORY, Failure, NeedReply
from server_app.delivery import NOTHING, SERVINGS, Holds
from server_app.rounds import caution, ledger
from server_app.rounds.chain import Asked, Lacking, receive
from server_app.rounds.ledger import printable
from server_app.rounds.matching import Matching
from server_app.rounds.nodes import Node
from server_app.rounds.outcome import Good
from server_app.run import schema as ev
from server_app.state import Events, Given, State


class Awaited:
    """The nodes that were asked for something, and what has become of each.

    Of several replies of one node only the first that settles it counts, whatever order they come
    in. A subclass judges a reply, and keeps what is good of it in `good`, by client name.
    """

    good: Mapping[str, object]

    def __init__(self, nodes: Sequence[Node], state: State, round: int, events: Events) -> None:
        self.nodes = {n.id: n for n in nodes}
        self.state = state
        self.round = round
        self.events = events
        self.bad: dict[str, str] = {}  # reasons, by client name
        self.matching: Matching | None = None  # gives clients that fail another width
        self.again: dict[int, Holds] = {}  # who has to be served again, and has what
        self.served: dict[int, list[Holds]] = {}  # who has been served again, having had what
        self.servings = SERVINGS  # how often one client is served again at most
        self.moved: set[int] = set()  # who has been given another width in this round

    def judge(self, node: Node, reply: Envelope | Failure) -> None:
        """Take a reply of a node that is not settled.

        Args:
            node: the client it came from.
            reply: what came, or why nothing did.

        Raises:
            NotImplementedError: always here; a subclass says what a reply is good for.
        """
        raise NotImplementedError

    def done(self) -> bool:
        """Whether no more replies are waited for although there are some to come.

        Returns:
            False here; a subclass may know better.
        """
        return False

    def on_reply(self, node_id: int, reply: Envelope | Failure) -> bool:
        """Book a reply and, unless its node is settled, judge it.

        Args:
            node_id: whose reply it is; that of a node that was not asked is passed over.
            reply: what came, or why nothing did.

        Returns:
            Whether no more replies are waited for.
        """
        self._take(node_id, reply)
        return self.done()

    def _take(self, node_id: int, reply: Envelope | Failure) -> None:
        node = self.nodes.get(node_id)
        if node is None:
            return
        if isinstance(reply, Envelope):
            ledger.count_bytes(self.events, self.round, node.name, "up", reply)
        settled = node.name in self.good or node.name in self.bad
        if settled or node_id in self.again:
            return
        self.judge(node, reply)

    def refused(self, node: Node, error: ReplyError) -> bool:
        """Note why a reply is not used.

        Args:
            node: the client it came from.
            error: what is wrong with it.

        Returns:
            Whether the node only lacks the sub-FM and will be served again.
        """
        if isinstance(error, Lacking):
            try:
                self.again[node.id] = self._holds(node, error.need)
                self.state.have.pop(node.name, None)
                return True
            except ReplyError as wrong:
                error = wrong
        self.bad[node.name] = printable(error)
        return False

    def _holds(self, node: Node, need: NeedReply) -> Holds:
        """What a client has that is served again; all is sent once, if it does not lack less."""
        view = self.state.of(node.name)
        if need.digest != view.digest:
            raise ReplyError("it says what it lacks of another sub-FM than the one asked for")
        holds = Holds(need.have, need.lacks)
        if need.lacks is not None:
            manifest = view.package.manifest(view.digests)
            if not need.lacks or not manifest.contents.issuperset(need.lacks):
                raise ReplyError("it lacks nothing, or what is none of the sub-FM's")
        before = self.served.get(node.id, [])
        if len(before) < self.servings:
            if not before or holds.open < before[-1].open:
                return holds
            if NOTHING not in before:
                return NOTHING
        raise ReplyError("it has been served again, and lacks the sub-FM as before")

    def serve(self) -> dict[int, Holds]:
        """Who has to be served again; from here on these count as served.

        Returns:
            What each of them has, by node id.
        """
        now, self.again = self.again, {}
        for node_id, holds in now.items():
            self.served.setdefault(node_id, []).append(holds)
        return now

    def narrower(self, node: Node, reply: Envelope | Failure | ReplyError) -> bool:
        """Give a client that has failed at its width a narrower one, where that is why.

        Args:
            node: the client.
            reply: what came in place of a good reply.

        Returns:
            Whether it will be served again in this round, at that width.
        """
        if self.matching is None:
            return False
        if isinstance(reply, Failure) and reply.late:
            self.matching.missed(node.name, self.state, self.round)
            return False
        died = isinstance(reply, Failure) and reply.died
        if not died and not str(reply).startswith(OUT_OF_MEMORY):
            return False
        why = "its process died" if died else "it ran out of memory"
        moved = self.matching.down(node.name, why, self.state, self.round)
        if not moved or node.id in self.moved:
            return False
        self.moved.add(node.id)
        self.served.pop(node.id, None)  # of another sub-FM
        self.again[node.id] = Holds(self.state.have.get(node.name))
        return True


class Collection(Awaited):
    """The replies to one round's requests: figures of the good ones, reasons of the bad ones.

    No adapter is kept: it goes down the chain to the disk.
    """

    def __init__(
        self, asked: Asked, nodes: Sequence[Node], state: State, round: int, events: Events,
        enough: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(nodes, state, round, events)
        self.asked = asked
        self.enough = enough  # good replies at which nobody else is waited for; 0 = all
        self.good: dict[str, Good] = {}  # by client name
        self._started = time.perf_counter()

    def done(self) -> bool:
        """Whether the round has as many good replies as it waits for.

        Returns:
            True at federation.enough of them.
        """
        return bool(self.enough) and len(self.good) >= self.enough

    def leave_out(self, steps: Mapping[str, int], most: float) -> None:
        """Leave out good replies whose change is out of all proportion to the others'.

        Args:
            steps: by client name the steps that were asked of it.
            most: federation.largest-change.
        """
        norms = {name: r.norms for name, r in self.good.items()}
        for name, why in caution.outliers(norms, steps, most).items():
            del self.good[name]
            self.asked.replies.drop(name)
            self.bad[name] = why
            text = f"round {self.round}: {name} is left out: {why}"
            self.events.emit(ev.Warned(text=text))

    def judge(self, node: Node, reply: Envelope | Failure) -> None:
        """Take a reply through the chain, and say what became of it.

        Args:
            node: the client it came from.
            reply: what came, or why nothing did.
        """
        seconds = time.perf_counter() - self._started
        status, fields = self._judge(node, reply)
        self.events.emit(
            ev.Reply(round=self.round, client=node.name, status=status, seconds=seconds, **fields)
        )

    def _judge(self, node: Node, reply: Envelope | Failure) -> tuple[str, dict[str, Any]]:
        """The reply's status and the fields of its event."""
        if isinstance(reply, Failure):
            if reply.late and self.enough and len(self.good) >= self.enough:
                return "late", {}
            if self.narrower(node, reply):
                return "error", {"reason": printable(reply.reason)}
            self.bad[node.name] = reason = printable(reply.reason)
            return "error", {"reason": reason}
        try:
            hand = receive(node, reply, self.asked)
        except ReplyError as error:
            if self.narrower(node, error):
                return "refused", {"reason": printable(error)}
            if self.refused(node, error):
                return "need", {}
            return "refused", {"reason": self.bad[node.name]}
        message = hand.message
        assert message is not None
        self.good[node.name] = Good(
            message.examples, math.nan if message.private else message.loss, message.seconds,
            time.perf_counter() - self._started,
            message.validation_rows, message.validation_sums, hand.norms, hand.counts,
            self.state.given.get(node.name, Given()).width,
        )  # fmt: skip
        self.state.have[node.name] = (message.digest,)
        if self.matching:
            self.matching.kept(node.name, self.state)
        rows = message.validation_rows
        held_out = {
            "validation_rows": rows,
            "validation_value": self.asked.want.task.score(message.validation_sums).value,
        }
        return "ok", {
            "examples": message.examples, "steps": message.steps,
            "loss": None if message.private else message.loss,
            "train_seconds": message.seconds, "timings": message.timings,
            **(held_out if rows else {}),
            "width": self.good[node.name].width,
        }  # fmt: skip
