"""An experiment file: which cells a comparison has, and which of them belong together.

    base: {...}                        # configuration keys of every cell
    methods: {fedpft: {...}, ...}      # name -> keys
    datasets: {trec6: {...}, ...}      # name -> keys
    partitions: {iid: {...}, ...}      # optional: name -> keys
    grid: {align.interval: [1, 2, 5]}  # optional: key -> values, each a line of the tables
    seeds: [0, 1, 2]
    more-seeds: [{seeds: [3, 4], methods: [fedpft], datasets: [trec6], partitions: [iid]}]
    learning-rates: [0.0016, 0.0032]   # optional: chosen on validation rows at the first seed;
                                       # {trec6: [...], ...} gives each dataset its own, or each
                                       # partition
    reference: fedpetuning             # optional: what the others are compared with
    targets: {trec6: 0.9}              # optional: accuracies that rounds are counted to
    unequal: [data.max-length]         # optional: keys in which methods differ on purpose

Later ones win: base, dataset, partition, grid, method. So a method that sets a key of the grid
itself keeps its own value, and has one line instead of several.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpft_core import config as configs
from fedpft_core.errors import UserError

Row = Mapping[str, Any]

_KEYS = (
    "base", "methods", "datasets", "partitions", "grid", "seeds", "more-seeds", "learning-rates",
    "reference", "targets", "unequal",
)  # fmt: skip
_GONE = object()
# Keys that say where or how fast a cell runs, not what it computes.
NO_RESULT = (
    "run.dir", "run.resume", "run.stop-after", "run.checkpoints", "run.threads", "run.proxy-cache",
)  # fmt: skip
# What a run did that is older than a key: today's default, but for these.
_ABSENT = {name: info.default for name, info in configs.keys().items()} | {
    "plug.refit": "none", "plug.rows": 128, "distill.fit-batches": 40, "distill.ridge": 1e-3
}  # fmt: skip
# What all methods must have alike for their difference to mean anything; steps are compared as
# rounds times steps, since a one-shot method makes them all in one round.
_EQUAL_SECTIONS = ("data.", "model.")
_EQUAL_KEYS = (
    "federation.clients", "federation.clients-per-round", "federation.partition",
    "federation.dirichlet-alpha", "train.batch-size", "run.eval-split",
)  # fmt: skip


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
        """Name of the cell's run folder: a hash of `resolved`."""
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, rows: Iterable[Row]) -> Row | None:
        """The result of a run of this very configuration, if there is one.

        Keys that did not exist when the row was written count as `_ABSENT` says: what was
        computed before is still what it was.
        """
        return next((r for r in rows if "failed" not in r and self.same(r)), None)

    def failure(self, rows: Iterable[Row]) -> Row | None:
        """The latest failed run of this very configuration, if there is one."""
        failed = [r for r in rows if "failed" in r and self.same(r)]
        return failed[-1] if failed else None

    def same(self, row: Row) -> bool:
        """Whether a row is of this configuration."""
        # What differs most between cells is looked at first: tables ask this of all pairs.
        then = row["config"]
        if any(then.get(k) != self.resolved[k] for k in ("run.seed", "train.lr")):
            return False
        return not self.differs(row)

    def differs(self, row: Row) -> dict[str, tuple[Any, Any]]:
        """Keys in which a row's configuration is not this cell's: (in the row, here)."""
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
        """What a person calls it."""
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
        """Whether a pattern METHOD[/DATASET[/PARTITION]], with wildcards, names it."""
        names = (self.method, self.dataset, self.partition)
        return any(
            all(fnmatchcase(n, p) for n, p in zip(names, pattern.split("/"), strict=False))
            for pattern in patterns
        )


