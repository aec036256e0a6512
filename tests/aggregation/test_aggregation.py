"""Rules of aggregation against NumPy, and what a round's replies take of the server's memory."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch

from fedpft_core import aggregation, registry
from fedpft_core.aggregation import Replies, RuleSettings, aggregate
from fedpft_core.aggregation.average import RunningSum
from fedpft_core.errors import UserError
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors
from server_app.run.events import EventLog
from server_app.strategy import Strategy

ROOT = Path(__file__).parents[2]
SHAPES = {"b.weight": (5, 3), "a.weight": (4,), "c.bias": (1,)}


def adapter(seed: int) -> Tensors:
    stream = torch_stream(seed, "aggregation")
    return {k: torch.randn(shape, generator=stream) for k, shape in SHAPES.items()}


@pytest.fixture
def replies(tmp_path: Path) -> Iterator[Replies]:
    with Replies(adapter(0), tmp_path) as made:
        yield made


def filled(replies: Replies, count: int, shuffle: int = 0) -> dict[str, tuple[Tensors, int]]:
    """Add replies `00`, `01` … in any order; returns them by name."""
    made = {f"{i:02d}": (adapter(i), 1 + 3 * i) for i in range(count)}
    names = list(made)
    random.Random(shuffle).shuffle(names)
    for name in names:
        replies.add(name, made[name][1], made[name][0])
    return made


def stacked(made: dict[str, tuple[Tensors, int]], key: str) -> np.ndarray:
    return np.stack([made[name][0][key].numpy() for name in sorted(made)])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_average_is_numpys_in_the_order_of_the_names(replies: Replies, count: int) -> None:
    made = filled(replies, count, shuffle=count)
    found = aggregate("average", replies)
    weights = [made[name][1] for name in sorted(made)]
    assert replies.examples == weights
    for key in SHAPES:
        total = np.zeros(SHAPES[key])
        for value, weight in zip(stacked(made, key), weights, strict=True):
            total += value.astype(np.float64) * weight
        want = (total / sum(weights)).astype(np.float32)
        assert torch.equal(found[key], torch.from_numpy(want))


@pytest.mark.parametrize("piece", [1, 7, 2**15])
def test_a_running_sum_is_the_average_of_what_has_come(
    replies: Replies, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in any order, whatever the size of the pieces that are read."""
    monkeypatch.setattr(aggregation, "_PIECE", piece)
    made = filled(replies, 6)
    running = RunningSum(replies)
    total = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    weights = 0
    with pytest.raises(ValueError):
        running.result()
    for name in ("03", "00", "05", "01"):
        running.add(name, made[name][1])
        weights += made[name][1]
        found = running.result()
        for key in SHAPES:
            total[key] += made[name][0][key].numpy().astype(np.float64) * made[name][1]
            want = (total[key] / weights).astype(np.float32)
            assert torch.equal(found[key], torch.from_numpy(want))
        assert running.weight == weights


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("slice", [1, 10, 2**20])
def test_the_median_is_numpys(
    replies: Replies, count: int, slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "_SLICE", slice)
    made = filled(replies, count)
    found = aggregate("median", replies)
    assert found.keys() == SHAPES.keys()
    for key in SHAPES:
        want = np.median(stacked(made, key).astype(np.float64), axis=0).astype(np.float32)
        assert torch.equal(found[key], torch.from_numpy(want))


def test_one_odd_client_moves_the_average_and_not_the_median(replies: Replies) -> None:
    for i in range(4):
        replies.add(f"{i}", 5, {k: torch.full(s, float(i)) for k, s in SHAPES.items()})
    replies.add("odd", 5, {k: torch.full(s, 1e6) for k, s in SHAPES.items()})
    assert float(aggregate("median", replies)["c.bias"]) == 2.0
    assert float(aggregate("average", replies)["c.bias"]) > 1e5


