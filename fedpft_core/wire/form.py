"""The form in which messages travel: a JSON head, byte parts and a checksum.

Nothing here needs PyTorch, so that a process which only hands messages on starts in no time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Envelope:
    """A message ready to travel: JSON head, byte parts, and a checksum over all of it.

    The checksum finds damage, in messages of either direction; against forgery stand digests
    (package, patch) and validation (replies).
    """

    kind: str
    head: str
    parts: dict[str, bytes]
    check: str = ""
    answer: int = 0  # of a request: bytes that a good answer can have; stays with the sender

    def sizes(self) -> dict[str, int]:
        """Size of the message, as the ledger counts it.

        Returns:
            Bytes by kind: package, patch, adapter, counts, merging, statistics, head, and
            control (the JSON text, checksum and parts of no other kind).
        """
        out = {"control": len(_bytes(self.head)) + len(_bytes(self.check))}
        for name, data in self.parts.items():
            kind = name.partition(".")[0]
            # A part nobody asked for must not make up a kind of its own.
            kind = kind if kind in _PART_KINDS else "control"
            out[kind] = out.get(kind, 0) + len(data)
        return out


_PART_KINDS = ("package", "patch", "adapter", "counts", "merging", "statistics", "head")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def checksum(kind: str, head: str, parts: Mapping[str, bytes]) -> str:
    """CRC-32 over a message's content.

    Args:
        kind: the message's kind, such as `train`.
        head: its JSON text.
        parts: its byte parts by name; their order does not matter.

    Returns:
        8 hex digits.
    """
    crc = zlib.crc32(_bytes(f"{kind}\n{head}"))
    for name in sorted(parts):
        crc = zlib.crc32(_bytes(f"\n{name} {len(parts[name])}\n"), crc)
        crc = zlib.crc32(parts[name], crc)
    return f"{crc:08x}"
