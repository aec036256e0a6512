"""Packages and patches as they travel and lie on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.meta import PackageMeta

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,119}(?<!\.)")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)  # on Windows


@dataclass(frozen=True)
class Package:
    """All a client needs: sub-FM weights, metadata, tokenizer or image processor files.

    Weights leave out what belongs to the adapter.
    """

    meta: PackageMeta
    files: dict[str, bytes]
    weights: Tensors

    def digest(self) -> str:
        """The digest that this version of the sub-FM is known by; hashes every weight.

        Returns:
            64 hex digits.
        """
        return combine_digest(
            self.meta.to_json(), self.files, {k: tensor_digest(t) for k, t in self.weights.items()}
        )

    def to_bytes(self) -> bytes:
        """One safetensors blob: weights by name, metadata and files as uint8 tensors.

        Returns:
            Bytes that `from_bytes` reads; equal packages give equal bytes.
        """
        extra = {"//meta": self.meta.to_json().encode()}
        extra |= {f"//file/{k}": v for k, v in self.files.items()}
        blobs = {k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in extra.items()}
        return codec.pack(self.weights | blobs)

    @staticmethod
    def from_bytes(data: bytes) -> Package:
        """The inverse of `to_bytes`.

        Args:
            data: as they came; the digest is for the caller to check.

        Returns:
            The package, its file names none that lead out of a folder.

        Raises:
            ReplyError: the bytes are no package.
        """
        tensors = codec.unpack(data)
        blobs = {k: tensors.pop(k) for k in list(tensors) if k.startswith("//")}
        if any(t.dtype != torch.uint8 for t in blobs.values()) or "//meta" not in blobs:
            raise ReplyError("package without metadata, or with files that are not bytes")
        meta = blobs.pop("//meta").numpy().tobytes()
        files = {k.removeprefix("//file/"): t.numpy().tobytes() for k, t in blobs.items()}
        if not all(_FILE.fullmatch(k) and not _DEVICE.match(k) for k in files):
            raise ReplyError("package with a file name that is a path, or that some system refuses")
        try:
            return Package(PackageMeta.from_json(meta.decode()), files, tensors)
        except UnicodeDecodeError as error:
            raise ReplyError("package with metadata that is not text") from error


@dataclass(frozen=True)
class Patch:
    """The weights one alignment changed: from one digest to the next.

    `tensors` in wire format: `{block}/index` int64 [m] positions among the kept neurons and
    `{block}/{part}` for every part of that FFN (see `FFN.read`).
    """

    source: str
    target: str
    fmt: str
    tensors: Tensors

    def decoded(self) -> dict[int, tuple[Tensor, Tensors]]:
        """What the patch sets, block by block.

        Returns:
            By FM block: positions [m] among the kept neurons, and float32 parts by name.

        Raises:
            ReplyError: the patch is malformed.
        """
        index: Tensors = {}
        parts: dict[str, Tensors] = {}
        for name, t in codec.decode(self.tensors, self.fmt).items():
            block, _, part = name.partition("/")
            if part == "index":
                index[block] = t
            else:
                parts.setdefault(block, {})[part] = t
        if index.keys() != parts.keys() or not all(b.isdecimal() for b in index):
            raise ReplyError("a patch must have an index and parts for each of its blocks")
        return {int(b): (index[b], parts[b]) for b in index}

    def to_bytes(self) -> bytes:
        """The patch's tensors as one safetensors blob, packed once.

        Returns:
            The bytes; source, target and format travel in the message's head.
        """
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        # Asked for once per client and round, to measure a chain and to send it.
        return codec.pack(self.tensors)
