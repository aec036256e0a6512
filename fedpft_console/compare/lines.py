"""The lines of an experiment's tables with the runs behind them, and figures of single runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedpft_console.compare.cell import Point, Row, measure_of
from fedpft_console.compare.experiment import Experiment
from fedpft_console.text import BASELINES, Measure

# A federation of its own, which an experiment has as one of its methods.
_ASIDE = ("undistilled",)


# ---------------------------------------------------------------- figures of one run


def score(row: Row, model: str) -> float | None:
    """Value of a model at the end, on the rows the run was scored on.

    Shares are in points, here and in all that is made of it.

    Args:
        row: a result.
        model: `fm`, `proxy` or `fm-as-trained`.

    Returns:
        The value; None where the run has none.
    """
    value = row.get(f"{model}_{row['config'].get('run.eval-split', 'test')}")
    return None if value is None else measure_of(row).scaled(value)


def gap(row: Row) -> float | None:
    """Plug-in gap: sub-FM minus plugged-in FM.

    Args:
        row: a result.

    Returns:
        A difference in points for shares; None where a score is missing.
    """
    fm, proxy = score(row, "fm"), score(row, "proxy")
    return None if fm is None or proxy is None else proxy - fm


def gap_as_trained(row: Row) -> float | None:
    """Plug-in gap of the FM whose head is as clients left it.

    Args:
        row: a result.

    Returns:
        The gap; where the run has no such score, since its head was not changed, that of its FM.
    """
    trained, proxy = score(row, "fm-as-trained"), score(row, "proxy")
    return gap(row) if trained is None or proxy is None else proxy - trained


def rounds_to(row: Row, target: float | None) -> float | None:
    """The first round whose plugged-in FM reached `target`; inf if none did.

    Args:
        row: a result.
        target: a value of the metric as the configuration has it, a share in [0, 1]; None for no
            target.

    Returns:
        The round's number; None where there is no target or no scored round.
    """
    scored = [(n, fm) for n, _, fm in row.get("curve", ()) if fm is not None]
    if target is None or not scored:
        return None
    reached = measure_of(row).reached
    return next((float(n) for n, fm in scored if reached(fm, target)), math.inf)


def _share(part: str, whole: str) -> Callable[[Row], float | None]:
    return lambda r: 100 * r[part] / r[whole] if r.get(part) and r.get(whole) else None


def _scaled(key: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    return lambda r: None if r.get(key) is None else factor * r[key]


def _bytes(key: str) -> Callable[[Row], float | None]:
    return lambda r: sum(r[key].values()) / 1e6 if r.get(key) else None


def end_of(key: str, field_name: str) -> Callable[[Row], float | None]:
    """A function that finds the last known value of a field in a row's list.

    Args:
        key: the list's key in a result, such as `alignments`.
        field_name: the field of the list's entries.

    Returns:
        A function of a result, which gives None where no entry knows the field.
    """

    def last(r: Row) -> float | None:
        known = [e[field_name] for e in r.get(key, ()) if e.get(field_name) is not None]
        return known[-1] if known else None

    return last


def _each_alignment(r: Row) -> float | None:
    seconds = [a["seconds"] for a in r.get("alignments", ())]
    return statistics.fmean(seconds) if seconds else None


@dataclass(frozen=True)
class Figure:
    """A figure of a run, and how tables show it.

    Its name in CSV, heading in tables, format (empty: that of the metric), and where it comes from.
    """

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
BACKDOOR = (
    Figure("backdoor", "with the trigger %", ".1f", _scaled("backdoor", 100)),
    Figure("backdoor_before", "without %", ".1f", _scaled("backdoor_before", 100)),
)
OWNER = (
    Figure("left", "share of FM that left %", ".1f", _share("proxy_parameters", "fm_parameters")),
    Figure(
        "left_blocks", "share of block parameters %", ".1f",
        _share("proxy_block_parameters", "fm_block_parameters"),
    ),
    Figure("proxy_alone", "tuned sub-FM alone", "", lambda r: score(r, "proxy")),
    Figure("plugged_in", "plugged-in FM", "", lambda r: score(r, "fm")),
)  # fmt: skip


# ---------------------------------------------------------------- lines


@dataclass
class Line:
    """A line of the tables and the runs behind it, by seed."""

    point: Point
    cells: dict[int, Row]
    lr: float | None = None
    note: str = ""
    trained: bool = True  # else a reference point: what it has is a `fm` score by seed
    fixed: dict[int, float] = field(default_factory=dict)
    measure: Measure = field(default_factory=Measure)

    def fm(self) -> dict[int, float]:
        """Score of the plugged-in FM by seed.

        Returns:
            In points for shares; of a reference point, its own score.
        """
        if not self.trained:
            return self.fixed
        found = {s: score(r, "fm") for s, r in self.cells.items()}
        return {s: v for s, v in found.items() if v is not None}

    def values(self, of: Callable[[Row], float | None]) -> list[float]:
        """A figure of each run that has it, in order of seeds.

        Args:
            of: finds the figure in a result; None where it is not known.

        Returns:
            The known values; empty for a reference point, which has no runs.
        """
        return [v for r in self.cells.values() if (v := of(r)) is not None]


def lines(experiment: Experiment, rows: Sequence[Row]) -> list[Line]:
    """All lines that have results, reference points after the methods of each place.

    Args:
        experiment: says which lines there are, and in what order.
        rows: results, finished and failed.

    Returns:
        The lines with their runs, each at the learning rate that was chosen for it.
    """
    out: list[Line] = []
    points = experiment.points()
    for place in dict.fromkeys(p.place for p in points):
        here = []
        for point in (p for p in points if p.place == place):
            cells = experiment.chosen(point, rows)
            if cells:
                first = next(iter(cells.values()))
                lr, measure = first["lr"], measure_of(first)
                edge = _edge(experiment, point, lr)
                here.append(Line(point, cells, lr, edge, measure=measure))
        out += here
        out += _references(place, here)
    return out


def _references(place: tuple[str, str], here: Sequence[Line]) -> list[Line]:
    """The reference points that runs at a place have measured."""
    found: dict[str, dict[int, float]] = {}
    for line in here:
        for seed, row in line.cells.items():
            for name, value in row.get("baselines", {}).items():
                found.setdefault(name, {})[seed] = line.measure.scaled(value)
    known = [name for name in BASELINES if name in found]
    names = [n for n in known + sorted(found.keys() - set(known)) if n not in _ASIDE]
    return [
        Line(Point(BASELINES.get(name, name), *place), {}, trained=False,
             fixed=dict(sorted(found[name].items())), measure=here[0].measure)
        for name in names
    ]  # fmt: skip


def common_measure(found: Sequence[Line]) -> Measure | None:
    """The metric that all lines have; None where they have several.

    Args:
        found: lines of the tables.

    Returns:
        The metric; accuracy where there are no lines.
    """
    measures = {line.measure for line in found} or {Measure()}
    return next(iter(measures)) if len(measures) == 1 else None


def place_name(place: tuple[str, str]) -> str:
    """Data set and partition as captions name them.

    Args:
        place: data set and partition, the latter empty where the experiment has none.

    Returns:
        Both, or the one there is.
    """
    return ", ".join(filter(None, place))


def _edge(experiment: Experiment, point: Point, lr: float) -> str:
    """Whether a better rate may lie outside the grid."""
    rates = sorted(experiment.rates.get(point.place, ()))
    if len(rates) < 2 or rates[0] < lr < rates[-1]:
        return ""
    return "highest" if lr == rates[-1] else "lowest"


def reference_of(experiment: Experiment, line: Line, all_lines: Sequence[Line]) -> Line | None:
    """The reference method's line at the same place and the same, or its only, grid point.

    Args:
        experiment: names the reference method.
        line: the line to be compared.
        all_lines: all lines of the experiment, in which the reference is looked for.

    Returns:
        The reference's line; None for the reference method itself, and where no line fits.
    """
    there = [o for o in all_lines if o.trained and o.point.method == experiment.reference
             and o.point.place == line.point.place]  # fmt: skip
    if line.point.method == experiment.reference:
        return None
    same = [o for o in there if o.point.grid == line.point.grid]
    return next(iter(same or (there if len(there) == 1 else [])), None)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a − b over paired seeds and the half-width of its 95% t-interval (NaN below 2).

    Args:
        a: values by seed.
        b: values of the same seeds, in the same order.

    Returns:
        Mean and half-width, in the unit of the values.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    return interval([x - y for x, y in zip(a, b, strict=True)])


def interval(d: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% t-interval (NaN below 2 values).

    Args:
        d: values, or differences, one for each seed.

    Returns:
        Mean (NaN for none) and half-width, in the unit of the values.
    """
    from scipy import stats

    if len(d) < 2:
        return statistics.fmean(d) if d else math.nan, math.nan
    half = stats.t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.fmean(d), float(half)


def differences(line: Line, reference: Line | None) -> list[float]:
    """Scores of the plugged-in FM minus the reference's, by seeds both have.

    Args:
        line: the line to be compared.
        reference: the line it is compared with; None for none.

    Returns:
        A difference for each seed, in points for shares; empty without a reference.
    """
    if reference is None:
        return []
    ours, theirs = line.fm(), reference.fm()
    return [ours[s] - theirs[s] for s in ours if s in theirs]
