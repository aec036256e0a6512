"""Replies made wrong in every way, and a slow, separate judge of what a good reply is.

The judge shares no code with the package: it reads JSON and safetensors by hand.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fedpft_core.wire.envelope import PROTOCOL, Envelope, checksum
from fedpft_core.wire.validate import Expected

_NUMPY = {
    "F32": np.float32,
    "F16": np.float16,
    "I8": np.int8,
    "U8": np.uint8,
    "I64": np.int64,
    "BF16": np.uint16,
}
# Values put in place of a field of the head; `...` marks raw JSON text.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.0, 1.5, -0.0, 1e308, -1e308, 2**31, 2**53, 2**63 - 1, 2**63,
    -(2**63) - 1, 10**40, "", "a", "b", "0", "\u0000", "\ud800", "x" * 100, "y" * 5000, [], [1],
    ["a"], [[]], {}, {"a": 1}, {"train": None}, {"train": -1.0}, {"train": True},
    {"t" * 100: 1.0}, {str(i): 1.0 for i in range(100)},
]  # fmt: skip
RAW = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-" + "9" * 5000,
    "1" + "0" * 400,
    "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
    '"\\ud800"', "0x10", "01", "+1", "nul", "", "1,", '"',
]  # fmt: skip


def reseal(envelope: Envelope, **changes: Any) -> Envelope:
    """The envelope changed and signed anew, as one who means to deceive would."""
    new = replace(envelope, **changes)
    return replace(new, check=checksum(new.kind, new.head, new.parts))


def flip(data: bytes, at: int, bit: int) -> bytes:
    out = bytearray(data)
    out[at] ^= 1 << bit
    return bytes(out)


def split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of good safetensors bytes."""
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def join(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


# --- ways to spoil -----------------------------------------------------------------------

Spoil = Callable[[Envelope, random.Random], Envelope]


def damage(envelope: Envelope, rng: random.Random) -> Envelope:
    """Something changes on the way; the checksum stays what it was."""
    what = rng.randrange(5)
    if what == 0:
        at = rng.randrange(len(envelope.head))
        new = chr(ord(envelope.head[at]) ^ (1 << rng.randrange(6)))
        return replace(envelope, head=envelope.head[:at] + new + envelope.head[at + 1 :])
    if what == 1:
        return replace(envelope, check=rng.choice(["", "0" * 8, envelope.check[::-1] + "x"]))
    name = rng.choice(sorted(envelope.parts))
    data = envelope.parts[name]
    if what == 2:
        data = data[: rng.randrange(len(data))]
    elif what == 3:
        data += bytes(rng.randrange(1, 9))
    else:
        data = flip(data, rng.randrange(len(data)), rng.randrange(8))
    return replace(envelope, parts=envelope.parts | {name: data})


def bytes_of_a_part(envelope: Envelope, rng: random.Random) -> Envelope:
    """Bits, lengths and cuts in a safetensors blob."""
    name = rng.choice(sorted(envelope.parts))
    data = envelope.parts[name]
    header = 8 + struct.unpack("<Q", data[:8])[0]
    what = rng.randrange(8)
    if what <= 2:
        data = flip(data, rng.randrange(header), rng.randrange(8))
    elif what <= 4:
        data = flip(data, rng.randrange(header, len(data)), rng.randrange(8))
    elif what == 5:
        data = data[: rng.randrange(len(data))]
    elif what == 6:
        data += rng.randbytes(rng.randrange(1, 50))
    else:
        lengths = [
            0,
            1,
            header - 9,
            header - 7,
            len(data),
            2**31,
            2**32,
            2**63 - 1,
            2**63,
            2**64 - 1,
        ]
        data = struct.pack("<Q", rng.choice(lengths)) + data[8:]
    return reseal(envelope, parts=envelope.parts | {name: data})


def header_of_a_part(envelope: Envelope, rng: random.Random) -> Envelope:
    """Names, dtypes, shapes and offsets in a safetensors header."""
    part = rng.choice(sorted(envelope.parts))
    header, data = split(envelope.parts[part])
    name = rng.choice(sorted(header))
    entry = header[name]
    what = rng.randrange(10)
    text: str | None = None
    if what == 0:
        entry["dtype"] = rng.choice([*_NUMPY, "F64", "BOOL", "U64", "F8_E4M3", "", "f32", 3, None])
    elif what == 1:
        entry["shape"] = rng.choice(
            [[], [0], [-1], [1, *entry["shape"]], [*entry["shape"], 1], entry["shape"][::-1],
             [2**62, 4], [2**64], [1.5], ["4"], None, 7, [True]]
        )  # fmt: skip
    elif what == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[0, 4], [end, start], [start, end + 4], [start + 1, end], [-1, 3], [2**63, 2**64], [0],
             None, [start, len(data) + 8], [start, end, end]]
        )  # fmt: skip
    elif what == 3:
        del header[name]
    elif what == 4:
        header[rng.choice(["x", "", "../x", "__metadata__", name + "//scale", "\ud800"])] = entry
    elif what == 5:
        header[name + rng.choice(["x", " ", ".weight"])] = header.pop(name)
    elif what == 6:
        del entry[rng.choice(sorted(entry))]
    elif what == 7:
        entry["more"] = 1
    elif what == 8:
        body = json.dumps(header)[1:-1]
        text = "{" + f"{json.dumps(name)}:{json.dumps(entry)}," + body + "}"
    else:
        text = rng.choice(["{}", "[]", "null", "{", "[" * 5000, '{"a":' * 3000, "\0" * 16])
    return reseal(envelope, parts=envelope.parts | {part: join(text or header, data)})


