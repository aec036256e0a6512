"""An experiment file, read and checked.

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
    targets: {trec6: 0.9}              # optional: values of the metric that rounds are counted to
    unequal: [data.max-length]         # optional: keys in which methods differ on purpose

Later ones win: base, dataset, partition, grid, method. So a method that sets a key of the grid
itself keeps its own value, and has one line instead of several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedpft_console.compare.experiment import Experiment
from fedpft_core import config as configs
from fedpft_core.errors import UserError

_KEYS = (
    "base", "methods", "datasets", "partitions", "grid", "seeds", "more-seeds", "learning-rates",
    "reference", "targets", "unequal",
)  # fmt: skip


def read(path: Path) -> Experiment:
    """Read an experiment file.

    Args:
        path: the file, in YAML; its name without the ending is the experiment's.

    Returns:
        The experiment, whose lines can all be run and compared.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
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
        raise UserError(f"targets: expected a value of the metric by dataset, got {tree!r}.")
    for name, value in tree.items():
        if name not in datasets:
            raise UserError(f"targets: no such dataset {name!r}.")
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(f"targets.{name}: expected a share between 0 and 1, got {value!r}.")
    return {str(k): float(v) for k, v in tree.items()}
