"""`fedpft inspect`: sizes and costs of the foundation model and its proxy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpft_console.commands import settings
from fedpft_core import config

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `inspect` is added.
    """
    look = commands.add_parser(
        "inspect",
        parents=[settings.arguments()],
        help="sizes and costs of the foundation model and its proxy",
    )
    look.add_argument(
        "--json", action="store_true",
        help="print what `fedpft node check --plan` needs to know of the plan's size, as JSON",
    )  # fmt: skip
    look.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Print sizes and costs of the foundation model and its proxy.

    Args:
        args: `config` and `override` (the keys), and `json` for a description that nodes can read.
        console: where the tables are printed; JSON goes to standard output.

    Returns:
        The exit status, 0.

    Raises:
        UserError: a key is bad, or a file that a key names is missing.
    """
    flat = settings.absolute_files(config.to_flat(config.from_flat(settings.collect(args))))
    from fedpft_core.proxy.cost import inspect

    if args.json:
        from fedpft_core.proxy.size import describe

        print(describe(config.from_flat(flat)).to_json(), end="")
        return 0
    found: Mapping[str, Any] = inspect(config.from_flat(flat))
    for table in found.get("tables", [found]):
        _print_table(console, table)
    return 0


def _print_table(console: Console, table: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [[_cell(v) for v in row] for row in table["rows"]]
    shown = Table(box=box.SIMPLE_HEAD, title=table.get("title"), title_justify="left")
    for i, name in enumerate(table["columns"]):
        cells = [row[i] for row in rows if row[i]]
        numeric = all(re.fullmatch(r"[-+]?[\d,.e/ %x+-]+", cell) for cell in cells)
        shown.add_column(str(name), justify="right" if numeric and cells else "left")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    for note in table.get("notes", ()):
        console.print(str(note), markup=False, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
