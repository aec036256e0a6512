"""What a package consists of: metadata, and the digest of every file and weight."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.wire.identity import digest_of, is_digest, tensor_digest
from fedpft_core.wire.meta import PackageMeta

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,119}(?<!\.)")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)  # on Windows
_DTYPES = {
    str(t)[6:]: t
    for t in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MOST_FILES, _MOST_WEIGHTS = 1000, 9000  # together so many as a client can say it lacks
_MOST_NUMBERS = 2**40  # of one weight
_MOST_BYTES = 2**26  # of a manifest as text


@dataclass(frozen=True)
class Entry:
    """A weight before it is there.

    Attributes:
        digest: sha256; see `tensor_digest`.
        dtype: its type once it is decoded.
        shape: its shape.
    """

    digest: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A package without its contents.

    Attributes:
        meta: the metadata.
        files: sha256 of the content by file name.
        weights: what each weight is, by its name in the proxy.
    """

    meta: PackageMeta
    files: Mapping[str, str]
    weights: Mapping[str, Entry]

    @staticmethod
    def of(
        meta: PackageMeta,
        files: Mapping[str, bytes],
        weights: Mapping[str, Tensor],
        digests: Mapping[str, str] | None = None,
    ) -> Manifest:
        """The manifest of what there is.

        Args:
            meta: the metadata.
            files: content by file name.
            weights: tensors by name.
            digests: sha256 of each weight, by name; None to hash them here.

        Returns:
            The manifest.
        """
        known = digests or {k: tensor_digest(t) for k, t in weights.items()}
        return Manifest(
            meta,
            {k: hashlib.sha256(v).hexdigest() for k, v in files.items()},
            {k: Entry(known[k], t.dtype, tuple(t.shape)) for k, t in weights.items()},
        )

    @cached_property
    def digest(self) -> str:
        """What the package is known by."""
        return digest_of(self.meta.to_json(), self.files, self.digests)

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of each weight, by its name."""
        return {k: entry.digest for k, entry in self.weights.items()}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The weights by digest; equal ones are there once."""
        return {entry.digest: entry for entry in self.weights.values()}

    @cached_property
    def contents(self) -> frozenset[str]:
        """Digests of all weights and files."""
        return frozenset((*self.entries, *self.files.values()))

    def to_bytes(self) -> bytes:
        """The manifest as text.

        Returns:
            JSON in UTF-8; equal manifests give equal bytes.
        """
        weights = {k: [e.digest, str(e.dtype)[6:], list(e.shape)] for k, e in self.weights.items()}
        raw = {"meta": self.meta.as_raw(), "files": dict(self.files), "weights": weights}
        return json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """The inverse of `to_bytes`.

        Args:
            data: as they came, from the network or a disk.

        Returns:
            The manifest, its file names none that lead out of a folder.

        Raises:
            ReplyError: naming what is wrong.
        """
        if len(data) > _MOST_BYTES:
            raise ReplyError(f"the package's manifest is {len(data)} bytes long")
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ReplyError("the package's manifest is no JSON text") from error
        if not isinstance(raw, dict) or raw.keys() != {"meta", "files", "weights"}:
            raise ReplyError("the package's manifest is not meta, files and weights")
        return Manifest(
            PackageMeta.from_raw(raw["meta"]), _files(raw["files"]), _weights(raw["weights"])
        )


def _files(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or len(raw) > _MOST_FILES:
        raise ReplyError("the package's manifest does not name its files")
    if not all(_FILE.fullmatch(k) and not _DEVICE.match(k) for k in raw):
        raise ReplyError("package with a file name that is a path, or that some system refuses")
    if not all(map(is_digest, raw.values())):
        raise ReplyError("the package's manifest has a file without a digest")
    return raw


def _weights(raw: Any) -> dict[str, Entry]:
    if not isinstance(raw, dict) or len(raw) > _MOST_WEIGHTS:
        raise ReplyError("the package's manifest does not name its weights")
    out: dict[str, Entry] = {}
    seen: dict[str, Entry] = {}
    for name, value in raw.items():
        made = _entry(value)
        if made is None or seen.setdefault(made.digest, made) != made:
            raise ReplyError(f"the package's manifest is wrong about the weight {name[:120]!r}")
        out[name] = made
    return out


def _entry(value: Any) -> Entry | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    digest, dtype, shape = value
    if not is_digest(digest) or not isinstance(dtype, str) or dtype not in _DTYPES:
        return None
    if not isinstance(shape, list) or len(shape) > 8:
        return None
    if not all(type(n) is int and 0 <= n <= _MOST_NUMBERS for n in shape):
        return None
    if math.prod(shape) > _MOST_NUMBERS:
        return None
    return Entry(digest, _DTYPES[dtype], tuple(shape))


__all__ = ["Entry", "Manifest"]
