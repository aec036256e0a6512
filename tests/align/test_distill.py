"""Losses against oracles, and alignments that move what they should and nothing else."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import oracles
import pytest
import tiny
import torch

from fedpft_core.adapter import lora as adapters
from fedpft_core.align import distill
from fedpft_core.align.blocks import moving_parts, outputs
from fedpft_core.align.losses import (
    hidden_errors,
    hidden_objective,
    output_error,
    products,
    weight_error,
)
from fedpft_core.config import DistillConfig
from fedpft_core.model.batch import real_positions
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import BlockPlan, Plan, pruned_ffns
from fedpft_core.proxy import package as proxy
from fedpft_core.proxy import patch as patches
from fedpft_core.proxy.build import build
from fedpft_core.train.inactivity import apoz
from fedpft_core.wire.identity import tensor_digest

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def align(
    family: str,
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    plan: Plan,
    chosen: dict[int, torch.Tensor] | None = None,
    steps: int = 20,
    lr: float = 5e-3,
    alpha: float = 0.0,
    **keys: Any,
) -> tuple[float, float, float]:
    cfg = replace(DistillConfig(), **keys)
    return distill.distil(
        teacher, student, plan, tiny.public(family, steps), cfg,
        steps=steps, lr=lr, alpha=alpha, chosen=chosen,
    )  # fmt: skip


# --- losses -------------------------------------------------------------------------------


@families
def test_hidden_errors_equal_the_oracle_on_padded_batches(family: str) -> None:
    teacher, student, plan, _ = tiny.pair(family)
    teacher.double(), student.double()
    (batch,) = tiny.public(family, 1, rows=3)
    batch = tiny.double(batch)
    mask = batch.get("attention_mask")
    if mask is not None:
        assert not mask.all(), "the batch should have padding"
    with torch.no_grad():
        h_T, h_S = oracles.block_outputs(teacher, batch), oracles.block_outputs(student, batch)
    found = output_error(teacher, student, plan, [batch])
    assert set(found) == set(plan.pruned)
    for block, error in found.items():
        want = oracles.hidden_error(h_T[block], h_S[block], mask)
        assert error == pytest.approx(want, rel=1e-10)
        assert error > 0


def test_padding_does_not_enter_the_hidden_error() -> None:
    real = torch.tensor([[True, True, False]])
    h_T = {0: torch.randn(1, 3, 4)}
    h_S = {0: h_T[0] + 1.0}
    before = hidden_errors(h_T, h_S, real)[0]
    h_S[0][0, 2] = 1e6
    h_T[0][0, 2] = -1e6
    assert torch.equal(hidden_errors(h_T, h_S, real)[0], before)


def test_hidden_error_does_not_depend_on_the_scale_of_a_block() -> None:
    real = torch.ones(2, 3, dtype=torch.bool)
    t, s = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = hidden_errors({0: t, 1: 8 * t}, {0: s, 1: 8 * s}, real)
    torch.testing.assert_close(found[0], found[1])


@families
def test_weight_error_equals_the_oracle(family: str) -> None:
    fm = tiny.model(family).double()
    plan = tiny.plan_for(fm)
    small = build(fm, plan)
    for block, student in pruned_ffns(small, plan).items():
        teacher = family_of(family).ffns(fm)[block]
        fast = weight_error(student, products(teacher))
        want = oracles.weight_error(teacher, student)
        assert float(fast.detach()) == pytest.approx(want, rel=1e-12)
        same = weight_error(teacher, products(teacher))
        assert float(same.detach()) == 0.0


@families
def test_distilled_loss_is_hidden_error_plus_alpha_times_weight_error(family: str) -> None:
    teacher, student, plan, _ = tiny.pair(family)
    batch = tiny.public(family, 1)[0]
    hidden = output_error(teacher, student, plan, [batch])
    ffns, theirs = pruned_ffns(student, plan), family_of(family).ffns(teacher)
    weight = [oracles.weight_error(theirs[b], ffn) for b, ffn in ffns.items()]
    first, _, _ = distill.distil(
        teacher, student, plan, [batch], DistillConfig(), steps=1, lr=1e-9, alpha=0.5
    )
    want = sum(hidden.values()) / len(hidden) + 0.5 * sum(weight) / len(weight)
    assert first == pytest.approx(want, rel=1e-5)


@families
def test_gradients_of_both_losses_equal_finite_differences(family: str) -> None:
    """The hidden-state error and the weight-product error, through every part that moves."""
    teacher, student, plan, _ = tiny.pair(family)
    teacher.double(), student.double()
    batch = tiny.double(tiny.public(family, 1, rows=3)[0])
    hidden = hidden_objective(teacher, student, plan)
    theirs, mine = family_of(family).ffns(teacher), pruned_ffns(student, plan)

    def weights() -> torch.Tensor:
        terms = [weight_error(f, products(theirs[b])) for b, f in mine.items()]
        return torch.stack(terms).mean()

    parts = moving_parts(student, plan)
    for loss in (lambda: hidden(batch), weights):
        with distill.only_trained(student, parts.values()):
            values = list(parts.values())
            grads = torch.autograd.grad(loss(), values, allow_unused=True)
        reached = {part for (_, part), g in zip(parts, grads, strict=True) if g is not None}
        assert reached >= {
            part for _, part in parts if part.endswith("weight") and "norm" not in part
        }
        step = 1e-6
        for p, g in zip(values, grads, strict=True):
            if g is None:
                continue
            flat, at = p.detach().view(-1), int(g.abs().argmax())
            value, sides = float(flat[at]), []
            for sign in (1, -1):
                flat[at] = value + sign * step
                with torch.no_grad():
                    sides.append(float(loss()))
            flat[at] = value
            change = (sides[0] - sides[1]) / (2 * step)
            assert float(g.view(-1)[at]) == pytest.approx(change, rel=1e-5, abs=1e-9)


def test_the_weight_term_has_a_gradient() -> None:
    """Alpha changes the result, and alone it brings W2 W1 closer to the teacher's."""
    results = {}
    for alpha in (0.0, 0.01, 10.0):
        teacher, student, plan, _ = tiny.pair("bert")
        target = {b: products(family_of("bert").ffns(teacher)[b]) for b in plan.pruned}
        align("bert", teacher, student, plan, alpha=alpha)
        ffns = pruned_ffns(student, plan)
        error = sum(float(weight_error(f, target[b]).detach()) for b, f in ffns.items())
        results[alpha] = (error, ffns[1].ins[0].weight.detach().clone())
    assert not torch.equal(results[0.0][1], results[0.01][1])
    assert results[10.0][0] < 0.9 * results[0.0][0]


