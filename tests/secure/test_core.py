"""The sum under masks against the plain sum, exactly, whoever drops out."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from Crypto.Protocol.SecretSharing import Shamir

from fedpft_core.secure import graph, keys, masks, ring

SESSION = b"s" * 16


class Party:
    def __init__(self, index: int) -> None:
        self.index = index
        self.keys = keys.Keys.of(os.urandom(32))


def run(
    n: int, degree: int, gone_before_shares: set[int], gone_before_sum: set[int],
    gone_before_unmasking: set[int], values: dict[int, np.ndarray], k: int, share: float = 0.5,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:  # fmt: skip
    """The whole protocol, without messages: what the server has at the end, and what it saw."""
    order = list(range(n))
    random.Random(n).shuffle(order)
    net = graph.neighbours(order, degree)
    parties = {i: Party(i) for i in range(n)}
    public = {i: p.keys.public for i, p in parties.items()}
    need = {i: graph.threshold_for(len(net[i]), share) for i in net}
    alive = set(range(n)) - gone_before_shares
    sealed: dict[int, dict[int, bytes]] = {i: {} for i in range(n)}  # by receiver, by sender
    for i in alive:
        mine = parties[i].keys
        for peer, part in zip(net[i], keys.share_out(mine, len(net[i]), need[i]), strict=True):
            sealed[peer][i] = keys.seal(
                mine.sealing, public[peer].sealing, part, SESSION, (i, peer)
            )
    seen = {}
    for i in alive - gone_before_sum:
        peers = {p: public[p].masking for p in net[i] if p in alive}
        seen[i] = masks.masked(values[i], k, parties[i].keys, i, peers, SESSION)
    total = np.zeros(len(values[0]), ring.kind(k))
    for v in seen.values():
        total = ring.reduced(total + v, k)
    answered: dict[int, dict[int, bytes]] = {i: {} for i in seen}
    dropped: dict[int, dict[int, bytes]] = {i: {} for i in alive - set(seen)}
    for i in set(seen) - gone_before_unmasking:
        for sender, blob in sealed[i].items():
            part = keys.unseal(parties[i].keys.sealing, public[sender].sealing, blob, SESSION,
                               (sender, i))  # fmt: skip
            if sender in answered:
                answered[sender][i] = part[:16]
            else:
                dropped[sender][i] = part[16:]
    return masks.unmasked(total, k, answered, dropped, net, public, need, SESSION), seen


@pytest.mark.parametrize(
    ("n", "degree", "first", "second", "third"),
    [
        (2, 1, set(), set(), set()),
        (5, 4, set(), set(), set()),
        (5, 4, {1}, set(), set()),
        (6, 5, set(), {3}, {4}),
        (9, 8, {0}, {4}, {7}),
        (24, 14, {2, 9}, {5, 20}, {11}),
        (24, 14, set(), {0, 1, 2}, {3}),
    ],
)
def test_the_sum_is_the_plain_sum_exactly(
    n: int, degree: int, first: set[int], second: set[int], third: set[int]
) -> None:
    bits = 8
    k = ring.width(bits, n)
    drawn = np.random.default_rng(n)
    values = {i: drawn.integers(-127, 128, 50) for i in range(n)}
    values[0][:2] = 127, -127
    got, seen = run(n, degree, first, second, third, values, k)
    want = sum(values[i] for i in range(n) if i not in first | second)
    assert np.array_equal(ring.unwrap(got, k), want)
    for i, v in seen.items():
        assert not np.array_equal(v, ring.wrap(values[i], k))


@pytest.mark.parametrize("k", [33, 62])
def test_so_is_a_wide_one(k: int) -> None:
    most = (2 ** (k - 1) - 1) // 9
    drawn = np.random.default_rng(k)
    values = {i: drawn.integers(-most, most + 1, 50) for i in range(9)}
    for i in range(9):
        values[i][:2] = most, -most
    got, seen = run(9, 8, {0}, {4}, {7}, values, k)
    want = sum(values[i] for i in range(9) if i not in {0, 4})
    assert np.array_equal(ring.unwrap(got, k), want)
    assert not any((v == ring.wrap(values[i], k)).any() for i, v in seen.items())


def test_too_many_gone_gives_no_sum_at_all() -> None:
    values = {i: np.arange(4) for i in range(6)}
    with pytest.raises(ValueError, match="shares of the"):
        run(6, 5, set(), set(), {0, 1, 2, 3}, values, 12)


@pytest.mark.parametrize("k", [12, 62])
def test_what_one_client_sends_looks_random(k: int) -> None:
    """Of many zeros under masks every bit is set half of the time, and no two sends agree."""
    values = {i: np.zeros(100_000, np.int64) for i in range(3)}
    _, seen = run(3, 2, set(), set(), set(), values, k)
    for v in seen.values():
        bits = [(int(((v >> b) & 1).sum())) / len(v) for b in range(k)]
        assert max(abs(b - 0.5) for b in bits) < 0.01
    assert np.mean(seen[0] == seen[1]) < 0.01


@pytest.mark.parametrize(("bits", "clients"), [(2, 1), (8, 1), (8, 100), (16, 5), (16, 1000)])
def test_the_ring_holds_the_largest_sum_and_is_no_wider(bits: int, clients: int) -> None:
    k = ring.width(bits, clients)
    most = clients * ring.largest(bits)
    for total in (most, -most, 0):
        assert ring.unwrap(ring.wrap(np.array([total]), k), k)[0] == total
    assert ring.unwrap(ring.wrap(np.array([most]), k - 1), k - 1)[0] != most


@pytest.mark.parametrize("k", [1, 5, 8, 15, 32, 33, 54, 62])
def test_packing_keeps_every_bit(k: int) -> None:
    values = np.random.default_rng(k).integers(0, 2**k, 101, dtype=ring.kind(k))
    data = ring.pack(values, k)
    assert len(data) == ring.packed_bytes(101, k) == -(-101 * k // 8)
    assert np.array_equal(ring.unpack(data, 101, k), values)
    with pytest.raises(ValueError, match="are not 101 numbers"):
        ring.unpack(data + b"x", 101, k)


def test_quantising_is_right_in_the_mean_and_clips() -> None:
    change = {"b": torch.full((40_000,), 0.033), "a": torch.tensor([-9.0, 9.0])}
    q = ring.quantise(change, 4, 0.5, np.random.default_rng(0))
    assert q[:2].tolist() == [-7, 7]
    assert np.mean(q[2:]) * 0.5 / 7 == pytest.approx(0.033, rel=0.03)
    back = ring.restore(3 * q, 4, 0.5, change, 3)
    assert back["a"].tolist() == [-0.5, 0.5] and back["b"].shape == (40_000,)
    with pytest.raises(ValueError, match="not finite"):
        ring.quantise({"a": torch.tensor([float("nan")])}, 4, 0.5, np.random.default_rng(0))


def test_neighbours_are_mutual_and_as_many_as_asked() -> None:
    net = graph.neighbours(list(range(30)), 7)
    assert {len(v) for v in net.values()} == {8}
    assert all(a in net[b] for a, near in net.items() for b in near)
    assert all(a not in near for a, near in net.items())
    assert {len(v) for v in graph.neighbours(list(range(4)), 7).values()} == {3}
    assert [graph.degree_for(n) for n in (2, 10, 100, 1000)] == [1, 9, 28, 40]
    assert [graph.threshold_for(d, 0.5) for d in (1, 2, 3, 4, 9)] == [1, 2, 2, 3, 5]


def test_shares_rebuild_and_one_too_few_do_not() -> None:
    """The library against the definition: a polynomial's value at zero, from any of its points."""
    mine = keys.Keys.of(bytes(range(32)))
    parts = keys.share_out(mine, 7, 4)
    for chosen in ([1, 2, 3, 4], [7, 2, 5, 6], [1, 2, 3, 4, 5, 6, 7]):
        assert keys.rebuild({i: parts[i - 1][:16] for i in chosen}, 4) == mine.own
        assert keys.rebuild({i: parts[i - 1][16:] for i in chosen}, 4) == mine.pairs
    with pytest.raises(ValueError, match="3 shares of the 4"):
        keys.rebuild({i: parts[i - 1][:16] for i in (1, 2, 3)}, 4)
    assert Shamir.combine([(i, parts[i - 1][:16]) for i in (1, 2, 3)]) != mine.own


