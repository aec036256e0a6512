"""What crosses the network, as plain values; how replies are validated and averaged.

Every message is a small JSON `head` and named byte parts (`package`, `patch.N`, `adapter`,
`counts`), each one safetensors blob: its length is exactly what the byte ledger counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.train.tune import Counts, LocalSettings
from fedpft_core.wire import codec

Tensors = dict[str, Tensor]
PROTOCOL = 2
_MAX_HEAD = 2**20  # characters; real heads have well under a thousand per patch
_SLACK = 2**16  # bytes a reply may have beyond its tensors: head, safetensors headers


# --- identity of a package ----------------------------------------------------------------


def tensor_digest(t: Tensor) -> str:
    """sha256 over dtype, shape and bytes of one tensor."""
    t = t.detach().cpu().contiguous()
    head = f"{t.dtype}{list(t.shape)}|".encode()
    h = hashlib.sha256(head)
    h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def combine_digest(meta: str, files: Mapping[str, bytes], tensors: Mapping[str, str]) -> str:
    """The digest of a package from its metadata, files and per-tensor digests.

    A hash of hashes, so that after a patch only the tensors it touched are hashed again.
    """
    h = hashlib.sha256(meta.encode())
    for name in sorted(files):
        h.update(f"\n{name} {hashlib.sha256(files[name]).hexdigest()}".encode())
    for name in sorted(tensors):
        h.update(f"\n{name} {tensors[name]}".encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Package:
    """All a client needs: sub-FM weights, plan, model config, tokenizer files, label names.

    `meta` is JSON: plan, model_config, adapter (spec), kind, labels, max_length. Weights leave
    out what belongs to the adapter.
    """

    meta: str
    files: dict[str, bytes]
    weights: Tensors

    def digest(self) -> str:
        return combine_digest(
            self.meta, self.files, {k: tensor_digest(t) for k, t in self.weights.items()}
        )

    def to_bytes(self) -> bytes:
        """One safetensors blob: weights by name, metadata and files as uint8 tensors."""
        extra = {"//meta": self.meta.encode()} | {f"//file/{k}": v for k, v in self.files.items()}
        blobs = {k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in extra.items()}
        return codec.pack(self.weights | blobs)

    @staticmethod
    def from_bytes(data: bytes) -> Package:
        """Raises ReplyError when the bytes are no package."""
        tensors = codec.unpack(data)
        blobs = {k: tensors.pop(k) for k in list(tensors) if k.startswith("//")}
        if any(t.dtype != torch.uint8 for t in blobs.values()) or "//meta" not in blobs:
            raise ReplyError("package without metadata, or with files that are not bytes")
        meta = blobs.pop("//meta").numpy().tobytes()
        files = {k.removeprefix("//file/"): t.numpy().tobytes() for k, t in blobs.items()}
        if any(not k or "/" in k or "\\" in k or "\0" in k or k.startswith(".") for k in files):
            raise ReplyError("package with a file name that is a path")
        try:
            return Package(meta.decode(), files, tensors)
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
        """Per FM block: positions and float32 parts. Raises ReplyError when malformed."""
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
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        # Asked for once per client and round, to measure a chain and to send it.
        return codec.pack(self.tensors)


# --- messages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """First query: who are you, how many rows do you hold, which sub-FMs do you have?"""


@dataclass(frozen=True)
class HelloReply:
    """`name` is the node's stable name; `have` the digests in its own store.

    `examples` are the rows it trains on, `validation` those it keeps from training.
    """

    name: str
    examples: int
    have: tuple[str, ...] = ()
    version: str = ""
    validation: int = 0


@dataclass(frozen=True)
class TrainRequest:
    """One round's work. `package` or `patches` bring the client to `digest` if it is not there."""

    round: int
    digest: str
    adapter: Tensors  # in wire format `fmt`
    fmt: str
    settings: LocalSettings
    seed: int
    count_rule: str = ""  # non-empty: also count inactive neurons by this rule
    package: bytes = b""
    patches: tuple[Patch, ...] = ()
    reply_fmt: str = ""  # format of the reply's adapter; empty = `fmt`
    run: str = ""  # names the run to what a client keeps between its rounds; 16 hex digits


@dataclass(frozen=True)
class TrainReply:
    """What a client sends back after a round."""

    name: str
    round: int
    digest: str
    examples: int
    steps: int
    loss: float
    seconds: float
    adapter: Tensors
    fmt: str
    counts: Tensors = field(default_factory=dict)  # `{block}` int64 [K], `{block}/tokens` [1]
    timings: dict[str, float] = field(default_factory=dict)
    validation_rows: int = 0  # rows kept from training …
    validation_correct: int = 0  # … that the sub-FM with the adapter *received* labels right


