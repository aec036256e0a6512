"""Work under way in the async schedule: who trains on which version, and when it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedpft_core.config import Config
from fedpft_core.seeds import numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import steps_of
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure
from server_app.rounds.chain import Asked
from server_app.rounds.collect import Collection
from server_app.rounds.nodes import Node
from server_app.rounds.requests import local_settings
from server_app.state import Events, Flight, State
from server_app.strategy import Prepared


@dataclass
class Aloft:
    """A client at work.

    Attributes:
        node: the client.
        work: what it was asked, and what its reply is held against.
        version: merges done when it was asked.
        due: when it is done by the simulated clock, seconds.
        sent: when its message was sent, by the mailbox's clock.
        reply: what came, where that has to wait for its turn.
    """

    node: Node
    work: Prepared
    version: int
    due: float
    sent: float
    reply: Envelope | Failure | None = None

    def kept(self) -> Flight:
        """What a checkpoint keeps of it.

        Returns:
            The client's name, the version and the moment.
        """
        return Flight(self.node.name, self.version, self.due)


def duration(config: Config, node: Node) -> float:
    """How long a client takes by the simulated clock, which has nothing to do with real time.

    Args:
        config: federation.speed-spread is the spread of the clients' speeds (log-normal).
        node: its name and the run's seed decide its speed.

    Returns:
        Seconds: those of a client of average speed are its local steps.
    """
    steps = steps_of(node.examples, local_settings(config, round=1))  # as many in every round
    z = numpy_stream(config.run.seed, "speed", node.name).normal()
    return float(steps * math.exp(config.federation.speed_spread * z))


def weight(staleness: int, exponent: float) -> float:
    """What a stale change is scaled by, (1 + staleness)^-exponent.

    Source: FedBuff, arXiv:2106.06639, section 5.

    Args:
        staleness: merges made since the client was asked.
        exponent: federation.staleness-exponent.

    Returns:
        The factor, 1 where nothing was merged meanwhile.
    """
    return float((1 + staleness) ** -exponent)


def rebased(
    adapter: Tensors, base: Mapping[str, Tensor], now: Mapping[str, Tensor], scale: float
) -> Tensors:
    """A reply as if it had started from the present version: its change, scaled, on top of that.

    Args:
        adapter: what the client made of `base`, float32.
        base: what it started from.
        now: the present version.
        scale: the factor of the change.

    Returns:
        Float32 tensors. Where the client started from the present version nothing is changed.
    """
    if base is now:
        return adapter
    return {k: now[k] + scale * (t - base[k]) for k, t in adapter.items()}


class Buffer(Collection):
    """The replies of one version; each is held against what that client was asked.

    Args:
        asked: of the version under way.
        exponent: federation.staleness-exponent.
        state: has the digest of the sub-FM.
        round: the version's number, from 1.
        events: the run's log.
    """

    def __init__(
        self, asked: Asked, exponent: float, state: State, round: int, events: Events
    ) -> None:
        super().__init__(asked, [], state, round, events)
        self.exponent = exponent
        self.aloft: dict[int, Aloft] = {}

    def take(self, flight: Aloft) -> None:
        """Judge the reply of a client.

        Args:
            flight: with its reply.
        """
        assert flight.reply is not None
        self.aloft[flight.node.id] = flight
        self.nodes[flight.node.id] = flight.node
        self.on_reply(flight.node.id, flight.reply)

    def _judge(self, node: Node, reply: Envelope | Failure) -> tuple[str, dict[str, Any]]:
        flight, mine = self.aloft[node.id], self.asked
        stale = self.round - 1 - flight.version
        want, now, scale = flight.work.want, mine.want.adapter, weight(stale, self.exponent)
        self.asked = replace(
            mine,
            want=want,
            own=flight.work.own,
            rebase=lambda adapter: rebased(adapter, want.adapter, now, scale),
        )
        try:
            status, fields = super()._judge(node, reply)
        finally:
            self.asked = mine
        if status != "ok":
            return status, fields
        if stale:
            # What it found on the rows it keeps from training is of another adapter.
            good = self.good[node.name]
            self.good[node.name] = replace(good, validation_rows=0, validation_sums={})
        return status, fields | {"staleness": stale}


__all__ = ["Aloft", "Buffer", "duration", "rebased", "weight"]
