"""What a run did, in tables, files and a plot, all made from its events.

`summarise` turns events into a `Summary`, `tables` says what to show, `render` and `markdown`
show it, and `write` puts report.md, rounds.csv, summary.json and plot.png into the run folder.
Works for a finished, a failed and a still running run.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_console.progress import (
    BASELINES,
    PHASES,
    Event,
    human_bytes,
    human_count,
    human_seconds,
    number,
    percent,
)
from fedpft_core.errors import UserError
from server_app.run.events import read_events

if TYPE_CHECKING:
    from rich.table import Table

EVENTS = "events.jsonl"
DIRECTIONS = ("down", "up")
# The order in which kinds of traffic are listed; others follow by name.
KINDS = ("package", "patch", "adapter", "counts", "control")
# When gradients were compared in a round, latest last: the latest is plotted.
MOMENTS = ("start", "before-align", "after-align", "end")


@dataclass
class Score:
    """Accuracy on so many rows."""

    accuracy: float
    rows: int
    loss: float | None = None
    split: str = ""

    @property
    def standard_error(self) -> float | None:
        """Binomial standard error; None without rows."""
        if self.rows <= 0:
            return None
        return math.sqrt(max(0.0, self.accuracy * (1 - self.accuracy)) / self.rows)

    def text(self) -> str:
        """`57.1 ± 1.6 %`"""
        error = self.standard_error
        spread = "" if error is None else f" ± {100 * error:.1f}"
        return f"{100 * self.accuracy:.1f}{spread} %"


@dataclass
class Round:
    """One round; what did not happen or is not known yet is None."""

    number: int
    proxy: Score | None = None
    fm: Score | None = None
    trained: Score | None = None  # the FM with the head as clients left it, where `fm` has another
    clients: Score | None = None  # the sub-FM on rows that clients keep from training
    loss: float | None = None
    seconds: float | None = None
    exchange_seconds: float | None = None
    train_seconds: float | None = None
    evaluate_seconds: float | None = None
    overhead_seconds: float | None = None
    good: int | None = None
    bad: int | None = None
    examples: int | None = None
    aligned_neurons: int | None = None
    align_error_before: float | None = None
    align_error_after: float | None = None
    aligned_share: float | None = None
    gap_before: float | None = None
    gap_after: float | None = None
    cosine: dict[str, float] = field(default_factory=dict)
    relative_l2: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=lambda: {d: {} for d in DIRECTIONS})

    @property
    def gap(self) -> float | None:
        """Plug-in gap, accuracy of the sub-FM minus that of the plugged-in FM."""
        if self.proxy is None or self.fm is None:
            return None
        return self.proxy.accuracy - self.fm.accuracy

    def latest(self, values: Mapping[str, float]) -> float | None:
        """The value of the latest moment of this round."""
        known = [values[m] for m in MOMENTS if m in values]
        return known[-1] if known else None


@dataclass
class Summary:
    """A run as its events tell it."""

    state: str = "running"
    reason: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    distilled: dict[str, Any] = field(default_factory=dict)
    clients: int | None = None
    baselines: dict[str, Score] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    bad_replies: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def bytes(self, direction: str, kind: str) -> int:
        """Bytes of one kind in one direction over all rounds."""
        return sum(r.bytes[direction].get(kind, 0) for r in self.rounds)

    @property
    def kinds(self) -> list[str]:
        """Kinds of traffic that occurred, in reading order."""
        seen = {k for r in self.rounds for d in DIRECTIONS for k in r.bytes[d]}
        return [k for k in KINDS if k in seen] + sorted(seen.difference(KINDS))


# ---------------------------------------------------------------- events → summary


def read(folder: Path) -> list[Event]:
    """All events of a run folder.

    Raises UserError when there are none or a line is damaged.
    """
    path = folder / EVENTS
    if not path.is_file():
        raise UserError(f"{folder}: no {EVENTS} there, so it is no run folder.")
    events: list[Event] = []
    try:
        for _, event in read_events(path):
            events.append(event)
    except ValueError as error:
        raise UserError(f"{path}: line {len(events) + 1} is damaged ({error}).") from error
    return events


_OF_ROUND = (
    "loss", "seconds", "exchange_seconds", "train_seconds", "evaluate_seconds",
    "overhead_seconds", "good", "bad", "examples",
)  # fmt: skip
_PER_ROUND = frozenset(
    ("round_finished", "evaluation", "client_validation", "bytes", "alignment", "agreement")
)


def _clean(event: Event) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in ("t", "event")}


def summarise(events: Iterable[Event]) -> Summary:
    """Fold events, in order, into a Summary.

    A resumed run cuts the file back to its checkpoint and appends: time is added up over the
    parts. Side runs (events with `arm`) are left out.
    """
    s = Summary()
    rounds: dict[int, Round] = {}
    earlier = 0.0
    start = last = None
    for event in events:
        if event.get("arm"):
            continue
        get, kind, now = event.get, event["event"], float(event["t"])
        n = get("round")
        at = Round(0)
        if kind in _PER_ROUND and n is not None:
            at = rounds.setdefault(int(n), Round(int(n)))
        start = now if start is None else start
        if kind == "run_started":
            if last is not None:
                earlier += last - start
            start = now
            s.run, s.state, s.reason = _clean(event), "running", ""
        elif kind == "phase_finished":
            name = str(get("phase"))
            s.phase_seconds[name] = s.phase_seconds.get(name, 0.0) + float(get("seconds") or 0)
        elif kind == "task":
            s.task = _clean(event)
        elif kind == "model":
            s.model = _clean(event)
        elif kind == "distilled":
            s.distilled = _clean(event)
        elif kind == "nodes":
            s.clients = get("count")
        elif kind == "baseline":
            s.baselines[str(get("name"))] = Score(float(event["value"]), int(get("rows") or 0))
        elif kind == "reply" and get("status") not in ("ok", "need"):
            why = get("reason") or "no reason"
            s.bad_replies.append(f"round {n}, client {get('client')}: {get('status')}, {why}")
        elif kind == "round_finished":
            for name in _OF_ROUND:
                setattr(at, name, get(name))
        elif kind == "evaluation":
            score = Score(
                float(event["value"]), int(get("rows") or 0), get("loss"), str(get("split", ""))
            )
            field_of = {"proxy": "proxy", "fm": "fm", "fm-as-trained": "trained"}
            if get("model") in field_of:
                setattr(at, field_of[str(get("model"))], score)
        elif kind == "client_validation":
            at.clients = Score(float(event["value"]), int(get("rows") or 0))
        elif kind == "bytes":
            counts = at.bytes[str(event["direction"])]
            name = str(event["kind"])
            counts[name] = counts.get(name, 0) + int(event["bytes"])
        elif kind == "alignment":
            at.aligned_neurons, at.aligned_share = get("neurons"), get("share")
            at.gap_before, at.gap_after = get("gap_before"), get("gap_after")
            blocks = get("blocks") or []
            if blocks:
                at.align_error_before = _mean([b.get("error_before") for b in blocks])
                at.align_error_after = _mean([b.get("error_after") for b in blocks])
        elif kind == "agreement":
            when = str(get("when", "end"))
            if get("cosine") is not None:
                at.cosine[when] = float(event["cosine"])
            if get("relative_l2") is not None:
                at.relative_l2[when] = float(event["relative_l2"])
        elif kind == "memory":
            name = str(get("process", "server"))
            s.peak_bytes[name] = max(s.peak_bytes.get(name, 0), int(event["peak_rss_bytes"]))
        elif kind == "files":
            s.files |= {str(k): str(v) for k, v in (get("paths") or {}).items()}
        elif kind == "warning":
            s.warnings.append(str(get("text")))
        elif kind == "run_finished":
            s.state, s.reason = "finished", ""
        elif kind == "run_failed":
            s.state, s.reason = "failed", str(get("reason"))
        if kind != "memory":  # may be added after the end
            last = now
    s.rounds = [rounds[n] for n in sorted(rounds)]
    if start is not None and last is not None:
        s.seconds = earlier + last - start
    return s


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------- summary → tables


@dataclass(frozen=True)
class Sheet:
    """One table: the first column is text, the others are right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(s: Summary) -> list[Sheet]:
    """The tables of a report, in order; those without rows are left out."""
    made = [_sizes(s), _accuracy(s), _alignments(s), _traffic(s), _phases(s), _files(s)]
    return [sheet for sheet in made if sheet.rows]


