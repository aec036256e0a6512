"""Synchronous rounds: clients are drawn, all train, their replies are aggregated together."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedpft_core.errors import RunError
from server_app.phases import align
from server_app.phases.reporting import phase
from server_app.schedule import early, overlap
from server_app.schedule.session import Session, settle


def federate(session: Session) -> Callable[[], None]:
    """Run all rounds that are left, with a checkpoint after each.

    Args:
        session: the state is brought to the end of the last round.

    Returns:
        Nothing to do afterwards: a round's late replies are failures of that round.

    Raises:
        RunError: too few replies are good, or the run is to stop early.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    config, events = session.bench.config, session.bench.events
    rounds = config.federation.rounds
    early.check(session.bench)
    session.strategy.nodes.wait()
    last = min(rounds, config.run.stop_after or rounds)
    one = overlap.one_round if config.align.lag else one_round
    stale = early.stale(session.bench, session.state)
    while not stale and session.state.round < last:
        round = session.state.round + 1
        with phase(events, "round", round=round):
            one(session, round)
            early.note(session)
        session.save()
        stale = early.stale(session.bench, session.state)
    if last < rounds and not stale:
        raise RunError(f"stopped after round {last} as run.stop-after asks; resume to go on")
    early.settle(session)
    return lambda: None


def one_round(session: Session, round: int) -> None:
    """Clients train, the server aggregates, both models are scored, the proxy is re-aligned.

    Args:
        session: the state is brought from the end of the round before to the end of this one.
        round: the round's number, from 1.

    Raises:
        RunError: too few replies are good, or the alignment diverges.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    start = time.perf_counter()
    outcome = session.strategy.run_round(
        session.state, round, align.count_rule(session.bench, round)
    )
    settle(session, round, outcome, start)


__all__ = ["federate", "one_round"]