@pytest.mark.parametrize("rule", registry.names("aggregation"))
def test_every_rule_leaves_equal_replies_as_they_are(replies: Replies, rule: str) -> None:
    """Whatever a rule does, it is the clients' adapter where they agree, the server's own too."""
    one = {k: torch.round(t * 8) / 8 for k, t in adapter(3).items()}
    replies.settings = RuleSettings(attackers=0.2, own=lambda: one)
    for i in range(5):
        replies.add(f"{i}", 4, one)
    found = aggregate(rule, replies)
    assert found.keys() == one.keys()
    assert all(torch.equal(found[k], one[k]) and found[k].dtype == torch.float32 for k in one)


@pytest.mark.parametrize("rule", registry.names("aggregation"))
def test_the_order_of_arrival_does_not_matter(tmp_path: Path, rule: str) -> None:
    results = []
    for seed in range(4):
        settings = RuleSettings(attackers=0.2, own=lambda: adapter(99))
        with Replies(adapter(0), tmp_path, settings) as replies:
            filled(replies, 9, shuffle=seed)
            results.append(aggregate(rule, replies))
    assert all(torch.equal(r[k], results[0][k]) for r in results for k in SHAPES)


def test_replies_are_read_one_by_one_in_the_order_of_their_names(replies: Replies) -> None:
    made = filled(replies, 6, shuffle=5)
    for _ in range(2):  # as often as a rule likes
        read = list(replies)
        assert len(read) == len(replies) == 6
        for (tensors, weight), name in zip(read, sorted(made), strict=True):
            assert weight == made[name][1]
            assert all(torch.equal(tensors[k], t) for k, t in made[name][0].items())


def test_what_does_not_fit_is_not_taken(replies: Replies) -> None:
    good = adapter(0)
    bad: list[Tensors] = [
        {k: t for k, t in good.items() if k != "c.bias"},
        good | {"more": torch.zeros(1)},
        good | {"c.bias": torch.zeros(2)},
        good | {"c.bias": torch.zeros(1, dtype=torch.float64)},
    ]
    for tensors in bad:
        with pytest.raises(ValueError):
            replies.add("a", 1, tensors)
    replies.add("a", 1, good)
    with pytest.raises(ValueError):
        replies.add("a", 1, good)  # twice
    replies.add("b", 1, good)
    assert torch.equal(aggregate("average", replies)["a.weight"], good["a.weight"])


def test_nothing_to_aggregate(replies: Replies) -> None:
    with pytest.raises(ValueError, match="nothing"):
        aggregate("average", replies)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(UserError, match=r"federation.aggregate.*average.*median.*none"):
        fabricate.config(federation__aggregate="mean")


def test_no_file_is_left_behind(tmp_path: Path) -> None:
    with Replies(adapter(0), tmp_path) as replies:
        filled(replies, 3)
        assert not list(tmp_path.iterdir())  # without a name from the start
    with pytest.raises(ValueError):
        replies.add("x", 1, adapter(1))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Replies(adapter(0), tmp_path / "none")


def test_the_configured_rule_is_the_one_that_runs() -> None:
    found = {}
    for rule in registry.names("aggregation"):
        network = fabricate.network("a", "b", "c")
        config = fabricate.config(federation__aggregate=rule)
        strategy = Strategy(config, network, EventLog(None), lambda start, round: dict(start))
        found[rule] = strategy.run_round(fabricate.state(), 1, "").adapter["classifier.bias"]
    assert not torch.equal(found["average"], found["median"])


def test_memory_does_not_grow_with_the_replies() -> None:
    """In processes of their own: a few replies, and thirty times as many."""
    peaks = {}
    for count in (2, 60):
        done = subprocess.run(
            [
                sys.executable, "benchmarks/aggregation.py", "--one", "median", str(count),
                "--parameters", "200000",
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=1200, check=True,
        )  # fmt: skip
        peaks[count] = int(done.stdout)
    # Held in memory, 60 replies of 0.8 MB and their wire forms would be over 90 MB.
    assert peaks[60] - peaks[2] < 15e6