def shown(value: Any) -> str:
    """A configuration value as tables show it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(none)"


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

    @staticmethod
    def read(path: Path) -> Experiment:
        """Raises UserError naming the file and what is wrong with it."""
        import yaml

        if not path.is_file():
            raise UserError(f"{path}: no such experiment file.")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
        try:
            return _parse(raw, path.stem)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def points(self) -> list[Point]:
        """The lines of the tables, in order."""
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
        """A run of a line; `lr` None leaves the rate to the keys."""
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
        """The cells on which a line's learning rate is chosen: the first seed at every rate."""
        rates: Sequence[float | None] = self.rates.get(point.place) or (None,)
        return [self.cell(point, self.seeds[0], lr) for lr in rates]

    def seeds_of(self, point: Point) -> tuple[int, ...]:
        """The seeds of a line, the one that chooses its rate first."""
        out = dict.fromkeys(self.seeds)
        for more in self.more_seeds:
            axes = zip(("methods", "datasets", "partitions"),
                       (point.method, point.dataset, point.partition), strict=True)  # fmt: skip
            if all(value in more.get(axis, (value,)) for axis, value in axes):
                out |= dict.fromkeys(more["seeds"])
        return tuple(out)

    def chosen(self, point: Point, rows: Sequence[Row]) -> dict[int, Row]:
        """By seed, the finished cells of a line at the rate chosen on validation rows."""
        first = [found for cell in self.first(point) if (found := cell.find(rows))]
        best = best_rate(first)
        if best is None:
            return {}
        cells = {seed: self.cell(point, seed, best).find(rows) for seed in self.seeds_of(point)}
        return {seed: row for seed, row in cells.items() if row}

    def check(self) -> None:
        """Resolve every cell; raises UserError for a bad key or methods that cannot be compared."""
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
    """
    out = {k: v for k, v in flat.items() if k.startswith(_EQUAL_SECTIONS) or k in _EQUAL_KEYS}
    if flat["federation.clients"] == 1:
        return {k: v for k, v in out.items() if not k.startswith("federation.")}
    unit = "train.local-steps" if flat["train.local-steps"] else "train.local-epochs"
    return out | {"train.local-steps": f"{flat['federation.rounds'] * flat[unit]} {unit[12:]}"}


def _by_place(points: Iterable[Point]) -> Iterator[tuple[tuple[str, str], list[Point]]]:
    for place, some in itertools.groupby(points, key=lambda p: p.place):
        yield place, list(some)


def best_rate(rows: Sequence[Row]) -> float | None:
    """The learning rate with the best validation accuracy of the product, lowest on a tie."""
    done = [r for r in rows if "failed" not in r]
    good = [r for r in done if r.get("fm_validation") is not None]
    if not good:
        # A single rate needs no validation rows to be chosen on.
        return float(done[0]["lr"]) if len(rows) == 1 and done else None
    return float(max(good, key=lambda r: (r["fm_validation"], -r["lr"]))["lr"])


# ---------------------------------------------------------------- parsing


def _parse(raw: Any, name: str) -> Experiment:
    if not isinstance(raw, Mapping) or not {"methods", "datasets"} <= raw.keys():
        raise UserError("an experiment needs `methods` and `datasets`.")
    odd = sorted(str(k) for k in raw.keys() - set(_KEYS))
    if odd:
        raise UserError(f"no such key {odd[0]!r} (known: {', '.join(_KEYS)}).")
    partitions = _axis(raw, "partitions") if raw.get("partitions") else {"": {}}
    methods, datasets = _axis(raw, "methods"), _axis(raw, "datasets")
    axes: dict[str, Iterable[str]] = {
        "methods": methods, "datasets": datasets, "partitions": partitions
    }  # fmt: skip
    rates = _rates(raw, datasets, partitions)
    experiment = Experiment(
        _keys_of(raw.get("base") or {}, "base"),
        methods,
        datasets,
        _seeds(raw.get("seeds", [0]), "seeds"),
        rates,
        partitions,
        _grid(raw.get("grid") or {}),
        tuple(_more(entry, axes) for entry in _list(raw, "more-seeds")),
        str(raw.get("reference") or "fedpetuning"),
        _targets(raw.get("targets") or {}, datasets),
        tuple(str(k) for k in _list(raw, "unequal")),
        name,
    )
    if raw.get("reference") and experiment.reference not in methods:
        raise UserError(f"reference: no such method {experiment.reference!r}.")
    _refuse_decided(experiment)
    experiment.check()
    return experiment


def _refuse_decided(experiment: Experiment) -> None:
    """Keys that the axes decide must not be set by what they are combined with."""
    decided = {"run.seed": "seeds", "run.dir": "the results folder"}
    if experiment.rates:
        decided["train.lr"] = "learning-rates"
    named = {"methods": experiment.methods, "datasets": experiment.datasets,
             "partitions": experiment.partitions, "grid": {"": experiment.grid}}  # fmt: skip
    for axis, entries in named.items():
        for name, keys in entries.items():
            for key in keys:
                if key in decided:
                    where = f"{axis}.{name}" if name else axis
                    raise UserError(f"{where} sets {key}, which {decided[key]} decides.")
    for key in experiment.grid:
        if all(key in own for own in experiment.methods.values()):
            raise UserError(f"grid: every method sets {key} itself, so the grid changes nothing.")


def _axis(raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    entries = raw[name]
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"{name}: expected names, each with its configuration keys.")
    return {str(k): _keys_of(v or {}, f"{name}.{k}") for k, v in entries.items()}


def _keys_of(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected configuration keys, got {tree!r}.")
    return configs.flatten({str(k): v for k, v in tree.items()})


def _grid(tree: Any) -> dict[str, tuple[Any, ...]]:
    out: dict[str, tuple[Any, ...]] = {}
    for key, values in _keys_of(tree, "grid").items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {key} needs a list of values.")
        if not all(isinstance(v, bool | int | float | str) for v in values):
            raise UserError(f"grid: {key} needs single values, got {values!r}.")
        out[key] = tuple(dict.fromkeys(values))
    return out


def _list(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list, got {value!r}.")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value)
    if not whole:
        raise UserError(f"{where}: expected a list of whole numbers, got {value!r}.")
    return tuple(dict.fromkeys(value))


def _rates(
    raw: Mapping[str, Any], datasets: Iterable[str], partitions: Iterable[str]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """The learning rates at each place: one list for all, or one for each dataset or partition."""
    name, given = "learning-rates", raw.get("learning-rates")
    places = list(itertools.product(datasets, partitions))
    if not isinstance(given, Mapping):
        rates = _numbers(raw, name, name)
        return dict.fromkeys(places, rates) if rates else {}
    for axis, names in enumerate((datasets, partitions)):
        if set(given) == set(names):
            own = {key: _numbers(given, key, f"{name}.{key}") for key in names}
            return {place: own[place[axis]] for place in places}
    raise UserError(
        f"{name}: expected a list of numbers, or one for each of {', '.join(datasets)}"
        + (f", or for each of {', '.join(partitions)}" if any(partitions) else "")
        + f"; got {', '.join(map(str, given))}."
    )


def _numbers(raw: Mapping[str, Any], key: str, name: str) -> tuple[float, ...]:
    try:
        # Through text, since YAML 1.1 takes 6e-4, without a point, for one.
        return tuple(dict.fromkeys(float(str(x)) for x in _list(raw, key)))
    except ValueError:
        raise UserError(f"{name}: expected numbers, got {raw[key]!r}.") from None


def _more(entry: Any, axes: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "seeds" not in entry:
        raise UserError(f"more-seeds: each entry needs `seeds`, got {entry!r}.")
    out: dict[str, Any] = {"seeds": _seeds(entry["seeds"], "more-seeds")}
    for axis, names in entry.items():
        if axis == "seeds":
            continue
        if axis not in axes or not isinstance(names, list):
            raise UserError(f"more-seeds: expected lists of {', '.join(axes)}, got {axis!r}.")
        for name in names:
            if name not in axes[axis]:
                raise UserError(f"more-seeds: no such name {name!r} in {axis}.")
        out[str(axis)] = tuple(names)
    return out


def _targets(tree: Any, datasets: Iterable[str]) -> dict[str, float]:
    if not isinstance(tree, Mapping):
        raise UserError(f"targets: expected an accuracy by dataset, got {tree!r}.")
    for name, value in tree.items():
        if name not in datasets:
            raise UserError(f"targets: no such dataset {name!r}.")
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(f"targets.{name}: expected a share between 0 and 1, got {value!r}.")
    return {str(k): float(v) for k, v in tree.items()}
