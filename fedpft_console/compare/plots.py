"""Plots of an experiment: panels that stand alone in the HTML report, and figures of panels.

A panel is drawn into one matplotlib axis. Colours are of Okabe and Ito's palette, told apart by
readers with any colour vision; the report replaces them by its own for light and dark.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpft_console.compare import gap
from fedpft_console.compare.cell import Row, measure_of
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.lines import Line, lines, place_name
from fedpft_console.web.drawing import COLOURS, INK, RC, Panel, sheet_of
from fedpft_console.web.drawing import draw as draw_panel

_MARKERS = "osD^vP*X<>"
_DOTS = 4  # of fewer marks a scatter plot says nothing


@dataclass(frozen=True)
class Style:
    """How a line of the tables looks in every plot."""

    colour: str
    marker: str


def styles(found: Sequence[Line]) -> dict[str, Style]:
    """Give each method a look, the same in every plot.

    Args:
        found: lines of the tables; reference points get none.

    Returns:
        By label, in order of the tables.
    """
    labels = dict.fromkeys(line.point.label for line in found if line.trained)
    return {
        label: Style(COLOURS[i % len(COLOURS)], _MARKERS[(i + i // len(COLOURS)) % len(_MARKERS)])
        for i, label in enumerate(labels)
    }


def panels(experiment: Experiment, rows: Sequence[Row]) -> list[Panel]:
    """All plots there are data for: scores by round, the gap, then traffic.

    Args:
        experiment: says which lines there are.
        rows: results, finished and failed.

    Returns:
        The panels; those of one file and group follow one another.
    """
    found = lines(experiment, rows)
    look = styles(found)
    places = list(dict.fromkeys(line.point.place for line in found))
    out = []
    for place in places:
        here = [line for line in found if line.point.place == place and line.trained]
        if any(len(_curve(line, 1)) > 1 for line in here):
            out.append(_rounds(place, here, look))
    runs = gap.runs(experiment, rows, found)
    for predictor in gap.PREDICTORS:
        panel = _scatter(runs, predictor, look)
        if panel:
            out.append(panel)
    for place in places:
        here = [line for line in found if line.point.place == place]
        if sum(1 for line in here if line.trained and line.values(_traffic)) > 2:
            out.append(_bytes(place, here, look))
    return out


def _few_ticks(axis: Any, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))


def _labels(here: Sequence[Line]) -> tuple[str, ...]:
    return tuple(line.point.label for line in here if line.trained)


# ---------------------------------------------------------------- scores by round


def _curve(line: Line, index: int) -> dict[int, list[float]]:
    """Scores by round, of all seeds; index 1 is the sub-FM, 2 the plugged-in FM."""
    out: dict[int, list[float]] = {}
    for row in line.cells.values():
        for entry in row.get("curve", ()):
            if entry[index] is not None:
                out.setdefault(entry[0], []).append(line.measure.scaled(entry[index]))
    return dict(sorted(out.items()))


def _rounds(place: tuple[str, str], here: Sequence[Line], look: Mapping[str, Style]) -> Panel:
    measure = here[0].measure

    def draw(axis: Any) -> None:
        for line in here:
            style = look[line.point.label]
            for index, dashes in ((2, "-"), (1, "--")):
                curve = _curve(line, index)
                if not curve:
                    continue
                x, y = list(curve), [statistics.fmean(v) for v in curve.values()]
                axis.plot(x, y, dashes, color=style.colour, linewidth=1.6,
                          marker=style.marker if index == 2 else None, markersize=4)  # fmt: skip
                if index == 2 and any(len(v) > 1 for v in curve.values()):
                    axis.fill_between(x, [min(v) for v in curve.values()],
                                      [max(v) for v in curve.values()], color=style.colour,
                                      alpha=0.13, linewidth=0)  # fmt: skip
        axis.set_xlabel("round")
        _few_ticks(axis, whole=True)
        axis.set_ylabel(measure.axis)
        axis.grid(axis="y", alpha=0.15)

    return Panel(
        "rounds",
        f"{measure.title} by round",
        place_name(place),
        "Mean over seeds. Solid: plugged-in FM, shaded from the worst to the best seed. "
        "Dashed: sub-FM.",
        _labels(here),
        draw,
    )


# ---------------------------------------------------------------- what goes with the gap


def _scatter(
    runs: Sequence[gap.Run], predictor: gap.Predictor, look: Mapping[str, Style]
) -> Panel | None:
    dots = gap.dots(runs, predictor)
    unit = ", points" if all(measure_of(run.row).share for run in runs) else ""
    if len(dots) < _DOTS:
        return None
    measured = gap.correlations(dots)
    said = "; ".join(
        f"{where} (n = {n}): ρ = {r:+.2f}, p {gap.p_value(p)}" for where, n, r, p in measured
    )

    def draw(axis: Any) -> None:
        for label in dict.fromkeys(d.label for d in dots):
            own = [d for d in dots if d.label == label]
            axis.scatter([d.x for d in own], [d.y for d in own], color=look[label].colour,
                         marker=look[label].marker, s=26, alpha=0.85, linewidth=0)  # fmt: skip
        axis.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        axis.set_xlabel(predictor.unit)
        _few_ticks(axis)
        axis.set_ylabel(f"sub-FM minus FM{unit}")
        axis.grid(alpha=0.15)

    name = predictor.name
    return Panel(
        "gap",
        "Plug-in gap and what may predict it",
        name[0].upper() + name[1:] + (f": ρ = {measured[0][2]:+.2f}" if measured else ""),
        "One mark per run, at every learning rate; the FM's head is as trained. "
        + (f"Spearman's rank correlation: {said}." if said else "Too few for a correlation."),
        tuple(dict.fromkeys(d.label for d in dots)),
        draw,
    )


# ---------------------------------------------------------------- bytes and scores


def _traffic(row: Row) -> float | None:
    return sum(row["bytes"].values()) / 1e6 if row.get("bytes") else None


def _bytes(place: tuple[str, str], here: Sequence[Line], look: Mapping[str, Style]) -> Panel:
    measure = here[0].measure

    def draw(axis: Any) -> None:
        for line in here:
            traffic, fm = line.values(_traffic), list(line.fm().values())
            if not line.trained:
                if fm:
                    dashes = (5, 3) if "probe" in line.point.method else (1, 2)
                    mean = statistics.fmean(fm)
                    axis.axhline(mean, color=INK, linewidth=0.9, alpha=0.6, dashes=dashes)
                continue
            if traffic and fm:
                style = look[line.point.label]
                error = statistics.stdev(fm) if len(fm) > 1 else 0.0
                axis.errorbar(statistics.fmean(traffic), statistics.fmean(fm), yerr=error,
                              color=style.colour, marker=style.marker, markersize=6,
                              capsize=3, linewidth=1.3)  # fmt: skip
        axis.set_xlabel("traffic of a run, MB")
        axis.set_ylabel(
            "plugged-in FM, points" if measure.share else f"plugged-in FM, {measure.name}"
        )
        axis.grid(alpha=0.15)
        low, high = axis.get_xlim()
        traffics = [t for line in here for t in line.values(_traffic)]
        if traffics and max(traffics) > 8 * min(traffics):
            axis.set_xscale("log")
        else:
            axis.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            _few_ticks(axis)

    rest = [line.point.method for line in here if not line.trained]
    drawn = f" Lines: {', '.join(rest)} (dashed, dotted)." if rest else ""
    return Panel(
        "traffic", f"Traffic against {measure.name}", place_name(place),
        f"Mean and standard deviation over seeds; both ways, all clients.{drawn}",
        _labels(here), draw,
    )  # fmt: skip


# ---------------------------------------------------------------- files


def files(experiment: Experiment, rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG and SVG of each group of panels, by file name.

    Args:
        experiment: says which lines there are.
        rows: results, finished and failed.

    Returns:
        Contents by name, such as `rounds.png`; equal cells give equal bytes of SVG.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    by_file: dict[str, list[Panel]] = {}
    for panel in panels(experiment, rows):
        by_file.setdefault(panel.file, []).append(panel)
    look = styles(lines(experiment, rows))
    out: dict[str, bytes] = {}
    for name, some in by_file.items():
        labels = dict.fromkeys(label for panel in some for label in panel.labels)
        with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
            figure, axes = sheet_of(len(some), len(labels))
            for panel, axis in zip(some, axes, strict=True):
                draw_panel(panel, axis, titled=True)
            handles = [
                Line2D([], [], color=look[k].colour, marker=look[k].marker, label=k) for k in labels
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)),
                          frameon=False)  # fmt: skip
            figure.suptitle(some[0].group)
            for kind, more in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
                data = io.BytesIO()
                figure.savefig(data, format=kind, **more)
                out[f"{name}.{kind}"] = data.getvalue()
    return out
