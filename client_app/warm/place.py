"""Where a node's worker is found: a socket of mode 0600 in a folder of mode 0700."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LONGEST = 100  # bytes of a socket's path; most systems take 104 to 108
_PACKAGES = ("client_app", "fedpft_core")
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pillow")
# What of the environment a computation may depend on.
_VARIABLES = ("OMP_", "GOMP_", "MKL_", "KMP_", "CUDA_", "TORCH", "PYTORCH_", "HF_", "FEDPFT_")


class Place:
    """A node's folder for its worker, below the folder in which it keeps everything."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "worker"
        self.socket = self.folder / "socket"
        self.lock = self.folder / "lock"
        self.log = self.folder / "worker.log"

    def make(self) -> None:
        """Make the folder, for this user alone.

        Raises:
            OSError: it cannot be made, or what is there is somebody else's or no folder.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = self.folder.lstat()
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid():
            raise OSError(f"{self.folder} is not this user's folder")
        if stat.S_IMODE(there.st_mode) != 0o700:
            self.folder.chmod(0o700)

    def connect(self, seconds: float) -> socket.socket | None:
        """Reach the worker.

        Args:
            seconds: how long sending and receiving may take.

        Returns:
            The connection; None where nobody of this user listens.
        """
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(seconds)
        try:
            with self._short() as name:
                link.connect(name)
            if user_of(link) == os.getuid():
                return link
        except OSError:
            pass
        link.close()
        return None

    def listen(self) -> socket.socket:
        """Open the socket, in the place of one that nobody listens at any more.

        Returns:
            The listening socket.

        Raises:
            OSError: it cannot be opened.
        """
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self.socket.unlink(missing_ok=True)
            with self._short() as name:
                link.bind(name)
            link.listen(8)
        except OSError:
            link.close()
            raise
        finally:
            os.umask(before)
        return link

    @contextlib.contextmanager
    def _short(self) -> Iterator[str]:
        """A path to the socket that is short enough for one, however long the folder's is."""
        path = str(self.socket)
        if len(os.fsencode(path)) <= _LONGEST or not os.path.isdir("/proc/self/fd"):
            yield path
            return
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{fd}/{self.socket.name}"
        finally:
            os.close(fd)


def user_of(link: socket.socket) -> int:
    """Who is at the other end of a connection.

    Args:
        link: a connected Unix socket.

    Returns:
        The user's number; this process's where the system cannot tell, and the folder's mode
        alone keeps others out.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return os.getuid()
    form = struct.Struct("3i")
    _, user, _ = form.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
    return int(user)


def code() -> Path:
    """The folder that the packages of the app lie in.

    Returns:
        The bundle that Flower has unpacked, or where they are installed.
    """
    return Path(__file__).resolve().parents[2]


def key_of(node_config: Mapping[str, Any]) -> str:
    """Names all that a worker must have in common with the process that asks it.

    Args:
        node_config: as Flower has it.

    Returns:
        The sha256 of the app's code, the node config, the libraries' versions, the interpreter and
        what of the environment matters.
    """
    found = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((code() / package).rglob("*.py")):
            data = path.read_bytes()
            found.update(f"{path.relative_to(code())} {len(data)}\n".encode())
            found.update(data)
    around = {
        "node": dict(node_config),
        "python": [sys.executable, sys.version],
        "libraries": [_version(name) for name in _LIBRARIES],
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)},
        "code": str(code()),
    }
    found.update(json.dumps(around, sort_keys=True).encode())
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
