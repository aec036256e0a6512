"""Every way to align: what it moves, and its sums against slow and obvious ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch

from fedpft_core import config, registry
from fedpft_core.adapter import lora as adapters
from fedpft_core.align import distill
from fedpft_core.align import method as alignment
from fedpft_core.align.blocks import local_views, moving_parts, targets
from fedpft_core.align.losses import output_error
from fedpft_core.align.method import Job, block_local, closed_form, gradient
from fedpft_core.config import DistillConfig
from fedpft_core.errors import UserError
from fedpft_core.model.batch import by_row
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import BlockPlan, Plan, pruned_ffns
from fedpft_core.proxy.build import build

families = pytest.mark.parametrize("family", tiny.BUILDS)
methods = pytest.mark.parametrize("method", registry.names("alignment"))


def _job(
    family: str, pair: Any = None, chosen: Any = None, steps: int = 12, double: bool = False,
    alpha: float = 0.0, lr: float = 3e-3, **keys: Any,
) -> Job:  # fmt: skip
    teacher, student, plan, _ = pair or tiny.pair(family)
    if double:
        teacher.double(), student.double()
    made = tiny.public(family, 24)
    batches = [tiny.double(b) for b in made] if double else made
    cfg = replace(DistillConfig(), **({"fit_batches": 6} | keys))
    return Job(
        teacher, student, plan, lambda n: iter(batches[:n]), cfg, steps=steps, lr=lr,
        alpha=alpha, chosen=chosen,
    )  # fmt: skip


def _error(job: Job) -> float:
    probe = tiny.public(job.plan.model_type, 3, seed=9)
    probe = [tiny.double(b) for b in probe] if _is_double(job) else probe
    return sum(output_error(job.teacher, job.student, job.plan, probe).values())


def _is_double(job: Job) -> bool:
    return next(job.student.parameters()).dtype == torch.float64


def _layer_drop(family: str) -> Any:
    """A proxy that keeps blocks 0, 2, 3, 5 of 6."""
    fm = tiny.model(family, num_hidden_layers=6)
    plan = tiny.plan_for(fm, proxy="layer-drop", drop_to=4)
    assert plan.present == (0, 2, 3, 5)
    spec = adapters.make_spec(
        family_of(family), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=0.0)
    )
    small = adapters.attach(build(fm, plan), spec, plan)
    fm = adapters.attach(fm, spec)
    tensors = tiny.random_adapter(small, plan)
    adapters.load(small, tensors, plan), adapters.load(fm, tensors)
    return fm, small, plan, spec


# --- what every method keeps --------------------------------------------------------------


@methods
@families
def test_it_lowers_the_output_error_and_moves_compressed_ffns_only(
    family: str, method: str
) -> None:
    job = _job(family, gradient_weight=0.1)
    theirs, mine = tiny.weights(job.teacher), tiny.weights(job.student)
    grads = {n: p.requires_grad for n, p in job.student.named_parameters()}
    before = _error(job)
    first, last, seconds = alignment.run(method, job)
    assert min(first, last, seconds) > 0
    assert _error(job) < before
    named = {id(p): n for n, p in job.student.named_parameters()}
    moving = {named[id(p)] for p in moving_parts(job.student, job.plan).values()}
    assert tiny.same_bits(tiny.weights(job.teacher), theirs), "the teacher moved"
    for name, value in tiny.weights(job.student).items():
        if name not in moving:
            assert torch.equal(value, mine[name]), name
    assert {n: p.requires_grad for n, p in job.student.named_parameters()} == grads
    assert all(p.grad is None for m in (job.teacher, job.student) for p in m.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in job.student.modules())


@methods
@families
def test_neurons_not_chosen_stay_to_the_bit(family: str, method: str) -> None:
    chosen = {1: torch.tensor([0, 3]), 2: torch.tensor([5])}
    job = _job(family, chosen=chosen, weight_decay=0.5)
    before = {
        b: {k: p.detach().clone() for k, p in f.parts().items()}
        for b, f in pruned_ffns(job.student, job.plan).items()
    }
    alignment.run(method, job)
    for block, ffn in pruned_ffns(job.student, job.plan).items():
        for part, p in ffn.parts().items():
            axis = FFN.neuron_axis(part)
            if axis is None:
                continue
            same = [bool(torch.equal(p.select(axis, j), before[block][part].select(axis, j)))
                    for j in range(ffn.neurons)]  # fmt: skip
            stay = [j not in chosen[block].tolist() for j in range(ffn.neurons)]
            if part == "out.weight":
                assert same == stay
            else:
                assert all(s for s, kept in zip(same, stay, strict=True) if kept)


@methods
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    results = []
    for noise in (0, 1):
        job = _job("bert", steps=3, adapter_noise=0.02)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        alignment.run(method, job)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(tiny.weights(job.student))
    assert tiny.same_bits(*results)


@methods
@families
def test_a_keep_all_student_stays_where_it_is(family: str, method: str) -> None:
    everything = BlockPlan("pruned", tuple(range(tiny.neurons(family))))
    plan = Plan(family, tiny.neurons(family), (everything,) * 4)
    job = _job(family, tiny.pair(family, plan), steps=2, weight_decay=0.0, double=True)
    first, last, _ = alignment.run(method, job)
    assert first == pytest.approx(0.0, abs=1e-20) and last < 1e-4


# --- closed form --------------------------------------------------------------------------


def _lstsq(
    ffn: FFN, a: np.ndarray, residual: np.ndarray, ridge: float, index: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """New W2 and b2 by NumPy's least squares on the tokens themselves, the ridge as extra rows."""
    picked = a[:, index]
    lam = ridge * (picked**2).sum(0).mean()
    free = int(ffn.out.bias is not None)  # columns for b2
    rows = np.concatenate([picked, np.ones((len(a), free))], 1)
    extra = np.concatenate([np.sqrt(lam) * np.eye(len(index)), np.zeros((len(index), free))], 1)
    delta, *_ = np.linalg.lstsq(
        np.concatenate([rows, extra]),
        np.concatenate([residual, np.zeros((len(index), residual.shape[1]))]),
        rcond=None,
    )
    w = ffn.out.weight.detach().numpy().copy()
    w[:, index] += delta[: len(index)].T
    return w, ffn.out.bias.detach().numpy() + delta[-1] if free else np.zeros(len(w))


