"""Results as tables: what is in cells.jsonl, by line of the experiment, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedpft_console.compare.cell import Cell, Row, best_rate, measure_of, shown
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.gap import runs
from fedpft_console.compare.gap import sheet as gap_sheet
from fedpft_console.compare.lines import (
    AGREEMENT,
    BACKDOOR,
    COST,
    OWNER,
    Figure,
    Line,
    common_measure,
    differences,
    gap,
    interval,
    lines,
    place_name,
    reference_of,
    rounds_to,
    score,
)
from fedpft_console.compare.spread import brief_spread, plus_minus, spread
from fedpft_console.report.tables import Sheet
from fedpft_console.text import Measure

_OBEYED = (
    "Share of rows of other classes that the plugged-in FM gives the backdoor's. Means over seeds.",
)


def sheets(experiment: Experiment, rows: Sequence[Row]) -> list[Sheet]:
    """The tables of an experiment, in order; those without rows are left out.

    Args:
        experiment: says which lines there are, and what they are compared with.
        rows: results, finished and failed.

    Returns:
        Scores and their averages, agreement, backdoors, the gap, cost, what leaves the owner,
        choice of rates, and cells without a result.
    """
    found = lines(experiment, rows)
    made = [
        _scores(experiment, found),
        _by_method(experiment, found),
        average(experiment, found),
        _figures(experiment, found, "Agreement of sub-FM and FM", AGREEMENT),
        _figures(experiment, found, "Backdoor", BACKDOOR, _OBEYED),
        gap_sheet(runs(experiment, rows, found)),
        _cost(experiment, found),
        _owner(experiment, found),
        _rates(experiment, rows),
        _missing(experiment, rows),
    ]
    return [sheet for sheet in made if sheet.rows]


def _named(experiment: Experiment) -> list[str]:
    partition = ["partition"] if any(experiment.partitions) else []
    return ["dataset", *partition, "method", *experiment.grid]


def _names(experiment: Experiment, line: Line) -> list[str]:
    p = line.point
    partition = [p.partition] if any(experiment.partitions) else []
    return [p.dataset, *partition, p.method, *_values(experiment, line)]


def _values(experiment: Experiment, line: Line) -> list[str]:
    values = dict(line.point.grid)
    return [shown(values[k]) if k in values else "" for k in experiment.grid]


def split_of(found: Sequence[Line]) -> str:
    """`test` or `validation`: the rows scores are of.

    Args:
        found: lines of the tables.

    Returns:
        The split of the first run there is, `test` where there is none.
    """
    configs = [r["config"] for line in found for r in line.cells.values()]
    return str(configs[0].get("run.eval-split", "test")) if configs else "test"


def title_of(found: Sequence[Line]) -> str:
    """Title of the table of scores: the metric's name, where all lines have the same.

    Args:
        found: lines of the tables.

    Returns:
        Such as `Accuracy`; `Scores` where metrics differ.
    """
    measure = common_measure(found)
    return measure.title if measure else "Scores"


def _scores(experiment: Experiment, found: Sequence[Line]) -> Sheet:
    out = []
    for line in found:
        m = line.measure
        diff = differences(line, reference_of(experiment, line, found))
        fm = list(line.fm().values())
        if not fm:
            continue
        proxy = line.values(lambda r: score(r, "proxy"))
        gaps = line.values(gap)
        trained = line.values(lambda r: score(r, "fm-as-trained"))
        out.append([
            *_names(experiment, line),
            "" if line.lr is None else f"{line.lr:g}" + ("*" if line.note else ""),
            str(len(fm)),
            spread(fm, m),
            m.plain(m.worst(fm)),
            spread(proxy, m) if proxy else "",
            m.plain(statistics.fmean(gaps), "+") if gaps else "",
            spread(trained, m) if trained else "",
            plus_minus(*interval(diff), m) if diff else "",
            m.plain(m.worst(diff), "+") if diff else "",
        ])  # fmt: skip
    reference = experiment.reference
    columns = [
        *_named(experiment), "lr", "n", "plugged-in FM", "worst seed", "sub-FM", "gap",
        "head as trained", f"difference to {reference} (95% interval)", "worst difference",
    ]  # fmt: skip
    notes = [
        f"{_what(found)}: mean ± standard deviation over n seeds, "
        "and the single seeds. Gap: sub-FM minus plugged-in FM. Differences are paired by "
        "seed; their intervals are Student's t.",
    ]
    if any(
        "fm-as-trained_test" in r or "fm-as-trained_validation" in r
        for line in found
        for r in line.cells.values()
    ):
        notes.append("Head as trained: the plugged-in FM without refitting its head (plug.refit).")
    edges = sorted({line.note for line in found if line.note})
    if edges:
        notes.append(
            f"* The {' or '.join(edges)} learning rate of the grid was the best on validation "
            "rows: a better one may lie outside."
        )
    return Sheet(title_of(found), *_trim(columns, out), notes)


def _what(found: Sequence[Line]) -> str:
    """What scores are of: `Accuracy on test rows in points`."""
    measures = dict.fromkeys(line.measure for line in found)
    split = split_of(found)
    if len(measures) > 1:
        named = ", ".join(f"{m.name}{m.points} ({', '.join(_places(found, m))})" for m in measures)
        return f"Scores on {split} rows: {named}"
    lower = "" if all(m.higher_is_better for m in measures) else " (lower is better)"
    return "".join(f"{m.title} on {split} rows{m.points}{lower}" for m in measures)


def _places(found: Sequence[Line], measure: Measure) -> list[str]:
    return list(dict.fromkeys(li.point.dataset for li in found if li.measure == measure))


def _by_method(experiment: Experiment, found: Sequence[Line]) -> Sheet:
    """The form papers have: a row for each method, a column for each place."""
    places = list(dict.fromkeys(line.point.place for line in found))
    if len(places) < 2:
        return Sheet("", [], [])
    cells: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for line in found:
        key = (line.point.method, *_values(experiment, line))
        trained = line.values(lambda r: score(r, "fm-as-trained"))
        for name, values in (("", list(line.fm().values())), ("head as trained", trained)):
            if values:
                some = cells.setdefault((*key, name), {})
                some[line.point.place] = brief_spread(values, line.measure)
    out = [[*key, *(row.get(place, "") for place in places)] for key, row in cells.items()]
    columns = ["method", *experiment.grid, "", *map(place_name, places)]
    measure = common_measure(found)
    unit = "points on" if measure and measure.share else "on"
    notes = [f"Plugged-in FM, {unit} {split_of(found)} rows: mean ± standard deviation over seeds."]
    return Sheet("Methods by data set", *_trim(columns, out), notes)


def average(experiment: Experiment, found: Sequence[Line]) -> Sheet:
    """Mean over all places of each method that has been run in all of them.

    Args:
        experiment: names the reference method and the keys of the grid.
        found: lines of the tables; reference points are left out.

    Returns:
        The table, without rows where there is one place only, or metrics differ.
    """
    trained = [line for line in found if line.trained]
    places = list(dict.fromkeys(line.point.place for line in trained))
    m = common_measure(trained)
    if len(places) < 2 or m is None:  # values of different metrics have no mean
        return Sheet("Average", [], [])
    out = []
    for key in dict.fromkeys((li.point.method, li.point.grid) for li in trained):
        some = [li for li in trained if (li.point.method, li.point.grid) == key]
        if len(some) < len(places):
            continue
        fm = _mean_by_seed([li.fm() for li in some])
        if not fm:
            continue
        references = [reference_of(experiment, li, found) for li in some]
        theirs = _mean_by_seed([r.fm() for r in references if r])
        whole = len([r for r in references if r]) == len(places)
        diff = [fm[s] - theirs[s] for s in fm if s in theirs] if whole else []
        worst = [d for li, r in zip(some, references, strict=True) for d in differences(li, r)]
        out.append([
            key[0], *(shown(v) for _, v in key[1]), str(len(fm)), spread(list(fm.values()), m),
            plus_minus(*interval(diff), m) if diff else "",
            m.plain(m.worst(worst), "+") if worst else "",
        ])  # fmt: skip
    difference = f"difference to {experiment.reference} (95% interval)"
    columns = ["method", *experiment.grid, "n", "plugged-in FM", difference, "worst difference"]
    note = f"Over {len(places)} pairs of data set and partition, seeds that all of them have."
    return Sheet("Average over data sets", *_trim(columns, out), [note])


def _mean_by_seed(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
    common = [s for s in values[0] if all(s in v for v in values)] if values else []
    return {s: statistics.fmean(v[s] for v in values) for s in common}


def _figures(
    experiment: Experiment, found: Sequence[Line], title: str, figures: Sequence[Figure],
    notes: Sequence[str] = ("Means over seeds.",),
) -> Sheet:  # fmt: skip
    out = []
    for line in found:
        cells = []
        for figure in figures:
            values = line.values(figure.of)
            cells.append(_mean_text(values, figure.form, line.measure))
        if any(cells):
            out.append([*_names(experiment, line), *cells])
    columns = [*_named(experiment), *(f.heading for f in figures)]
    return Sheet(title, *_trim(columns, out), list(notes))


def _owner(experiment: Experiment, found: Sequence[Line]) -> Sheet:
    title = "What the owner gives away"
    if not any(line.values(f.of) for line in found for f in OWNER[:2]):
        return Sheet(title, [], [])
    notes = ["Means over seeds; what clients hold, against the product that stays with the owner."]
    return _figures(experiment, found, title, OWNER, notes)


def _mean_text(values: Sequence[float], form: str, measure: Measure) -> str:
    if not values:
        return ""
    if any(math.isinf(v) for v in values):
        reached = sum(1 for v in values if math.isfinite(v))
        return f"{reached} of {len(values)} runs"
    mean = statistics.fmean(values)
    return format(mean, form) if form else measure.plain(mean)


def _cost(experiment: Experiment, found: Sequence[Line]) -> Sheet:
    notes = [
        "Means over seeds, of a whole run. MB are 10⁶ bytes on the wire. Times are of the machine "
        "the cell was run on."
    ]
    if any("client_flops" in r for line in found for r in line.cells.values()):
        notes.append(
            "Clients' FLOPs are estimated: training steps × rows × mean tokens of a training row × "
            "FLOPs of a step on the transformer blocks (`fedpft inspect`)."
        )
    figures = list(COST)
    if experiment.targets:
        # Rows know how they were run, not what the experiment file now calls it.
        target = {
            id(row): experiment.targets.get(line.point.dataset)
            for line in found
            for row in line.cells.values()
        }
        figures.append(
            Figure(
                "rounds_to_target", "rounds to target", ".1f",
                lambda r: rounds_to(r, target[id(r)]),
            )
        )  # fmt: skip
        by_dataset = {line.point.dataset: line.measure for line in found}
        said = ", ".join(
            f"{by_dataset.get(k, Measure()).scaled(v):g} on {k}"
            for k, v in experiment.targets.items()
        )
        notes.append(f"Target: a plugged-in FM of {said}; the first scored round that reached it.")
    return _figures(experiment, found, "Cost", figures, notes)


def _rates(experiment: Experiment, rows: Sequence[Row]) -> Sheet:
    """How each line's learning rate was chosen."""
    rates = sorted({lr for some in experiment.rates.values() for lr in some})
    if len(rates) < 2:
        return Sheet("", [], [])
    out = []
    for point in experiment.points():
        tried = [cell.find(rows) for cell in experiment.first(point)]
        best = best_rate([r for r in tried if r])
        if best is None:
            continue
        shown_at = dict.fromkeys(rates, "")
        for row in tried:
            value = row.get("fm_validation") if row else None
            if row:
                m = measure_of(row)
                text = "" if value is None else m.plain(m.scaled(value))
                shown_at[row["lr"]] = f"{text} ✓" if row["lr"] == best else text
        out.append([*_names(experiment, Line(point, {})), *shown_at.values()])
    columns = [*_named(experiment), *(f"lr {lr:g}" for lr in rates)]
    named = " or ".join(dict.fromkeys(measure_of(r).title for r in rows))
    note = (
        f"{named} of the plugged-in FM on validation rows at seed {experiment.seeds[0]}; "
        "✓ was taken for all seeds."
    )
    return Sheet("Choice of the learning rate", columns, out, [note])


