"""The mean of clipped changes with Gaussian noise: what client-level privacy lets out of a round.

Each client's whole change, head included, is scaled down to L2 norm C. Their sum gets noise of
standard deviation z C, and is divided by a number that does not depend on who is there.

Source: McMahan et al. 2018 (arXiv:1710.06963), algorithm 1; the adaptive bound is that of Andrew et
al. 2021 (arXiv:1905.03871), algorithm 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpft_core.privacy.entropy import Source, gaussian
from fedpft_core.tensors import Tensors


@dataclass(frozen=True)
class Mechanism:
    """How a round's sum is made private.

    Attributes:
        noise: z, standard deviation of the noise over the sensitivity of the sum and, with an
            adaptive bound, of the number of short changes together.
        bound: C, the L2 norm to which a change is scaled down.
        quantile: share of the changes that the next bound is to leave as they are; 0 = the bound
            stays as it is.
        rate: how fast the bound follows.
        count_noise: standard deviation of the noise on the number of short changes.
    """

    noise: float
    bound: float
    quantile: float = 0.0
    rate: float = 0.2
    count_noise: float = 0.0

    @property
    def sum_noise(self) -> float:
        """Standard deviation of the noise on the sum, over C.

        Larger than z where a part of z is spent on the number of short changes, whose sensitivity
        is 1/2: z^-2 = sum_noise^-2 + (2 count_noise)^-2.

        Raises:
            ValueError: the noise on the number is too small for that.
        """
        if not self.quantile or not self.noise:
            return self.noise
        left = self.noise**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise ValueError("the noise on the number of short changes is too small")
        return left**-0.5


@dataclass(frozen=True)
class Released:
    """What a round lets out: the next adapter, float32, and the bound of the next round."""

    adapter: Tensors
    bound: float


def release(
    replies: Iterable[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    expected: float,
    mechanism: Mechanism,
    source: Source = os.urandom,
) -> Released:
    """Clip, sum, add noise, divide.

    Sums are float64 and a change is clipped in float64, so that no rounding after it makes it
    longer than the bound.

    Args:
        replies: the clients' adapters, float32 by name; there may be none.
        start: the adapter that they were sent.
        expected: what the sum is divided by: the size of the sample that was wanted, not of the one
            that answered.
        mechanism: bound and noise.
        source: where the noise comes from.

    Returns:
        The next adapter and bound.
    """
    first = {k: t.double().numpy() for k, t in sorted(start.items())}
    total = {k: np.zeros_like(t) for k, t in first.items()}
    count = short = 0
    for adapter in replies:
        change = {k: adapter[k].double().numpy() - t for k, t in first.items()}
        size = math.sqrt(math.fsum(float(np.square(d).sum()) for d in change.values()))
        scale = min(1.0, mechanism.bound / size) if size else 1.0
        for k, d in change.items():
            total[k] += d * scale
        count += 1
        short += size <= mechanism.bound
    deviation = mechanism.sum_noise * mechanism.bound
    adapter = {}
    for k, t in first.items():
        noise = gaussian(t.size, source).reshape(t.shape) * deviation if deviation else 0.0
        adapter[k] = torch.from_numpy(t + (total[k] + noise) / expected).float()
    bound = _next_bound(mechanism, count, short, expected, source)
    return Released(adapter, bound)


def _next_bound(m: Mechanism, count: int, short: int, expected: float, source: Source) -> float:
    if not m.quantile:
        return m.bound
    # About 1/2, so that one client more or less moves the sum by 1/2 and not by 1.
    seen = short - count / 2
    if m.noise:
        seen += float(gaussian(1, source)[0]) * m.count_noise
    share = min(1.0, max(0.0, 0.5 + seen / expected))
    return m.bound * math.exp(-m.rate * (share - m.quantile))
