"""The server's own update: what its validation rows make of a round's adapter."""

from __future__ import annotations

from collections.abc import Callable

from fedpft_core import aggregation
from fedpft_core.adapter import lora as adapters
from fedpft_core.errors import UserError
from fedpft_core.seeds import derive
from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import fine_tune
from server_app.bench import Bench
from server_app.rounds.requests import local_settings


def update_of(bench: Bench) -> Callable[[Tensors, int], Tensors] | None:
    """How the server makes an update of its own, for rules that compare the clients' with it.

    Args:
        bench: models and rows of the run.

    Returns:
        A function from a round's adapter and its number to the adapter that the FM has after the
        round's local work on the server's validation rows; None where federation.aggregate does
        without.

    Raises:
        UserError: the rule needs it, and there are no validation rows.
    """
    config = bench.config
    rule = config.federation.aggregate
    if rule == "none" or not aggregation.needs_own(rule):
        return None
    if not len(bench.rows.data.validation):
        raise UserError(
            f"federation.aggregate = {rule} trains on the server's validation rows, and there are "
            "none: set data.validation or data.validation-share."
        )

    def update(start: Tensors, round: int) -> Tensors:
        fm = bench.models.fm
        before = adapters.read(fm)
        adapters.load(fm, start)
        seed = derive(config.run.seed, "own-update", round)
        settings = local_settings(config, round)
        fine_tune(fm, bench.rows.task, bench.rows.validation, settings, seed)
        found = adapters.read(fm)
        adapters.load(fm, before)
        return found

    return update
