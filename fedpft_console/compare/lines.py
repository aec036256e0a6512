"""The lines of an experiment's tables with the runs behind them, and figures of single runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedpft_console.compare.experiment import Experiment, Point, Row
from fedpft_console.progress import BASELINES

NOT_TRAINED = ("linear-probe", "tf-idf")


# ---------------------------------------------------------------- figures of one run


def accuracy(row: Row, model: str) -> float | None:
    """Accuracy of `fm` or `proxy` at the end, in points, on the rows the run was scored on."""
    value = row.get(f"{model}_{row['config'].get('run.eval-split', 'test')}")
    return None if value is None else 100 * value


def gap(row: Row) -> float | None:
    """Plug-in gap in points: sub-FM minus plugged-in FM."""
    fm, proxy = accuracy(row, "fm"), accuracy(row, "proxy")
    return None if fm is None or proxy is None else proxy - fm


def gap_as_trained(row: Row) -> float | None:
    """Plug-in gap in points of the FM whose head is as clients left it."""
    trained, proxy = accuracy(row, "fm-as-trained"), accuracy(row, "proxy")
    return gap(row) if trained is None or proxy is None else proxy - trained


def rounds_to(row: Row, target: float | None) -> float | None:
    """The first round whose plugged-in FM reached `target` (a share); inf if none did."""
    scored = [(n, fm) for n, _, fm in row.get("curve", ()) if fm is not None]
    if target is None or not scored:
        return None
    return next((float(n) for n, fm in scored if fm >= target), math.inf)


def _share(part: str, whole: str) -> Callable[[Row], float | None]:
    return lambda r: 100 * r[part] / r[whole] if r.get(part) and r.get(whole) else None


def _scaled(key: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    return lambda r: None if r.get(key) is None else factor * r[key]


def _bytes(key: str) -> Callable[[Row], float | None]:
    return lambda r: sum(r[key].values()) / 1e6 if r.get(key) else None


def end_of(key: str, field_name: str) -> Callable[[Row], float | None]:
    """The last known value of a field in a row's list."""

    def last(r: Row) -> float | None:
        known = [e[field_name] for e in r.get(key, ()) if e.get(field_name) is not None]
        return known[-1] if known else None

    return last


def _each_alignment(r: Row) -> float | None:
    seconds = [a["seconds"] for a in r.get("alignments", ())]
    return statistics.fmean(seconds) if seconds else None


@dataclass(frozen=True)
class Figure:
    """A figure of a run: its name in CSV, heading in tables, format, and where it comes from."""

    name: str
    heading: str
    form: str
    of: Callable[[Row], float | None]


AGREEMENT = (
    Figure("cosine_start", "gradient cosine at start", ".2f", _scaled("cosine_start")),
    Figure("cosine_end", "at end", ".2f", _scaled("cosine_end")),
    Figure("relative_l2_end", "relative L2 at end", ".2f", end_of("agreement", "relative_l2")),
    Figure("error_before", "output error before", ".3f", _scaled("output_error_before")),
    Figure("error_after", "after distillation", ".3f", _scaled("output_error")),
    Figure("error_aligned", "after last re-alignment", ".3f", end_of("alignments", "error_after")),
    Figure("adapter_norm", "adapter norm", ".1f", _scaled("adapter_norm")),
)
COST = (
    Figure("mb", "traffic MB", ".0f", _bytes("bytes")),
    Figure("mb_down", "to clients MB", ".0f", _bytes("bytes_down")),
    Figure("mb_up", "from clients MB", ".1f", _bytes("bytes_up")),
    Figure("client_tflop", "clients TFLOP", ".2f", _scaled("client_flops", 1e-12)),
    Figure("step_ms", "client step ms", ".0f", _scaled("step_seconds", 1e3)),
    Figure("distil_s", "distillation s", ".0f", _scaled("distil_seconds")),
    Figure("align_s", "per re-alignment s", ".1f", _each_alignment),
    Figure("peak_mb", "peak memory MB", ".0f", _scaled("peak_bytes", 1e-6)),
    Figure("cell_s", "whole cell s", ".0f", _scaled("seconds")),
)
OWNER = (
    Figure("left", "share of FM that left %", ".1f", _share("proxy_parameters", "fm_parameters")),
    Figure(
        "left_blocks", "share of block parameters %", ".1f",
        _share("proxy_block_parameters", "fm_block_parameters"),
    ),
    Figure("proxy_alone", "tuned sub-FM alone", ".1f", lambda r: accuracy(r, "proxy")),
    Figure("plugged_in", "plugged-in FM", ".1f", lambda r: accuracy(r, "fm")),
)  # fmt: skip