# --- what an alignment moves --------------------------------------------------------------


def _choose(plan: Plan) -> dict[int, torch.Tensor]:
    return {1: torch.tensor([0, 3]), 2: torch.tensor([5])}


@families
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_chosen_neurons_move_and_all_others_stay_to_the_bit(
    family: str, weight_decay: float
) -> None:
    teacher, student, plan, _ = tiny.pair(family)
    chosen = _choose(plan)
    before_T, before_S = tiny.weights(teacher), tiny.weights(student)
    probe = tiny.public(family, 3, seed=9)
    error_before = output_error(teacher, student, plan, probe)
    parts_before = {
        b: {k: p.detach().clone() for k, p in f.parts().items()}
        for b, f in pruned_ffns(student, plan).items()
    }
    align(family, teacher, student, plan, chosen, weight_decay=weight_decay)
    error_after = output_error(teacher, student, plan, probe)
    assert sum(error_after.values()) < sum(error_before.values())

    moved_names = set()
    for block, ffn in pruned_ffns(student, plan).items():
        named = {id(p): n for n, p in student.named_parameters()}
        stay = [j for j in range(ffn.neurons) if j not in chosen[block].tolist()]
        for part, p in ffn.parts().items():
            moved_names.add(named[id(p)])
            axis, was = FFN.neuron_axis(part), parts_before[block][part]
            if axis is None:
                assert not torch.equal(p, was), part
                continue
            for j in chosen[block].tolist():
                assert not torch.equal(p.select(axis, j), was.select(axis, j)), (part, j)
            for j in stay:
                assert torch.equal(p.select(axis, j), was.select(axis, j)), (part, j)
    assert tiny.same_bits(tiny.weights(teacher), before_T), "the teacher moved"
    for name, value in tiny.weights(student).items():
        if name not in moved_names:
            assert torch.equal(value, before_S[name]), name


