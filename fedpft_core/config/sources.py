"""Where settings come from and go to: configuration files and `key=value` texts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpft_core.config.values import flatten, to_tree
from fedpft_core.disk import whole
from fedpft_core.errors import UserError

# A piece of `-c`: quoted parts may hold blanks; a quote that never closes stands for itself.
_PIECE = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s])+""")


def home() -> Path:
    """Where things go that are not told otherwise: $FEDPFT_HOME, else ~/.fedpft.

    Returns:
        The folder, which need not exist yet.
    """
    return Path(os.environ.get("FEDPFT_HOME") or "~/.fedpft").expanduser()


def write_yaml(path: Path, flat: Mapping[str, Any]) -> None:
    """Write dotted keys as a YAML file, whole or not at all.

    Args:
        path: the file, which is replaced when it is there.
        flat: values by dotted key.

    Raises:
        OSError: the file cannot be written.
    """
    import yaml

    text = yaml.safe_dump(to_tree(flat), sort_keys=False, allow_unicode=True)
    whole.write(path, text.encode())


def read_file(path: Path) -> dict[str, Any]:
    """Read dotted keys from a YAML (safe_load) or TOML file, nested or already dotted.

    Args:
        path: the file; its ending tells which of the two it is.

    Returns:
        Values by dotted key, not checked yet (`from_flat` does that).

    Raises:
        UserError: the file is missing, of another kind, or not a mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
    elif path.suffix == ".toml":
        import tomllib

        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML ({error}).") from error
    else:
        raise UserError(f"{path}: a configuration file ends in .yaml, .yml or .toml.")
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected a mapping of keys to values.")
    return flatten(tree)


def parse_overrides(text: str) -> dict[str, Any]:
    """Read `key=value key2=value2`, the form of `flwr run --run-config` (TOML values).

    A bare word is taken as text, so that `run.dir=/tmp/x` needs no quotes; values with blanks are
    quoted.

    Args:
        text: pieces with blanks between them.

    Returns:
        Values by dotted key, not checked yet.

    Raises:
        UserError: a piece has no `=`.
    """
    import tomllib

    out: dict[str, Any] = {}
    for piece in _PIECE.findall(text):
        name, eq, raw = piece.partition("=")
        if not eq:
            raise UserError(f"-c {text!r}: expected key=value, got {piece!r}.")
        try:
            out[name] = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            out[name] = raw
    return out
