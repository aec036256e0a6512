"""Manifests and parcels: what a package consists of, and what of it is on its way."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import fabricate
import pytest
import torch

from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.coded import rounded
from fedpft_core.wire.manifest import Manifest
from fedpft_core.wire.package import Package
from fedpft_core.wire.parcel import Parcel


def package(fmt: str = "fp32") -> Package:
    made = fabricate.package()
    return replace(made, weights={k: rounded(t, fmt) for k, t in made.weights.items()})


def parcel(made: Package) -> Parcel:
    return Parcel.of(made.manifest(), made.files, made.weights)


def forged(made: Package, **changes: Any) -> bytes:
    """A parcel's bytes with another manifest, of the same keys unless changed."""
    found = codec.unpack(made.to_bytes())
    raw = json.loads(found["//manifest"].numpy().tobytes()) | changes
    found["//manifest"] = torch.tensor(list(json.dumps(raw).encode()), dtype=torch.uint8)
    return codec.pack(found)


def raw_weights(made: Package) -> dict[str, list[Any]]:
    weights = json.loads(made.manifest().to_bytes())["weights"]
    assert isinstance(weights, dict)
    return weights


def test_a_manifest_has_the_digest_of_its_package() -> None:
    made = package()
    manifest = made.manifest()
    assert manifest.digest == made.digest()
    back = Manifest.from_bytes(manifest.to_bytes())
    assert back == manifest and back.to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16", "int8"])
def test_every_part_of_a_package_makes_it_whole_with_the_rest(fmt: str) -> None:
    """Cut in two anywhere, the halves come to the same package as the whole."""
    made = package(fmt)
    whole = parcel(made)
    names = sorted(whole.manifest.contents)
    for cut in range(len(names) + 1):
        halves = [Parcel.from_bytes(whole.only(n).to_bytes()) for n in (names[:cut], names[cut:])]
        tensors: Tensors = {}
        files: dict[str, bytes] = {}
        for half in halves:
            assert half.manifest == whole.manifest
            tensors |= half.tensors()
            files |= half.files
        assert Package.made(whole.manifest, tensors, files).digest() == made.digest()
    with pytest.raises(ReplyError, match="not whole"):
        Package.from_bytes(whole.only(names[1:]).to_bytes())


def test_a_format_makes_a_package_smaller() -> None:
    made = fabricate.package()
    matrix = {"ballast": made.weights["ballast"].reshape(20, 30)}
    sizes = []
    for fmt in ("fp32", "bf16", "int8", "int4"):
        weights = {k: rounded(t, fmt) for k, t in matrix.items()}
        sizes.append(parcel(replace(made, weights=weights)).size)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_equal_weights_travel_once() -> None:
    made = package()
    twice = replace(made, weights=made.weights | {"again": made.weights["ballast"].clone()})
    assert len(twice.manifest().entries) == len(made.weights)
    assert parcel(twice).size == parcel(made).size
    assert Package.from_bytes(twice.to_bytes()).digest() == twice.digest()


def test_forms_of_the_version_before_are_not_sought_again() -> None:
    made = package("int8")
    before = parcel(made)
    _, after = fabricate.aligned(made, 1)
    then = Parcel.of(after.manifest(), after.files, after.weights, before.coded)
    shared = before.coded.keys() & then.coded.keys()
    assert shared and all(then.coded[k] is before.coded[k] for k in shared)


def test_parts_are_bounded_and_go_on() -> None:
    whole = parcel(package())
    most = whole.size // 3
    left, seen, rounds = set(whole.manifest.contents), set(), 0
    while left:
        part = whole.only(left, most)
        assert part.sizes and (part.size <= most or len(part.sizes) == 1)
        seen |= part.sizes.keys()
        left -= part.sizes.keys()
        rounds += 1
    assert seen == whole.manifest.contents and rounds >= 3


BAD: dict[str, tuple[Any, str]] = {
    "no list": ({"weights": []}, "does not name its weights"),
    "no files": ({"files": None}, "does not name its files"),
    "a path": ({"files": {"../x": "0" * 64}}, "file name"),
    "a device": ({"files": {"con": "0" * 64}}, "file name"),
    "no digest": ({"files": {"vocab.txt": "0" * 63}}, "without a digest"),
    "too much": ({"more": 1}, "not meta, files and weights"),
    "no metadata": ({"meta": {}}, "metadata"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_manifest_that_is_wrong_is_named(case: str) -> None:
    changes, reason = BAD[case]
    with pytest.raises(ReplyError, match=reason):
        Parcel.from_bytes(forged(package(), **changes))


ENTRIES: list[Any] = [
    None, [], ["0" * 64, "float32"], ["0" * 63, "float32", [1]], ["0" * 64, "float31", [1]],
    ["0" * 64, "float32", [-1]], ["0" * 64, "float32", [1.0]], ["0" * 64, "float32", [True]],
    ["0" * 64, "float32", [2**41]], ["0" * 64, "float32", [2**30, 2**30]],
    ["0" * 64, "float32", [1] * 9], ["0" * 64, ["float32"], [1]], ["0" * 64, "float32", "1"],
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_weight_that_a_manifest_gets_wrong(entry: Any) -> None:
    made = package()
    with pytest.raises(ReplyError, match="wrong about the weight 'ballast'"):
        Parcel.from_bytes(forged(made, weights=raw_weights(made) | {"ballast": entry}))


def test_one_digest_cannot_be_two_shapes() -> None:
    made = package()
    weights = raw_weights(made)
    digest, dtype, _ = weights["ballast"]
    with pytest.raises(ReplyError, match="wrong about the weight"):
        Parcel.from_bytes(forged(made, weights=weights | {"z": [digest, dtype, [1, 600]]}))


def test_a_tensor_of_another_shape_is_refused() -> None:
    made = package()
    weights = raw_weights(made)
    weights["ballast"][2] = [1, 600]
    sent = Parcel.from_bytes(forged(made, weights=weights))
    with pytest.raises(ReplyError, match="no form of"):
        sent.tensors()


def test_a_tensor_that_is_not_what_was_promised_is_refused() -> None:
    made = package()
    found = codec.unpack(made.to_bytes())
    name = next(k for k, t in found.items() if t.dtype == torch.float32)
    found[name] = found[name] + 1
    with pytest.raises(ReplyError, match="does not have the digest"):
        Parcel.from_bytes(codec.pack(found)).tensors()


def test_a_file_that_is_not_what_was_promised_is_refused() -> None:
    made = package()
    found = codec.unpack(made.to_bytes())
    (digest,) = made.manifest().files.values()
    found[digest] = found[digest] + 1
    with pytest.raises(ReplyError, match="a file of the package"):
        Parcel.from_bytes(codec.pack(found))


@pytest.mark.parametrize("name", ["f" * 64, "x", "f" * 64 + "//scale", "//scale", "//file/a"])
def test_contents_that_the_manifest_does_not_name_are_refused(name: str) -> None:
    found = codec.unpack(package().to_bytes())
    with pytest.raises(ReplyError, match="does not name"):
        Parcel.from_bytes(codec.pack(found | {name: torch.zeros(3)}))


def test_what_is_no_parcel() -> None:
    for data in (b"", codec.pack({}), codec.pack({"//manifest": torch.zeros(3)})):
        with pytest.raises(ReplyError):
            Parcel.from_bytes(data)
    for text in (b"", b"{", b"[]", b"[" * 100_000, b"\xff"):
        with pytest.raises(ReplyError, match="manifest"):
            Manifest.from_bytes(text)
