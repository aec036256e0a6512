"""Ways to align the proxy with the FM: one file per choice of `distill.method` and `align.method`.

Each file has `align(job) -> (first, last)`: it changes the weights of `job.student` that
`blocks.moving_parts` names (with `job.chosen`, of those neurons only), leaves everything else as
it was to the bit, and returns its loss before and after. `LAYER_DROP = True` says that it also
serves proxies whose blocks are dropped instead of pruned. `a+b` runs a, then b.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.align.blocks import targets
from fedpft_core.align.distill import Progress
from fedpft_core.config import DistillConfig
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position
from fedpft_core.model.device import Batch
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan


@dataclass(frozen=True)
class Job:
    """One alignment: both models at the same adapter, public batches, and how long and how fast.

    Attributes:
        teacher: the FM.
        student: the proxy, changed in place.
        plan: its plan.
        batches: called with n, gives n public batches, the same for the same n.
        cfg: settings that the methods share, such as weight decay and ridge.
        steps: optimiser steps, of the methods that take any.
        lr: peak learning rate of those.
        alpha: weight of the weight-product term.
        chosen: int64 positions of the neurons that move, for each pruned block; None for all.
        seed: of what a method draws at random.
        on_step: called as `on_step(step, steps, loss)`; the loss is NaN where none is known yet.
        head_reads: which positions the task's head reads; None for where the family's
            classification head does.
    """

    teacher: nn.Module
    student: nn.Module
    plan: Plan
    batches: Callable[[int], Iterator[Batch]]  # n → n public batches, the same for the same n
    cfg: DistillConfig
    steps: int  # optimiser steps
    lr: float
    alpha: float = 0.0  # weight of the weight-product term
    chosen: Mapping[int, Tensor] | None = None  # neurons that move, per pruned block; None = all
    seed: int = 0
    on_step: Progress | None = None
    head_reads: Position | None = None  # None = where the family's classification head does

    @property
    def position(self) -> Position:
        """Which positions of the last block's output the head reads."""
        return self.head_reads or family_of(self.plan.model_type).summary


def parts(name: str) -> list[str]:
    """The methods of `a+b` in order; none for `none`.

    Args:
        name: a value of `distill.method` or `align.method`.

    Returns:
        Names of single methods.
    """
    return [] if name == "none" else name.split("+")


def run(name: str, job: Job, key: str = "distill.method") -> tuple[float, float, float]:
    """Align by the method(s) called `name`, one after the other.

    Args:
        name: a value of `distill.method` or `align.method` that is not `none`.
        job: the alignment, which each of the methods is given.
        key: the configuration key that the error names.

    Returns:
        The first method's loss at its start, the last method's at its end, and seconds.

    Raises:
        UserError: one of them cannot serve this kind of proxy. Nothing has been aligned then.
    """
    modules = [_load(part, job.plan, key) for part in parts(name)]
    start = time.perf_counter()
    losses = [module.align(job) for module in modules]
    return losses[0][0], losses[-1][1], time.perf_counter() - start


def needed(name: str, plan: Plan, steps: int) -> bool:
    """Whether there is anything to do.

    Args:
        name: a value of `distill.method` or `align.method`.
        plan: what the proxy keeps.
        steps: optimiser steps; 0 switches every method off.

    Returns:
        False also where the plan leaves nothing to train.
    """
    return bool(parts(name)) and steps > 0 and bool(targets(plan))


def _load(name: str, plan: Plan, key: str) -> ModuleType:
    module = registry.load("alignment", name)
    if not plan.pruned and not getattr(module, "LAYER_DROP", False):
        raise UserError(f"{key} = {name} needs pruned blocks; a layer-drop proxy has none.")
    return module
