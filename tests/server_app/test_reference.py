"""The majority class, the confusion table and the warning about constant predictions, in runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fedpft_core import config as configs
from fedpft_core.task import Classify, Score, confusion, load_task
from fedpft_core.task.classify import ACCURACY
from server_app.phases import reference
from server_app.run.events import EventLog

SHORT = {
    "federation.rounds": 1, "distill.steps": 2, "train.local-epochs": 1, "align.interval": 0,
    "run.baselines": False, "federation.partition": "dirichlet",
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | SHORT


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


def test_every_run_has_the_majority_class_the_confusion_table_and_the_partition(
    job: dict[str, Any], tmp_path: Path
) -> None:
    events = tiny.run(job, tmp_path / "run")
    data = load_task(configs.from_flat(job).data, 0)
    common = int(np.bincount(data.train.labels).argmax())
    named = np.full_like(data.test.labels, common)
    (majority,) = of(events, "baseline")
    assert majority["name"] == "majority-class" and majority["rows"] == len(data.test)
    assert majority["value"] == pytest.approx(accuracy_score(data.test.labels, named))
    f1 = f1_score(data.test.labels, named, average="macro", zero_division=0)
    assert majority["more"]["macro-F1"] == pytest.approx(f1)

    last = [e for e in of(events, "confusion") if e["model"] == "fm"][-1]
    assert sum(n for _, _, n in last["counts"]) == len(data.test)
    (score,) = [
        e for e in of(events, "evaluation") if e["model"] == "fm" and e["round"] == last["round"]
    ]
    assert sum(n for a, b, n in last["counts"] if a == b) == round(score["value"] * len(data.test))

    (partition,) = of(events, "partition")
    said = {e["client"]: e["examples"] for e in of(events, "reply") if e["status"] == "ok"}
    assert said
    for name, rows in said.items():
        assert sum(partition["clients"][name].values()) == rows
    total = sum(sum(rows.values()) for rows in partition["clients"].values())
    assert total == len(data.train)


@pytest.mark.parametrize(
    ("pairs", "warned"),
    [
        ({"pair 0 1": 60, "pair 1 1": 40}, True),
        ({"pair 0 1": 59, "pair 1 1": 39, "pair 0 0": 2}, True),  # two of a hundred rows differ
        ({"pair 0 1": 58, "pair 1 1": 39, "pair 0 0": 3}, False),
        ({"pair 0 1": 4, "pair 1 1": 96}, False),  # nearly all rows do have the label
        ({}, False),  # a task without a confusion table
    ],
)
def test_nearly_constant_predictions_of_the_product_are_warned_of(
    pairs: dict[str, float], warned: bool
) -> None:
    log = EventLog(None)
    config = configs.from_flat({"federation.rounds": 2})
    rows = SimpleNamespace(task=Classify("text", ("a", "b")))
    bench: Any = SimpleNamespace(config=config, rows=rows, events=log)
    score = Score(ACCURACY, 0.4, 0.0, 1.0, 100, sums={"rows": 100, **pairs})
    for round, which in ((1, "fm"), (2, "proxy"), (2, "fm-as-trained")):
        reference.labels_given(bench, round, which, score)
    assert not of(log.seen, "warning"), "neither before the end, nor of what is not the product"
    reference.labels_given(bench, 2, "fm", score)
    texts = [e["text"] for e in of(log.seen, "warning")]
    assert len(texts) == warned and all("test rows the label 'b'" in t for t in texts)


class Said(torch.nn.Module):
    """A model whose class scores are its inputs."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return type("Out", (), {"logits": input_ids})


def test_pairs_are_the_confusion_matrix() -> None:
    task = Classify("text", ("a", "b", "c"))
    torch.manual_seed(0)
    labels, scores = torch.randint(3, (200,)), torch.randn(200, 3)
    sums: dict[str, float] = {}
    for part in range(0, 200, 64):
        batch = {"input_ids": scores[part : part + 64], "labels": labels[part : part + 64]}
        for name, n in task.sums(Said(), batch).items():
            sums[name] = sums.get(name, 0) + n
    table = np.zeros((3, 3), int)
    for a, b, n in confusion(sums):
        table[a, b] = n
    assert (table == confusion_matrix(labels, scores.argmax(-1))).all()
    assert confusion({"rows": 3}) == []
