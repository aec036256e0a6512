"""`fedpft report`: make the report of a run folder again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_console.commands.folder import EVENTS_FILE, writing
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `report` is added.
    """
    again = commands.add_parser("report", help="make the report of a run folder again")
    again.add_argument("run", metavar="RUN", help="run folder, of a running or failed run too")
    again.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Make the report of a run folder again, and print its tables.

    Args:
        args: `run`, the run folder.
        console: where the tables are printed.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the folder holds no events, a line of them is damaged, or the report cannot be
            written.
    """
    from fedpft_console import report

    folder = Path(args.run).expanduser().absolute()
    if not (folder / EVENTS_FILE).is_file():
        raise UserError(f"{folder}: no {EVENTS_FILE} there, so it is no run folder.")
    with writing(folder):
        summary = report.write(folder)
    for table in report.render(summary):
        console.print(table)
    return 0
