"""Plots of an experiment: panels that stand alone in the HTML report, and figures of panels.

A panel is drawn into one matplotlib axis. Colours are of Okabe and Ito's palette, told apart by
readers with any colour vision; the report replaces them by its own for light and dark.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpft_console.compare import gap
from fedpft_console.compare.cell import Row, measure_of
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.lines import Line, lines, place_name

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D",
    "#666666", "#1B7837",
)  # fmt: skip
INK = "#222222"  # axes and text
_MARKERS = "osD^vP*X<>"
_WIDTH, _HEIGHT = 3.6, 2.9  # inches of one panel


@dataclass(frozen=True)
class Panel:
    """One plot, and how it is drawn.

    Its file and group, heading and caption, the labels it shows, and what draws it into an axis.
    """

    file: str
    group: str
    title: str
    caption: str
    labels: tuple[str, ...]
    draw: Callable[[Any], None]


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
        if any(line.values(_traffic) for line in here):
            out.append(_bytes(place, here, look))
    return out


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
    if len(dots) < 2:
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
        axis.set_ylabel(f"gap of the head as trained{unit}")
        axis.grid(alpha=0.15)

    name = predictor.name
    return Panel(
        "gap",
        "Plug-in gap and what may predict it",
        name[0].upper() + name[1:] + (f": ρ = {measured[0][2]:+.2f}" if measured else ""),
        "One mark per run, at every learning rate. "
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

    rest = [line.point.method for line in here if not line.trained]
    drawn = f" Lines: {', '.join(rest)} (dashed, dotted)." if rest else ""
    return Panel(
        "traffic", f"Traffic against {measure.name}", place_name(place),
        f"Mean and standard deviation over seeds; both ways, all clients.{drawn}",
        _labels(here), draw,
    )  # fmt: skip


# ---------------------------------------------------------------- files


def svg(panel: Panel, salt: str) -> str:
    """One panel as an SVG element, its text as text; equal panels give equal bytes.

    Args:
        panel: what to draw.
        salt: decides the ids in the drawing; of two panels on one page each needs its own.

    Returns:
        The element, without an XML head.
    """
    import matplotlib

    with matplotlib.rc_context(_RC | {"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure, axes = _figure(1)
        _draw(panel, axes[0], titled=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Several stand in one page, and the names of groups (figure_1, axes_1) say nothing there.
    return re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", text)


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
        with matplotlib.rc_context(_RC | {"svg.hashsalt": name}):
            figure, axes = _figure(len(some), len(labels))
            for panel, axis in zip(some, axes, strict=True):
                _draw(panel, axis, titled=True)
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


_RC: Any = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
}  # fmt: skip


def _figure(panels: int, labels: int = 0) -> tuple[Any, list[Any]]:
    # Figure rather than pyplot: no global state, and no window system is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = math.ceil(panels / columns)
    legend = 0.3 * math.ceil(labels / 4)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + legend), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _draw(panel: Panel, axis: Any, titled: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.draw(axis)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_xscale() == "linear":
        whole = panel.file == "rounds"
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))
    if titled:
        axis.set_title(panel.title, fontsize=10)
