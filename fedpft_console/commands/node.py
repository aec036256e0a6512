"""`fedpft node check`: look at everything a node needs before it joins."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its one action, `check`, to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `node` is added.
    """
    node = commands.add_parser("node", help="look after a node of a federation")
    actions = node.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="before a machine joins: data, room, connection, certificate, speed"
    )
    check.add_argument(
        "--node-config", required=True, metavar='"KEY=VALUE ..."', help="as for flower-supernode"
    )
    check.add_argument("--superlink", default="", metavar="HOST:PORT")
    check.add_argument("--insecure", action="store_true", help="the SuperLink has no TLS")
    check.add_argument(
        "--root-certificates", type=Path, metavar="FILE", help="certificate of the authority (PEM)"
    )
    check.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE")
    check.add_argument(
        "--plan", type=Path, metavar="FILE", help="from `fedpft inspect --json` at the server"
    )
    check.add_argument(
        "--sub-fm-mb", type=float, default=0.0, metavar="MB", help="instead of --plan: size only"
    )
    check.add_argument("--labels", default="", metavar="A,B,...", help="label names of the server")
    check.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS")
    check.add_argument(
        "--policy", action="store_true", help="only show what a server could ask of this node"
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Look at everything a node needs, and print each finding.

    Args:
        args: what a node is given, by the names of the options; `json` prints JSON instead of a
            table.
        console: where the table is printed; JSON goes to standard output.

    Returns:
        The exit status: 1 when something is not as it must be, else 0.

    Raises:
        UserError: --insecure and --root-certificates are both given, or a rule of the policy is
            none.
    """
    from client_app.check import findings
    from client_app.check import node as check

    if args.insecure and args.root_certificates:
        raise UserError("--insecure and --root-certificates exclude each other.")
    if args.policy:
        _show_policy(args, console)
        return 0
    # What one library thinks of another is of no use to who sets up a node.
    warnings.simplefilter("ignore", FutureWarning)
    found = check.check(
        check.Options(
            node_config=args.node_config,
            superlink=args.superlink,
            insecure=args.insecure,
            root_certificates=args.root_certificates,
            key=args.auth_supernode_private_key,
            plan=args.plan,
            sub_fm_mb=args.sub_fm_mb,
            labels=args.labels,
            timeout=args.timeout,
        )
    )
    if args.json:
        print(findings.as_json(found))
    else:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "", box=box.SIMPLE_HEAD)
        style = {findings.PASS: "green", findings.FAIL: "bold red", findings.SKIPPED: "dim"}
        for f in found:
            table.add_row(f.name, Text(f.status, style=style[f.status]), Text(f.text))
        console.print(table)
    return 1 if any(f.status == findings.FAIL for f in found) else 0


def _show_policy(args: argparse.Namespace, console: Console) -> None:
    from client_app import node as nodes
    from client_app.app_hash import app_hash
    from client_app.check import node as check
    from client_app.check.findings import printable
    from client_app.policy import Policy, table

    rules = table(Policy.of(nodes.checked(check.parse(args.node_config))))
    if args.json:
        print(json.dumps({key: value for key, value, _ in rules}, indent=1))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table("rule", "value", "what it says", box=box.SIMPLE_HEAD)
    for row in rules:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)
    console.print(f"Hash of the app's code here: {app_hash()}", soft_wrap=True, highlight=False)
