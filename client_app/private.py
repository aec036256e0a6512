"""Example-level differential privacy at a node: its owner's settings, and what has been spent.

What each row has spent is counted over all rounds of all runs, in a file of the node. It is written
before training begins, so that no crash can make a round free.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from fedpft_core.disk import whole
from fedpft_core.errors import UserError
from fedpft_core.privacy.accounting import Spend, epsilon
from fedpft_core.train.private import spend_of
from fedpft_core.train.tune import LocalSettings, steps_of

log = logging.getLogger("fedpft")
_MOST_STEPS = 10**7  # of all rounds together; more are a mistake


@dataclass(frozen=True)
class ExamplePrivacy:
    """A node's settings.

    Attributes:
        noise: standard deviation of the noise on a step's summed gradients, in multiples of `clip`.
        clip: largest L2 norm of a row's gradient.
        epsilon: what may be spent in all; 0 = counted, not limited.
        delta: at which epsilon is stated.
        ledger: the file that counts.
    """

    noise: float
    clip: float
    epsilon: float
    delta: float
    ledger: Path

    def spend(self, name: str, settings: LocalSettings, rows: int) -> float:
        """Book a round before it begins.

        Args:
            name: the client's, for the log.
            settings: the round's work.
            rows: rows that the client trains on.

        Returns:
            Epsilon of everything so far, with this round.

        Raises:
            UserError: it would be more than may be spent, or the file is damaged.
            OSError: the file cannot be written.
        """
        spent = self._read()
        one = spend_of(settings, rows, self.noise)
        key = f"{one.noise!r} {one.rate!r}"
        spent[key] = spent.get(key, 0) + steps_of(rows, settings)
        if sum(spent.values()) > _MOST_STEPS:
            raise UserError(f"{self.ledger}: more than {_MOST_STEPS} steps in all.")
        found = self._epsilon(spent)
        if self.epsilon and not found <= self.epsilon:
            text = (
                f"this node's privacy budget refuses: dp-epsilon = {self.epsilon:g}, and the round "
                "would pass it"
            )
            raise UserError(text, public=text)
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        whole.write(self.ledger, json.dumps(spent).encode())
        log.info("client %s: epsilon %.3g spent at delta %g", name, found, self.delta)
        return found

    def _epsilon(self, spent: dict[str, int]) -> float:
        spends: list[Spend] = []
        for key, steps in spent.items():
            noise, rate = map(float, key.split())
            spends += [Spend(noise, rate)] * steps
        return epsilon(spends, self.delta).value

    def _read(self) -> dict[str, int]:
        """Steps so far by noise and sampling rate."""
        try:
            raw = json.loads(self.ledger.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ValueError
            for key, steps in raw.items():
                noise, rate = map(float, key.split())
                if type(steps) is not int or steps < 0 or not (noise >= 0 <= rate <= 1):
                    raise ValueError
            return raw
        except FileNotFoundError:
            return {}
        except ValueError:
            # What was spent is unknown, so nothing more may be.
            raise UserError(f"{self.ledger}: the count of what was spent is damaged.") from None


def refuse(what: str) -> UserError:
    """The error for what cannot leave a node with example-level privacy.

    Args:
        what: the thing asked for.

    Returns:
        An error that the server may read.
    """
    text = f"this node trains with example-level privacy (dp-noise) and gives no {what}"
    return UserError(text, public=text)


def check(noise: float, clip: float, limit: float, delta: float) -> str | None:
    """What is wrong with a node's settings.

    Args:
        noise: dp-noise.
        clip: dp-clip.
        limit: dp-epsilon.
        delta: dp-delta.

    Returns:
        The key and what was expected; None where all is well.
    """
    if not 0 <= noise < math.inf:
        return f"dp-noise = {noise:g} is no number of at least 0"
    if not 0 < clip < math.inf:
        return f"dp-clip = {clip:g} is no number above 0"
    if not 0 <= limit < math.inf or (limit and not noise):
        return f"dp-epsilon = {limit:g} is no number of at least 0, or lacks dp-noise above 0"
    if not 0 < delta < 0.1:
        return f"dp-delta = {delta:g} is not between 0 and 0.1"
    return None
