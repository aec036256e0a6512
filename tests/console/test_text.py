"""Figures and metrics in words."""

from __future__ import annotations

import math

import pytest
from runlog import made

from fedpft_console.text import Measure, human_bytes, human_count, human_seconds, percent
from server_app.run import schema as ev


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (human_bytes(999), "999 B"), (human_bytes(1000), "1.0 kB"),
        (human_bytes(999_990), "1.0 MB"), (human_bytes(2.5e9), "2.50 GB"),
        (human_count(950), "950"), (human_count(22_713_216), "22.7M"), (human_count(3e9), "3.00G"),
        (human_seconds(0.04), "0.0 s"), (human_seconds(59.7), "1 min 00 s"),
        (human_seconds(3600), "1 h 00 min"), (human_seconds(math.inf), "?"),
        (percent(0.5713), "57.1 %"), (percent(None), "-"), (percent(math.nan), "-"),
    ],
)  # fmt: skip
def test_numbers_are_legible(text: str, wanted: str) -> None:
    assert text == wanted


def test_a_share_is_shown_in_percent_and_points() -> None:
    m = Measure()
    assert m.spread(0.5713, 0.0157) == "57.1 ± 1.6 %" and m.spread(0.5713, None) == "57.1 %"
    assert m.shown(0.5713) == "57.1 %" and m.difference(0.0304) == "+3.0"
    assert m.reached(0.6, 0.6) and not m.reached(0.59, 0.6)
    assert m.worst([0.1, 0.3]) == 0.1 and m.rank(0.3) > m.rank(0.1)


def test_further_metrics_are_those_of_the_task_and_then_what_else_was_seen() -> None:
    task = made("task", metric="accuracy", further=[
        {"name": "macro-F1", "higher_is_better": True, "share": True}, {"name": "rmse"},
    ])  # fmt: skip
    assert isinstance(task, ev.Task)
    f1, rmse = Measure("macro-F1"), Measure("rmse", share=False)
    assert Measure.further(task, ["rmse", "macro-F1"]) == [f1, rmse]
    assert Measure.further(task, ["new"]) == [f1, rmse, Measure("new", share=False)]
    assert Measure.further(None) == [] and Measure.further(None, ["rmse"]) == [rmse]


def test_any_other_metric_is_shown_as_it_is_and_compared_by_its_direction() -> None:
    m = Measure("rmse", higher_is_better=False, share=False)
    assert m.spread(12.3456, 0.0456) == "12.3 ± 0.046" and m.difference(-0.125) == "-0.125"
    assert m.shown(0.5713) == "0.571" and m.shown(None) == "-"
    assert m.reached(0.6, 0.6) and not m.reached(0.61, 0.6)
    assert m.worst([0.1, 0.3]) == 0.3 and m.rank(0.1) > m.rank(0.3)
