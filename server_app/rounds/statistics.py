"""One exchange in which every client sends the class statistics of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fedpft_core.config import Config
from fedpft_core.errors import ReplyError
from fedpft_core.head.statistics import Statistics, add
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import (
    Failure,
    NeedReply,
    RefusalReply,
    StatisticsReply,
    StatisticsRequest,
)
from fedpft_core.wire.validate import ExpectedStatistics, check_size, validate_statistics
from server_app.delivery import delivery, useful
from server_app.rounds import ledger
from server_app.rounds.ledger import printable
from server_app.rounds.nodes import Node
from server_app.state import Events, State


class Sums:
    """The clients' statistics as they come in, and the reasons of those that were refused.

    They are added at the end, in the order of the names, so that the sums are the same to the bit
    whatever order they came in.
    """

    def __init__(
        self, want: ExpectedStatistics, nodes: Sequence[Node], state: State, events: Events
    ) -> None:
        self.want = want
        self.nodes = {n.id: n for n in nodes}
        self.state = state
        self.round = want.round
        self.events = events
        self.good: dict[str, Statistics] = {}  # by client name, as is `bad`
        self.bad: dict[str, str] = {}
        self.again: dict[int, tuple[str, ...]] = {}
        self.serving_again = False
        self.seconds = 0.0  # the clients' own, summed

    def on_reply(self, node_id: int, reply: Envelope | Failure) -> None:
        """Book a reply and, unless its node is settled, judge it."""
        node = self.nodes.get(node_id)
        if node is None:
            return
        if isinstance(reply, Envelope):
            ledger.count_bytes(self.events, self.round, node.name, "up", reply)
        settled = node.name in self.good or node.name in self.bad
        if settled or (node_id in self.again and not self.serving_again):
            return
        if isinstance(reply, Failure):
            self.bad[node.name] = printable(reply.reason)
            return
        try:
            check_size(reply, self.want.max_bytes)
            message = open_envelope(reply)
            if isinstance(message, NeedReply) and not self.serving_again:
                self.again[node.id] = message.have
                self.state.have.pop(node.name, None)
                return
            if isinstance(message, RefusalReply):
                raise ReplyError(message.reason)
            if not isinstance(message, StatisticsReply):
                raise ReplyError(f"unexpected {type(message).__name__}")
            self.good[node.name] = validate_statistics(message, self.want, node.name, node.examples)
        except ReplyError as error:
            self.bad[node.name] = printable(error)
            return
        self.seconds += message.seconds
        self.state.have[node.name] = (self.state.digest,)

    def total(self) -> Statistics:
        """The statistics of all rows together; there must be a good reply."""
        return add(self.good[name] for name in sorted(self.good))


def statistics_requests(
    config: Config, state: State, package: bytes, adapter: Tensors
) -> Callable[[Iterable[str]], Envelope]:
    """A function from what a client has to the message it gets.

    Args:
        config: the run's configuration.
        state: where the run stands.
        package: the state's package as bytes.
        adapter: the adapter whose features are wanted, in the wire's format.

    Returns:
        The function; clients that need the same get the same message.
    """
    state.patches = useful(state.patches, len(package))
    made: dict[tuple[bool, int], Envelope] = {}

    def request(have: Iterable[str]) -> Envelope:
        whole, chain = delivery(tuple(have), state.digest, len(package), state.patches)
        key = (whole, len(chain))
        if key not in made:
            made[key] = seal(
                StatisticsRequest(
                    round=state.round,
                    digest=state.digest,
                    adapter=adapter,
                    fmt=config.wire.adapter,
                    seed=config.run.seed,
                    width=config.head.max_features,
                    batch_size=4 * config.train.batch_size,
                    threads=config.train.threads,
                    package=package if whole else b"",
                    patches=chain,
                )
            )
        return made[key]

    return request


def why_not(left_out: dict[int, str], bad: dict[str, str]) -> str:
    """Who did not take part, and why, in one line."""
    out = {f"node {i}": why for i, why in left_out.items()}
    return "; ".join(f"{name}: {reason}" for name, reason in sorted((out | bad).items()))


__all__ = ["Sums", "statistics_requests", "why_not"]
