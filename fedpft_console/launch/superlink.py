"""A SuperLink of our own, for simulation."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from fedpft_console.launch.flower import last_error, program
from fedpft_core.errors import RunError

_START_SECONDS = 60.0


def start_superlink(
    env: dict[str, str], log: Path, cwd: Path, tick: Callable[[], None]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a SuperLink on a free port and wait until it answers.

    The caller ends it, also where this raises: what has not answered is left running.

    Args:
        env: environment of the SuperLink, from `environment`.
        log: file to which its output is appended.
        cwd: the folder it works in.
        tick: called about ten times a second while waiting.

    Returns:
        The SuperLink's process, and its port on 127.0.0.1.

    Raises:
        RunError: it does not answer within 60 s, has ended by itself three times, or is not
            installed.
    """
    text = ""
    for _attempt in range(3):  # the port may be taken between choosing and binding it
        port = _free_port()
        command = [
            program("flower-superlink"), "--insecure", "--simulation",
            "--isolation", "subprocess", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if _listens(process.pid, port) and _healthy(port):
                return process, port
            tick()
            time.sleep(0.1)
        if process.poll() is None:
            raise RunError(f"the SuperLink did not answer within {_START_SECONDS:.0f} s; see {log}")
        text = last_error(log.read_text(encoding="utf-8", errors="replace"))
    raise RunError(f"the SuperLink could not be started: {text} (log: {log})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(pid: int, port: int) -> bool:
    """Whether it is really our process that answers on the port."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)
    return False


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError, HTTPException):
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    return False