def _sizes(s: Summary) -> Sheet:
    rows = []
    if s.model:
        m = s.model
        for name, parameters, size in (
            ("parameters", "fm_parameters", "proxy_parameters"),
            ("in transformer blocks", "fm_block_parameters", "proxy_block_parameters"),
            ("bytes", "fm_bytes", "proxy_bytes"),
        ):
            before, after = m.get(parameters), m.get(size)
            if not before or after is None:
                continue
            show = human_bytes if name == "bytes" else human_count
            rows.append([name, show(before), show(after), f"{100 * after / before:.1f} %"])
    return Sheet("Model", ["", "FM", "sub-FM", "share"], rows)


def _accuracy(s: Summary) -> Sheet:
    columns = ["", "sub-FM", "plugged-in FM", "gap", "head as trained", "training loss",
               "sub-FM at clients"]  # fmt: skip
    rows = []
    order = [b for b in BASELINES if b in s.baselines]
    for name in order + sorted(set(s.baselines).difference(order)):
        rows.append([BASELINES.get(name, name), "", s.baselines[name].text(), "", "", "", ""])
    method = str(s.run.get("method") or "fedpft").replace("fedpft", "FedPFT")
    for r in s.rounds:
        if r.proxy is None and r.fm is None and r.clients is None:
            continue
        mark = " *" if r.aligned_neurons else ""
        rows.append([
            f"{method} after round {r.number}{mark}" if r.number else f"{method} before round 1",
            r.proxy.text() if r.proxy else "-",
            r.fm.text() if r.fm else "-",
            f"{100 * r.gap:+.1f}" if r.gap is not None else "-",
            r.trained.text() if r.trained else "-",
            number(r.loss),
            r.clients.text() if r.clients else "-",
        ])  # fmt: skip
    notes = []
    if rows:
        sizes = sorted({x.rows for r in s.rounds for x in (r.proxy, r.fm) if x and x.rows}
                       | {b.rows for b in s.baselines.values() if b.rows})  # fmt: skip
        if sizes:
            counted = " or ".join(str(n) for n in sizes)
            notes.append(f"± is one binomial standard error on {counted} rows.")
        if any(r.gap is not None for r in s.rounds):
            notes.append("Plug-in gap: sub-FM minus plugged-in FM, in points.")
        if any(r.aligned_neurons for r in s.rounds):
            notes.append("* neurons of the sub-FM were re-aligned after this round.")
    known = set(columns)
    if any(r.trained for r in s.rounds):
        notes.append("Head as trained: the FM without refitting the head to it (plug.refit).")
    else:
        known.discard("head as trained")
    if any(r.clients for r in s.rounds):
        notes.append("At clients: the sub-FM on rows that clients keep from training.")
    else:
        known.discard("sub-FM at clients")
    keep = [i for i, name in enumerate(columns) if name in known]
    return Sheet(
        "Accuracy", [columns[i] for i in keep], [[row[i] for i in keep] for row in rows], notes
    )


