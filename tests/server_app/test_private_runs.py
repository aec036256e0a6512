"""Whole private runs in this process, with real clients: masked, noised, resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny
import torch
from safetensors.torch import load_file

from client_app.policy import Policy
from client_app.private import ExamplePrivacy
from fedpft_core.config import read_file
from fedpft_core.errors import RunError
from fedpft_core.privacy.accounting import Spend, epsilon
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import RefusalReply, SecureTrainReply
from server_app.rounds.outcome import Outcome
from server_app.state import State
from server_app.strategy import Strategy

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


def test_masked_statistics_give_the_head_of_plain_ones(
    text: dict[str, Any], tmp_path: Path
) -> None:
    """The same predictions before round 1, and nobody's sums in any message."""
    # A rate at which nothing moves: what is exported is what round 1 began with.
    flat = text | {
        "head.start": "statistics", "head.end": "better", "plug.method": "best",
        "plug.distil-steps": 2, "train.lr": 1e-30, "align.interval": 0, "lora.dropout": 0.0,
        "federation.rounds": 1, "run.evaluate-every": 1,
    }  # fmt: skip
    masked = flat | {"privacy.secure": True}
    federation = tiny.Federation(masked)
    events = tiny.run(masked, tmp_path / "masked", federation)
    others = tiny.run(flat | {"federation.weighting": "examples"}, tmp_path / "plain")
    for kind, same in (
        ("head", ("round", "rows", "classes", "scale", "taken")),
        ("evaluation", ("round", "model", "value")), ("plugged", ("method", "right", "rows")),
    ):  # fmt: skip
        found, want = ([e for e in log if e["event"] == kind] for log in (events, others))
        assert [[e[k] for k in same] for e in found] == [[e[k] for k in same] for e in want]
        assert len(found) >= 1
    assert [e["round"] for e in events if e["event"] == "head"] == [0, 1]
    a, b = (load_file(tmp_path / which / ADAPTER) for which in ("masked", "plain"))
    for k in b:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)
    kinds = {e.kind for _, e in federation.received}
    assert "secure-statistics-reply" in kinds and "statistics-reply" not in kinds
    booked = [e["bytes"] for e in events if e["event"] == "bytes" and e["kind"] == "statistics"]
    assert len(booked) == 2 * 4 and len(set(booked)) == 1


@pytest.mark.parametrize("task", ["regress", "multi-label", "tokens"])
def test_masked_statistics_of_every_form(task: str, tmp_path: Path) -> None:
    """Numbers, several labels and words: the head before round 1 is the one of plain sums."""
    flat = tasks.write(task, tmp_path) | {
        "federation.rounds": 1, "distill.steps": 2, "align.interval": 0, "lora.dropout": 0.0,
        "head.start": "statistics", "train.lr": 1e-30, "wire.adapter": "fp32",
        "plug.refit": "none", "federation.min-clients": 3, "data.validation-share": 0.2,
    }  # fmt: skip
    tiny.run(flat, tmp_path / "plain")
    secure = {"privacy.secure": True, "federation.weighting": "uniform"}
    tiny.run(flat | secure, tmp_path / "masked")
    a, b = (load_file(tmp_path / which / ADAPTER) for which in ("masked", "plain"))
    for k in b:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)


def test_masked_counts_choose_the_neurons_of_plain_ones(
    text: dict[str, Any], tmp_path: Path
) -> None:
    """Re-alignment by the clients' counts, which come out to the last token."""
    flat = text | {
        "federation.rounds": 2, "align.interval": 1, "align.proportion": 0.5, "train.lr": 1e-30,
        "lora.dropout": 0.0,
    }  # fmt: skip
    honest, seen = Strategy.run_round, dict[str, Any]()

    def noted(self: Strategy, state: State, round: int, *args: Any) -> Outcome:
        found = honest(self, state, round, *args)
        seen.setdefault(Path(self.config.run.dir).name, []).append((found.counts, state.digest))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Strategy, "run_round", noted)
        tiny.run(flat | {"federation.weighting": "examples"}, tmp_path / "plain")
        tiny.run(flat | {"privacy.secure": True}, tmp_path / "masked")
    (a, _), (_, aligned) = seen["masked"]
    (b, _), (_, same) = seen["plain"]
    assert a.tokens == b.tokens and a.inactive.keys() == b.inactive.keys()
    assert all(torch.equal(a.inactive[k], b.inactive[k]) for k in b.inactive)
    assert aligned == same  # the sub-FM of round 2, to the bit


