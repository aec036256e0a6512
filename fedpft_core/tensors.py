"""Names for what most modules pass around."""

from __future__ import annotations

from torch import Tensor

Tensors = dict[str, Tensor]
"""Tensors by name: an adapter, weights of a package, gradients."""
