"""An experiment: which cells a comparison has, and which of them belong together.

`parse` says how its file is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpft_console.compare.cell import Cell, Point, Row, best_rate
from fedpft_core import config as configs
from fedpft_core.errors import UserError

# What all methods must have alike for their difference to mean anything; steps are compared as
# rounds times steps, since a one-shot method makes them all in one round.
_EQUAL_SECTIONS = ("data.", "model.")
_EQUAL_KEYS = (
    "federation.clients", "federation.clients-per-round", "federation.partition",
    "federation.dirichlet-alpha", "train.batch-size", "run.eval-split",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file."""

    base: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    rates: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)  # by place
    partitions: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    more_seeds: tuple[dict[str, Any], ...] = ()
    reference: str = "fedpetuning"
    targets: dict[str, float] = field(default_factory=dict)
    unequal: tuple[str, ...] = ()
    name: str = "experiment"
    # Cells made so far: tables ask for the same ones again and again.
    _cells: dict[Any, Cell] = field(default_factory=dict, repr=False, compare=False)

    def points(self) -> list[Point]:
        """The lines of the tables, in order: by data set, partition, method, and point of the grid.

        Returns:
            Each line once; a method that sets a key of the grid itself has one line for all its
            values.
        """
        combos = [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]
        out: dict[Point, None] = {}
        for dataset, partition in itertools.product(self.datasets, self.partitions):
            for method, own in self.methods.items():
                for combo in combos:
                    grid = tuple((k, own.get(k, v)) for k, v in combo.items())
                    out[Point(method, dataset, partition, grid)] = None
        return list(out)

    def cell(self, point: Point, seed: int, lr: float | None) -> Cell:
        """A run of a line.

        Args:
            point: a line of the tables.
            seed: the run's seed.
            lr: its learning rate; None leaves the rate to the keys.

        Returns:
            The cell, the same object for the same arguments.

        Raises:
            UserError: its keys make no configuration.
        """
        key = (point, seed, lr)
        if key not in self._cells:
            self._cells[key] = self._cell(point, seed, lr)
        return self._cells[key]

    def _cell(self, point: Point, seed: int, lr: float | None) -> Cell:
        flat = (
            self.base
            | self.datasets[point.dataset]
            | self.partitions[point.partition]
            | dict(point.grid)
            | self.methods[point.method]
            | {"run.seed": seed}
        )
        if lr is not None:
            flat["train.lr"] = lr
        config = configs.from_flat(flat)
        return Cell(point.method, point.dataset, seed, config.train.lr, flat, point.partition)

    def first(self, point: Point) -> list[Cell]:
        """The cells on which a line's learning rate is chosen: the first seed at every rate.

        Args:
            point: a line of the tables.

        Returns:
            A cell for each rate of the line's place; one, whose rate the keys say, where there is
            no list.
        """
        rates: Sequence[float | None] = self.rates.get(point.place) or (None,)
        return [self.cell(point, self.seeds[0], lr) for lr in rates]

    def seeds_of(self, point: Point) -> tuple[int, ...]:
        """The seeds of a line, the one that chooses its rate first.

        Args:
            point: a line of the tables.

        Returns:
            `seeds`, then those of each entry of `more-seeds` that names the line; each once.
        """
        out = dict.fromkeys(self.seeds)
        for more in self.more_seeds:
            axes = zip(("methods", "datasets", "partitions"),
                       (point.method, point.dataset, point.partition), strict=True)  # fmt: skip
            if all(value in more.get(axis, (value,)) for axis, value in axes):
                out |= dict.fromkeys(more["seeds"])
        return tuple(out)

    def chosen(self, point: Point, rows: Sequence[Row]) -> dict[int, Row]:
        """By seed, the finished cells of a line at the rate chosen on validation rows.

        Args:
            point: a line of the tables.
            rows: results, finished and failed.

        Returns:
            Results by seed, only of seeds that have finished; empty where no rate can be chosen
            yet.
        """
        first = [found for cell in self.first(point) if (found := cell.find(rows))]
        best = best_rate(first)
        if best is None:
            return {}
        cells = {seed: self.cell(point, seed, best).find(rows) for seed in self.seeds_of(point)}
        return {seed: row for seed, row in cells.items() if row}

    def check(self) -> None:
        """Resolve a cell of every line at every rate, and compare what methods must have alike.

        Raises:
            UserError: a key is bad, or methods of one place cannot be compared.
        """
        for (dataset, partition), points in _by_place(self.points()):
            where = "/".join(filter(None, (dataset, partition)))
            first: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
            for point in points:
                try:
                    resolved = self.first(point)[0].resolved
                except UserError as error:
                    raise UserError(f"{point.method} on {where}: {error}") from None
                # Within one point of the grid; what the grid varies may well differ.
                method, other = first.setdefault(point.grid, (point.method, resolved))
                ours, theirs = _budget(resolved), _budget(other)
                for key in sorted(ours.keys() & theirs.keys() - set(self.unequal)):
                    if ours[key] != theirs[key]:
                        raise UserError(
                            f"{point.method} and {method} on {where} cannot be compared: {key} is "
                            f"{ours[key]!r} and {theirs[key]!r} (`unequal: [{key}]` allows it)."
                        )


def _budget(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What methods must have in common, by key.

    A single client is the centralised reference point, which has no federation to be alike in.

    Args:
        flat: every key that decides what a cell computes, with its value.

    Returns:
        Values by key; under `train.local-steps` the steps or epochs of the whole run, with their
        unit.
    """
    out = {k: v for k, v in flat.items() if k.startswith(_EQUAL_SECTIONS) or k in _EQUAL_KEYS}
    if flat["federation.clients"] == 1:
        return {k: v for k, v in out.items() if not k.startswith("federation.")}
    unit = "train.local-steps" if flat["train.local-steps"] else "train.local-epochs"
    return out | {"train.local-steps": f"{flat['federation.rounds'] * flat[unit]} {unit[12:]}"}


def _by_place(points: Iterable[Point]) -> Iterator[tuple[tuple[str, str], list[Point]]]:
    for place, some in itertools.groupby(points, key=lambda p: p.place):
        yield place, list(some)
