"""A package on its way: its manifest, and as much of its contents as the receiver lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.coded import Coded, smallest
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.manifest import Manifest

SCALE = "//scale"
"""Suffix of the name under which a tensor's scales travel."""
_MANIFEST = "//manifest"


@dataclass(frozen=True)
class Parcel:
    """A manifest, and some of what it names.

    Attributes:
        manifest: of the whole package.
        coded: weights in the form they travel in, by digest.
        files: contents by digest.
    """

    manifest: Manifest
    coded: Mapping[str, Coded]
    files: Mapping[str, bytes]

    @staticmethod
    def of(
        manifest: Manifest,
        files: Mapping[str, bytes],
        weights: Mapping[str, Tensor],
        known: Mapping[str, Coded] | None = None,
    ) -> Parcel:
        """A parcel with everything.

        Args:
            manifest: of the package.
            files: contents by file name.
            weights: tensors by name, on the CPU.
            known: forms of weights found before, by digest.

        Returns:
            The parcel, each weight in the smallest form that keeps its bits.
        """
        known = known or {}
        coded = {}
        for name, entry in manifest.weights.items():
            if entry.digest not in coded:
                coded[entry.digest] = known.get(entry.digest) or smallest(weights[name])
        return Parcel(manifest, coded, {manifest.files[k]: v for k, v in files.items()})

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each weight and file, by digest."""
        return {k: c.nbytes for k, c in self.coded.items()} | {
            k: len(v) for k, v in self.files.items()
        }

    @cached_property
    def size(self) -> int:
        """Bytes of all of it, without what holds it together."""
        return sum(self.sizes.values())

    def only(self, digests: Collection[str], most: int = 0) -> Parcel:
        """A part of the parcel.

        Args:
            digests: of what the receiver lacks; others are passed over.
            most: bytes after which the rest has to wait for another message; 0 = no limit. One
                weight or file at least is always in it.

        Returns:
            The manifest with these weights and files, in the order of their digests.
        """
        wanted: list[str] = []
        total = 0
        for digest in sorted(self.sizes.keys() & set(digests)):
            total += self.sizes[digest]
            if most and wanted and total > most:
                break
            wanted.append(digest)
        return replace(
            self,
            coded={k: self.coded[k] for k in wanted if k in self.coded},
            files={k: self.files[k] for k in wanted if k in self.files},
        )

    def to_bytes(self) -> bytes:
        """The parcel as one safetensors blob.

        Returns:
            Bytes that `from_bytes` reads; equal parcels give equal bytes.
        """
        out: Tensors = {_MANIFEST: _tensor(self.manifest.to_bytes())}
        out |= {k: _tensor(v) for k, v in self.files.items()}
        for digest, coded in self.coded.items():
            out[digest] = coded.values
            if coded.scale is not None:
                out[digest + SCALE] = coded.scale
        return codec.pack(out)

    @staticmethod
    def from_bytes(data: bytes) -> Parcel:
        """The inverse of `to_bytes`.

        Args:
            data: as they came; whether the manifest is the one asked for is for the caller to say.

        Returns:
            The parcel. Its files are those the manifest names; for weights `tensors` finds out.

        Raises:
            ReplyError: the bytes are no parcel, or hold what the manifest does not name.
        """
        found = codec.unpack(data)
        text = found.pop(_MANIFEST, None)
        if text is None or text.dtype != torch.uint8:
            raise ReplyError("package without a manifest")
        manifest = Manifest.from_bytes(text.numpy().tobytes())
        named = set(manifest.files.values())
        coded: dict[str, Coded] = {}
        files: dict[str, bytes] = {}
        for name, t in found.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in found:
                continue
            if name in manifest.entries:
                coded[name] = Coded(t, found.get(name + SCALE))
            elif name in named and t.dtype == torch.uint8:
                files[name] = t.numpy().tobytes()
                check_file(name, files[name])
            else:
                raise ReplyError("package with contents that its manifest does not name")
        return Parcel(manifest, coded, files)

    def tensors(self) -> Tensors:
        """The weights, decoded and verified.

        Returns:
            Tensors by digest.

        Raises:
            ReplyError: one is not what the manifest promises.
        """
        return {k: opened(self.manifest, k, coded) for k, coded in self.coded.items()}


def opened(manifest: Manifest, digest: str, coded: Coded) -> Tensor:
    """A weight, decoded and verified.

    Args:
        manifest: names the digest.
        digest: the weight's.
        coded: the form it came in.

    Returns:
        The tensor.

    Raises:
        ReplyError: it is not what the manifest promises.
    """
    entry = manifest.entries[digest]
    found = coded.decoded(entry.dtype, entry.shape)
    if tensor_digest(found) != digest:
        raise ReplyError("a tensor of the package does not have the digest it was sent under")
    return found


def check_file(digest: str, data: bytes) -> None:
    """Refuse a file that is not what it was named.

    Args:
        digest: sha256 that it should have.
        data: its content.

    Raises:
        ReplyError: it has another.
    """
    if hashlib.sha256(data).hexdigest() != digest:
        raise ReplyError("a file of the package does not have the digest it was sent under")


def _tensor(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


__all__ = ["SCALE", "Parcel", "check_file", "opened"]
