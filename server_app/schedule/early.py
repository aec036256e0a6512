"""Early stopping: rounds end when the sub-FM gets no better on the server's validation rows."""

from __future__ import annotations

import math

from fedpft_core.errors import UserError
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.phases import plug, score
from server_app.run import schema as ev
from server_app.schedule.session import Session
from server_app.state import Best, State


def check(bench: Bench) -> None:
    """Refuse early stopping where nothing can be checked.

    Args:
        bench: its configuration and validation rows.

    Raises:
        UserError: federation.early-stopping is set and the server has no validation rows.
    """
    if bench.config.federation.early_stopping and not len(bench.rows.data.validation):
        raise UserError(
            "federation.early-stopping scores the sub-FM on the server's validation rows, and "
            "there are none: set data.validation or data.validation-share."
        )


def note(session: Session) -> None:
    """Score the sub-FM on validation rows, where that is due, and keep the best adapter.

    Between equal scores the earlier adapter is kept.

    Args:
        session: after a round; its state's best may become that round's adapter.
    """
    bench, state = session.bench, session.state
    f = bench.config.federation
    if not f.early_stopping or (state.round % f.check_every and state.round != f.rounds):
        return
    task = bench.rows.task
    found = evaluate(
        bench.models.proxy, task, bench.rows.validation, bench.config.run.eval_batch_size
    )
    best = state.best
    # A score that is no number, of a model that diverged, is better than none only.
    better = best is None or (
        not math.isnan(found.value)
        and (math.isnan(best.value) or task.metric.better(found.value, best.value))
    )
    if better:
        adapter = {name: tensor.clone() for name, tensor in state.adapter.items()}
        state.best = Best(state.round, found.value, adapter)
    session.events.emit(ev.Check(
        round=state.round, **found.fields(), seconds=found.seconds,
        best=state.best.round if state.best else state.round,
    ))  # fmt: skip


def stale(bench: Bench, state: State) -> bool:
    """Whether so many rounds brought nothing better that training ends.

    Args:
        bench: federation.early-stopping counts.
        state: after a round, with the best adapter so far.

    Returns:
        Whether it does.
    """
    most = bench.config.federation.early_stopping
    return bool(most and state.best and state.round - state.best.round >= most)


def settle(session: Session) -> None:
    """Go back to the adapter of the best round, and score it where the plug-in does not.

    Args:
        session: after the last round; its state gets the best adapter.
    """
    bench, state = session.bench, session.state
    if not bench.config.federation.early_stopping or state.best is None:
        return
    state.adapter = {name: tensor.clone() for name, tensor in state.best.adapter.items()}
    bench.models.plug(state.adapter)
    session.events.emit(ev.Stopped(
        round=state.round, rounds=bench.config.federation.rounds, best=state.best.round
    ))  # fmt: skip
    if not plug.settles(bench):
        score.score_all(bench, state.round)


__all__ = ["check", "note", "settle", "stale"]
