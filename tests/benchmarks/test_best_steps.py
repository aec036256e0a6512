"""Steps are chosen on validation rows, and test rows have no part in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from best_steps import Best, best


def cell(
    method: str, rounds: int, steps: int, validation: float, test: float, up: bool = True
) -> Any:
    return {
        "method": method, "dataset": "d", "partition": "iid", "seed": 0,
        "metric": {"higher_is_better": up}, "fm_validation": validation, "fm_test": test,
        "config": {"federation.rounds": rounds, "train.local-steps": steps},
    }  # fmt: skip


def test_the_best_on_validation_rows_is_taken() -> None:
    rows = [
        cell("one-shot", 1, 40, 0.8, 0.9), cell("one-shot of 80", 1, 80, 0.85, 0.7),
        cell("one-shot of 20", 1, 20, 0.85, 0.75), cell("rounds-10", 10, 4, 0.9, 0.95),
        {"failed": "x", "method": "one-shot of 90"},
    ]  # fmt: skip
    assert best(rows) == {("d", "iid", 0): {
        "one-shot": Best(20, 0.85, 0.75, 3), "rounds-10": Best(40, 0.9, 0.95, 1),
    }}  # fmt: skip
    worse = [cell("a", 1, 1, 3.0, 3.0, up=False), cell("a of 2", 1, 2, 2.0, 4.0, up=False)]
    assert best(worse)["d", "iid", 0]["a"].steps == 2