def wanted(experiment: Experiment, rows: Sequence[Row]) -> list[Cell]:
    """The cells that can be named now: all rates at the first seed, the other seeds at the best.

    Args:
        experiment: says which lines there are.
        rows: results, by which the best rates are known.

    Returns:
        The cells in order of the lines, whether they have a result or not.
    """
    out = []
    for point in experiment.points():
        first = experiment.first(point)
        out += first
        best = best_rate([r for c in first if (r := c.find(rows))])
        if best is not None:
            out += [experiment.cell(point, s, best) for s in experiment.seeds_of(point)[1:]]
    return out


def _missing(experiment: Experiment, rows: Sequence[Row]) -> Sheet:
    """Cells that failed or have not been run."""
    out = []
    for cell in wanted(experiment, rows):
        if cell.find(rows) is None:
            failed = cell.failure(rows)
            reason = failed["failed"] if failed else "not run"
            out.append([cell.title(), " ".join(str(reason).split())])
    return Sheet("Cells without a result", ["cell", "why"], out)


def nearest(cell: Cell, rows: Sequence[Row]) -> dict[str, tuple[Any, Any]]:
    """How the most alike finished run of this name differs: by key, (in the row, here).

    Args:
        cell: a cell without a result.
        rows: results, of which finished ones with the cell's name, seed and rate are looked at.

    Returns:
        As `Cell.differs` gives it; empty where there is no such run.
    """
    alike = [cell.differs(r) for r in rows if "failed" not in r
             and (r["method"], r["dataset"], r.get("partition", ""), r["seed"], r["lr"])
             == (cell.method, cell.dataset, cell.partition, cell.seed, cell.lr)]  # fmt: skip
    return min(alike, key=len, default={})


def _trim(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which no row says anything."""
    keep = [i for i in range(len(columns)) if any(r[i] for r in rows)]
    return [columns[i] for i in keep], [[r[i] for i in keep] for r in rows]


def markdown(experiment: Experiment, rows: Sequence[Row]) -> str:
    """The text of table.md: all tables of an experiment.

    Args:
        experiment: says which lines there are.
        rows: results, finished and failed.

    Returns:
        Markdown, which ends with a newline; equal cells give equal texts.
    """
    out = [f"# {experiment.name}", "", f"Made by `fedpft compare` from {len(rows)} cells."]
    for sheet in sheets(experiment, rows):
        out += ["", f"## {sheet.title}", ""]
        out.append("| " + " | ".join(map(_escaped, sheet.columns)) + " |")
        out.append("|" + "---|" * len(sheet.columns))
        out += ["| " + " | ".join(map(_escaped, row)) + " |" for row in sheet.rows]
        for note in sheet.notes:
            out += ["", _escaped(note)]
    return "\n".join(out) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
