"""Fisher-weighted averaging and RegMean against slow oracles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedpft_core.aggregation import Replies, RuleSettings, aggregate, merging, regmean
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors
from fedpft_core.wire.merging import shapes

A, B, HEAD = "body.q.lora_A.weight", "body.q.lora_B.weight", "head.weight"
RANK, D_IN, D_OUT = 3, 9, 7


def adapter(seed: int) -> Tensors:
    stream = torch_stream(seed, "merging-rules")
    sizes = {A: (RANK, D_IN), B: (D_OUT, RANK), HEAD: (2, 4)}
    return {k: torch.randn(shape, generator=stream) for k, shape in sizes.items()}


def merged(
    rule: str, replies: dict[str, tuple[int, Tensors, Tensors]], folder: Path, start: Tensors,
    **keys: object,
) -> Tensors:  # fmt: skip
    trained = start if rule == "fisher" else {k: t for k, t in start.items() if k != A}
    beside = shapes(merging(rule), trained)
    with Replies(start, folder, RuleSettings(**keys), beside) as kept:  # type: ignore[arg-type]
        for name, (examples, tensors, figures) in replies.items():
            kept.add(name, examples, tensors, beside=figures)
        return aggregate(rule, kept)


def with_fisher(count: int) -> dict[str, tuple[int, Tensors, Tensors]]:
    out = {}
    for i in range(count):
        figures = {k: t.square() for k, t in adapter(100 + i).items()}
        out[f"{i:02d}"] = (1 + 3 * i, adapter(i + 1), figures)
    return out


def test_what_rules_ask_for() -> None:
    assert [merging(r) for r in ("fisher", "regmean", "average", "none")] == [
        "fisher", "gram", "", "",
    ]  # fmt: skip
    assert shapes("gram", adapter(0)) == {B: (RANK, RANK)}
    assert shapes("", adapter(0)) == {}


def test_fisher_is_the_slow_one(tmp_path: Path) -> None:
    """One value after the other: each client's figures over their own mean, times its rows."""
    replies = with_fisher(4)
    found = merged("fisher", replies, tmp_path, adapter(0))
    means = {
        name: np.mean(np.concatenate([f.double().numpy().ravel() for f in figures.values()]))
        for name, (_, _, figures) in replies.items()
    }
    for key, value in found.items():
        for at in np.ndindex(*value.shape):
            says = {
                n: e * (float(f[key][at]) / means[n] + 1e-6) for n, (e, _, f) in replies.items()
            }
            want = sum(says[n] * float(t[key][at]) for n, (_, t, _) in replies.items())
            assert float(value[at]) == pytest.approx(want / sum(says.values()), abs=1e-5)


def test_a_clients_figures_decide_nothing_by_their_size(tmp_path: Path) -> None:
    replies = with_fisher(3)
    found = merged("fisher", replies, tmp_path, adapter(0))
    loud = dict(replies)
    examples, tensors, figures = loud["01"]
    loud["01"] = examples, tensors, {k: 1e6 * t for k, t in figures.items()}
    again = merged("fisher", loud, tmp_path, adapter(0))
    assert all(torch.allclose(found[k], again[k], atol=1e-4) for k in found)


@pytest.mark.parametrize("figure", [0.0, 2.5])
def test_equal_figures_are_the_average(tmp_path: Path, figure: float) -> None:
    replies = {
        n: (e, t, {k: torch.full_like(v, figure) for k, v in t.items()})
        for n, (e, t, _) in with_fisher(4).items()
    }
    found = merged("fisher", replies, tmp_path, adapter(0))
    bare = {n: (e, t, {}) for n, (e, t, _) in replies.items()}
    mean = merged("average", bare, tmp_path, adapter(0))
    assert all(torch.allclose(found[k], mean[k], atol=1e-6) for k in mean)


def with_grams(count: int) -> tuple[dict[str, tuple[int, Tensors, Tensors]], list[torch.Tensor]]:
    start, out, inputs = adapter(0), {}, []
    for i in range(count):
        stream = torch_stream(i, "inputs")
        x = torch.randn(40, D_IN, generator=stream, dtype=torch.float64)
        x = x * torch.rand(D_IN, generator=stream, dtype=torch.float64)  # each client its own kind
        z = x @ start[A].double().T
        z = z / (z.square().sum() / len(z)).sqrt()  # trace 1
        inputs.append(z)
        tensors = adapter(i + 1) | {A: start[A]}
        out[f"{i:02d}"] = (1 + 3 * i, tensors, {B: (z.T @ z / len(z)).float()})
    return out, inputs


def test_regmean_is_least_squares_on_all_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regmean, "_KEPT", 1.0)
    monkeypatch.setattr(regmean, "_RIDGE", 0.0)
    replies, inputs = with_grams(3)
    found = merged("regmean", replies, tmp_path, adapter(0))
    roots = [np.sqrt(e) for e, _, _ in replies.values()]
    z = np.concatenate([w * z.numpy() for w, z in zip(roots, inputs, strict=True)])
    y = np.concatenate([
        w * (z.numpy() @ t[B].double().numpy().T)
        for w, z, (_, t, _) in zip(roots, inputs, replies.values(), strict=True)
    ])  # fmt: skip
    want = np.linalg.lstsq(z, y, rcond=None)[0].T
    assert np.allclose(found[B].numpy(), want, atol=1e-4)
    bare = {n: (e, t, {}) for n, (e, t, _) in replies.items()}
    mean = merged("average", bare, tmp_path, adapter(0))
    assert torch.equal(found[HEAD], mean[HEAD]) and torch.equal(found[A], adapter(0)[A])
    assert not np.allclose(mean[B].numpy(), want, atol=1e-2)


@pytest.mark.parametrize("gram", [torch.zeros(RANK, RANK), 5 * torch.eye(RANK)])
def test_regmean_of_equal_inputs_is_the_average(tmp_path: Path, gram: torch.Tensor) -> None:
    replies = {n: (e, t, {B: gram}) for n, (e, t, _) in with_grams(3)[0].items()}
    found = merged("regmean", replies, tmp_path, adapter(0))
    bare = {n: (e, t, {}) for n, (e, t, _) in replies.items()}
    mean = merged("average", bare, tmp_path, adapter(0))
    assert torch.allclose(found[B], mean[B], atol=1e-5)


def test_figures_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the round"):
        merged("fisher", {"a": (1, adapter(1), {})}, tmp_path, adapter(0))
    with pytest.raises(ValueError, match="does not fit the round"):
        merged("average", {"a": (1, adapter(1), adapter(1))}, tmp_path, adapter(0))