def values(envelope: Envelope, rng: random.Random) -> Envelope:
    """Numbers in tensors: not finite, huge, negative, of the wrong size."""
    part = rng.choice(sorted(envelope.parts))
    header, data = split(envelope.parts[part])
    name = rng.choice(sorted(header))
    entry = header[name]
    start, end = entry["data_offsets"]
    kind: Any = _NUMPY[entry["dtype"]]
    array = np.frombuffer(data[start:end], dtype=kind).copy()
    at = rng.randrange(len(array))
    if entry["dtype"] == "I64":
        array[at] = rng.choice([-1, -(2**63), 2**63 - 1, 2**48 + 1, 0, 1, int(array[at]) + 10**6])
    elif entry["dtype"] == "BF16":
        array[at] = rng.choice([0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x0001])
    elif entry["dtype"] in ("I8", "U8"):
        array[at] = rng.choice([0, 1, 3, 127, 85])
    else:
        worst = float(np.finfo(kind).max)
        array[at] = rng.choice([math.nan, math.inf, -math.inf, worst, -worst, 1e4, 1e-30, 0.0])
    data = data[:start] + array.tobytes() + data[end:]
    return reseal(envelope, parts=envelope.parts | {part: join(header, data)})


def head_fields(envelope: Envelope, rng: random.Random) -> Envelope:
    """Fields of the head: wrong types, odd values, missing, too many, twice."""
    head = json.loads(envelope.head)
    key = rng.choice(sorted(head))
    what = rng.randrange(6)
    if what <= 1:
        head[key] = rng.choice(ODD)
    elif what == 2:
        del head[key]
    elif what == 3:
        head[rng.choice(["more", "", "__class__", "adapter", "counts", "package"])] = rng.choice(
            ODD
        )
    elif what == 4:
        text = json.dumps(head | {key: "@"}).replace('"@"', rng.choice(RAW))
        return reseal(envelope, head=text)
    else:
        twice = json.dumps({key: rng.choice(ODD)})[1:-1]
        order = [twice, envelope.head[1:-1]]
        rng.shuffle(order)
        return reseal(envelope, head="{" + ",".join(order) + "}")
    return reseal(envelope, head=json.dumps(head))


def whole_head(envelope: Envelope, rng: random.Random) -> Envelope:
    """A head that is something else altogether."""
    if rng.random() < 0.5:
        text = rng.choice([*RAW, *map(json.dumps, ODD), " " * 2**20 + envelope.head])
        return reseal(envelope, head=text)
    at, to = sorted(rng.randrange(len(envelope.head)) for _ in range(2))
    middle = rng.choice(["", "\0", '"', "}", "\\", ":", "1", envelope.head[at:to] * 2])
    return reseal(envelope, head=envelope.head[:at] + middle + envelope.head[to:])


