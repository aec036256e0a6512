"""Plots as SVG elements of a page, in the page's colours, and as figures of several panels.

A panel is drawn into one matplotlib axis. Colours are of Okabe and Ito's palette, told apart by
readers with any colour vision; a page replaces them by its own for light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D",
    "#666666", "#1B7837",
)  # fmt: skip
INK = "#222222"  # axes and text
# The plots' colours by place in the palette: (on light, on dark).
DARK = (
    "#5AB4F0", "#FF9455", "#35C99B", "#E5A0C8", "#F5BE4B", "#8FD3FF", "#BDA5E0", "#D9A95B",
    "#A9A9A9", "#7BC88A",
)  # fmt: skip
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
    height: float = _HEIGHT  # inches, where it stands alone


def svg(panel: Panel, salt: str) -> str:
    """One panel as an SVG element, its text as text; equal panels give equal bytes.

    Args:
        panel: what to draw.
        salt: decides the ids in the drawing; of two panels on one page each needs its own.

    Returns:
        The element, without an XML head.
    """
    import matplotlib

    own = {"svg.fonttype": "none", "svg.hashsalt": salt, "legend.frameon": False}
    with matplotlib.rc_context(RC | own):
        made, axes = sheet_of(1, height=panel.height)
        draw(panel, axes[0], titled=False)
        out = io.StringIO()
        made.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Several stand in one page, and the names of groups (figure_1, axes_1) say nothing there.
    return re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)


def figure(panel: Panel, salt: str, alt: str = "") -> str:
    """One panel with its heading and caption, for a page.

    Args:
        panel: what to draw.
        salt: as of :func:`svg`.
        alt: what a screen reader says instead of the drawing; empty for heading and group.

    Returns:
        A figure element, drawn in the page's colours.
    """
    said = escape(alt or f"{panel.group}: {panel.title}", quote=True)
    drawn = _themed(svg(panel, salt))
    return (
        f"<figure><h3>{escape(panel.title)}</h3>"
        + drawn.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
        + f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _themed(svg: str) -> str:
    """The plot in the page's colours.

    Presentation attributes cannot hold variables, but matplotlib writes all colours into style
    attributes.

    Args:
        svg: the plot, in the colours of `plots`.

    Returns:
        The plot, whose colours are the page's variables.
    """
    svg = svg.replace(INK.lower(), "currentColor")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour.lower(), f"var(--c{i})")
    return svg


RC: Any = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
}  # fmt: skip


def sheet_of(panels: int, labels: int = 0, height: float = _HEIGHT) -> tuple[Any, list[Any]]:
    """A matplotlib figure with room for so many panels.

    Args:
        panels: how many, at most three beside one another.
        labels: entries of the legend below them.
        height: of a panel, inches.

    Returns:
        The figure, and an axis for each panel.
    """
    # Figure rather than pyplot: no global state, and no window system is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = math.ceil(panels / columns)
    legend = 0.3 * math.ceil(labels / 4)
    made = Figure(figsize=(_WIDTH * columns, height * rows + legend), layout="constrained")
    FigureCanvasAgg(made)
    axes = list(made.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return made, axes[:panels]


def draw(panel: Panel, axis: Any, titled: bool) -> None:
    """Draw one panel.

    Args:
        panel: what to draw.
        axis: of matplotlib.
        titled: whether the panel's title stands above it.
    """
    panel.draw(axis)
    axis.spines[["top", "right"]].set_visible(False)
    if titled:
        axis.set_title(panel.title, fontsize=10)