@families
def test_layer_level_distillation_moves_compressed_ffns_only(family: str) -> None:
    teacher, student, plan, _ = tiny.pair(family)
    before = tiny.weights(student)
    adapter = adapters.read(student, plan)
    probe = tiny.public(family, 3, seed=9)
    error = output_error(teacher, student, plan, probe)
    align(family, teacher, student, plan, alpha=0.01)
    after_error = output_error(teacher, student, plan, probe)
    assert all(after_error[b] < error[b] for b in plan.pruned)
    named = {id(p): n for n, p in student.named_parameters()}
    moving = {named[id(p)] for f in pruned_ffns(student, plan).values() for p in f.parts().values()}
    for name, value in tiny.weights(student).items():
        assert torch.equal(value, before[name]) == (name not in moving), name
    assert tiny.same_bits(adapters.read(student, plan), adapter)
    for block in (0, 3):
        ffn, whole = (family_of(family).ffns(m)[block] for m in (student, teacher))
        for part, p in ffn.parts().items():
            assert torch.equal(p, whole.parts()[part]), "a retained block moved"


@families
def test_requires_grad_is_as_it_was_and_no_gradient_is_left(family: str) -> None:
    teacher, student, plan, _ = tiny.pair(family)
    before = {n: p.requires_grad for n, p in student.named_parameters()}
    align(family, teacher, student, plan, _choose(plan), steps=2)
    assert {n: p.requires_grad for n, p in student.named_parameters()} == before
    assert all(p.grad is None for m in (teacher, student) for p in m.parameters())
    assert not teacher.training and not student.training


@families
def test_a_keep_all_student_has_nothing_to_learn(family: str) -> None:
    everything = BlockPlan("pruned", tuple(range(tiny.neurons(family))))
    plan = Plan(family, tiny.neurons(family), (everything,) * 4)
    teacher, student, _, _ = tiny.pair(family, plan)
    errors = output_error(teacher, student, plan, tiny.public(family, 2))
    assert errors == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}


@families
def test_alignment_patch_moves_the_digest_and_only_chosen_neurons_travel(family: str) -> None:
    teacher, student, plan, spec = tiny.pair(family)
    kind = "text" if family in tiny.TEXT_FAMILIES else "image"
    bare = build(tiny.model(family), plan)
    package = proxy.make_package(bare, plan, spec, tiny.processor(family), kind, tiny.LABELS, 16)
    digests = {k: tensor_digest(t) for k, t in package.weights.items()}
    chosen = _choose(plan)
    align(family, teacher, student, plan, chosen)
    server = dict(digests)
    patch, after = patches.make_patch(student, plan, chosen, package, server, "fp32")
    assert patch.source == package.digest()
    assert patch.target == after.digest() != patch.source
    neurons = sum(len(i) for i in chosen.values())
    row = family_of(family)
    per_neuron, shared = 0, 0
    for part, p in pruned_ffns(student, plan)[1].parts().items():
        if FFN.neuron_axis(part) is None:
            shared += 2 * p.numel()
        else:
            per_neuron += 16 if part.endswith("weight") else 1
    assert per_neuron >= 16 * (len(row.ffn_in) + 1)
    floats = sum(t.numel() for n, t in patch.tensors.items() if not n.endswith("/index"))
    assert floats == neurons * per_neuron + shared
    arrived = patches.apply_patch(package, patch, dict(digests))
    assert tiny.same_bits(arrived.weights, after.weights)
    live = dict(student.get_base_model().named_parameters())
    for name, value in after.weights.items():
        if name in live:
            assert torch.equal(value, live[name].detach()), name


