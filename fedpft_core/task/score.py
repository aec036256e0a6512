"""Metrics, and what a model came to by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A score: the one a task is judged by, or one that is shown beside it.

    Attributes:
        name: as reports and events call it.
        higher_is_better: direction.
        share: whether its values lie in [0, 1], so that they are shown as per cent.
    """

    name: str
    higher_is_better: bool
    share: bool

    def better(self, value: float, than: float) -> bool:
        """Whether one value is better than another.

        Args:
            value: of this metric.
            than: another.

        Returns:
            Whether it is; never of equal ones.
        """
        return value > than if self.higher_is_better else value < than

    def fields(self) -> dict[str, Any]:
        """What the `task` event says of it.

        Returns:
            JSON values by the event's field names.
        """
        return {
            "metric": self.name,
            "higher_is_better": self.higher_is_better,
            "share": self.share,
        }


@dataclass(frozen=True)
class Score:
    """What a model came to on some rows.

    Attributes:
        metric: what `value` is.
        value: the metric's value.
        error: standard error of `value`, by chance of which rows they were; NaN where unknown.
        loss: mean loss over what the task counts (rows, tokens); NaN where there is none.
        rows: rows scored.
        seconds: time it took.
        more: values of the task's further metrics, by name; a metric that the sums do not give is
            left out.
        sums: all that the score was made from; see `Task.sums`. A client may send only those that
            `Task.sent` names.
    """

    metric: Metric
    value: float
    error: float
    loss: float
    rows: int
    seconds: float = 0.0
    more: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """What an event says of it; the seconds, which not every event has, are left out.

        Returns:
            JSON values by the event's field names; an error or a loss that is NaN is None.
        """
        return {
            "metric": self.metric.name,
            "value": self.value,
            "error": None if isnan(self.error) else self.error,
            "loss": None if isnan(self.loss) else self.loss,
            "rows": self.rows,
            "more": dict(self.more),
        }


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over several models scored on the same rows.

    Errors are averaged too: what chance has put into the rows is the same for all.

    Args:
        scores: at least one, all of one task and over the same rows.

    Returns:
        Means of value, error, loss and further metrics; the seconds are those of all together.
    """
    n, first = len(scores), scores[0]
    return Score(
        metric=first.metric,
        value=sum(s.value for s in scores) / n,
        error=sum(s.error for s in scores) / n,
        loss=sum(s.loss for s in scores) / n,
        rows=first.rows,
        seconds=sum(s.seconds for s in scores),
        more={name: sum(s.more[name] for s in scores) / n for name in first.more},
    )