def _alignments(s: Summary) -> Sheet:
    """What each re-alignment changed: before → after."""

    def change(
        before: float | None, after: float | None, scale: float = 1.0, form: str = ".3f"
    ) -> str:
        shown = [f"{scale * v:{form}}" if v is not None else "-" for v in (before, after)]
        return " → ".join(shown)

    rows = [
        [
            f"after round {r.number}",
            f"{r.aligned_neurons:,} ({100 * (r.aligned_share or 0):.0f}%)",
            change(r.align_error_before, r.align_error_after),
            change(r.cosine.get("before-align"), r.cosine.get("after-align")),
            change(r.relative_l2.get("before-align"), r.relative_l2.get("after-align")),
            change(r.gap_before, r.gap_after, 100, "+.1f"),
        ]
        for r in s.rounds
        if r.aligned_neurons
    ]
    columns = [
        "", "neurons moved", "output error", "gradient cosine", "gradient relative L2", "gap",
    ]  # fmt: skip
    return Sheet("Re-alignments, before → after", columns, rows, [])


def _traffic(s: Summary) -> Sheet:
    rows = []
    for kind in s.kinds:
        both = [s.bytes(d, kind) for d in DIRECTIONS]
        rows.append([kind, *(human_bytes(b) for b in (*both, sum(both)))])
    if rows:
        sums = [sum(s.bytes(d, k) for k in s.kinds) for d in DIRECTIONS]
        rows.append(["all", *(human_bytes(b) for b in (*sums, sum(sums)))])
    return Sheet("Traffic", ["kind", "to clients", "from clients", "both"], rows)


