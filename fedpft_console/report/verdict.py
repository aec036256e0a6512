"""What a run's product comes to: its score beside the reference points, and label by label."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpft_console.report.tables import Sheet
from fedpft_console.text import BASELINES, MODELS, Measure, percent
from server_app.run import schema as ev
from server_app.run.record import Record

_NOTABLE = 2  # standard errors of a difference below which it may be chance
_CONFUSION = 25  # classes of the largest confusion table that is shown


@dataclass(frozen=True)
class Beside:
    """A reference point, and how far the product is above it."""

    name: str
    score: ev.Scored
    difference: float  # product minus reference point, in the metric's unit
    error: float | None  # standard error of the difference, where both have one


def product(record: Record) -> ev.Evaluation | None:
    """The last score of the plugged-in FM.

    Args:
        record: a run in any state.

    Returns:
        The score; None where the FM has not been scored.
    """
    return next((r.fm for r in reversed(record.rounds) if r.fm), None)


def beside(record: Record) -> list[Beside]:
    """The reference points beside the product, in reading order.

    Args:
        record: a run in any state.

    Returns:
        One for each reference point; empty where there are none or no product yet.
    """
    score = product(record)
    if score is None:
        return []
    order = [*BASELINES, *sorted(set(record.baselines).difference(BASELINES))]
    out = []
    for name in order:
        other = record.baselines.get(name)
        if other is not None and math.isfinite(other.value):
            error = (
                math.hypot(score.error, other.error)
                if score.error is not None and other.error is not None
                else None
            )
            said = BASELINES.get(name, name)
            out.append(Beside(said, other, score.value - other.value, error))
    return out


def sentence(record: Record) -> str:
    """What the product reaches against the reference points, in one sentence.

    Args:
        record: a run in any state.

    Returns:
        The sentence with its full stop; empty where there is nothing to compare.
    """
    found = beside(record)
    if not found:
        return ""
    measure = Measure.of(record.task)
    parts = []
    for b in found:
        size = measure.plain(abs(measure.scaled(b.difference)))
        unit = " points" if measure.share else ""
        way = "ahead of" if measure.rank(b.difference) > 0 else "behind"
        chance = b.difference and b.error is not None and abs(b.difference) < _NOTABLE * b.error
        parts.append(
            (f"{size}{unit} {way}" if b.difference else "level with")
            + f" {b.name}"
            + (" (may be chance)" if chance else "")
        )
    return f"The plugged-in FM is {', '.join(parts)}."


def sheet(record: Record) -> Sheet:
    """Product and reference points as a table.

    Args:
        record: a run in any state.

    Returns:
        The table, without rows where there is nothing to compare.
    """
    score, found = product(record), beside(record)
    measure = Measure.of(record.task)
    rows = []
    if score is not None and found:
        rows.append([MODELS["fm"], measure.spread(score.value, score.error), ""])
        rows += [
            [
                b.name,
                measure.spread(b.score.value, b.score.error),
                measure.difference(b.difference)
                + ("" if b.error is None else f" ± {measure.plain(measure.scaled(b.error))}"),
            ]
            for b in found
        ]
    notes = [
        "Difference: product minus reference point" + (", in points." if measure.share else "."),
        "The probe and TF-IDF are fitted to all clients' rows in one place.",
    ]
    return Sheet("The product beside reference points",
                 ["", measure.name, "difference"], rows, notes)  # fmt: skip


# ---------------------------------------------------------------- label by label


def labels(record: Record) -> list[Sheet]:
    """Precision, recall and F1 of each label, and the confusion table, of the product.

    Args:
        record: a run in any state.

    Returns:
        Both tables; none where the run has not noted which label rows were given.
    """
    found = last_confusion(record)
    if found is None or not found.counts:
        return []
    names = record.task.labels if record.task else []
    size = 1 + max(max(a, b) for a, b, _ in found.counts)
    names = [*names, *(str(i) for i in range(len(names), size))]
    n = len(names)
    table = [[0] * n for _ in range(n)]
    for a, b, rows in found.counts:
        table[a][b] += rows
    given = [sum(table[a][b] for a in range(n)) for b in range(n)]
    rows_of = [sum(row) for row in table]
    each = Sheet(
        "Label by label",
        ["label", "rows", "given", "precision", "recall", "F1"],
        [
            [
                names[c],
                str(rows_of[c]),
                str(given[c]),
                _ratio(table[c][c], given[c]),
                _ratio(table[c][c], rows_of[c]),
                _ratio(2 * table[c][c], rows_of[c] + given[c]),
            ]
            for c in range(n)
            if rows_of[c] or given[c]
        ],
        [
            f"The plugged-in FM on {sum(rows_of)} {found.split} rows, after round {found.round}. "
            "Rows: that have the label. Given: that the model gave it. Precision: share of the "
            "rows given it that have it. Recall: share of the rows having it that were given it."
        ],
    )
    if n > _CONFUSION:
        return [each]
    confusion = Sheet(
        "Confusion table",
        ["has \\ was given", *names],
        [[names[a], *map(str, table[a])] for a in range(n)],
        ["A row for each label that rows have, a column for each that they were given."],
    )
    return [each, confusion]


def last_confusion(record: Record) -> ev.Confusion | None:
    """What labels the product gave, when last looked at.

    Args:
        record: a run in any state.

    Returns:
        The event; None where there is none.
    """
    return next((r.confusion["fm"] for r in reversed(record.rounds) if "fm" in r.confusion), None)


def _ratio(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "-"
