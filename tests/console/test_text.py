"""Figures and metrics in words."""

from __future__ import annotations

import math

import pytest

from fedpft_console.text import Measure, human_bytes, human_count, human_seconds, percent


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (human_bytes(999), "999 B"), (human_bytes(1000), "1.0 kB"),
        (human_bytes(999_990), "1.0 MB"), (human_bytes(2.5e9), "2.50 GB"),
        (human_count(950), "950"), (human_count(22_713_216), "22.7M"), (human_count(3e9), "3.00G"),
        (human_seconds(0.04), "0.0 s"), (human_seconds(59.7), "1 min 00 s"),
        (human_seconds(3600), "1 h 00 min"), (human_seconds(math.inf), "?"),
        (percent(0.5713), "57.1 %"), (percent(None), "-"), (percent(math.nan), "-"),
    ],
)  # fmt: skip
def test_numbers_are_legible(made: str, wanted: str) -> None:
    assert made == wanted


def test_a_share_is_shown_in_percent_and_points() -> None:
    m = Measure()
    assert m.spread(0.5713, 0.0157) == "57.1 ± 1.6 %" and m.spread(0.5713, None) == "57.1 %"
    assert m.shown(0.5713) == "57.1 %" and m.difference(0.0304) == "+3.0"
    assert m.reached(0.6, 0.6) and not m.reached(0.59, 0.6)
    assert m.worst([0.1, 0.3]) == 0.1 and m.rank(0.3) > m.rank(0.1)


def test_any_other_metric_is_shown_as_it_is_and_compared_by_its_direction() -> None:
    m = Measure("rmse", higher_is_better=False, share=False)
    assert m.spread(12.3456, 0.0456) == "12.3 ± 0.046" and m.difference(-0.125) == "-0.125"
    assert m.shown(0.5713) == "0.571" and m.shown(None) == "-"
    assert m.reached(0.6, 0.6) and not m.reached(0.61, 0.6)
    assert m.worst([0.1, 0.3]) == 0.3 and m.rank(0.1) > m.rank(0.3)
