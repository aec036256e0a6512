"""One exchange in which every client sends the class statistics of its rows."""

from __future__ import annotations

from collections.abc import Sequence

from fedpft_core.config import Config, FederationConfig
from fedpft_core.errors import ReplyError
from fedpft_core.head.form import Sums
from fedpft_core.head.statistics import add
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure, StatisticsReply, StatisticsRequest
from fedpft_core.wire.package import Patch
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import ExpectedStatistics, validate_statistics
from server_app.rounds import caution
from server_app.rounds.chain import opened
from server_app.rounds.collect import Awaited
from server_app.rounds.ledger import printable
from server_app.rounds.nodes import Node
from server_app.rounds.requests import Request, by_need
from server_app.state import Events, State


class Gathered(Awaited):
    """The clients' statistics as they come in, and the reasons of those that were refused.

    They are added at the end, in the order of the names, so that the sums are the same to the bit
    whatever order they came in.
    """

    def __init__(
        self, want: ExpectedStatistics, nodes: Sequence[Node], state: State, events: Events
    ) -> None:
        super().__init__(nodes, state, want.round, events)
        self.want = want
        self.good: dict[str, Sums] = {}  # by client name

    def judge(self, node: Node, reply: Envelope | Failure) -> None:
        """Keep the statistics of a reply, or why there are none."""
        if isinstance(reply, Failure):
            self.bad[node.name] = printable(reply.reason)
            return
        try:
            message = opened(reply, self.want.max_bytes, StatisticsReply)
            self.good[node.name] = validate_statistics(message, self.want, node.name, node.examples)
        except ReplyError as error:
            self.refused(node, error)
            return
        self.state.have[node.name] = (self.state.digest,)

    def total(self, f: FederationConfig) -> Sums:
        """The statistics of all rows together.

        Args:
            f: says what a client weighs.

        Returns:
            The sum over all good replies, each shortened to what it weighs.

        Raises:
            ValueError: there is no good reply.
        """
        found = [self.good[name] for name in sorted(self.good)]
        parts = caution.scales([s.rows for s in found], f)
        return add(s.part(part) for s, part in zip(found, parts, strict=True))


def statistics_requests(config: Config, state: State, parcel: Parcel, adapter: Tensors) -> Request:
    """A function from what a client has to the message it gets.

    Args:
        config: the run's configuration.
        state: where the run stands.
        parcel: the state's package as it travels.
        adapter: the adapter whose features are wanted, in the wire's format.

    Returns:
        The function; see `by_need`.
    """

    def make(package: bytes, patches: tuple[Patch, ...]) -> StatisticsRequest:
        return StatisticsRequest(
            round=state.round,
            digest=state.digest,
            adapter=adapter,
            fmt=config.wire.adapter,
            seed=config.run.seed,
            width=config.head.max_features,
            batch_size=4 * config.train.batch_size,
            threads=config.train.threads,
            package=package,
            patches=patches,
        )

    return by_need(config, state, parcel, make)


__all__ = ["Gathered", "statistics_requests"]
