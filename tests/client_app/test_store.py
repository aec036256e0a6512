"""The client's disk: content-addressed, bounded, shared by processes, mended, full."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import fabricate
import pytest
import torch
from safetensors import SafetensorError

from client_app import store as store_module
from client_app.residuals import Residuals
from client_app.store import Store
from fedpft_core.wire.manifest import Manifest
from fedpft_core.wire.package import Package
from fedpft_core.wire.parcel import Parcel

RUN = "0123456789abcdef"


def filled(root: Path, *seeds: int, keep: int = 3) -> tuple[Store, list[str]]:
    made = Store(root, keep)
    digests = []
    for seed in seeds:
        package = fabricate.package(seed)
        made.put(package.digest(), package)
        digests.append(package.digest())
    return made, digests


def same(a: Package, b: Package) -> bool:
    return (
        a.meta == b.meta
        and a.files == b.files
        and a.weights.keys() == b.weights.keys()
        and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    )


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    store, (digest,) = filled(tmp_path, 0)
    got = store.get(digest)
    assert got is not None and same(got, fabricate.package(0))
    assert store.digests() == (digest,)
    assert Store(tmp_path / "nothing").digests() == ()
    assert Store(tmp_path / "nothing").get(digest) is None


def test_only_digests_are_looked_up(tmp_path: Path) -> None:
    for name in ("", "../../etc/passwd", "A" * 64, "g" * 64, "0" * 63):
        with pytest.raises(ValueError, match="not a digest"):
            Store(tmp_path).get(name)


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store, digests = filled(tmp_path, 0, 1, keep=2)
    for age, digest in ((200, digests[0]), (100, digests[1])):
        os.utime(store.path(digest), (time.time() - age,) * 2)
    assert store.get(digests[0]) is not None  # now the newer one
    package = fabricate.package(2)
    store.put(package.digest(), package)
    assert set(store.digests()) == {digests[0], package.digest()}


def test_one_too_many_never_evicts_what_was_just_put(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    for seed in range(4):
        package = fabricate.package(seed)
        store.put(package.digest(), package)
        assert store.digests() == (package.digest(),)


def paths_of(store: Store, digest: str) -> dict[str, Path]:
    """A sub-FM's manifest, one of its tensors and one of its files."""
    manifest = Manifest.from_bytes(store.path(digest).read_bytes())
    return {
        "manifest": store.path(digest),
        "tensor": store.tensor(manifest.weights["ballast"].digest),
        "file": store.file(manifest.files["vocab.txt"]),
    }