@dataclass(frozen=True)
class NeedReply:
    """The client lacks the sub-FM it should train on; `have` is what it could start from."""

    name: str
    digest: str
    have: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefusalReply:
    """The client cannot take part, and says why in one sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """No usable reply: Flower reported an error, or the round's time was up."""

    reason: str


Message = Hello | HelloReply | TrainRequest | TrainReply | NeedReply | RefusalReply


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

    def sizes(self) -> dict[str, int]:
        """Bytes by ledger kind: package, patch, adapter, counts, control."""
        out = {"control": len(_bytes(self.head)) + len(_bytes(self.check))}
        for name, data in self.parts.items():
            kind = name.partition(".")[0]
            # A part nobody asked for must not make up a kind of its own.
            kind = kind if kind in _PART_KINDS else "control"
            out[kind] = out.get(kind, 0) + len(data)
        return out


_PART_KINDS = ("package", "patch", "adapter", "counts")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def checksum(kind: str, head: str, parts: Mapping[str, bytes]) -> str:
    """CRC-32 over a message's content, 8 hex digits."""
    crc = zlib.crc32(_bytes(f"{kind}\n{head}"))
    for name in sorted(parts):
        crc = zlib.crc32(_bytes(f"\n{name} {len(parts[name])}\n"), crc)
        crc = zlib.crc32(parts[name], crc)
    return f"{crc:08x}"


_KINDS: dict[str, type] = {
    "hello": Hello,
    "hello-reply": HelloReply,
    "train": TrainRequest,
    "train-reply": TrainReply,
    "need": NeedReply,
    "refusal": RefusalReply,
}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


def seal(message: Message) -> Envelope:
    """Message → envelope."""
    parts: dict[str, bytes] = {}
    head: dict[str, Any] = {"protocol": PROTOCOL}
    if isinstance(message, TrainRequest):
        parts["adapter"] = codec.pack(message.adapter)
        if message.package:
            parts["package"] = message.package
        for i, patch in enumerate(message.patches):
            parts[f"patch.{i}"] = patch.to_bytes()
        head |= {k: v for k, v in message.__dict__.items() if k not in _IN_PARTS}
        head["settings"] = asdict(message.settings)
        head["patches"] = [[p.source, p.target, p.fmt] for p in message.patches]
    elif isinstance(message, TrainReply):
        parts["adapter"] = codec.pack(message.adapter)
        if message.counts:
            parts["counts"] = codec.pack(message.counts)
        head |= {k: v for k, v in message.__dict__.items() if k not in _IN_PARTS}
    else:
        head |= asdict(message)
    text = json.dumps(head, separators=(",", ":"))
    kind = _KIND_OF[type(message)]
    return Envelope(kind, text, parts, checksum(kind, text, parts))


