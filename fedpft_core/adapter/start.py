"""Where LoRA's A starts, beside LoRA's own random values: orthonormal, at random or by its inputs.

B is zero at the start whatever A is, so that FM and sub-FM compute what they did without adapter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedpft_core.model.batch import inputs_of, real_positions
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import base_model
from fedpft_core.model.taps import watch
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors

_A = ".lora_A.weight"


def orthonormal(start: Tensors, seed: int) -> Tensors:
    """The adapter with the rows of every A orthonormal, their directions at random.

    Args:
        start: the adapter, by FM name.
        seed: of the directions, by name.

    Returns:
        A new dictionary; everything but the A's is as it was.
    """
    out = dict(start)
    for name in _factors(start):
        rank, width = start[name].shape
        drawn = torch.randn(width, rank, generator=torch_stream(seed, "orthonormal", name))
        out[name] = torch.linalg.qr(drawn.double()).Q.T.contiguous().float()
    return out


@torch.inference_mode()
def by_inputs(start: Tensors, fm: nn.Module, batches: Iterable[Batch]) -> Tensors:
    """The adapter with the rows of every A at the directions in which its inputs vary most.

    Source: EVA (Paischer et al., arXiv:2410.07170), with the same rank for every layer and the
    exact covariance in the place of an incremental SVD.

    Args:
        start: the adapter, by FM name.
        fm: the FM with that adapter, in eval mode.
        batches: public batches, at least one, on any device.

    Returns:
        A new dictionary; A's rows [r, D] are the leading eigenvectors of the covariance of its
        layer's inputs at real positions, each with its largest entry above 0. Everything else is
        as it was.
    """
    layers = {name: _layer(fm, name) for name in _factors(start)}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def add(name: str, entering: Tensor) -> None:
        x = entering[real_positions(batch, entering.shape[1])].double()
        sums[name] = sums.get(name, 0) + x.sum(0)
        squares[name] = squares.get(name, 0) + x.T @ x
        tokens[name] += len(x)

    device = device_of(fm)
    with watch(layers, add, inputs=True):
        for batch in batches:
            batch = to_device(batch, device)
            fm(**inputs_of(batch))
    out = dict(start)
    for name, count in tokens.items():
        mean = sums[name] / count
        vectors = torch.linalg.eigh(squares[name] / count - torch.outer(mean, mean)).eigenvectors
        rows = vectors[:, -len(start[name]) :].flip(1).T
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        out[name] = (rows * largest.sign()).contiguous().float().cpu()
    return out


def _factors(adapter: Tensors) -> list[str]:
    """The names of the A's, sorted."""
    return sorted(name for name in adapter if name.endswith(_A))


def _layer(fm: nn.Module, name: str) -> nn.Module:
    """The layer of the FM that an A belongs to."""
    return base_model(fm).get_submodule(name.removesuffix(_A))
