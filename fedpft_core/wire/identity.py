"""Digests: what a tensor, and a package of tensors, is known by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensor_digest(t: Tensor) -> str:
    """sha256 over dtype, shape and bytes of one tensor.

    Args:
        t: any; its device and strides do not matter.

    Returns:
        64 hex digits.
    """
    t = t.detach().cpu().contiguous()
    head = f"{t.dtype}{list(t.shape)}|".encode()
    h = hashlib.sha256(head)
    h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def combine_digest(meta: str, files: Mapping[str, bytes], tensors: Mapping[str, str]) -> str:
    """The digest of a package from its metadata, files and per-tensor digests.

    A hash of hashes, so that after a patch only the tensors it touched are hashed again.

    Args:
        meta: the metadata's JSON text.
        files: content by file name.
        tensors: :func:`tensor_digest` of each weight, by name.

    Returns:
        64 hex digits; the order of files and tensors does not matter.
    """
    return digest_of(meta, {k: hashlib.sha256(v).hexdigest() for k, v in files.items()}, tensors)


def digest_of(meta: str, files: Mapping[str, str], tensors: Mapping[str, str]) -> str:
    """As :func:`combine_digest`, of files whose content is known by its digest.

    Args:
        meta: the metadata's JSON text.
        files: sha256 of the content by file name.
        tensors: :func:`tensor_digest` of each weight, by name.

    Returns:
        64 hex digits.
    """
    h = hashlib.sha256(meta.encode())
    for name in sorted(files):
        h.update(f"\n{name} {files[name]}".encode())
    for name in sorted(tensors):
        h.update(f"\n{name} {tensors[name]}".encode())
    return h.hexdigest()


def is_digest(value: Any) -> bool:
    """Whether a value is a sha256 in hex.

    Args:
        value: anything, such as a field of a message.

    Returns:
        True for a text of 64 hex digits in lower case.
    """
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


_HEX = frozenset("0123456789abcdef")
