"""table.csv: the figures of an experiment's lines as numbers."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence

from fedpft_console.compare.cell import Row
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.lines import (
    AGREEMENT,
    BACKDOOR,
    COST,
    OWNER,
    differences,
    gap,
    interval,
    lines,
    reference_of,
    score,
)


def text(experiment: Experiment, rows: Sequence[Row]) -> str:
    """table.csv: a row per line, numbers with six digits, unknown values empty.

    Of each figure the mean over seeds; `fm`, `proxy` and `gap` with standard deviation too.
    Those of a backdoor are there where a run has any.

    Args:
        experiment: says which lines there are.
        rows: results, finished and failed.

    Returns:
        CSV with a head line: shares in points, traffic in MB, `difference` against the reference.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    scores: dict[str, Callable[[Row], float | None]] = {
        "proxy": lambda r: score(r, "proxy"), "gap": gap,
        "fm_as_trained": lambda r: score(r, "fm-as-trained"),
    }  # fmt: skip
    found = lines(experiment, rows)
    more = BACKDOOR if any(line.values(BACKDOOR[0].of) for line in found) else ()
    figures = {f.name: f for f in (*AGREEMENT, *COST, *OWNER[:2], *more)}
    kinds = sorted({k for line in found for r in line.cells.values() for k in r.get("bytes", ())})

    def of_kind(kind: str) -> Callable[[Row], float | None]:
        return lambda r: r.get("bytes", {}).get(kind, 0) / 1e6

    writer.writerow([
        "dataset", "partition", "method", *experiment.grid, "lr", "n", "seeds", "fm", "fm_std",
        "fm_min", "proxy", "proxy_std", "gap", "gap_std", "fm_as_trained",
        "fm_as_trained_std", "difference", "difference_half_width", "difference_min", *figures,
        *(f"mb_{k}" for k in kinds),
    ])  # fmt: skip
    for line in found:
        fm = line.fm()
        values = list(fm.values())
        diff = differences(line, reference_of(experiment, line, found))
        grid = dict(line.point.grid)
        writer.writerow([
            *line.point.place, line.point.method, *(grid.get(k, "") for k in experiment.grid),
            "" if line.lr is None else f"{line.lr:g}", len(values), " ".join(map(str, fm)),
            *_mean_std(values), _digits(line.measure.worst(values) if values else None),
            *(text for of in scores.values() for text in _mean_std(line.values(of))),
            *map(_digits, interval(diff)), _digits(line.measure.worst(diff) if diff else None),
            *(_mean_std(line.values(f.of))[0] for f in figures.values()),
            *(_mean_std(line.values(of_kind(k)))[0] for k in kinds),
        ])  # fmt: skip
    return out.getvalue()


def _mean_std(values: Sequence[float]) -> tuple[str, str]:
    mean = statistics.fmean(values) if values else None
    return _digits(mean), _digits(statistics.stdev(values) if len(values) > 1 else None)


def _digits(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