def _tokens(
    model: torch.nn.Module, family: str, block: int, batches: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of one block's FFN on real tokens, one token after the other."""
    ffn = family_of(family).ffns(model)[block]
    xs, ys = [], []
    for batch in batches:
        seen: list[Any] = []
        handles = [
            ffn.ins[0].register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0])),
            ffn.out.register_forward_hook(lambda _m, _a, out, s=seen: s.append(out)),
        ]
        with torch.no_grad():
            model(**oracles.inputs(batch))
        for handle in handles:
            handle.remove()
        mask = batch.get("attention_mask")
        seen = [by_row(value, batch) for value in seen]
        for b in range(len(seen[0])):
            for t in range(seen[0].shape[1]):
                if mask is None or mask[b, t]:
                    xs.append(seen[0][b, t].numpy())
                    ys.append(seen[1][b, t].numpy())
    return np.array(xs), np.array(ys)


@families
@pytest.mark.parametrize("index", [None, [1, 4]])
def test_closed_form_equals_numpys_least_squares(family: str, index: list[int] | None) -> None:
    chosen = {b: torch.tensor(index) for b in (1, 2)} if index else None
    job = _job(family, chosen=chosen, double=True, ridge=0.05)
    batches = list(job.batches(6))
    want = {}
    for block, ffn in pruned_ffns(job.student, job.plan).items():
        x, y = _tokens(job.teacher, family, block, batches)
        with torch.no_grad():
            a = ffn.inner(torch.tensor(x)).numpy()
            mine = ffn(torch.tensor(x)).numpy()
        want[block] = _lstsq(ffn, a, y - mine, 0.05, index or list(range(ffn.neurons)))
    first, last, _ = alignment.run("closed-form", job)
    errors = []
    for block, ffn in pruned_ffns(job.student, job.plan).items():
        w, b = want[block]
        np.testing.assert_allclose(ffn.out.weight.detach().numpy(), w, rtol=1e-8, atol=1e-10)
        if ffn.out.bias is not None:
            np.testing.assert_allclose(ffn.out.bias.detach().numpy(), b, rtol=1e-8, atol=1e-10)
        x, y = _tokens(job.teacher, family, block, batches)
        with torch.no_grad():
            errors.append(((y - ffn(torch.tensor(x)).numpy()) ** 2).sum() / (y**2).sum())
    assert last == pytest.approx(float(np.mean(errors)), rel=1e-8)
    assert last < first


