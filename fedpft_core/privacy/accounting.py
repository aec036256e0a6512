"""What some releases come to: epsilon at a delta, by Google's dp-accounting.

It counts two ways. Renyi divergences (RDP) do for both kinds of sampling, privacy loss
distributions (PLD) are tighter and do for Poisson sampling. Both are upper bounds, so that the
smaller one holds.

Source: Mironov 2017 (arXiv:1702.07476) and Wang et al. 2019 (arXiv:1808.00087) for RDP; Koskela et
al. 2020 (arXiv:1906.03049) for PLD.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fedpft_core.errors import UserError


@dataclass(frozen=True)
class Spend:
    """One release: a sum with Gaussian noise, of a sample.

    Attributes:
        noise: z, standard deviation of the noise over the most that one member's part can measure.
        rate: Poisson sampling: the probability of each member; 1 = everybody, without sampling.
        sample: sampling of fixed size without replacement: the members drawn; 0 = Poisson.
        members: of how many members.
        steps: the noise is Skellam noise on whole numbers, and a part measures so many of them at
            most (L2); 0 = Gaussian noise. Sampling is then not counted in the members' favour.
    """

    noise: float
    rate: float = 1.0
    sample: int = 0
    members: int = 0
    steps: float = 0.0

    def as_raw(self) -> list[float]:
        """The spend as JSON values.

        Returns:
            Its five numbers.
        """
        return [self.noise, self.rate, self.sample, self.members, self.steps]

    @staticmethod
    def from_raw(raw: Any) -> Spend:
        """The inverse of :meth:`as_raw`.

        Args:
            raw: five numbers.

        Returns:
            The spend.

        Raises:
            ValueError: they are something else.
        """
        if not isinstance(raw, list) or len(raw) != 5:
            raise ValueError("a spend has five numbers")
        return Spend(float(raw[0]), float(raw[1]), int(raw[2]), int(raw[3]), float(raw[4]))


@dataclass(frozen=True)
class Epsilon:
    """Epsilon by both ways of counting; `pld` is None where that one cannot count."""

    rdp: float
    pld: float | None

    @property
    def value(self) -> float:
        """The smaller of two upper bounds."""
        return self.rdp if self.pld is None else min(self.rdp, self.pld)


def epsilon(spends: Iterable[Spend], delta: float) -> Epsilon:
    """What some releases come to together.

    With Poisson sampling that is for one member more or less; with samples of fixed size for one
    member in place of another, which moves a sum by twice its bound.

    Args:
        spends: releases whose noise does not depend on one another; of one kind of sampling, or
            else counted as if one member were replaced.
        delta: in (0, 1).

    Returns:
        Epsilon; infinite where a release has no noise, 0 for no release.

    Raises:
        UserError: dp-accounting is not installed.
    """
    counted = Counter(spends)
    if not counted:
        return Epsilon(0.0, 0.0)
    if any(s.noise <= 0 for s in counted):
        return Epsilon(math.inf, None)
    dp, rdp, pld = _library()
    if any(s.steps for s in counted):
        orders = list(range(2, 257))
        total = [sum(n * skellam(s, a) for s, n in counted.items()) for a in orders]
        return Epsilon(float(rdp.compute_epsilon(orders, total, delta)[0]), None)
    replaced = any(s.sample for s in counted)
    relation = dp.NeighboringRelation
    by_rdp = rdp.RdpAccountant(
        neighboring_relation=relation.REPLACE_ONE if replaced else relation.ADD_OR_REMOVE_ONE
    )
    by_pld = None if replaced else pld.PLDAccountant()
    for spend, times in counted.items():
        # A member in place of another takes its part away and adds a new one.
        gauss = dp.GaussianDpEvent(spend.noise / 2 if replaced else spend.noise)
        event = gauss
        if spend.sample and spend.sample < spend.members:
            event = dp.SampledWithoutReplacementDpEvent(spend.members, spend.sample, gauss)
        elif spend.rate < 1 and not replaced:
            event = dp.PoissonSampledDpEvent(spend.rate, gauss)
        by_rdp.compose(event, times)
        if by_pld is not None:
            by_pld.compose(event, times)
    return Epsilon(
        float(by_rdp.get_epsilon(delta)),
        None if by_pld is None else float(by_pld.get_epsilon(delta)),
    )


def skellam(spend: Spend, order: int) -> float:
    """The Renyi divergence of one release with Skellam noise.

    Source: Agarwal, Kairouz and Liu 2021 (arXiv:2110.04995), theorem 3.5, with the L1 sensitivity
    of whole numbers at most the square of their L2 sensitivity.

    Args:
        spend: its steps are the L2 sensitivity; 0 = Gaussian noise, whose divergence is given.
        order: at least 2.

    Returns:
        The divergence.
    """
    plain = order / (2 * spend.noise**2)
    if not spend.steps:
        return plain
    squared = spend.steps**2
    variance = spend.noise**2 * squared
    return plain + min(
        ((2 * order - 1) * squared + 6 * squared) / (4 * variance**2), 3 * squared / (2 * variance)
    )


def needed_noise(spend: Spend, times: int, target: float, delta: float) -> float:
    """The least noise with which so many releases stay within a target.

    Args:
        spend: one release; its noise is not looked at.
        times: how many.
        target: epsilon, above 0.
        delta: in (0, 1).

    Returns:
        z, rounded up to two digits after the point.

    Raises:
        UserError: dp-accounting is not installed.
    """

    def found(z: float) -> float:
        one = replace(spend, noise=z)
        return epsilon([one] * times, delta).rdp

    low, high = 0.05, 1.0
    while found(high) > target:
        low, high = high, 2 * high
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) <= target else (middle, high)
    return math.ceil(100 * high) / 100


def _library() -> tuple[Any, Any, Any]:
    """dp-accounting, an extra that takes seconds to import and that only some runs need."""
    try:
        names = ("dp_accounting", "dp_accounting.rdp", "dp_accounting.pld")
        dp, rdp, pld = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise UserError(
            "privacy.client-noise needs the package dp-accounting: pip install 'fedpft[privacy]'."
        ) from error
    # It warns of each order of the RDP that it leaves out, which is no fault of the run's.
    importlib.import_module("absl.logging").set_verbosity("error")
    return dp, rdp, pld
