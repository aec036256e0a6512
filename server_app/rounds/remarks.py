"""What a round's replies give reason to say: warnings, each once, and the clients' own scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpft_core.aggregation import withstands
from fedpft_core.config import FederationConfig
from fedpft_core.task import Task
from server_app.rounds import caution
from server_app.rounds.outcome import Good
from server_app.run import schema as ev
from server_app.state import Events


class Remarks:
    """The remarks on the rounds of one federation.

    Args:
        settings: what the warnings are held against.
        events: where they are said.
    """

    def __init__(self, settings: FederationConfig, events: Events) -> None:
        self.settings = settings
        self.events = events
        self._said: set[str] = set()  # warnings that need no repetition

    def of_replies(self, round: int, replies: Mapping[str, Good]) -> None:
        """Warn of a client that outweighs the others, and of more attackers than a rule stands.

        Args:
            round: the round's number, from 1.
            replies: the good ones, by client name.
        """
        f, count = self.settings, len(replies)
        assumed, stood = math.ceil(f.attackers * count - 1e-9), withstands(f.aggregate, count)
        if stood is not None and assumed > stood:
            self._once(
                f"federation.aggregate = {f.aggregate} stands {stood} attackers among {count} "
                f"replies, not the {assumed} of federation.attackers = {f.attackers:g}"
            )
        self.dominating(f"round {round}", {n: r.examples for n, r in replies.items()})

    def dominating(self, what: str, claims: Mapping[str, int]) -> None:
        """Warn of a client that has more than it should.

        Args:
            what: what is shared, such as `round 3`.
            claims: rows by client name.
        """
        text = caution.dominating(what, claims, self.settings)
        if text:
            self._once(text)

    def validation(self, task: Task, round: int, replies: Mapping[str, Good]) -> None:
        """Report what clients found on rows they keep from training.

        That is of the adapter the round began with, so of the round before.

        Args:
            task: makes a score of the clients' sums.
            round: the round's number, from 1.
            replies: the good ones, by client name.
        """
        having = [replies[n] for n in sorted(replies) if replies[n].validation_rows]
        if having:
            parts = caution.scales([r.validation_rows for r in having], self.settings)
            # Exact, so that the order in which replies came in cannot change the last bit.
            total = {
                name: math.fsum(
                    r.validation_sums[name] * part for r, part in zip(having, parts, strict=True)
                )
                for name in having[0].validation_sums
            }
            fields = task.score(total).fields()
            self.events.emit(ev.ClientValidation(round=round - 1, clients=len(having), **fields))

    def _once(self, text: str) -> None:
        """Warn of what has not been said of this or another round."""
        said = text.partition(": ")[2] or text
        if said not in self._said:
            self._said.add(said)
            self.events.emit(ev.Warned(text=text))