def test_a_share_opens_for_its_neighbour_only() -> None:
    a, b, c = (keys.Keys.of(os.urandom(32)) for _ in range(3))
    box = keys.seal(a.sealing, b.public.sealing, b"x" * 32, SESSION, (1, 2))
    assert len(box) == keys.SEALED
    assert keys.unseal(b.sealing, a.public.sealing, box, SESSION, (1, 2)) == b"x" * 32
    for mine, way, session in ((c, (1, 2), SESSION), (b, (1, 3), SESSION), (b, (1, 2), b"t" * 16)):
        with pytest.raises(ValueError, match="not sealed"):
            keys.unseal(mine.sealing, a.public.sealing, box, session, way)
    with pytest.raises(ValueError):
        keys.unseal(b.sealing, bytes(32), box, SESSION, (1, 2))  # a key of small order
    assert a.public != b.public and keys.Keys.of(bytes(32)).public == keys.Keys.of(bytes(32)).public


def test_a_wrong_share_of_a_pairs_seed_is_noticed() -> None:
    net = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    parties = {i: keys.Keys.of(os.urandom(32)) for i in range(3)}
    public = {i: p.public for i, p in parties.items()}
    need = dict.fromkeys(net, 2)
    out = {i: keys.share_out(parties[i], 2, 2) for i in net}
    answered = {i: {j: out[i][net[i].index(j)][:16] for j in net[i]} for i in (0, 1)}
    bad = {2: {0: bytes(16), 1: out[2][1][16:]}}
    with pytest.raises(ValueError, match="client 2's secret are wrong"):
        masks.unmasked(np.zeros(3, np.uint32), 9, answered, bad, net, public, need, SESSION)
