"""All that changes over a run, and where a run says what it does."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
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


@dataclass(frozen=True)
class Pending:
    """The last round is still to be scored and followed by re-alignment, beside the next one.

    Attributes:
        counts: the inactivity counts of its clients, where the selection looks at them.
    """

    counts: Counts | None = None


@dataclass
class Version:
    """The sub-FM of one width, as clients get it; as the fields of a `State`."""

    package: Package
    digests: dict[str, str]
    digest: str
    patches: list[Patch] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """What a client has been given to train on.

    Attributes:
        width: the width's name; empty where there is one sub-FM.
        blocks: the blocks whose LoRA it trains, `first:n` or `last:n`; empty = all.
        most: the widest it is ever given again, after it has failed at a wider one; empty = any.
        missed: deadlines it has missed one after the other.
    """

    width: str = ""
    blocks: str = ""
    most: str = ""
    missed: int = 0


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
    # With align.lag.
    pending: Pending | None = None
    # With plan.widths: the name of the sub-FM above, the sub-FMs of the other widths, narrowest
    # first, and by client name what each has been given.
    width: str = ""
    others: dict[str, Version] = field(default_factory=dict)
    given: dict[str, Given] = field(default_factory=dict)
    # In a view of one width (`at`): the sub-FMs of all others, from which a client can come.
    beside: dict[str, Version] = field(default_factory=dict)

    @property
    def own(self) -> Version:
        """The sub-FM of this state, or of this view of it."""
        return Version(self.package, self.digests, self.digest, self.patches)

    @property
    def widths(self) -> dict[str, Version]:
        """All sub-FMs by the name of their width, narrowest first but for the FM itself."""
        full = {n: v for n, v in self.others.items() if v.package.meta.plan.is_full}
        rest = {n: v for n, v in self.others.items() if n not in full}
        return {**rest, self.width: self.own, **full}

    def at(self, width: str) -> State:
        """This state as the clients of one width see it.

        Args:
            width: the width's name.

        Returns:
            A view: what a client has, and what it has been given, is noted in both.

        Raises:
            KeyError: there is no such width.
        """
        if not self.others:
            return self
        every = self.widths
        v = every.pop(width)
        return replace(
            self, package=v.package, digests=v.digests, digest=v.digest, patches=v.patches,
            beside=every,
        )  # fmt: skip

    def of(self, client: str) -> State:
        """This state as one client sees it.

        Args:
            client: its name; one that nothing is known of has the sub-FM of this state.

        Returns:
            A view, as of :meth:`at`.
        """
        return self.at(self.given.get(client, Given()).width or self.width)


def version_of(package: Package) -> Version:
    """A sub-FM that no client has been served yet.

    Args:
        package: as clients get it.

    Returns:
        The version, without patches.
    """
    digests = {k: tensor_digest(t) for k, t in package.weights.items()}
    return Version(package, digests, package.digest())


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
