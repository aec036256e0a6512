"""Rounds after which the server works while clients train the next one (align.lag = 1)."""

from __future__ import annotations

import time
from dataclasses import replace

from server_app.phases import align
from server_app.schedule.session import Session, advance, finish, measure, realign
from server_app.state import Pending


class Work:
    """What is left to do of the last round: its scores, and re-alignment on a draft of the state.

    The state itself stays as it was while replies are judged by it: clients that are asked again
    meanwhile are served, and held to, the sub-FM that the round began with.

    Args:
        session: between two rounds, the state with work that is pending.
    """

    def __init__(self, session: Session) -> None:
        assert session.state.pending is not None
        self.session = session
        self.round = session.state.round
        self.counts = session.state.pending.counts
        self.seconds = 0.0
        self.draft = replace(session.state, digests=dict(session.state.digests), patches=[])

    def __call__(self) -> None:
        """Do the work.

        Raises:
            RunError: the alignment diverges.
            UserError: align.threshold compares gradients and there are no validation rows.
        """
        start = time.perf_counter()
        values, _ = measure(self.session, self.round)
        realign(self.session, self.draft, self.round, self.counts, values)
        self.seconds = time.perf_counter() - start

    def merge(self) -> None:
        """Take what the work came to over into the state, for the round to come."""
        state, draft = self.session.state, self.draft
        state.package, state.digests, state.digest = draft.package, draft.digests, draft.digest
        state.patches = [*state.patches, *draft.patches]


def one_round(session: Session, round: int) -> None:
    """Clients train while the server works on the round before; then their replies are aggregated.

    The last round's own scores are made at its end.

    Args:
        session: the state is brought from the end of the round before to the end of this one,
            whose own work is then pending.
        round: the round's number, from 1.

    Raises:
        RunError: too few replies are good, or the alignment diverges.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    start = time.perf_counter()
    bench, state = session.bench, session.state
    work = Work(session) if state.pending else None
    outcome = session.strategy.run_round(state, round, align.count_rule(bench, round), work)
    if work:
        work.merge()
    advance(session, round, outcome)
    last = round == bench.config.federation.rounds
    state.pending = None if last else Pending(outcome.counts)
    scored = measure(session, round)[1] if last else 0.0
    finish(session, round, outcome, start, scored, work.seconds if work else 0.0)


__all__ = ["Work", "one_round"]
