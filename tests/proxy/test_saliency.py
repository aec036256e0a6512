"""How neurons are ranked, against loops over neurons and rows."""

from __future__ import annotations

import copy

import oracles
import pytest
import tiny
import torch
from torch import nn

from fedpft_core import registry
from fedpft_core.config import PlanConfig
from fedpft_core.errors import UserError
from fedpft_core.model.batch import by_row
from fedpft_core.model.device import Batch, to_device
from fedpft_core.model.families import base_model, family_of
from fedpft_core.proxy import saliency
from fedpft_core.proxy.choose import make_plan
from fedpft_core.proxy.saliency import Probe
from fedpft_core.seeds import torch_stream

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def _probe(family: str) -> tuple[Probe, list[dict[str, torch.Tensor]]]:
    batches = [tiny.double(b) for b in tiny.public(family, 2, rows=3)]
    return Probe(tiny.model(family).double(), 3, lambda: batches), batches


def _activations(fm: nn.Module, family: str, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What enters each block's out-projection, [B, L, F]."""
    seen: list[torch.Tensor] = []
    handles = [
        ffn.out.register_forward_pre_hook(lambda _m, args: seen.append(by_row(args[0], batch)))
        for ffn in family_of(family).ffns(fm)
    ]
    with torch.no_grad():
        fm(**oracles.inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


@families
def test_activation_is_the_rms_of_what_a_neuron_adds(family: str) -> None:
    probe, batches = _probe(family)
    found = saliency.scores("activation", probe)
    totals = [[0.0] * tiny.neurons(family) for _ in range(4)]
    tokens = 0
    for batch in batches:
        acts = _activations(probe.fm, family, batch)
        mask = batch.get("attention_mask")
        for b in range(acts[0].shape[0]):
            for t in range(acts[0].shape[1]):
                if mask is not None and not mask[b, t]:
                    continue
                tokens += 1
                for i, ffn in enumerate(family_of(family).ffns(probe.fm)):
                    for j in range(tiny.neurons(family)):
                        added = acts[i][b, t, j] * ffn.out.weight[:, j]
                        totals[i][j] += float(added.detach().square().sum())
    for score, total in zip(found, totals, strict=True):
        want = torch.tensor([(t / tokens) ** 0.5 for t in total], dtype=torch.float64)
        torch.testing.assert_close(score, want, rtol=1e-10, atol=0)


def _row_sums(values: torch.Tensor, batch: dict[str, torch.Tensor], position: str) -> torch.Tensor:
    """The sum over the positions of each row; with one position a row, the values themselves."""
    if position != "every":
        return values
    lengths = (
        batch["attention_mask"].sum(1).tolist()
        if "attention_mask" in batch
        else [len(values) // len(next(iter(batch.values())))] * len(next(iter(batch.values())))
    )
    return torch.stack([part.sum() for part in values.split([int(n) for n in lengths])])


@families
def test_gradient_is_the_first_order_change_when_a_neuron_is_removed(family: str) -> None:
    """Finite differences: each neuron's out-column scaled by 1 ± ε, row by row."""
    probe, batches = _probe(family)
    found = saliency.scores("gradient", probe)
    step = 1e-5
    position = family_of(family).summary

    def rows(fm: nn.Module) -> torch.Tensor:
        stream = torch_stream(3, "saliency-gradient")
        values = []
        with torch.no_grad():
            for b in batches:
                read = oracles.head_reads(oracles.block_outputs(fm, b)[-1], b, position)
                v = torch.randn(read.shape, generator=stream).double()
                values.append(_row_sums((read * v).sum(1), b, position))
        return torch.cat(values)

    for i in (0, 2, 3):
        for j in (0, 13):
            sides = []
            for sign in (1, -1):
                fm = copy.deepcopy(probe.fm)
                with torch.no_grad():
                    family_of(family).ffns(fm)[i].out.weight[:, j] *= 1 + sign * step
                sides.append(rows(fm))
            change = (sides[0] - sides[1]) / (2 * step)
            want = float(change.square().mean().sqrt())
            assert float(found[i][j]) == pytest.approx(want, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", registry.names("saliency"))
@families
def test_every_saliency_gives_a_plan_and_leaves_the_fm_alone(family: str, name: str) -> None:
    fm = tiny.model(family)
    before = tiny.weights(fm)
    batches = tiny.public(family, 2)
    plan = make_plan(fm, PlanConfig(saliency=name), 0, lambda: batches)
    again = make_plan(fm, PlanConfig(saliency=name), 0, lambda: batches)
    assert plan == again
    assert [len(b.kept) for b in plan.blocks] == [0, *[tiny.neurons(family) // 4] * 2, 0]
    assert tiny.same_bits(tiny.weights(fm), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base_model(fm).modules())
    assert all(p.grad is None for p in fm.parameters())


def test_saliencies_differ() -> None:
    fm, batches = tiny.model("bert"), tiny.public("bert", 2)
    plans = {
        n: make_plan(fm, PlanConfig(saliency=n), 0, lambda: batches)
        for n in registry.names("saliency")
    }
    assert len({p.to_json() for p in plans.values()}) == len(plans)


def test_without_public_rows_the_key_is_named() -> None:
    with pytest.raises(UserError, match=r"plan\.saliency"):
        make_plan(tiny.model("bert"), PlanConfig(saliency="activation"), 0)


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_public_batches_are_taken_to_the_fms_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm, batches = tiny.model("bert"), tiny.public("bert", 2)
    taken: list[tuple[int, torch.device]] = []

    def record(batch: Batch, device: torch.device) -> Batch:
        taken.append((id(batch), device))
        return to_device(batch, device)

    elsewhere = torch.device("cpu", 0)  # such that the FM's is told from any other
    monkeypatch.setattr(saliency, "device_of", lambda model: {id(fm): elsewhere}[id(model)])
    monkeypatch.setattr(saliency, "to_device", record)
    saliency.scores(name, Probe(fm, 0, lambda: batches))
    assert taken == [(id(batch), elsewhere) for batch in batches]


def test_padding_does_not_enter_the_activation_saliency() -> None:
    fm = tiny.model("bert")
    (batch,) = tiny.public("bert", 1, rows=3)
    wider = {
        k: torch.cat([v, torch.zeros(3, 5, dtype=v.dtype)], 1) for k, v in batch.items()
        if k != "index"
    }  # fmt: skip
    found = [saliency.scores("activation", Probe(fm, 0, lambda b=b: [b])) for b in (batch, wider)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
