"""The processes of a run: found by tree and by marker, remembered, and ended together.

Flower and Ray start daemons that outlive their parents, so every process we cause carries a
marker in its environment and is also remembered while it is still in our tree; the end of a run
is the end of all of them. A small guard process does the same when this process itself is
killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARKER = "FEDPFT_RUN"


class Brood:
    """The processes a run has caused, found by tree and by marker, and remembered.

    Remembering matters because Ray's workers overwrite their environment with a process title
    and are re-parented when the raylet dies. A remembered process is its pid *and* start time,
    so a recycled pid is never taken for it.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._known: set[psutil.Process] = set()
        self._foreign: set[psutil.Process] = set()

    def scan(self) -> list[psutil.Process]:
        """Look for the processes of the run, and remember them.

        Returns:
            All that are alive, in no particular order; this process is not among them.
        """
        me = os.getpid()
        parents: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parents.setdefault(process.ppid(), []).append(process)
                if process.pid != me and process not in self._known | self._foreign:
                    self._sort(process)
        self._known = {p for p in self._known if alive(p)}
        self._foreign = {p for p in self._foreign if p.is_running()}
        queue = list(self._known)
        while queue:
            for child in parents.get(queue.pop().pid, ()):
                if child not in self._known and child.pid != me and alive(child):
                    self._known.add(child)
                    queue.append(child)
        return list(self._known)

    def _sort(self, process: psutil.Process) -> None:
        try:
            ours = process.environ().get(MARKER) == self.mark
        except (psutil.Error, OSError):
            return  # another user's, or gone: looked at again, should it become readable
        (self._known if ours else self._foreign).add(process)

    def names(self) -> set[str]:
        """Program names of the processes the last scan found, such as `flwr-simulation`.

        Returns:
            File names of the first three words of their command lines, since a script's comes after
            its interpreter's.
        """
        found: set[str] = set()
        for process in self._known:
            with contextlib.suppress(psutil.Error):
                found |= {Path(word).name for word in process.cmdline()[:3]}
        return found

    def memory(self) -> int:
        """Resident memory of the processes the last scan found.

        Returns:
            Bytes, summed; memory that processes share is counted in each.
        """
        total = 0
        for process in self._known:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def end(self, patience: float = 5.0) -> list[psutil.Process]:
        """End all processes of the run: they are asked first, and forced later.

        Args:
            patience: seconds from the request until they are killed.

        Returns:
            Those that are still alive 10 seconds after that; empty when all have ended.
        """
        asked: set[psutil.Process] = set()
        start = time.monotonic()
        while living := self.scan():
            waited = time.monotonic() - start
            if waited > patience + 10.0:
                return living
            for process in living:
                with contextlib.suppress(psutil.Error):
                    if waited > patience:
                        process.kill()
                    elif process not in asked:
                        process.terminate()
            asked.update(living)
            psutil.wait_procs(living, timeout=0.2)
        return []


def alive(process: psutil.Process) -> bool:
    """Whether a process is running.

    Args:
        process: a process, known by its pid and start time.

    Returns:
        False for one that has ended, a zombie, or one that cannot be looked at.
    """
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def guard(mark: str, ray_tmpdir: str) -> None:
    """Wait for the end of standard input, then end what is left of the run.

    The other end of the pipe is held by the process that started the run; it closes however
    that process ends, SIGKILL included.

    Args:
        mark: the run's value of `MARKER`.
        ray_tmpdir: Ray's folder, removed afterwards; empty where Ray uses its own.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.buffer.read()
    Brood(mark).end()
    if ray_tmpdir:
        shutil.rmtree(ray_tmpdir, ignore_errors=True)


def start_guard(mark: str, ray_tmpdir: str) -> subprocess.Popen[bytes]:
    """Start a process that runs `guard`.

    Args:
        mark: the run's value of `MARKER`.
        ray_tmpdir: the folder that the guard removes; empty for none.

    Returns:
        The guard, in a session of its own; closing its standard input sets it off.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from fedpft_console.launch.processes import guard; guard(*sys.argv[2:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, root, mark, ray_tmpdir],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