def open_envelope(envelope: Envelope) -> Message:
    """Envelope → message. Raises ReplyError when it is damaged, malformed or of another protocol.

    Every field has the type its message declares; whether its value makes sense is for
    `validate` (replies) and the digests (packages, patches) to say.
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
    if cls is TrainRequest:
        head["settings"] = _settings(head["settings"])
        names = [f"patch.{i}" for i in range(len(head["patches"]))]
        _check_parts(parts, ["adapter", *names], optional="package")
        head["patches"] = tuple(
            Patch(source, target, fmt, codec.unpack(parts[name]))
            for (source, target, fmt), name in zip(head["patches"], names, strict=True)
        )
        package = parts.get("package", b"")
        return TrainRequest(adapter=codec.unpack(parts["adapter"]), package=package, **head)
    if cls is TrainReply:
        _check_parts(parts, ["adapter"], optional="counts")
        counts = codec.unpack(parts["counts"]) if "counts" in parts else {}
        return TrainReply(adapter=codec.unpack(parts["adapter"]), counts=counts, **head)
    _check_parts(parts, [])
    if "have" in head:
        head["have"] = tuple(head["have"])
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


def _is_float(value: Any) -> bool:
    return type(value) is float or _is_int(value)


def _is_text(value: Any, longest: int = 64) -> bool:
    return isinstance(value, str) and len(value) <= longest


def is_digest(value: Any) -> bool:
    """Whether a value is a sha256 in hex."""
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


_HEX = frozenset("0123456789abcdef")


def _is_list(value: Any, inner: Callable[[Any], bool], longest: int) -> bool:
    return isinstance(value, list) and len(value) <= longest and all(map(inner, value))


def _is_patch(value: Any) -> bool:
    return _is_list(value, _is_text, 3) and len(value) == 3


def _is_timings(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 32
        and all(_is_text(k) and _is_float(v) for k, v in value.items())
    )


# What the head says of each field, by its name; fields that travel as parts are not in it.
_IN_PARTS = ("adapter", "counts", "package")
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text of at most 200 characters", lambda v: _is_text(v, 200)),
    "version": ("a short text", _is_text),
    "digest": ("a sha256", is_digest),
    "have": ("a list of sha256", lambda v: _is_list(v, is_digest, 1000)),
    "reason": ("a text", lambda v: _is_text(v, 4000)),
    "round": ("a whole number", _is_int),
    "examples": ("a whole number", _is_int),
    "validation": ("a whole number", _is_int),
    "validation_rows": ("a whole number", _is_int),
    "validation_correct": ("a whole number", _is_int),
    "steps": ("a whole number", _is_int),
    "seed": ("a whole number", _is_int),
    "loss": ("a number", _is_float),
    "seconds": ("a number", _is_float),
    "timings": ("numbers by name", _is_timings),
    "fmt": ("a short text", _is_text),
    "reply_fmt": ("a short text", _is_text),
    "count_rule": ("a short text", _is_text),
    "run": ("a short text", _is_text),
    "patches": ("a list of source, target, format", lambda v: _is_list(v, _is_patch, 100_000)),
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
    names = [f.name for f in fields(LocalSettings)]
    if sorted(raw) != sorted(names) or not all(
        (_is_int if k in whole else _is_float)(v) for k, v in raw.items()
    ):
        raise ReplyError("message is malformed (settings)")
    return LocalSettings(**raw)


def _check_parts(parts: Mapping[str, bytes], needed: list[str], optional: str = "") -> None:
    if not set(needed) <= parts.keys() <= {*needed, optional}:
        odd = min(set(needed) ^ parts.keys() - {optional})
        raise ReplyError(f"message is malformed (part {odd[:40]!r} is missing or too much)")


# --- validation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like."""

    round: int
    digest: str
    fmt: str  # of the reply's adapter
    adapter: Mapping[str, Tensor]  # float32, as the clients decoded it
    max_update_norm: float
    count_blocks: Mapping[int, int]  # pruned block → neurons K; empty when no counts are asked
    tokens_per_row: int = 2**16  # the most real tokens one example can have

    @cached_property
    def layout(self) -> codec.Layout:
        """Names, dtypes and shapes of the reply's adapter."""
        return codec.update_layout(self.adapter, self.fmt)

    @cached_property
    def max_bytes(self) -> int:
        """The largest reply that can be good: its tensors, their names, and some slack."""
        counts = sum(8 * k + 8 for k in self.count_blocks.values())
        names = sum(len(name) + 100 for name in self.layout) + 250 * len(self.count_blocks)
        return codec.layout_bytes(self.layout) + counts + names + _SLACK


def check_size(envelope: Envelope, most: int) -> None:
    """Refuse a reply by its size, before anything in it is parsed. Raises ReplyError."""
    size = sum(envelope.sizes().values())
    if size > most:
        raise ReplyError(f"the reply has {size} bytes, more than the {most} a good one can have")


def _at_least(value: float, low: float) -> bool:
    # Compared as they are: a huge int would overflow a conversion to float.
    return low <= value < math.inf


def validate(
    reply: TrainReply, want: Expected, name: str, announced: int, held_out: int = 0
) -> tuple[Tensors, Counts | None]:
    """Check one reply from the node `name` against what was asked of it, and against the numbers
    of training and of held-out rows it announced.

    Returns the float32 adapter and the counts. Raises ReplyError with the first check failed:
    identity, numbers, format, keys, shapes, finiteness, size of the change, counts. The types
    of the plain fields are those `open_envelope` guarantees.
    """
    if reply.name != name:
        raise ReplyError(f"the reply is signed {reply.name[:40]!r}, not {name!r}")
    if reply.round != want.round:
        raise ReplyError(f"the reply is for round {reply.round}, not {want.round}")
    if reply.digest != want.digest:
        raise ReplyError("the reply was trained on another sub-FM than the one asked for")
    if reply.examples < 1:
        raise ReplyError(f"example count {reply.examples} is not positive")
    if reply.examples != announced:
        raise ReplyError(f"example count {reply.examples} is not the {announced} announced")
    if reply.validation_rows != held_out:
        raise ReplyError(
            f"validation row count {reply.validation_rows} is not the {held_out} announced"
        )
    if not 0 <= reply.validation_correct <= reply.validation_rows:
        raise ReplyError(
            f"{reply.validation_correct} of {reply.validation_rows} validation rows cannot be right"
        )
    if reply.steps < 1:
        raise ReplyError(f"step count {reply.steps} is not positive")
    if not _at_least(reply.loss, 0) or not _at_least(reply.seconds, 0):
        raise ReplyError("loss or seconds is not a finite number of at least 0")
    if not all(_at_least(v, 0) for v in reply.timings.values()):
        raise ReplyError("timings are not finite numbers of at least 0")
    if reply.fmt != want.fmt:
        raise ReplyError(f"the adapter is in format {reply.fmt!r}, not {want.fmt}")
    try:
        codec.check_layout(reply.adapter, want.layout)
    except ReplyError as error:
        raise ReplyError(f"adapter: {error}") from error
    adapter = codec.decode_update(reply.adapter, want.adapter, want.fmt)
    change = 0.0
    for key, t in adapter.items():
        # float64: the sum of squares of finite float32 values must not overflow to inf.
        change += float((t.double() - want.adapter[key].double()).square().sum())
    if not math.isfinite(change):
        raise ReplyError("the adapter has values that are not finite")
    if math.sqrt(change) > want.max_update_norm:
        raise ReplyError(
            f"the adapter moved by {math.sqrt(change):.3g}, more than the bound "
            f"wire.max-update-norm = {want.max_update_norm:g}"
        )
    return adapter, _validated_counts(reply, want)


