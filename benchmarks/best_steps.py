"""One-shot beside rounds at the steps that suit each best, chosen on validation rows.

`python benchmarks/best_steps.py experiments/one_shot/cells.jsonl` prints a Markdown table of the
finished cells of `experiments/one_shot.yaml`: lines called `NAME of STEPS` and `NAME` are one line
here, whose steps are those with the best validation score of the plugged-in FM. At equal steps a
client makes in one round what it would in ten; whether that is fair to ten rounds shows beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Best:
    """The steps chosen for a line at a place, and what they came to.

    Attributes:
        steps: T * k, of each client.
        validation: score of the plugged-in FM on validation rows.
        test: the same on test rows.
        tried: how many numbers of steps were compared.
    """

    steps: int
    validation: float
    test: float
    tried: int


def steps_of(row: Mapping[str, Any]) -> int:
    """T * k of a cell."""
    config = row["config"]
    return int(config["federation.rounds"] * config["train.local-steps"])


def best(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], dict[str, Best]]:
    """Choose the steps of every line.

    Args:
        rows: cells; those that failed are passed over.

    Returns:
        By data set, partition and seed, the choice by the line's name without ` of STEPS`. Of
        equal scores the fewer steps are taken.
    """
    found: dict[tuple[str, str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if "failed" in row:
            continue
        place = row["dataset"], row["partition"], row["seed"]
        name = row["method"].partition(" of ")[0]
        found.setdefault(place, {}).setdefault(name, []).append(row)
    out: dict[tuple[str, str, int], dict[str, Best]] = {}
    for place, lines in found.items():
        for name, cells in lines.items():
            up = 1 if cells[0]["metric"]["higher_is_better"] else -1
            taken = max(cells, key=lambda r: (up * r["fm_validation"], -steps_of(r)))
            out.setdefault(place, {})[name] = Best(
                steps_of(taken), taken["fm_validation"], taken["fm_test"], len(cells)
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.cells.read_text(encoding="utf-8").splitlines()]
    print("| data | partition | seed | line | steps tried | best steps | validation | test |\n"
          "|---|---|--:|---|--:|--:|--:|--:|")  # fmt: skip
    for (dataset, partition, seed), lines in sorted(best(rows).items()):
        for name, b in sorted(lines.items()):
            if b.tried > 1:
                print(f"| {dataset} | {partition} | {seed} | {name} | {b.tried} | {b.steps} | "
                      f"{b.validation:.3f} | {b.test:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
