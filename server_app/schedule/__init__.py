"""Schedules: in which order clients are asked and their replies merged, one file a schedule."""

from __future__ import annotations

from collections.abc import Callable

from fedpft_core.aggregation import grows
from fedpft_core.align import selection
from fedpft_core.config import Config
from fedpft_core.errors import UserError
from server_app.schedule import continuous, multi_round, one_shot
from server_app.schedule.session import Session

Afterwards = Callable[[], None]

SCHEDULES: dict[str, Callable[[Session], Afterwards]] = {
    "multi-round": multi_round.federate,
    "one-shot": one_shot.federate,
    "async": continuous.federate,
}
"""What federates, by `federation.schedule`."""


def federate(session: Session) -> Afterwards:
    """Run the federation by `federation.schedule`, from where its state stands to its end.

    Args:
        session: the state is brought to the end of the last round.

    Returns:
        What is to be called once the product is written: it books replies that came too late.

    Raises:
        RunError: too few replies are good, or the run is to stop early.
        UserError: a setting cannot be used with the rows there are.
    """
    return SCHEDULES[session.bench.config.federation.schedule](session)


def check(config: Config) -> None:
    """Refuse a rule of aggregation that does not suit the schedule.

    Args:
        config: the run's configuration.

    Raises:
        UserError: naming both keys.
    """
    f = config.federation
    if f.schedule != "one-shot" and grows(f.aggregate):
        raise UserError(
            f"federation.aggregate = {f.aggregate} makes an adapter of another rank than clients "
            f"train, which federation.schedule = {f.schedule} goes on from: use it with one-shot."
        )
    if f.server_optimiser != "none" and grows(f.aggregate):
        raise UserError(
            f"federation.server-optimiser = {f.server_optimiser} makes a step from the adapter "
            f"sent, and federation.aggregate = {f.aggregate} makes one of another rank."
        )
    a = config.align
    aligns = 0 < a.interval < f.rounds
    if f.schedule == "async" and aligns and selection.needs_counts(a.selection, a.proportion):
        raise UserError(
            f"federation.schedule = async has no counts of one round, which align.selection = "
            f"{a.selection} with align.proportion = {a.proportion:g} needs: set align.proportion = "
            f"1, another align.selection, or align.interval = 0."
        )
