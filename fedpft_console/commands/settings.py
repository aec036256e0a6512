"""What the commands are given: keys from files and from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpft_core import config
from fedpft_core.data import hub
from fedpft_core.errors import UserError

# Keys whose value is a file the server reads; model.name and data.labels may also be one.
_FILE_KEYS = ("data.train", "data.validation", "data.test", "data.public")
_MAYBE_FILE_KEYS = ("model.name", "data.labels")


def arguments() -> argparse.ArgumentParser:
    """The arguments of every command that takes configuration keys, as a parent parser.

    Returns:
        A parser without help, to be named among the `parents` of the command's own.
    """
    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument("--config", metavar="FILE", help="YAML or TOML file with configuration keys")
    keys.add_argument(
        "-c", dest="override", action="append", metavar='"KEY=VALUE ..."',
        help="configuration keys; may be repeated, later ones win (`fedpft config` lists them)",
    )  # fmt: skip
    return keys


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Gather the keys given by --config, then by every -c in order; later ones win.

    Args:
        args: `config`, a file or None, and `override`, the texts of each -c or None.

    Returns:
        Values by dotted key, only of keys that are given, not checked yet.

    Raises:
        UserError: the file cannot be read, or a text is not of the form `key=value`.
    """
    flat: dict[str, Any] = {}
    if args.config:
        flat |= config.read_file(Path(args.config).expanduser())
    for text in args.override or []:
        flat |= config.parse_overrides(text)
    return flat


def absolute_files(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Make file names absolute, since the run works in another folder.

    Args:
        flat: values by key, of some keys or of all.

    Returns:
        A copy of it; `builtin:` data, names on the hub and names that are no file here (a model's)
        stay as they are.

    Raises:
        UserError: a data file does not exist.
    """
    out = dict(flat)
    for name in _FILE_KEYS + _MAYBE_FILE_KEYS:
        value = str(flat.get(name, ""))
        if not value or value.startswith("builtin:"):
            continue
        path = Path(value).expanduser()
        if value.startswith(hub.PREFIX):
            out[name] = hub.absolute(value)
        elif path.exists():
            out[name] = str(path.resolve())
        elif name in _FILE_KEYS:
            raise UserError(f"{name}: no such file {path.absolute()}.")
    return out
