"""The tables of a report: what to show of a run, in words and figures."""

from __future__ import annotations

from collections.abc import Callable

from fedpft_console.report import exposure
from fedpft_console.sheet import Sheet
from fedpft_console.text import (
    BASELINES,
    MODELS,
    PHASES,
    Measure,
    human_bytes,
    human_count,
    human_seconds,
    number,
    percent,
)
from server_app.run import schema as ev
from server_app.run.record import DIRECTIONS, Record, Round

__all__ = ["Sheet", "excerpt", "kinds", "sheets"]

# The order in which kinds of traffic are listed; others follow by name.
KINDS = ("package", "patch", "adapter", "counts", "control")
SAMPLES = "Samples"
"""Title of the table of what models wrote."""
_SAMPLES = 8  # rows of it
_EXCERPT = 240  # characters of a cell


def sheets(record: Record) -> list[Sheet]:
    """The tables of a report, in order; those without rows are left out.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Sizes, widths and who had which, scores, one table for each further metric, what models
        wrote, merges on the way, re-alignments, whose statistics were left out, privacy, how far a
        backdoor got, what left of the FM, traffic, time with memory, and files.
    """
    made = [_sizes(record), _widths(record), _clients_of(record), _scores(record),
            *_further(record), _samples(record), _merges(record), _alignments(record),
            _left_out(record), _privacy(record), _backdoor(record), exposure.sheet(record),
            _traffic(record), _phases(record), _files(record)]  # fmt: skip
    return [sheet for sheet in made if sheet.rows]


def kinds(record: Record) -> list[str]:
    """Kinds of traffic that occurred, in reading order: those of `KINDS`, then others by name.

    Args:
        record: a run in any state: finished, failed or still running.

    Returns:
        Names such as `package`, in either direction.
    """
    seen = {k for r in record.rounds for d in DIRECTIONS for k in r.bytes[d]}
    return [k for k in KINDS if k in seen] + sorted(seen.difference(KINDS))


def _sizes(record: Record) -> Sheet:
    rows = []
    if record.model:
        m = record.model
        for name, before, after in (
            ("parameters", m.fm_parameters, m.proxy_parameters),
            ("in transformer blocks", m.fm_block_parameters, m.proxy_block_parameters),
            ("bytes", m.fm_bytes, m.proxy_bytes),
        ):
            if not before or not after:
                continue
            show = human_bytes if name == "bytes" else human_count
            rows.append([name, show(before), show(after), f"{100 * after / before:.1f} %"])
    return Sheet("Model", ["", "FM", "sub-FM", "share"], rows)


def _widths(record: Record) -> Sheet:
    """The sub-FMs of a run with several, and what their clients have sent and received."""
    rows = []
    measure = Measure.of(record.task)
    columns = [
        "width", "FFN neurons", "parameters", "package", "memory (formula)", "clients",
        "to clients", "from clients", f"sub-FM, {measure.name}",
    ]  # fmt: skip
    if record.widths is None:
        return Sheet("Widths", columns, [])
    last = next((r for r in reversed(record.rounds) if r.widths), None)
    for w in record.widths.sizes:
        name = w["width"]
        clients = sum(1 for g in record.given.values() if g.width == name)
        of_width: ev.Scored | None = None
        if last:
            of_width = last.proxy if record.widths.proxy == name else last.widths.get(name)
        sums = record.by_width.get(name, {})
        rows.append([
            name, f"{100 * w['share']:.1f} %", human_count(w["parameters"]),
            human_bytes(w["package"]), human_bytes(w["memory"]), f"{clients}",
            *(human_bytes(sums.get(d, 0)) for d in DIRECTIONS),
            measure.shown(of_width.value) if of_width else "-",
        ])  # fmt: skip
    return Sheet("Widths", columns, rows)


