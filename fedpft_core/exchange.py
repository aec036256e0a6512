"""What crosses the network, as plain values; how replies are validated and averaged.

Every message is a small JSON `head` and named byte parts (`package`, `patch.N`, `adapter`,
`counts`), each one safetensors blob: its length is exactly what the byte ledger counts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import codec
from .errors import ReplyError
from .training import Counts, LocalSettings

Tensors = dict[str, Tensor]
PROTOCOL = 1


# --- identity of a package ----------------------------------------------------------------


def tensor_digest(t: Tensor) -> str:
    """sha256 over dtype, shape and bytes of one tensor."""
    t = t.detach().cpu().contiguous()
    head = f"{str(t.dtype)}{list(t.shape)}|".encode()
    h = hashlib.sha256(head)
    h.update(t.reshape(-1).view(torch.uint8).numpy())
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
        meta = tensors.pop("//meta", None)
        if meta is None:
            raise ReplyError("package without metadata")
        files = {}
        for name in [k for k in tensors if k.startswith("//file/")]:
            files[name.removeprefix("//file/")] = tensors.pop(name).numpy().tobytes()
        if any("/" in name or name.startswith(".") for name in files):
            raise ReplyError("package with a file name that is a path")
        return Package(meta.numpy().tobytes().decode(), files, tensors)


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
        out: dict[int, tuple[Tensor, Tensors]] = {}
        flat = codec.decode(self.tensors, self.fmt)
        for name, t in flat.items():
            block, _, part = name.partition("/")
            index, parts = out.setdefault(int(block), (torch.empty(0, dtype=torch.int64), {}))
            if part == "index":
                out[int(block)] = (t, parts)
            else:
                parts[part] = t
        return out

    def to_bytes(self) -> bytes:
        return codec.pack(self.tensors)


# --- messages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """First query: who are you, how many rows do you hold, which sub-FMs do you have?"""


@dataclass(frozen=True)
class HelloReply:
    """`name` is the node's stable name; `have` the digests in its own store."""

    name: str
    examples: int
    have: tuple[str, ...] = ()
    version: str = ""


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
    """A message ready to travel: JSON head and byte parts."""

    kind: str
    head: str
    parts: dict[str, bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes by ledger kind: package, patch, adapter, counts, control."""
        out = {"control": len(self.head.encode())}
        for name, data in self.parts.items():
            kind = name.partition(".")[0]
            out[kind] = out.get(kind, 0) + len(data)
        return out


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
        head |= {
            "round": message.round,
            "digest": message.digest,
            "fmt": message.fmt,
            "settings": asdict(message.settings),
            "seed": message.seed,
            "count_rule": message.count_rule,
            "patches": [[p.source, p.target, p.fmt] for p in message.patches],
        }
    elif isinstance(message, TrainReply):
        parts["adapter"] = codec.pack(message.adapter)
        if message.counts:
            parts["counts"] = codec.pack(message.counts)
        drop = ("adapter", "counts")
        head |= {k: v for k, v in message.__dict__.items() if k not in drop}
    else:
        head |= asdict(message)
    return Envelope(_KIND_OF[type(message)], json.dumps(head, separators=(",", ":")), parts)


def open_envelope(envelope: Envelope) -> Message:
    """Envelope → message. Raises ReplyError when it is malformed or of another protocol."""
    cls = _KINDS.get(envelope.kind)
    if cls is None:
        raise ReplyError(f"unknown message kind {envelope.kind!r}")
    try:
        head = json.loads(envelope.head)
        protocol = head.pop("protocol")
    except (json.JSONDecodeError, KeyError, AttributeError, RecursionError) as error:
        raise ReplyError(f"message head is malformed ({type(error).__name__})") from error
    if protocol != PROTOCOL:
        raise ReplyError(
            f"version mismatch: the message speaks protocol {protocol!r}, this side {PROTOCOL}"
        )
    parts = envelope.parts
    try:
        if cls is TrainRequest:
            head["settings"] = LocalSettings(**head["settings"])
            head["patches"] = tuple(
                Patch(*ids, codec.unpack(parts[f"patch.{i}"]))
                for i, ids in enumerate(head["patches"])
            )
            return TrainRequest(
                adapter=codec.unpack(parts["adapter"]), package=parts.get("package", b""), **head
            )
        if cls is TrainReply:
            counts = codec.unpack(parts["counts"]) if "counts" in parts else {}
            return TrainReply(adapter=codec.unpack(parts["adapter"]), counts=counts, **head)
        if "have" in head:
            head["have"] = tuple(head["have"])
        message: Message = cls(**head)
        return message
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"message is malformed ({error})") from error


# --- validation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like."""

    round: int
    digest: str
    fmt: str
    adapter: Mapping[str, Tensor]  # the adapter that was sent, float32
    max_update_norm: float
    count_blocks: Mapping[int, int]  # pruned block → neurons K; empty when no counts are asked


def _is_number(value: Any, low: float, kind: tuple[type, ...] = (int, float)) -> bool:
    return (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= low
    )


def validate(
    reply: TrainReply, want: Expected, name: str, announced: int
) -> tuple[Tensors, Counts | None]:
    """Check one reply from the node `name` against what was asked of it.

    Returns the float32 adapter and the counts. Raises ReplyError with the first check failed:
    identity, numbers, format, keys, shapes, finiteness, size of the change, counts.
    """
    if reply.name != name:
        raise ReplyError(f"the reply is signed {str(reply.name)[:40]!r}, not {name!r}")
    if reply.round != want.round or isinstance(reply.round, bool):
        raise ReplyError(f"the reply is for round {reply.round!r}, not {want.round}")
    if reply.digest != want.digest:
        raise ReplyError("the reply was trained on another sub-FM than the one asked for")
    if not _is_number(reply.examples, 1, (int,)):
        raise ReplyError(f"example count {reply.examples!r} is not a positive whole number")
    if reply.examples != announced:
        raise ReplyError(f"example count {reply.examples} is not the {announced} announced")
    if not _is_number(reply.steps, 1, (int,)):
        raise ReplyError(f"step count {reply.steps!r} is not a positive whole number")
    if not _is_number(reply.loss, 0) or not _is_number(reply.seconds, 0):
        raise ReplyError("loss or seconds is not a finite number of at least 0")
    if not isinstance(reply.timings, dict) or not all(
        isinstance(k, str) and _is_number(v, 0) for k, v in reply.timings.items()
    ):
        raise ReplyError("timings are not finite numbers of at least 0")
    if reply.fmt != want.fmt:
        raise ReplyError(f"the adapter is in format {reply.fmt!r}, not {want.fmt}")
    wanted = codec.encode(want.adapter, want.fmt)
    if reply.adapter.keys() != wanted.keys():
        odd = sorted(reply.adapter.keys() ^ wanted.keys())[0]
        side = "unexpected" if odd in reply.adapter else "missing"
        raise ReplyError(f"{side} adapter tensor {odd[:120]!r}")
    for key, t in reply.adapter.items():
        if t.dtype != wanted[key].dtype or t.shape != wanted[key].shape:
            raise ReplyError(
                f"adapter tensor {key} is {str(t.dtype)[6:]}{list(t.shape)}, not "
                f"{str(wanted[key].dtype)[6:]}{list(wanted[key].shape)}"
            )
    adapter = codec.decode(reply.adapter, want.fmt)
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
        # An upper bound keeps sums over many clients far from int64's limit.
        if not 0 < total < 2**48 or int(c.min()) < 0 or int(c.max()) > total:
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
