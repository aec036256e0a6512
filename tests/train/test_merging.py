"""Merging figures of a real model against slow oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch
from torch.nn import functional as F

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.model.batch import inputs_of
from fedpft_core.task.classify import logits
from fedpft_core.train import merging


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_fisher_is_the_mean_of_the_rows_squared_gradients(family: str) -> None:
    """For the head's bias the gradient is known: softmax less the label's one."""
    _, proxy, plan, _ = tiny.pair(family)
    adapters.load(proxy, tiny.random_adapter(proxy, plan), plan)
    rows = tiny.encoded(family, 9)
    found = merging.fisher(proxy, plan, tiny.TASK, rows, "both", 0)
    live = adapters.parameters(proxy, plan)
    assert found.keys() == live.keys()
    assert all(found[k].shape == p.shape and found[k].min() >= 0 for k, p in live.items())
    assert any(bool(found[k].any()) for k in live if "lora_A" in k)
    assert all(p.grad is None for p in live.values())
    squares = []
    with torch.no_grad():
        for batch in batches(rows, 1, None):
            p = F.softmax(logits(proxy, batch), dim=-1)[0]
            squares.append((p - F.one_hot(batch["labels"][0], len(p))).square())
    biases = [k for k in found if k.endswith("bias") and found[k].shape == squares[0].shape]
    for name in biases:
        assert torch.allclose(found[name], torch.stack(squares).mean(0), atol=1e-6)
    assert biases or family == "llama"
    # By differences, at one value of a factor.
    name = next(k for k in found if k.endswith("lora_B.weight"))
    value, total = live[name], 0.0
    with torch.no_grad():
        for batch in batches(rows, 1, None):
            ends = []
            for step in (1e-2, -1e-2):
                value[0, 0] += step
                ends.append(float(tiny.TASK.loss(proxy, batch)))
                value[0, 0] -= step
            total += ((ends[0] - ends[1]) / 2e-2) ** 2 / len(rows)
    assert float(found[name][0, 0]) == pytest.approx(total, rel=0.05, abs=1e-7)


def test_fisher_of_many_rows_is_of_some_of_them_and_of_what_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, proxy, plan, _ = tiny.pair("bert")
    adapters.load(proxy, tiny.random_adapter(proxy, plan), plan)
    rows = tiny.encoded("bert", 9)
    monkeypatch.setattr(merging, "MOST_ROWS", 4)
    one = merging.fisher(proxy, plan, tiny.TASK, rows, "b", 0)
    assert not any("lora_A" in k for k in one) and any("lora_B" in k for k in one)
    again = merging.fisher(proxy, plan, tiny.TASK, rows, "b", 0)
    assert tiny.same_bits(one, again)
    assert not tiny.same_bits(one, merging.fisher(proxy, plan, tiny.TASK, rows, "b", 1))
    halves = [merging.fisher(proxy, plan, tiny.TASK, rows.select(np.array(part)), "b", 0)
              for part in ([0, 1], [2, 3])]  # fmt: skip
    whole = merging.fisher(proxy, plan, tiny.TASK, rows.select(np.arange(4)), "b", 0)
    for k, t in whole.items():  # sums over rows add up
        assert torch.allclose(t, (halves[0][k] + halves[1][k]) / 2, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "opt"])
def test_gram_is_of_what_b_reads_at_real_positions(family: str) -> None:
    """Row by row, without padding, from the layers' inputs themselves."""
    _, proxy, plan, _ = tiny.pair(family)
    adapters.load(proxy, tiny.random_adapter(proxy, plan), plan)
    rows = tiny.encoded(family, 11)
    found = merging.gram(proxy, plan, rows, 4)
    live = adapters.parameters(proxy, plan)
    assert found.keys() == {k for k in live if k.endswith("lora_B.weight")}
    seen: dict[str, list[torch.Tensor]] = {}
    paths = {id(p): k for k, p in live.items()}

    def see(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        key = paths[id(layer.lora_A["default"].weight)]
        seen.setdefault(key, []).append(args[0].detach())

    layers = [m for m in proxy.modules() if hasattr(m, "lora_A")]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    with torch.no_grad():
        for batch in oracles.rows_alone(rows):
            proxy(**inputs_of(batch))
    for hook in hooks:
        hook.remove()
    for key, inputs in seen.items():
        x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs]).double()
        z = x @ live[key].detach().double().T
        want = z.T @ z / len(z)
        got = found[key.replace("lora_A", "lora_B")].double()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * want.diagonal().sum().item())
