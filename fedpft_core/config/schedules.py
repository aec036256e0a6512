"""What a schedule of the federation cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from fedpft_core.config.keys import Config


def check_schedule(config: Config) -> None:
    """Refuse settings that contradict federation.schedule.

    Args:
        config: a whole run.

    Raises:
        UserError: naming both keys, and what would do instead.
    """
    f, t = config.federation, config.train
    _check_lag(config)
    if f.early_stopping:
        named = f"federation.early-stopping = {f.early_stopping} ends rounds"
        if f.schedule != "multi-round" or f.aggregate == "none":
            raise UserError(
                f"{named} of the server, which federation.schedule = {f.schedule} with "
                f"federation.aggregate = {f.aggregate} has not: use multi-round and a rule that "
                "merges."
            )
        if f.check_every > f.early_stopping:
            raise UserError(
                f"{named} without a better score, which federation.check-every = {f.check_every} "
                "looks for less often."
            )
    if f.schedule == "multi-round":
        return
    here = f"federation.schedule = {f.schedule}"
    if f.aggregate == "none":
        raise UserError(f"{here} merges replies, which federation.aggregate = none does not.")
    if f.schedule == "async":
        if f.buffer and not f.min_clients <= f.buffer <= f.clients_per_round:
            raise UserError(
                f"federation.buffer = {f.buffer} is not between federation.min-clients = "
                f"{f.min_clients} and federation.clients-per-round = {f.clients_per_round}."
            )
        if config.run.undistilled:
            raise UserError(f"{here} has no side run: set run.undistilled = false.")
    if f.schedule == "one-shot":
        if f.rounds > 1:
            how = "set federation.rounds = 1"
            if t.local_steps:
                how += f", and for as many steps train.local-steps = {f.rounds * t.local_steps}"
            raise UserError(
                f"{here} asks each client once, which contradicts federation.rounds = "
                f"{f.rounds}: {how}."
            )
        if f.clients_per_round != f.clients:
            raise UserError(
                f"{here} asks every client, which contradicts federation.clients-per-round = "
                f"{f.clients_per_round} of federation.clients = {f.clients}."
            )
        if f.enough_replies and not f.min_clients <= f.enough_replies <= f.clients:
            raise UserError(
                f"federation.enough-replies = {f.enough_replies} is not between "
                f"federation.min-clients = {f.min_clients} and federation.clients = {f.clients}."
            )
        if f.score_every % f.merge_every:
            raise UserError(
                f"federation.score-every = {f.score_every} is no multiple of "
                f"federation.merge-every = {f.merge_every}."
            )


def _check_lag(config: Config) -> None:
    """Refuse align.lag where there is no next round to work beside, or that waits for the work.

    Raises:
        UserError: naming both keys.
    """
    f, lag = config.federation, config.align.lag
    if not lag:
        return
    for refused, key, why in (
        (f.schedule != "multi-round", f"federation.schedule = {f.schedule}",
         "there are no such rounds"),
        (f.early_stopping, f"federation.early-stopping = {f.early_stopping}",
         "training may end with the round before"),
        (config.head.interval, f"head.interval = {config.head.interval}",
         "clients are asked for statistics in between"),
        (config.plan.widths, f"plan.widths = {config.plan.widths}",
         "what clients have may change meanwhile"),
        (f.aggregate == "none", "federation.aggregate = none", "there is no such work"),
        (config.privacy.secure, "privacy.secure = true", "a round is four exchanges"),
    ):  # fmt: skip
        if refused:
            raise UserError(
                f"align.lag = {lag} has the server work while clients train the next round; with "
                f"{key} {why}: set align.lag = 0."
            )