@pytest.mark.parametrize("name", ["manifest", "tensor", "file"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_corrupt_file_is_found_and_can_be_mended(tmp_path: Path, name: str, damage: str) -> None:
    store, (digest,) = filled(tmp_path, 0)
    path = paths_of(store, digest)[name]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(damage, data))
    if damage == "gone":
        path.unlink()
    found = store.read(digest)
    assert found is None if name == "manifest" else found is not None and len(found.lacking) == 1
    assert store.get(digest) is None
    assert store.digests() == ()
    store.put(digest, fabricate.package(0))
    assert store.get(digest) is not None


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    store, (digest,) = filled(tmp_path, 0)
    path = paths_of(store, digest)["tensor"]
    good = path.read_bytes()
    rng = random.Random(0)
    for at in [*range(0, 60), *(rng.randrange(len(good)) for _ in range(150))]:
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        got = store.get(digest)
        # A header may be written in two ways that mean the same (a space for a space).
        assert got is None or same(got, fabricate.package(0)), at
        store.put(digest, fabricate.package(0))


def test_what_two_sub_fms_share_lies_there_once(tmp_path: Path) -> None:
    first = fabricate.package(0)
    _, second = fabricate.aligned(first, 1)
    store = Store(tmp_path, keep=2)
    for package in (first, second):
        store.put(package.digest(), package)
    shared = first.manifest().contents & second.manifest().contents
    every = first.manifest().contents | second.manifest().contents
    assert shared and {d for d, _ in store._paths()} == every
    for one, other in ((first, second), (second, first)):
        store.remove(one.digest())
        assert {d for d, _ in store._paths()} == other.manifest().contents
        assert store.get(other.digest()) is not None
        store.put(one.digest(), one)


def test_a_sub_fm_that_goes_takes_what_is_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    for seed in range(3):
        package = fabricate.package(seed)
        store.put(package.digest(), package)
        assert {d for d, _ in store._paths()} == package.manifest().contents


def test_what_another_process_has_just_used_stays(tmp_path: Path) -> None:
    """It is about to write a manifest that names it."""
    store, (digest,) = filled(tmp_path, 0)
    path = paths_of(store, digest)["tensor"]
    later = time.time() + 5
    os.utime(path, (later, later))
    store.remove(digest)
    assert [p for _, p in store._paths()] == [path]
    long_ago = time.time() - 100_000
    os.utime(path, (long_ago, long_ago))
    package = fabricate.package(1)
    store.put(package.digest(), package)
    assert not path.exists()


def test_parts_wait_for_the_rest(tmp_path: Path) -> None:
    package = fabricate.package(0)
    whole = Parcel.of(package.manifest(), package.files, package.weights)
    store, names = Store(tmp_path), sorted(whole.manifest.contents)
    first = whole.only(names[:2])
    assert store.fill(whole.manifest, first).lacking == tuple(names[2:])
    store.keep_parts(first)
    assert store.digests() == () and store.get(package.digest()) is None
    found = store.fill(whole.manifest, whole.only(names[2:]))
    assert found.package is not None and same(found.package, package)


def test_sub_fms_in_folders_of_an_older_version_go(tmp_path: Path) -> None:
    old = tmp_path / ("a" * 64)
    old.mkdir()
    (old / "meta.json").write_text("{}")
    store, (digest,) = filled(tmp_path, 0)
    assert not old.exists() and store.digests() == (digest,)


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 0)
    for name, age in ((".new-old", 7200), (".gone-old", 7200), (".new-now", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    package = fabricate.package(1)
    store.put(package.digest(), package)
    left = {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
    assert left == {".new-now"}  # it may belong to a process that is still writing


# --- full disks ---------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (first,) = filled(tmp_path, 0)
    second = fabricate.package(1)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    before = sorted(p for p in tmp_path.rglob("*"))
    monkeypatch.setattr(store_module, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(second.digest(), second)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    monkeypatch.undo()

    def fuller(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fuller)
    with pytest.raises(OSError, match="No space left"):
        store.put(second.digest(), second)
    monkeypatch.undo()
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert store.get(first) is not None


def write_where_nothing_fits(root: Path, answer: Any) -> None:
    """In a process that may write no more than 2 kB to a file: the system refuses the rest."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    store, package = Store(root), fabricate.package(1)
    try:
        store.put(package.digest(), package)
        answer.put("no error")
    except OSError as error:
        answer.put(type(error).__name__)


def test_a_write_that_really_fails_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store, (first,) = filled(tmp_path, 0)
    before = sorted(tmp_path.rglob("*"))
    context = fabricate.processes()
    answer = context.Queue()
    process = context.Process(target=write_where_nothing_fits, args=(tmp_path, answer))
    process.start()
    assert answer.get(timeout=60) == "OSError"
    process.join()
    assert sorted(tmp_path.rglob("*")) == before
    assert store.get(first) is not None


# --- several processes --------------------------------------------------------------------


def hammer(root: Path, seed: int, seconds: float, failures: Any) -> None:
    """Random puts, gets, removals and damage on one store; whatever comes back must be whole."""
    rng = random.Random(seed)
    packages = [fabricate.package(i) for i in range(6)]
    digests = [p.digest() for p in packages]
    store = Store(root, keep=3)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            i = rng.randrange(len(packages))
            what = rng.random()
            if what < 0.35:
                store.put(digests[i], packages[i])
            elif what < 0.85:
                got = store.get(digests[i])
                assert got is None or same(got, packages[i]), "a reader saw other weights"
            elif what < 0.9:
                store.remove(digests[i])
            elif what < 0.95:
                assert all(len(d) == 64 for d in store.digests())
            else:
                damage(store, rng)
    except BaseException as error:
        failures.put(f"{type(error).__name__}: {error}")


def damage(store: Store, rng: random.Random) -> None:
    with contextlib.suppress(OSError):
        path = rng.choice(sorted((store.root / "tensors").iterdir()))
        with open(path, "r+b") as file:
            file.seek(rng.randrange(20, 300))
            file.write(b"\x55")


def test_many_processes_share_one_store(tmp_path: Path) -> None:
    context = fabricate.processes()
    failures = context.Queue()
    workers = [
        context.Process(target=hammer, args=(tmp_path, seed, 3.0, failures)) for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(worker.exitcode == 0 for worker in workers)
    assert failures.empty(), failures.get()
    store = Store(tmp_path, keep=3)
    for digest in store.digests():
        store.get(digest)
    assert all(store.get(digest) is not None for digest in store.digests())
    package = fabricate.package(9)
    store.put(package.digest(), package)
    assert len(store.digests()) <= 3
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    named = {d for digest in store.digests() for d in store._manifest(digest).contents}  # type: ignore[union-attr]
    assert {d for d, _ in store._paths()} >= named


# --- residuals ----------------------------------------------------------------------------


def residual(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value)}


def value_of(found: dict[str, torch.Tensor]) -> float | None:
    return float(found["w"][0]) if found else None


def test_a_residual_is_that_of_the_newest_round_before(tmp_path: Path) -> None:
    kept = Residuals(tmp_path)
    assert kept.get(RUN, "a", 1) == {}
    kept.put(RUN, "a", 1, residual(1))
    kept.put(RUN, "a", 4, residual(4))
    assert value_of(kept.get(RUN, "a", 5)) == 4
    assert value_of(kept.get(RUN, "a", 4)) == 1  # the round is done again
    assert kept.get(RUN, "a", 1) == {}
    assert kept.get(RUN, "b", 5) == {} and kept.get("f" * 16, "a", 5) == {}


def test_a_round_done_again_forgets_what_came_after(tmp_path: Path) -> None:
    kept = Residuals(tmp_path)
    for round in (1, 2, 3):
        kept.put(RUN, "a", round, residual(round))
    kept.put(RUN, "a", 2, residual(20))
    assert value_of(kept.get(RUN, "a", 9)) == 20


def test_a_corrupt_residual_counts_as_none(tmp_path: Path) -> None:
    kept = Residuals(tmp_path)
    kept.put(RUN, "a", 1, residual(1))
    kept.put(RUN, "a", 2, residual(2))
    (path,) = tmp_path.rglob("round-000002")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert kept.get(RUN, "a", 3) == {}  # not that of round 1, which has been sent already


def test_residuals_are_bounded(tmp_path: Path) -> None:
    kept = Residuals(tmp_path, keep_rounds=2, keep_runs=2)
    runs = [f"{i:016x}" for i in range(4)]
    for run in runs:
        for round in range(1, 6):
            kept.put(run, "a/../b", round, residual(round))
        time.sleep(0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == runs[-2:]
    assert len(list(tmp_path.rglob("round-*"))) == 4


def test_a_run_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("", "../../x", "..", "0" * 65, "ABCDEF0123456789"):
        with pytest.raises(ValueError, match="not a run"):
            Residuals(tmp_path).get(name, "a", 1)
