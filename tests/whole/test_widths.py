"""Three sizes of clients in one federation of real processes, one of them under `ulimit -v`.

`pytest -m slow tests/whole/test_widths.py`
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flower
import pytest
import tiny

FILES = ("adapter/adapter_model.safetensors",)
ROWS, TOKENS = 24, 128
# One tensor of a block's neurons is 400 MB at width 1, 120 MB at 0.3, and 8 MB at 0.02.
CEILING = 900_000_000  # beyond the libraries, bytes
NODES = {"node-a": {"width": "0.02"}, "node-b": {}, "node-c": {}}


def deployed(folder: Path) -> Path:
    """A run in which what a step keeps of the FFNs is far more than the weights.

    So it is training that fails below a ceiling, and not Flower's receiving of the message.
    """
    tree = flower.job(
        folder, **{"rounds": 2, "clients": 3, "clients-per-round": 3, "min-clients": 2}
    )
    tiny.folder(
        "bert", folder / "fm", hidden_size=64, intermediate_size=32768, num_hidden_layers=2,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    tree["plan"] = {"widths": "0.02,0.3,1", "retained-layers": ""}
    tree["data"] |= {"train": "", "max-length": TOKENS}
    tree["distill"]["steps"] = 2
    tree["align"] = {"interval": 1, "steps": 1}
    tree["head"] = {"start": "zero", "end": "trained"}
    tree["plug"] = {"method": "as-trained", "refit": "none"}
    tree["train"] |= {"local-steps": 2, "batch-size": ROWS}
    tree["run"] |= {
        "threads": 1, "evaluate-every": 3, "gradient-rows": 0, "baselines": False,
    }  # fmt: skip
    return flower.write_config(folder / "run.yaml", tree)


def rows_of(folder: Path, name: str) -> Path:
    """Rows as long as rows can be."""
    folder.mkdir(parents=True, exist_ok=True)
    short = tiny.sentences(ROWS, ord(name[-1]))
    return tiny.write_csv(folder / f"{name}.csv", [(" ".join([t] * TOKENS), y) for t, y in short])


def taken_by_imports(home: Path) -> int:
    """Most address space of a client's process before it has any model, bytes."""
    code = (
        "import flwr.supernode.start_client_internal, client_app.answer; "
        "lines = open('/proc/self/status').read().splitlines(); "
        "print(1024 * int(next(x for x in lines if x.startswith('VmPeak')).split()[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=flower.ROOT, env=flower.environment(home),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.slow
def test_three_sizes_under_a_real_ceiling_killed_and_resumed_to_the_same_bits(
    tmp_path: Path,
) -> None:
    conf, run = deployed(tmp_path / "job"), tmp_path / "job" / "run"
    rows = {name: rows_of(tmp_path / "flower", name) for name in NODES}
    with flower.deployment(tmp_path / "flower") as d:
        d.ceilings["node-b"] = taken_by_imports(tmp_path / "flower" / "flwr") + CEILING
        for name, node in NODES.items():
            cache = str(d.folder / f"cache-{name}")
            d.start_node(name, rows[name], **{"cache-dir": cache, **node})
        cli = d.run(run, conf)
        flower.wait_for(run, "round_started", 400, cli, round=2)
        d.server_process().kill()
        assert cli.wait(200) == 1, d.logs()
        cli = d.resume(run)
        assert cli.wait(400) == 0, d.logs()
    log = flower.events(run)
    given = {str(e["client"]): str(e["width"]) for e in log if e["event"] == "width_given"}
    assert given["node-a"] == "0.02" and given["node-c"] == "1"
    assert given["node-b"] in ("0.02", "0.3")
    (moved, *_) = [e for e in log if e["event"] == "width_given" and e.get("before")]
    assert moved["client"] == "node-b" and moved["before"] == "1"
    # All three in every round: the node that failed was served again, at another width.
    finished = [e for e in log if e["event"] == "round_finished"]
    assert [(e["round"], e["good"]) for e in finished] == [(1, 3), (2, 3)]
    widths = {name: {"width": width} for name, width in given.items()}
    flower.in_process(conf, rows, tmp_path / "alone", widths)
    for file in FILES:
        assert (run / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
