"""What this app's code is known by: one hash over its source files, wherever they are installed."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import client_app
import fedpft_core


@cache
def app_hash() -> str:
    """The hash of the code that answers messages on this node.

    Returns:
        sha256, 64 hex digits, over names and contents of the files of `client_app` and
        `fedpft_core`; the same for a checkout, an installation and an app that Flower has unpacked.
    """
    h = hashlib.sha256()
    for package in (client_app, fedpft_core):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            h.update(f"{root.name}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return h.hexdigest()
