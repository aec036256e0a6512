"""Wire formats: what each keeps, what each costs, and error feedback."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.wire import codec

ROOT = Path(__file__).parents[2]
# Largest error relative to the largest magnitude of the row (int8) or to the value (casts).
RELATIVE = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-10}
shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    data = codec.pack(tensors)
    back = codec.unpack(data)
    assert codec.pack(back) == data
    return back


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10**6), st.sampled_from(sorted(RELATIVE)))
def test_casts_keep_every_value_to_their_precision(
    shape: tuple[int, ...], seed: int, fmt: str
) -> None:
    t = {"w": draw(shape, seed), "n": torch.arange(3)}
    back = codec.decode(through_bytes(codec.encode(t, fmt)), fmt)
    assert back["w"].dtype == torch.float32 and back["w"].shape == t["w"].shape
    error = (back["w"] - t["w"]).abs()
    assert bool((error <= RELATIVE[fmt] * t["w"].abs() + 1e-7 * (fmt == "fp16")).all())
    assert torch.equal(back["n"], t["n"])


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10**6))
def test_int8_is_within_half_a_step_of_its_row(shape: tuple[int, ...], seed: int) -> None:
    """A row, or a column where these are fewer; a scale has 8 bits, so a step is 1/256 longer."""
    t = draw(shape, seed)
    wire = codec.encode({"w": t}, "int8")
    back = codec.decode(through_bytes(wire), "int8")["w"]
    assert back.shape == t.shape
    tall = len(shape) == 2 and shape[0] > shape[1]
    rows = t.T if tall else t.reshape(shape[0] if len(shape) > 1 else 1, -1)
    assert wire["//scale"].numel() == len(rows)
    half = rows.abs().amax(1, keepdim=True) / 127 / 2
    got = back.T if tall else back.reshape(rows.shape)
    assert bool(((got - rows).abs() <= half * (1 + 2**-8) * 1.001).all())


def test_scales_go_with_their_tensors_whatever_the_order() -> None:
    each = {
        "b": draw((3, 40), 0),
        "a": draw((40, 3), 1, 100.0),
        "c": draw((5,), 2),
        "n": draw((), 3),
    }
    wire = codec.encode(each, "int8")
    assert wire["//scale"].shape == (3 + 3 + 1 + 1,) and wire["//scale"].dtype == torch.bfloat16
    back = codec.decode(through_bytes(wire), "int8")
    for name, t in each.items():
        alone = codec.decode(codec.encode({name: t}, "int8"), "int8")[name]
        assert torch.equal(back[name], alone)
    more = torch.cat([wire["//scale"], wire["//scale"][:1]])
    for scale in (more, wire["//scale"].float(), wire["//scale"][:, None]):
        with pytest.raises(ReplyError, match="bfloat16 scales"):
            codec.decode(wire | {"//scale": scale}, "int8")


def test_a_row_of_zeros_survives_int8() -> None:
    t = torch.zeros(2, 3)
    assert torch.equal(codec.decode(codec.encode({"w": t}, "int8"), "int8")["w"], t)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(0, 10**6))
def test_ternary_matches_its_definition_value_by_value(shape: tuple[int, ...], seed: int) -> None:
    """Against the rule written out with Python loops."""
    base, change = draw(shape, seed), draw(shape, seed + 1, 0.1)
    wire, left = codec.encode_update({"w": base + change}, {"w": base}, {}, "ternary")
    back = codec.decode_update(through_bytes(wire), {"w": base}, "ternary")["w"]
    exact = (base + change) - base
    rows = exact.reshape(shape[0], -1) if len(shape) > 1 else exact.reshape(1, -1)
    tall = rows.shape[0] > rows.shape[1]
    groups = (rows.T if tall else rows).tolist()
    want = []
    for group in groups:
        threshold = 0.7 * math.fsum(abs(v) for v in group) / len(group)
        large = [abs(v) for v in group if abs(v) > threshold]
        scale = math.fsum(large) / max(1, len(large))
        want.append([math.copysign(scale, v) if abs(v) > threshold else 0.0 for v in group])
    wanted = torch.tensor(want)
    wanted = (wanted.T if tall else wanted).reshape(shape)
    assert torch.allclose(back - base, wanted, atol=1e-6)
    assert torch.allclose(left["w"], exact - wanted, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 10**6))
def test_ternary_costs_two_bits_a_value_and_one_scale_a_group(
    shape: tuple[int, ...], seed: int
) -> None:
    base = {"w": draw(shape, seed)}
    wire, _ = codec.encode_update({"w": base["w"] + 1}, base, {}, "ternary")
    count = base["w"].numel()
    groups = min(shape[0], count // shape[0]) if len(shape) > 1 else 1
    assert wire["w"].dtype == torch.uint8 and wire["w"].shape == (math.ceil(count / 4),)
    assert wire["w//scale"].shape == (groups,)
    assert codec.layout_bytes(codec.update_layout(base, "ternary")) == math.ceil(count / 4) + (
        4 * groups
    )


@pytest.mark.parametrize("fmt", codec.UPDATE_FORMATS)
def test_layout_is_what_encoding_gives(fmt: str) -> None:
    base = {"a": draw((2, 9), 0), "b": draw((9, 2), 1), "c": draw((3,), 2), "d": draw((), 3)}
    new = {k: t + 0.1 for k, t in base.items()}
    wire, _ = codec.encode_update(new, base, {}, fmt)
    layout = codec.update_layout(base, fmt)
    assert layout == {k: (t.dtype, tuple(t.shape)) for k, t in wire.items()}
    assert codec.layout_bytes(layout) == sum(t.numel() * t.element_size() for t in wire.values())


def test_error_feedback_loses_nothing_over_rounds() -> None:
    """What arrives over many rounds is what was trained, but for one bounded residual."""
    base = {"w": torch.zeros(4, 16)}
    steps = [draw((4, 16), seed, 0.1) for seed in range(300)]
    arrived, residual, memoryless = base, {}, base
    for step in steps:
        wire, residual = codec.encode_update(
            {"w": arrived["w"] + step}, arrived, residual, "ternary"
        )
        arrived = codec.decode_update(wire, arrived, "ternary")
        wire, _ = codec.encode_update({"w": memoryless["w"] + step}, memoryless, {}, "ternary")
        memoryless = codec.decode_update(wire, memoryless, "ternary")
    total = sum(steps)
    with_feedback = float((arrived["w"] + residual["w"] - total).abs().max())
    assert with_feedback < 1e-4
    assert float(residual["w"].abs().max()) < 1.0
    # Without it, rounding errors pile up.
    assert float((memoryless["w"] - total).norm()) > 3 * float((arrived["w"] - total).norm())


def test_ternary_is_deterministic() -> None:
    base, new = {"w": draw((8, 40), 0)}, {"w": draw((8, 40), 1)}
    residual = {"w": draw((8, 40), 2, 0.1)}
    first = codec.encode_update(new, base, residual, "ternary")
    again = codec.encode_update(new, base, residual, "ternary")
    assert codec.pack(first[0]) == codec.pack(again[0])
    assert torch.equal(first[1]["w"], again[1]["w"])


def test_formats_with_values_leave_no_residual() -> None:
    base, new = {"w": draw((2, 3), 0)}, {"w": draw((2, 3), 1)}
    for fmt in codec.FORMATS:
        wire, left = codec.encode_update(new, base, {}, fmt)
        assert not left
        assert torch.equal(codec.decode_update(wire, base, fmt)["w"], codec.decode(wire, fmt)["w"])


def spoilt(**changes: Tensor) -> dict[str, Tensor]:
    base = {"w": draw((2, 5), 0)}
    wire, _ = codec.encode_update({"w": base["w"] + 1}, base, {}, "ternary")
    return wire | {k.replace("scale", "w//scale"): v for k, v in changes.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        spoilt(w=torch.tensor([0b11, 0, 0], dtype=torch.uint8)),  # a code that means nothing
        spoilt(w=torch.tensor([0, 0, 0b10000], dtype=torch.uint8)),  # padding that is not zero
        spoilt(w=torch.zeros(4, dtype=torch.uint8)),
        spoilt(scale=torch.tensor([-1.0, 1.0])),
        spoilt(scale=torch.tensor([math.nan, 1.0])),
        spoilt(scale=torch.tensor([1.0])),
        {"w": torch.zeros(3, dtype=torch.uint8)},
    ],
)
def test_what_is_not_ternary_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ReplyError):
        codec.decode_update(tensors, {"w": draw((2, 5), 0)}, "ternary")


def test_decode_refuses_another_format_than_agreed() -> None:
    t = {"w": draw((2, 3), 0)}
    with pytest.raises(ReplyError, match="not the agreed fp16"):
        codec.decode(codec.encode(t, "fp32"), "fp16")
    with pytest.raises(ReplyError, match="bfloat16 scales"):
        codec.decode({"w": torch.zeros(2, 3, dtype=torch.int8)}, "int8")
    with pytest.raises(ReplyError, match="unknown format"):
        codec.decode(t, "zip")


def test_packing_depends_on_nothing_but_the_tensors() -> None:
    a, b = draw((2, 3), 0), draw((3, 2), 1)
    assert codec.pack({"a": a, "b": b}) == codec.pack({"b": b.clone(), "a": a.T.clone().T})


def test_bytes_that_are_no_safetensors_are_refused() -> None:
    for data in (b"", b"\0" * 8, b"\xff" * 64, b'\x02\0\0\0\0\0\0\0{"', b"PK\x03\x04" + b"a" * 50):
        with pytest.raises(ReplyError, match="not safetensors"):
            codec.unpack(data)


def test_the_table_of_sizes_can_be_made() -> None:
    out = subprocess.run(
        [sys.executable, "benchmarks/wire_sizes.py", "--width=8", "--blocks=2", "--rank=2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True, timeout=120,
    ).stdout  # fmt: skip
    for fmt in codec.UPDATE_FORMATS:
        assert f"| {fmt} |" in out