@families
def test_distillation_is_deterministic_and_leaves_the_global_stream_alone(family: str) -> None:
    results = []
    for noise in (0, 1):
        teacher, student, plan, _ = tiny.pair(family, dropout=0.3)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        align(family, teacher, student, plan, steps=4, adapter_noise=0.02)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(tiny.weights(student))
    assert tiny.same_bits(*results)


def test_adapter_noise_is_taken_off_again_and_changes_the_result() -> None:
    results = []
    for size in (0.0, 0.05):
        teacher, student, plan, _ = tiny.pair("bert")
        mine, theirs = adapters.read(student, plan), adapters.read(teacher)
        align("bert", teacher, student, plan, steps=5, adapter_noise=size)
        assert tiny.same_bits(adapters.read(student, plan), mine)
        assert tiny.same_bits(adapters.read(teacher), theirs)
        results.append(tiny.weights(student))
    assert not tiny.same_bits(*results)


def test_choosing_for_other_blocks_is_refused() -> None:
    teacher, student, plan, _ = tiny.pair("bert")
    with pytest.raises(ValueError, match="each pruned block"):
        align("bert", teacher, student, plan, {0: torch.tensor([0]), 1: torch.tensor([0])})


def test_alignment_trains_at_the_rates_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Spy(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    teacher, student, plan, _ = tiny.pair("bert")
    align("bert", teacher, student, plan, steps=10, lr=0.5e-2, warmup_share=0.2)
    want = [0.5e-2 * share for share in oracles.step_rates(10, 2)]
    assert rates == pytest.approx(want, rel=1e-12)


# --- schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.048, 0.5, 0.99])
def test_warmup_then_linear_equals_the_oracle(share: float) -> None:
    for steps in (1, 2, 3, 7, 40, 300):
        warmup = min(math.ceil(share * steps), steps)
        if warmup == steps:
            continue
        found = [distill.warmup_then_linear(i, steps, share) for i in range(steps)]
        assert found == pytest.approx(oracles.step_rates(steps, warmup), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.048, 0.5, 1.0])
def test_warmup_then_linear_is_never_0_and_peaks_at_1(share: float) -> None:
    for steps in range(1, 60):
        found = [distill.warmup_then_linear(i, steps, share) for i in range(steps)]
        assert min(found) > 0
        assert max(found) == 1.0


# --- choosing neurons ---------------------------------------------------------------------


def test_apoz_is_inactive_over_tokens() -> None:
    rates = apoz(torch.tensor([0, 1, 4]), 4)
    assert rates.dtype == torch.float64
    assert rates.tolist() == [0.0, 0.25, 1.0]


# --- taps ---------------------------------------------------------------------------------


@families
def test_outputs_are_those_of_the_blocks_by_fm_index(family: str) -> None:
    fm, small, plan, _ = tiny.pair(family)
    batch = tiny.batch_of(family)
    with torch.no_grad():
        for model, own in ((fm, False), (small, True)):
            want = oracles.block_outputs(model, batch)
            found = outputs(model, plan, batch, own_index=own)
            assert set(found) == set(plan.pruned)
            assert all(torch.equal(found[b], want[b]) for b in found)
    assert not any(m._forward_hooks for m in (*fm.modules(), *small.modules()))


def test_real_positions_are_the_mask_and_all_of_an_image() -> None:
    batch = tiny.batch_of("bert")
    mask = batch["attention_mask"]
    assert torch.equal(real_positions(batch, mask.shape[1]), mask.bool())
    pixels = tiny.batch_of("vit")
    assert real_positions(pixels, 17).shape == (len(pixels["labels"]), 17)
    assert real_positions(pixels, 17).all()


def test_distil_copes_with_deep_copies() -> None:
    teacher, student, plan, _ = tiny.pair("bert")
    twin = copy.deepcopy(student)
    align("bert", teacher, student, plan, steps=3)
    align("bert", teacher, twin, plan, steps=3)
    assert tiny.same_bits(tiny.weights(student), tiny.weights(twin))
