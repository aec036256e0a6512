"""Flower's command line: submit a run, follow its log, ask how it ended.

Only Flower's command line is used: `flwr run --stream` submits, copies the log and returns when
the run is over, and `flwr list` tells how it ended (the former exits 0 on failure too).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedpft_core.errors import RunError

COMPLETED = "finished:completed"
_CLI_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """How Flower says a run ended.

    `peak_bytes` is the largest sum of resident memory over all processes of the run, looked at
    every two seconds; memory that processes share is counted in each. 0 = not ours to measure.
    """

    status: str
    details: str
    run_id: str
    log: Path
    peak_bytes: int = 0

    @property
    def completed(self) -> bool:
        """Whether the run has ended well."""
        return self.status == COMPLETED


def program(name: str) -> str:
    """Find a program of Flower, first beside this interpreter.

    So an environment that is not activated works too.

    Args:
        name: the program's name, such as `flwr`.

    Returns:
        The path to start it by.

    Raises:
        RunError: it is neither beside the interpreter nor on the PATH.
    """
    here = Path(sys.executable).parent / name
    found = str(here) if here.is_file() else shutil.which(name)
    if found is None:
        raise RunError(
            f"{name} is not installed beside {sys.executable}; install flwr[simulation]."
        )
    return found


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of Flower's programs: this process's, with what a run of ours needs.

    Telemetry, update checks and installation at run time are off, and no proxy is asked for this
    machine.

    Args:
        extra: variables that are added last, and win.

    Returns:
        All variables by name.
    """
    env = dict(os.environ)
    # A cluster the user works with must not be joined; ours is started and ended with the run.
    env.pop("RAY_ADDRESS", None)
    local = "127.0.0.1,localhost"
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = f"{env[name]},{local}" if env.get(name) else local
    return env | {
        # SuperLink, SuperExec and Flower start one another by bare name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


class Flower:
    """Flower's command line against one SuperLink connection."""

    def __init__(self, connection: str, env: dict[str, str], log: Path) -> None:
        self.connection, self.env, self.log = connection, env, log
        self._stream: subprocess.Popen[bytes] | None = None
        self._offset = 0

    def submit(self, app: Path, run_config: Path, federation: str = "") -> None:
        """Start `flwr run --stream`, whose output becomes the run's log.

        Args:
            app: folder of the Flower app.
            run_config: TOML file with the run config.
            federation: Flower's federation options; empty leaves those of the connection.

        Raises:
            RunError: the program `flwr` is not installed.
        """
        command = [program("flwr"), "run", str(app), self.connection, "--stream"]
        command += ["--run-config", str(run_config)]
        if federation:
            command += ["--federation-config", federation]
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as out:
            self._stream = self._popen(command, out)

    def streaming(self) -> bool:
        """Whether the submitting command still follows the run.

        Returns:
            False before `submit` and after the command has ended.
        """
        return self._stream is not None and self._stream.poll() is None

    def text(self) -> str:
        """What this submission has written to the log so far, colours removed.

        Returns:
            Text; what earlier submissions wrote to the same file is left out.
        """
        with open(self.log, "rb") as file:
            file.seek(self._offset)
            return re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))

    def run_id(self) -> str:
        """The id of the submitted run, empty while it is unknown.

        Returns:
            Digits, as Flower's commands take them.
        """
        match = re.search(r"Successfully started run (\d+)", self.text())
        return match.group(1) if match else ""

    def status(self, run_id: str) -> tuple[str, str]:
        """Ask Flower how a run is getting on; an answer may take up to 30 s.

        Args:
            run_id: the id that `Flower.run_id` found.

        Returns:
            Status (such as `finished:completed`) and details, both empty when Flower cannot be
            asked.
        """
        answer = self._ask("list", self.connection, "--run-id", run_id, "--format", "json")
        try:
            run = json.loads(answer)["runs"][0]
            details = run["status-details"]
            return run["status"], "" if details == "N/A" else details
        except (ValueError, LookupError, TypeError):
            return "", ""

    def stop(self, run_id: str) -> None:
        """Ask Flower to end a run; harmless when it has ended.

        Args:
            run_id: the id that `Flower.run_id` found.
        """
        self._ask("stop", run_id, self.connection)

    def end(self) -> None:
        """End the submitting command."""
        if self._stream is not None and self._stream.poll() is None:
            self._stream.terminate()
            try:
                self._stream.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._stream.kill()
                self._stream.wait()

    def _ask(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [program("flwr"), *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CLI_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def _popen(self, command: list[str], out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C at the terminal reaches us alone, and we end the rest
            # in order.
            start_new_session=True,
        )


def last_error(text: str) -> str:
    """The line of a log that best says what went wrong, empty when there is none.

    Args:
        text: the log, colours removed.

    Returns:
        The last error that Flower has framed in a box, else the last line that looks like an error,
        else the last line.
    """
    # Flower's commands frame their errors in a box and wrap them there.
    box = re.findall(r"╭─ Error ─+╮\n((?:│.*│\n)+)", text)
    if box:
        return " ".join(line.strip("│ ") for line in box[-1].splitlines())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern in (r"^(?:\S*Error|\S*Exception|RunError): ", r"\bError\b|\bERROR\b"):
        for line in reversed(lines):
            if re.search(pattern, line):
                return re.sub(r"^ERROR\s*:\s*", "", line)
    return lines[-1] if lines else ""
