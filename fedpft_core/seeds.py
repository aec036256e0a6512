"""Random streams as a function of (run seed, purpose, round, name), never of execution order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose; different parts give independent streams.

    Args:
        seed: the run's.
        *parts: the purpose, and what sets its uses apart (a round, the name of a client).

    Returns:
        At least 0 and less than 2^63, from the sha256 of seed and parts.
    """
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *parts: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose.

    Args:
        seed: the run's.
        *parts: as for :func:`derive`.

    Returns:
        A new generator at the start of its stream.
    """
    return np.random.default_rng(derive(seed, *parts))


def torch_stream(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU torch generator for one purpose.

    Args:
        seed: the run's.
        *parts: as for :func:`derive`.

    Returns:
        A new generator at the start of its stream.
    """
    import torch  # here, so that sharing rows out does not load it

    return torch.Generator().manual_seed(derive(seed, *parts))