def _validated_counts(reply: TrainReply, want: Expected) -> Counts | None:
    keys = {f"{b}" for b in want.count_blocks} | {f"{b}/tokens" for b in want.count_blocks}
    if reply.counts.keys() != keys:
        raise ReplyError(
            "inactivity counts are missing or not for the pruned blocks"
            if keys
            else "inactivity counts were not asked for"
        )
    if not keys:
        return None
    inactive, tokens = {}, {}
    for block, k in want.count_blocks.items():
        c, n = reply.counts[f"{block}"], reply.counts[f"{block}/tokens"]
        if c.dtype != torch.int64 or c.shape != (k,) or n.dtype != torch.int64 or n.shape != (1,):
            raise ReplyError(f"inactivity counts of block {block} have the wrong type or shape")
        total = int(n)
        # The bounds also keep sums over many clients far from int64's limit.
        if not 0 < total <= min(reply.examples * want.tokens_per_row, 2**48):
            raise ReplyError(
                f"block {block} has counts over {total} tokens, which {reply.examples} examples "
                "cannot have"
            )
        if int(c.min()) < 0 or int(c.max()) > total:
            raise ReplyError(f"inactivity counts of block {block} are not within its token total")
        inactive[block], tokens[block] = c, total
    return Counts(inactive, tokens)


# --- aggregation --------------------------------------------------------------------------


class Average:
    """W ← Σ |D_i| / |D| · W_i in float64 (paper eq. 2); memory is one adapter, not one a client.

    Floating-point sums depend on their order: add in stable-name order for identical bits.
    """

    def __init__(self) -> None:
        self._sum: dict[str, np.ndarray] = {}
        self.examples = 0

    def add(self, adapter: Mapping[str, Tensor], examples: int) -> None:
        for name, t in adapter.items():
            value = t.numpy().astype(np.float64)
            value *= examples
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value
        self.examples += examples

    def result(self) -> Tensors:
        """The weighted mean as float32. Raises ValueError when nothing was added."""
        if not self.examples:
            raise ValueError("nothing to average")
        return {
            k: torch.from_numpy((v / self.examples).astype(np.float32))
            for k, v in self._sum.items()
        }


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """Σ inactive and Σ tokens per block over a round's clients (paper eq. 7)."""
    inactive: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    for c in counts:
        for block, value in c.inactive.items():
            inactive[block] = inactive[block] + value if block in inactive else value.clone()
            tokens[block] = tokens.get(block, 0) + c.tokens[block]
    return Counts(inactive, tokens)


def useful(patches: Sequence[Patch], package_bytes: int) -> list[Patch]:
    """The newest patches that together are smaller than the package; older ones are never sent."""
    out: list[Patch] = []
    size = 0
    for patch in reversed(patches):
        size += len(patch.to_bytes())
        if size >= package_bytes:
            break
        out.insert(0, patch)
    return out


def delivery(
    have: Sequence[str], target: str, package_bytes: int, patches: Sequence[Patch]
) -> tuple[bool, tuple[Patch, ...]]:
    """What brings a client with the sub-FMs `have` to `target`: (package?, patches).

    Nothing when it is there already; the chain of patches when it starts at something the
    client has and is smaller than the package; the package otherwise. `patches` in order.
    """
    if target in have:
        return False, ()
    chain: list[Patch] = []
    want = target
    for patch in reversed(patches):
        if patch.target != want:
            continue
        chain.insert(0, patch)
        want = patch.source
        if want in have:
            small = sum(len(p.to_bytes()) for p in chain) < package_bytes
            return (False, tuple(chain)) if small else (True, ())
    return True, ()