def _clients_of(record: Record) -> Sheet:
    """Which width each client had, and why."""
    rows = [
        [g.client, g.width or "-", g.blocks or "all", g.before or "-", g.reason]
        for _, g in sorted(record.given.items())
    ]
    notes = [
        f"Round {m.round}: {m.client} was moved from {m.before} to {m.width}: {m.reason}."
        for m in record.moved
    ]
    columns = ["client", "width", "blocks with LoRA", "before", "why"]
    return Sheet("Who had which width", columns, rows, notes)


_TRAINED, _CLIENTS = "as trained", "sub-FM at clients"
_EMPTY = frozenset(("", "-"))  # cells that say nothing


def _scores(record: Record) -> Sheet:
    """The metric that decides, by reference point and round."""
    measure = Measure.of(record.task)

    def text(score: ev.Scored | None) -> str:
        return measure.spread(score.value, score.error) if score else "-"

    columns, rows = _by_round(record, measure, text, lambda r: r.gap)
    return Sheet(measure.title, columns, rows, _notes(record, measure) if rows else [])


def _further(record: Record) -> list[Sheet]:
    """A table for each further metric, without what only the deciding one has."""
    return [_further_of(record, m) for m in Measure.further(record.task, record.further)]


def _further_of(record: Record, measure: Measure) -> Sheet:
    def value(score: ev.Scored | None) -> float | None:
        return score.more.get(measure.name) if score else None

    def gap(r: Round) -> float | None:
        proxy, fm = value(r.proxy), value(r.fm)
        return None if proxy is None or fm is None else proxy - fm

    columns, rows = _by_round(record, measure, lambda score: measure.shown(value(score)), gap)
    i = columns.index("training loss")
    rows = [[*row[:i], *row[i + 1 :]] for row in rows]
    # A baseline or round may have been scored by the deciding metric alone.
    rows = [row for row in rows if not _EMPTY.issuperset(row[1:])]
    return Sheet(measure.title, [*columns[:i], *columns[i + 1 :]], rows, _direction(measure))


def _samples(record: Record) -> Sheet:
    """What sub-FM and plugged-in FM wrote last, row by row."""
    shown = [m for m in ("proxy", "fm") if m in record.samples]
    rows: dict[tuple[str, str], list[str]] = {}
    for i, model in enumerate(shown):
        for s in record.samples[model].samples[:_SAMPLES]:
            key = (str(s.get("prompt", "")), str(s.get("reference", "")))
            cells = rows.setdefault(key, [excerpt(text) for text in key] + ["-"] * len(shown))
            cells[2 + i] = excerpt(str(s.get("response", "")))
    columns = ["prompt", "reference", *(MODELS[model] for model in shown)]
    notes = [f"Written {_when(record.samples[shown[-1]].round)}."] if shown else []
    return Sheet(SAMPLES, columns, list(rows.values()), notes)


def _when(round: int) -> str:
    return f"after round {round}" if round else "before round 1"


def excerpt(text: str) -> str:
    """The beginning of a text that anybody may have written, on one line.

    Args:
        text: any.

    Returns:
        At most 240 characters, an ellipsis included; every character that cannot be printed (as
        those that steer terminals) is a question mark, line ends and tabs are blanks.
    """
    line = " ".join(text[: 4 * _EXCERPT].split())
    line = line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in line)