@families
def test_sequential_fits_the_last_block_to_the_students_own_inputs(family: str) -> None:
    """After it no change of a block's W2 and b2 lowers the summed error before the norm."""
    job = _job(family, double=True, ridge=1e-9)
    alignment.run("sequential", job)
    block = max(job.plan.pruned)
    cross = ones = 0.0
    for batch in job.batches(6):
        theirs, real = local_views(job.teacher, job.plan, batch, wanted=(block,))
        mine, _ = local_views(job.student, job.plan, batch, own_index=True, wanted=(block,))
        pair = theirs[block], mine[block]
        after = family_of(family).after_ffn
        r = pair[0].y - pair[1].y if after else pair[0].total - pair[1].total
        r = r[real].detach()
        cross = cross + mine[block].a[real].detach().T @ r
        ones = ones + r.sum(0)
    scale = float(job.teacher.get_base_model().num_labels)  # of order 1
    assert float(torch.as_tensor(cross).abs().max()) < 1e-5 * scale
    if pruned_ffns(job.student, job.plan)[block].out.bias is not None:
        assert float(torch.as_tensor(ones).abs().max()) < 1e-5 * scale


def test_sequential_mends_what_earlier_blocks_left() -> None:
    """At the end of the last pruned block it is nearer to the FM than closed-form."""
    errors = {}
    for name in ("closed-form", "sequential"):
        job = _job("bert", ridge=1e-6)
        alignment.run(name, job)
        probe = list(job.batches(6))
        errors[name] = output_error(job.teacher, job.student, job.plan, probe)[2]
    assert errors["sequential"] < errors["closed-form"]


# --- block-local --------------------------------------------------------------------------


