"""Rules that know LoRA's factors, and those that merge changes, against dense and slow oracles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core import registry
from fedpft_core.aggregation import Replies, RuleSettings, aggregate, factors, grows
from fedpft_core.aggregation._product import orthonormal, pairs, stack, truncate
from fedpft_core.model.names import is_trained
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors

A, B = "body.q.lora_A.weight", "body.q.lora_B.weight"
RANK = 2


def adapter(seed: int, d_in: int = 9, d_out: int = 7, rank: int = RANK) -> Tensors:
    stream = torch_stream(seed, "lora-rules")
    shapes = {A: (rank, d_in), B: (d_out, rank), "head.weight": (3, 4), "head.bias": (3,)}
    return {k: torch.randn(shape, generator=stream) for k, shape in shapes.items()}


def merged(
    rule: str, replies: dict[str, tuple[int, Tensors]], folder: Path, start: Tensors | None = None,
    **keys: object,
) -> tuple[Tensors, dict[str, float]]:  # fmt: skip
    with Replies(start or adapter(0), folder, RuleSettings(**keys)) as kept:  # type: ignore[arg-type]
        for name, (examples, tensors) in replies.items():
            kept.add(name, examples, tensors)
        return aggregate(rule, kept), kept.figures


def some(count: int, **keys: int) -> dict[str, tuple[int, Tensors]]:
    return {f"{i:02d}": (1 + 3 * i, adapter(i + 1, **keys)) for i in range(count)}


def mean_product(replies: dict[str, tuple[int, Tensors]]) -> np.ndarray:
    total = sum(n for n, _ in replies.values())
    return np.sum(
        [n / total * t[B].double().numpy() @ t[A].double().numpy() for n, t in replies.values()],
        axis=0,
    )


def product(tensors: Tensors) -> np.ndarray:
    return tensors[B].double().numpy() @ tensors[A].double().numpy()


# --- the algebra --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2,), (1, 3), (2, 2, 2), (4, 4, 4), (3, 1, 5, 2)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_dense_svds(ranks: tuple[int, ...], rank: int) -> None:
    """Clients of any ranks; thin and thick stacks."""
    stream = torch_stream(sum(ranks), "truncate")
    parts = [
        (0.1 + i, torch.randn(11, r, generator=stream), torch.randn(r, 8, generator=stream))
        for i, r in enumerate(ranks)
    ]
    dense = sum(w * b.double().numpy() @ a.double().numpy() for w, b, a in parts)
    b, a = stack(parts)
    assert np.allclose((b @ a).numpy(), dense, atol=1e-12)
    b, a, (lost, total) = truncate(b, a, rank)
    assert b.shape == (11, rank) and a.shape == (rank, 8)
    u, s, vh = np.linalg.svd(dense)
    want = u[:, :rank] * s[:rank] @ vh[:rank]
    assert np.allclose((b @ a).numpy(), want, atol=1e-10)
    assert np.isclose(lost, (s[rank:] ** 2).sum(), atol=1e-9) and np.isclose(total, (s**2).sum())
    assert np.allclose(b.norm(dim=0), a.norm(dim=1))  # shared out evenly


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 7), st.integers(0, 3))
def test_a_new_basis_leaves_the_product(seed: int, d_out: int, rank: int, zeros: int) -> None:
    stream = torch_stream(seed, "basis")
    b = torch.randn(d_out, rank, generator=stream, dtype=torch.float64)
    a = torch.randn(rank, 8, generator=stream, dtype=torch.float64)
    b[:, :zeros] = 0.0
    new_b, new_a = orthonormal(b, a)
    assert new_b.shape == b.shape and new_a.shape == a.shape
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-10)
    assert torch.allclose(new_a @ new_a.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)


def test_pairs_are_found_by_name() -> None:
    assert pairs(adapter(0)) == [(A, B)]
    assert pairs({"head.weight"}) == []


# --- the rules ----------------------------------------------------------------------------


def test_the_mean_of_factors_is_not_the_mean_of_products(tmp_path: Path) -> None:
    replies = some(4)
    averaged, _ = merged("average", replies, tmp_path)
    exact = mean_product(replies)
    assert np.linalg.norm(product(averaged) - exact) > 0.3 * np.linalg.norm(exact)


def test_stacking_is_the_exact_product(tmp_path: Path) -> None:
    replies = some(4)
    found, _ = merged("stacked", replies, tmp_path)
    assert found[A].shape == (4 * RANK, 9) and found[B].shape == (7, 4 * RANK)
    assert np.allclose(product(found), mean_product(replies), atol=1e-6)
    averaged, _ = merged("average", replies, tmp_path)
    assert torch.equal(found["head.weight"], averaged["head.weight"])
    assert grows("stacked") and not any(grows(r) for r in ("average", "product", "none"))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_product_is_the_nearest_of_its_rank(tmp_path: Path, count: int) -> None:
    replies = some(count)
    found, figures = merged("product", replies, tmp_path)
    u, s, vh = np.linalg.svd(mean_product(replies))
    assert found[A].shape == (RANK, 9)
    assert np.allclose(product(found), u[:, :RANK] * s[:RANK] @ vh[:RANK], atol=1e-5)
    assert np.isclose(figures["discarded"], (s[RANK:] ** 2).sum() / (s**2).sum(), atol=1e-12)
    assert (figures["discarded"] < 1e-12) == (count == 1)


def test_nothing_learned_is_nothing_lost(tmp_path: Path) -> None:
    zero = {k: torch.zeros_like(t) if k == B else t for k, t in adapter(1).items()}
    found, figures = merged("product", {"a": (1, zero), "b": (2, zero)}, tmp_path)
    assert figures == {"discarded": 0.0} and not product(found).any()


@pytest.mark.parametrize("rule", ["frozen-a", "orthonormal-a", "alternating"])
def test_with_one_factor_for_all_the_mean_is_exact(tmp_path: Path, rule: str) -> None:
    for round in (1, 2, 3):
        trained = factors(rule, round)
        assert trained == ("a" if (rule, round) == ("alternating", 2) else "b")
        start = adapter(0)
        replies = {
            name: (n, {k: t if is_trained(k, trained) else start[k] for k, t in made.items()})
            for name, (n, made) in some(5).items()
        }
        found, _ = merged(rule, replies, tmp_path, start)
        assert np.allclose(product(found), mean_product(replies), atol=1e-5)
        if rule == "orthonormal-a":
            gram = found[A].double() @ found[A].double().T
            assert torch.allclose(gram, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        else:
            assert torch.equal(found[A if trained == "b" else B], start[A if trained == "b" else B])


def slow_ties(start: np.ndarray, changed: list[np.ndarray], weights: list[int], share: float):  # type: ignore[no-untyped-def]
    """One value after the other."""
    trimmed = []
    for x in changed:
        change = x - start
        keep = np.argsort(-np.abs(change), kind="stable")[: max(1, round(share * len(change)))]
        trimmed.append(np.where(np.isin(np.arange(len(change)), keep), change, 0.0))
    out = start.copy()
    for i in range(len(start)):
        sign = np.sign(sum(w * t[i] for w, t in zip(weights, trimmed, strict=True)))
        mine = [(w, t[i]) for w, t in zip(weights, trimmed, strict=True) if t[i] * sign > 0]
        if mine:
            out[i] += sum(w * t for w, t in mine) / sum(w for w, _ in mine)
    return out


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([t.double().numpy().ravel() for _, t in sorted(tensors.items())])


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_the_slow_one(tmp_path: Path, density: float) -> None:
    replies = some(5)
    found, _ = merged("ties", replies, tmp_path, density=density)
    start, changed = flat(adapter(0)), [flat(t) for _, t in replies.values()]
    want = slow_ties(start, changed, [n for n, _ in replies.values()], density)
    assert np.allclose(flat(found), want, atol=1e-6)


def test_dare_drops_and_scales_up(tmp_path: Path) -> None:
    one = {"a": (1, adapter(5, d_in=400, d_out=300))}
    start = adapter(0, d_in=400, d_out=300)
    found, _ = merged("dare", one, tmp_path, start, density=0.25, seed=3)
    change, full = flat(found) - flat(start), flat(one["a"][1]) - flat(start)
    stays = change != 0
    assert abs(stays.mean() - 0.25) < 0.03
    assert np.allclose(change[stays], 4 * full[stays], rtol=1e-4, atol=1e-5)
    again, _ = merged("dare", one, tmp_path, start, density=0.25, seed=3)
    other, _ = merged("dare", one, tmp_path, start, density=0.25, seed=4)
    assert all(torch.equal(again[k], found[k]) for k in found)
    assert any(not torch.equal(other[k], found[k]) for k in found)
    everything, _ = merged("dare", some(4), tmp_path, density=1.0)
    mean, _ = merged("average", some(4), tmp_path)
    assert np.allclose(flat(everything), flat(mean), atol=1e-6)


@pytest.mark.parametrize("rule", registry.names("aggregation"))
def test_arrival_and_weights_of_every_rule_with_lora(tmp_path: Path, rule: str) -> None:
    """Whatever a rule does to factors, the order in which replies came is nothing to it."""
    replies = some(5)
    keys = {"density": 0.5, "own": lambda: adapter(99)}  # what the server computed itself
    found, _ = merged(rule, replies, tmp_path, **keys)
    again, _ = merged(rule, dict(reversed(replies.items())), tmp_path, **keys)
    assert found.keys() == replies["00"][1].keys()
    assert all(torch.equal(found[k], again[k]) and found[k].dtype == torch.float32 for k in found)
