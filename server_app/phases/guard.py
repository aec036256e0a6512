"""Whose class statistics are left out of the sums, by the server's validation rows (head.guard)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fedpft_core.config import Config
from fedpft_core.errors import UserError
from fedpft_core.head.discriminant import FEW
from fedpft_core.head.form import Form, Sums
from fedpft_core.head.guard import Judgement, judge
from server_app.bench import Bench
from server_app.phases.reporting import progress
from server_app.rounds.statistics import Guard
from server_app.run import schema as ev
from server_app.state import Events


def check(config: Config, rows: int) -> None:
    """Refuse head.guard where too few rows could judge.

    Args:
        config: a whole run.
        rows: the server's validation rows.

    Raises:
        UserError: naming the keys that give more.
    """
    if config.head.guard == "none":
        return
    if not rows:
        raise UserError(
            f"head.guard = {config.head.guard} holds clients' statistics against the server's "
            "validation rows, and there are none: set data.validation or data.validation-share."
        )
    judging = min(config.plug.rows, (rows + 1) // 2)
    if judging < FEW:
        raise UserError(
            f"head.guard = {config.head.guard} judges by half of the server's {rows} validation "
            f"rows, and at most plug.rows = {config.plug.rows}: that is {judging} rows of the "
            f"{FEW} it needs (data.validation, data.validation-share)."
        )


def guard_of(
    bench: Bench,
    events: Events,
    round: int,
    form: Form,
    judging: Callable[[nn.Module], tuple[Tensor, Tensor]],
) -> Guard | None:
    """How the clients are found whose statistics are to be left out.

    Args:
        bench: its models have the adapter that the statistics are asked for at.
        events: where it is noted who is left out.
        round: rounds done.
        form: how the head follows from sums.
        judging: gives features float64 [N, D] of the rows that judge, as a model has them, and
            their answers [N, ...].

    Returns:
        A function of the clients' statistics, by width and name; each width is judged by itself,
        on the features of its own sub-FM. None where head.guard is `none`.
    """
    config = bench.config
    if config.head.guard == "none":
        return None
    proxies = {w.name: w.proxy for w in bench.models.widths}

    def left_out(parts: Mapping[str, Mapping[str, Sums]]) -> list[str]:
        out: list[str] = []
        spare = sum(map(len, parts.values())) - config.federation.min_clients
        for width, of_width in sorted(parts.items()):
            began = time.perf_counter()
            rows, answers = judging(proxies[width])
            limit = min(_limit(config.federation.attackers, len(of_width)), spare - len(out))
            found = judge(
                form, of_width, config.head.shrinkage or None, rows, answers, max(limit, 0),
                progress(events, "statistics", "heads"),
            )  # fmt: skip
            out += [absent.client for absent in found.left_out]
            _note(events, round, width, len(of_width), len(rows), found, began)
        return out

    return left_out


def _limit(attackers: float, clients: int) -> int:
    """How many of some clients may be left out: always fewer than half."""
    most = (clients - 1) // 2
    return min(math.ceil(attackers * clients - 1e-9), most) if attackers else most


def _note(
    events: Events, round: int, width: str, clients: int, rows: int, found: Judgement, began: float
) -> None:
    """Say who is left out, and why."""
    events.emit(ev.Guarded(
        round=round, width=width, clients=clients, rows=rows,
        left_out=[
            {"client": a.client, "gain": a.gain, "error": a.error} for a in found.left_out
        ],
        before=found.before, after=found.after, seconds=time.perf_counter() - began,
    ))  # fmt: skip
    if not found.left_out:
        return
    why = "; ".join(
        f"{a.client}: the head's loss on {rows} validation rows falls by {a.gain:.3g} "
        f"(standard error {a.error:.2g}) without its statistics"
        for a in found.left_out
    )
    events.emit(ev.Warned(text=f"class statistics without {why}"))
