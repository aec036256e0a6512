"""Clients that connect and answer at given moments of a clock that only the script moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import tiny

from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure
from server_app.transport import LocalTransport

SETTLES = 0.5  # script seconds that pass while nothing comes


@dataclass
class Scripted:
    """A transport over the clients of a `tiny.Federation`, whose first has node id 1.

    Attributes:
        inner: does the work.
        seconds: how long each client takes to answer a training message; 1 where it is not named,
            infinity for one that never answers.
        joins: when each client connects; 0 where it is not named.
        twice: clients whose reply comes once more, one second later.
        gone: clients whose node fails instead of answering.
    """

    inner: LocalTransport
    seconds: dict[int, float] = field(default_factory=dict)
    joins: dict[int, float] = field(default_factory=dict)
    twice: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    time: float = 0.0
    asked: list[int] = field(default_factory=list)  # nodes that were sent training messages

    def nodes(self) -> list[int]:
        return [n for n in self.inner.nodes() if self.joins.get(n, 0.0) <= self.time]

    def exchange(self, *args: Any) -> None:
        self.inner.exchange(*args)

    def mailbox(self) -> Box:
        return Box(self)


@dataclass
class Box:
    """The mailbox: of the replies under way the one that is due first comes first."""

    script: Scripted
    due: list[tuple[float, int, int, Envelope]] = field(default_factory=list)
    count: int = 0

    def send(self, node: int, envelope: Envelope, timeout: float) -> None:
        seconds = 0.0
        if envelope.kind == "train":
            self.script.asked.append(node)
            seconds = self.script.seconds.get(node, 1.0)
            if node in self.script.twice:
                self._add(seconds + 1.0, node, envelope)
        self._add(seconds, node, envelope)

    def _add(self, seconds: float, node: int, envelope: Envelope) -> None:
        if math.isfinite(seconds):
            self.count += 1
            self.due.append((self.script.time + seconds, self.count, node, envelope))

    def fetch(self) -> list[tuple[int, Envelope | Failure]]:
        now = self.script.time
        first = min(self.due, key=lambda entry: entry[:2], default=None)
        if first is None or first[0] > now + SETTLES:
            self.script.time = now + SETTLES
            return []
        self.due.remove(first)
        self.script.time = max(now, first[0])
        node, envelope = first[2:]
        if node in self.script.gone and envelope.kind == "train":
            return [(node, Failure("the node is gone"))]
        return [(node, self.script.inner.ask(node, envelope))]

    def now(self) -> float:
        return self.script.time


class Clients(tiny.Federation):
    """A federation whose transport follows a script; `script` is that of the last run."""

    def __init__(self, flat: dict[str, Any], **script: Any) -> None:
        super().__init__(flat)
        self.keys = script
        self.script: Scripted

    def transport(self) -> Any:
        self.script = Scripted(super().transport(), **self.keys)
        return self.script