@families
def test_block_local_gradient_is_that_of_the_isolated_ffn(family: str) -> None:
    job = _job(family, double=True)
    (batch,) = job.batches(1)
    loss = block_local.objective(job.teacher, job.student, job.plan)
    parts = moving_parts(job.student, job.plan)
    with distill.only_trained(job.student, parts.values()):
        grads = torch.autograd.grad(loss(batch), list(parts.values()))
    found = dict(zip(parts, grads, strict=True))

    mask = batch.get("attention_mask")
    with torch.no_grad():
        blocks = oracles.block_outputs(job.teacher, batch)
    for block, ffn in pruned_ffns(job.student, job.plan).items():
        # The student's FFN put into the FM's own block: run the FM up to that block's output.
        twin = copy.deepcopy(job.teacher)
        theirs = family_of(family).ffns(twin)[block]
        for path in (*theirs.family.ffn_in, theirs.family.ffn_out):
            theirs.block.set_submodule(path, copy.deepcopy(ffn.block.get_submodule(path)))
        if theirs.norm is not None:
            theirs.norm.load_state_dict(ffn.norm.state_dict())
        live = theirs.parts()
        for p in twin.parameters():
            p.requires_grad_(False)
        for p in live.values():
            p.requires_grad_(True)
        h = oracles.block_outputs(twin, batch)[block]
        t = blocks[block]
        real = torch.ones(h.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        error = ((t - h)[real] ** 2).mean() / (t[real] ** 2).mean()
        grads = torch.autograd.grad(error / len(job.plan.pruned), list(live.values()))
        for part, g in zip(live, grads, strict=True):
            torch.testing.assert_close(found[block, part], g, rtol=1e-8, atol=1e-12)


# --- gradient matching --------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 2.0])
@families
def test_gradient_objective_is_output_error_plus_squared_relative_distance(
    family: str, weight: float
) -> None:
    job = _job(family, double=True)
    (batch,) = job.batches(1)
    objective = gradient.Objective(
        job.teacher, job.student, job.plan, weight, seed=4, position=job.position
    )
    with distill.only_trained(job.student, moving_parts(job.student, job.plan).values()):
        found = float(objective(batch).detach())
    flat = []
    for model, plan in ((job.teacher, None), (job.student, job.plan)):
        live = {n: p for n, p in adapters.parameters(model, plan).items() if ".lora_" in n}
        h = oracles.block_outputs(model, batch)[-1]
        h = oracles.head_reads(h, batch, family_of(family).summary)
        stream = distill.torch_stream(4, "gradient-matching")
        v = torch.randn(h.shape, generator=stream)
        grads = torch.autograd.grad((h * v.double()).sum(), list(live.values()))
        flat.append([x for g in grads for x in g.flatten().tolist()])
    _, distance = oracles.cosine_and_distance(*flat)
    hidden = output_error(job.teacher, job.student, job.plan, [batch])
    want = sum(hidden.values()) / len(hidden) + weight * distance**2
    assert found == pytest.approx(want, rel=1e-8)


@families
def test_gradient_of_the_gradient_objective_equals_finite_differences(family: str) -> None:
    """The second derivative is there, through every part that moves."""
    job = _job(family, double=True)
    (batch,) = job.batches(1)
    parts = moving_parts(job.student, job.plan)

    def loss() -> torch.Tensor:
        # Made anew, so that each call draws the same functional.
        objective = gradient.Objective(
            job.teacher, job.student, job.plan, 5.0, seed=4, position=job.position
        )
        with distill.only_trained(job.student, parts.values()):
            return objective(batch)

    objective = gradient.Objective(
        job.teacher, job.student, job.plan, 5.0, seed=4, position=job.position
    )
    with distill.only_trained(job.student, parts.values()):
        grads = torch.autograd.grad(objective(batch), list(parts.values()))
    step = 1e-6
    for p, g in zip(parts.values(), grads, strict=True):
        flat, at = p.detach().view(-1), int(g.abs().argmax())
        value, sides = float(flat[at]), []
        for sign in (1, -1):
            flat[at] = value + sign * step
            sides.append(float(loss().detach()))
        flat[at] = value
        assert float(g.view(-1)[at]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)


# --- layer-drop ---------------------------------------------------------------------------


@families
@pytest.mark.parametrize("method", ["sgd", "gradient"])
def test_layer_drop_trains_the_inner_blocks_to_stand_for_those_dropped(
    family: str, method: str
) -> None:
    pair = _layer_drop(family)
    job = _job(family, pair, steps=15, alpha=0.01)
    assert targets(job.plan) == {2: 2, 3: 4}
    (probe,) = tiny.public(family, 1, seed=9)
    with torch.no_grad():
        want = oracles.block_outputs(job.teacher, probe)
        have = oracles.block_outputs(job.student, probe)
    mask = probe.get("attention_mask")
    errors = output_error(job.teacher, job.student, job.plan, [probe])
    assert errors == {
        2: pytest.approx(oracles.hidden_error(want[2], have[1], mask), rel=1e-4),
        3: pytest.approx(oracles.hidden_error(want[4], have[2], mask), rel=1e-4),
    }
    before, mine = _error(job), tiny.weights(job.student)
    alignment.run(method, job)
    assert _error(job) < before
    inner = [f"{family_of(family).blocks}.{i}." for i in (1, 2)]
    for name, value in tiny.weights(job.student).items():
        inside = any(p in name for p in inner) and ".lora_" not in name
        if not inside:
            assert torch.equal(value, mine[name]), name
    moved = [n for n, v in tiny.weights(job.student).items() if not torch.equal(v, mine[n])]
    assert any(family_of(family).attention[3] in n for n in moved)


def test_layer_drop_without_inner_blocks_has_nothing_to_train() -> None:
    plan = tiny.plan_for(tiny.model("bert"), proxy="layer-drop", drop_to=2)
    assert targets(plan) == {}
    assert not alignment.needed("sgd", plan, 100)


@pytest.mark.parametrize("method", ["closed-form", "sequential", "block-local", "closed-form+sgd"])
def test_methods_of_pruned_ffns_refuse_layer_drop(method: str) -> None:
    job = _job("bert", _layer_drop("bert"))
    with pytest.raises(UserError, match=r"distill\.method = .* needs pruned blocks"):
        alignment.run(method, job)


# --- combinations -------------------------------------------------------------------------


def test_a_plus_b_is_a_then_b() -> None:
    both, one = _job("bert"), _job("bert")
    alignment.run("closed-form+sgd", both)
    alignment.run("closed-form", one), alignment.run("sgd", one)
    assert tiny.same_bits(tiny.weights(both.student), tiny.weights(one.student))


@pytest.mark.parametrize("key", ["distill.method", "align.method"])
def test_methods_are_checked_by_name(key: str) -> None:
    for good in ("sgd", "closed-form+sgd", "closed-form+block-local+sgd"):
        config.from_flat({key: good})
    for bad in ("sdg", "sgd+", "sgd+none", "", "+sgd", "sgd, closed-form"):
        with pytest.raises(UserError, match=key.replace(".", r"\.")):
            config.from_flat({key: bad})


def test_what_is_needed() -> None:
    plan = tiny.plan_for(tiny.model("bert"))
    assert alignment.needed("sgd", plan, 1)
    assert not alignment.needed("none", plan, 1)
    assert not alignment.needed("sgd", plan, 0)
    assert not alignment.needed("sgd", tiny.plan_for(tiny.model("bert"), proxy="full"), 1)


def test_every_choice_has_a_line_of_documentation() -> None:
    for folder in ("alignment", "saliency", "selection"):
        assert len(registry.names(folder)) >= 4
        text = registry.describe(folder)
        for name in registry.names(folder):
            assert f"`{name}` (" in text
            assert registry.load(folder, name).__doc__
        with pytest.raises(KeyError):
            registry.load(folder, "nothing-of-the-kind")
    assert closed_form.Fit
