"""`fedpft watch`: show a run's page in a browser while the run goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `watch` is added.
    """
    watch = commands.add_parser(
        "watch", help="show a run's page in a browser on this machine while the run goes on"
    )
    watch.add_argument("run", metavar="RUN", help="run folder")
    watch.add_argument(
        "--port", type=int, default=0, metavar="PORT", help="of the page (default: any free one)"
    )
    watch.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Serve the page of a run folder until interrupted.

    Args:
        args: `run`, the run folder, and `port`.
        console: where the page's address is printed.

    Returns:
        The exit status, 0, after Ctrl-C.

    Raises:
        UserError: there is no such folder, it is of no run, or the port cannot be had.
    """
    from fedpft_console.web import watch

    folder = Path(args.run).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder.")
    if not any((folder / name).is_file() for name in ("config.yaml", "events.jsonl")):
        raise UserError(f"{folder}: it holds neither config.yaml nor events.jsonl: no run folder.")
    with watch.serve(folder, args.port) as server:
        console.print(
            f"http://{watch.HOST}:{server.server_port}/ shows the run; Ctrl-C ends this "
            "command, not the run",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
