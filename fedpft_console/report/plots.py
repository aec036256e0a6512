"""The plot of a report: scores, traffic and agreement by round."""

from __future__ import annotations

import io
from typing import Any

from fedpft_console.report.tables import kinds
from fedpft_console.text import BASELINES, Measure
from server_app.run.record import DIRECTIONS, Record, Round

# Okabe and Ito's colours, told apart by readers with any colour vision.
_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#555555",
)  # fmt: skip
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
    rounds = record.rounds
    scored = [r for r in rounds if r.proxy or r.fm]
    if not scored:
        return None
    # Figure rather than pyplot: no global state, and no window system is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    traffic = [r for r in rounds if any(r.bytes[d] for d in DIRECTIONS)]
    compared = [r for r in rounds if r.agreements or r.alignment_errors()[1] is not None]
    panels = 1 + bool(traffic) + bool(compared)
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    _plot_scores(axes[0], record, scored)
    if traffic:
        _plot_traffic(axes[1], kinds(record), traffic)
    if compared:
        _plot_agreement(axes[-1], compared)
    for axis in axes:
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


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
        axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, markersize=4, capsize=2,
                      linewidth=1.6, label=label)  # fmt: skip
    for (name, score), dashes in zip(
        record.baselines.items(), ((6, 2), (2, 2), (1, 3), (8, 2, 1, 2)), strict=False
    ):
        axis.axhline(measure.scaled(score.value), color=_GREY, linewidth=1.1, dashes=dashes,
                     label=BASELINES.get(name, name))  # fmt: skip
    aligned = [r for r in record.rounds if r.alignment]
    moved = [
        (r.number + 0.5, measure.scaled(r.fm.value + r.alignment.gap_after))
        for r in aligned
        if r.fm and r.alignment and r.alignment.gap_after is not None
    ]
    if moved:
        axis.plot(*zip(*moved, strict=True), "o", color=_BLUE, fillstyle="none", markersize=5,
                  label="sub-FM re-aligned")  # fmt: skip
    for i, r in enumerate(aligned):
        axis.axvline(r.number + 0.5, color=_GREEN, alpha=0.35, linewidth=3,
                     label="re-alignment" if i == 0 else None)  # fmt: skip
    axis.set_title(measure.title)
    axis.set_ylabel("%" if measure.share else measure.name)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="best")


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
    axis.set_title("Traffic per round")
    axis.set_ylabel("MB")
    axis.set_ylim(0, 1.25 * tallest or 1)
    axis.legend(fontsize=8, loc="upper right")


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
    axis.set_title("Agreement of sub-FM and FM")
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="best")
