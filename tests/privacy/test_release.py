"""Clipping and noise: what one client can do to a sum, and what the noise is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpft_core.privacy import entropy
from fedpft_core.privacy.release import Mechanism, release
from fedpft_core.tensors import Tensors


def repeating(seed: int) -> entropy.Source:
    return np.random.default_rng(seed).bytes


def adapter(seed: int, scale: float = 1.0) -> Tensors:
    made = torch.Generator().manual_seed(seed)
    return {
        "a": scale * torch.randn(3, 4, generator=made),
        "head.weight": scale * torch.randn(5, generator=made),
    }


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[k].double().reshape(-1) for k in sorted(tensors)])


def test_without_noise_it_is_the_mean_of_the_clipped_changes() -> None:
    start, clients = adapter(0), [adapter(i, 0.1 * i) for i in range(1, 6)]
    got = release(clients, start, 5.0, Mechanism(0.0, 2.0))
    want = torch.zeros(17, dtype=torch.float64)
    for c in clients:
        change = flat(c) - flat(start)
        want += change * min(1.0, 2.0 / float(change.norm()))
    assert torch.equal(flat(got.adapter).float(), (flat(start) + want / 5).float())
    assert got.bound == 2.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e9])
def test_one_client_moves_the_sum_by_no_more_than_the_bound(scale: float) -> None:
    """Head and all, whatever it sends."""
    start, others = adapter(0), [adapter(1), adapter(2)]
    m = Mechanism(0.0, 0.5)
    without = flat(release(others, start, 4.0, m).adapter)
    with_it = flat(release([*others, adapter(3, scale)], start, 4.0, m).adapter)
    assert float((with_it - without).norm()) <= 0.5 / 4 + 1e-6


def test_the_noise_has_the_deviation_asked_for_and_is_divided_like_the_sum() -> None:
    start = {"a": torch.zeros(200, 200)}
    got = release([], start, 10.0, Mechanism(1.5, 2.0), repeating(0)).adapter["a"]
    assert float(got.std()) == pytest.approx(1.5 * 2.0 / 10, rel=0.02)
    assert float(got.mean()) == pytest.approx(0, abs=0.01)


def test_two_rounds_have_different_noise_unless_a_test_repeats_it() -> None:
    start, m = {"a": torch.zeros(50)}, Mechanism(1.0, 1.0)
    one, other = (release([], start, 1.0, m).adapter["a"] for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (release([], start, 1.0, m, repeating(4)).adapter["a"] for _ in range(2))
    assert torch.equal(one, other)


def test_gaussians_are_gaussian() -> None:
    drawn = entropy.gaussian(40_001, repeating(1))
    assert len(drawn) == 40_001
    assert np.mean(drawn**2) == pytest.approx(1, rel=0.03)
    assert np.mean(drawn**4) == pytest.approx(3, rel=0.06)
    assert np.mean(np.abs(drawn) < 0.6745) == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(drawn[:20_000], drawn[20_000:40_000])[0, 1]) < 0.03


def test_samples_are_of_their_kind() -> None:
    source = repeating(2)
    assert all(len(entropy.chosen(9, 4, source)) == 4 for _ in range(20))
    seen = np.bincount(np.ravel([entropy.chosen(9, 4, source) for _ in range(900)]), minlength=9)
    assert seen.min() > 330 and seen.max() < 470
    sizes = [len(entropy.tossed(9, 0.4, source)) for _ in range(900)]
    assert np.mean(sizes) == pytest.approx(3.6, abs=0.2)
    assert np.var(sizes) == pytest.approx(9 * 0.4 * 0.6, rel=0.2)
    assert entropy.tossed(5, 1.0) == [0, 1, 2, 3, 4] and entropy.tossed(5, 0.0) == []


def test_the_bound_moves_to_the_quantile() -> None:
    """A hundred changes of norms 0.01 to 1: from either side the bound ends at the median."""
    start = {"a": torch.zeros(1)}
    clients = [{"a": torch.tensor([i / 100])} for i in range(1, 101)]
    for bound in (0.01, 20.0):
        for _ in range(200):
            m = Mechanism(0.0, bound, quantile=0.5)
            bound = release(clients, start, 100.0, m).bound
        assert bound == pytest.approx(0.5, abs=0.02)


def test_noise_on_the_count_is_paid_for_on_the_sum() -> None:
    m = Mechanism(1.0, 1.0, quantile=0.5, count_noise=5.0)
    assert m.sum_noise > 1
    assert m.sum_noise**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match="too small"):
        _ = Mechanism(1.0, 1.0, quantile=0.5, count_noise=0.4).sum_noise


def test_skellam_noise_is_whole_and_sums_to_itself() -> None:
    drawn = sum(entropy.skellam(40_000, 3.0) for _ in range(4))
    assert drawn.dtype == np.int64 and np.var(drawn) == pytest.approx(12.0, rel=0.05)
    assert abs(np.mean(drawn)) < 0.1
    assert np.std(entropy.skellam(2_000, 1e10)) == pytest.approx(1e5, rel=0.1)
