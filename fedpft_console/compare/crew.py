"""Who runs cells side by side: processes of this machine, or tasks on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from fedpft_console.compare.cell import Cell
from fedpft_console.compare.job import elsewhere, to_text
from fedpft_console.launch import cluster
from fedpft_core.errors import UserError, first_line

_TICK_SECONDS = 0.2
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("fedpft_core", "server_app", "client_app", "fedpft_console")


class Lost(Exception):
    """The process or machine that a cell was on is gone; the cell can run elsewhere."""


class Crew(Protocol):
    """Runs cells; a context manager, which at the end leaves no cell behind."""

    def room(self) -> int:
        """How many more cells can begin now.

        Returns:
            0 where all are at work.
        """

    def begin(self, cell: Cell) -> None:
        """Begin a cell.

        Args:
            cell: the cell.
        """

    def ended(self) -> list[tuple[Cell, dict[str, Any] | Lost]]:
        """Cells that have ended since the last call, after a short wait where none has.

        Returns:
            Each with its result.
        """

    def __enter__(self) -> Crew: ...

    def __exit__(self, *exc: object) -> None: ...


class Processes:
    """Processes of this machine.

    Args:
        jobs: how many at a time.
        folder: results folder; runs and the sub-FMs that cells share lie in it.
    """

    def __init__(self, jobs: int, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self._at_work: dict[subprocess.Popen[bytes], tuple[Cell, Path]] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="fedpft-jobs-")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._at_work:
            process.kill()
            process.wait()
        self._temporary.cleanup()

    def room(self) -> int:
        """How many more processes may begin.

        Returns:
            0 where all are at work.
        """
        return self.jobs - len(self._at_work)

    def begin(self, cell: Cell) -> None:
        """Start a process for a cell.

        Args:
            cell: the cell.
        """
        out = Path(self._temporary.name) / f"{cell.digest()}.json"
        out.unlink(missing_ok=True)
        path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
        process = subprocess.Popen(
            [sys.executable, "-m", "fedpft_console.compare.job"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )  # fmt: skip
        run = self.folder / "runs" / cell.digest()
        line = json.dumps([str(run), str(self.folder / "cache"), str(out), to_text(cell)])
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # seen when it has ended
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        self._at_work[process] = cell, out

    def ended(self) -> list[tuple[Cell, dict[str, Any] | Lost]]:
        """Cells whose processes have ended, after a short wait where none has.

        Returns:
            Each with its result.
        """
        found: list[tuple[Cell, dict[str, Any] | Lost]] = []
        for process in [p for p in self._at_work if p.poll() is not None]:
            cell, out = self._at_work.pop(process)
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                found.append((cell, json.loads(out.read_text(encoding="utf-8"))))
            except (OSError, ValueError):
                how = f"its process ended with status {process.returncode}"
                found.append((cell, Lost(how)))
        if not found:
            time.sleep(_TICK_SECONDS)
        return found


class RayTasks:
    """Tasks on a Ray cluster that is there already.

    Args:
        address: the cluster's, such as `10.0.0.1:6379`, or `auto`.
        folder: results folder, on this machine; nothing else writes to it.
        cpus: processor cores of a cell.
        gpus: GPUs of a cell; a part of one will do.
        memory: bytes of a cell, by which the cluster places it; 0 = not said.

    Raises:
        UserError: the cluster cannot be reached, is open to everybody, or has no room for a cell.
    """

    def __init__(self, address: str, folder: Path, cpus: int, gpus: float, memory: int) -> None:
        cluster.check("--ray", address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray, self.folder, self.cpus, self.gpus = ray, folder, cpus, gpus
        try:
            # The cluster's machines get this very code; what it needs is installed there.
            ray.init(
                address=address, log_to_driver=False, configure_logging=False,
                runtime_env={
                    "py_modules": [str(_ROOT / p) for p in _PACKAGES],
                    "env_vars": {"OMP_NUM_THREADS": str(cpus)},
                },
            )  # fmt: skip
        except Exception as error:  # of many kinds, some of them none of Ray's own
            raise UserError(
                f"--ray {address}: no cluster can be reached there ({first_line(error)})."
            ) from error
        limits: dict[str, Any] = {"memory": memory} if memory else {}
        # A new process for each: none gains from the one before, or holds its memory.
        self._task = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1, **limits
        )(elsewhere)  # fmt: skip
        self._at_work: dict[Any, Cell] = {}
        if not self._places():
            ray.shutdown()
            raise UserError(
                f"--ray {address}: no machine there has {cpus} cores and {gpus:g} GPUs."
            )

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(self, *exc: object) -> None:
        for task in self._at_work:
            with contextlib.suppress(Exception):
                self._ray.cancel(task, force=True)
        self._ray.shutdown()

    def _places(self) -> int:
        """How many cells the machines that are there now can hold."""
        count = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                there = node["Resources"]
                fit = there.get("CPU", 0) // self.cpus
                if self.gpus:
                    fit = min(fit, there.get("GPU", 0) // self.gpus)
                count += int(fit)
        return count

    def room(self) -> int:
        """How many more cells the cluster holds now; it may have grown or shrunk.

        Returns:
            0 where it is full.
        """
        return max(0, self._places() - len(self._at_work))

    def begin(self, cell: Cell) -> None:
        """Hand a cell to the cluster.

        Args:
            cell: the cell.
        """
        self._at_work[self._task.remote(to_text(cell))] = cell

    def ended(self) -> list[tuple[Cell, dict[str, Any] | Lost]]:
        """Cells whose tasks have ended, with their run folders written here.

        Returns:
            Each with its result.
        """
        if not self._at_work:
            time.sleep(_TICK_SECONDS)
            return []
        done, _ = self._ray.wait(list(self._at_work), num_returns=1, timeout=1.0)
        found: list[tuple[Cell, dict[str, Any] | Lost]] = []
        for task in done:
            cell = self._at_work.pop(task)
            try:
                text, files = self._ray.get(task)
            except Exception as error:  # a machine or a process that is gone, in Ray's words
                found.append((cell, Lost(first_line(error))))
                continue
            self._keep(self.folder / "runs" / cell.digest(), files)
            found.append((cell, json.loads(text)))
        return found

    @staticmethod
    def _keep(folder: Path, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                continue  # no machine of the cluster may write elsewhere
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
