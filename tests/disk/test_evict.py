"""What has to go when only so much may stay."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fedpft_core.disk import evict


def made(folder: Path, ages: dict[str, int], size: int = 1) -> list[Path]:
    for name, age in ages.items():
        (folder / name).write_bytes(b"x" * size)
        os.utime(folder / name, (10_000 - age,) * 2)
    return [folder / name for name in ages]


def test_the_least_recently_used_go_and_what_was_just_written_stays(tmp_path: Path) -> None:
    paths = made(tmp_path, {"a": 3, "b": 1, "c": 2, "d": 9})
    gone = evict.least_recently_used(paths, 2, spare=tmp_path / "d")
    assert {p.name for p in gone} == {"a", "c"}
    gone = evict.least_recently_used(paths, 1, spare=tmp_path / "d")
    assert {p.name for p in gone} == {"a", "b", "c"}
    paths.append(tmp_path / "vanished")
    assert evict.least_recently_used(paths, 9, spare=tmp_path / "d") == []


def test_bytes_are_limited_too(tmp_path: Path) -> None:
    paths = made(tmp_path, {"a": 3, "b": 1, "c": 2}, size=10)
    for limit, wanted in ((30, set()), (29, {"a"}), (10, {"a", "b"}), (1, {"a", "b"})):
        gone = evict.least_recently_used(paths, 9, spare=tmp_path / "c", keep_bytes=limit)
        assert {p.name for p in gone} == wanted, limit


def test_rounds_are_numbers_and_later_ones_go(tmp_path: Path) -> None:
    for name in ("round-9", "round-0010", "round-x", "round-", ".new-1", "round-0002"):
        (tmp_path / name).mkdir()
    assert list(evict.rounds(tmp_path)) == [2, 9, 10]
    assert evict.rounds(tmp_path / "none") == {}
    gone = evict.superseded(tmp_path, 9, 1)
    assert sorted(p.name for p in gone) == ["round-0002", "round-0010"]


@pytest.mark.parametrize("seed", range(5))
def test_superseded_leaves_the_last_ones(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    there = rng.sample(range(30), 8)
    for n in there:
        (tmp_path / f"round-{n:04d}").mkdir()
    newest, keep = rng.choice(there), rng.randint(1, 9)
    for path in evict.superseded(tmp_path, newest, keep):
        path.rmdir()
    assert list(evict.rounds(tmp_path)) == sorted(n for n in there if n <= newest)[-keep:]


def test_the_oldest_entry_makes_room() -> None:
    entries: dict[str, int] = {}
    for i, key in enumerate("abcd"):
        evict.put(entries, key, i, 2)
    assert entries == {"c": 2, "d": 3}
