"""A round's changes, losses and counts as the numbers that a session of secure aggregation sums."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpft_core.config import Config
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.secure import digits, ring
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire.messages import SecureTrainReply
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import checked_counts
from server_app.rounds.nodes import Node
from server_app.rounds.outcome import Good, Outcome, training_wall
from server_app.rounds.requests import Request, expected, secure_request
from server_app.rounds.secure import Masked, Summed
from server_app.run import schema as ev
from server_app.state import Events, State


@dataclass
class Sum:
    """What a round has come to; without `change` it has failed, and `bad` says who with."""

    start: Tensors  # the adapter that clients were sent, as they decoded it
    bad: dict[str, str]
    good: dict[str, Good] = field(default_factory=dict)
    change: Tensors | None = None  # the mean, float64
    loss: float = 0.0
    counts: Counts | None = None  # of inactive neurons, over all clients' tokens

    def outcome(self, began: float) -> Outcome:
        """The finished round.

        Args:
            began: when the round began, `time.perf_counter()`.

        Returns:
            The next adapter and the round's figures.
        """
        assert self.change is not None
        now = time.perf_counter()
        good = [self.good[name] for name in sorted(self.good)]
        return Outcome(
            adapter={k: (t.double() + self.change[k]).float() for k, t in self.start.items()},
            before=self.start,
            counts=self.counts,
            loss=self.loss,
            examples=sum(r.examples for r in good),
            good=len(good),
            bad=len(self.bad),
            train_seconds=sum(r.seconds for r in good),
            busy_seconds=training_wall(good),
            seconds=now - began,
        )


class Changes(Masked):
    """The changes of an adapter that clients train in a round, their mean losses, and counts.

    `count_rule` says how clients are to count inactive neurons; empty = not at all. `parcel` gives
    a state's package as it travels, `sent` is the adapter to start from in the wire's format,
    `base` the same as clients decode it, float32.
    """

    kind = SecureTrainReply

    def __init__(
        self,
        config: Config,
        nodes: Sequence[Node],
        state: State,
        round: int,
        events: Events,
        count_rule: str,
        parcel: Callable[[State], Parcel],
        sent: Tensors,
        base: Tensors,
    ) -> None:
        p = config.privacy
        self.config, self.state, self.round, self.events = config, state, round, events
        self.parcel, self.adapter, self.base = parcel, sent, base
        self.values = sum(t.numel() for t in base.values())
        # As `expected` has it for counts that are not masked.
        self.want = expected(config, state, round, base, count_rule)
        self.count_rule = count_rule
        self.counted = {f"{b}": k for b, k in self.want.count_blocks.items()}
        self.counted |= {f"{b}/tokens": 1 for b in self.want.count_blocks}
        tokens = max((n.examples for n in nodes), default=1) * self.want.tokens_per_row
        self.digits = digits.needed(tokens, p.secure_bits) if count_rule else 0
        # After the changes the loss, then the counts.
        self.count = self.values + 1 + self.digits * sum(self.counted.values())
        self.variance = 0.0  # of each client's noise: min-clients of them have all of it
        if p.client_noise:
            most = ring.sensitivity(p.client_clip, p.secure_bits, p.secure_range, self.count)
            self.variance = (p.client_noise * most) ** 2 / config.federation.min_clients
        self.bits = ring.width(p.secure_bits, len(nodes), math.sqrt(len(nodes) * self.variance))
        if self.bits > ring.MOST_BITS:
            raise RunError(
                f"the sum of a round needs {self.bits} bits: lower privacy.secure-bits or "
                "privacy.client-noise, or raise privacy.secure-range"
            )

    def request(self, name: str, session: str, alive: tuple[int, ...]) -> Request:
        """The message to one client; see `Masked`.

        Args:
            name: the client's.
            session: names the session.
            alive: its neighbours that have shared their secrets.

        Returns:
            A function from what the client has to the message.
        """
        p, view = self.config.privacy, self.state.of(name)
        return secure_request(
            self.config, view, self.parcel(view), self.round, self.adapter, session=session,
            alive=alive, bits=p.secure_bits, reach=p.secure_range, modulus_bits=self.bits,
            variance=self.variance, longest=p.client_clip if p.client_noise else 0.0,
            count_rule=self.count_rule, digits=self.digits,
        )  # fmt: skip

    def sent(
        self, node: Node, reply: SecureTrainReply, arrived: float
    ) -> tuple[Mapping[str, Tensor], Good]:
        """Hold a reply against what was asked for; see `Masked`.

        Args:
            node: the client it came from.
            reply: what came.
            arrived: seconds since the clients were asked.

        Returns:
            The masked change, and the reply's figures.

        Raises:
            ReplyError: steps or seconds cannot be.
        """
        if reply.steps < 1 or not 0 <= reply.seconds < 2**32:
            raise ReplyError("steps or seconds are not positive, finite numbers")
        return reply.adapter, Good(node.examples, 0.0, reply.seconds, arrived)

    def took(self, node: Node, reply: SecureTrainReply, good: Good) -> None:
        """Note a reply; see `Masked`.

        Args:
            node: the client it came from.
            reply: what it sent.
            good: the reply's figures.
        """
        self.events.emit(ev.Reply(
            round=self.round, client=node.name, status="ok", seconds=good.arrived,
            examples=node.examples, steps=reply.steps, train_seconds=reply.seconds,
        ))  # fmt: skip

    def lost(self, name: str, why: str) -> None:
        """Note a client that is left out; see `Masked`.

        Args:
            name: the client's.
            why: what it said, or did not.
        """
        self.events.emit(ev.Reply(
            round=self.round, client=name, status="refused", seconds=0.0, reason=why,
        ))  # fmt: skip

    def mean(self, got: Summed) -> Sum:
        """What a session's sum stands for.

        Args:
            got: of the session.

        Returns:
            The mean change and loss; without them where the session has failed.
        """
        if got.total is None:
            return Sum(self.base, got.bad, got.good)
        p, clients = self.config.privacy, len(got.good)
        values, rest = got.total[: self.values], got.total[self.values :]
        change = ring.restore(values, p.secure_bits, p.secure_range, self.base, clients)
        step = ring.LOSS_REACH / ring.largest(p.secure_bits)
        loss = math.nan if p.client_noise else float(rest[0]) * step / clients
        return Sum(
            self.base, got.bad, dict(got.good), change, loss, self._counts(rest[1:], got.good)
        )

    def _counts(self, total: np.ndarray, good: Mapping[str, Good]) -> Counts | None:
        """The counts of all clients together, if such can be; it is said where they cannot."""
        if not self.counted:
            return None
        joined = torch.from_numpy(
            digits.joined(total, self.digits, self.config.privacy.secure_bits)
        )
        names = sorted(self.counted)
        parts = dict(zip(names, joined.split([self.counted[n] for n in names]), strict=True))
        examples = sum(r.examples for r in good.values())
        try:
            return checked_counts(parts, examples, self.want)
        except ReplyError as error:
            text = f"round {self.round}: the sum of all counts is not used ({error})"
            self.events.emit(ev.Warned(text=text))
            return None
