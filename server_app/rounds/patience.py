"""How long a round waits for its replies: what was set, or what past rounds have taught."""

from __future__ import annotations

from collections.abc import Iterable

from fedpft_core.config import FederationConfig

_LEARNED = 3  # the first round whose time follows from the rounds before
_SHORTEST = 10.0  # seconds that every round waits


class Patience:
    """What is known of how long replies take.

    Args:
        settings: its round-timeout and patience decide.
    """

    def __init__(self, settings: FederationConfig) -> None:
        self.settings = settings
        self.slowest = 0.0  # seconds until the slowest good reply of all rounds so far

    def learn(self, arrived: Iterable[float]) -> None:
        """Remember how long the good replies of a round took.

        Args:
            arrived: seconds after which each came.
        """
        self.slowest = max([self.slowest, *arrived])

    def seconds(self, round: int) -> float:
        """How long a round waits.

        Args:
            round: the round's number, from 1.

        Returns:
            Seconds: federation.round-timeout at most.
        """
        f = self.settings
        if not f.patience or round < _LEARNED or not self.slowest:
            return f.round_timeout
        return min(f.round_timeout, max(_SHORTEST, f.patience * self.slowest))
