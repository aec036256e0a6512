"""What a run is: its configuration, its files and the program, which a resumed run must share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpft_core import __version__
from fedpft_core import config as configs
from fedpft_core.config import Config
from fedpft_core.errors import UserError

_FILES = ("data.train", "data.validation", "data.test", "data.public", "data.labels")


def identity(config: Config) -> dict[str, Any]:
    """What is kept with every checkpoint.

    Args:
        config: the run's configuration.

    Returns:
        JSON values: `config` by dotted key, `files` with the sha256 of each file that a key names
        (of a folder, as model.name may be one, of all its files), and `version` of the program.
    """
    flat = configs.to_flat(config)
    named = [(key, str(flat[key])) for key in (*_FILES, "model.name")]
    files = {key: found for key, name in named if (found := _digest(name))}
    return {"config": flat, "files": files, "version": __version__}


def refuse_another(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run as another one.

    Args:
        saved: what :func:`identity` gave when the checkpoint was written; empty for one of before
            there were any.
        now: what it gives now.

    Raises:
        UserError: naming the key, the file or the version that is another.
    """
    if not saved:
        return
    # A file may lie elsewhere, or be named in another way, if it is the same.
    same = {key for key, digest in now["files"].items() if digest == saved["files"].get(key)}
    asked = {key: value for key, value in now["config"].items() if key not in same}
    name = configs.changed(saved["config"], asked)
    if name:
        raise UserError(
            f"{name} = {now['config'][name]!r} contradicts {saved['config'][name]!r} of the run "
            "that is resumed: it keeps its configuration."
        )
    for key in sorted(saved["files"].keys() | now["files"].keys()):
        if saved["files"].get(key) != now["files"].get(key):
            raise UserError(
                f"{key}: the file is not the one that the run began with, so it cannot be resumed."
            )
    if saved["version"] != now["version"]:
        raise UserError(
            f"the run began with version {saved['version']} of this program and cannot be resumed "
            f"with {now['version']}."
        )


def _digest(name: str) -> str:
    """sha256 of a file, or of a folder's files by name; empty where there is neither."""
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return ""
        h = hashlib.sha256()
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            h.update(f"\n{file.relative_to(path) if path.is_dir() else ''}\n".encode())
            with file.open("rb") as opened:
                while piece := opened.read(2**20):
                    h.update(piece)
        return h.hexdigest()
    except (OSError, RuntimeError, ValueError):
        return ""  # whoever reads it will say what is wrong with it
