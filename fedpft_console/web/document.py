"""A page of HTML in one file that opens without a network, and the tables in it.

Nothing is loaded from elsewhere. Colours follow the reader's light or dark setting; wide tables
scroll in boxes of their own, so the page never does sideways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from fedpft_console.report.tables import Sheet
from fedpft_console.web import drawing

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
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
a { color: var(--link); }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.lead { font-size: 1.1rem; }
.warn { border-left: 4px solid #E69F00; padding-left: 0.8rem; }
.warn li, ul.plain li { overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0; list-style: none;
  font-size: 0.875rem; max-width: none; }
dl.facts { display: grid; gap: 0.6rem 1.5rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); }
dl.facts dt { color: var(--dim); font-size: 0.8rem; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
ul.findings { padding-left: 1.1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--rule);
  white-space: normal; vertical-align: bottom; min-width: 3rem; }
th.text, td.text { text-align: left; }
td.long { white-space: normal; min-width: 22rem; text-align: left; }
thead td { border-bottom: 1px solid var(--rule); }
tbody tr + tr td { border-top: 1px solid var(--band); }
tr.group th { text-align: left; background: var(--band); color: var(--ink); }
tr.group span { position: sticky; left: 0.7rem; }
tbody th[scope=row] { color: inherit; font-weight: inherit; vertical-align: top;
  border-bottom: 0; }
tbody tr + tr th[scope=row] { border-top: 1px solid var(--band); }
thead tr :first-child, th[scope=row] { position: sticky; left: 0; background: var(--paper); }
td .each { color: var(--dim); font-size: 0.8em; display: block; white-space: normal;
  max-width: 9rem; margin-left: auto; }
@media (max-width: 40rem) { th, td { padding: 0.35rem 0.45rem; }
  td.long { min-width: 14rem; } thead tr :first-child, th[scope=row] { max-width: 8rem;
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


def document(title: str, body: Sequence[str], head: str = "") -> str:
    """A whole page.

    Args:
        title: of the window; escaped here.
        body: parts of the page, as HTML.
        head: further HTML for the page's head.

    Returns:
        The whole file, with nothing to be loaded.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n{head}"
        "</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    light = " ".join(f"--c{i}: {c};" for i, c in enumerate(drawing.COLOURS))
    dark = " ".join(f"--c{i}: {c};" for i, c in enumerate(drawing.DARK))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def prose(text: str) -> str:
    """A sentence as HTML: what stands between backticks is code.

    Args:
        text: any text; escaped here.

    Returns:
        HTML without a paragraph around it.
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def facts(values: Mapping[str, str]) -> str:
    """Names with their values, side by side as far as there is room.

    Args:
        values: text by name; empty ones are left out.

    Returns:
        A description list; empty without values.
    """
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{prose(value)}</dd></div>"
        for name, value in values.items()
        if value
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def bullets(items: Sequence[str], kind: str = "plain") -> str:
    """A list of sentences.

    Args:
        items: texts; escaped here.
        kind: the list's class in the style.

    Returns:
        An unordered list.
    """
    found = "".join(f"<li>{prose(item)}</li>" for item in items)
    return f'<ul class="{kind}">{found}</ul>'


def anchor(title: str) -> str:
    """The name by which a page links to the part with this heading.

    Args:
        title: the heading.

    Returns:
        Its letters and digits in lower case, with dashes for the rest.
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def heading(title: str, level: int = 2) -> str:
    """A heading that can be linked to.

    Args:
        title: its text; escaped here.
        level: 2 for a part of the page, 3 below it.

    Returns:
        The element.
    """
    return f'<h{level} id="{anchor(title)}">{escape(title)}</h{level}>'


def table(sheet: Sheet, lead: int = 0, level: int = 2) -> str:
    """A table below its heading, in a box that scrolls by itself and can be reached by keyboard.

    Args:
        sheet: its title, columns, rows and notes.
        lead: how many columns stand once above the rows that share them, instead of in every one.
        level: of the heading.

    Returns:
        Heading, box and notes.
    """
    kinds = ["text" if is_text else "" for is_text in _text_columns(sheet)]
    head = "".join(
        f'<th scope="col"{_class(k)}>{prose(c)}</th>' if c else f"<td{_class(k)}></td>"
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
        rows += "<tr>" + "".join(_element(i, c, k) for i, (c, k) in enumerate(cells)) + "</tr>\n"
    notes = "".join(f'<p class="note">{prose(n)}</p>' for n in sheet.notes)
    named = any(sheet.columns)
    return (
        f'{heading(sheet.title, level)}\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(sheet.title, quote=True)}"><table>'
        + (f"<thead><tr>{head}</tr></thead>" if named else "")
        + f"<tbody>\n{rows}</tbody></table></div>{notes}"
    )


def _element(place: int, content: str, kind: str) -> str:
    """A cell; the first of a row is its heading, which screen readers say before the others."""
    indented = ' style="padding-left:1.6rem"' if content.startswith("  ") else ""
    name = 'th scope="row"' if place == 0 else "td"
    return f"<{name}{_class(kind, content)}{indented}>{_cell(content)}</{name[:2]}>"


def _class(kind: str, content: str = "") -> str:
    names = ["long"] if len(content) > 60 and kind == "text" else []
    names += [kind] if kind else []
    return f' class="{" ".join(names)}"' if names else ""


def _cell(content: str) -> str:
    """Single seeds, in brackets after a mean, go below it."""
    mean, bracket, each = content.partition(" (")
    if bracket and "±" in mean and each.endswith(")"):
        return f'{escape(mean)}<span class="each">{escape(each[:-1])}</span>'
    return prose(content)


def _text_columns(sheet: Sheet) -> list[bool]:
    """Which columns are words: the first, and those with a cell that is no number at its start."""
    return [
        i == 0 or any(row[i].lstrip("+-−")[:1] not in "0123456789." for row in sheet.rows)
        for i in range(len(sheet.columns))
    ]