def test_numbers_without_a_known_range_are_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    flat = tasks.write("regress", tmp_path) | {
        "distill.steps": 2, "align.interval": 0, "head.start": "statistics",
        "privacy.secure": True,
        "federation.weighting": "uniform", "federation.min-clients": 3,
        "data.validation": "", "data.validation-share": 0.0,
    }  # fmt: skip
    federation = tiny.Federation(flat)
    with pytest.raises(RunError, match=r"labelled rows \(data\.validation\)"):
        tiny.run(flat, tmp_path / "run", federation)
    assert {e.kind for _, e in federation.sent} == {"hello"}


def test_the_hospitals_runs_with_the_clinics_policies(text: dict[str, Any], tmp_path: Path) -> None:
    """examples/hospital/secure.yaml, with tiny data, and nodes that let nothing out unmasked."""
    file = Path(__file__).parents[2] / "examples" / "hospital" / "secure.yaml"
    flat = text | read_file(file) | {
        "plan.retained-layers": "first", "plan.keep-share": 0.25, "align.interval": 0,
        "federation.clients": 3, "federation.clients-per-round": 3, "federation.min-clients": 3,
        "federation.rounds": 1, "federation.partition": "iid", "train.local-steps": 6,
    }  # fmt: skip
    federation = tiny.Federation(flat)
    made = tiny.Federation.client
    policy = Policy.of({
        "policy-secure": 1, "policy-min-rows": 20, "policy-min-step-rows": 8,
        "policy-min-class-rows": 3, "policy-max-steps": 200, "policy-max-rank": 16,
    })  # fmt: skip

    def clinic(self: tiny.Federation, index: int) -> Any:
        return replace(made(self, index), policy=policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.Federation, "client", clinic)
        events = tiny.run(flat, tmp_path / "run", federation)
    assert {e.kind for _, e in federation.received} == {
        "hello-reply", "keys-reply", "shares-reply", "secure-statistics-reply",
        "secure-train-reply", "reveal-reply",
    }  # fmt: skip
    (head,) = [e for e in events if e["event"] == "head"]
    assert head["classes"] == 3
    assert [e["value"] for e in events if e["event"] == "evaluation"][-1] > 0.5


def test_masked_statistics_after_a_resumption(text: dict[str, Any], tmp_path: Path) -> None:
    """A stopped run goes on to the same bits: nothing random is left in a sum."""
    flat = text | {
        "privacy.secure": True, "head.start": "statistics", "head.end": "statistics",
        "head.interval": 1, "plug.method": "mapped",
    }  # fmt: skip
    tiny.run(flat, tmp_path / "whole")
    with pytest.raises(RunError):
        tiny.run(flat, tmp_path / "parts", run__stop_after=1)
    tiny.run(flat, tmp_path / "parts", run__resume=True)
    whole, parts = (load_file(tmp_path / n / ADAPTER) for n in ("whole", "parts"))
    assert all(torch.equal(t, parts[k]) for k, t in whole.items())


def test_a_node_keeps_its_rules_under_masks_too(text: dict[str, Any], tmp_path: Path) -> None:
    """Rows of a class, what may leave, and example-level privacy bind masked statistics."""
    flat = text | {"privacy.secure": True, "head.start": "statistics", "federation.attempts": 1}
    federation = tiny.Federation(flat)
    made = tiny.Federation.client
    rules: list[dict[str, Any]] = [
        {"policy": Policy.of({"policy-min-class-rows": 1000})},
        {"policy": Policy.of({"policy-leave": "adapter"})},
        {"private": ExamplePrivacy(1.0, 1.0, 0.0, 1e-5, tmp_path / "spent.json")},
        {"policy": Policy.of({"policy-secure": 1})},
    ]

    def strict(self: tiny.Federation, index: int) -> Any:
        return replace(made(self, index), **rules[index])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.Federation, "client", strict)
        with pytest.raises(RunError, match="class statistics: 1 good replies"):
            tiny.run(flat, tmp_path / "run", federation)
    found = [open_envelope(e) for _, e in federation.received if e.kind == "refusal"]
    said = " ".join(m.reason for m in found if isinstance(m, RefusalReply))
    for rule in ("policy-min-class-rows", "policy-leave", "gives no class statistics"):
        assert rule in said
    assert len(found) == 3 and "policy-secure" not in said


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
