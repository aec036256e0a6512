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
    """Add the command to the parser."""
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
    """(key, type, default, allowed, meaning) of every key."""
    return [
        (k.name, k.type.__name__, _shown(k.default), k.allowed, k.doc)
        for k in config.keys().values()
    ]


def _shown(value: Scalar) -> str:
    from fedpft_console.launch import toml_value

    return toml_value(value)


def config_toml() -> str:
    """The body of pyproject's `[tool.flwr.app.config]`."""
    return "".join(f"{k.name} = {_shown(k.default)}\n" for k in config.keys().values())


def config_markdown() -> str:
    """docs/config.md."""
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
    """Put `body` under `[tool.flwr.app.config]` of a pyproject.toml, leaving the rest alone."""
    head = "[tool.flwr.app.config]\n"
    before, found, after = pyproject.partition(head)
    if not found:
        raise UserError("pyproject.toml: no [tool.flwr.app.config] section.")
    rest = after.splitlines(keepends=True)
    end = next((i for i, line in enumerate(rest) if line.startswith("[")), len(rest))
    tail = "".join(rest[end:])
    return before + head + body + ("\n" + tail if tail else "")


def command(args: argparse.Namespace, console: Console) -> int:
    """List the keys, or regenerate (or check) the files made from the list."""
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
