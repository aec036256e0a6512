"""Whole private runs in this process, with real clients: masked, noised, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedpft_core.errors import RunError
from fedpft_core.privacy.accounting import Spend, epsilon
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import SecureTrainReply

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flat = tiny.write_task("bert", tmp_path_factory.mktemp("text"), rows=90)
    return flat | {
        "distill.steps": 4, "align.steps": 3, "align.interval": 2, "align.proportion": 1.0,
        "federation.rounds": 2, "federation.weighting": "uniform", "federation.min-clients": 3,
        "federation.clients-per-round": 4, "run.evaluate-every": 9, "train.local-steps": 6,
        "wire.adapter": "fp32",
    }  # fmt: skip


def test_a_masked_run_is_the_plain_one_but_for_rounding(
    text: dict[str, Any], tmp_path: Path
) -> None:
    text = text | {"federation.rounds": 1}
    masked = text | {"privacy.secure": True, "privacy.secure-range": 1.0}
    federation = tiny.Federation(masked)
    tiny.run(masked, tmp_path / "masked", federation)
    tiny.run(text, tmp_path / "plain")
    a, b = (load_file(tmp_path / which / ADAPTER) for which in ("masked", "plain"))
    step = 1.0 / (2**15 - 1)
    assert max(float((a[k] - b[k]).abs().max()) for k in b) < step
    up = [open_envelope(e) for _, e in federation.received if e.kind.startswith("secure")]
    assert len(up) == 4 and all(isinstance(m, SecureTrainReply) for m in up)
    assert not [e for _, e in federation.received if e.kind == "train-reply"]


def test_a_noised_run_counts_what_it_spends_over_a_resumption(
    text: dict[str, Any], tmp_path: Path
) -> None:
    noised = text | {"privacy.client-noise": 0.5, "federation.rounds": 3}
    with pytest.raises(RunError, match="stopped after round 2"):
        tiny.run(noised, tmp_path / "run", run__stop_after=2)
    events = tiny.run(noised, tmp_path / "run", run__resume=True)
    spent = {e["round"]: e["epsilon"] for e in events if e["event"] == "privacy"}
    assert spent == {n: epsilon([Spend(0.5)] * n, 1e-5).value for n in (1, 2, 3)}
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run" / ADAPTER).values())


def test_a_masked_run_with_the_clients_own_noise(text: dict[str, Any], tmp_path: Path) -> None:
    """Nobody's loss or change is seen; the noise on the mean is at least what was asked for."""
    masked = text | {
        "privacy.secure": True, "privacy.client-noise": 1.0, "privacy.sampling": "fixed",
        "federation.rounds": 1, "privacy.secure-range": 1.0, "federation.min-clients": 4,
    }  # fmt: skip
    ends = []
    for which in ("one", "other"):
        events = tiny.run(masked, tmp_path / which)
        ends.append(load_file(tmp_path / which / ADAPTER))
    (spent,) = [e for e in events if e["event"] == "privacy"]
    assert spent["epsilon"] == pytest.approx(epsilon([Spend(1.0)], 1e-5).rdp, rel=0.02)
    (done,) = [e for e in events if e["event"] == "round_finished"]
    assert done["loss"] is None
    lora = [k for k in ends[0] if "lora" in k]
    difference = torch.cat([(ends[0][k] - ends[1][k]).reshape(-1) for k in lora])
    assert float(difference.std()) == pytest.approx(2**0.5 / 4, rel=0.1)
