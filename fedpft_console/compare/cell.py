"""Single runs of a comparison, the lines of tables they belong to, and their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from fedpft_console.text import Measure
from fedpft_core import config as configs

Row = Mapping[str, Any]

_GONE = object()
# Keys that say where or how fast a cell runs, not what it computes.
NO_RESULT = (
    "run.dir", "run.resume", "run.stop-after", "run.checkpoints", "run.threads", "run.proxy-cache",
    "plan.ledger", "plan.disclosure-budget",
)  # fmt: skip
# What a run did that is older than a key: today's default, but for these.
_ABSENT = {name: info.default for name, info in configs.keys().items()} | {
    "plug.refit": "none", "plug.rows": 128, "plug.method": "refit", "distill.fit-batches": 40,
    "distill.ridge": 1e-3, "head.start": "zero", "head.end": "trained",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    dataset: str
    seed: int
    lr: float
    flat: dict[str, Any]
    partition: str = ""

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Every key that decides what the cell computes, with its value."""
        full = configs.to_flat(configs.from_flat(self.flat))
        return {k: v for k, v in full.items() if k not in NO_RESULT}

    def digest(self) -> str:
        """Name of the cell's run folder: a hash of `resolved`.

        Returns:
            16 hexadecimal digits, equal for cells that compute the same.
        """
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, rows: Iterable[Row]) -> Row | None:
        """The result of a run of this very configuration, if there is one.

        Keys that did not exist when the row was written count as `_ABSENT` says: what was
        computed before is still what it was.

        Args:
            rows: results, of this experiment or any other.

        Returns:
            The first such result that has not failed; None where the cell is still to be run.
        """
        return next((r for r in rows if "failed" not in r and self.same(r)), None)

    def failure(self, rows: Iterable[Row]) -> Row | None:
        """The latest failed run of this very configuration, if there is one.

        Args:
            rows: results in file order.

        Returns:
            The result, whose `failed` says why; None where no such run failed.
        """
        failed = [r for r in rows if "failed" in r and self.same(r)]
        return failed[-1] if failed else None

    def same(self, row: Row) -> bool:
        """Whether a row is of this configuration.

        Args:
            row: a result, finished or failed.

        Returns:
            True where no key that decides what is computed differs.
        """
        # What differs most between cells is looked at first: tables ask this of all pairs.
        then = row["config"]
        if any(then.get(k) != self.resolved[k] for k in ("run.seed", "train.lr")):
            return False
        return not self.differs(row)

    def differs(self, row: Row) -> dict[str, tuple[Any, Any]]:
        """Keys in which a row's configuration is not this cell's.

        Args:
            row: a result, finished or failed.

        Returns:
            By key, (in the row, here): a key that the row is older than counts as `_ABSENT` says,
            one that is no more is None here. Empty where both compute the same.
        """
        then = row["config"]
        out = {
            k: (v, self.resolved.get(k))
            for k, v in then.items()
            if k not in NO_RESULT and self.resolved.get(k, _GONE) != v
        }
        return out | {
            k: (_ABSENT[k], v)
            for k, v in self.resolved.items()
            if k not in then and v != _ABSENT[k]
        }

    def title(self) -> str:
        """What a person calls it.

        Returns:
            Data set, partition, method, seed and learning rate.
        """
        where = f"{self.dataset}/{self.partition}" if self.partition else self.dataset
        return f"{where} {self.method} seed {self.seed} lr {self.lr:g}"


@dataclass(frozen=True)
class Point:
    """One line of the tables: all seeds of a method on a dataset, at one point of the grid."""

    method: str
    dataset: str
    partition: str = ""
    grid: tuple[tuple[str, Any], ...] = ()  # each key of the grid with this line's value

    @property
    def label(self) -> str:
        """Method and place in the grid."""
        return ", ".join([self.method, *(f"{k} {shown(v)}" for k, v in self.grid)])

    @property
    def place(self) -> tuple[str, str]:
        """Where it can be compared with others."""
        return self.dataset, self.partition

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether a pattern METHOD[/DATASET[/PARTITION]], with wildcards, names it.

        Args:
            patterns: patterns of one to three parts; a part that is left out allows everything.

        Returns:
            True where one of them fits.
        """
        names = (self.method, self.dataset, self.partition)
        return any(
            all(fnmatchcase(n, p) for n, p in zip(names, pattern.split("/"), strict=False))
            for pattern in patterns
        )


def shown(value: Any) -> str:
    """A configuration value as tables show it.

    Args:
        value: a scalar of the configuration.

    Returns:
        Text; `(none)` for an empty one.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(none)"


def measure_of(row: Row) -> Measure:
    """The metric that a result's values are of; rows older than its name have accuracy.

    Args:
        row: a result.

    Returns:
        The metric, by which values are scaled, shown and compared.
    """
    return Measure(**row.get("metric", {}))


def best_rate(rows: Sequence[Row]) -> float | None:
    """The learning rate at which the product is best on validation rows, lowest on a tie.

    Args:
        rows: results of a line at its first seed, one for each learning rate.

    Returns:
        The rate; None where nothing has finished, or there are several results and none has a value
        on validation rows.
    """
    done = [r for r in rows if "failed" not in r]
    good = [r for r in done if r.get("fm_validation") is not None]
    if not good:
        # A single rate needs no validation rows to be chosen on.
        return float(done[0]["lr"]) if len(rows) == 1 and done else None
    return float(max(good, key=lambda r: (measure_of(r).rank(r["fm_validation"]), -r["lr"]))["lr"])
