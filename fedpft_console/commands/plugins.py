"""`fedpft plugins`: the choices of saliency, alignment, selection and aggregation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fedpft_core import registry
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `plugins` is added.
    """
    plugins = commands.add_parser(
        "plugins", help="list what can be chosen, own parts and installed plugins"
    )
    plugins.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """List every choice and where it is from; plugins are imported to see that they can be.

    Args:
        args: nothing is asked for.
        console: where the table is printed.

    Returns:
        The exit status: 1 when a plugin cannot be used, else 0.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "choice", "from", "", box=box.SIMPLE_HEAD)
    bad = False
    for folder, group in registry.GROUPS.items():
        added = {p.name: p for p in registry.plugins(folder)}
        for name in registry.names(folder):
            plugin = added.get(name)
            if plugin is None or plugin.hidden:
                table.add_row(folder, name, "fedpft", "")
                continue
            fault = _fault(folder, name)
            bad |= bool(fault)
            table.add_row(folder, name, plugin.origin, Text(fault, style="bold red"))
        for plugin in added.values():
            if plugin.hidden:
                bad = True
                said = f"hidden: fedpft has a {plugin.name} of its own in {group}"
                table.add_row(folder, plugin.name, plugin.origin, Text(said, style="bold red"))
    console.print(table)
    return 1 if bad else 0


def _fault(folder: str, name: str) -> str:
    """Why a plugin cannot be used; empty where it can."""
    try:
        registry.load(folder, name)
    except UserError as error:
        return str(error)
    return ""
