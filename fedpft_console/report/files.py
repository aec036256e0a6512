"""The files of a report, and the log they are made from."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpft_console.report.plots import plot_png
from fedpft_console.report.show import bad_replies, markdown
from fedpft_console.report.tables import kinds
from fedpft_core.disk import whole
from fedpft_core.errors import UserError
from server_app.run import schema as ev
from server_app.run.events import line_of, read_events
from server_app.run.record import DIRECTIONS, Record, Round, fold

EVENTS = "events.jsonl"
_OF_ROUND = (
    "loss", "seconds", "exchange_seconds", "train_seconds", "evaluate_seconds",
    "overhead_seconds", "good", "bad", "examples",
)  # fmt: skip


def read(folder: Path) -> Record:
    """The record of a run folder.

    Args:
        folder: the run folder.

    Returns:
        The run as far as its events tell.

    Raises:
        UserError: there are no events, or a line is damaged.
    """
    path = folder / EVENTS
    if not path.is_file():
        raise UserError(f"{folder}: no {EVENTS} there, so it is no run folder.")
    lines: list[dict[str, Any]] = []
    try:
        for _, line in read_events(path):
            lines.append(line)
    except ValueError as error:
        raise UserError(f"{path}: line {len(lines) + 1} is damaged ({error}).") from error
    return fold(lines)


def write(folder: Path) -> Record:
    """Make the report files of a run folder; each appears whole or not at all.

    Args:
        folder: the run folder; reports that are there are replaced.

    Returns:
        The record, with the files of the report among its files.

    Raises:
        UserError: there are no events, or a line is damaged.
        OSError: a file cannot be written.
    """
    record = read(folder)
    picture = plot_png(record)
    names = {"report": "report.md", "rounds": "rounds.csv", "summary": "summary.json"}
    if picture is not None:
        names["plot"] = "plot.png"
    record.files |= {name: str(folder / file) for name, file in names.items()}
    content = {
        "rounds": rounds_csv(record).encode(),
        "summary": as_json(record).encode(),
        "report": markdown(record).encode(),
    }
    if picture is not None:
        content["plot"] = picture
    for name, data in content.items():
        whole.write(folder / names[name], data)
    return record


# ---------------------------------------------------------------- figures of rounds


def _figures(r: Round) -> dict[str, Any]:
    """The figures of a round by name; None where there is none."""

    def of(score: ev.Scored | None, name: str) -> Any:
        return getattr(score, name) if score else None

    a, (error_before, error_after) = r.alignment, r.alignment_errors()
    return {
        "round": r.number,
        "proxy_value": of(r.proxy, "value"),
        "proxy_standard_error": of(r.proxy, "error"),
        "fm_value": of(r.fm, "value"),
        "fm_standard_error": of(r.fm, "error"),
        "gap": r.gap,
        "fm_as_trained_value": of(r.trained, "value"),
        "clients_value": of(r.clients, "value"),
        "clients_rows": of(r.clients, "rows"),
        **{name: _known(getattr(r.finished, name, None)) for name in _OF_ROUND},
        "aligned_neurons": a and a.neurons,
        "aligned_share": a and a.share,
        "align_error_before": error_before,
        "align_error_after": error_after,
        "gap_before_alignment": a and a.gap_before,
        "gap_after_alignment": a and a.gap_after,
        "cosine": r.latest("cosine"),
        "relative_l2": r.latest("relative_l2"),
    }


def _known(value: Any) -> Any:
    """The value with None for NaN and infinity, also inside mappings and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _known(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_known(v) for v in value]
    return value


def rounds_csv(record: Record) -> str:
    """rounds.csv: one row per round, numbers unrounded, unknown values empty.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        CSV with a head line: scores as shares in [0, 1] or in the metric's own unit, times in
        seconds, traffic in bytes by direction and kind.
    """
    ways = [(d, k) for d in DIRECTIONS for k in kinds(record)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_figures(Round(0)), *(f"{d}_{k}_bytes" for d, k in ways)])
    for r in record.rounds:
        sizes = (r.bytes[d].get(k, 0) for d, k in ways)
        writer.writerow([*_figures(r).values(), *sizes])
    return out.getvalue()


def as_json(record: Record) -> str:
    """The text of summary.json.

    Numbers that are not finite become null, which every reader accepts.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        One JSON object, which ends with a newline; names are those of events and of rounds.csv.
    """

    def fields(event: ev.Event | None) -> dict[str, Any]:
        return {k: v for k, v in line_of(event).items() if k != "event"} if event else {}

    tree = {
        "state": record.state,
        "reason": record.reason,
        "run": fields(record.run),
        "task": fields(record.task),
        "model": fields(record.model),
        "distilled": fields(record.distilled),
        "clients": record.nodes and record.nodes.count,
        "baselines": {name: fields(b) for name, b in record.baselines.items()},
        "validation": {model: fields(v) for model, v in record.validation.items()},
        "rounds": [
            _figures(r)
            | {
                "scores": {model: fields(score) for model, score in r.scores.items()},
                "agreement": {when: asdict(a) for when, a in r.agreements.items()},
                "bytes": r.bytes,
            }
            for r in record.rounds
        ],
        "phase_seconds": record.phase_seconds,
        "peak_bytes": record.peak_bytes,
        "bad_replies": bad_replies(record),
        "warnings": record.warnings,
        "files": record.files,
        "seconds": record.seconds,
        "bytes": {d: {k: record.bytes(d, k) for k in kinds(record)} for d in DIRECTIONS},
    }
    return json.dumps(_known(tree), indent=1, ensure_ascii=False) + "\n"
