"""Envelope ↔ Flower RecordDict: the one core module that imports flwr.

Each part travels as one uint8 array: Flower stores and moves every array as an object of its
own, so one blob per kind costs one transfer instead of one per tensor, carries bfloat16, and
has a length that the byte ledger can state exactly.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpft_core.errors import ReplyError
from fedpft_core.wire.form import Envelope

_HEAD = "fedpft"
_PARTS = "fedpft.parts"
_TEXTS = ("kind", "head", "check")


def to_record(envelope: Envelope) -> RecordDict:
    """Envelope → the content of a Flower message.

    Args:
        envelope: a sealed message.

    Returns:
        One config record with the texts and, where there are parts, one array record with them.
    """
    content = RecordDict({_HEAD: ConfigRecord({k: getattr(envelope, k) for k in _TEXTS})})
    if envelope.parts:
        content[_PARTS] = ArrayRecord(
            {k: Array(np.frombuffer(v, dtype=np.uint8)) for k, v in envelope.parts.items()}
        )
    return content


def from_record(content: RecordDict) -> Envelope:
    """The inverse of `to_record`.

    Args:
        content: of a Flower message, as it came.

    Returns:
        The envelope; its checksum is for `open_envelope` to check.

    Raises:
        ReplyError: the content is something else.
    """
    try:
        head = content.config_records[_HEAD]
        texts = [head[key] for key in _TEXTS]
        if not all(isinstance(text, str) for text in texts):
            raise ReplyError("message head is not text")
        kind, text, check = map(str, texts)
        parts = {}
        for name, array in content.array_records.get(_PARTS, {}).items():
            value = array.numpy()
            if value.dtype != np.uint8 or value.ndim != 1:
                raise ReplyError(f"part {name!r} is not a byte array")
            parts[name] = value.tobytes()
    except ReplyError:
        raise
    except Exception as error:
        # Flower's own decoding raises whatever the bytes provoke in NumPy or protobuf.
        raise ReplyError(f"message content is malformed ({type(error).__name__})") from error
    return Envelope(kind, text, parts, check)
