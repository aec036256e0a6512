"""`fedpft audit`: what of a foundation model its owner has given away, over one or more runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_core import config as configs
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpft_console.sheet import Sheet
    from server_app.owner.neurons import Disclosed
    from server_app.run.record import Record


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `audit` is added.
    """
    audit = commands.add_parser(
        "audit",
        help="what of the foundation model has left, by run and over all runs",
        description="What of the foundation model has left: parameters, exact copies and neurons "
        "of each run, and the ledger of neurons over all runs of this machine.",
    )
    audit.add_argument("run", metavar="RUN", nargs="*", help="run folder, in any state")
    audit.add_argument(
        "--ledger", metavar="DIR",
        help="folder of ledgers (default: plan.ledger of the runs, else the usual one)",
    )  # fmt: skip
    audit.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Print what has left of the FM.

    Args:
        args: `run`, run folders, and `ledger`.
        console: where the tables are printed.

    Returns:
        The exit status, 0.

    Raises:
        UserError: a folder holds no run, or a file in it or a ledger is damaged.
    """
    from fedpft_console import report
    from server_app.owner import neurons

    folders = [Path(run).expanduser().absolute() for run in args.run]
    records = {folder.name: report.read(folder) for folder in folders}
    if len(records) < len(folders):
        records = {str(f): report.read(f) for f in folders}
    roots = [Path(args.ledger)] if args.ledger else _roots(folders)
    ledgers = [found for root in roots for found in neurons.known(root)]
    if args.run:
        _show(console, _runs(records))
        for name, record in records.items():
            _show(console, _parts(name, record))
        _show(console, _together(folders, list(records.values())))
    _show(console, _ledgers(ledgers))
    if not args.run and not ledgers:
        places = ", ".join(str(r) for r in roots)
        console.print(f"No ledger in {places}: nothing has left in a deployment that knew of one.")
    return 0


def _roots(folders: Sequence[Path]) -> list[Path]:
    """Where the runs' ledgers lie; the usual place without runs."""
    from server_app.owner import neurons

    found = []
    for folder in folders:
        file = folder / "config.yaml"
        if file.is_file():
            found.append(neurons.folder(configs.from_flat(configs.read_file(file))))
    return list(dict.fromkeys(found)) or [configs.home() / "disclosed"]


def _runs(records: Mapping[str, Record]) -> Sheet:
    from fedpft_console.report import exposure
    from fedpft_console.sheet import Sheet

    columns = [
        "run", "parameters left", "bit-equal", "embeddings", "attention", "FFN neurons",
        "bit-equal neurons", "in side runs", "sub-FM a client", "sent to all", "sub-FM alone", "FM",
    ]  # fmt: skip
    rows = []
    for name, record in records.items():
        found = exposure.versions(record)
        sent, alone = exposure.sent_bytes(record), exposure.alone(record)
        if not found:
            rows.append([name, *["-"] * 8, sent, *alone])
            continue
        parts = {p.name: p for p in exposure.parts(found)}
        last, most = found[-1], max(e.copied for e in found)
        left = max(e.disclosed for e in found)
        aside = [e for arm in record.exposed if arm for e in exposure.versions(record, arm)]
        whole = parts["all"]
        rows.append([
            name + (" (simulated)" if last.simulated else ""),
            exposure.share(whole.sent, whole.fm), exposure.share(whole.copied, whole.fm),
            *(
                exposure.share(parts[p].sent, parts[p].fm) if p in parts else "-"
                for p in ("embeddings", "attention")
            ),
            exposure.share(left, last.neurons), exposure.share(most, last.neurons),
            exposure.share(max(e.copied for e in aside), last.neurons) if aside else "none",
            exposure.human_bytes(last.bytes), sent, *alone,
        ])  # fmt: skip
    notes = ["Shares are of the FM's parameters (without the head) or FFN neurons."]
    if any(not r.exposed for r in records.values()):
        notes.append("-: a run of a version that did not note it.")
    return Sheet("Runs", columns, rows, notes)


def _parts(name: str, record: Record) -> Sheet:
    from dataclasses import replace

    from fedpft_console.report import exposure

    made = exposure.sheet(record)
    return replace(made, title=f"{name}: {made.title[0].lower()}{made.title[1:]}")


def _together(folders: Sequence[Path], records: Sequence[Record]) -> Sheet:
    """The neurons that the given runs have disclosed between them, by their plans."""
    from fedpft_console.report import exposure
    from fedpft_console.sheet import Sheet
    from fedpft_core.model.plan import Plan
    from fedpft_core.proxy.exposure import kept_neurons
    from server_app.owner.neurons import count

    plans: dict[str, list[Plan]] = {}
    for folder, record in zip(folders, records, strict=True):
        found, file = exposure.versions(record), folder / "plan.json"
        if not found or not file.is_file():
            continue
        try:
            plan = Plan.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {error}.") from error
        plans.setdefault(found[-1].fm, []).append(plan)
    rows = []
    for fm, own in plans.items():
        masks = list(kept_neurons(own[0]))
        for plan in own[1:]:
            masks = [a | b for a, b in zip(masks, kept_neurons(plan), strict=True)]
        total, left = sum(len(m) for m in masks), count(masks)
        rows.append(
            [fm[:12], str(len(own)), f"{total:,}", f"{left:,}", exposure.share(left, total)]
        )
    columns = ["FM", "runs", "FFN neurons", "left", "share"]
    return Sheet("These runs together", columns, rows, ["Simulated runs are counted here."])


def _ledgers(found: Sequence[tuple[str, Disclosed]]) -> Sheet:
    from fedpft_console.report.exposure import share
    from fedpft_console.sheet import Sheet
    from server_app.owner.neurons import count

    rows = [
        [
            fm[:12], str(len(state.runs)), f"{state.total:,}", f"{state.count:,}",
            share(state.count, state.total), share(count(state.copied), state.total),
        ]
        for fm, state in found
    ]  # fmt: skip
    columns = ["FM", "runs", "FFN neurons", "left", "share", "bit-equal"]
    return Sheet("Ledger of all runs in deployments", columns, rows)


def _show(console: Console, sheet: Sheet) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not sheet.rows:
        return
    table = Table(box=box.SIMPLE_HEAD, title=Text(sheet.title), title_justify="left")
    for i, name in enumerate(sheet.columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in sheet.notes:
        console.print(note, markup=False, highlight=False)
