"""report.html of a run: all there is to see of it in one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpft_console.report import verdict
from fedpft_console.report.plots import panels
from fedpft_console.report.show import bad_replies, headline, warnings
from fedpft_console.report.tables import Sheet, sheets
from fedpft_console.text import human_bytes, human_count, human_seconds, number
from fedpft_console.web import drawing
from fedpft_console.web.document import (
    anchor,
    bullets,
    document,
    facts,
    heading,
    prose,
    table,
)
from fedpft_console.web.drawing import COLOURS, Panel
from server_app.run import schema as ev
from server_app.run.record import DIRECTIONS, Record

_CLIENTS = 200  # rows of the table of clients, and bars of the partition, at most
_STACKED = 10  # labels that have a colour of their own in the partition; the rest share one


def html(record: Record, head: str = "") -> str:
    """The report of a run as one page. Equal records give equal bytes.

    Args:
        record: a run in any state: finished, failed or still running.
        head: further HTML for the page's head, such as what makes a live page come again.

    Returns:
        The whole file, with plots in it and nothing to be loaded.
    """
    tables = [s for s in sheets(record) if s.title != "Files"]
    beside = verdict.sheet(record)
    parts: list[tuple[str, str]] = []  # heading and HTML of each part of the page
    if beside.rows:
        parts.append((beside.title, table(beside)))
    drawn = panels(record)
    if drawn:
        parts.append(("By round", heading("By round") + _figures(drawn, _alt(record))))
    parts += [(s.title, table(s)) for s in tables if s.title not in _LATE]
    parts += [(s.title, table(s)) for s in verdict.labels(record)]
    parts += _clients(record)
    parts += [(s.title, table(s)) for s in tables if s.title in _LATE]
    parts.append(_left(record))
    files = [[name, Path(path).name] for name, path in record.files.items()]
    if files:
        made = Sheet("Files", ["", "in the run folder"], files)
        parts.append((made.title, table(made)))
    body = [
        f"<h1>{escape(_title(record))}</h1>",
        f'<p class="lead">{prose(headline(record))} {prose(verdict.sentence(record))}</p>',
        facts(_facts(record)),
        *_notices(record),
        _contents([title for title, _ in parts]),
        *(part for _, part in parts),
    ]
    return document(_title(record), body, head)


_LATE = ("Traffic", "Time and memory", "Model")


def _title(record: Record) -> str:
    return f"{_short(record.task.name)}: report of a run" if record.task else "Report of a run"


def _short(name: str) -> str:
    """A name; of a path its last two parts, since the page may be given away."""
    return "/".join(Path(name).parts[-2:]) if name.startswith("/") else name


def _contents(titles: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{anchor(t)}">{escape(t)}</a></li>' for t in titles)
    return f'<nav aria-label="Parts of this page"><ul>{items}</ul></nav>'


def _facts(record: Record) -> dict[str, str]:
    task, run, model = record.task, record.run, record.model
    out = {"state": record.state}
    if model:
        out["model"] = Path(model.name).name or model.name
        out["FM / sub-FM parameters"] = (
            f"{human_count(model.fm_parameters)} / {human_count(model.proxy_parameters)}"
        )
    if record.nodes:
        out["clients"] = str(record.nodes.count)
    if run:
        out["clients a round"] = str(run.clients_per_round)
        out["rounds"] = f"{run.rounds} (one-shot)" if run.rounds == 1 else str(run.rounds)
        out["method"] = run.method.replace("fedpft", "FedPFT")
        out["seed"] = str(run.seed)
        out["version"] = run.version
    if task:
        out["task"] = task.kind
        out["rows (train / validation / test)"] = f"{task.train} / {task.validation} / {task.test}"
        out["public rows"] = str(task.public)
        out["labels"] = _some(task.labels)
    if record.distilled:
        d = record.distilled
        out["distillation"] = (
            f"{d.steps} steps in {human_seconds(d.seconds)}, loss {number(d.loss_first)} to "
            f"{number(d.loss_last)}"
        )
    if record.seconds is not None:
        out["time"] = human_seconds(record.seconds)
    return out


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _notices(record: Record) -> list[str]:
    out = []
    for title, items in (
        ("Warnings", warnings(record)),
        ("Replies not used", bad_replies(record)),
    ):
        if items:
            out.append(f'{heading(title)}<div class="warn">{bullets(items)}</div>')
    return out


def _figures(found: Sequence[Panel], alts: dict[str, str]) -> str:
    drawn = (drawing.figure(p, f"panel-{p.file}", alts.get(p.file, "")) for p in found)
    return '<div class="plots">' + "".join(drawn) + "</div>"


def _alt(record: Record) -> dict[str, str]:
    """What is said instead of a plot: where its curves begin and end."""
    out = {}
    scores = [
        f"{name} {first.value:.3g} after round {first.round}, {last.value:.3g} after {last.round}"
        for name, model in (("sub-FM", "proxy"), ("plugged-in FM", "fm"))
        if (some := [r.scores[model] for r in record.rounds if model in r.scores])
        for first, last in [(some[0], some[-1])]
    ]
    if scores:
        out["scores"] = f"Plot of scores by round: {'; '.join(scores)}. A table below has them."
    sums = [sum(sum(r.bytes[d].values()) for d in DIRECTIONS) for r in record.rounds]
    if any(sums):
        out["traffic"] = (
            f"Plot of traffic by round: {human_bytes(max(sums))} at most, "
            f"{human_bytes(sums[-1])} in the last. The table of traffic has the sums."
        )
    cosines = [v for r in record.rounds if (v := r.latest("cosine")) is not None]
    if cosines:
        out["agreement"] = (
            f"Plot of gradient agreement by round: cosine {cosines[0]:.2f} at first, "
            f"{cosines[-1]:.2f} at last."
        )
    return out


# ---------------------------------------------------------------- clients


def _clients(record: Record) -> list[tuple[str, str]]:
    """The partition as a picture, and the table of clients."""
    title, out = "Clients", []
    picture = _partition(record)
    if picture:
        out.append(_figures([picture[0]], {"partition": picture[1]}))
    sheet = _table_of_clients(record)
    if sheet.rows:
        out.append(table(sheet, level=3))
    return [(title, heading(title) + "".join(out))] if out else []


def _rows_of(record: Record) -> dict[str, dict[str, int]]:
    """Rows by client and label; by client alone where labels are not known."""
    names = set(record.nodes.names) if record.nodes else set()
    p = record.partition
    if p and names and names <= set(p.clients):
        return {name: p.clients[name] for name in sorted(names)}
    said = {x.client: x.examples for r in record.rounds for x in r.replies if x.examples}
    return {name: {"rows": said[name]} for name in sorted(said)}


def _partition(record: Record) -> tuple[Panel, str] | None:
    """The picture and what is said instead of it."""
    found = dict(list(_rows_of(record).items())[:_CLIENTS])
    if len(found) < 2:
        return None
    sums: dict[str, int] = {}
    for rows in found.values():
        for label, n in rows.items():
            sums[label] = sums.get(label, 0) + n
    named = sorted(sums, key=lambda label: -sums[label])[: _STACKED - (len(sums) > _STACKED)]
    named = [label for label in sums if label in named]
    groups = {label: [rows.get(label, 0) for rows in found.values()] for label in named}
    if len(sums) > len(named):
        rest = [sum(rows.values()) for rows in found.values()]
        groups["other labels"] = [
            n - sum(groups[label][i] for label in named) for i, n in enumerate(rest)
        ]

    def draw(axis: Any) -> None:
        base = [0] * len(found)
        for i, (label, counts) in enumerate(groups.items()):
            axis.bar(range(len(found)), counts, bottom=base, width=0.85, label=label,
                     color=COLOURS[i % len(COLOURS)], linewidth=0)  # fmt: skip
            base = [a + b for a, b in zip(base, counts, strict=True)]
        axis.set_ylabel("training rows")
        axis.set_xlabel("client")
        step = -(-len(found) // 12)
        ticks = range(0, len(found), step)
        axis.set_xticks(list(ticks), [list(found)[i].removeprefix("client-")[:8] for i in ticks])
        if len(groups) > 1:
            axis.set_ylim(0, 1.4 * max(base))
            axis.legend(fontsize=7, loc="upper center", ncols=3, handlelength=1)

    totals = [sum(rows.values()) for rows in found.values()]
    alt = (
        f"Plot of training rows by client: {len(found)} clients with {min(totals)} to "
        f"{max(totals)} rows. The table of clients has the figures."
    )
    scheme = record.partition.scheme if record.partition and len(groups) > 1 else ""
    caption = f"federation.partition = {scheme}." if scheme else "As clients announce them."
    if scheme and record.partition and record.partition.by != "label":
        caption = f"federation.partition = {scheme}, by {record.partition.by}."
    return Panel("partition", "Clients", "Training rows of each client", caption, (), draw), alt


def _table_of_clients(record: Record) -> Sheet:
    rows_of = _rows_of(record)
    replies: dict[str, list[ev.Reply]] = {}
    for r in record.rounds:
        for x in r.replies:
            replies.setdefault(x.client, []).append(x)
    sizes: dict[str, dict[str, int]] = {}
    for r in record.rounds:
        for direction in DIRECTIONS:
            for client, n in r.by_client[direction].items():
                own = sizes.setdefault(client, dict.fromkeys(DIRECTIONS, 0))
                own[direction] += n
    names = sorted({*rows_of, *replies, *(record.nodes.names if record.nodes else ())})
    out = []
    for name in names[:_CLIENTS]:
        good = [x for x in replies.get(name, ()) if x.status == "ok"]
        bad = [x for x in replies.get(name, ()) if x.status not in ("ok", "need")]
        trained = [x.train_seconds for x in good if x.train_seconds is not None]
        sent = sizes.get(name, {})
        out.append([
            name,
            str(sum(rows_of[name].values())) if name in rows_of else "",
            str(len(good)),
            str(len(bad)) if bad else "",
            number(good[-1].loss) if good else "",
            human_seconds(fmean(trained)) if trained else "",
            human_bytes(sent["down"]) if sent else "",
            human_bytes(sent["up"]) if sent else "",
        ])  # fmt: skip
    columns = [
        "client", "rows", "good replies", "other replies", "last loss", "training a round",
        "received", "sent",
    ]  # fmt: skip
    keep = [i for i in range(len(columns)) if any(row[i] for row in out)]
    more = len(names) - _CLIENTS
    notes = [f"{more} more clients are not listed."] if more > 0 else []
    return Sheet(
        "Client by client",
        [columns[i] for i in keep],
        [[row[i] for i in keep] for row in out],
        notes,
    )


# ---------------------------------------------------------------- what left the server


_SAID = {
    "package": "the sub-FM with its tokenizer and settings",
    "patch": "weights of the sub-FM that changed since",
    "adapter": "the adapter: LoRA factors and head",
    "counts": "how often each neuron was inactive",
    "statistics": "sums over rows by label",
    "head": "heads at which clients sum slopes",
    "merging": "figures by which a merge weighs the adapters",
    "control": "requests and settings",
}


def _left(record: Record) -> tuple[str, str]:
    """What left the server and what came back, in words and bytes."""
    title = "What left the server"
    seen = dict.fromkeys(k for r in record.rounds for d in DIRECTIONS for k in r.bytes[d])
    rows = [
        [
            _SAID.get(kind, kind),
            human_bytes(record.bytes("down", kind)) if record.bytes("down", kind) else "",
            human_bytes(record.bytes("up", kind)) if record.bytes("up", kind) else "",
        ]
        for kind in seen
    ]
    m = record.model
    notes = ["No row of anybody's data was sent, in either direction; neither was the FM itself."]
    if m and m.fm_parameters:
        if m.proxy_parameters >= m.fm_parameters:
            notes = ["No row of anybody's data was sent. Clients were sent the whole FM."]
        else:
            share = 100 * m.proxy_parameters / m.fm_parameters
            notes.append(f"The sub-FM has {share:.1f} % of the FM's parameters.")
    sheet = Sheet(title, ["", "to clients", "from clients"], rows, notes)
    return title, table(sheet) if rows else f"{heading(title)}<p>Nothing yet.</p>"
