"""Numbers as whole numbers modulo 2^k, in which they are summed.

A change c in [-reach, reach] becomes round(c L / reach) with L = 2^(bits - 1) - 1, rounded up or
down at random so that the mean is c. The ring has room for the sum of so many clients, which
therefore never wraps around: the sum of the ring is the sum of the whole numbers, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedpft_core.tensors import Tensors

MOST_BITS = 32  # of the ring in which changes are summed
WIDEST = 62  # bits of any ring: sums and residues are then numbers of 64 bits with a sign
LOSS_REACH = 16.0  # a mean loss beyond it becomes it


def width(bits: int, clients: int, deviation: float = 0.0) -> int:
    """Bits of a ring that holds the sum of so many numbers.

    Args:
        bits: of one number, with its sign.
        clients: how many are summed.
        deviation: standard deviation of the noise on the sum, of which eight have room; what lies
            beyond wraps around, which is no harm to privacy.

    Returns:
        k, with 2^k more than twice the largest sum.
    """
    return math.ceil(2 * (clients * largest(bits) + 8 * deviation)).bit_length()


def sensitivity(longest: float, bits: int, reach: float, count: int) -> float:
    """How long the whole numbers of a clipped change can be.

    Args:
        longest: L2 norm of the change.
        bits: of one number.
        reach: what the largest number stands for.
        count: n; rounding adds less than 1 to each number.

    Returns:
        The L2 norm.
    """
    return longest * largest(bits) / reach + math.sqrt(count)


def largest(bits: int) -> int:
    """The largest number of so many bits, with its sign.

    Args:
        bits: at least 2.

    Returns:
        L = 2^(bits - 1) - 1.
    """
    return 2 ** (bits - 1) - 1


def quantise(
    change: Mapping[str, Tensor], bits: int, reach: float, stream: np.random.Generator
) -> np.ndarray:
    """Whole numbers for a change.

    Args:
        change: float tensors by name, taken in the order of the names.
        bits: of one number.
        reach: what the largest number stands for; values beyond it become it.
        stream: decides what is rounded up. It need not be secret.

    Returns:
        int64 [n], between -L and L.

    Raises:
        ValueError: a value is not finite.
    """
    flat = np.concatenate(
        [change[k].detach().cpu().double().numpy().reshape(-1) for k in sorted(change)]
    )
    if not np.isfinite(flat).all():
        raise ValueError("the change has values that are not finite")
    most = largest(bits)
    scaled = np.clip(flat / reach, -1, 1) * most
    return np.clip(np.floor(scaled + stream.random(len(scaled))), -most, most).astype(np.int64)


def restore(
    total: np.ndarray, bits: int, reach: float, like: Mapping[str, Tensor], clients: int
) -> Tensors:
    """The mean change that a sum stands for.

    Args:
        total: int64 [n], the sum of the clients' numbers.
        bits: of one number.
        reach: what the largest number stands for.
        like: tensors of the names and shapes wanted.
        clients: how many were summed.

    Returns:
        float64 tensors by name.
    """
    mean = total * (reach / (largest(bits) * clients))
    out, at = {}, 0
    for name in sorted(like):
        n = like[name].numel()
        out[name] = torch.from_numpy(mean[at : at + n].copy()).reshape(like[name].shape)
        at += n
    return out


def kind(k: int) -> type[np.uint32 | np.uint64]:
    """The type that residues are held in.

    Args:
        k: of the ring, at most 62.

    Returns:
        uint32 for at most 32 bits, else uint64.
    """
    return np.uint32 if k <= 32 else np.uint64


def reduced(values: np.ndarray, k: int) -> np.ndarray:
    """Sums and differences of residues as residues again.

    Args:
        values: of the ring's type, which may have wrapped around.
        k: of the ring.

    Returns:
        The same type, below 2^k.
    """
    found: np.ndarray = values & kind(k)(2**k - 1)
    return found


def wrap(values: np.ndarray, k: int) -> np.ndarray:
    """Whole numbers modulo 2^k.

    Args:
        values: integers of any kind.
        k: at most 62.

    Returns:
        Residues below 2^k, see `kind`.
    """
    return (values.astype(np.int64) & np.int64(2**k - 1)).astype(kind(k))


def unwrap(values: np.ndarray, k: int) -> np.ndarray:
    """The whole numbers nearest to zero that residues stand for.

    Args:
        values: residues below 2^k.
        k: of the ring.

    Returns:
        int64, from -2^(k-1) to 2^(k-1) - 1.
    """
    signed = values.astype(np.int64)
    return np.where(signed >= 2 ** (k - 1), signed - 2**k, signed)


def pack(values: np.ndarray, k: int) -> bytes:
    """Residues, k bits each.

    Args:
        values: residues [n] below 2^k.
        k: at most 62.

    Returns:
        ceil(n k / 8) bytes.
    """
    wide = np.dtype(kind(k)).newbyteorder("<")
    bits = np.unpackbits(
        values.astype(wide).view(np.uint8).reshape(-1, wide.itemsize), axis=1, bitorder="little"
    )
    return np.packbits(bits[:, :k].reshape(-1), bitorder="little").tobytes()


def packed_bytes(count: int, k: int) -> int:
    """Bytes that `pack` gives.

    Args:
        count: n.
        k: bits of each.

    Returns:
        The number.
    """
    return (count * k + 7) // 8


def unpack(data: bytes, count: int, k: int) -> np.ndarray:
    """The inverse of `pack`.

    Args:
        data: what `pack` gave.
        count: n.
        k: bits of each.

    Returns:
        Residues [n] below 2^k, see `kind`.

    Raises:
        ValueError: there are more or fewer bytes.
    """
    if len(data) != packed_bytes(count, k):
        raise ValueError(f"{len(data)} bytes are not {count} numbers of {k} bits")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * k]
    own = np.dtype(kind(k))
    wide = np.zeros((count, 8 * own.itemsize), np.uint8)
    wide[:, :k] = bits.reshape(count, k)
    found = np.packbits(wide, axis=1, bitorder="little").view(own.newbyteorder("<"))
    return found.reshape(-1).astype(own)
