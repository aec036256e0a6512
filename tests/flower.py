"""Real Flower processes on loopback for tests: a SuperLink, SuperNodes, and what they need.

Everything is started by and ended with the fixture-like context manager `deployment`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """A clean environment: own FLWR_HOME, no dependency installation, no network chatter."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FEDPFT_HOME": str(home / "fedpft"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **more,
    }


@dataclass
class Deployment:
    """A running SuperLink and its SuperNodes."""

    folder: Path
    port: int
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115  # the child keeps it
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment(self.folder / "flwr"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        self.processes.append(process)
        return process

    def start_node(self, name: str, data: Path, **config: str | int) -> None:
        """One SuperNode with its own data file."""
        pairs: Mapping[str, str | int] = {"name": name, "data-path": str(data), **config}
        text = " ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in pairs.items()
        )
        self.nodes[name] = self.start(
            name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", text,
        )  # fmt: skip

    def run(self, run_dir: Path, config: Path, *more: str) -> subprocess.Popen[bytes]:
        """Start `fedpft run` against this SuperLink."""
        return self.start(
            "cli", "fedpft", "run", "--superlink", "test", "--config", str(config),
            "--run-dir", str(run_dir), *more,
        )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}"
            for p in sorted(self.folder.glob("*.log"))
        )


def kill(process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
    """Signal a process we started and everything in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


@contextlib.contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """A SuperLink on a free port; everything started through it ends with the block."""
    (folder / "flwr").mkdir(parents=True, exist_ok=True)
    d = Deployment(folder, free_port())
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{d.port}"\n'
        "insecure = true\n"
    )
    try:
        d.start(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1",
            "--port", str(d.port), "--database", str(folder / "state.db"),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        _wait_until_up(d.port)
        yield d
    finally:
        for process in reversed(d.processes):
            kill(process, signal.SIGTERM)
        deadline = time.monotonic() + 10
        for process in d.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            kill(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _wait_until_up(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"the SuperLink did not open port {port} within {seconds:g} s")


def events(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def wait_for(run_dir: Path, event: str, seconds: float, **fields: object) -> dict[str, object]:
    """The first matching event; fails the test when it does not come in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for e in events(run_dir):
            if e["event"] == event and all(e.get(k) == v for k, v in fields.items()):
                return e
        time.sleep(0.1)
    raise AssertionError(f"no {event} {fields} within {seconds:g} s")


def write_config(path: Path, tree: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
    return path
