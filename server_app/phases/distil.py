"""Layer-level distillation of the proxy, before the federation (paper section 4.2)."""

from __future__ import annotations

import math

from fedpft_core.align import joint
from fedpft_core.align import method as alignment
from fedpft_core.align.losses import output_error
from fedpft_core.errors import RunError
from fedpft_core.seeds import derive
from server_app.bench import Bench
from server_app.phases import widths
from server_app.phases.reporting import phase, progress
from server_app.run import schema as ev


def due(bench: Bench) -> bool:
    """Whether distillation would change the proxy at all.

    Args:
        bench: its plan, distill.method and distill.budget decide.

    Returns:
        Whether there is anything to distil.
    """
    d = bench.config.distill
    return alignment.needed(d.method, bench.models.plan, d.work[0])


def distil(bench: Bench) -> None:
    """Distil the proxy in place, unless there is nothing to distil.

    Source: FedPFT, section 4.2.

    Args:
        bench: FM, proxy and public rows.

    Raises:
        RunError: when it diverges.
    """
    if not due(bench):
        return
    d, models = bench.config.distill, bench.models
    steps, rows = d.work
    with phase(bench.events, "distil"):
        probe = list(bench.rows.probe())
        before = output_error(models.fm, models.proxy, models.plan, probe)
        job = alignment.Job(
            models.fm, models.proxy, models.plan,
            lambda n: bench.rows.public_batches(n, "distil", rows=rows), d,
            steps=steps, lr=d.lr, alpha=d.alpha,
            seed=derive(bench.config.run.seed, "distil"), head_reads=bench.head_reads,
            on_step=progress(bench.events, "distil", "steps"),
        )  # fmt: skip
        if widths.shared(bench):
            first, last, seconds = joint.run(d.method, job, widths.smaller(bench))
        else:
            first, last, seconds = alignment.run(d.method, job)
        widths.distil_apart(bench, job)
        after = output_error(models.fm, models.proxy, models.plan, probe)
        check_finite(after, "distill.lr")
        bench.events.emit(ev.Distilled(
            steps=steps, seconds=seconds, loss_first=first, loss_last=last,
            error_before=before, output_error=after,
        ))  # fmt: skip


def check_finite(errors: dict[int, float], key: str) -> None:
    """Refuse the result of a distillation that diverged.

    Args:
        errors: output error by pruned block.
        key: the configuration key of the rate to lower.

    Raises:
        RunError: when an output error is infinite or not a number.
    """
    if not all(math.isfinite(e) for e in errors.values()):
        raise RunError(f"the distillation diverged; lower {key}")
