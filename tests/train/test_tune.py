"""Local fine-tuning, evaluation, inactivity counts and adapter gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch
from torch.nn import functional as F

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.seeds import derive
from fedpft_core.task.classify import logits
from fedpft_core.train import baselines
from fedpft_core.train.evaluate import evaluate
from fedpft_core.train.gradient import adapter_gradient
from fedpft_core.train.inactivity import count_inactive, count_over, is_inactive
from fedpft_core.train.tune import (
    LocalSettings,
    fine_tune,
    local_batches,
    steps_of,
    training_mode,
)

families = pytest.mark.parametrize("family", tiny.FAMILIES)
builds = pytest.mark.parametrize("family", tiny.BUILDS)
SETTINGS = LocalSettings(
    lr=5e-3, batch_size=8, epochs=1, steps=0, weight_decay=0.1, clip=1.0, threads=1
)


# --- inactivity ---------------------------------------------------------------------------


@families
@pytest.mark.parametrize("rule", ["nonpositive", "exact-zero"])
def test_counts_equal_the_oracle_with_padding(family: str, rule: str) -> None:
    _, small, plan, _ = tiny.pair(family)
    _reach_exact_zero(small, plan)
    # In float32 whether GELU underflows to 0 can hang on rounding, which padding changes.
    small.double()
    data = _double(tiny.encoded(family, 23))
    if family in tiny.TEXT_FAMILIES:
        assert len(set(data.lengths.tolist())) > 3, "rows should be of uneven length"
    found = count_inactive(small, plan, data, 7, rule)
    inactive, tokens = oracles.inactive_counts(small, plan, data, rule)
    assert {b: c.tolist() for b, c in found.inactive.items()} == inactive
    assert found.tokens == tokens
    assert all(c.dtype == torch.int64 for c in found.inactive.values())
    assert any(0 < n < tokens[b] for b in inactive for n in inactive[b])


@pytest.mark.parametrize("family", tiny.CAUSAL_FAMILIES)
@pytest.mark.parametrize("rule", ["nonpositive", "exact-zero"])
def test_counts_equal_the_oracle_with_padding_on_the_left(family: str, rule: str) -> None:
    _, small, plan, _ = tiny.pair(family)
    _reach_exact_zero(small, plan)
    small.double()
    data = tiny.encoded(family, 11)
    served = [tiny.padded_left(batch) for batch in batches(data, 4, None)]
    assert any(not batch["attention_mask"][:, 0].all() for batch in served)
    found = count_over(small, plan, served, rule)
    inactive, tokens = oracles.inactive_counts(small, plan, data, rule)
    assert {b: c.tolist() for b, c in found.inactive.items()} == inactive
    assert found.tokens == tokens


def _double(data: Encoded) -> Encoded:
    """The rows for a float64 model."""
    if data.pixels is None:
        return data
    pixels = torch.cat([b["pixel_values"] for b in oracles.rows_alone(data)])
    return replace(data, pixels=pixels.double(), scale=None, shift=None)


def _reach_exact_zero(model: torch.nn.Module, plan: Plan) -> None:
    """Some neurons far below -8.3, where GELU is exactly 0, or -745, where SiLU is, in float64."""
    with torch.no_grad():
        for ffn in pruned_ffns(model, plan).values():
            ffn.ins[0].weight[:3].mul_(40.0 if len(ffn.ins) == 1 else 4000.0)


@families
def test_counts_do_not_depend_on_the_batch_size(family: str) -> None:
    _, small, plan, _ = tiny.pair(family)
    data = tiny.encoded(family, 23)
    one, many = (count_inactive(small, plan, data, size, "nonpositive") for size in (1, 23))
    assert one.tokens == many.tokens
    assert all(torch.equal(one.inactive[b], many.inactive[b]) for b in plan.pruned)


def test_token_totals_are_the_real_tokens() -> None:
    _, small, plan, _ = tiny.pair("bert")
    data = tiny.encoded("bert", 23)
    found = count_inactive(small, plan, data, 23, "nonpositive")
    assert found.tokens == dict.fromkeys(plan.pruned, int(data.lengths.sum()))
    _, small, plan, _ = tiny.pair("vit")
    found = count_inactive(small, plan, tiny.encoded("vit", 5), 5, "nonpositive")
    assert found.tokens == dict.fromkeys(plan.pruned, 5 * 17)


def test_rules() -> None:
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-30])
    assert is_inactive(values, "nonpositive").tolist() == [True, True, True, False]
    assert is_inactive(values, "exact-zero").tolist() == [False, True, True, False]


def test_counting_leaves_no_hook_and_a_whole_proxy_nothing_to_count() -> None:
    fm, small, plan, _ = tiny.pair("bert")
    data = tiny.encoded("bert", 5)
    count_inactive(small, plan, data, 5, "nonpositive")
    assert not any(m._forward_hooks for m in small.modules())
    full = tiny.plan_for(tiny.model("bert"), proxy="full")
    assert count_inactive(fm, full, data, 5, "nonpositive").inactive == {}


# --- fine-tuning --------------------------------------------------------------------------


@builds
def test_frozen_parameters_get_no_gradient_and_no_optimizer_state(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    with_gradient: list[set[int]] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            with_gradient.append({id(p) for p in small.parameters() if p.grad is not None})
            return super().step(*args, **kwargs)

    _, small, plan, _ = tiny.pair(family, dropout=0.1)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    before = tiny.weights(small)
    fine_tune(small, tiny.TASK, tiny.encoded(family, 24), SETTINGS, seed=1)
    live = adapters.parameters(small, plan)
    adapter = {id(p) for p in live.values()}
    (optimizer,) = made
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == adapter
    assert {id(p) for p in optimizer.state} == adapter
    assert with_gradient == [adapter] * 3
    assert all(p.grad is None for p in small.parameters())
    named = {id(p): n for n, p in small.named_parameters()}
    moved = {named[i] for i in adapter}
    for name, value in tiny.weights(small).items():
        assert torch.equal(value, before[name]) == (name not in moved), name
    assert not small.training


@builds
def test_fine_tuning_is_a_function_of_the_seed(family: str) -> None:
    """Not of the global random state, nor of what this process trained before."""
    data = tiny.encoded(family, 24)

    def once(seed: int, before: int) -> dict[str, torch.Tensor]:
        _, small, plan, _ = tiny.pair(family, dropout=0.3)
        start = adapters.read(small, plan)
        torch.manual_seed(before)
        np.random.seed(before)
        for other in range(before):
            fine_tune(small, tiny.TASK, tiny.encoded(family, 9, seed=7), SETTINGS, seed=other)
        adapters.load(small, start, plan)
        state = torch.get_rng_state()
        fine_tune(small, tiny.TASK, data, SETTINGS, seed)
        assert torch.equal(torch.get_rng_state(), state), "the global stream moved"
        return adapters.read(small, plan)

    first = once(seed=1, before=0)
    assert tiny.same_bits(once(seed=1, before=2), first)
    assert not tiny.same_bits(once(seed=2, before=0), first)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    seen: list[bool] = []

    def spy(module: torch.nn.Module, *_: Any) -> None:
        seen.append(module.training)

    _, small, _, _ = tiny.pair("bert", dropout=0.3)
    drops = [m for n, m in small.named_modules() if n.endswith("lora_dropout.default")]
    assert len(drops) == 16
    for module in drops:
        module.register_forward_hook(spy)
    data = tiny.encoded("bert", 8)
    fine_tune(small, tiny.TASK, data, SETTINGS, seed=1)
    assert seen and all(seen)
    seen.clear()
    evaluate(small, tiny.TASK, data, 8)
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("epochs", "steps", "want"), [(1, 0, 3), (2, 0, 6), (1, 2, 2), (1, 7, 7), (5, 1, 1)]
)
def test_steps_or_epochs(epochs: int, steps: int, want: int) -> None:
    data = tiny.encoded("bert", 20)
    settings = replace(SETTINGS, epochs=epochs, steps=steps)
    served = list(local_batches(data, settings, seed=3))
    assert len(served) == want
    rows = [int(i) for batch in served[:3] for i in batch["index"]]
    if want >= 3:
        assert sorted(rows) == list(range(20))
    _, small, _, _ = tiny.pair("bert")
    assert fine_tune(small, tiny.TASK, data, settings, seed=3).steps == want


def test_steps_on_no_rows_are_refused_and_epochs_of_none_are_none() -> None:
    _, small, _, _ = tiny.pair("bert")
    none = tiny.encoded("bert", 3).select(np.empty(0, np.int64))
    with pytest.raises(ValueError, match="7 steps cannot be made on no rows"):
        next(local_batches(none, replace(SETTINGS, steps=7), seed=3))
    with pytest.raises(ValueError, match="7 steps cannot be made on no rows"):
        fine_tune(small, tiny.TASK, none, replace(SETTINGS, steps=7), seed=3)
    done = fine_tune(small, tiny.TASK, none, replace(SETTINGS, steps=0, epochs=2), seed=3)
    assert (done.steps, done.rows) == (0, 0) and math.isnan(done.loss)


def test_epochs_differ_in_their_order() -> None:
    served = list(local_batches(tiny.encoded("bert", 20), replace(SETTINGS, epochs=2), seed=3))
    halves = served[:3], served[3:]
    order = [[int(i) for batch in half for i in batch["index"]] for half in halves]
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] != order[1]


def test_the_loss_reported_is_the_mean_over_rows() -> None:
    """At a rate too small to matter it is the loss before training."""
    _, small, _, _ = tiny.pair("bert")
    data = tiny.encoded("bert", 20)
    want = evaluate(small, tiny.TASK, data, 20).loss
    # The tiny model's own dropout would blur the comparison.
    for module in small.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    result = fine_tune(
        small, tiny.TASK, data, replace(SETTINGS, lr=1e-12, weight_decay=0.0), seed=1
    )
    assert result.loss == pytest.approx(want, rel=1e-3)
    assert (result.rows, result.steps) == (20, 3)


@builds
def test_training_lowers_the_loss(family: str) -> None:
    _, small, _, _ = tiny.pair(family)
    data = tiny.encoded(family, 48)
    before = evaluate(small, tiny.TASK, data, 16).loss
    fine_tune(small, tiny.TASK, data, replace(SETTINGS, epochs=30), seed=1)
    assert evaluate(small, tiny.TASK, data, 16).loss < 0.9 * before


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    _, small, plan, _ = tiny.pair("bert")
    live = list(adapters.parameters(small, plan).values())

    class Spy(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in live)))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    for clip in (0.01, 0.0):
        fine_tune(small, tiny.TASK, tiny.encoded("bert", 16), replace(SETTINGS, clip=clip), seed=1)
    assert norms[:2] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(norms[2:]) > 0.01


# --- evaluation ---------------------------------------------------------------------------


@builds
def test_evaluation_equals_scoring_row_by_row(family: str) -> None:
    fm, _, _, _ = tiny.pair(family)
    data = tiny.encoded(family, 23)
    seen: list[int] = []
    score = evaluate(fm, tiny.TASK, data, 7, seen.append)
    right, loss = 0, 0.0
    with torch.no_grad():
        for row in oracles.rows_alone(data):
            scores = logits(fm, row)[0]
            right += int(scores.argmax()) == int(row["labels"])
            loss -= float(scores.log_softmax(-1)[int(row["labels"])])
    assert score.value == right / 23
    assert score.loss == pytest.approx(loss / 23, rel=1e-5)
    assert score.rows == 23
    assert seen == [7, 14, 21, 23]


# --- gradients ----------------------------------------------------------------------------


@builds
def test_adapter_gradient_equals_a_plain_backward(family: str) -> None:
    fm, small, plan, _ = tiny.pair(family)
    data = tiny.encoded(family, 23)
    for model, of in ((fm, None), (small, plan)):
        model.double()
        rows = [tiny.double(b) for b in batches(data, 7, None)]
        found = adapter_gradient(model, tiny.TASK, rows, of)
        (whole,) = batches(data, 23, None)
        loss = F.cross_entropy(logits(model, tiny.double(whole)), whole["labels"])
        loss.backward()
        for name, p in adapters.parameters(model, of).items():
            assert p.grad is not None
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)
        assert any(g.any() for n, g in found.items() if "lora_A" in n)


def test_adapter_gradient_leaves_no_gradient_and_no_dropout() -> None:
    _, small, plan, _ = tiny.pair("bert", dropout=0.5)
    rows = list(batches(tiny.encoded("bert", 8), 8, None))
    small.train()
    first, second = (adapter_gradient(small, tiny.TASK, rows, plan) for _ in range(2))
    assert tiny.same_bits(first, second)
    assert all(p.grad is None for p in small.parameters())


# --- reference points ---------------------------------------------------------------------


@builds
def test_features_are_means_over_real_positions(family: str) -> None:
    fm, _, _, _ = tiny.pair(family)
    data = tiny.encoded(family, 11)
    found = baselines.features(fm, data, 4, tiny.task_of(family))
    with torch.no_grad():
        for i, row in enumerate(oracles.rows_alone(data)):
            hidden = oracles.block_outputs(fm, row)[-1][0]
            want = torch.stack(list(hidden)).mean(0).numpy()
            np.testing.assert_allclose(found[i], want, rtol=1e-4, atol=1e-5)


# --- what is trained, and at which rate -----------------------------------------------------


@pytest.mark.parametrize("factors", ["a", "b"])
def test_only_the_factors_asked_for_move(factors: str) -> None:
    _, small, plan, _ = tiny.pair("bert")
    before = adapters.read(small, plan)
    settings = replace(SETTINGS, steps=2, factors=factors)
    fine_tune(small, tiny.TASK, tiny.encoded("bert", 23), settings, 0)
    after = adapters.read(small, plan)  # all of them are parameters again
    assert after.keys() == before.keys()
    moved = {k for k, t in after.items() if not torch.equal(t, before[k])}
    other = {"a": "lora_B", "b": "lora_A"}[factors]
    assert moved == {k for k in before if other not in k}


def test_a_falling_rate_is_that_of_rounds_of_one_step() -> None:
    """AdamW by hand, with the rate of round t of T in step t."""
    _, small, plan, _ = tiny.pair("bert")
    data, n = tiny.encoded("bert", 40), 5
    settings = replace(SETTINGS, steps=n, decay="linear")
    assert steps_of(len(data), settings) == n
    start = adapters.read(small, plan)
    fine_tune(small, tiny.TASK, data, settings, 3)
    found = adapters.read(small, plan)
    adapters.load(small, start, plan)
    parameters = [p for p in small.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.1)
    with torch.random.fork_rng(), training_mode(small):
        torch.manual_seed(derive(3, "dropout"))
        for i, batch in enumerate(local_batches(data, settings, 3)):
            optimiser.zero_grad()
            tiny.TASK.loss(small, batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.param_groups[0]["lr"] = settings.lr * (n - i) / n
            optimiser.step()
    want = adapters.read(small, plan)
    assert all(torch.allclose(found[k], want[k], rtol=1e-4, atol=1e-6) for k in want)
    adapters.load(small, start, plan)
    fine_tune(small, tiny.TASK, data, replace(settings, decay="none"), 3)
    other = adapters.read(small, plan)
    assert any(not torch.allclose(other[k], want[k], rtol=1e-3, atol=1e-5) for k in want)


@pytest.mark.parametrize(("head", "b"), [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0)])
def test_each_part_has_a_rate_of_its_own(head: float, b: float) -> None:
    """AdamW's first step is as long as its rate, wherever a gradient is far above its epsilon."""
    model, _, _, _ = tiny.pair("bert")
    before = adapters.read(model)
    one = replace(SETTINGS, steps=1, weight_decay=0.0, clip=0.0, head_lr_scale=head, b_lr_scale=b)
    fine_tune(model, tiny.TASK, tiny.encoded("bert", 8), one, 0)
    moved = {k: (t - before[k]).abs().max().item() for k, t in adapters.read(model).items()}
    for name, longest in moved.items():
        scale = 1.0 if "lora_A" in name else b if "lora_B" in name else head
        assert longest == pytest.approx(scale * one.lr, rel=1e-2), name


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "modernbert", "gpt2"])
def test_checkpointing_gives_the_same_adapter_to_the_bit_and_keeps_less(family: str) -> None:
    from dataclasses import replace as changed

    import torch

    found, kept = [], []
    for on in (False, True):
        _, proxy, plan, _ = tiny.pair(family, dropout=0.3)
        sizes: dict[int, int] = {}

        def note(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        settings = changed(SETTINGS, epochs=1, steps=2, checkpointing=on)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            fine_tune(proxy, tiny.task_of(family), tiny.encoded(family, 12), settings, 3)
        kept.append(sum(sizes.values()))
        found.append(adapters.read(proxy, plan))
        assert not proxy.training
    a, b = found
    assert all(a[name].equal(b[name]) for name in a)
    assert kept[1] < kept[0]