def _phases(s: Summary) -> Sheet:
    rows: list[tuple[str, float]] = []
    for name, seconds in s.phase_seconds.items():
        if name == "align":  # part of its round, listed below
            continue
        rows.append((PHASES.get(name, name) if name != "round" else "rounds", seconds))
        if name == "round":
            exchange = sum(r.exchange_seconds or 0.0 for r in s.rounds)
            scored = sum(r.evaluate_seconds or 0.0 for r in s.rounds)
            parts = {
                "exchange with training clients": exchange,
                "evaluation": scored,
                "re-alignment": s.phase_seconds.get("align", 0.0),
            }
            rows += [(f"  of which {part}", sec) for part, sec in parts.items() if sec]
    if s.seconds is not None and rows:
        rows.append(("whole run, without starting Flower", s.seconds))
    cells = [[name, human_seconds(sec)] for name, sec in rows]
    cells += [[f"peak memory, {name}", human_bytes(b)] for name, b in s.peak_bytes.items()]
    return Sheet("Time and memory", ["", ""], cells)


def _files(s: Summary) -> Sheet:
    return Sheet("Files", ["", "path"], [[name, path] for name, path in s.files.items()])


def headline(s: Summary) -> str:
    """One sentence about the run."""
    done = [r for r in s.rounds if r.good is not None]
    planned = s.run.get("rounds", "?")
    if s.state == "finished":
        text = f"Run finished after {len(done)} of {planned} rounds"
    elif s.state == "failed":
        text = f"Run failed after {len(done)} of {planned} rounds: {s.reason}"
    else:
        text = f"Run is not finished: {len(done)} of {planned} rounds so far"
    last = next((r for r in reversed(s.rounds) if r.fm), None)
    if last is not None and last.fm is not None:
        text += f"; plugged-in FM {percent(last.fm.accuracy)} after round {last.number}"
    return text if text.endswith(".") else text + "."


