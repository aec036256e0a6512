"""The server's own step against the formulas, number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedpft_core.config import FederationConfig, from_flat
from fedpft_core.errors import UserError
from fedpft_core.tensors import Tensors
from fedpft_core.train.server import BETA_2, TAU, step


def rounds(settings: FederationConfig, means: list[float]) -> list[float]:
    """What one number comes to over rounds whose means lie so far from where they began."""
    at: Tensors = {"w": torch.zeros(1)}
    memory: Tensors = {}
    out = []
    for distance in means:
        at, memory = step(settings, at, {"w": at["w"] + distance}, memory)
        out.append(at["w"].item())
    return out


def test_without_an_optimiser_the_mean_is_the_next_adapter() -> None:
    mean = {"w": torch.randn(3)}
    adapter, memory = step(FederationConfig(), {"w": torch.zeros(3)}, mean, {})
    assert adapter is mean
    assert memory == {}


def test_momentum_goes_on_in_the_direction_it_had() -> None:
    settings = FederationConfig(server_optimiser="momentum", server_lr=0.5, server_momentum=0.8)
    m = at = 0.0
    expected = []
    for distance in (1.0, 0.25, -2.0):
        m = 0.8 * m + distance
        at += 0.5 * m
        expected.append(at)
    assert rounds(settings, [1.0, 0.25, -2.0]) == pytest.approx(expected, rel=1e-6)


def test_momentum_without_memory_is_averaging() -> None:
    settings = FederationConfig(server_optimiser="momentum", server_momentum=0.0)
    before, mean = torch.randn(50), torch.randn(50)
    adapter, _ = step(settings, {"w": before}, {"w": mean}, {})
    assert torch.equal(adapter["w"], mean)


def test_adam_divides_by_the_root_of_the_mean_of_squares() -> None:
    settings = FederationConfig(server_optimiser="adam", server_lr=0.1, server_momentum=0.9)
    m = v = at = 0.0
    expected = []
    for distance in (1.0, 0.5, -0.001, 0.0):
        m = 0.9 * m + 0.1 * distance
        v = BETA_2 * v + (1 - BETA_2) * distance**2
        at += 0.1 * m / (v**0.5 + TAU)
        expected.append(at)
    assert rounds(settings, [1.0, 0.5, -0.001, 0.0]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("server")) | {
        "federation.rounds": 3,
        "align.interval": 0,
        "distill.steps": 2,
        "train.local-steps": 3,
        "run.evaluate-every": 9,
        "wire.adapter": "fp32",
    }


def adapters(events: list[dict[str, Any]]) -> list[float]:
    return [e["norm"] for e in tiny.main_run(events, "adapter")]


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_resumed_run_remembers(job: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Without the memory in the checkpoint the second half would go another way."""
    flat = job | {"federation.server-optimiser": name, "federation.server-lr": 0.3}
    whole = tiny.run(flat, tmp_path / "whole")
    with pytest.raises(Exception, match="stopped after round 2"):
        tiny.run(flat | {"run.stop-after": 2}, tmp_path / "parts")
    resumed = tiny.run(flat | {"run.resume": True}, tmp_path / "parts")
    assert adapters(resumed)[-1] == adapters(whole)[-1]
    assert adapters(tiny.run(job, tmp_path / "plain")) != adapters(whole)


def test_clients_that_tune_alone_have_no_mean() -> None:
    with pytest.raises(UserError, match=r"server-optimiser = adam .* no\w*ne|server-optimiser"):
        from_flat({"federation.aggregate": "none", "federation.server-optimiser": "adam"})
