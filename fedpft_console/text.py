"""How figures, metrics and the parts of a run are put into words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PHASES = {
    "load": "loading",
    "baselines": "baselines",
    "build": "building the sub-FM",
    "distil": "distillation",
    "undistilled": "same federation, undistilled sub-FM",
    "round": "round",
    "align": "alignment",
    "evaluate": "evaluation",
    "export": "export",
}
MODELS = {"proxy": "sub-FM", "fm": "plugged-in FM", "fm-as-trained": "FM, as trained"}
BASELINES = {
    "majority-class": "majority class",
    "linear-probe": "linear probe on the FM",
    "tf-idf": "TF-IDF",
    "zero-shot": "FM as it is (zero-shot)",
    "undistilled": "undistilled sub-FM, plugged in",
}


def human_bytes(count: float) -> str:
    """1234567 → `1.2 MB` (powers of 1000).

    Args:
        count: bytes.

    Returns:
        Text with its unit, up to GB.
    """
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_count(count: float) -> str:
    """22713216 → `22.7M`.

    Args:
        count: how many there are.

    Returns:
        Text, with k, M or G for powers of 1000.
    """
    if abs(count) < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M"):
        count /= 1000
        if abs(count) < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.2f}G"


def human_seconds(seconds: float) -> str:
    """75.2 → `1 min 15 s`.

    Args:
        seconds: a duration.

    Returns:
        Text in seconds, minutes or hours; `?` where it is not finite.
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float | None) -> str:
    """0.5713 → `57.1 %`; nothing to show is a dash.

    Args:
        share: a share in [0, 1], None where it is not known.

    Returns:
        Text with one decimal.
    """
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits; anything else is a dash.

    Args:
        value: a number, or whatever stands where there is none.
        digits: significant digits.

    Returns:
        Text; a dash for None, NaN, infinity and anything that is no number.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}g}"


class _Task(Protocol):
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def share(self) -> bool: ...
    @property
    def further(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Measure:
    """A metric of a task: how its values are shown and which of two is better.

    A value that is a share is shown in percent, and differences of shares in points; any other is
    shown as it is, with three digits.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    share: bool = True

    @staticmethod
    def of(task: _Task | None) -> Measure:
        """The metric that a task event names.

        Args:
            task: a task event, None before there is one.

        Returns:
            Its metric; accuracy for None.
        """
        return Measure(task.metric, task.higher_is_better, task.share) if task else Measure()

    @staticmethod
    def further(task: _Task | None, seen: Iterable[str] = ()) -> list[Measure]:
        """The metrics beside the one that decides.

        Args:
            task: a task event, None before there is one; that of an older version names none.
            seen: names of metrics that scores have values of.

        Returns:
            Those that the task names, in its order, then what else was seen, each once. How the
            latter are to be shown is not known, so they are shown as they are.
        """
        named = [
            Measure(
                str(m.get("name", "")),
                bool(m.get("higher_is_better", True)),
                bool(m.get("share", False)),
            )
            for m in (task.further if task else ())
        ]
        found = {measure.name: measure for measure in named}
        for name in seen:
            found.setdefault(name, Measure(name, share=False))
        return list(found.values())

    @property
    def title(self) -> str:
        """The name, to begin a heading with."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def points(self) -> str:
        """` in points` for shares: what to put behind a name whose figures have no unit."""
        return " in points" if self.share else ""

    @property
    def axis(self) -> str:
        """The name with its unit, for the axis of a plot."""
        return f"{self.name}, points" if self.share else self.name

    def scaled(self, value: float) -> float:
        """A value, or a difference of two, as tables show it: shares times 100.

        Args:
            value: a value of the metric, or a difference of two.

        Returns:
            Percent or points for a share, else the value itself.
        """
        return 100 * value if self.share else value

    def plain(self, scaled: float, sign: str = "") -> str:
        """A scaled figure without its unit.

        Args:
            scaled: a figure that `scaled` has made.
            sign: "+" for differences, which then show their sign.

        Returns:
            Text, with one decimal for shares and three significant digits otherwise.
        """
        return f"{scaled:{sign}.1f}" if self.share else f"{scaled:{sign}.3g}"

    def shown(self, value: float | None) -> str:
        """A value with its unit: `57.1 %` or `0.571`; nothing to show is a dash.

        Args:
            value: a value of the metric, unscaled; None where it is not known.

        Returns:
            Text; a dash for None, NaN and infinity.
        """
        return percent(value) if self.share else number(value)

    def spread(self, value: float, error: float | None) -> str:
        """A value with its standard error: `57.1 ± 1.6 %` or `0.571 ± 0.016`.

        Args:
            value: a value of the metric, unscaled.
            error: its standard error in the same unit; None leaves it out.

        Returns:
            Text, with the unit once, at its end.
        """
        unit = " %" if self.share else ""
        form = ".1f" if self.share else ".2g"
        around = "" if error is None else f" ± {self.scaled(error):{form}}"
        return f"{self.plain(self.scaled(value))}{around}{unit}"

    def difference(self, value: float) -> str:
        """A difference of two values, in points where they are shares: `+10.0` or `-0.125`.

        Args:
            value: a difference of two values, unscaled.

        Returns:
            Text with its sign, without a unit.
        """
        return self.plain(self.scaled(value), "+")

    def reached(self, value: float, target: float) -> bool:
        """Whether a value is as good as a target.

        Args:
            value: a value of the metric.
            target: the value to reach, in the same unit.

        Returns:
            True also where both are equal.
        """
        return value >= target if self.higher_is_better else value <= target

    def worst(self, values: Iterable[float]) -> float:
        """The worst of some values, or of some differences to a reference.

        Args:
            values: at least one, all in one unit.

        Returns:
            The smallest, or the largest where lower is better.
        """
        return min(values) if self.higher_is_better else max(values)

    def rank(self, value: float) -> float:
        """A number that is the larger the better the value is.

        Args:
            value: a value of the metric, or a difference of two.

        Returns:
            The value, negated where lower is better.
        """
        return value if self.higher_is_better else -value
