"""`fedpft compare`: run a grid of methods, data and seeds in process, and report on it."""

from __future__ import annotations

import argparse

from fedpft_console.compare import command


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `compare` is added.
    """
    grid = commands.add_parser(
        "compare", help="run a grid of methods, data and seeds in process, and report on it"
    )
    command.arguments(grid)
    grid.set_defaults(function=command.command)
