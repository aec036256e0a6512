"""Packages and patches: all that brings a client to a sub-FM, or from one version to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.model.ffn import FFN
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec, rounding
from fedpft_core.wire.coded import Coded
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.manifest import Manifest
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.parcel import SCALE, Parcel


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

    def manifest(self, digests: Mapping[str, str] | None = None) -> Manifest:
        """What the package consists of.

        Args:
            digests: sha256 of each weight, by name; None to hash them here.

        Returns:
            The manifest, whose digest is the package's.
        """
        return Manifest.of(self.meta, self.files, self.weights, digests)

    def to_bytes(self) -> bytes:
        """The whole package as it travels to a client that has nothing of it.

        Returns:
            Bytes that `from_bytes` reads; equal packages give equal bytes.
        """
        return Parcel.of(self.manifest(), self.files, self.weights).to_bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Package:
        """The inverse of `to_bytes`.

        Args:
            data: as they came.

        Returns:
            The package, each tensor and file of it the one that the manifest promises.

        Raises:
            ReplyError: the bytes are no package, or some of it is missing.
        """
        parcel = Parcel.from_bytes(data)
        return Package.made(parcel.manifest, parcel.tensors(), parcel.files)

    @staticmethod
    def made(
        manifest: Manifest, tensors: Mapping[str, Tensor], files: Mapping[str, bytes]
    ) -> Package:
        """A package put together from what its manifest names.

        Args:
            manifest: says what belongs to the package.
            tensors: verified, by digest; may hold others besides.
            files: verified contents by digest; may hold others besides.

        Returns:
            The package.

        Raises:
            ReplyError: a tensor or file is missing.
        """
        try:
            return Package(
                manifest.meta,
                {name: files[digest] for name, digest in manifest.files.items()},
                {name: tensors[entry.digest] for name, entry in manifest.weights.items()},
            )
        except KeyError as error:
            raise ReplyError("the package received is not whole") from error


@dataclass(frozen=True)
class Patch:
    """The weights one alignment changed: from one digest to the next.

    `tensors` in wire format: `{block}/index` int64 [m] positions among the kept neurons and
    `{block}/{part}` for every part of that FFN (see `FFN.read`). In int8 matrices have a scale for
    each neuron, `{block}/{part}//scale`, and vectors are float32.
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
        for name, t in self._values().items():
            block, _, part = name.partition("/")
            if part == "index":
                index[block] = t
            else:
                parts.setdefault(block, {})[part] = t
        if index.keys() != parts.keys() or not all(b.isdecimal() for b in index):
            raise ReplyError("a patch must have an index and parts for each of its blocks")
        return {int(b): (index[b], parts[b]) for b in index}

    def _values(self) -> Tensors:
        if self.fmt != "int8":
            return codec.decode(self.tensors, self.fmt)
        out: Tensors = {}
        for name, t in self.tensors.items():
            scale = self.tensors.get(name + SCALE)
            if not name.endswith(SCALE):
                whole = t.dtype if scale is None else torch.float32
                out[name] = Coded(t, scale).decoded(whole, tuple(t.shape))
        return out

    @staticmethod
    def encoded(parts: Mapping[str, Tensor], fmt: str) -> Tensors:
        """Tensors of a patch in their wire format.

        Args:
            parts: by `{block}/index` and `{block}/{part}`, float32 but for the positions.
            fmt: one of `codec.FORMATS`.

        Returns:
            What `tensors` of a patch in that format are.
        """
        if fmt != "int8":
            return codec.encode(parts, fmt)
        out: Tensors = {}
        for name, t in parts.items():
            out[name] = t = t.detach().cpu().contiguous()
            if t.dim() > 1:
                axis = FFN.neuron_axis(name.partition("/")[2]) or 0
                out[name], out[name + SCALE] = rounding.to_int8(t, axis)
        return out

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
