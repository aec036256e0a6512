"""Encoded rows on disk: what comes back, what stays, and many processes at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fabricate
import numpy as np
import pytest
import tiny
import torch

from client_app.rowcache import RowCache, content_of, content_of_file, folds_of, key_of
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples

KEY = "0" * 64


def equal(a: Encoded, b: Encoded) -> bool:
    x, y = a.tensors(), b.tensors()
    return (
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        and (a.pad_id, a.pad_token_type) == (b.pad_id, b.pad_token_type)
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_rows_survive_the_disk(family: str, tmp_path: Path) -> None:
    rows, folds = tiny.encoded(family, 9), folds_of(tiny.examples(family, 9))
    RowCache(tmp_path).put(KEY, rows, folds)
    found = RowCache(tmp_path).get(KEY)
    assert found is not None
    assert equal(found[0], rows) and np.array_equal(found[1], folds)
    assert RowCache(tmp_path).get("1" * 64) is None


def test_odd_padding_and_empty_rows_survive(tmp_path: Path) -> None:
    rows = Encoded(
        labels=torch.tensor([1]), ids=torch.zeros(0, dtype=torch.int32),
        offsets=torch.tensor([0, 0]), pad_id=7, pad_token_type=3,
    )  # fmt: skip
    RowCache(tmp_path).put(KEY, rows, np.array([5]))
    found = RowCache(tmp_path).get(KEY)
    assert found is not None and equal(found[0], rows)


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    cache = RowCache(tmp_path)
    rows = tiny.encoded("bert", 2)
    cache.put(KEY, rows, np.zeros(2, np.int64))
    data = cache.path(KEY).read_bytes()
    for at in range(8, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 4
        cache.path(KEY).write_bytes(changed)
        found = cache.get(KEY)
        # Blanks that fill up the header are the only bytes without a meaning.
        if found is not None:
            assert equal(found[0], rows) and not found[1].any(), at
        else:
            assert not cache.path(KEY).exists()


def test_files_and_bytes_are_bounded(tmp_path: Path) -> None:
    rows, folds = tiny.encoded("bert", 40), np.zeros(40, np.int64)
    cache = RowCache(tmp_path, keep=3)
    keys = [f"{i}" * 64 for i in range(5)]
    for i, key in enumerate(keys):
        cache.put(key, rows, folds)
        os.utime(cache.path(key), (i, i))
        if i == 3:
            cache.get(keys[1])  # used again, so not the next to go
    left = {p.stem for p in tmp_path.iterdir()}
    assert left == {keys[1], keys[3], keys[4]}
    size = cache.path(keys[1]).stat().st_size
    small = RowCache(tmp_path, keep_bytes=size + 10)
    small.put(keys[0], rows, folds)
    assert [p.stem for p in tmp_path.iterdir()] == [keys[0]]
    RowCache(tmp_path / "none", keep_bytes=100).put(keys[0], rows, folds)
    assert not (tmp_path / "none").exists()


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".new-1-1", tmp_path / ".new-2-2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    RowCache(tmp_path).put(KEY, tiny.encoded("bert", 3), np.zeros(3, np.int64))
    assert not old.exists() and new.exists()


def work(root: Path, seed: int) -> int:
    """Put and get at random; every answer must be whole and right."""
    cache = RowCache(root, keep=2)
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(60):
        n = int(rng.integers(1, 6))
        key = f"{n}" * 64
        found = cache.get(key)
        if found is None:
            cache.put(key, tiny.encoded("bert", n), np.full(n, n))
            continue
        hits += 1
        assert equal(found[0], tiny.encoded("bert", n)) and (found[1] == n).all()
    return hits


def test_many_processes_at_once(tmp_path: Path) -> None:
    with fabricate.processes().Pool(3) as pool:
        hits = pool.starmap_async(work, [(tmp_path, s) for s in range(3)]).get(120)
    assert sum(hits) > 20
    assert len(list(tmp_path.glob("*.safetensors"))) <= 4


def test_content_and_keys(tmp_path: Path) -> None:
    rows = tiny.examples("bert", 6)
    same = Examples(tuple(rows.inputs), rows.labels)
    assert content_of(rows) == content_of(same)
    others = [
        Examples((*rows.inputs[:5], "x"), rows.labels),
        Examples(rows.inputs, rows.labels[::-1]),
        rows.select(range(5)),
        Examples(tuple((t, "") for t in rows.inputs), rows.labels),  # type: ignore[misc]
    ]
    assert len({content_of(r) for r in [rows, *others]}) == 5
    path = tmp_path / "rows"
    path.write_bytes(b"a")
    first = content_of_file(path)
    path.write_bytes(b"b")
    assert content_of_file(path) != first
    assert len({key_of("a", "b"), key_of("ab"), key_of("a", ["b"]), key_of("a", 1)}) == 4


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_selected_rows_are_those_of_a_selection(family: str) -> None:
    examples = tiny.examples(family, 11)
    whole = encode(examples, tiny.processor(family), 8)
    for rows in ([], [3], [10, 0, 4, 4], list(range(11))):
        picked = whole.select(np.array(rows, dtype=np.int64))
        if rows:
            assert equal(picked, encode(examples.select(rows), tiny.processor(family), 8))
        assert len(picked) == len(rows)
