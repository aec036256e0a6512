"""Epsilon by the library, against formulas that do without it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special

from fedpft_core.privacy.accounting import Spend, epsilon, needed_noise, skellam

DELTA = 1e-5


def gaussian_epsilon(mu: float) -> float:
    """Exact for one Gaussian of sensitivity mu and unit noise (Balle and Wang 2018)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        delta = phi(mu / 2 - e / mu) - math.exp(e) * phi(-mu / 2 - e / mu)
        low, high = (e, high) if delta > DELTA else (low, e)
    return high


@pytest.mark.parametrize("rounds", [1, 12])
def test_without_sampling_it_is_one_gaussian(rounds: int) -> None:
    """So many Gaussians of noise z are one of z / sqrt(rounds)."""
    found = epsilon([Spend(2.0)] * rounds, DELTA)
    exact = gaussian_epsilon(math.sqrt(rounds) / 2.0)
    assert found.pld == pytest.approx(exact, rel=1e-3)
    assert exact < found.rdp < 1.3 * exact
    assert found.value == found.pld


def test_a_fixed_sample_is_counted_as_one_member_in_place_of_another() -> None:
    """Of all members that moves the sum by twice the bound, as half the noise would do."""
    assert epsilon([Spend(2.0, sample=7, members=7)], DELTA).rdp == pytest.approx(
        epsilon([Spend(1.0)], DELTA).rdp
    )
    few = epsilon([Spend(2.0, sample=10, members=100)] * 12, DELTA)
    assert few.pld is None
    assert few.rdp < epsilon([Spend(2.0, sample=100, members=100)] * 12, DELTA).rdp
    assert few.rdp > epsilon([Spend(2.0, rate=0.1)] * 12, DELTA).rdp


def test_sampling_and_noise_lower_it_and_rounds_raise_it() -> None:
    def of(z: float, q: float, n: int) -> float:
        return epsilon([Spend(z, q)] * n, DELTA).value

    assert of(1.0, 0.1, 5) < of(1.0, 0.5, 5) < of(1.0, 1.0, 5)
    assert of(2.0, 0.1, 5) < of(1.0, 0.1, 5) < of(1.0, 0.1, 9)
    assert epsilon([], DELTA).value == 0
    assert epsilon([Spend(1.0), Spend(0.0)], DELTA).value == math.inf


def test_kinds_of_one_run_add_up() -> None:
    both = epsilon([Spend(1.0, 0.1)] * 3 + [Spend(4.0)], DELTA).value
    assert both > epsilon([Spend(1.0, 0.1)] * 3, DELTA).value
    assert both > epsilon([Spend(4.0)], DELTA).value


def test_the_noise_named_is_enough_and_hardly_more() -> None:
    one = Spend(0.0, rate=0.5)
    z = needed_noise(one, 6, 4.0, DELTA)
    assert epsilon([Spend(z, 0.5)] * 6, DELTA).rdp <= 4.0
    assert epsilon([Spend(z - 0.03, 0.5)] * 6, DELTA).rdp > 4.0


def test_a_spend_survives_its_json() -> None:
    one = Spend(1.5, 0.25, 3, 9, 7.5)
    assert Spend.from_raw(one.as_raw()) == one
    for bad in ([1.0], "x", None):
        with pytest.raises(ValueError):
            Spend.from_raw(bad)


def test_fine_whole_numbers_cost_what_gaussians_do_and_coarse_ones_more() -> None:
    """Against the divergence itself, summed over the whole numbers."""
    plain = epsilon([Spend(2.0)] * 5, DELTA).rdp
    fine = epsilon([Spend(2.0, steps=3e5)] * 5, DELTA).rdp
    assert plain == pytest.approx(fine, rel=0.02) and fine >= plain * 0.999
    assert epsilon([Spend(2.0, steps=1.0)] * 5, DELTA).rdp > 1.05 * fine
    for noise, order in ((1.0, 2), (2.0, 4), (3.0, 8)):
        n = np.arange(-60, 61)
        # Skellam(mu/2, mu/2) has the chances e^-mu I_n(mu).
        chance = np.log(scipy.special.ive(np.abs(n), noise**2))
        moved = np.log(scipy.special.ive(np.abs(n - 1), noise**2))
        true = scipy.special.logsumexp(order * chance + (1 - order) * moved) / (order - 1)
        assert true <= skellam(Spend(noise, steps=1.0), order)
