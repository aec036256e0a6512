"""report.html: everything about an experiment in one file that opens without a network.

No script and nothing from elsewhere. Colours follow the reader's light or dark setting; wide
tables scroll by themselves, so the page never does sideways.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

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
from fedpft_console.web import drawing
from fedpft_console.web.document import bullets, document, facts, heading, prose, table

_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★", "X": "✖",
          "<": "◀", ">": "▶"}  # fmt: skip


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
        f'<p class="dim">{prose(_about(rows, found))}</p>',
        facts(_settings(found)),
    ]
    findings = _beside(found) + _findings(experiment, found)
    if findings:
        body.append(bullets(findings, "findings"))
    leading = (tables.title_of(found), "Average over data sets")
    first = [s for s in sheets if s.title in leading]
    body += [table(s, _lead(s)) for s in first]
    body += _plots(experiment, rows, found)
    body += [table(s, _lead(s)) for s in sheets if s not in first]
    return document(f"{experiment.name}: comparison", body)


def _lead(sheet: Sheet) -> int:
    """Data set and partition stand once above their lines instead of in every one."""
    return sum(1 for c in sheet.columns[:2] if c in ("dataset", "partition"))


# What a reader asks first of any comparison, by what it is called.
_ASKED = {
    "model": "model.name", "training rows of": "data.train", "clients": "federation.clients",
    "clients a round": "federation.clients-per-round", "rounds": "federation.rounds",
    "steps a round": "train.local-steps", "rows a step": "train.batch-size",
    "partition": "federation.partition",
}  # fmt: skip


def _settings(found: Sequence[Line]) -> dict[str, str]:
    """Model, clients, rounds and rows of the runs: all values that occur, in order of the lines."""
    runs = [r for line in found for r in line.cells.values()]
    out = {}
    for name, key in _ASKED.items():
        values = dict.fromkeys(_plain(r["config"][key]) for r in runs if key in r["config"])
        out[name] = ", ".join(values)
    counts = dict.fromkeys(" / ".join(map(str, r["rows"])) for r in runs if "rows" in r)
    out["rows (train / validation / test)"] = ", ".join(counts)
    out["seeds"] = str(len({seed for line in found for seed in line.cells}))
    return out


def _plain(value: object) -> str:
    """A value of the configuration; of a path only its last parts, which are no one's business."""
    text = str(value)
    return "/".join(text.rsplit("/", 2)[-2:]) if "/" in text else text or "(none)"


def _beside(found: Sequence[Line]) -> list[str]:
    """What the best line of each place reaches, beside the reference points; of few places only."""
    out = []
    places = list(dict.fromkeys(line.point.place for line in found))
    for place in places if len(places) <= 4 else ():
        here = [line for line in found if line.point.place == place and line.fm()]
        trained = [line for line in here if line.trained]
        points = [line for line in here if not line.trained]
        if not trained or not points:
            continue
        m = trained[0].measure
        unit = " points" if m.share else ""
        best = max(trained, key=lambda line: m.rank(fmean(line.fm().values())))
        reached = fmean(best.fm().values())
        than = ", ".join(
            f"{m.plain(reached - fmean(p.fm().values()), '+')}{unit} against {p.point.method}"
            for p in points
        )
        out.append(
            f"On {place_name(place)} the best line, {best.point.label}, reaches "
            f"{m.plain(reached)}{unit}: {than}."
        )
    return out


def _about(rows: Sequence[Row], found: Sequence[Line]) -> str:
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
            out.append(f'{heading(group)}\n<ul class="legend">{legend}</ul>')
            out.append('<div class="plots">')
        out.append(drawing.figure(panel, f"panel-{i}"))
    return [*out, "</div>"] if group else out


def _key(label: str, style: plots.Style) -> str:
    colour = f"var(--c{drawing.COLOURS.index(style.colour)})"
    return f'<li><span style="color:{colour}">{_MARKS[style.marker]}</span> {escape(label)}</li>'
