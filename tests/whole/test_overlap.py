"""Server work beside the next round (align.lag) on real Flower processes, killed in the middle.

`pytest -m slow tests/whole/test_overlap.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flower
import pytest
import tiny

FILES = ("adapter/adapter_model.safetensors", "checkpoints/round-0004/frozen.safetensors")


def patches(log: list[dict[str, Any]]) -> list[int]:
    """The rounds that patches were sent in, one for each client."""
    return [e["round"] for e in log if e["event"] == "bytes" and e["kind"] == "patch"]


@pytest.mark.slow
def test_three_nodes_and_a_server_that_dies_at_its_work_come_to_the_same_bits(
    tmp_path: Path,
) -> None:
    tree = flower.job(
        tmp_path, **{"rounds": 4, "clients": 3, "clients-per-round": 3, "min-clients": 3}
    )
    tree["data"]["train"] = ""
    tree["align"]["lag"] = 1
    tree["train"]["local-steps"] = 4
    tree["run"] |= {
        "threads": 1, "evaluate-every": 1, "baselines": False, "gradient-rows": 0,
    }  # fmt: skip
    conf, run = flower.write_config(tmp_path / "run.yaml", tree), tmp_path / "run"
    rows = {
        name: tiny.write_csv(tmp_path / f"{name}.csv", tiny.sentences(24, i))
        for i, name in enumerate(("node-a", "node-b", "node-c"))
    }
    with flower.deployment(tmp_path / "flower") as d:
        for name, file in rows.items():
            d.start_node(name, file, **{"cache-dir": str(d.folder / f"cache-{name}")})
        cli = d.run(run, conf)
        # The clients are at work on round 3, the server on round 2.
        flower.wait_for(run, "evaluation", 400, cli, round=2, model="proxy")
        d.server_process().kill()
        assert cli.wait(200) == 1, d.logs()
        died = flower.events(run)
        cli = d.resume(run)
        assert cli.wait(400) == 0, d.logs()
    assert not [e for e in died if e["event"] == "round_finished" and e["round"] == 3]
    log = flower.events(run)
    finished = [e for e in log if e["event"] == "round_finished"]
    assert [(e["round"], e["good"]) for e in finished] == [(1, 3), (2, 3), (3, 3), (4, 3)]
    assert [e["round"] for e in log if e["event"] == "alignment"] == [1, 2]
    # What was made after round 1 was sent before the server died, and the nodes have kept it.
    assert [patches(died), patches(log)] == [[3, 3, 3], [4, 4, 4]]
    flower.in_process(conf, rows, tmp_path / "alone")
    for file in FILES:
        assert (run / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
