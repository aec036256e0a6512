"""A linear map of low rank, which PEFT takes for a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def factored(linear: nn.Linear, rank: int) -> bool:
    """Whether a map takes the place of two thin ones of that rank.

    Grouped-query attention has keys narrower than queries: a rank that a query can have may be more
    than a key has, which then stays as it is.

    Args:
        linear: a query or key projection.
        rank: the plan's.

    Returns:
        True for a rank from 1 to the smaller of the map's two sizes.
    """
    return 0 < rank <= min(linear.in_features, linear.out_features)


class LowRank(nn.Linear):
    """A linear map as the product of two thin ones: y = up (down x) + bias.

    `down` [r, D_in], `up` [D_out, r]. An `nn.Linear`, so that PEFT puts LoRA on it; `weight` is the
    product, for whoever asks for its device or type, and no parameter.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, like: nn.Linear) -> None:
        nn.Module.__init__(self)  # not Linear's, which would make the weight a parameter
        self.in_features, self.out_features, self.rank = d_in, d_out, rank
        options: Any = {"device": like.weight.device, "dtype": like.weight.dtype}
        self.down = nn.Parameter(torch.empty(rank, d_in, **options))
        self.up = nn.Parameter(torch.empty(d_out, rank, **options))
        bias = nn.Parameter(torch.empty(d_out, **options)) if like.bias is not None else None
        self.register_parameter("bias", bias)

    @staticmethod
    def of(linear: nn.Linear, rank: int) -> LowRank:
        """The nearest map of that rank (truncated SVD, in float64, singular values shared out).

        Args:
            linear: the map to come near; its bias is copied.
            rank: r, at most the smaller of the linear map's two sizes.

        Returns:
            A new map on the same device, trainable if the linear map's weight is.
        """
        low = LowRank(linear.in_features, linear.out_features, rank, linear)
        u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        root = s[:rank].sqrt()
        with torch.no_grad():
            low.up.copy_(u[:, :rank] * root)
            low.down.copy_(root[:, None] * vh[:rank])
            if linear.bias is not None:
                low.bias.copy_(linear.bias)
        return low.requires_grad_(linear.weight.requires_grad)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product `up down` [D_out, D_in], made anew at each call."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two thin maps one after the other.

        Args:
            x: inputs [..., D_in].

        Returns:
            Outputs [..., D_out].
        """
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)
