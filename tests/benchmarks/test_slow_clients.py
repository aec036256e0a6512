"""When there is a model to use, by hand for speeds that are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import slow_clients as slow

SPEED = [1.0, 2.0, 4.0]


def test_rounds_wait_for_the_slowest_and_one_shot_for_nobody() -> None:
    assert slow.in_rounds(SPEED, 10, 5, 0.0) == slow.Times(8.0, 24.0, 40.0)
    assert slow.in_rounds(SPEED, 10, 5, 3.0).all == 40.0 + 15.0  # there and back each time
    assert slow.one_shot(SPEED, 10, 0.0) == slow.Times(10.0, 20.0, 40.0)
    assert slow.one_shot(SPEED, 10, 3.0).all == 43.0


def test_async_of_one_client_and_of_all_at_once() -> None:
    assert slow.asynchronous([2.0], 10, 5, 0.0, 1) == slow.Times(4.0, 12.0, 20.0)
    together = slow.asynchronous([1.0, 1.0], 10, 5, 0.0, 2)
    assert together == slow.in_rounds([1.0, 1.0], 10, 5, 0.0)
    assert slow.asynchronous(SPEED, 10, 5, 0.0, 1).first == 2.0  # the fastest, after its first part


def test_speeds_are_those_of_the_async_schedule() -> None:
    assert slow.speeds(3, 0.0, 0) == [1.0, 1.0, 1.0]
    one, other = slow.speeds(3, 0.5, 0), slow.speeds(3, 1.0, 0)
    assert other == pytest.approx([s**2 for s in one]) and len(set(one)) == 3
