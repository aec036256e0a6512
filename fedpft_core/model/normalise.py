"""Models brought to one form when they are loaded, so that nothing else has to know the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpft_core.model.families import FAMILIES


def normalise(model: Any) -> Any:
    """Replace every `Conv1D` of transformers (GPT-2) by the `nn.Linear` that computes the same.

    A `Conv1D` is a linear layer that keeps its weight transposed. The logits stay as they were to
    the bit, and module names do not change, so an adapter trained on the normalised model fits
    the vanilla one.

    Args:
        model: changed in place; a model without such layers is left alone.

    Returns:
        The same model.
    """
    from transformers.pytorch_utils import Conv1D

    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.causal:
        for part in model.modules():
            # What a decoder remembers of earlier tokens is of no use where whole rows are read.
            if getattr(getattr(part, "config", None), "use_cache", False):
                part.config.use_cache = False
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module))
    return model


def _linear(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    d_in, d_out = weight.shape
    linear = nn.utils.skip_init(
        nn.Linear, d_in, d_out, device=weight.device, dtype=weight.dtype
    )  # fmt: skip
    with torch.no_grad():
        linear.weight.copy_(weight.T)
        linear.bias.copy_(bias)
    linear.weight.requires_grad_(weight.requires_grad)
    linear.bias.requires_grad_(bias.requires_grad)
    return linear.train(conv.training)


__all__ = ["normalise"]
