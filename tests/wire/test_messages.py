"""Packages, patches and envelopes; validation, averaging and delivery; replies made wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from dataclasses import fields, replace
from typing import Any

import corrupt
import fabricate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.proxy.patch import apply_patch
from fedpft_core.train.inactivity import Counts, sum_counts
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import PROTOCOL, Envelope, open_envelope, seal
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.messages import (
    Hello,
    HelloReply,
    NeedReply,
    RefusalReply,
    TrainReply,
    TrainRequest,
)
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.package import Package
from fedpft_core.wire.validate import Expected, check_size, validate
from server_app.delivery import delivery, useful

# Corrupt replies in the default suite; FEDPFT_FUZZ sets another number.
CASES = int(os.environ.get("FEDPFT_FUZZ", "50000"))
SETTINGS = LocalSettings(1e-3, 4, 1, 0, 0.0, 1.0, 1)


def accept(
    envelope: Envelope, want: Expected, name: str = "a", examples: int = 5, held_out: int = 0
) -> tuple[TrainReply, dict[str, Tensor], Counts | None]:
    """What the server does with a reply. Raises ReplyError when it is refused."""
    check_size(envelope, want.max_bytes)
    message = open_envelope(envelope)
    if not isinstance(message, TrainReply):
        raise ReplyError(f"a {type(message).__name__}")
    return (message, *validate(message, want, name, examples, held_out))


# --- packages and patches -----------------------------------------------------------------


def test_a_package_survives_its_bytes() -> None:
    package = fabricate.package()
    back = Package.from_bytes(package.to_bytes())
    assert back.meta == package.meta and back.files == package.files
    assert back.digest() == package.digest()
    assert package.to_bytes() == back.to_bytes()


META = fabricate.package().meta
OTHER_META: dict[str, Any] = {
    "plan": replace(META.plan, fm_neurons=7),
    "adapter": replace(META.adapter, alpha=5.0),
    "model_config": META.model_config | {"seed": 1},  # type: ignore[operator]
    "architecture": "Another",
    "kind": "image",
    "labels": ("x", "z", "y"),
    "max_length": fabricate.MAX_LENGTH + 1,
}


def test_metadata_survive_their_text() -> None:
    assert OTHER_META.keys() == {f.name for f in fields(PackageMeta)}
    for meta in (META, *(replace(META, **{k: v}) for k, v in OTHER_META.items())):
        back = PackageMeta.from_json(meta.to_json())
        assert back == meta and back.to_json() == meta.to_json()


BAD_META: dict[str, tuple[Any, str]] = {
    "plan is no plan": ({"plan": {}}, "plan is wrong"),
    "plan is a text": ({"plan": META.plan.to_json()}, "plan is wrong"),
    "neurons out of order": (
        {"plan": META.plan.as_raw() | {"blocks": [{"state": "pruned", "kept": [2, 1]}]}},
        "kept neurons of block 0",
    ),
    "neurons that are texts": (
        {"plan": META.plan.as_raw() | {"blocks": [{"state": "pruned", "kept": ["1"]}]}},
        "kept neurons of block 0",
    ),
    "width": ({"plan": META.plan.as_raw() | {"fm_neurons": "6"}}, "plan is wrong"),
    "another model's plan": ({"plan": META.plan.as_raw() | {"model_type": "vit"}}, "another kind"),
    "rank": ({"adapter": META.adapter.as_raw() | {"rank": 0}}, "adapter is wrong (the rank"),
    "rank is a truth": ({"adapter": META.adapter.as_raw() | {"rank": True}}, "the rank"),
    "alpha": ({"adapter": META.adapter.as_raw() | {"alpha": math.nan}}, "alpha"),
    "targets": ({"adapter": META.adapter.as_raw() | {"targets": "query"}}, "targets"),
    "modules": ({"adapter": META.adapter.as_raw() | {"modules": [3]}}, "modules"),
    "a field too many": ({"adapter": META.adapter.as_raw() | {"x": 1}}, "adapter is wrong"),
    "config": ({"model_config": []}, "model_config is wrong"),
    "config of nothing": ({"model_config": {"model_type": 3}}, "model_config is wrong"),
    "architecture": ({"architecture": None}, "architecture is wrong"),
    "kind": ({"kind": ["text"]}, "kind is wrong"),
    "labels": ({"labels": 3}, "labels is wrong"),
    "labels that are numbers": ({"labels": [1, 2]}, "labels is wrong"),
    "length": ({"max_length": 0}, "max_length is wrong"),
    "length is a text": ({"max_length": "8"}, "max_length is wrong"),
    "unknown": ({"more": 1}, "unknown field 'more'"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_wrong_metadata_are_named(case: str) -> None:
    change, reason = BAD_META[case]
    with pytest.raises(ReplyError) as found:
        PackageMeta.from_json(json.dumps(META.as_raw() | change))
    assert reason in str(found.value)


def test_metadata_that_are_none() -> None:
    for name in OTHER_META:
        less = {k: v for k, v in META.as_raw().items() if k != name}
        with pytest.raises(ReplyError, match=f"missing field '{name}'"):
            PackageMeta.from_json(json.dumps(less))
    for text in ("", "{", "[]", "3", "null", "[" * 100_000):
        with pytest.raises(ReplyError, match="metadata"):
            PackageMeta.from_json(text)
        with pytest.raises(ReplyError, match=r"metadata|manifest"):
            Package.from_bytes(fabricate.with_metadata(fabricate.package(), text)[1])


def test_a_digest_covers_everything() -> None:
    package = fabricate.package()
    name = sorted(package.weights)[1]
    weight = package.weights[name]
    nudged = weight.clone()
    nudged.view(-1)[0] = torch.nextafter(nudged.view(-1)[0], torch.tensor(math.inf))
    others = [
        *(replace(package, meta=replace(package.meta, **{k: v})) for k, v in OTHER_META.items()),
        replace(package, files={"vocab.txt": b"a\nc\n"}),
        replace(package, files={"vocab2.txt": b"a\nb\n"}),
        replace(package, weights=package.weights | {name: nudged}),
        replace(package, weights=package.weights | {name: weight.reshape(1, *weight.shape)}),
        replace(package, weights=package.weights | {name: weight.view(torch.int32)}),
        replace(package, weights={k: v for k, v in package.weights.items() if k != name}),
    ]
    digests = {package.digest(), *(p.digest() for p in others)}
    assert len(digests) == 1 + len(others)


def test_a_tampered_package_is_refused_or_has_another_digest() -> None:
    package = fabricate.package()
    good, digest = package.to_bytes(), package.digest()
    rng = random.Random(0)
    refused = 0
    for case in range(2000):
        at = rng.randrange(len(good)) if case % 2 else rng.randrange(1200)
        bad = corrupt.flip(good, at, rng.randrange(8))
        try:
            read = Package.from_bytes(bad)
        except ReplyError:
            refused += 1
            continue
        # Spaces that pad the header may change without changing anything.
        assert read.digest() != digest or read.to_bytes() == good
    assert refused > 100


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\\b"])
def test_a_package_cannot_write_outside_its_folder(name: str) -> None:
    package = replace(fabricate.package(), files={name: b"x"})
    with pytest.raises(ReplyError, match="file name"):
        Package.from_bytes(package.to_bytes())


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16"])
def test_a_patch_leads_to_the_digest_it_promises(fmt: str) -> None:
    before = fabricate.package()
    patch, after = fabricate.aligned(before, 1, fmt)
    digests = {k: tensor_digest(t) for k, t in before.weights.items()}
    kept = {k: t.clone() for k, t in before.weights.items()}
    got = apply_patch(before, patch, digests)
    assert got.digest() == patch.target == after.digest() != before.digest()
    assert digests == {k: tensor_digest(t) for k, t in after.weights.items()}
    assert all(torch.equal(kept[k], before.weights[k]) for k in kept)


def test_a_tampered_patch_is_refused_and_leaves_the_package_alone() -> None:
    before = fabricate.package()
    patch, after = fabricate.aligned(before, 1)
    good, rng, refused = patch.to_bytes(), random.Random(1), 0
    digest = before.digest()
    for case in range(2000):
        at = rng.randrange(len(good)) if case % 2 else rng.randrange(1000)
        data = corrupt.flip(good, at, rng.randrange(8))
        digests = {k: tensor_digest(t) for k, t in before.weights.items()}
        try:
            got = apply_patch(before, replace(patch, tensors=codec.unpack(data)), digests)
        except ReplyError:
            refused += 1
            continue
        assert got.digest() == after.digest()
    assert refused > 1900
    assert before.digest() == digest


@pytest.mark.parametrize(
    "change",
    [
        {"1/index": torch.tensor([0, 99])},
        {"1/index": torch.tensor([[0], [2]])},
        {"1/index": torch.tensor([0.0, 2.0])},
        {"1/index": None},
        {"1/in0.weight": torch.zeros(3, 4)},
        {"1/in0.weight": None},
        {"1/norm.weight": torch.zeros(2, 2)},
        {"1/extra.weight": torch.zeros(2)},
        {"7/index": torch.tensor([0]), "7/in0.bias": torch.zeros(1)},
        {"x/index": torch.tensor([0]), "x/in0.bias": torch.zeros(1)},
        {"index": torch.tensor([0])},
        {"1/in0.bias": torch.zeros(2, dtype=torch.float64)},
    ],
)
def test_a_patch_that_does_not_fit_is_refused(change: dict[str, Tensor | None]) -> None:
    before = fabricate.package()
    patch, _ = fabricate.aligned(before, 1)
    tensors = {k: t for k, t in (patch.tensors | change).items() if t is not None}
    digests = {k: tensor_digest(t) for k, t in before.weights.items()}
    with pytest.raises(ReplyError):
        apply_patch(before, replace(patch, tensors=tensors), digests)


# --- delivery -----------------------------------------------------------------------------


def test_delivery_is_the_least_that_will_do() -> None:
    """Every possible holding of a client, against a search over all ways to serve it."""
    state = fabricate.state()
    start = state.digest
    for seed in (1, 2, 3):
        fabricate.align(state, seed)
    versions = [start, *(p.target for p in state.patches)]
    sizes = [len(p.to_bytes()) for p in state.patches]
    package = sum(sizes) - 1  # two patches are smaller than the package, three are not
    for mask in itertools.product((False, True), repeat=4):
        have = [v for v, here in zip(versions, mask, strict=True) if here]
        whole, chain = delivery(have, state.digest, package, state.patches)
        ways = [0] if mask[3] else [sum(sizes[i:]) for i in range(3) if mask[i]] + [package]
        cost = package if whole else sum(len(p.to_bytes()) for p in chain)
        assert cost == min(ways), have
        if chain:
            assert not whole and chain[0].source in have and chain[-1].target == state.digest
            assert all(a.target == b.source for a, b in itertools.pairwise(chain))
    assert delivery(["0" * 64], state.digest, 10**9, state.patches) == (True, ())


def test_patches_that_are_never_sent_are_dropped() -> None:
    state = fabricate.state()
    for seed in range(1, 7):
        fabricate.align(state, seed)
    size = len(state.patches[0].to_bytes())
    assert useful(state.patches, 3 * size) == state.patches[-2:]
    assert useful(state.patches, 10**9) == state.patches
    assert useful(state.patches, 1) == []


# --- envelopes ----------------------------------------------------------------------------


def messages() -> list[Any]:
    state = fabricate.state()
    fabricate.align(state, 1)
    request = TrainRequest(
        3, state.digest, fabricate.adapter(), "fp32", SETTINGS, 7, "nonpositive", b"blob",
        tuple(state.patches), "ternary", "0" * 16,
    )  # fmt: skip
    return [
        Hello(),
        HelloReply("a", 3, ("0" * 64,), "1.0", 2),
        request,
        fabricate.reply(fabricate.expected(), validation=(1, 2)),
        fabricate.reply(fabricate.expected(counted=False)),
        NeedReply("a", "0" * 64, ("1" * 64,)),
        NeedReply("a", "0" * 64, (), ("1" * 64, "2" * 64)),
        RefusalReply("?", "it says: no"),
    ]


@pytest.mark.parametrize("message", messages(), ids=lambda m: type(m).__name__)
def test_messages_survive_their_envelope(message: Any) -> None:
    sealed = seal(message)
    back = open_envelope(sealed)
    assert type(back) is type(message)
    assert seal(back) == sealed
    assert sum(sealed.sizes().values()) == (
        len(sealed.head.encode()) + len(sealed.check) + sum(map(len, sealed.parts.values()))
    )


@pytest.mark.parametrize("message", messages(), ids=lambda m: type(m).__name__)
def test_damage_to_any_message_is_noticed(message: Any) -> None:
    sealed = seal(message)
    rng = random.Random(2)
    for _ in range(100):
        bad = (
            corrupt.damage(sealed, rng)
            if sealed.parts
            else replace(sealed, head=sealed.head + rng.choice(" }\0"))
        )
        with pytest.raises(ReplyError, match="damaged"):
            open_envelope(bad)


def test_another_protocol_is_named() -> None:
    sealed = seal(Hello())
    others = [v for v in range(PROTOCOL + 2) if v != PROTOCOL]
    for version in (*others, str(PROTOCOL), True, float(PROTOCOL), None, [PROTOCOL]):
        head = json.dumps({"protocol": version})
        with pytest.raises(ReplyError, match="version mismatch"):
            open_envelope(corrupt.reseal(sealed, head=head))


def test_a_field_that_is_there_twice_is_refused() -> None:
    sealed = seal(fabricate.reply(fabricate.expected()))
    head = '{"examples":5,' + sealed.head[1:]
    with pytest.raises(ReplyError, match="a key is there twice"):
        open_envelope(corrupt.reseal(sealed, head=head))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(messages()), st.data())
def test_any_json_in_any_field_is_opened_or_refused(message: Any, data: st.DataObject) -> None:
    sealed = seal(message)
    head = json.loads(sealed.head)
    key = data.draw(st.sampled_from(sorted(head)))
    head[key] = data.draw(json_values)
    try:
        back = open_envelope(corrupt.reseal(sealed, head=json.dumps(head)))
    except ReplyError as error:
        str(error).encode("utf-8", "backslashreplace")
    else:
        assert type(back) is type(message)


# --- validation ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", codec.UPDATE_FORMATS)
def test_a_good_reply_is_accepted(fmt: str) -> None:
    want = fabricate.expected(fmt=fmt)
    reply = fabricate.reply(want)
    _, adapter, counts = accept(seal(reply), want)
    assert counts is not None and counts.tokens == dict.fromkeys(fabricate.PLAN.pruned, 35)
    again = codec.decode_update(reply.adapter, want.adapter, fmt)
    assert all(torch.equal(adapter[k], again[k]) for k in want.adapter)
    assert all(adapter[k].dtype == torch.float32 for k in adapter)


def bad(**changes: Any) -> TrainReply:
    return replace(fabricate.reply(fabricate.expected()), **changes)


def with_tensor(name: str, value: Tensor | None) -> TrainReply:
    good = fabricate.reply(fabricate.expected())
    tensors = good.adapter | {name: value}
    return replace(good, adapter={k: t for k, t in tensors.items() if t is not None})


def with_count(name: str, value: list[int] | Tensor) -> TrainReply:
    good = fabricate.reply(fabricate.expected())
    return replace(good, counts=good.counts | {name: torch.as_tensor(value)})


HEAD, sums = "classifier.weight", fabricate.sums
OF_HEAD = (fabricate.CLASSES, fabricate.WIDTH)
# What is wrong → what the server says.
BAD: dict[str, tuple[TrainReply, str]] = {
    "another name": (bad(name="b"), "signed 'b'"),
    "another round": (bad(round=2), "for round 2"),
    "another sub-FM": (bad(digest="0" * 64), "another sub-FM"),
    "no examples": (bad(examples=0), "example count 0 is not positive"),
    "negative examples": (bad(examples=-5), "example count -5 is not positive"),
    "more examples": (bad(examples=6), "not the 5 announced"),
    "validation not announced": (bad(validation_rows=1), "count 1 is not the 0 announced"),
    "right without rows": (
        bad(validation_sums=sums(1, 0)),
        "1 of 0 validation rows cannot be right",
    ),
    "negative rows": (bad(validation_rows=-1, validation_sums=sums(-1, -1)), "not the 0 announced"),
    "other sums": (bad(validation_sums={"wrong": 1}), "the figures of validation rows are wrong"),
    "odd loss": (bad(validation_sums=sums(1, 0) | {"correct": 0, "loss": math.nan}), "the loss of"),
    "no steps": (bad(steps=0), "step count"),
    "loss not a number": (bad(loss=math.nan), "loss or seconds"),
    "loss infinite": (bad(loss=math.inf), "loss or seconds"),
    "negative seconds": (bad(seconds=-1.0), "loss or seconds"),
    "odd timings": (bad(timings={"train": -1.0}), "timings"),
    "another format": (bad(fmt="fp16"), "in format 'fp16'"),
    "missing tensor": (with_tensor(HEAD, None), "missing tensor 'classifier.weight'"),
    "extra tensor": (with_tensor("more", torch.zeros(1)), "unexpected tensor 'more'"),
    "wrong shape": (with_tensor(HEAD, torch.zeros(4, 3)), r"float32\[4, 3\], not float32\[3, 4\]"),
    "broadcastable": (with_tensor(HEAD, torch.zeros(1, 4)), r"float32\[1, 4\]"),
    "wrong dtype": (with_tensor(HEAD, torch.zeros(OF_HEAD, dtype=torch.float64)), "float64"),
    "not finite": (with_tensor(HEAD, torch.full(OF_HEAD, math.inf)), "not finite"),
    "not a number": (with_tensor(HEAD, torch.full(OF_HEAD, math.nan)), "not finite"),
    "too far": (with_tensor(HEAD, torch.full(OF_HEAD, 50.0)), "moved by 173"),
    "much too far": (with_tensor(HEAD, torch.full(OF_HEAD, 3e38)), "moved by"),
    "no counts": (bad(counts={}), "counts are missing"),
    "negative count": (with_count("1", [0, -1, 3, 4]), "not within its token total"),
    "count above tokens": (with_count("1", [0, 36, 3, 4]), "not within its token total"),
    "no tokens": (with_count("1/tokens", [0]), "cannot have"),
    "too many tokens": (with_count("1/tokens", [41]), "cannot have"),
    "counts as floats": (with_count("1", torch.zeros(4)), "wrong type or shape"),
    "counts too short": (with_count("1", [1, 2, 3]), "wrong type or shape"),
    "counts of a block": (with_count("9", [1]), "not for the pruned blocks"),
}


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_kind_is_refused_with_its_own_reason(kind: str) -> None:
    reply, reason = BAD[kind]
    with pytest.raises(ReplyError, match=reason):
        accept(seal(reply), fabricate.expected())


def test_validation_counts_are_within_what_was_announced() -> None:
    want = fabricate.expected()
    for right in (0, 3, 4):
        reply, *_ = accept(seal(fabricate.reply(want, validation=(right, 4))), want, held_out=4)
        assert (reply.validation_sums["correct"], reply.validation_rows) == (right, 4)
    for right, rows in ((5, 4), (-1, 4), (0, 3), (3, 5), (0, 0), (2**62, 4)):
        with pytest.raises(ReplyError, match="validation row"):
            accept(seal(fabricate.reply(want, validation=(right, rows))), want, held_out=4)


def test_counts_that_were_not_asked_for_are_refused() -> None:
    with pytest.raises(ReplyError, match="not asked for"):
        accept(seal(bad()), fabricate.expected(counted=False))


def test_a_reply_that_is_too_large_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = fabricate.expected()
    good = seal(fabricate.reply(want))
    assert sum(good.sizes().values()) < want.max_bytes < sum(good.sizes().values()) + 2**17
    monkeypatch.setattr(codec, "unpack", lambda data: pytest.fail("parsed"))
    large = corrupt.reseal(good, parts=good.parts | {"adapter": bytes(want.max_bytes)})
    with pytest.raises(ReplyError, match=f"more than the {want.max_bytes}"):
        accept(large, want)


def test_the_size_limit_fits_every_format() -> None:
    for fmt in codec.UPDATE_FORMATS:
        want = fabricate.expected(fmt=fmt)
        size = sum(seal(fabricate.reply(want)).sizes().values())
        assert size < want.max_bytes


# --- corrupt replies ----------------------------------------------------------------------


def test_corrupt_replies_are_refused_and_never_crash() -> None:
    """Tens of thousands of them; one that is accepted must mean what a good client could mean."""
    want = fabricate.expected()
    good = seal(fabricate.reply(want, validation=(2, 3)))
    assert corrupt.is_good(good, want, "a", 5, 3)
    rng = random.Random(0)
    accepted = 0
    reasons: dict[str, int] = {}
    for case in range(CASES):
        spoil = corrupt.FORGERIES[case % len(corrupt.FORGERIES)]
        spoilt = spoil(good, rng)
        try:
            accept(spoilt, want, held_out=3)
        except ReplyError as error:
            reason = str(error).partition("(")[0].partition("'")[0][:40]
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        accepted += 1
        assert corrupt.is_good(spoilt, want, "a", 5, 3), (case, spoil.__name__, spoilt.head[:300])
    # A flipped low bit of a weight is a reply a client could have meant; most are no such thing.
    assert accepted < 0.2 * CASES
    assert len(reasons) > 20


def test_damaged_replies_are_never_accepted() -> None:
    """Without a new checksum not even a low bit of a weight may change."""
    want = fabricate.expected()
    good = seal(fabricate.reply(want))
    rng = random.Random(1)
    for case in range(max(2000, CASES // 10)):
        with pytest.raises(ReplyError):
            accept(corrupt.damage(good, rng), want)
            pytest.fail(f"case {case}")


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "int8", "ternary"])
def test_corrupt_replies_in_other_formats_never_crash(fmt: str) -> None:
    want = fabricate.expected(fmt=fmt)
    good = seal(fabricate.reply(want))
    rng = random.Random(3)
    for case in range(max(500, CASES // 40)):
        try:
            _, adapter, _ = accept(corrupt.FORGERIES[case % 6](good, rng), want)
        except ReplyError:
            continue
        moved = sum(
            float((adapter[k].double() - want.adapter[k].double()).square().sum()) for k in adapter
        )
        assert moved <= want.max_update_norm**2
        assert {k: t.shape for k, t in adapter.items()} == {
            k: t.shape for k, t in want.adapter.items()
        }


# --- counts -------------------------------------------------------------------------------


def test_counts_add_up() -> None:
    one = Counts({1: torch.tensor([1, 2]), 2: torch.tensor([3])}, {1: 5, 2: 6})
    two = Counts({1: torch.tensor([10, 0]), 2: torch.tensor([0])}, {1: 50, 2: 60})
    total = sum_counts([one, two])
    assert total.inactive[1].tolist() == [11, 2] and total.inactive[2].tolist() == [3]
    assert total.tokens == {1: 55, 2: 66}
    assert one.inactive[1].tolist() == [1, 2]
