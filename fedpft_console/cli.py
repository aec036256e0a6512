"""The `fedpft` command: its parser, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fedpft_console.commands import (
    audit,
    compare,
    completion,
    config,
    init,
    inspect,
    node,
    plugins,
    publish,
    report,
    run,
    watch,
)
from fedpft_core import __version__
from fedpft_core.errors import RunError, UserError


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line, with all commands.

    Returns:
        A parser whose result has `function`, the command to call with the arguments and a console.
    """
    main_parser = argparse.ArgumentParser(
        prog="fedpft",
        description="Federated fine-tuning of a foundation model through a compressed proxy.",
    )
    main_parser.add_argument("--version", action="version", version=f"fedpft {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = (init, run, watch, report, audit, config, inspect, node, compare, plugins, publish)
    for module in modules:
        module.add(commands)
    completion.add(commands, main_parser)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a UserError or RunError becomes one sentence on standard error.

    Args:
        argv: the arguments without the program's name; None takes those of this process.

    Returns:
        The exit status: 0 good, 1 failed (or the reader of the output went away), 2 bad input, 130
        interrupted. A run that a signal has ended gives 128 plus the signal's number.

    Raises:
        SystemExit: the arguments cannot be parsed (status 2), or only help or version was asked
            for.
    """
    from rich.console import Console

    args = parser().parse_args(argv)
    # Tables need room: a pipe has no width, and rich would assume 80 columns.
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width)
    try:
        status: int = args.function(args, console)
        return status
    except UserError as error:
        print(f"fedpft: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fedpft: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
