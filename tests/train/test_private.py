"""DP-SGD: gradients by row against single-row batches, clipping, noise, and that weights move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from fedpft_core.data.batches import batches
from fedpft_core.privacy.gradients import RowGradients, clipped_sum
from fedpft_core.train.private import fine_tune_private, spend_of
from fedpft_core.train.tune import LocalSettings, optimiser_for, steps_of

SETTINGS = LocalSettings(
    lr=5e-3, batch_size=4, epochs=1, steps=3, weight_decay=0.0, clip=1.0, threads=1
)


def started(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny proxy with an adapter that has no zeros, and one batch of rows of uneven length."""
    _, small, _, _ = tiny.pair(family)
    torch.manual_seed(0)
    for p in small.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    return small.eval(), next(batches(tiny.encoded(family, 6), 6, None))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "vit"])
def test_gradients_by_row_are_those_of_single_row_batches(family: str) -> None:
    model, batch = started(family)
    with RowGradients(model) as gradients:
        gradients.begin(6)
        tiny.TASK.loss(model, batch, reduction="sum").backward()
        found = gradients.taken()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and any("lora_A" in n for n in found)
    for row in range(6):
        model.zero_grad(set_to_none=True)
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        tiny.TASK.loss(model, alone, reduction="sum").backward()
        for name, p in trained.items():
            assert p.grad is not None
            scale = float(p.grad.abs().max()) or 1.0
            assert float((found[name][row] - p.grad).abs().max()) < 1e-4 * scale, name
    assert not any(m._forward_hooks for m in model.modules())


def test_each_row_is_clipped_over_all_parameters_together() -> None:
    made = torch.Generator().manual_seed(0)
    g = {"a": torch.randn(5, 3, 2, generator=made), "b": torch.randn(5, 4, generator=made)}
    g["a"][4] *= 1e-3
    g["b"][4] *= 1e-3
    flat = torch.cat([g["a"].reshape(5, -1), g["b"]], 1)
    want = sum(row * min(1.0, 0.7 / float(row.norm())) for row in flat)
    got = clipped_sum(g, 0.7)
    assert torch.allclose(torch.cat([got["a"].reshape(-1), got["b"]]), want, atol=1e-6)
    g["a"][0, 0, 0] = float("nan")
    without = {k: v[1:] for k, v in g.items()}
    for k, v in clipped_sum(without, 0.7).items():
        assert torch.allclose(clipped_sum(g, 0.7)[k], v, atol=1e-6)


def test_without_noise_a_step_on_all_rows_is_the_clipped_mean() -> None:
    """Against one step of the same optimiser on gradients that single rows gave."""
    settings = replace(SETTINGS, batch_size=6, steps=1)
    model, _ = started("bert")
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    rows = tiny.encoded("bert", 6)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    fine_tune_private(model, tiny.TASK, rows, settings, 0, 0.0, 0.05)
    got = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in before:
                p.copy_(before[n])
    total = {n: torch.zeros_like(t) for n, t in before.items()}
    for i in range(6):
        model.zero_grad(set_to_none=True)
        one = next(batches(rows.select(np.array([i])), 1, None))
        tiny.TASK.loss(model, one, reduction="sum").backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n in before}
        norm = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        for n, g in grads.items():
            total[n] += g * min(1.0, 0.05 / norm)
    for n, p in model.named_parameters():
        if n in before:
            p.grad = total[n] / 6
    optimiser_for(model, settings).step()
    for n, p in model.named_parameters():
        if n in before:
            # AdamW's first step is the gradient's sign times the rate, but where it is near zero.
            near = (total[n].abs() > 1e-7).float()
            assert float(((got[n] - p.detach()).abs() * near).max()) < 1e-4, n


def test_noise_is_there_and_not_of_the_seed() -> None:
    rows = tiny.encoded("bert", 12)
    ends = []
    for _ in range(2):
        model, _ = started("bert")
        done = fine_tune_private(model, tiny.TASK, rows, SETTINGS, 0, 1.0, 0.5)
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
        assert done.steps == 3 and done.loss == 0.0
    moved = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(not torch.equal(ends[0][n], ends[1][n]) for n in moved)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in frozen)


def test_the_gradient_has_the_noise_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an optimiser that only notes what it is given."""
    seen: list[torch.Tensor] = []
    model, _ = started("bert")

    class Notes:
        def zero_grad(self, set_to_none: bool) -> None:
            model.zero_grad(set_to_none=set_to_none)

        def step(self) -> None:
            seen.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()
                                   if p.grad is not None]))  # fmt: skip
            for p in model.parameters():
                if p.grad is not None:
                    p.data += 1

    monkeypatch.setattr("fedpft_core.train.private.optimiser_for", lambda *_: Notes())
    fine_tune_private(model, tiny.TASK, tiny.encoded("bert", 12), SETTINGS, 0, 5.0, 0.1)
    assert len(seen) == 3
    assert float(torch.stack(seen).std()) == pytest.approx(5.0 * 0.1 / 4, rel=0.1)


def test_a_layer_that_is_not_linear_and_one_that_is_not_reached_are_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            self.norm = torch.nn.LayerNorm(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.used(x))

    model = Odd()
    with pytest.raises(ValueError, match="norm is trained and is no linear layer"):
        RowGradients(model)
    model.norm.requires_grad_(False)
    with RowGradients(model) as gradients:
        gradients.begin(3)
        model(torch.ones(3, 2)).square().sum().backward()
        with pytest.raises(ValueError, match=r"idle\.bias has no gradient by row"):
            gradients.taken()


def test_what_did_not_move_is_found_out() -> None:
    """DP-LoRA runs that silently train nothing are a known fault elsewhere."""
    model, _ = started("bert")
    frozen = replace(SETTINGS, head_lr_scale=0.0)
    with pytest.raises(ValueError, match="was not trained"):
        fine_tune_private(model, tiny.TASK, tiny.encoded("bert", 12), frozen, 0, 1.0, 0.5)


def test_steps_and_spends_follow_the_settings() -> None:
    assert steps_of(100, SETTINGS) == 3 and steps_of(9, replace(SETTINGS, steps=0)) == 3
    assert spend_of(SETTINGS, 16, 2.0).rate == 0.25 and spend_of(SETTINGS, 2, 2.0).rate == 1.0
