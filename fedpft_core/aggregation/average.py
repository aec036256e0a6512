"""FedAvg: the mean weighted by federation.weighting (paper equation 2)."""

from __future__ import annotations

import numpy as np
import torch

from fedpft_core.aggregation import Replies
from fedpft_core.tensors import Tensors

AVERAGES = True
BY_TENSOR = True


class RunningSum:
    """W ← Σ |D_i| / |D| · W_i in float64, of replies that are kept on disk and read piece by piece.

    Floating-point sums depend on their order: add in stable-name order for identical bits.

    Source: FedPFT, eq. (2).

    Args:
        replies: what is kept, now and later.

    Attributes:
        weight: the weights of all replies added so far.
    """

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self.weight: float = 0
        self._sum: np.ndarray | None = None
        self._scaled = np.empty(0)

    def add(self, client: str, weight: float) -> None:
        """Take one reply into the sum.

        Args:
            client: whose.
            weight: what it weighs.
        """
        first = self._sum is None
        whole = self._sum = np.empty(self.replies.size) if self._sum is None else self._sum
        for start, values in self.replies.pieces(client):
            part = whole[start : start + len(values)]
            if first:
                np.multiply(values, weight, out=part, dtype=np.float64)
                continue
            if len(self._scaled) < len(values):
                self._scaled = np.empty(len(values))
            scaled = self._scaled[: len(values)]
            np.multiply(values, weight, out=scaled, dtype=np.float64)
            part += scaled
        self.weight += weight

    def result(self) -> Tensors:
        """The weighted mean as float32.

        Returns:
            Tensors by name; what was added stays, so that more can be added.

        Raises:
            ValueError: when nothing was added.
        """
        if self._sum is None:
            raise ValueError("nothing to average")
        return self.replies.split(torch.from_numpy((self._sum / self.weight).astype(np.float32)))


def aggregate(replies: Replies) -> Tensors:
    """Sum the replies one after the other, in the order of the clients' names.

    Source: FedPFT, eq. (2).

    Args:
        replies: at least one; `replies.weights` is what each weighs.

    Returns:
        The weighted mean, float32 tensors by FM name.
    """
    if replies.partly:
        return by_tensor(replies)
    mean = RunningSum(replies)
    for name, weight in zip(replies.names, replies.weights, strict=True):
        mean.add(name, weight)
    return mean.result()


def by_tensor(replies: Replies) -> Tensors:
    """The mean of each tensor over those who have trained it.

    Args:
        replies: at least one; `replies.partly` says who has trained some tensors only.

    Returns:
        Float32 tensors by FM name. One that nobody has trained is as it was sent.
    """
    total: dict[str, np.ndarray] = {}
    weights: dict[str, float] = {}
    for name, (adapter, weight) in zip(replies.names, replies, strict=True):
        trained = replies.partly.get(name, adapter.keys())
        for key in adapter:
            if key in trained and weight:
                value = adapter[key].numpy().astype(np.float64) * weight
                total[key] = total[key] + value if key in total else value
                weights[key] = weights.get(key, 0.0) + weight
    return {
        key: torch.from_numpy((total[key] / weights[key]).astype(np.float32))
        if key in total
        else sent
        for key, sent in replies.start.items()
    }