def parts(envelope: Envelope, rng: random.Random) -> Envelope:
    """Parts swapped, dropped, added, far too large; another kind of message."""
    have = dict(envelope.parts)
    what = rng.randrange(5)
    if what == 0:
        del have[rng.choice(sorted(have))]
    elif what == 1:
        new = rng.choice(["package", "patch.0", "adapter.0", "more", "", "\ud800", "Adapter"])
        have[new] = rng.choice([b"", have["adapter"]])
    elif what == 2:
        have[rng.choice(sorted(have))] = bytes(rng.choice([0, 7, 8, 300_000]))
    elif what == 3:
        names = sorted(have)
        have = dict(zip(names, [have[n] for n in reversed(names)], strict=True))
    else:
        kinds = ["train", "hello", "hello-reply", "need", "refusal", "", "x" * 100, "TrainReply"]
        return reseal(envelope, kind=rng.choice(kinds))
    return reseal(envelope, parts=have)


FORGERIES: tuple[Spoil, ...] = (
    bytes_of_a_part,
    header_of_a_part,
    values,
    head_fields,
    whole_head,
    parts,
)


# --- the judge ----------------------------------------------------------------------------


def is_good(
    envelope: Envelope, want: Expected, name: str, announced: int, held_out: int = 0
) -> bool:
    """Whether a reply means something a good client could have meant. fp32 adapters only."""
    try:
        return _good(envelope, want, name, announced, held_out)
    except Exception:
        return False


def _good(envelope: Envelope, want: Expected, name: str, announced: int, held_out: int) -> bool:
    head = json.loads(envelope.head)
    exact = {
        "protocol": PROTOCOL,
        "name": name,
        "round": want.round,
        "digest": want.digest,
        "examples": announced,
        "validation_rows": held_out,
        "fmt": "fp32",
    }
    if any(type(head[k]) is not type(v) or head[k] != v for k, v in exact.items()):
        return False
    if set(head) != {*exact, "steps", "loss", "seconds", "timings", "validation_sums", "private"}:
        return False
    if type(head["steps"]) is not int or head["steps"] < 1:
        return False
    if type(head["private"]) is not bool:
        return False
    sums = head["validation_sums"]
    if sums or held_out:
        if set(sums) != {"rows", "correct", "loss"} or sums["rows"] != held_out:
            return False
        if type(sums["correct"]) is not int or sums["correct"] not in range(held_out + 1):
            return False
        if not 0 <= sums["loss"] < math.inf:
            return False
    numbers = [head["loss"], head["seconds"], *head["timings"].values()]
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers):
        return False
    adapter = read(envelope.parts["adapter"])
    if {k: v.shape for k, v in adapter.items()} != {
        k: tuple(t.shape) for k, t in want.adapter.items()
    }:
        return False
    if any(v.dtype != np.float32 for v in adapter.values()):
        return False
    total = sum(
        (float(a) - float(b)) ** 2
        for k, v in adapter.items()
        for a, b in zip(v.ravel(), want.adapter[k].numpy().ravel(), strict=True)
    )
    if not total <= want.max_update_norm**2 * (1 + 1e-9):
        return False
    blocks = {f"{b}": k for b, k in want.count_blocks.items()}
    if not blocks:
        return set(envelope.parts) == {"adapter"}
    counts = read(envelope.parts["counts"])
    if set(envelope.parts) != {"adapter", "counts"}:
        return False
    if set(counts) != {*blocks, *(f"{b}/tokens" for b in blocks)}:
        return False
    if any(v.dtype != np.int64 for v in counts.values()):
        return False
    for block, k in blocks.items():
        c, n = counts[block], counts[f"{block}/tokens"]
        if c.shape != (k,) or n.shape != (1,):
            return False
        tokens = int(n[0])
        if not 0 < tokens <= announced * want.tokens_per_row:
            return False
        if not all(0 <= int(v) <= tokens for v in c):
            return False
    return True


def read(blob: bytes) -> dict[str, np.ndarray]:
    """safetensors by hand."""
    header, data = split(blob)
    header.pop("__metadata__", None)
    out, used = {}, 0
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        array = np.frombuffer(data[start:end], dtype=_NUMPY[entry["dtype"]])
        out[name] = array.reshape(entry["shape"])
        used += end - start
    if used != len(data):
        raise ValueError("gaps")
    return out
