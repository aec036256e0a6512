"""Messages into envelopes and out of them; an envelope is checked when it is opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from fedpft_core.errors import ReplyError
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire import codec
from fedpft_core.wire.form import Envelope, checksum
from fedpft_core.wire.identity import is_digest
from fedpft_core.wire.messages import (
    Hello,
    HelloReply,
    KeysReply,
    KeysRequest,
    Message,
    NeedReply,
    RefusalReply,
    RevealReply,
    RevealRequest,
    SecureStatisticsReply,
    SecureStatisticsRequest,
    SecureTrainReply,
    SecureTrainRequest,
    SharesReply,
    SharesRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
)
from fedpft_core.wire.package import Patch

PROTOCOL = 8

_MAX_HEAD = 2**20  # characters; real heads have well under a thousand per patch


_KINDS: dict[str, type] = {
    "hello": Hello,
    "hello-reply": HelloReply,
    "train": TrainRequest,
    "train-reply": TrainReply,
    "statistics": StatisticsRequest,
    "statistics-reply": StatisticsReply,
    "need": NeedReply,
    "refusal": RefusalReply,
    "keys": KeysRequest,
    "keys-reply": KeysReply,
    "shares": SharesRequest,
    "shares-reply": SharesReply,
    "secure-train": SecureTrainRequest,
    "secure-train-reply": SecureTrainReply,
    "secure-statistics": SecureStatisticsRequest,
    "secure-statistics-reply": SecureStatisticsReply,
    "reveal": RevealRequest,
    "reveal-reply": RevealReply,
}


_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


def seal(message: Message) -> Envelope:
    """Message → envelope.

    Args:
        message: any of the protocol's; its tensors are in their wire format already.

    Returns:
        The envelope, with its checksum.
    """
    values = dict(message.__dict__)
    head = {k: v for k, v in values.items() if k not in _IN_PARTS}
    parts = {k: codec.pack(values[k]) for k in _TENSORS if values.get(k) or k in _always(message)}
    if values.get("package"):
        parts["package"] = values["package"]
    if isinstance(message, TrainRequest):
        head["settings"] = asdict(message.settings)
    if isinstance(message, TrainRequest | StatisticsRequest):
        for i, patch in enumerate(message.patches):
            parts[f"patch.{i}"] = patch.to_bytes()
        head["patches"] = [[p.source, p.target, p.fmt] for p in message.patches]
    text = json.dumps({"protocol": PROTOCOL} | head, separators=(",", ":"))
    kind = _KIND_OF[type(message)]
    return Envelope(kind, text, parts, checksum(kind, text, parts))


def _always(message: Message | type) -> tuple[str, ...]:
    """Parts that a message of this kind has even where they are empty."""
    cls = message if isinstance(message, type) else type(message)
    return tuple(f.name for f in fields(cls) if f.name in _TENSORS and f.name not in _OPTIONAL)


def open_envelope(envelope: Envelope) -> Message:
    """Envelope → message.

    Every field has the type its message declares; whether its value makes sense is for
    `validate` (replies) and the digests (packages, patches) to say.

    Args:
        envelope: as it came.

    Returns:
        The message, its tensors still in their wire format.

    Raises:
        ReplyError: it is damaged, malformed or of another protocol.
    """
    kind, parts = envelope.kind, envelope.parts
    if envelope.check != checksum(kind, envelope.head, parts):
        raise ReplyError("the message was damaged on its way (checksum)")
    cls = _KINDS.get(kind)
    if cls is None:
        raise ReplyError(f"unknown message kind {kind[:40]!r}")
    head = _read_head(envelope.head)
    protocol = head.pop("protocol", None)
    if type(protocol) is not int or protocol != PROTOCOL:
        raise ReplyError(
            f"version mismatch: the message speaks protocol {str(protocol)[:40]!r}, "
            f"this side {PROTOCOL}"
        )
    _check_fields(cls, head)
    needed = list(_always(cls))
    if issubclass(cls, TrainRequest):
        head["settings"] = _settings(head["settings"])
    if issubclass(cls, TrainRequest | StatisticsRequest):
        names = [f"patch.{i}" for i in range(len(head["patches"]))]
        heads = ("head",) if issubclass(cls, StatisticsRequest) else ()
        _check_parts(parts, [*needed, *names], optional=("package", *heads))
        head["patches"] = tuple(
            Patch(source, target, fmt, codec.unpack(parts[name]))
            for (source, target, fmt), name in zip(head["patches"], names, strict=True)
        )
        head["package"] = parts.get("package", b"")
    else:
        _check_parts(parts, needed, optional=("counts", "merging") if cls is TrainReply else ())
    head |= {name: codec.unpack(parts[name]) for name in _TENSORS if name in parts}
    for name in ("have", "lacks", "alive", "answered", "dropped"):
        if head.get(name) is not None:
            head[name] = tuple(head[name])
    message: Message = cls(**head)
    return message


def _read_head(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            raise ReplyError("message head is malformed (a key is there twice)")
        return out

    if len(text) > _MAX_HEAD:
        raise ReplyError(f"message head is malformed ({len(text)} characters long)")
    try:
        head = json.loads(text, object_pairs_hook=unique)
    except ReplyError:
        raise
    except (ValueError, RecursionError) as error:
        # ValueError: not JSON, or a number with more digits than Python reads.
        raise ReplyError(f"message head is malformed ({type(error).__name__})") from error
    if not isinstance(head, dict):
        raise ReplyError("message head is malformed (no object)")
    return head


def _is_int(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_float(value: Any) -> bool:
    return type(value) is float or _is_int(value)


def _is_text(value: Any, longest: int = 64) -> bool:
    return isinstance(value, str) and len(value) <= longest


def _is_list(value: Any, inner: Callable[[Any], bool], longest: int) -> bool:
    return isinstance(value, list) and len(value) <= longest and all(map(inner, value))


def _is_patch(value: Any) -> bool:
    return _is_list(value, _is_text, 3) and len(value) == 3


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 32
        and all(_is_text(k) and _is_float(v) for k, v in value.items())
    )


def _is_means(value: Any) -> bool:
    kinds = {"memory": _is_int, "package": _is_int}
    kinds |= dict.fromkeys(("width", "blocks", "base"), _is_text)
    return isinstance(value, dict) and all(k in kinds and kinds[k](v) for k, v in value.items())


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and _HEX.issuperset(value)


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_CLIENTS


def _by_number(value: Any, inner: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_CLIENTS
        and all(k.isdecimal() and len(k) <= 5 and str(int(k)) == k for k in value)
        and all(map(inner, value.values()))
    )


def _is_keys(value: Any) -> bool:
    return _is_list(value, lambda v: _is_hex(v, 64), 2) and len(value) == 2


_HEX = frozenset("0123456789abcdef")
_MOST_CLIENTS = 100_000  # of one session


# What the head says of each field, by its name; fields that travel as parts are not in it.
_TENSORS = ("adapter", "counts", "merging", "statistics", "head")
_OPTIONAL = ("counts", "merging", "head")  # absent where they are empty
_IN_PARTS = (*_TENSORS, "package")


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text of at most 200 characters", lambda v: _is_text(v, 200)),
    "version": ("a short text", _is_text),
    "digest": ("a sha256", is_digest),
    "have": ("a list of sha256", lambda v: _is_list(v, is_digest, 1000)),
    "lacks": ("nothing or a list of sha256", lambda v: v is None or _is_list(v, is_digest, 10_000)),
    "reason": ("a text", lambda v: _is_text(v, 4000)),
    "round": ("a whole number", _is_int),
    "examples": ("a whole number", _is_int),
    "validation": ("a whole number", _is_int),
    "validation_rows": ("a whole number", _is_int),
    "means": ("memory, package, width, blocks and base", _is_means),
    "private": ("true or false", lambda v: isinstance(v, bool)),
    "validation_sums": ("numbers by name", _is_numbers),
    "steps": ("a whole number", _is_int),
    "seed": ("a whole number", _is_int),
    "width": ("a whole number", _is_int),
    "batch_size": ("a whole number", _is_int),
    "threads": ("a whole number", _is_int),
    "loss": ("a number", _is_float),
    "seconds": ("a number", _is_float),
    "timings": ("numbers by name", _is_numbers),
    "fmt": ("a short text", _is_text),
    "reply_fmt": ("a short text", _is_text),
    "count_rule": ("a short text", _is_text),
    "merging_rule": ("a short text", _is_text),
    "rank": ("a whole number", _is_int),
    "run": ("a short text", _is_text),
    "patches": ("a list of source, target, format", lambda v: _is_list(v, _is_patch, 100_000)),
    "session": ("32 hex digits", lambda v: _is_hex(v, 32)),
    "sealing": ("a public key", lambda v: _is_hex(v, 64)),
    "masking": ("a public key", lambda v: _is_hex(v, 64)),
    "index": ("a client's number", _is_number),
    "threshold": ("a whole number", _is_int),
    "peers": ("two public keys by client", lambda v: _by_number(v, _is_keys)),
    "shares": ("sealed shares by client", lambda v: _by_number(v, lambda x: _is_hex(x, 120))),
    "own": ("a digest", lambda v: _is_hex(v, 64)),
    "own_shares": ("shares by client", lambda v: _by_number(v, lambda x: _is_hex(x, 32))),
    "pair_shares": ("shares by client", lambda v: _by_number(v, lambda x: _is_hex(x, 32))),
    "bits": ("a whole number", _is_int),
    "modulus_bits": ("a whole number", _is_int),
    "reach": ("a number", _is_float),
    "clients": ("a whole number", _is_int),
    "digits": ("a whole number", _is_int),
    "rows": ("a whole number", _is_int),
    "longest": ("a number", _is_float),
    "label": ("a number", _is_float),
    "variance": ("a number", _is_float),
    "alive": ("a list of clients", lambda v: _is_list(v, _is_number, _MOST_CLIENTS)),
    "answered": ("a list of clients", lambda v: _is_list(v, _is_number, _MOST_CLIENTS)),
    "dropped": ("a list of clients", lambda v: _is_list(v, _is_number, _MOST_CLIENTS)),
    "settings": ("an object", lambda v: isinstance(v, dict)),
}


def _check_fields(cls: type, head: Mapping[str, Any]) -> None:
    names = {f.name for f in fields(cls)} - set(_IN_PARTS)
    if head.keys() != names:
        odd = min(head.keys() ^ names)
        side = "unexpected" if odd in head else "missing"
        raise ReplyError(f"message is malformed ({side} field {odd[:40]!r})")
    for name, value in head.items():
        what, good = _TYPES[name]
        if not good(value):
            raise ReplyError(f"message is malformed ({name} is not {what})")


def _settings(raw: Mapping[str, Any]) -> LocalSettings:
    whole = ("batch_size", "epochs", "steps", "threads")
    words = ("factors", "decay", "blocks")
    names = [f.name for f in fields(LocalSettings)]
    checks = dict.fromkeys(whole, _is_int) | dict.fromkeys(words, _is_text)
    checks["checkpointing"] = _is_bool
    if sorted(raw) != sorted(names) or not all(checks.get(k, _is_float)(v) for k, v in raw.items()):
        raise ReplyError("message is malformed (settings)")
    return LocalSettings(**raw)


def _check_parts(parts: Mapping[str, bytes], needed: list[str], optional: tuple[str, ...]) -> None:
    if not set(needed) <= parts.keys() <= {*needed, *optional}:
        odd = min(set(needed) ^ parts.keys() - {*optional})
        raise ReplyError(f"message is malformed (part {odd[:40]!r} is missing or too much)")
