"""Next-token losses of a decoder without all of its scores at once.

The scores of N tokens over a vocabulary of V are the largest tensor of a small model's step. Here
they are made for a few tokens at a time, and the gradient for what the scores are made from is
taken at once, so that a chunk is gone before the next one is made. The layer that makes the scores
is frozen, as it is throughout the method.

Shape letters: B rows, L positions, N positions at which a token is learned, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data.encoded import UNLEARNED
from fedpft_core.model.batch import real_positions
from fedpft_core.model.device import Batch
from fedpft_core.model.families import base_model
from fedpft_core.model.taps import run_up_to

CHUNK_BYTES = 16 * 2**20
"""Float32 scores that there are at once."""


def scorer(model: nn.Module) -> nn.Module:
    """The layer that scores the next token.

    Args:
        model: a causal language model of the library, bare or with the adapter.

    Returns:
        Its output embedding, which is frozen.
    """
    layer: Any = base_model(model)
    found: nn.Module = layer.get_output_embeddings()
    return found


def scores(model: nn.Module, h_ND: Tensor) -> Tensor:
    """Scores of the next token.

    Args:
        model: a causal language model.
        h_ND: what its scoring layer reads.

    Returns:
        [N, V] in float32 (float64 of a model in float64), softly capped where the model's config
        says so (Gemma 2).
    """
    config: Any = base_model(model).config
    found: Tensor = scorer(model)(h_ND)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(found / cap) if cap else found


def next_tokens(batch: Batch) -> Tensor:
    """The token that each position is to tell, -100 where there is none to be learned.

    Args:
        batch: with labels int64 [B, L]; where it has none, every real token is learned.

    Returns:
        int64 [B, L]: the labels, one position earlier.
    """
    labels = batch.get("labels")
    if labels is None:
        real = real_positions(batch, batch["input_ids"].shape[1])
        labels = torch.where(real, batch["input_ids"], UNLEARNED)
    return F.pad(labels[:, 1:], (0, 1), value=UNLEARNED)


def read(model: nn.Module, batch: Batch, learned_BL: Tensor) -> Tensor:
    """What the scoring layer reads at the positions from which a token is learned.

    Args:
        model: a causal language model.
        batch: what it reads.
        learned_BL: bool, the positions.

    Returns:
        [N, D] in row order.
    """
    return run_up_to(model, batch, scorer(model))[learned_BL]


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks of N, with the gradient for h taken chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, size: int, loss: Callable[[Tensor, slice], Tensor]) -> Any:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(h_ND) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
        for start in range(0, len(h_ND), size):
            part = slice(start, start + size)
            if gradient is None:
                total += loss(h_ND[part], part)
                continue
            with torch.enable_grad():
                h = h_ND[part].detach().requires_grad_()
                found = loss(h, part)
                (gradient[part],) = torch.autograd.grad(found, h)
            total += found.detach()
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return total.to(torch.promote_types(h_ND.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def in_chunks(
    h_ND: Tensor,
    loss: Callable[[Tensor, slice], Tensor],
    vocabulary: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The sum of a loss that is made from scores of one chunk of positions at a time.

    Args:
        h_ND: what the scoring layer reads.
        loss: called with a chunk of it and the chunk's place, gives the sum over the chunk.
        vocabulary: V.
        chunk_bytes: of float32 scores that there may be at once; at least one position is taken.

    Returns:
        A scalar; its gradient for `h_ND` is what summing in one piece would give, up to rounding.
    """
    size = max(1, chunk_bytes // (4 * vocabulary))
    total: Tensor = _Chunked.apply(h_ND, size, loss)
    return total


def loss_sum(
    model: nn.Module, h_ND: Tensor, target_N: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """The sum of the cross-entropies of the next token.

    Args:
        model: a causal language model; its scoring layer is frozen.
        h_ND: what the scoring layer reads.
        target_N: int64, the tokens to tell.
        chunk_bytes: see :func:`in_chunks`.

    Returns:
        A scalar, in nats.
    """

    def loss(h: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(scores(model, h), target_N[part], reduction="sum")

    return in_chunks(h_ND, loss, _vocabulary(model), chunk_bytes)


def losses(
    model: nn.Module, h_ND: Tensor, target_N: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """The cross-entropy of each next token, without gradients.

    Args:
        model: a causal language model.
        h_ND: what its scoring layer reads.
        target_N: int64, the tokens to tell.
        chunk_bytes: see :func:`in_chunks`.

    Returns:
        float32 [N], in nats.
    """
    size = max(1, chunk_bytes // (4 * _vocabulary(model)))
    with torch.no_grad():
        found = [
            F.cross_entropy(scores(model, h), target, reduction="none")
            for h, target in zip(h_ND.split(size), target_N.split(size), strict=True)
        ]
    return torch.cat(found) if found else h_ND.new_zeros(0)


def divergence_sum(
    model: nn.Module,
    other: nn.Module,
    h_ND: Tensor,
    other_h_ND: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The sum of KL(other's next token || the model's) over positions.

    Args:
        model: a causal language model; its scoring layer is frozen.
        other: the one that it should come to.
        h_ND: what the model's scoring layer reads.
        other_h_ND: what the other's does, at the same positions.
        chunk_bytes: see :func:`in_chunks`; twice as much is used, for both models' scores.

    Returns:
        A scalar of at least 0, in nats.
    """

    def loss(h: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(scores(other, other_h_ND[part]), -1)
        found = F.log_softmax(scores(model, h), -1)
        return F.kl_div(found, target, reduction="sum", log_target=True)

    return in_chunks(h_ND, loss, _vocabulary(model), chunk_bytes)


def _vocabulary(model: nn.Module) -> int:
    return len(scorer(model).get_parameter("weight"))


__all__ = [
    "CHUNK_BYTES", "divergence_sum", "in_chunks", "loss_sum", "losses", "next_tokens", "read",
    "scorer", "scores",
]  # fmt: skip