def _by_round(
    record: Record,
    measure: Measure,
    text: Callable[[ev.Scored | None], str],
    gap: Callable[[Round], float | None],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a metric: reference points first, then rounds."""
    columns = ["", "sub-FM", "plugged-in FM", "gap", _TRAINED, "training loss", _CLIENTS]
    rows = []
    order = [b for b in BASELINES if b in record.baselines]
    for name in order + sorted(set(record.baselines).difference(order)):
        rows.append([BASELINES.get(name, name), "", text(record.baselines[name]), "", "", "", ""])
    method = (record.run.method if record.run else "") or "fedpft"
    method = method.replace("fedpft", "FedPFT")
    for r in (r for r in record.rounds if r.proxy or r.fm or r.clients):
        mark = " *" if r.alignment else ""
        between = gap(r)
        rows.append([
            f"{method} after round {r.number}{mark}" if r.number else f"{method} before round 1",
            text(r.proxy),
            text(r.fm),
            measure.difference(between) if between is not None else "-",
            text(r.trained),
            number(r.finished.loss if r.finished else None),
            text(r.clients),
        ])  # fmt: skip
    keep = [
        i
        for i, name in enumerate(columns)
        if name not in (_TRAINED, _CLIENTS) or any(row[i] not in _EMPTY for row in rows)
    ]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _direction(measure: Measure) -> list[str]:
    return [] if measure.higher_is_better else [f"Lower {measure.name} is better."]


def _notes(record: Record, measure: Measure) -> list[str]:
    """What the table of scores needs to be understood."""
    notes = []
    scores = [x for r in record.rounds for x in (r.proxy, r.fm) if x]
    known = [x for x in (*scores, *record.baselines.values()) if x.error is not None]
    sizes = sorted({x.rows for x in known if x.rows})
    if sizes:
        notes.append(f"± is one standard error on {' or '.join(map(str, sizes))} rows.")
    if any(r.gap is not None for r in record.rounds):
        notes.append(
            "Plug-in gap: sub-FM minus plugged-in FM" + (", in points." if measure.share else ".")
        )
    if any(r.alignment for r in record.rounds):
        notes.append("* neurons of the sub-FM were re-aligned after this round.")
    if any(r.trained for r in record.rounds):
        notes.append("As trained: the FM with the adapter as clients left it (plug.method).")
    if any(r.clients for r in record.rounds):
        notes.append("At clients: the sub-FM on rows that clients keep from training.")
    return notes + _direction(measure)


def _change(before: float | None, after: float | None, form: str = ".3f") -> str:
    return " → ".join(format(v, form) if v is not None else "-" for v in (before, after))


def _alignments(record: Record) -> Sheet:
    """What each re-alignment changed: before → after."""
    measure = Measure.of(record.task)

    def moments(r: Round, figure: str) -> str:
        found = r.moments(figure)
        return _change(found.get("before-align"), found.get("after-align"))

    def sub_fm(r: Round) -> str:
        moved = r.alignment.moved if r.alignment else None
        if r.proxy is None or moved is None:
            return "-"
        return f"{measure.shown(r.proxy.value)} → {measure.shown(r.proxy.value + moved)}"

    rows = [
        [
            f"after round {r.number}",
            f"{a.neurons:,} ({100 * a.share:.0f}%)",
            _change(*r.alignment_errors()),
            moments(r, "cosine"),
            moments(r, "relative_l2"),
            sub_fm(r),
        ]
        for r in record.rounds
        if (a := r.alignment)
    ]
    columns = [
        "", "neurons moved", "output error", "gradient cosine", "gradient relative L2", "sub-FM",
    ]  # fmt: skip
    return Sheet("Re-alignments, before → after", columns, rows, [])


def _merges(record: Record) -> Sheet:
    """What could be used while replies were still awaited."""
    merges = [m for r in record.rounds for m in r.merges]
    measure = Measure.of(record.task)
    rows = [
        [
            f"{m.round}",
            f"{m.replies}",
            f"{m.examples}",
            human_seconds(m.seconds if m.clock is None else m.clock),
            number(m.norm),
            "-" if m.value is None else measure.shown(m.value),
        ]
        for m in merges
    ]
    simulated = any(m.clock is not None for m in merges)
    when = "after (simulated)" if simulated else "after"
    columns = ["round", "replies merged", "rows", when, "L2 norm of the adapter", "FM"]
    return Sheet("Merges", columns, rows)


def _left_out(record: Record) -> Sheet:
    """Whose class statistics were left out of the sums, and what that made of the loss."""
    rows = [
        [str(g.round), g.width or "-", out["client"], number(out["gain"]), number(out["error"])]
        for r in record.rounds for g in r.guarded for out in g.left_out
    ]  # fmt: skip
    notes = [
        "By how much the loss on the server's validation rows falls without a client's statistics, "
        "and without those above it (head.guard): its labels are wrong, or its rows unlike these."
    ]
    columns = ["rounds done", "width", "client", "loss falls by", "standard error"]
    return Sheet("Statistics left out", columns, rows, notes if rows else [])


def _privacy(record: Record) -> Sheet:
    spent = [r.privacy for r in record.rounds if r.privacy]
    rows = [
        [str(s.round), number(s.epsilon), number(s.rdp), number(s.pld), number(s.bound)]
        for s in spent
    ]
    notes = []
    if spent:
        s = spent[-1]
        limit = f"; the run may spend {number(s.target)}" if s.target else ""
        notes.append(
            f"Epsilon at delta {number(s.delta)}, all rounds so far together, {s.sampling} "
            f"sampling, noise {number(s.noise)} times the bound{limit}."
        )
    columns = ["round", "epsilon", "by RDP", "by PLD", "bound on changes"]
    return Sheet("Client-level privacy", columns, rows, notes)


def _backdoor(record: Record) -> Sheet:
    """How far a simulated backdoor got."""
    found = [record.backdoor[m] for m in ("proxy", "fm") if m in record.backdoor]
    rows = [[MODELS[b.model], str(b.rows), percent(b.obeyed), percent(b.before)] for b in found]
    notes = []
    if found:
        named = f" ({record.task.labels[0]})" if record.task and record.task.labels else ""
        notes.append(
            f"Share of the rows of other classes that a model gives class 0{named}, which is the "
            "backdoor's, with simulate.trigger in front and without."
        )
    return Sheet("Backdoor", ["", "rows", "with the trigger", "without"], rows, notes)


def _traffic(record: Record) -> Sheet:
    rows = []
    occurred = kinds(record)
    for kind in occurred:
        both = [record.bytes(d, kind) for d in DIRECTIONS]
        rows.append([kind, *(human_bytes(b) for b in (*both, sum(both)))])
    if rows:
        sums = [sum(record.bytes(d, k) for k in occurred) for d in DIRECTIONS]
        rows.append(["all", *(human_bytes(b) for b in (*sums, sum(sums)))])
        for arm, sizes in record.aside.items():
            both = [sizes[d] for d in DIRECTIONS]
            rows.append([f"side run: {arm}", *(human_bytes(b) for b in (*both, sum(both)))])
            sums = [a + b for a, b in zip(sums, both, strict=True)]
        if record.aside:
            rows.append(["with side runs", *(human_bytes(b) for b in (*sums, sum(sums)))])
    return Sheet("Traffic", ["kind", "to clients", "from clients", "both"], rows)


def _phases(record: Record) -> Sheet:
    rows: list[tuple[str, float]] = []
    for name, seconds in record.phase_seconds.items():
        if name == "align":  # part of its round, listed below
            continue
        rows.append((PHASES.get(name, name) if name != "round" else "rounds", seconds))
        if name == "round":
            done = [r.finished for r in record.rounds if r.finished]
            parts = {
                "exchange with training clients": sum(f.exchange_seconds for f in done),
                "evaluation": sum(f.evaluate_seconds for f in done),
                "re-alignment": record.phase_seconds.get("align", 0.0),
            }
            meanwhile = sum(f.meanwhile_seconds for f in done)
            if meanwhile:  # beside the clients' training, re-alignment among it
                del parts["re-alignment"]
                parts["scores and re-alignment meanwhile"] = meanwhile
            rows += [(f"  of which {part}", sec) for part, sec in parts.items() if sec]
    if record.seconds is not None and rows:
        rows.append(("whole run, without starting Flower", record.seconds))
    cells = [[name, human_seconds(sec)] for name, sec in rows]
    cells += [[f"peak memory, {name}", human_bytes(b)] for name, b in record.peak_bytes.items()]
    return Sheet("Time and memory", ["", ""], cells)


def _files(record: Record) -> Sheet:
    return Sheet("Files", ["", "path"], [[name, path] for name, path in record.files.items()])
