"""FedAvg: the mean weighted by federation.weighting (paper equation 2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.tensors import Tensors

AVERAGES = True


class Average:
    """W ← Σ |D_i| / |D| · W_i in float64; memory is one adapter, not one a client.

    Floating-point sums depend on their order: add in stable-name order for identical bits.

    Source: FedPFT, eq. (2).

    Attributes:
        weight: |D|, the weights of all clients added so far; their examples in the paper.
    """

    def __init__(self) -> None:
        self._sum: dict[str, np.ndarray] = {}
        self.weight: float = 0

    def add(self, adapter: Mapping[str, Tensor], weight: float) -> None:
        """Take one client's float32 adapter into the sum.

        Args:
            adapter: tensors on the CPU by name, the same names for every client.
            weight: |D_i|, the client's weight.
        """
        for name, t in adapter.items():
            value = t.numpy().astype(np.float64)
            value *= weight
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value
        self.weight += weight

    def result(self) -> Tensors:
        """The weighted mean as float32.

        Returns:
            Tensors by name; what was added stays, so that more can be added.

        Raises:
            ValueError: when nothing was added, or only clients without weight.
        """
        if not self.weight:
            raise ValueError("nothing to average")
        return {
            k: torch.from_numpy((v / self.weight).astype(np.float32)) for k, v in self._sum.items()
        }


def aggregate(replies: Replies) -> Tensors:
    """Sum the replies one after the other, in the order of the clients' names.

    Source: FedPFT, eq. (2).

    Args:
        replies: at least one; `replies.weights` is what each weighs.

    Returns:
        The weighted mean, float32 tensors by FM name.
    """
    average = Average()
    for adapter, weight in replies:
        average.add(adapter, weight)
    return average.result()
