"""Real runs of a tiny Flower app: that they end as they should and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedpft_console.commands.config import config_toml
from fedpft_console.launch import federation_config
from fedpft_console.launch.processes import alive
from fedpft_core import config
from server_app.run.events import read_events

ROOT = Path(__file__).resolve().parents[3]

# The app emits the events of a run of two rounds; `run.seed` picks how it ends.
SERVER = """
import time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from pathlib import Path
import json

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config
    path = Path(run["run.dir"]) / "events.jsonl"

    def emit(event, **fields):
        with open(path, "a") as file:
            file.write(json.dumps({"t": time.time(), "event": event} | fields) + "\\n")

    emit("run_started", run_dir=run["run.dir"], rounds=2, clients_per_round=2, method="tiny",
         seed=run["run.seed"])
    nodes = []
    while len(nodes) < run["federation.clients"]:
        nodes = list(grid.get_node_ids())
        time.sleep(0.1)
    for number in (1, 2):
        emit("round_started", round=number, rounds=2, attempt=1, clients=["0", "1"])
        content = RecordDict({"ask": ConfigRecord({"round": number})})
        messages = [Message(content, dst_node_id=n, message_type="train") for n in nodes]
        replies = list(grid.send_and_receive(messages))
        emit("round_finished", round=number, seconds=0.1, good=len(replies), bad=0, loss=1.0)
        emit("evaluation", round=number, model="proxy", split="test", accuracy=0.5, rows=100)
        emit("evaluation", round=number, model="fm", split="test", accuracy=0.25, rows=100)
        if run["run.seed"] == 1:
            emit("run_failed", reason="round 1: 1 good reply, federation.min-clients = 2.")
            raise RuntimeError("too few replies")
        if run["run.seed"] == 2:
            raise ValueError("an unforeseen thing")
        if run["run.seed"] == 3:
            time.sleep(600)
    emit("run_finished", seconds=1.0)
"""
CLIENT = """
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return Message(RecordDict({"done": ConfigRecord({"ok": 1})}), reply_to=message)
"""
# `fedpft`, with the tiny app in place of this package's own.
DRIVER = """
import sys
from pathlib import Path
from fedpft_console import cli
from fedpft_console.launch import simulation

