"""Cells side by side: the order of work, one writer, nothing lost and no cell twice."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
from rich.console import Console
from terminal import refused

from fedpft_console import cli
from fedpft_console.compare import parallel
from fedpft_console.compare.cell import Cell
from fedpft_console.compare.crew import Lost
from fedpft_console.compare.parse import read
from fedpft_console.compare.results import Results
from fedpft_console.compare.run import described

ROOT = Path(__file__).parents[2]


def experiment(folder: Path, base: dict[str, Any] | None = None, rates: Any = (0.01, 0.02)) -> Path:
    """Two methods, three seeds, and some rates."""
    path = folder / "grid.yaml"
    methods = {"one": {"lora": {"rank": 2}}, "two": {"lora": {"rank": 4}}}
    tree = {
        "base": base or {}, "methods": methods, "datasets": {"words": None}, "seeds": [0, 1, 2],
        "learning-rates": list(rates),
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


class Pretended:
    """A crew whose cells end in an order of its own, and some of them are lost."""

    def __init__(self, size: int, losses: dict[str, int] | None = None) -> None:
        self.size, self.losses = size, losses or {}
        self.at_work: list[Cell] = []
        self.begun: list[str] = []
        self.most = 0

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def room(self) -> int:
        return self.size - len(self.at_work)

    def begin(self, cell: Cell) -> None:
        self.at_work.append(cell)
        self.begun.append(cell.title())
        self.most = max(self.most, len(self.at_work))

    def ended(self) -> list[tuple[Cell, dict[str, Any] | Lost]]:
        cell = self.at_work.pop()  # the last one first
        if self.losses.get(cell.title(), 0):
            self.losses[cell.title()] -= 1
            return [(cell, Lost("its machine is gone"))]
        value = cell.lr + cell.seed
        figures = {"fm_validation": value, "fm_test": value, "proxy_test": value, "seconds": 1.0}
        return [(cell, described(cell) | figures)]


def run(path: Path, crew: Any, threads: int = 1) -> tuple[int, Results]:
    results = Results(path.with_suffix(""))
    exp = read(path)
    with results.writing():
        failed = parallel.run(exp, results, Console(quiet=True), exp.points(), crew, threads)
    return failed, results


def test_every_cell_once_and_other_seeds_at_the_best_rate(tmp_path: Path) -> None:
    path, crew = experiment(tmp_path), Pretended(3)
    failed, results = run(path, crew)
    assert not failed and crew.most == 3
    assert len(crew.begun) == len(set(crew.begun)) == len(results.rows) == 2 * (2 + 2)
    assert {r["lr"] for r in results.rows if r["seed"]} == {0.02}, "the better of the two"
    again = Pretended(3)
    assert run(path, again)[0] == 0 and not again.begun, "there is nothing left to do"


def test_a_lost_cell_is_begun_again_and_not_for_ever(tmp_path: Path) -> None:
    grid = read(experiment(tmp_path))
    names = [cell.title() for point in grid.points() for cell in grid.first(point)]
    crew = Pretended(2, {names[0]: 2, names[3]: 9})
    failed, results = run(experiment(tmp_path), crew)
    count = Counter(crew.begun)
    assert count.pop(names[0]) == 3 and count.pop(names[3]) == parallel.MOST_LOSSES
    assert set(count.values()) == {1}
    (bad,) = [r for r in results.rows if "failed" in r]
    assert failed == 1 and bad["failed"] == "its machine is gone, 3 times"
    # What failed is tried again by the next start; its rate is better, and so its seeds follow.
    last = Pretended(2)
    assert run(experiment(tmp_path), last)[0] == 0
    assert last.begun[0] == names[3] and len(last.begun) == 3


def test_threads_do_not_make_another_cell(tmp_path: Path) -> None:
    cells: list[Cell] = []

    class Noted(Pretended):
        def begin(self, cell: Cell) -> None:
            cells.append(cell)
            super().begin(cell)

    run(experiment(tmp_path), Noted(2), threads=7)
    assert {c.flat["run.threads"] for c in cells} == {7}
    again = Pretended(1)
    assert run(experiment(tmp_path), again, threads=2)[0] == 0 and not again.begun


def test_bad_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    path = str(experiment(tmp_path))
    assert "RAY_AUTH_MODE=token" in refused(capsys, "compare", path, "--ray", "127.0.0.1:1")
    assert "RAY_AUTH_MODE=token" in refused(capsys, "run", "--ray", "127.0.0.1:1")
    assert "HOST:PORT" in refused(capsys, "run", "--ray", "ray://x/y")
    assert "exclude" in refused(capsys, "run", "--ray", "auto", "--superlink", "x")
    assert "at least 0" in refused(capsys, "compare", path, "--jobs", "-1")


# ------------------------------------------------------------------ for real


def small(folder: Path) -> dict[str, Any]:
    flat = tiny.write_task("bert", folder / "task", rows=60)
    flat |= {"federation.rounds": 2, "distill.steps": 2, "train.local-epochs": 1,
             "align.interval": 0, "run.gradient-rows": 0}  # fmt: skip
    return flat


def values(results: Results) -> dict[str, Any]:
    return {
        r["digest"]: {k: v for k, v in r.items() if k.startswith(("fm_", "proxy_"))}
        for r in results.rows
    }


def compare(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpft_console.cli", "compare", str(path), *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_processes_compute_what_one_process_does_and_survive_kill_9(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    flat = small(tmp_path)
    assert cli.main(["compare", str(experiment(tmp_path / "a", flat, [0.01]))]) == 0
    process = compare(experiment(tmp_path / "b", flat, [0.01]), "--jobs", "2")
    deadline = time.monotonic() + 120
    jobs: list[psutil.Process] = []
    while not jobs and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children()
            jobs = [c for c in children if "fedpft_console.compare.job" in c.cmdline()]
        time.sleep(0.05)
    jobs[0].kill()
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0 and "it is begun again" in said, said
    one, two = Results(tmp_path / "a" / "grid"), Results(tmp_path / "b" / "grid")
    assert values(one) == values(two) and len(one.rows) == len(two.rows) == 6


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Two Ray nodes of one core each, as processes on loopback, with a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    here = port()
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(3)}"  # sockets need a short path
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1",
           "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]  # fmt: skip
    head = [*ray, "--head", f"--port={here}", "--include-dashboard=false",
            f"--temp-dir={temporary}"]  # fmt: skip
    nodes = []
    with open(tmp_path / "ray.log", "wb") as log:
        for command in (head, [*ray, f"--address=127.0.0.1:{here}"]):
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", here), 1):
                    break
                time.sleep(0.2)
    yield f"127.0.0.1:{here}", nodes
    for node in nodes:
        stop(node)


def stop(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    node.kill()
    node.wait()


@pytest.mark.slow
def test_on_a_ray_cluster_of_which_a_node_is_killed(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, nodes = cluster
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    flat = small(tmp_path)
    process = compare(experiment(tmp_path / "a", flat, [0.01]), "--ray", address)
    cells = tmp_path / "a" / "grid" / "cells.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if cells.exists() and cells.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    stop(nodes[1])
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert cli.main(["compare", str(experiment(tmp_path / "b", flat, [0.01]))]) == 0
    one, two = Results(tmp_path / "a" / "grid"), Results(tmp_path / "b" / "grid")
    assert values(one) == values(two) and len(one.rows) == 6, "none lost, none twice"
    assert len(list((tmp_path / "a" / "grid" / "runs").glob("*/events.jsonl"))) == 6


@pytest.mark.slow
def test_a_run_on_a_ray_cluster_has_the_same_bits(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    from safetensors.torch import load_file

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small(tmp_path)))
    for name, where in (("a", ["--ray", cluster[0]]), ("b", [])):
        command = [sys.executable, "-m", "fedpft_console.cli", "run", "--quiet", "--run-dir",
                   str(tmp_path / name), *where, "--config", str(config)]  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=500,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("a", "b")
    )
    assert tiny.same_bits(one, two)
