"""`fedpft compare`: a grid of runs in process, resumable cell by cell, as JSON lines.

An experiment file (YAML) has `base` (configuration keys), `methods` (name → keys), `datasets`
(name → keys), `seeds`, and optionally `learning-rates`: then each method and dataset takes the
rate with the best validation accuracy of the plugged-in FM at the first seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import config as configs
from .errors import RunError, UserError
from .events import EventLog, read_events

_KEYS = {"base", "methods", "datasets", "seeds", "learning-rates"}
# Keys that say where or how fast a cell runs, not what it computes.
_GONE = object()
_DEFAULTS = {name: info.default for name, info in configs.keys().items()}
_NO_RESULT = ("run.dir", "run.resume", "run.stop-after", "run.checkpoints", "run.threads")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    dataset: str
    seed: int
    lr: float
    flat: dict[str, Any]

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Every key that decides what the cell computes, with its value."""
        full = configs.to_flat(configs.from_flat(self.flat))
        return {k: v for k, v in full.items() if k not in _NO_RESULT}

    def digest(self) -> str:
        """Name of the cell's run folder: a hash of `resolved`."""
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The result of a run of this very configuration, if there is one.

        Keys that did not exist when the row was written count as having their default: a new
        key's default must leave what was computed before as it was.
        """
        for row in rows:
            then = row["config"]
            if "failed" in row or any(self.resolved.get(k, _GONE) != v for k, v in then.items()):
                continue
            if all(v == _DEFAULTS[k] for k, v in self.resolved.items() if k not in then):
                return row
        return None


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file."""

    base: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    @staticmethod
    def read(path: Path) -> Experiment:
        """Raises UserError naming the file and what is wrong with it."""
        import yaml

        if not path.is_file():
            raise UserError(f"{path}: no such experiment file.")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
        if not isinstance(raw, Mapping) or not {"methods", "datasets"} <= raw.keys():
            raise UserError(f"{path}: an experiment needs `methods` and `datasets`.")
        if raw.keys() - _KEYS:
            odd = sorted(raw.keys() - _KEYS)[0]
            raise UserError(f"{path}: no such key {odd!r} (known: {', '.join(sorted(_KEYS))}).")
        return Experiment(
            configs.flatten(raw.get("base") or {}),
            {str(k): configs.flatten(v or {}) for k, v in raw["methods"].items()},
            {str(k): configs.flatten(v or {}) for k, v in raw["datasets"].items()},
            tuple(raw.get("seeds") or (0,)),
            tuple(float(x) for x in raw.get("learning-rates") or ()),
        )

    def cell(self, method: str, dataset: str, seed: int, lr: float | None) -> Cell:
        flat = self.base | self.datasets[dataset] | self.methods[method] | {"run.seed": seed}
        if lr is not None:
            flat["train.lr"] = lr
        config = configs.from_flat(flat)
        return Cell(method, dataset, seed, config.train.lr, flat)


