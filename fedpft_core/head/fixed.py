"""Sums over rows as whole numbers, in which they are added up under masks.

What every client sums has a bound that follows from how many rows it has and how long their
features can be. A number x of a tensor with the bound b becomes round(x / s), where the step s is
the smallest power of two at which b is one of the whole numbers that the ring has room for. Counts
have the step 1. Powers of two scale without rounding; so the sum of n clients' numbers is that of
the rounded ones exactly, and lies within n s / 2 of the sum of those not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedpft_core.head.form import Summing
from fedpft_core.tensors import Tensors

_FINEST = 2.0**-500  # a step below it could be none
_COARSEST = 2.0**900


@dataclass(frozen=True)
class Fixed:
    """The whole numbers that all clients of a session agree on.

    Attributes:
        form: what is summed.
        width: D, the features of a row.
        bits: k of the ring.
        clients: how many are added up at most.
        rows: that one of them has at most.
        most: the most answers that a row can have.
        longest: largest L2 norm that a feature vector can have.
        label: how far from zero a number to be learned can be; 0 where there are none.
    """

    form: Summing
    width: int
    bits: int
    clients: int
    rows: int
    most: int
    longest: float
    label: float = 0.0

    @property
    def largest(self) -> int:
        """The largest whole number of one client: those of all of them still fit the ring."""
        return (2 ** (self.bits - 1) - 1) // self.clients

    @property
    def count(self) -> int:
        """How many numbers the sums are."""
        return self.form.numbers(self.width)

    @cached_property
    def steps(self) -> dict[str, float]:
        """What 1 stands for, by the name of the tensor.

        Raises:
            ValueError: a bound is none, or nothing fits the ring.
        """
        if self.largest < self.rows * max(self.most, 1):
            raise ValueError("the ring has no room for the clients' counts")
        bounds = self.form.bounds(self.rows, self.most, self.longest, self.label)
        out = {}
        for name in self.form.layout(self.width):
            out[name] = _power(bounds[name] / self.largest) if name in bounds else 1.0
        return out

    def quantise(self, sums: Mapping[str, Tensor]) -> np.ndarray:
        """Whole numbers for a client's sums.

        Args:
            sums: as they would travel without masks.

        Returns:
            int64 [count], the tensors in the order of their names.

        Raises:
            ValueError: a number is not finite, or beyond the bound.
        """
        parts = []
        for name, step in sorted(self.steps.items()):
            values = sums[name].double().numpy().reshape(-1) / step
            if not np.isfinite(values).all():
                raise ValueError("the sums have values that are not finite")
            whole = np.rint(values)
            if (np.abs(whole) > self.largest).any():
                raise ValueError("the sums are larger than the request has room for")
            parts.append(whole.astype(np.int64))
        return np.concatenate(parts)

    def restore(self, total: np.ndarray) -> Tensors:
        """The sums that a sum of whole numbers stands for.

        Args:
            total: int64 [count].

        Returns:
            As they would travel without masks; each number is the nearest one of float64.
        """
        out, at = {}, 0
        layout = self.form.layout(self.width)
        for name, step in sorted(self.steps.items()):
            dtype, shape = layout[name]
            n = math.prod(shape)
            part = total[at : at + n]
            found = part if dtype == torch.int64 else part.astype(np.float64) * step
            out[name] = torch.from_numpy(np.ascontiguousarray(found)).reshape(shape)
            at += n
        return out

    def errors(self, clients: int) -> dict[str, float]:
        """How far a number of the sum can be from that of what was not rounded.

        Args:
            clients: how many have been added up.

        Returns:
            By the name of the tensor, besides what float64 rounds; 0 for whole numbers.
        """
        whole = self.form.bounds(self.rows, self.most, self.longest, self.label)
        return {k: clients * s / 2 if k in whole else 0.0 for k, s in self.steps.items()}


def _power(least: float) -> float:
    """The smallest power of two that is at least so large."""
    if not _FINEST <= least <= _COARSEST:
        raise ValueError("a bound of the sums is no number above 0 that can be reckoned with")
    fraction, exponent = math.frexp(least)
    return math.ldexp(1.0, exponent - (fraction == 0.5))
