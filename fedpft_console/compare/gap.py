"""What goes with the plug-in gap: figures of single runs against the gap.

The gap is sub-FM minus plugged-in FM whose head is as trained: refitting it (plug.refit) is a
remedy for what is studied here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpft_console.compare.cell import Row
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.lines import Line, end_of, gap_as_trained, place_name
from fedpft_console.report.tables import Sheet


@dataclass(frozen=True)
class Predictor:
    """A figure that may predict the gap: its name, its unit, and where it comes from."""

    name: str
    unit: str
    of: Callable[[Row], float | None]


@dataclass(frozen=True)
class Run:
    """A finished run with a sub-FM, the line it belongs to, and its place."""

    label: str
    place: tuple[str, str]
    row: Row


@dataclass(frozen=True)
class Dot:
    """A run: the line it belongs to, its place, the predictor's value and the gap."""

    label: str
    place: tuple[str, str]
    x: float
    y: float


def _disagreement(key: str) -> Callable[[Row], float | None]:
    return lambda r: None if r.get(key) is None else 1 - r[key]


def _last_error(r: Row) -> float | None:
    after: float | None = end_of("alignments", "error_after")(r)
    return r.get("output_error") if after is None else after


PREDICTORS = (
    Predictor("gradients at the start", "1 − cosine", _disagreement("cosine_start")),
    Predictor("gradients at the end", "1 − cosine", _disagreement("cosine_end")),
    Predictor("gradients at the end, distance", "relative L2", end_of("agreement", "relative_l2")),
    Predictor("output error", "pruned blocks, last alignment", _last_error),
    Predictor(
        "features the head reads", "distance over variance", lambda r: r.get("refit_error_before")
    ),
    Predictor("adapter norm", "L2, at the end", lambda r: r.get("adapter_norm")),
)


def runs(experiment: Experiment, rows: Sequence[Row], found: Sequence[Line]) -> list[Run]:
    """Every finished run with a sub-FM behind the lines, at every learning rate, once.

    Args:
        experiment: says at which rates each line was tried.
        rows: results, finished and failed.
        found: lines of the tables; reference points among them have no runs.

    Returns:
        The runs; those whose clients hold the FM itself (`plan.proxy` is `full`) are left out.
    """
    out: dict[int, Run] = {}
    for line in found:
        if not line.trained:
            continue
        tried = [r for c in experiment.first(line.point) if (r := c.find(rows))]
        for row in [*tried, *line.cells.values()]:
            if row["config"].get("plan.proxy") != "full":
                out.setdefault(id(row), Run(line.point.label, line.point.place, row))
    return list(out.values())


def dots(some: Sequence[Run], predictor: Predictor) -> list[Dot]:
    """The runs that have both figure and gap.

    Args:
        some: runs of one experiment.
        predictor: the figure to hold against the gap.

    Returns:
        A dot for each; the gap is in points for shares, in the metric's unit otherwise.
    """
    out = []
    for run in some:
        x, y = predictor.of(run.row), gap_as_trained(run.row)
        if x is not None and y is not None:
            # Differences of shares carry rounding noise, which would part what is tied.
            out.append(Dot(run.label, run.place, round(x, 9), round(y, 9)))
    return out


def correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Spearman's rank correlation and its p-value; None below four runs or without spread.

    Args:
        x: a figure of each run.
        y: another figure of the same runs, in the same order.

    Returns:
        ρ in [-1, 1] and p in [0, 1].
    """
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy import stats

    found = stats.spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def correlations(found: Sequence[Dot]) -> list[tuple[str, int, float, float]]:
    """Rank correlations over all runs and, where there are several places, on each place alone.

    Args:
        found: dots of one predictor.

    Returns:
        (where, runs, ρ, p), `all` first; parts that are too small for a correlation are left out.
    """
    places = list(dict.fromkeys(d.place for d in found))
    parts = {"all": list(found)}
    if len(places) > 1:
        parts |= {place_name(p): [d for d in found if d.place == p] for p in places}
    out = []
    for name, some in parts.items():
        measured = correlation([d.x for d in some], [d.y for d in some])
        if measured:
            out.append((name, len(some), *measured))
    return out


def p_value(p: float) -> str:
    """A p-value with its relation sign, as papers write it.

    Args:
        p: the p-value, in [0, 1].

    Returns:
        `< 0.001` or `= ` with two significant digits.
    """
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def sheet(some: Sequence[Run]) -> Sheet:
    """The correlations of every predictor as a table.

    Args:
        some: runs of one experiment.

    Returns:
        The table, without rows where there is no correlation.
    """
    out = []
    for predictor in PREDICTORS:
        for where, n, rho, p in correlations(dots(some, predictor)):
            what = f"{predictor.name} ({predictor.unit})"
            out.append([what, where, str(n), f"{rho:+.2f}", p_value(p).removeprefix("= ")])
    notes = [
        "Spearman's rank correlation ρ of a run's figure with its gap, sub-FM minus FM with the "
        "head as trained; every run at every learning rate. Runs of one seed share partition and "
        "start, so p is smaller than it should be."
    ]
    return Sheet("What goes with the plug-in gap", ["figure", "where", "n", "ρ", "p"], out, notes)
