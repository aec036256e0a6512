"""What memory a client's process takes to train on a sub-FM, by its package alone.

Libraries, the sub-FM as it comes (the message and the tensors in it) and as a model, and one step.
Of each token a step keeps what the backward pass needs: in every block that gradients pass, about
`_HIDDEN` values of the hidden width, `_NEURON` of each neuron and `_MAP` of each attention map. How
near that comes is measured by `benchmarks/widths.py`.
"""

from __future__ import annotations

from fedpft_core.adapter.layers import trained_blocks
from fedpft_core.model.families import family_of
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.package import Package

BASE_BYTES = 450_000_000
"""Python, torch, transformers and Flower, before there is a model."""

_COPIES = 3  # of the weights: as they came, as a model, and the digest's or the disk's
_HIDDEN, _NEURON, _MAP = 16, 3, 3


def weight_bytes(package: Package) -> int:
    """The size of a package's weights.

    Args:
        package: as clients get it.

    Returns:
        Bytes.
    """
    return sum(t.numel() * t.element_size() for t in package.weights.values())


def package_bytes(package: Package) -> int:
    """The size of a package as it travels, within its headers.

    Args:
        package: as clients get it.

    Returns:
        Bytes.
    """
    headers = sum(len(name) + 100 for name in package.weights)
    files = sum(len(data) for data in package.files.values())
    return weight_bytes(package) + files + len(package.meta.to_json()) + headers


def step_bytes(meta: PackageMeta, batch_size: int, blocks: str = "") -> int:
    """What one training step keeps for its backward pass.

    Args:
        meta: the package's.
        batch_size: rows of the step, each as long as a row can be.
        blocks: whose LoRA is trained, `first:n` or `last:n`; empty = all. Blocks before the first
            that is trained keep nothing.

    Returns:
        Bytes; 0 where the model's config does not tell its sizes.
    """
    shape = family_of(meta.plan.model_type).shape(meta.model_config)
    tokens = shape.length(meta.max_length)
    first = min(trained_blocks(blocks, meta.plan))
    values = 0
    for i in meta.plan.present:
        if i >= first:
            neurons = len(meta.plan.blocks[i].kept) or meta.plan.neurons(i)
            values += _HIDDEN * shape.hidden + _NEURON * neurons + _MAP * shape.heads * tokens
    return 4 * batch_size * tokens * values


def base_bytes(package: Package, base: str) -> int:
    """The size of a package's weights as a client's model.

    Args:
        package: what it trains on.
        base: what the frozen linear layers of blocks are held in, one of `BASES`.

    Returns:
        Bytes.
    """
    whole = weight_bytes(package)
    if base == "float":
        return whole
    path = family_of(package.meta.plan.model_type).blocks + "."
    linear = [t for k, t in package.weights.items() if k.startswith(path) and t.dim() == 2]
    return whole - sum(t.nbytes - t.numel() for t in linear)


def training_bytes(package: Package, batch_size: int, blocks: str = "", base: str = "float") -> int:
    """What a client's process takes at most.

    Args:
        package: what it trains on.
        batch_size: rows of a step.
        blocks: as of :func:`step_bytes`.
        base: as of :func:`base_bytes`.

    Returns:
        Bytes.
    """
    step = step_bytes(package.meta, batch_size, blocks)
    weights = (_COPIES - 1) * weight_bytes(package) + base_bytes(package, base)
    return BASE_BYTES + weights + step


__all__ = [
    "BASE_BYTES",
    "base_bytes",
    "package_bytes",
    "step_bytes",
    "training_bytes",
    "weight_bytes",
]
