"""Class statistics as the numbers that a session of secure aggregation sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fedpft_core.config import Config, FederationConfig
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.head.fixed import Fixed
from fedpft_core.head.form import Sums
from fedpft_core.secure import ring
from fedpft_core.tensors import Tensors
from fedpft_core.wire.messages import SecureStatisticsReply
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import ExpectedStatistics
from server_app.rounds.nodes import Node
from server_app.rounds.outcome import Good
from server_app.rounds.requests import Request
from server_app.rounds.secure import Masked, Summed
from server_app.rounds.statistics import statistics_requests
from server_app.state import State


class MaskedStatistics(Masked):
    """The sums over the rows of each client, of which the server learns those over all of them.

    `parcel` gives a state's package as it travels, `sent` is the adapter whose features are wanted,
    in the wire's format. Replies are no events: statistics are no round, and one warning names who
    is left out.
    """

    kind = SecureStatisticsReply
    bits = ring.WIDEST

    def __init__(
        self,
        config: Config,
        nodes: Sequence[Node],
        state: State,
        want: ExpectedStatistics,
        parcel: Callable[[State], Parcel],
        sent: Tensors,
    ) -> None:
        self.config, self.state, self.want = config, state, want
        self.parcel, self.adapter = parcel, sent
        # Clients are told this number: how many rows the largest of them has is not theirs to know.
        rows = 1 << (max((n.examples for n in nodes), default=1) - 1).bit_length()
        self.fixed = Fixed(
            want.form, want.width, self.bits, max(len(nodes), 1), rows, want.most, want.longest,
            want.label,
        )  # fmt: skip
        try:
            _ = self.fixed.steps
        except ValueError as error:
            raise RunError(
                f"class statistics cannot be summed with privacy.secure ({error}): give the server "
                "labelled rows (data.validation), or set head.start = zero, head.end = trained and "
                "plug.method = refit"
            ) from error
        self.count = self.fixed.count

    def request(self, name: str, session: str, alive: tuple[int, ...]) -> Request:
        """The message to one client; see `Masked`.

        Args:
            name: the client's.
            session: names the session.
            alive: its neighbours that have shared their secrets.

        Returns:
            A function from what the client has to the message.
        """
        view, fixed = self.state.of(name), self.fixed
        return statistics_requests(
            self.config, view, self.parcel(view), self.adapter, self.want.head,
            session=session, modulus_bits=fixed.bits, clients=fixed.clients, rows=fixed.rows,
            longest=fixed.longest, label=fixed.label, alive=alive,
        )  # fmt: skip

    def sent(
        self, node: Node, reply: SecureStatisticsReply, arrived: float
    ) -> tuple[Mapping[str, Tensor], Good]:
        """Hold a reply against what was asked for; see `Masked`.

        Args:
            node: the client it came from.
            reply: what came.
            arrived: seconds since the clients were asked.

        Returns:
            The masked sums, and the reply's figures.

        Raises:
            ReplyError: seconds cannot be.
        """
        if not 0 <= reply.seconds < 2**32:
            raise ReplyError("seconds is not a finite number of at least 0")
        return reply.statistics, Good(node.examples, 0.0, reply.seconds, arrived)


class Total:
    """What a session over class statistics has come to; as `Gathered`."""

    def __init__(self, work: MaskedStatistics, got: Summed) -> None:
        self.want, self.fixed = work.want, work.fixed
        self.good, self.bad, self.found = got.good, got.bad, got.total

    @property
    def rows(self) -> dict[str, int]:
        """Rows that each client has announced, by name."""
        return {name: g.examples for name, g in self.good.items()}

    def total(self, f: FederationConfig) -> dict[str, Sums]:
        """The statistics of all rows together.

        Args:
            f: not looked at: nobody can shorten one client's part of a sum.

        Returns:
            Under the name of the one width the sum over all good replies.

        Raises:
            RunError: no rows can have that sum. It is not asked for again: the sums over two sets
                of clients tell of those who are in one of them only.
        """
        assert self.found is not None
        want = self.want
        try:
            found: Sums = want.form.read(self.fixed.restore(self.found), want.width)
            want.form.check(found, sum(self.rows.values()), want.longest, want.most)
        except ReplyError as error:
            text = f"class statistics: the sum over all clients is refused ({error})"
            raise RunError(text) from error
        return {"": found}