def run(experiment: Experiment, folder: Path, say: Any = print) -> int:
    """Run every cell that has no result yet; returns how many failed.

    A failed cell is recorded with its reason and the rest goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in experiment.datasets:
        for method in experiment.methods:
            rates: Sequence[float | None] = experiment.rates or (None,)
            first = [
                _result(experiment.cell(method, dataset, experiment.seeds[0], lr), folder, say)
                for lr in rates
            ]
            best = best_rate(first)
            for seed in experiment.seeds[1:]:
                _result(experiment.cell(method, dataset, seed, best), folder, say)
    last = {r["digest"]: r for r in results(folder)}
    return sum(1 for r in last.values() if "failed" in r)


def best_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The learning rate with the best validation accuracy of the product, lowest on a tie."""
    good = [r for r in rows if "fm_validation" in r]
    if not good:
        return None
    return float(max(good, key=lambda r: (r["fm_validation"], -r["lr"]))["lr"])


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """The cells' rows, in file order."""
    path = folder / "cells.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _result(cell: Cell, folder: Path, say: Any) -> dict[str, Any]:
    found = cell.find(results(folder))
    if found:
        return dict(found)
    digest = cell.digest()
    row: dict[str, Any] = {
        "digest": digest, "method": cell.method, "dataset": cell.dataset, "seed": cell.seed,
        "lr": cell.lr, "config": cell.resolved,
    }  # fmt: skip
    start = time.perf_counter()
    try:
        row |= run_cell(cell, folder / "runs" / digest)
    except Exception as error:
        # Whatever it was, hours of other cells are waiting.
        known = isinstance(error, UserError | RunError)
        row["failed"] = str(error) if known else f"{type(error).__name__}: {error}"
    finally:
        for bulky in ("clients", "checkpoints"):
            shutil.rmtree(folder / "runs" / digest / bulky, ignore_errors=True)
    row["seconds"] = round(time.perf_counter() - start, 1)
    with open(folder / "cells.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    figures = ", ".join(f"{k} {row[k]:.4f}" for k in ("fm_test", "proxy_test") if k in row)
    say(
        f"{cell.dataset} {cell.method} seed {cell.seed} lr {cell.lr:g}: "
        + (row.get("failed") or figures)
    )
    return row


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """One run in this process, clients after one another, and what the tables need of it."""
    # The composition root: the pipeline lives in the apps, which this package may not import
    # at its top.
    from client_app.node import client_for
    from server_app.app import run as run_server
    from server_app.transport import LocalTransport

    flat = cell.flat | {"run.dir": str(folder)}
    config = configs.from_flat(flat)
    count = config.federation.clients
    log_path = folder / "events.jsonl"
    log_path.unlink(missing_ok=True)
    clients = {
        i + 1: client_for({"partition-id": i, "num-partitions": count}, flat).handle
        for i in range(count)
    }
    log = EventLog(log_path)
    try:
        run_server(config, LocalTransport(clients), log)
    finally:
        log.close()
    return summary([event for _, event in read_events(log_path)])


def summary(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one run: end accuracies, agreement, errors, norm, bytes, seconds."""
    out: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for e in events:
        if "arm" in e:
            continue
        if e["event"] == "evaluation":
            out[f"{e['model']}_{e['split']}"] = e["accuracy"]
        elif e["event"] == "validation":
            out[f"{e['model']}_validation"] = e["accuracy"]
        elif e["event"] == "agreement":
            out[f"cosine_{e['when']}"] = e["cosine"]
        elif e["event"] == "adapter":
            out["adapter_norm"] = e["norm"]
        elif e["event"] == "distilled":
            errors = e["output_error"].values()
            out["output_error"] = sum(errors) / len(errors)
        elif e["event"] == "baseline":
            out[e["name"]] = e["accuracy"]
        elif e["event"] == "bytes":
            sizes[e["kind"]] = sizes.get(e["kind"], 0) + e["bytes"]
        elif e["event"] == "phase_finished" and e["phase"] in ("distil", "align"):
            out[f"{e['phase']}_seconds"] = out.get(f"{e['phase']}_seconds", 0.0) + e["seconds"]
        elif e["event"] == "model":
            out["proxy_block_parameters"] = e["proxy_block_parameters"]
    return out | {"bytes": sizes}


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a − b over paired seeds and the half-width of its 95% t-interval (NaN below 2)."""
    from scipy import stats

    d = [x - y for x, y in zip(a, b, strict=True)]
    if len(d) < 2:
        return statistics.fmean(d) if d else math.nan, math.nan
    half = stats.t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.fmean(d), float(half)


def table(experiment: Experiment, folder: Path, reference: str) -> str:
    """Markdown: mean ± std over seeds, and the paired difference to `reference`, in points."""
    rows = list(results(folder))
    lines = [
        "| dataset | method | lr | n | plugged-in FM | proxy | gap | difference to "
        f"{reference} (95% interval) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dataset in experiment.datasets:
        chosen = {m: _chosen(experiment, m, dataset, rows) for m in experiment.methods}
        for method, cells in chosen.items():
            if not cells:
                continue
            fm = [100 * c["fm_test"] for c in cells.values()]
            proxy = [100 * c["proxy_test"] for c in cells.values()]
            seeds = sorted(cells.keys() & chosen.get(reference, {}).keys())
            diff = ""
            if method != reference and seeds:
                mean, half = paired(
                    [100 * cells[s]["fm_test"] for s in seeds],
                    [100 * chosen[reference][s]["fm_test"] for s in seeds],
                )
                diff = f"{mean:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
            gap = statistics.fmean(p - f for p, f in zip(proxy, fm, strict=True))
            lr = next(iter(cells.values()))["lr"]
            lines.append(
                f"| {dataset} | {method} | {lr:g} | {len(fm)} | {_spread(fm)} | {_spread(proxy)} "
                f"| {gap:+.1f} | {diff} |"
            )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    std = statistics.stdev(values)
    each = ", ".join(f"{v:.1f}" for v in values)
    return f"{statistics.fmean(values):.1f} ± {std:.1f} ({each})"


def _chosen(
    experiment: Experiment, method: str, dataset: str, rows: Sequence[Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """By seed, the cells at the learning rate chosen on validation data."""

    def row(seed: int, lr: float | None) -> Mapping[str, Any] | None:
        return experiment.cell(method, dataset, seed, lr).find(rows)

    grid = [row(experiment.seeds[0], lr) for lr in experiment.rates or (None,)]
    best = best_rate([r for r in grid if r])
    if best is None:
        return {}
    cells = {seed: row(seed, best) for seed in experiment.seeds}
    return {seed: c for seed, c in cells.items() if c}
