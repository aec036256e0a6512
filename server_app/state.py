"""All that changes over a run, and where a run says what it does."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

from fedpft_core.tensors import Tensors
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.package import Package, Patch
from server_app.run.schema import Event


class Events(Protocol):
    """Where events go; an `EventLog`, or one that marks each event."""

    def emit(self, event: Event) -> None:
        """Take one event.

        Args:
            event: what happened.
        """
        ...


@dataclass(frozen=True)
class Flight:
    """A client at work in the async schedule, as far as a checkpoint keeps it.

    Attributes:
        client: its name.
        version: merges done when it was asked.
        due: when it is done by the simulated clock, seconds.
    """

    client: str
    version: int
    due: float


@dataclass(frozen=True)
class Best:
    """The round whose adapter did best on the server's validation rows, and that adapter."""

    round: int
    value: float
    adapter: Tensors


@dataclass
class State:
    """All that changes over a run; `round` rounds are done."""

    round: int
    adapter: Tensors
    package: Package
    digests: dict[str, str]  # sha256 of each tensor in the package
    digest: str
    patches: list[Patch] = field(default_factory=list)
    have: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by client name
    memory: Tensors = field(default_factory=dict)  # of the server's optimiser
    # In the async schedule: who is at work, on adapters of which versions, and what time it is.
    flights: list[Flight] = field(default_factory=list)
    bases: dict[int, Tensors] = field(default_factory=dict)
    clock: float = 0.0
    # Under this name clients keep what must outlive a message; another run never sees it.
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    # What the rounds have spent of the privacy budget; the bound of the next, 0 = as configured.
    spent: list[list[float]] = field(default_factory=list)
    bound: float = 0.0
    # With federation.early-stopping.
    best: Best | None = None


def fresh_state(start: Tensors, package: Package) -> State:
    """The state before round 1, with the proxy as packed.

    Args:
        start: the adapter to start from, which is copied.
        package: the proxy as clients get it.

    Returns:
        A state that no client has been served from, under a new random name of the run.
    """
    digests = {k: tensor_digest(t) for k, t in package.weights.items()}
    adapter = {k: t.clone() for k, t in start.items()}
    return State(0, adapter, package, digests, package.digest())
