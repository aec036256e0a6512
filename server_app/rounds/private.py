"""Client-level differential privacy of a federation's rounds: who is drawn, what is let out.

The server is trusted with the replies. What the noise covers is what leaves it: the adapters that
clients are sent, and the product. Losses and the like in the run's own log are exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from fedpft_core.aggregation import Replies
from fedpft_core.config import Config
from fedpft_core.config.privacy import count_noise
from fedpft_core.errors import RunError, UserError
from fedpft_core.privacy import entropy
from fedpft_core.privacy.accounting import Spend, epsilon, needed_noise
from fedpft_core.privacy.release import Mechanism, release
from fedpft_core.secure.ring import sensitivity
from fedpft_core.tensors import Tensors
from server_app.rounds.nodes import Node
from server_app.run import schema as ev
from server_app.state import Events, State


class ClientPrivacy:
    """Sampling, noise and budget of one federation."""

    def __init__(
        self, config: Config, events: Events, source: entropy.Source | None = None
    ) -> None:
        self.config = config
        self.events = events
        self.source = source or os.urandom
        self.settings = config.privacy

    def plan(self) -> None:
        """Refuse a run whose rounds would spend more than privacy.epsilon.

        Raises:
            UserError: with what they would spend, and the noise that would do.
        """
        p, f = self.settings, self.config.federation
        spend = self._spend(f.clients)
        if not p.epsilon:
            return
        found = epsilon([spend] * f.rounds, p.delta).value
        if found > p.epsilon:
            enough = needed_noise(spend, f.rounds, p.epsilon, p.delta)
            raise UserError(
                f"privacy.epsilon = {p.epsilon:g}: federation.rounds = {f.rounds} with "
                f"privacy.client-noise = {p.client_noise:g} would spend {found:.3g}; "
                f"{enough:g} would do."
            )

    def sample(self, nodes: Sequence[Node]) -> list[Node]:
        """Draw a round's clients, unpredictably: nobody must know who is in it.

        Args:
            nodes: the connected nodes, in the order of their names.

        Returns:
            Some of them, in the same order; with Poisson sampling there may be none.
        """
        f = self.config.federation
        if self.settings.sampling == "poisson":
            rate = f.clients_per_round / f.clients
            return [nodes[i] for i in entropy.tossed(len(nodes), rate, self.source)]
        size = min(f.clients_per_round, len(nodes))
        return [nodes[i] for i in entropy.chosen(len(nodes), size, self.source)]

    def needed(self, drawn: Sequence[Node]) -> int:
        """Good replies without which a round is tried again.

        A Poisson sample counts however small it is: drawing until it is large enough would not be
        Poisson sampling.

        Args:
            drawn: the round's clients.

        Returns:
            federation.min-clients, or with Poisson sampling the size of a smaller sample.
        """
        least = self.config.federation.min_clients
        return min(least, len(drawn)) if self.settings.sampling == "poisson" else least

    def afford(self, state: State, connected: int, count_rule: str) -> None:
        """Stop a run whose next round would pass privacy.epsilon.

        Args:
            state: knows what has been spent.
            connected: nodes that the round's clients are drawn from.
            count_rule: as the round asks clients to count; must be empty.

        Raises:
            RunError: with what has been spent so far; or counts are asked for, which have no noise.
        """
        p = self.settings
        if count_rule:
            raise RunError("clients' counts of inactive neurons would leave without noise")
        if not p.epsilon:
            return
        past = [Spend.from_raw(s) for s in state.spent]
        if epsilon([*past, self._spend(connected)], p.delta).value > p.epsilon:
            raise RunError(
                f"another round would pass privacy.epsilon = {p.epsilon:g}: {len(past)} rounds "
                f"have spent {epsilon(past, p.delta).value:.3g} at delta = {p.delta:g}"
            )

    def combine(
        self, state: State, start: Tensors, round: int, connected: int
    ) -> Callable[[Replies], Tensors]:
        """How a round's replies become the next adapter.

        Args:
            state: what the round spends, and the next bound, are noted in it.
            start: the adapter that clients were sent, as they decoded it.
            round: its number.
            connected: nodes that its clients were drawn from.

        Returns:
            A function of the replies; when it is called, the round has been spent.
        """

        def made(replies: Replies) -> Tensors:
            p, f = self.settings, self.config.federation
            bound = state.bound or p.client_clip
            drawn = f.clients_per_round
            if p.sampling == "fixed":
                drawn = min(drawn, connected)
            mechanism = Mechanism(
                p.client_noise, bound, p.clip_quantile, p.clip_rate, count_noise(self.config)
            )
            adapters = (adapter for adapter, _ in replies)
            out = release(adapters, start, drawn, mechanism, self.source)
            state.bound = out.bound
            self.book(state, round, self._spend(connected), bound)
            return out.adapter

        return made

    def book(self, state: State, round: int, spend: Spend, bound: float) -> None:
        """Note what a round has spent, and say what all of them have.

        Args:
            state: it is noted in it.
            round: the round's number.
            spend: the round's release.
            bound: norm to which its changes were scaled down.
        """
        p = self.settings
        state.spent.append(spend.as_raw())
        found = epsilon([Spend.from_raw(s) for s in state.spent], p.delta)
        self.events.emit(ev.PrivacySpent(
            round=round, epsilon=found.value, rdp=found.rdp, pld=found.pld, delta=p.delta,
            target=p.epsilon or None, noise=p.client_noise, bound=bound, sampling=p.sampling,
        ))  # fmt: skip

    def masked(self, values: int) -> Spend:
        """A release of secure aggregation, to which every client adds its part of the noise.

        Args:
            values: n, the numbers that are summed; 1 gives all but the last digits.

        Returns:
            The release, with no regard to sampling.
        """
        p = self.settings
        steps = sensitivity(p.client_clip, p.secure_bits, p.secure_range, values)
        return Spend(p.client_noise, steps=steps)

    def _spend(self, connected: int) -> Spend:
        p, f = self.settings, self.config.federation
        if p.secure:
            return self.masked(1)
        if p.sampling == "poisson":
            return Spend(p.client_noise, rate=f.clients_per_round / f.clients)
        return Spend(p.client_noise, sample=min(f.clients_per_round, connected), members=connected)
