"""`fedpft plugins`: what can be chosen, here and from installed packages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fedpft_console import trackers
from fedpft_core import registry
from fedpft_core.config import OWN_TASKS
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
        own = _own(folder)
        added = {p.name: p for p in registry.plugins(folder, own)}
        for name in (*own, *(n for n in registry.names(folder) if n not in own)):
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
    for name in trackers.names():
        origin, fault = trackers.origin(name), trackers.fault(name)
        bad |= bool(fault and origin != "fedpft")
        style = "bold red" if origin != "fedpft" else "dim"
        table.add_row("tracker", name, origin, Text(fault, style=style))
    console.print(table)
    return 1 if bad else 0


def _own(folder: str) -> tuple[str, ...]:
    """What is here and no file of a folder: families and tasks."""
    if folder == "task":
        return OWN_TASKS
    if folder == "family":
        from fedpft_core.model.families import FAMILIES  # torch takes seconds

        return tuple(FAMILIES)
    return ()


def _fault(folder: str, name: str) -> str:
    """Why a plugin cannot be used; empty where it can."""
    try:
        if folder in ("family", "task"):
            registry.held(folder, name)
        else:
            registry.load(folder, name)
    except UserError as error:
        return str(error)
    return ""
