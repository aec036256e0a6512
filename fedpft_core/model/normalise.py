"""Models brought to one form when they are loaded, so that nothing else has to know the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpft_core.model.families import family_of_model
from fedpft_core.model.fused import Apart


def normalise(model: Any) -> Any:
    """Bring a model to the form that its family's row describes.

    A `Conv1D` of transformers (GPT-2), a linear layer that keeps its weight transposed, becomes the
    `nn.Linear` that computes the same to the bit. Layers that hold several projections become as
    many layers (:class:`Apart`), which changes the last bits of their products at most;
    `adapter.lora.export` puts their adapters together again, for the vanilla model. Decoders no
    longer remember what they have read.

    Args:
        model: a task model, changed in place; one that needs none of this is left alone.

    Returns:
        The same model.

    Raises:
        UserError: the family is not supported.
    """
    from transformers.pytorch_utils import Conv1D

    family = family_of_model(model)
    if family.causal:
        for part in model.modules():
            # What a decoder remembers of earlier tokens is of no use where whole rows are read.
            if getattr(getattr(part, "config", None), "use_cache", False):
                part.config.use_cache = False
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module))
    for block in family.block_list(model):
        for layer in family.fused:
            held = block.get_submodule(layer.path)
            if isinstance(held, nn.Linear):
                block.set_submodule(layer.path, Apart(held, layer.parts))
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
