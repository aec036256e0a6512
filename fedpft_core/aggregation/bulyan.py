"""Bulyan: Krum chooses replies one by one, of which the values around the median are averaged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import gram, squared_distances
from fedpft_core.aggregation._selection import krum_scores, ranked
from fedpft_core.tensors import Tensors


def withstands(replies: int) -> int:
    """How many hostile replies Bulyan stands: n >= 4 f + 3.

    Source: El Mhamdi et al., arXiv:1802.07927, section 4.

    Args:
        replies: n, how many there are.

    Returns:
        f; 0 for too few.
    """
    return max(0, (replies - 3) // 4)


def aggregate(replies: Replies) -> Tensors:
    """Choose n - 2 f replies by Krum, then average the values next to each median.

    Source: El Mhamdi et al., arXiv:1802.07927, section 4.

    Args:
        replies: at least one. `replies.hostile` of them are taken to be hostile, or as many as
            Bulyan stands among so many.

    Returns:
        Float32 tensors by FM name.
    """
    n = len(replies)
    hostile = min(replies.hostile, withstands(n))
    chosen = torch.tensor(sorted(_chosen(squared_distances(gram(replies)), hostile)))
    return replies.coordinatewise(partial(_central, chosen=chosen, count=n - 4 * hostile))


def _chosen(distances: Tensor, hostile: int) -> list[int]:
    """The n - 2 f replies that Krum takes when it is asked again without the last it took."""
    left = list(range(len(distances)))
    out = []
    for _ in range(len(distances) - 2 * hostile):
        among = torch.tensor(left)
        best = ranked(krum_scores(distances[among][:, among], hostile))[0]
        out.append(left.pop(best))
    return out


def _central(values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """The mean of the `count` values of the chosen replies that are nearest their median."""
    some = values[chosen].double()
    ordered = some.sort(dim=0).values
    n = len(ordered)
    middle = ordered[(n - 1) // 2 : n // 2 + 1].mean(0)
    nearest = (some - middle).abs().argsort(dim=0, stable=True)[:count]
    return some.gather(0, nearest).mean(0).float()
