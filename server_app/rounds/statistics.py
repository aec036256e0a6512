"""One exchange in which every client sends the class statistics of its rows, without masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedpft_core.config import Config, FederationConfig
from fedpft_core.errors import ReplyError
from fedpft_core.head.form import Sums
from fedpft_core.head.statistics import add
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import (
    Failure,
    SecureStatisticsRequest,
    StatisticsReply,
    StatisticsRequest,
)
from fedpft_core.wire.package import Patch
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import ExpectedStatistics, validate_statistics
from server_app.rounds import caution
from server_app.rounds.chain import opened
from server_app.rounds.collect import Awaited
from server_app.rounds.ledger import printable
from server_app.rounds.nodes import Node
from server_app.rounds.requests import Request, by_need
from server_app.state import Events, Given, State

Guard = Callable[[Mapping[str, Mapping[str, Sums]]], Iterable[str]]
"""From the statistics of each client, by width and name, to the names of those to leave out."""


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
        self.widths: dict[str, str] = {}  # of the sub-FMs that they are of, by client name

    def want_of(self, node: Node) -> ExpectedStatistics:
        """What good statistics of one client look like.

        Args:
            node: the client.

        Returns:
            What its reply is held against.
        """
        if not self.state.others:
            return self.want
        view = self.state.of(node.name)
        widths = {v.digest: name for name, v in view.beside.items()}
        return replace(self.want, digest=view.digest, widths=widths)

    def judge(self, node: Node, reply: Envelope | Failure) -> None:
        """Keep the statistics of a reply, or why there are none.

        Args:
            node: the client it came from.
            reply: what came, or why nothing did.
        """
        if isinstance(reply, Failure):
            if self.narrower(node, reply):
                return
            self.bad[node.name] = printable(reply.reason)
            return
        try:
            message = opened(reply, self.want.max_bytes, StatisticsReply)
            want = self.want_of(node)
            self.good[node.name] = validate_statistics(message, want, node.name, node.examples)
        except ReplyError as error:
            if not self.narrower(node, error):
                self.refused(node, error)
            return
        self.state.have[node.name] = (message.digest,)
        self.widths[node.name] = self.state.given.get(node.name, Given()).width

    @property
    def rows(self) -> dict[str, int]:
        """What each client's sums are of, by name."""
        return {name: s.rows for name, s in self.good.items()}

    def parts(self, f: FederationConfig) -> dict[str, dict[str, Sums]]:
        """What each client adds to the statistics of all rows.

        Args:
            f: says what a client weighs.

        Returns:
            By width and client name, in the order of the names, its sums shortened to what it
            weighs.
        """
        names = sorted(self.good)
        shares = caution.scales([self.good[name].rows for name in names], f)
        by_width: dict[str, dict[str, Sums]] = {}
        for name, share in zip(names, shares, strict=True):
            by_width.setdefault(self.widths[name], {})[name] = self.good[name].part(share)
        return by_width

    def leave_out(self, names: Iterable[str]) -> None:
        """Go on as if some clients had not replied.

        Args:
            names: of clients whose statistics are good.
        """
        for name in names:
            del self.good[name]

    def total(self, f: FederationConfig) -> dict[str, Sums]:
        """The statistics of all rows together, of each width apart.

        Args:
            f: says what a client weighs.

        Returns:
            By width the sum over all good replies, each shortened to what it weighs.
        """
        return {width: add(found.values()) for width, found in self.parts(f).items()}


def statistics_requests(
    config: Config, state: State, parcel: Parcel, adapter: Tensors, head: Tensors,
    answer: int = 0, **secure: Any,
) -> Request:  # fmt: skip
    """A function from what a client has to the message it gets.

    Args:
        config: the run's configuration.
        state: where the run stands.
        parcel: the state's package as it travels.
        adapter: the adapter whose features are wanted, in the wire's format.
        head: at which slopes are wanted; empty = class statistics.
        answer: bytes that a good reply can have; 0 for no limit.
        **secure: what `SecureStatisticsRequest` has besides; empty = statistics without masks.

    Returns:
        The function; see `by_need`.
    """
    kind = SecureStatisticsRequest if secure else StatisticsRequest

    def make(package: bytes, patches: tuple[Patch, ...]) -> StatisticsRequest:
        return kind(
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
            head=head,
            **secure,
        )

    return by_need(config, state, parcel, make, answer)


__all__ = ["Gathered", "Guard", "statistics_requests"]