simulation.assemble_app = lambda folder: Path(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="session")
def tiny_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An app folder that takes every configuration key."""
    folder = tmp_path_factory.mktemp("app")
    package = folder / "tiny_fedpft_app"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "server.py").write_text(SERVER)
    (package / "client.py").write_text(CLIENT)
    head = """
        [project]
        name = "tiny"
        version = "0.0.1"
        description = "a test"
        license = "Apache-2.0"
        [tool.flwr.app]
        publisher = "tests"
        fab-include = ["tiny_fedpft_app/*.py"]
        [tool.flwr.app.components]
        serverapp = "tiny_fedpft_app.server:app"
        clientapp = "tiny_fedpft_app.client:app"
        [tool.flwr.app.config]
    """
    (folder / "pyproject.toml").write_text(textwrap.dedent(head) + config_toml())
    return folder


class Started:
    """A `fedpft run` of the tiny app in its own process."""

    def __init__(self, app: Path, folder: Path, temp: Path, seed: int) -> None:
        self.folder, self.temp = folder, temp
        self.seen: set[psutil.Process] = set()
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", DRIVER, str(app), "run", "--run-dir", str(folder),
                "-c", "federation.clients=2 federation.clients-per-round=2 federation.rounds=2",
                "-c", f"run.seed={seed}",
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temp)},
            cwd=temp,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def until(self, there: Callable[[], object], seconds: float = 90.0) -> None:
        """Wait for something, remembering every descendant met on the way."""
        deadline = time.monotonic() + seconds
        while not there():
            self.look()
            assert time.monotonic() < deadline, self.process.poll()
            time.sleep(0.1)
        self.look()

    def look(self) -> None:
        if self.process.poll() is None:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def has(self, event: str) -> bool:
        path = self.folder / "events.jsonl"
        return path.exists() and any(e["event"] == event for _, e in read_events(path))

    def programs(self) -> set[str]:
        names: set[str] = set()
        for process in self.alive():
            try:
                names |= {Path(word).name for word in process.cmdline()[:3]}
            except psutil.Error:
                continue
        return names

    def named(self, name: str) -> psutil.Process:
        for process in self.alive():
            if any(Path(word).name == name for word in process.cmdline()[:3]):
                return process
        raise AssertionError(f"no {name} is running")

    def alive(self) -> list[psutil.Process]:
        return [p for p in self.seen if alive(p)]

    def assert_nothing_left(self, patience: float = 0.0) -> None:
        assert len(self.seen) >= 5, "SuperLink, SuperExec, simulation and more were to be seen"
        deadline = time.monotonic() + patience
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.alive() == []
        assert list(self.temp.glob("fedpft-*")) == [], "Ray's folder is gone"
        assert not (self.folder / "flower" / "home").exists()


@pytest.fixture
def start(tiny_app: Path, tmp_path: Path):
    """Start a run; ended after the test whatever happened."""
    running: list[Started] = []
    # Ray's sockets need a short folder, and pytest's is long.
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fpt", dir="/tmp") as temp:

        def make(seed: int) -> Started:
            running.append(Started(tiny_app, tmp_path / "run", Path(temp), seed))
            return running[-1]

        yield make
        for run in running:
            run.look()
            if run.process.poll() is None:
                run.process.kill()
            for process in run.alive():
                process.kill()


def test_a_run_completes_and_leaves_nothing(start) -> None:
    run = start(seed=0)
    run.until(lambda: run.process.poll() is not None)
    out, err = run.process.communicate()
    assert run.process.returncode == 0, err
    assert out.startswith(f"run folder {run.folder}\n"), "printed first"
    assert "round 2/2 done" in out and "plugged-in FM accuracy 25.0 %" in out
    assert "tiny after round 2" in out
    assert "\x1b" not in out and "\r" not in out, "no control characters without a terminal"
    assert err == ""
    run.assert_nothing_left()
    for name in ("report.md", "rounds.csv", "summary.json", "plot.png", "config.yaml"):
        assert (run.folder / name).stat().st_size > 0
    saved = config.from_flat(config.read_file(run.folder / "config.yaml"))
    assert saved.run.dir == str(run.folder) and saved.federation.clients == 2
    assert "Successfully started run" in (run.folder / "flower" / "run.log").read_text()


def test_ctrl_c_in_a_round_ends_everything(start) -> None:
    run = start(seed=3)
    run.until(lambda: run.has("round_finished"))
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)  # the impatient press twice
    _, err = run.process.communicate(timeout=60)
    assert run.process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    run.assert_nothing_left()
    assert "not finished" in (run.folder / "report.md").read_text()


@pytest.mark.slow
def test_sigterm_while_starting_ends_everything(start) -> None:
    run = start(seed=3)
    run.until(lambda: run.programs() >= {"flower-superlink", "flwr-simulation"})
    run.process.terminate()
    _, err = run.process.communicate(timeout=60)
    assert run.process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_failed_run_tells_the_reason(start) -> None:
    run = start(seed=1)
    run.until(lambda: run.process.poll() is not None)
    out, err = run.process.communicate()
    assert run.process.returncode == 1
    assert "error: round 1: 1 good reply, federation.min-clients = 2." in err
    assert "Traceback" not in err + out
    run.assert_nothing_left()
    assert "Run failed after 1 of 2 rounds" in (run.folder / "report.md").read_text()


@pytest.mark.slow
def test_an_unforeseen_exception_is_named_with_its_log(start) -> None:
    run = start(seed=2)
    run.until(lambda: run.process.poll() is not None)
    _, err = run.process.communicate()
    assert run.process.returncode == 1
    assert "an unforeseen thing" in err and str(run.folder / "flower" / "run.log") in err
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_killed_server_is_noticed(start) -> None:
    run = start(seed=3)
    run.until(lambda: run.has("round_finished"))
    run.named("flwr-simulation").kill()
    _, err = run.process.communicate(timeout=40)
    assert run.process.returncode == 1
    assert "flwr-simulation ended without a word" in err
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_killed_command_takes_its_processes_along(start) -> None:
    run = start(seed=3)
    run.until(lambda: run.has("round_finished"))
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 30
    while run.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert run.alive() == []
    assert list(run.temp.glob("fedpft-*")) == []


@pytest.mark.parametrize(
    ("clients", "at_once", "threads", "cores", "each", "total"),
    [(10, 4, 1, 2, 1, 2), (10, 4, 1, 64, 1, 4), (10, 4, 2, 64, 2, 8), (2, 2, 8, 2, 2, 2)],
)
def test_federation_starts_no_more_workers_than_a_round_needs(
    clients: int, at_once: int, threads: int, cores: int, each: int, total: int
) -> None:
    words = dict(w.split("=") for w in federation_config(clients, at_once, threads, cores).split())
    assert words["num-supernodes"] == str(clients)
    assert words["client-resources-num-cpus"] == str(each)
    assert words["init-args-num-cpus"] == str(total)
