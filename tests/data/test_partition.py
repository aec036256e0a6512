"""Partitions: every row once, nobody empty, the same seed the same partitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core import config as configs
from fedpft_core.data.partition import SCHEMES, digest, partition
from fedpft_core.errors import UserError


def labels_of(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, rows)


def check(parts: list[np.ndarray], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
    for part in parts:
        assert part.dtype == np.int64
        assert np.array_equal(part, np.sort(part))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 120),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([0.1, 1.0, 100.0]),
    st.integers(0, 2**63 - 1),
)
def test_every_row_once_or_a_sentence(
    scheme: str, rows: int, classes: int, clients: int, alpha: float, seed: int
) -> None:
    labels = labels_of(rows, classes)
    try:
        parts = partition(labels, clients, scheme, alpha, seed)
    except UserError as error:
        assert "federation." in str(error)
        free = ("dirichlet", "pathological", "natural", "exponential", "square", "linear")
        assert clients * 2 > rows or scheme in free
    else:
        check(parts, rows, clients)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_function_of_the_seed(scheme: str) -> None:
    labels = labels_of(500, 5)
    first = partition(labels, 5, scheme, 1.0, 7)
    np.random.seed(1)  # the global stream has no say
    again = partition(labels, 5, scheme, 1.0, 7)
    other = partition(labels, 5, scheme, 1.0, 8)
    assert [p.tolist() for p in first] == [p.tolist() for p in again]
    assert [p.tolist() for p in first] != [p.tolist() for p in other]


def test_iid_sizes_and_mixture() -> None:
    labels = np.repeat(np.arange(4), 250)
    parts = partition(labels, 7, "iid", 1.0, 0)
    assert {len(p) for p in parts} == {142, 143}
    for part in parts:
        assert min(np.bincount(labels[part], minlength=4)) > 15


def skew(parts: list[np.ndarray], labels: np.ndarray) -> float:
    return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))


def test_dirichlet_skew_falls_with_alpha() -> None:
    labels = labels_of(4000, 8)
    values = [skew(partition(labels, 10, "dirichlet", a, 0), labels) for a in (0.1, 1.0, 1000.0)]
    assert values[0] > values[1] + 0.1 > values[2] + 0.2
    assert values[2] < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_two_classes_can_be_shared_out_very_unevenly(seed: int) -> None:
    # One draw in forty leaves none of the ten clients below ten rows.
    labels = np.repeat([0, 1], 3000)
    parts = partition(labels, 10, "dirichlet", 0.1, seed)
    check(parts, 6000, 10)
    assert min(map(len, parts)) >= 10


def test_dirichlet_rows_of_a_class_are_shuffled_first() -> None:
    # Without the shuffle each client would get one run of consecutive rows per class.
    labels = np.zeros(1000, dtype=np.int64)
    for part in partition(labels, 4, "dirichlet", 1000.0, 0):
        assert (np.diff(part) == 1).mean() < 0.5


def test_every_scheme_can_be_configured() -> None:
    assert configs.keys()["federation.partition"].choices == SCHEMES


def test_shards_hold_few_classes_and_lose_no_row() -> None:
    labels = np.repeat(np.arange(10), 100)
    parts = partition(labels, 7, "shards", 1.0, 0)  # 14 shards of 71 rows, 6 rows over
    check(parts, 1000, 7)
    assert {len(p) for p in parts} == {142, 143}
    assert max(len(np.unique(labels[p])) for p in parts) <= 5
    assert len(np.unique(labels)) == 10


def test_one_client_has_all() -> None:
    assert partition(np.array([1, 0, 1]), 1, "dirichlet", 0.1, 0)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 3, "uniform", 1.0), "federation.partition is 'uniform'; use one of iid"),
        ((10, 0, "iid", 1.0), "federation.clients is 0"),
        ((10, 11, "iid", 1.0), "federation.clients is 11, but there are only 10 training rows"),
        ((10, 3, "dirichlet", 0.0), "federation.dirichlet-alpha is 0"),
        ((10, 3, "dirichlet", -1.0), "federation.dirichlet-alpha is -1"),
        ((10, 3, "dirichlet", float("nan")), "federation.dirichlet-alpha is nan"),
        ((10, 6, "shards", 1.0), "federation.clients is 6"),
        ((30, 30, "dirichlet", 0.01), "federation.dirichlet-alpha 0.01 leaves some of the 30"),
    ],
)
def test_wrong_settings_name_the_key(
    arguments: tuple[int, int, str, float], words: str, recwarn: pytest.WarningsRecorder
) -> None:
    rows, clients, scheme, alpha = arguments
    with pytest.raises(UserError) as caught:
        partition(labels_of(rows, 2), clients, scheme, alpha, 0)
    assert words in str(caught.value)
    assert not [w for w in recwarn if "min_partition_size" in str(w.message)]


def test_groups_have_labels_of_their_own() -> None:
    strata = np.repeat(np.arange(6), 20)
    parts = partition(strata, 6, "grouped", 1.0, 3, groups=("a", "a", "b"))
    classes = [set(strata[p].tolist()) for p in parts]
    small = classes[0] | classes[1] | classes[3] | classes[4]
    large = classes[2] | classes[5]
    assert small | large == set(range(6)) and not small & large
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    assert len(small) == 4 and len(large) == 2
    again = partition(strata, 6, "grouped", 1.0, 3, groups=("a", "a", "b"))
    assert all(np.array_equal(p, q) for p, q in zip(parts, again, strict=True))


def test_more_groups_than_labels_are_refused() -> None:
    with pytest.raises(UserError, match="grouped"):
        partition(np.repeat(np.arange(2), 9), 3, "grouped", 1.0, 3, groups=("a", "b", "c"))


@pytest.mark.parametrize("groups", ["", "a,,b"])
def test_groups_have_names(groups: str) -> None:
    from fedpft_core.config import from_flat

    with pytest.raises(UserError, match=r"federation\.groups"):
        from_flat({"federation.partition": "grouped", "federation.groups": groups})


def test_natural_groups_stay_whole() -> None:
    ids = np.random.default_rng(0).integers(0, 30, 400)
    for clients in (30, 7):
        parts = partition(ids, clients, "natural", 1.0, 3)
        check(parts, 400, clients)
        owners = [set(ids[p].tolist()) for p in parts]
        assert sum(map(len, owners)) == 30
        assert {len(o) for o in owners} <= {30 // clients, -(-30 // clients)}
    assert partition(ids, 7, "natural", 1.0, 3)[0].tolist() != parts[1].tolist()
    with pytest.raises(UserError, match="the rows are of 30 groups"):
        partition(ids, 31, "natural", 1.0, 3)


def test_pathological_clients_have_so_many_classes() -> None:
    labels = np.arange(600) % 6
    for classes in (1, 2, 6):
        parts = partition(labels, 12, "pathological", 1.0, 0, classes)
        check(parts, 600, 12)
        assert {len(set(labels[p].tolist())) for p in parts} == {classes}
    with pytest.raises(UserError, match="classes-per-client is 7"):
        partition(labels, 12, "pathological", 1.0, 0, 7)
    with pytest.raises(UserError, match="nobody has the rows"):
        partition(labels, 4, "pathological", 1.0, 0, 1)


@pytest.mark.parametrize(("scheme", "power"), [("linear", 1), ("square", 2)])
def test_sizes_grow_with_the_clients_number(scheme: str, power: int) -> None:
    sizes = [len(p) for p in partition(labels_of(5500, 3), 5, scheme, 1.0, 0)]
    shares = np.arange(1, 6) ** power / sum(np.arange(1, 6) ** power)
    assert np.allclose(np.array(sizes) / 5500, shares, atol=1e-3)
    sizes = [len(p) for p in partition(labels_of(5500, 3), 5, "exponential", 1.0, 0)]
    assert sizes == sorted(sizes) and 2.5 < sizes[4] / sizes[3] < 2.9


def test_the_digest_tells_partitions_apart() -> None:
    a, b = np.arange(3), np.arange(3, 5)
    assert digest([a, b]) == digest([a.copy(), b.copy()])
    assert len({digest(p) for p in ([a, b], [b, a], [np.arange(5)], [np.arange(4), b[1:]])}) == 4
