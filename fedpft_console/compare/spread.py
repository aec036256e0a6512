"""Figures over seeds as tables show them: mean, deviation, single seeds, interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedpft_console.text import Measure


def brief_spread(values: Sequence[float], measure: Measure) -> str:
    """Mean and standard deviation as `94.3 ± 0.8`, without a deviation where there is one value.

    Args:
        values: at least one, scaled as `Measure.scaled` does.
        measure: the metric they are of.

    Returns:
        Text without a unit.
    """
    mean = measure.plain(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {measure.plain(statistics.stdev(values))}"


def spread(values: Sequence[float], measure: Measure) -> str:
    """Mean, standard deviation and single values as `94.3 ± 0.8 (94.8, 94.8, 93.4)`.

    Args:
        values: at least one, scaled as `Measure.scaled` does.
        measure: the metric they are of.

    Returns:
        Text without a unit; a single value stands alone.
    """
    each = ", ".join(map(measure.plain, values))
    return brief_spread(values, measure) + (f" ({each})" if len(values) > 1 else "")


def plus_minus(mean: float, half: float, measure: Measure) -> str:
    """A difference and its interval as `-0.9 ± 1.9`, without the interval where there is none.

    Args:
        mean: mean difference, scaled as `Measure.scaled` does.
        half: half-width of its interval; NaN where there is none.
        measure: the metric they are of.

    Returns:
        Text with its sign, without a unit.
    """
    around = "" if math.isnan(half) else f" ± {measure.plain(half)}"
    return measure.plain(mean, "+") + around