# ---------------------------------------------------------------- lines


@dataclass
class Line:
    """A line of the tables and the runs behind it, by seed."""

    point: Point
    cells: dict[int, Row]
    lr: float | None = None
    note: str = ""
    trained: bool = True  # else a reference point: what it has is a `fm` accuracy by seed
    fixed: dict[int, float] = field(default_factory=dict)

    def fm(self) -> dict[int, float]:
        """Accuracy of the plugged-in FM by seed, in points."""
        if not self.trained:
            return self.fixed
        found = {s: accuracy(r, "fm") for s, r in self.cells.items()}
        return {s: v for s, v in found.items() if v is not None}

    def values(self, of: Callable[[Row], float | None]) -> list[float]:
        """A figure of each run that has it, in order of seeds."""
        return [v for r in self.cells.values() if (v := of(r)) is not None]


def lines(experiment: Experiment, rows: Sequence[Row]) -> list[Line]:
    """All lines that have results, reference points after the methods of each place."""
    out: list[Line] = []
    points = experiment.points()
    for place in dict.fromkeys(p.place for p in points):
        here = []
        for point in (p for p in points if p.place == place):
            cells = experiment.chosen(point, rows)
            if cells:
                lr = next(iter(cells.values()))["lr"]
                here.append(Line(point, cells, lr, _edge(experiment, point, lr)))
        out += here
        for name in NOT_TRAINED:
            fixed = {s: 100 * r[name] for li in here for s, r in li.cells.items() if name in r}
            if fixed:
                point = Point(BASELINES.get(name, name), *place)
                out.append(Line(point, {}, trained=False, fixed=dict(sorted(fixed.items()))))
    return out


def place_name(place: tuple[str, str]) -> str:
    """Data set and partition as captions name them."""
    return ", ".join(filter(None, place))


def _edge(experiment: Experiment, point: Point, lr: float) -> str:
    """Whether a better rate may lie outside the grid."""
    rates = sorted(experiment.rates.get(point.place, ()))
    if len(rates) < 2 or rates[0] < lr < rates[-1]:
        return ""
    return "highest" if lr == rates[-1] else "lowest"


def reference_of(experiment: Experiment, line: Line, all_lines: Sequence[Line]) -> Line | None:
    """The reference method's line at the same place and the same, or its only, grid point."""
    there = [o for o in all_lines if o.trained and o.point.method == experiment.reference
             and o.point.place == line.point.place]  # fmt: skip
    if line.point.method == experiment.reference:
        return None
    same = [o for o in there if o.point.grid == line.point.grid]
    return next(iter(same or (there if len(there) == 1 else [])), None)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a − b over paired seeds and the half-width of its 95% t-interval (NaN below 2)."""
    return interval([x - y for x, y in zip(a, b, strict=True)])


def interval(d: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% t-interval (NaN below 2 values)."""
    from scipy import stats

    if len(d) < 2:
        return statistics.fmean(d) if d else math.nan, math.nan
    half = stats.t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.fmean(d), float(half)


def differences(line: Line, reference: Line | None) -> list[float]:
    """Points over the reference, by seeds both have."""
    if reference is None:
        return []
    ours, theirs = line.fm(), reference.fm()
    return [ours[s] - theirs[s] for s in ours if s in theirs]
