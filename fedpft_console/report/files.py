"""The files of a report, and the log they are made from."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpft_console.report.page import html
from fedpft_console.report.plots import plot_png
from fedpft_console.report.show import bad_replies, markdown
from fedpft_console.report.tables import kinds
from fedpft_console.text import Measure
from fedpft_core.disk import whole
from fedpft_core.errors import UserError
from server_app.run import schema as ev
from server_app.run.events import line_of, read_events
from server_app.run.record import DIRECTIONS, Record, Round, fold

EVENTS = "events.jsonl"
_OF_ROUND = (
    "loss", "seconds", "exchange_seconds", "train_seconds", "evaluate_seconds",
    "overhead_seconds", "meanwhile_seconds", "good", "bad", "examples",
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
    names = {"report": "report.md", "rounds": "rounds.csv", "summary": "summary.json",
             "page": "report.html"}  # fmt: skip
    if picture is not None:
        names["plot"] = "plot.png"
    record.files |= {name: str(folder / file) for name, file in names.items()}
    content = {
        "rounds": rounds_csv(record).encode(),
        "summary": as_json(record).encode(),
        "report": markdown(record).encode(),
        "page": html(record).encode(),
    }
    if picture is not None:
        content["plot"] = picture
    for name, data in content.items():
        whole.write(folder / names[name], data)
    return record


# ---------------------------------------------------------------- figures of rounds


# The name of a figure, and how it is had of a round; None where the round has none.
_Column = tuple[str, Callable[[Round], Any]]


def _of(pick: Callable[[Round], Any], name: str) -> Callable[[Round], Any]:
    """A field of an event that a round may not have."""
    return lambda r: getattr(pick(r), name, None)


_COLUMNS: tuple[_Column, ...] = (
    ("round", lambda r: r.number),
    ("proxy_value", _of(lambda r: r.proxy, "value")),
    ("proxy_standard_error", _of(lambda r: r.proxy, "error")),
    ("fm_value", _of(lambda r: r.fm, "value")),
    ("fm_standard_error", _of(lambda r: r.fm, "error")),
    ("gap", lambda r: r.gap),
    ("fm_as_trained_value", _of(lambda r: r.trained, "value")),
    ("clients_value", _of(lambda r: r.clients, "value")),
    ("clients_rows", _of(lambda r: r.clients, "rows")),
    *((name, _of(lambda r: r.finished, name)) for name in _OF_ROUND),
    ("aligned_neurons", _of(lambda r: r.alignment, "neurons")),
    ("aligned_share", _of(lambda r: r.alignment, "share")),
    ("align_error_before", lambda r: r.alignment_errors()[0]),
    ("align_error_after", lambda r: r.alignment_errors()[1]),
    ("gap_before_alignment", _of(lambda r: r.alignment, "gap_before")),
    ("gap_after_alignment", _of(lambda r: r.alignment, "gap_after")),
    ("cosine", lambda r: r.latest("cosine")),
    ("relative_l2", lambda r: r.latest("relative_l2")),
)
_SCORES: tuple[_Column, ...] = (
    ("proxy", lambda r: r.proxy),
    ("fm", lambda r: r.fm),
    ("fm_as_trained", lambda r: r.trained),
    ("clients", lambda r: r.clients),
)


def _columns(record: Record) -> list[_Column]:
    """What there is a figure of in every round of this run, whatever a round lacks."""

    def value(pick: Callable[[Round], Any], name: str) -> Callable[[Round], Any]:
        return lambda r: getattr(pick(r), "more", {}).get(name)

    found = list(_COLUMNS)
    for measure in Measure.further(record.task, record.further):
        name = re.sub(r"[^a-z0-9]+", "_", measure.name.lower())
        found += [(f"{model}_{name}", value(pick, measure.name)) for model, pick in _SCORES]
    return found


def _figures(columns: Sequence[_Column], r: Round) -> dict[str, Any]:
    """The figures of a round by name; None where there is none."""
    return {name: _known(figure(r)) for name, figure in columns}


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
    columns = _columns(record)
    writer.writerow([*(name for name, _ in columns), *(f"{d}_{k}_bytes" for d, k in ways)])
    for r in record.rounds:
        sizes = (r.bytes[d].get(k, 0) for d, k in ways)
        writer.writerow([*_figures(columns, r).values(), *sizes])
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

    columns = _columns(record)
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
        "backdoor": {model: fields(b) for model, b in record.backdoor.items()},
        "rounds": [
            _figures(columns, r)
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
