"""A report as text: its headline, its tables on a console, and report.md."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import TYPE_CHECKING

from fedpft_console.report.tables import SAMPLES, sheets
from fedpft_console.report.verdict import labels, sentence
from fedpft_console.text import MODELS, Measure, human_seconds, number
from server_app.run.record import Record

if TYPE_CHECKING:
    from rich.table import Table


def headline(record: Record) -> str:
    """One sentence about the run: how far it came, and the last score of the plugged-in FM.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        The sentence, with its full stop.
    """
    done = [r for r in record.rounds if r.finished]
    planned = record.run.rounds if record.run else "?"
    if record.state == "finished":
        text = f"Run finished after {len(done)} of {planned} rounds"
    elif record.state == "failed":
        text = f"Run failed after {len(done)} of {planned} rounds: {record.reason}"
    else:
        text = f"Run is not finished: {len(done)} of {planned} rounds so far"
    last = next((r for r in reversed(record.rounds) if r.fm), None)
    if last is not None and last.fm is not None:
        measure = Measure.of(record.task)
        named = "" if measure.share else f"{last.fm.metric} "
        text += f"; plugged-in FM {named}{measure.shown(last.fm.value)} after round {last.number}"
    return text if text.endswith(".") else text + "."


def render(record: Record) -> list[Table]:
    """The tables for a console.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Rich tables, in the order of the report.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = []
    for sheet in sheets(record):
        table = Table(
            box=box.SIMPLE_HEAD,
            show_header=any(sheet.columns),
            title=Text(sheet.title),
            title_justify="left",
            caption=Text("\n".join(sheet.notes)) if sheet.notes else None,
            caption_justify="left",
        )
        text_only = sheet.title in ("Files", SAMPLES)
        for i, name in enumerate(sheet.columns):
            left = i == 0 or text_only
            table.add_column(
                name, justify="left" if left else "right",
                overflow="fold" if left else "ellipsis",
            )  # fmt: skip
        for row in sheet.rows:
            table.add_row(*(Text(cell) for cell in row))
        out.append(table)
    return out


def markdown(record: Record) -> str:
    """The text of report.md: facts, tables, the plot, replies not used, and warnings.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Markdown, which ends with a newline and links plot.png where a round was scored.
    """
    said = sentence(record)
    lines = ["# Run report", "", _md(headline(record)), *(["", _md(said)] if said else []), ""]
    lines += [_md(f) for f in _facts(record)]
    for sheet in [*sheets(record), *labels(record)]:
        cell = _literal if sheet.title == SAMPLES else _md
        lines += ["", f"## {sheet.title}", ""]
        lines.append("| " + " | ".join(_md(c) for c in sheet.columns) + " |")
        right = "---" if sheet.title in ("Files", SAMPLES) else "---:"
        lines.append("|---|" + f"{right}|" * (len(sheet.columns) - 1))
        lines += ["| " + " | ".join(cell(c) for c in row) + " |" for row in sheet.rows]
        lines += ["", *sheet.notes] if sheet.notes else []
    if any(r.proxy or r.fm for r in record.rounds):
        name = Measure.of(record.task).name
        lines += ["", f"![{name}, traffic and agreement by round](plot.png)"]
    lines += _pictures(record)
    for title, items in (
        ("Replies not used", bad_replies(record)),
        ("Warnings", warnings(record)),
    ):
        if items:
            lines += ["", f"## {title}", "", *(f"- {_md(item)}" for item in items)]
    return "\n".join(lines) + "\n"


def _pictures(record: Record) -> list[str]:
    """What the FM made of some prompts before round 1, and sub-FM and FM after the last."""
    last = {MODELS[m]: record.pictures[m] for m in ("proxy", "fm") if m in record.pictures}
    if not last:
        return []
    first = record.painted_before
    rows = ({"FM before round 1": first} if first else {}) | last
    prompts = next(iter(last.values())).prompts
    lines = ["", "## Pictures", "", "| model | pictures |", "|---|---|"]
    lines += [f"| {_md(name)} | ![{_md(name)}]({e.file}) |" for name, e in rows.items()]
    return [*lines, "", f"Prompts, from left to right: {'; '.join(map(_literal, prompts))}."]


def bad_replies(record: Record) -> list[str]:
    """A line for each reply that was of no use.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Round, client, status and reason of each, in order of arrival; a request for the sub-FM is
        none, nor is one that was not waited for.
    """
    return [
        f"round {x.round}, client {x.client}: {x.status}, {x.reason or 'no reason'}"
        for r in record.rounds
        for x in r.replies
        if x.status not in ("ok", "need", "late")
    ]


def warnings(record: Record) -> list[str]:
    """The warnings of a run, each once.

    Args:
        record: a run in any state.

    Returns:
        Their texts, in order of first appearance, with how often where that is more than once.
    """
    counts = Counter(record.warnings)
    return [text if n == 1 else f"{text} ({n} times)" for text, n in counts.items()]


def _facts(record: Record) -> list[str]:
    task, run = record.task, record.run
    facts = {
        "task": task and task.name,
        "rows": task and f"{task.train} / {task.validation} / {task.test}",
        "clients": record.nodes and record.nodes.count,
        "method": run and run.method,
        "seed": run and run.seed,
        "version": run and run.version,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    if record.distilled:
        d = record.distilled
        lines.append(
            f"- distilled: {d.steps} steps in {human_seconds(d.seconds)}, "
            f"loss {number(d.loss_first)} to {number(d.loss_last)}"
        )
    return lines


def _literal(text: str) -> str:
    """A text that anybody may have written, so that Markdown and HTML show it as it is."""
    return re.sub(r"([\\`*_{}\[\]()#!|~:])", r"\\\1", html.escape(text))


# What starts a tag, a link, an image, code or emphasis; clients' words are shown, never obeyed.
_ACTIVE = re.compile(r"[\\`*\[\]<>|!]|(?<=\W)_|_(?=\W)|&(?=[#\w])|(?:https?|ftp)(?=://)|www(?=\.)")


def _md(text: str) -> str:
    return _ACTIVE.sub(_escaped, " ".join(text.splitlines()))


def _escaped(found: re.Match[str]) -> str:
    what = found.group()
    named = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(what)
    if named:
        return named
    return f"\\{what}" if len(what) == 1 else f"{what[0]}&#{ord(what[1])};{what[2:]}"