def render(s: Summary) -> list[Table]:
    """The tables for a console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = []
    for sheet in tables(s):
        table = Table(
            box=box.SIMPLE_HEAD,
            show_header=any(sheet.columns),
            title=Text(sheet.title),
            title_justify="left",
            caption=Text("\n".join(sheet.notes)) if sheet.notes else None,
            caption_justify="left",
        )
        text_only = sheet.title == "Files"
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


def markdown(s: Summary) -> str:
    """report.md."""
    lines = ["# Run report", "", headline(s), ""]
    facts = {
        "task": s.task.get("name"),
        "rows": " / ".join(str(s.task[k]) for k in ("train", "validation", "test") if k in s.task),
        "clients": s.clients,
        "method": s.run.get("method"),
        "seed": s.run.get("seed"),
        "version": s.run.get("version"),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    if s.distilled:
        d = s.distilled
        lines.append(
            f"- distilled: {d.get('steps')} steps in {human_seconds(d.get('seconds') or 0)}, "
            f"loss {number(d.get('loss_first'))} to {number(d.get('loss_last'))}"
        )
    for sheet in tables(s):
        lines += ["", f"## {sheet.title}", ""]
        lines.append("| " + " | ".join(_md(c) for c in sheet.columns) + " |")
        right = "---" if sheet.title == "Files" else "---:"
        lines.append("|---|" + f"{right}|" * (len(sheet.columns) - 1))
        lines += ["| " + " | ".join(_md(c) for c in row) + " |" for row in sheet.rows]
        lines += ["", *sheet.notes] if sheet.notes else []
    if any(r.proxy or r.fm for r in s.rounds):
        lines += ["", "![accuracy, traffic and agreement by round](plot.png)"]
    for title, items in (("Replies not used", s.bad_replies), ("Warnings", s.warnings)):
        if items:
            lines += ["", f"## {title}", "", *(f"- {_md(item)}" for item in items)]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def rounds_csv(s: Summary) -> str:
    """rounds.csv: one row per round, numbers unrounded, unknown values empty."""
    kinds = [(d, k) for d in DIRECTIONS for k in s.kinds]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([
        "round", "proxy_accuracy", "proxy_standard_error", "fm_accuracy", "fm_standard_error",
        "gap", "fm_as_trained_accuracy", "clients_accuracy", "clients_rows", *_OF_ROUND,
        "aligned_neurons", "aligned_share", "align_error_before", "align_error_after",
        "gap_before_alignment", "gap_after_alignment", "cosine", "relative_l2",
        *(f"{d}_{k}_bytes" for d, k in kinds),
    ])  # fmt: skip
    for r in s.rounds:
        scores = [v for x in (r.proxy, r.fm)
                  for v in ((x.accuracy, x.standard_error) if x else (None, None))]  # fmt: skip
        writer.writerow([
            r.number, *scores, r.gap, r.trained and r.trained.accuracy,
            r.clients and r.clients.accuracy,
            r.clients and r.clients.rows, *(getattr(r, name) for name in _OF_ROUND),
            r.aligned_neurons, r.aligned_share, r.align_error_before, r.align_error_after,
            r.gap_before, r.gap_after,
            r.latest(r.cosine), r.latest(r.relative_l2),
            *(r.bytes[d].get(k, 0) for d, k in kinds),
        ])  # fmt: skip
    return out.getvalue()


def as_json(s: Summary) -> str:
    """summary.json; numbers that are not finite become null, which every reader accepts."""
    tree = dataclasses.asdict(s)
    for made, r in zip(tree["rounds"], s.rounds, strict=True):
        made["gap"] = r.gap
    totals = {d: {k: s.bytes(d, k) for k in s.kinds} for d in DIRECTIONS}
    return json.dumps(_finite(tree | {"bytes": totals}), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


# ---------------------------------------------------------------- plot

# Okabe and Ito's colours, told apart by readers with any colour vision.
_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#555555",
)  # fmt: skip
_WAY = {"down": "to clients", "up": "from clients"}
_KIND_COLOURS = {
    "package": _BLUE, "patch": _ORANGE, "adapter": _GREEN, "counts": _PURPLE, "control": _GREY,
}  # fmt: skip


def plot_png(s: Summary) -> bytes | None:
    """Accuracy, traffic and agreement by round as a PNG; None when no round was scored."""
    scored = [r for r in s.rounds if r.proxy or r.fm]
    if not scored:
        return None
    # Figure rather than pyplot: no global state, and no window system is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    traffic = [r for r in s.rounds if any(r.bytes[d] for d in DIRECTIONS)]
    compared = [r for r in s.rounds if r.cosine or r.relative_l2 or r.align_error_after is not None]
    panels = 1 + bool(traffic) + bool(compared)
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    _plot_accuracy(axes[0], s, scored)
    if traffic:
        _plot_traffic(axes[1], s, traffic)
    if compared:
        _plot_agreement(axes[-1], compared)
    for axis in axes:
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _plot_accuracy(axis: Any, s: Summary, scored: list[Round]) -> None:
    for label, colour, marker, pick in (
        ("sub-FM", _BLUE, "o", lambda r: r.proxy),
        ("plugged-in FM", _RED, "s", lambda r: r.fm),
    ):
        points = [(r.number, pick(r)) for r in scored if pick(r)]
        if not points:
            continue
        x = [n for n, _ in points]
        y = [100 * p.accuracy for _, p in points]
        bars = [100 * (p.standard_error or 0.0) for _, p in points]
        axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, markersize=4, capsize=2,
                      linewidth=1.6, label=label)  # fmt: skip
    for (name, score), dashes in zip(
        s.baselines.items(), ((6, 2), (2, 2), (1, 3), (8, 2, 1, 2)), strict=False
    ):
        axis.axhline(100 * score.accuracy, color=_GREY, linewidth=1.1, dashes=dashes,
                     label=BASELINES.get(name, name))  # fmt: skip
    moved = [
        (r.number + 0.5, 100 * (r.fm.accuracy + r.gap_after))
        for r in s.rounds
        if r.fm and r.gap_after is not None
    ]
    if moved:
        axis.plot(*zip(*moved, strict=True), "o", color=_BLUE, fillstyle="none", markersize=5,
                  label="sub-FM re-aligned")  # fmt: skip
    aligned = [r.number for r in s.rounds if r.aligned_neurons]
    for i, n in enumerate(aligned):
        axis.axvline(n + 0.5, color=_GREEN, alpha=0.35, linewidth=3,
                     label="re-alignment" if i == 0 else None)  # fmt: skip
    axis.set_title("Accuracy")
    axis.set_ylabel("%")
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="best")


def _plot_traffic(axis: Any, s: Summary, traffic: list[Round]) -> None:
    base = dict.fromkeys((r.number for r in traffic), 0.0)
    tallest = max(sum(sum(r.bytes[d].values()) for d in DIRECTIONS) for r in traffic) / 1e6
    for direction in DIRECTIONS:
        for kind in s.kinds:
            heights = [r.bytes[direction].get(kind, 0) / 1e6 for r in traffic]
            if max(heights) < 0.002 * tallest:  # too thin to see; the table has it
                continue
            axis.bar([r.number for r in traffic], heights, width=0.7,
                     bottom=[base[r.number] for r in traffic],
                     color=_KIND_COLOURS.get(kind, _GREY), edgecolor="white", linewidth=0.5,
                     hatch="" if direction == "down" else "///",
                     label=f"{kind}, {_WAY[direction]}")  # fmt: skip
            for r, h in zip(traffic, heights, strict=True):
                base[r.number] += h
    axis.set_title("Traffic per round")
    axis.set_ylabel("MB")
    axis.set_ylim(0, 1.25 * tallest or 1)
    axis.legend(fontsize=8, loc="upper right")


def _plot_agreement(axis: Any, compared: list[Round]) -> None:
    series = (
        ("gradient cosine", _BLUE, "o", lambda r: r.latest(r.cosine)),
        ("gradient relative difference", _ORANGE, "^", lambda r: r.latest(r.relative_l2)),
        ("output error after re-alignment", _GREEN, "s", lambda r: r.align_error_after),
    )
    label: str | None = "before re-alignment"
    for values, colour, marker in (("cosine", _BLUE, "o"), ("relative_l2", _ORANGE, "^")):
        found = [(r.number, getattr(r, values).get("before-align")) for r in compared]
        known = [(n, v) for n, v in found if v is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker, color=colour, fillstyle="none",
                      markersize=6, label=label)  # fmt: skip
            label = None
    for label, colour, marker, pick in series:
        points = [(r.number, pick(r)) for r in compared if pick(r) is not None]
        if points:
            axis.plot([n for n, _ in points], [v for _, v in points], color=colour,
                      marker=marker, markersize=4, linewidth=1.6, label=label)  # fmt: skip
    axis.set_title("Agreement of sub-FM and FM")
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="best")


# ---------------------------------------------------------------- files


def write(folder: Path) -> Summary:
    """Make the report files of a run folder; each appears whole or not at all.

    Returns the summary, with the files of the report among its files.
    """
    summary = summarise(read(folder))
    picture = plot_png(summary)
    names = {"report": "report.md", "rounds": "rounds.csv", "summary": "summary.json"}
    if picture is not None:
        names["plot"] = "plot.png"
    summary.files |= {name: str(folder / file) for name, file in names.items()}
    content = {
        "rounds": rounds_csv(summary).encode(),
        "summary": as_json(summary).encode(),
        "report": markdown(summary).encode(),
    }
    if picture is not None:
        content["plot"] = picture
    for name, data in content.items():
        _put(folder / names[name], data)
    return summary


def _put(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


__all__ = [
    "Round", "Score", "Sheet", "Summary", "as_json", "headline", "markdown", "plot_png", "read",
    "render", "rounds_csv", "summarise", "tables", "write",
]  # fmt: skip
