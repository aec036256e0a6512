"""What rows are shared out by: labels, where they are from, how long they are, clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from client_app.simulated import partition_rows
from fedpft_core import config
from fedpft_core.data.dialogues import length_groups
from fedpft_core.data.examples import Examples
from fedpft_core.data.grouping import CLUSTERS, read_clusters, share_out, write_clusters
from fedpft_core.data.partition import digest, partition_of_run
from fedpft_core.errors import UserError
from fedpft_core.task import load_task


def rows(n: int = 40) -> Examples:
    texts = tuple("x" * (1 + i % 10) for i in range(n))
    return Examples(texts, np.arange(n) % 4, sources=np.arange(n) // 10)


def federation(**keys: Any) -> config.FederationConfig:
    flat = {"federation." + k.replace("_", "-"): v for k, v in keys.items()}
    return config.from_flat(flat).federation


def shared(examples: Examples, run_dir: str = "", **keys: Any) -> list[list[int]]:
    f = federation(**{"partition": "shards", **keys})
    found = share_out(examples, lambda e: e.labels, f, 4, 5, run_dir)
    return [part.tolist() for part in found]


def test_rows_are_told_apart_by_what_is_named(tmp_path: Path) -> None:
    examples = rows()
    by = {
        "label": examples.labels,
        "source": examples.sources,
        "length": length_groups(examples),
        "cluster": np.arange(40) // 3,
    }
    write_clusters(tmp_path, by["cluster"])
    found = {name: shared(examples, str(tmp_path), partition_by=name) for name in by}
    for name, strata in by.items():
        assert strata is not None
        want = partition_of_run(strata, 4, "shards", 1.0, 5)
        assert found[name] == [part.tolist() for part in want]
    assert len({json.dumps(parts) for parts in found.values()}) == 4
    # natural goes by source, whatever partition-by says
    whole = shared(examples, partition="natural")
    assert sorted(part[0] // 10 for part in whole) == [0, 1, 2, 3]
    assert all(len({i // 10 for i in part}) == 1 for part in whole)


def test_what_is_lacking_is_said(tmp_path: Path) -> None:
    alone = Examples(rows().inputs, rows().labels)
    with pytest.raises(UserError, match=r"natural needs .*data\.source-column"):
        shared(alone, partition="natural")
    with pytest.raises(UserError, match=r"partition-by = source needs"):
        shared(alone, partition_by="source")
    with pytest.raises(UserError, match="needs a run folder"):
        shared(alone, str(tmp_path), partition_by="cluster")
    write_clusters(tmp_path, np.arange(7))
    with pytest.raises(UserError, match="of 7 rows, not of 40"):
        read_clusters(str(tmp_path), 40)
    images = Examples((b"a", b"b"), np.arange(2))
    with pytest.raises(UserError, match="is for texts"):
        shared(images, partition_by="length")


@pytest.mark.parametrize("task", ["", "regress", "generate"])
def test_sources_come_with_the_rows(tmp_path: Path, task: str) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"text": f"t {i}", "label": i % 2, "who": "cab"[i % 3]} for i in range(12)]
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines[:4], {"text": ""}, *lines[4:]])
    )
    flat = {
        "data.train": str(file), "data.test": str(file), "data.source-column": "who",
        "data.task": task, "data.max-bad-rows": 1, "data.validation-share": 0.25,
        "federation.partition": "natural", "federation.clients": 3,
        "federation.clients-per-round": 3,
    }  # fmt: skip
    made = config.from_flat(flat)
    train = load_task(made.data, 0).train
    assert train.sources is not None and len(train.sources) == len(train) == 9
    want = ["cab"[int(str(text).split()[1]) % 3] for text in train.inputs]
    assert ["abc"[i] for i in train.sources] == want
    for index in range(3):
        part = partition_rows(made, index, 3)
        assert len({"cab"[int(str(text).split()[1]) % 3] for text in part.inputs}) == 1


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_run_whose_clients_have_clusters_each(tmp_path: Path, family: str) -> None:
    if family == "llama":
        flat = tiny.write_dialogues("llama", tmp_path / "d")
    else:
        flat = tiny.write_task(family, tmp_path)
    flat |= {"federation.rounds": 1, "distill.steps": 2, "train.local-steps": 1, "run.samples": 0}
    keys = {"partition": "shards", "partition_by": "cluster", "clusters": 4}
    flat |= {"federation." + k.replace("_", "-"): v for k, v in keys.items()}
    run_dir = tmp_path / "run"
    events = tiny.run(flat, run_dir)
    (noted,) = tiny.main_run(events, "partition")
    manifest = json.loads((run_dir / "partition.json").read_text())
    assert noted["by"] == manifest["by"] == "cluster" and manifest["seed"] == 0
    groups = read_clusters(str(run_dir), sum(sum(c.values()) for c in noted["clients"].values()))
    assert set(groups.tolist()) == {0, 1, 2, 3}
    parts = partition_of_run(groups, 4, "shards", 1.0, 0)
    assert manifest["digest"] == noted["digest"] == digest(parts)
    assert [sum(c.values()) for c in noted["clients"].values()] == [len(p) for p in parts]
    assert (run_dir / CLUSTERS).is_file()
