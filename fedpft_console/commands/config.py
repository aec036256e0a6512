"""`fedpft config`: list the keys, and renew what is made from the list."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_core import config
from fedpft_core.config import Scalar
from fedpft_core.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `config` is added.
    """
    show = commands.add_parser("config", help="list all configuration keys")
    show.add_argument("--format", choices=("table", "markdown", "toml", "yaml"), default="table")
    show.add_argument(
        "--write", action="store_true",
        help="in a checkout: regenerate docs/config.md and pyproject.toml's run config",
    )  # fmt: skip
    show.add_argument(
        "--check", action="store_true", help="in a checkout: fail if --write would change a file"
    )
    show.set_defaults(function=command)


def key_rows() -> list[tuple[str, str, str, str, str]]:
    """List every key as a row of words.

    Returns:
        (key, type, default in TOML, allowed values, meaning) of each key, in the order of the
        sections.
    """
    return [
        (k.name, k.type.__name__, _shown(k.default), k.allowed, k.doc)
        for k in config.keys().values()
    ]


def _shown(value: Scalar) -> str:
    from fedpft_console.launch import toml_value

    return toml_value(value)


def config_toml() -> str:
    """The body of pyproject's `[tool.flwr.app.config]`.

    Returns:
        A line `key = default` for each key.
    """
    return "".join(f"{k.name} = {_shown(k.default)}\n" for k in config.keys().values())


def config_markdown() -> str:
    """The text of docs/config.md: every key in a table, a table for each section.

    Returns:
        Markdown, which ends with a newline.
    """
    lines = [
        "# Configuration",
        "",
        "Every key of a run, made by `fedpft config --write`. Set keys in a YAML or TOML file",
        '(`fedpft run --config run.yaml`), on the command line (`-c "plan.keep-share=0.5 ..."`,',
        "which wins), or with `flwr run . --run-config`.",
    ]
    section = ""
    for name, kind, default, allowed, doc in key_rows():
        head = name.partition(".")[0]
        if head != section:
            section = head
            about = (type(getattr(config.Config(), head)).__doc__ or "").strip()
            lines += ["", f"## {head}", "", about, ""]
            lines += ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        cells = (f"`{name}`", kind, f"`{default}`", allowed, doc)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def replace_config(pyproject: str, body: str) -> str:
    """Put `body` under `[tool.flwr.app.config]` of a pyproject.toml, leaving the rest alone.

    Args:
        pyproject: text of the pyproject.toml.
        body: lines `key = value`, each with its end, in place of those that are there.

    Returns:
        The new text; the sections that follow stay as they are.

    Raises:
        UserError: the text has no such section.
    """
    head = "[tool.flwr.app.config]\n"
    before, found, after = pyproject.partition(head)
    if not found:
        raise UserError("pyproject.toml: no [tool.flwr.app.config] section.")
    rest = after.splitlines(keepends=True)
    end = next((i for i, line in enumerate(rest) if line.startswith("[")), len(rest))
    tail = "".join(rest[end:])
    return before + head + body + ("\n" + tail if tail else "")


def command(args: argparse.Namespace, console: Console) -> int:
    """List the keys, or regenerate (or check) the files made from the list.

    Args:
        args: `write` and `check` (what to do with the files of a checkout), else `format`.
        console: where the table is printed; the other formats go to standard output.

    Returns:
        The exit status, 0.

    Raises:
        UserError: --write or --check is given outside the root of a checkout.
        RunError: --check finds a file that --write would change.
    """
    if args.write or args.check:
        root = Path.cwd()
        project = root / "pyproject.toml"
        if not project.is_file() or not (root / "fedpft_core").is_dir():
            raise UserError(
                f"--write and --check work in the root of a checkout, and {root} is none."
            )
        old = project.read_text(encoding="utf-8")
        fresh = {
            project: replace_config(old, config_toml()),
            root / "docs" / "config.md": config_markdown(),
        }
        for path, text in fresh.items():
            if args.write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            elif not path.is_file() or path.read_text(encoding="utf-8") != text:
                raise RunError(f"{path} is out of date; `fedpft config --write` renews it.")
        print("wrote" if args.write else "up to date:", "pyproject.toml and docs/config.md")
    elif args.format == "toml":
        print(config_toml(), end="")
    elif args.format == "markdown":
        print(config_markdown(), end="")
    elif args.format == "yaml":
        import yaml

        flat = config.to_flat(config.Config())
        print(yaml.safe_dump(config.to_tree(flat), sort_keys=False), end="")
    else:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table("key", "type", "default", "allowed", "meaning", box=box.SIMPLE_HEAD)
        table.columns[0].no_wrap = True
        for row in key_rows():
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    return 0
