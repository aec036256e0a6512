"""One-shot and async on a SuperLink with SuperNodes on loopback, which come when they like.

`pytest -m slow tests/whole/test_schedules.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flower
import pytest
import tiny
from flower import job

pytestmark = pytest.mark.slow


def deployed(folder: Path, **federation: Any) -> tuple[Path, Path]:
    """A run's configuration and its folder. The server holds no training rows."""
    folder.mkdir(parents=True)
    tree = job(folder, **federation)
    tree["data"]["train"] = ""
    tree["align"] = {"interval": 0}
    tree["run"]["threads"] = 1
    tree["train"]["local-steps"] = 10
    tree["head"] = {"start": "zero"}
    return flower.write_config(folder / "run.yaml", tree), folder / "run"


def join(d: flower.Deployment, name: str) -> None:
    number = ord(name[-1])
    data = tiny.write_csv(d.folder / f"{name}.csv", tiny.sentences(30 + number % 7, number))
    d.start_node(name, data, **{"cache-dir": str(d.folder / f"cache-{name}")})


def of(run: Path, event: str) -> list[dict[str, Any]]:
    return [e for e in flower.events(run) if e["event"] == event]


def test_one_shot_with_one_client_late_and_one_that_never_comes(tmp_path: Path) -> None:
    conf, run = deployed(
        tmp_path / "job", **{"schedule": "one-shot", "rounds": 1, "clients": 4,
                             "clients-per-round": 4, "round-timeout": 240.0},
    )  # fmt: skip
    with flower.deployment(tmp_path / "flower") as d:
        for name in ("node-a", "node-b"):
            join(d, name)
        cli = d.run(run, conf)
        flower.wait_for(run, "round_started", 250, cli)
        join(d, "node-c")  # too late to be asked with the others
        flower.wait_for(run, "merged", 250, cli, replies=1)
        # There is something to use long before the end.
        assert (run / "merged/adapter_model.safetensors").is_file()
        flower.wait_for(run, "merged", 250, cli, replies=3)
        assert cli.wait(600) == 0, d.logs()
    assert {(e["client"], e["status"]) for e in of(run, "reply")} == {
        ("node-a", "ok"), ("node-b", "ok"), ("node-c", "ok"),
    }  # fmt: skip
    assert "node-c" in {e["client"] for e in of(run, "joined")}
    (finished,) = of(run, "round_finished")
    assert finished["good"] == 3 and finished["exchange_seconds"] > 200  # it was open till then
    assert (run / "adapter/adapter_model.safetensors").is_file()
    assert not (run / "replies").exists()


def test_async_by_arrival_takes_in_who_comes(tmp_path: Path) -> None:
    conf, run = deployed(
        tmp_path / "job", **{"schedule": "async", "rounds": 12, "clients": 4, "buffer": 2,
                             "clients-per-round": 4, "clock": "arrival", "node-timeout": 200.0},
    )  # fmt: skip
    with flower.deployment(tmp_path / "flower") as d:
        for name in ("node-a", "node-b"):
            join(d, name)
        cli = d.run(run, conf)
        flower.wait_for(run, "merged", 250, cli, round=1)
        join(d, "node-c")
        assert cli.wait(500) == 0, d.logs()
    replies = of(run, "reply")
    assert {e["status"] for e in replies} == {"ok"}
    assert {"node-a", "node-b"} <= {e["client"] for e in replies}
    assert len(of(run, "merged")) == 12
    assert all(e["good"] == 2 for e in of(run, "round_finished"))
    late = [e for e in replies if e["client"] == "node-c"]
    print("replies of the late node:", len(late), "stale:", [e.get("staleness") for e in replies])
