"""What a run did, in tables, files and a plot, all made from its record.

`tables` says what to show, `show` renders it for a console and as Markdown, `plots` draws it, and
`page` makes one page of
HTML of it all, and `files` puts report.md, report.html, rounds.csv, summary.json and plot.png into
the run folder. Works for a
finished, a failed and a still running run.
"""

from fedpft_console.report.files import EVENTS, as_json, read, rounds_csv, write
from fedpft_console.report.page import html
from fedpft_console.report.plots import plot_png
from fedpft_console.report.show import headline, markdown, render
from fedpft_console.report.tables import Sheet, sheets
from fedpft_console.report.verdict import sentence

__all__ = [
    "EVENTS", "Sheet", "as_json", "headline", "html", "markdown", "plot_png", "read", "render",
    "rounds_csv", "sentence", "sheets", "write",
]  # fmt: skip
