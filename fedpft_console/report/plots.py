"""The plot of a report: scores, traffic and agreement by round."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from fedpft_console.report.tables import kinds
from fedpft_console.text import BASELINES, Measure
from fedpft_console.web.drawing import COLOURS, Panel
from server_app.run.record import DIRECTIONS, Record, Round

_BLUE, _RED, _GREEN, _PURPLE, _ORANGE = COLOURS[:5]
_GREY = COLOURS[8]
_HEIGHT = 3.7  # inches of a panel with its legend
_WAY = {"down": "to clients", "up": "from clients"}
_KIND_COLOURS = {
    "package": _BLUE, "patch": _ORANGE, "adapter": _GREEN, "counts": _PURPLE, "control": _GREY,
}  # fmt: skip


def plot_png(record: Record) -> bytes | None:
    """Scores, traffic and agreement by round as a PNG.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        The file's content, with a panel for each of the three that there is data for; None when no
        round was scored.
    """
    found = panels(record)
    if not found or found[0].file != "scores":
        return None
    # Figure rather than pyplot: no global state, and no window system is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(found), squeeze=False)[0])
    for axis, panel in zip(axes, found, strict=True):
        panel.draw(axis)
        axis.set_title(panel.title)
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def panels(record: Record) -> list[Panel]:
    """The plots there are data for: scores, traffic and agreement by round.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Up to three panels, in this order.
    """
    rounds, measure = record.rounds, Measure.of(record.task)
    scored = [r for r in rounds if r.proxy or r.fm]
    traffic = [r for r in rounds if any(r.bytes[d] for d in DIRECTIONS)]
    compared = [r for r in rounds if r.agreements or r.alignment_errors()[1] is not None]
    out = []
    if scored:
        out.append(_panel("scores", measure.title, "Bars are one standard error.", scored,
                          lambda axis: _plot_scores(axis, record, scored)))  # fmt: skip
    if traffic:
        out.append(_panel("traffic", "Traffic per round", "All clients of the round together.",
                          traffic,
                          lambda axis: _plot_traffic(axis, kinds(record), traffic)))  # fmt: skip
    if compared:
        out.append(_panel("agreement", "Agreement of sub-FM and FM",
                          "Of the adapter's gradients, on the same rows.", compared,
                          lambda axis: _plot_agreement(axis, compared)))  # fmt: skip
    return out


def _panel(
    file: str, title: str, caption: str, rounds: list[Round], draw: Callable[[Any], None]
) -> Panel:
    """A panel over rounds, whose ticks are whole rounds and whose marks are not cut off."""
    from matplotlib.ticker import MaxNLocator

    numbers = [r.number for r in rounds]

    def drawn(axis: Any) -> None:
        draw(axis)
        axis.set_xlabel("round")
        # Below the axis, where it hides no mark.
        if axis.get_legend_handles_labels()[0]:  # a figure that no round has draws nothing
            axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
                        frameon=False, handlelength=1.6)  # fmt: skip
        if len(numbers) <= 6:
            axis.set_xticks(numbers)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if numbers[0] == numbers[-1]:
            axis.set_xlim(numbers[0] - 1, numbers[0] + 1)

    return Panel(file, "By round", title, caption, (), drawn, _HEIGHT)


def _plot_scores(axis: Any, record: Record, scored: list[Round]) -> None:
    measure = Measure.of(record.task)
    for label, colour, marker, model in (
        ("sub-FM", _BLUE, "o", "proxy"),
        ("plugged-in FM", _RED, "s", "fm"),
    ):
        points = [(r.number, r.scores[model]) for r in scored if model in r.scores]
        if not points:
            continue
        x = [n for n, _ in points]
        y = [measure.scaled(p.value) for _, p in points]
        bars = [measure.scaled(p.error or 0.0) for _, p in points]
        # The sub-FM's marker is open and larger: of two equal scores none hides the other.
        axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, capsize=2, linewidth=1.6,
                      markersize=8 if model == "proxy" else 4, label=label,
                      fillstyle="none" if model == "proxy" else "full")  # fmt: skip
    for (name, score), dashes in zip(
        record.baselines.items(), ((6, 2), (2, 2), (1, 3), (8, 2, 1, 2)), strict=False
    ):
        axis.axhline(measure.scaled(score.value), color=_GREY, linewidth=1.1, dashes=dashes,
                     label=BASELINES.get(name, name))  # fmt: skip
    aligned = [r for r in record.rounds if r.alignment]
    moved = [
        (r.number + 0.5, measure.scaled(r.proxy.value + moved))
        for r in aligned
        if r.proxy and r.alignment and (moved := r.alignment.moved) is not None
    ]
    if moved:
        axis.plot(*zip(*moved, strict=True), "o", color=_BLUE, fillstyle="none", markersize=5,
                  label="sub-FM re-aligned")  # fmt: skip
    for i, r in enumerate(aligned):
        axis.axvline(r.number + 0.5, color=_GREEN, alpha=0.35, linewidth=3,
                     label="re-alignment" if i == 0 else None)  # fmt: skip
    axis.set_ylabel("%" if measure.share else measure.name)
    axis.grid(axis="y", alpha=0.25)


def _plot_traffic(axis: Any, occurred: list[str], traffic: list[Round]) -> None:
    base = dict.fromkeys((r.number for r in traffic), 0.0)
    tallest = max(sum(sum(r.bytes[d].values()) for d in DIRECTIONS) for r in traffic) / 1e6
    for direction in DIRECTIONS:
        for kind in occurred:
            heights = [r.bytes[direction].get(kind, 0) / 1e6 for r in traffic]
            if max(heights) < 0.002 * tallest:  # too thin to see; the table has it
                continue
            axis.bar([r.number for r in traffic], heights, width=0.7,
                     bottom=[base[r.number] for r in traffic],
                     color=_KIND_COLOURS.get(kind, _GREY), edgecolor="white", linewidth=0.5,
                     hatch="" if direction == "down" else "///",
                     label=f"{kind}, {_WAY[direction]}")  # fmt: skip
            for r, h in zip(traffic, heights, strict=True):
                base[r.number] += h
    axis.set_ylabel("MB")
    axis.set_ylim(0, 1.05 * tallest or 1)


def _plot_agreement(axis: Any, compared: list[Round]) -> None:
    series = (
        ("gradient cosine", _BLUE, "o", lambda r: r.latest("cosine")),
        ("gradient relative difference", _ORANGE, "^", lambda r: r.latest("relative_l2")),
        ("output error after re-alignment", _GREEN, "s", lambda r: r.alignment_errors()[1]),
    )
    label: str | None = "before re-alignment"
    for values, colour, marker in (("cosine", _BLUE, "o"), ("relative_l2", _ORANGE, "^")):
        found = [(r.number, r.moments(values).get("before-align")) for r in compared]
        known = [(n, v) for n, v in found if v is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker, color=colour, fillstyle="none",
                      markersize=6, label=label)  # fmt: skip
            label = None
    for label, colour, marker, pick in series:
        points = [(r.number, pick(r)) for r in compared if pick(r) is not None]
        if points:
            axis.plot([n for n, _ in points], [v for _, v in points], color=colour,
                      marker=marker, markersize=4, linewidth=1.6, label=label)  # fmt: skip
    axis.grid(axis="y", alpha=0.25)
