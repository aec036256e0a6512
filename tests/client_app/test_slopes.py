"""Slopes of the loss at heads that a server sends: what a client sums, and what it keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from client_app import sums
from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import StatisticsReply, StatisticsRequest


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """A node with 12 rows, and a memory of its own."""
    tiny.write_csv(tmp_path / "rows.csv", [("the cat sat", tiny.LABELS[i % 3]) for i in range(12)])
    made = client_for(
        {"name": "n", "data-path": str(tmp_path / "rows.csv"), "cache-dir": str(tmp_path / "c")}, {}
    )
    made.cache = ProcessCache()
    return made


def asked(sub_fm: Any, seed: int, **change: Any) -> StatisticsRequest:
    """A request for the slope at a head drawn from a seed."""
    package, adapter = sub_fm
    g = torch.Generator().manual_seed(seed)
    shape = adapter["classifier.weight"].shape
    head = {
        "weight": torch.randn(shape, generator=g, dtype=torch.float64),
        "bias": torch.randn(shape[0], generator=g, dtype=torch.float64),
    }
    made = StatisticsRequest(
        round=0, digest=package.digest(), adapter=adapter, fmt="fp32", seed=0, width=64,
        batch_size=8, threads=1, package=package.to_bytes(), head=head,
    )  # fmt: skip
    return replace(made, **change)


def slope(node: Any, request: StatisticsRequest) -> torch.Tensor:
    answer = open_envelope(node.handle(seal(request)))
    assert isinstance(answer, StatisticsReply), answer
    assert answer.statistics["counts"].tolist() == [12]
    return answer.statistics["slope"]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the rows are passed through the model."""
    made: list[int] = []
    real = sums.seen

    def counted(*args: Any) -> Iterator[Any]:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(sums, "seen", counted)
    return made


def test_rows_pass_the_model_once_for_all_slopes_at_an_adapter(
    node: Any, sub_fm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = passes(monkeypatch)
    found = [slope(node, asked(sub_fm, seed)) for seed in (1, 2, 1)]
    assert len(made) == 1
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    other = {k: t * 2 for k, t in sub_fm[1].items()}
    moved = slope(node, asked(sub_fm, 1, adapter=other))
    assert len(made) == 2 and not torch.equal(moved, found[0])
    node.cache = ProcessCache()  # what is kept changes no bit
    assert torch.equal(slope(node, asked(sub_fm, 2)), found[1])


def test_features_beyond_the_room_for_them_are_made_anew(
    node: Any, sub_fm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = slope(node, asked(sub_fm, 1))
    node.cache = ProcessCache(max_features=10)
    made = passes(monkeypatch)
    found = [slope(node, asked(sub_fm, 1)) for _ in range(2)]
    assert len(made) == 2 and not node.cache.features
    assert torch.equal(found[0], want) and torch.equal(found[1], want)
