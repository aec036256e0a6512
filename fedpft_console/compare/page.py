"""report.html: everything about an experiment in one file that opens without a network.

No script and nothing from elsewhere. Colours follow the reader's light or dark setting; wide
tables scroll by themselves, so the page never does sideways.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedpft_console.compare import plots, tables
from fedpft_console.compare.cell import Row
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.lines import (
    Line,
    common_measure,
    differences,
    interval,
    lines,
    place_name,
    reference_of,
)
from fedpft_console.report.tables import Sheet

# The plots' colours by place in the palette: (on light, on dark).
_DARK = (
    "#5AB4F0", "#FF9455", "#35C99B", "#E5A0C8", "#F5BE4B", "#8FD3FF", "#BDA5E0", "#D9A95B",
    "#A9A9A9", "#7BC88A",
)  # fmt: skip
_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★", "X": "✖",
          "<": "◀", ">": "▶"}  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --dim: #5b6169;
  --rule: #d9dde2; --band: #f4f6f8; --link: #0b5cad; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8ea; --dim: #a2a9b1; --rule: #353b43; --band: #1d2127;
    --link: #7bb7f5; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.6rem; }
p, li { max-width: 46rem; }
.dim, figcaption, .note { color: var(--dim); font-size: 0.875rem; }
.note { margin: 0.4rem 0; }
ul.findings { padding-left: 1.1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--rule);
  white-space: normal; vertical-align: bottom; min-width: 3rem; }
th.text, td.text { text-align: left; }
td.long { white-space: normal; min-width: 22rem; text-align: left; }
tbody tr + tr td { border-top: 1px solid var(--band); }
tr.group th { text-align: left; background: var(--band); color: var(--ink); }
tr.group span { position: sticky; left: 0.7rem; }
thead th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
td .each { color: var(--dim); font-size: 0.8em; display: block; white-space: normal;
  max-width: 9rem; margin-left: auto; }
@media (max-width: 40rem) { th, td { padding: 0.35rem 0.45rem; }
  td.long { min-width: 14rem; } thead th:first-child, td:first-child { max-width: 8rem;
  white-space: normal; } }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure h3 { font-size: 0.95rem; margin: 0 0 0.2rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0; list-style: none;
  font-size: 0.875rem; max-width: none; }
.legend span { font-size: 0.8rem; }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""


def html(experiment: Experiment, rows: Sequence[Row]) -> str:
    """The report as one page of HTML. Equal cells give equal bytes.

    Args:
        experiment: what is reported on.
        rows: results, finished and failed.

    Returns:
        The whole file, with plots in it and nothing to be loaded.
    """
    found = lines(experiment, rows)
    sheets = tables.sheets(experiment, rows)
    body = [
        f"<h1>{escape(experiment.name)}</h1>",
        f'<p class="dim">{escape(_about(experiment, rows, found))}</p>',
    ]
    findings = _findings(experiment, found)
    if findings:
        items = "".join(f"<li>{escape(text)}</li>" for text in findings)
        body.append(f'<ul class="findings">{items}</ul>')
    leading = (tables.title_of(found), "Average over data sets")
    first = [s for s in sheets if s.title in leading]
    body += [_table(s) for s in first]
    body += _plots(experiment, rows, found)
    body += [_table(s) for s in sheets if s not in first]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(experiment.name)}: comparison</title>\n<style>{_style()}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _style() -> str:
    light = " ".join(f"--c{i}: {c};" for i, c in enumerate(plots.COLOURS))
    dark = " ".join(f"--c{i}: {c};" for i, c in enumerate(_DARK))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _about(experiment: Experiment, rows: Sequence[Row], found: Sequence[Line]) -> str:
    runs = {id(r): r for line in found for r in line.cells.values()}
    hours = sum(r.get("seconds", 0.0) for r in rows) / 3600
    machines = sorted({
        f"{r['device']}, torch {r['torch']}" for r in runs.values() if "torch" in r
    })  # fmt: skip
    text = f"{len(rows)} cells, {hours:.1f} hours of computing."
    return text + (f" {'; '.join(machines)}." if machines else "")


def _findings(experiment: Experiment, found: Sequence[Line]) -> list[str]:
    """What the differences say, a sentence for each line that has an interval.

    Of many data sets and partitions only the averages are put into words.

    Args:
        experiment: names the reference method.
        found: lines of the tables.

    Returns:
        Sentences, in order of the lines; empty where nothing can be compared.
    """
    if len({line.point.place for line in found}) > 2:
        sheet = tables.average(experiment, found)
        at = {name: i for i, name in enumerate(sheet.columns)}
        measure = common_measure(found)
        unit = " points" if measure and measure.share else ""
        difference = at.get(f"difference to {experiment.reference} (95% interval)")
        return [
            f"{', '.join(row[: at['n']])}: {row[difference]}{unit} against "
            f"{experiment.reference} on average, {row[at['worst difference']]} at worst."
            for row in sheet.rows
            if difference is not None and row[difference]
        ]
    out = []
    for line in found:
        reference = reference_of(experiment, line, found)
        diff = differences(line, reference)
        if not line.trained or reference is None or len(diff) < 2:
            continue
        mean, half = interval(diff)
        where = place_name(line.point.place)
        m = line.measure
        way = "ahead of" if m.rank(mean) > 0 else "behind"
        unit = " points" if m.share else ""
        verdict = "" if abs(mean) > half else ", which may be chance: the interval includes zero"
        out.append(
            f"On {where}, {line.point.label} is {m.plain(abs(mean))}{unit} {way} "
            f"{experiment.reference} (95% interval {m.plain(mean - half, '+')} to "
            f"{m.plain(mean + half, '+')}, {len(diff)} seeds){verdict}."
        )
    return out


def _plots(experiment: Experiment, rows: Sequence[Row], found: Sequence[Line]) -> list[str]:
    look = plots.styles(found)
    all_panels = plots.panels(experiment, rows)
    out: list[str] = []
    group = ""
    for i, panel in enumerate(all_panels):
        if panel.group != group:
            out += ["</div>"] if group else []
            group = panel.group
            labels = dict.fromkeys(k for p in all_panels if p.group == group for k in p.labels)
            legend = "".join(_key(label, look[label]) for label in labels)
            out.append(f'<h2>{escape(group)}</h2>\n<ul class="legend">{legend}</ul>')
            out.append('<div class="plots">')
        drawn = _themed(plots.svg(panel, f"panel-{i}"))
        label = escape(f"{panel.group}: {panel.title}", quote=True)
        out.append(
            f"<figure><h3>{escape(panel.title)}</h3>"
            + drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            + f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        )
    return [*out, "</div>"] if group else out


def _key(label: str, style: plots.Style) -> str:
    colour = f"var(--c{plots.COLOURS.index(style.colour)})"
    return f'<li><span style="color:{colour}">{_MARKS[style.marker]}</span> {escape(label)}</li>'


def _themed(svg: str) -> str:
    """The plot in the page's colours.

    Presentation attributes cannot hold variables, but matplotlib writes all colours into style
    attributes.

    Args:
        svg: the plot, in the colours of `plots`.

    Returns:
        The plot, whose colours are the page's variables.
    """
    svg = svg.replace(plots.INK.lower(), "currentColor")
    for i, colour in enumerate(plots.COLOURS):
        svg = svg.replace(colour.lower(), f"var(--c{i})")
    return svg


def _table(sheet: Sheet) -> str:
    kinds = ["text" if is_text else "" for is_text in _text_columns(sheet)]
    # Data set and partition stand once above their lines instead of in every one.
    lead = sum(1 for c in sheet.columns[:2] if c in ("dataset", "partition"))
    head = "".join(
        f'<th scope="col"{_class(k)}>{escape(c)}</th>'
        for c, k in list(zip(sheet.columns, kinds, strict=True))[lead:]
    )
    rows, group = "", ""
    for row in sheet.rows:
        place = ", ".join(row[:lead])
        if place != group:
            group = place
            span = len(sheet.columns) - lead
            rows += f'<tr class="group"><th colspan="{span}"><span>{escape(place)}</span></th></tr>'
        cells = list(zip(row, kinds, strict=True))[lead:]
        rows += "<tr>" + "".join(f"<td{_class(k, c)}>{_cell(c)}</td>" for c, k in cells) + "</tr>\n"
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in sheet.notes)
    return (
        f'<h2>{escape(sheet.title)}</h2>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(sheet.title, quote=True)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>{notes}"
    )


def _class(kind: str, content: str = "") -> str:
    names = ["long"] if len(content) > 60 and kind == "text" else []
    names += [kind] if kind else []
    return f' class="{" ".join(names)}"' if names else ""


def _cell(content: str) -> str:
    """Single seeds, in brackets after a mean, go below it."""
    mean, bracket, each = content.partition(" (")
    if bracket and "±" in mean and each.endswith(")"):
        return f'{escape(mean)}<span class="each">{escape(each[:-1])}</span>'
    return escape(content)


def _text_columns(sheet: Sheet) -> list[bool]:
    """Which columns are words: those with a cell that does not begin like a number."""
    return [
        any(row[i] and row[i].lstrip("+-−")[0] not in "0123456789." for row in sheet.rows)
        for i in range(len(sheet.columns))
    ]
