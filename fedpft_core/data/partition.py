"""Shares the training rows out among simulated clients, with flwr-datasets' partitioners."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedpft_core.errors import UserError
from fedpft_core.seeds import derive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

SCHEMES = (
    "iid", "dirichlet", "shards", "pathological", "grouped", "linear", "square", "exponential",
    "natural",
)  # fmt: skip
"""Values of ``federation.partition``."""
SIZES = ("linear", "square", "exponential")
"""Those by which clients have more rows the later they come, whatever the rows are."""

_SHARDS_PER_CLIENT = 2
_DRAWS = 50  # times a partitioner is asked, eleven draws each


def partition(
    strata: np.ndarray,
    num_partitions: int,
    scheme: str,
    alpha: float,
    seed: int,
    classes: int = 2,
    groups: Sequence[str] = (),
) -> list[np.ndarray]:
    """Assign every row to exactly one client.

    Args:
        strata: shape (rows,), integers: the group of each row (its class, where it is from).
        num_partitions: number of clients.
        scheme: "iid" (shuffled, equal sizes up to one row), "dirichlet" (each class is divided in
            proportions drawn from a symmetric Dirichlet distribution; client sizes differ), or
            "shards" (rows sorted by class, cut into two equal shards per client: a client sees
            about two classes; the few rows that no shard holds are dealt out), "pathological"
            (each client has rows of so many classes and no others), "grouped" (the classes are
            dealt to the groups of clients, and the rows of a group's classes are divided evenly
            among its clients), "linear", "square" and "exponential" (shuffled; sizes go up with
            the client's number, its square or its exponential), or "natural" (each group belongs
            to one client whole; where there are more groups than clients, they are dealt out).
        alpha: concentration of the Dirichlet distribution, > 0; small means uneven. Unused by the
            other schemes.
        seed: run seed; the same arguments give the same partitions.
        classes: classes of each client, for "pathological".
        groups: what the clients are grouped by, dealt out to them again and again; of "grouped"
            alone.

    Returns:
        One ascending int64 array of row numbers per client; none is empty.

    Raises:
        UserError: an unknown scheme, alpha not above 0, fewer rows than clients, or proportions so
            uneven that some client stays empty; names the ``federation.`` key.
        ValueError: the strata are not one number per row.
    """
    strata = np.asarray(strata)
    if strata.ndim != 1:
        raise ValueError(f"strata have shape {strata.shape}, one number per row is needed")
    if scheme not in SCHEMES:
        raise UserError(f"federation.partition is {scheme!r}; use one of {', '.join(SCHEMES)}.")
    if num_partitions < 1:
        raise UserError(f"federation.clients is {num_partitions}; at least 1 is needed.")
    if num_partitions > len(strata):
        raise UserError(
            f"federation.clients is {num_partitions}, but there are only {len(strata)} training "
            "rows, so some client would have none."
        )
    if scheme == "dirichlet" and not (np.isfinite(alpha) and alpha > 0):
        raise UserError(f"federation.dirichlet-alpha is {alpha:g}; it must be above 0.")
    if scheme == "shards" and _SHARDS_PER_CLIENT * num_partitions > len(strata):
        raise UserError(
            f"federation.clients is {num_partitions}: federation.partition 'shards' needs "
            f"{_SHARDS_PER_CLIENT} rows per client, and there are only {len(strata)}."
        )
    present = len(np.unique(strata))
    if scheme == "natural" and present < num_partitions:
        raise UserError(
            f"federation.clients is {num_partitions}, but the rows are of {present} groups, each "
            "of which federation.partition 'natural' gives to one client."
        )
    if scheme == "pathological" and not 1 <= classes <= present:
        raise UserError(
            f"federation.classes-per-client is {classes}; the rows are of {present} classes."
        )
    if scheme == "pathological" and num_partitions + classes - 1 < present:
        raise UserError(
            f"federation.classes-per-client is {classes}: with federation.clients = "
            f"{num_partitions} nobody has the rows of some of the {present} classes; raise either."
        )
    if num_partitions == 1:
        return [np.arange(len(strata), dtype=np.int64)]
    if scheme == "grouped":
        names = groups or ("",)
        rows = _by_group(strata, [names[i % len(names)] for i in range(num_partitions)], seed)
    else:
        rows = _partition_rows(strata, num_partitions, scheme, float(alpha), seed, classes)
    _check(rows, len(strata))
    return rows


def client_names(count: int) -> list[str]:
    """What the simulated clients of a run are called, in order.

    The names sort like their numbers, so that replies are averaged in the order of partitions.

    Args:
        count: how many there are.

    Returns:
        `client-0` and so on, with leading zeros where there are more than ten.
    """
    return [f"client-{i:0{len(str(count - 1))}d}" for i in range(count)]


def partition_of_run(
    strata: np.ndarray,
    num_partitions: int,
    scheme: str,
    alpha: float,
    run_seed: int,
    classes: int = 2,
    groups: Sequence[str] = (),
) -> list[np.ndarray]:
    """The rows of each simulated client of a run, alike for everybody who knows the run's seed.

    Args:
        strata: as of :func:`partition`.
        num_partitions: as of :func:`partition`.
        scheme: as of :func:`partition`.
        alpha: as of :func:`partition`.
        run_seed: of the whole run, from which the partition's is derived.
        classes: as of :func:`partition`.
        groups: as of :func:`partition`.

    Returns:
        As of :func:`partition`.
    """
    seed = derive(run_seed, "partition") % 2**31
    return partition(strata, num_partitions, scheme, alpha, seed, classes, groups)


def _by_group(strata: np.ndarray, groups: Sequence[str], seed: int) -> list[np.ndarray]:
    """Each group has classes of its own, about as many rows as its share of the clients."""
    rng = np.random.default_rng([zlib.crc32(b"partition"), seed])
    classes, counts = np.unique(strata, return_counts=True)
    names = sorted(set(groups))
    if len(classes) < len(names):
        raise UserError(
            f"federation.partition 'grouped' gives each of {len(names)} groups classes of its "
            f"own, and there are only {len(classes)}."
        )
    room = {name: len(strata) * groups.count(name) / len(groups) for name in names}
    dealt: dict[str, list[int]] = {name: [] for name in names}
    order = rng.permutation(len(classes))
    for left, i in zip(range(len(classes), 0, -1), order, strict=True):
        # Nobody stays without a class; else whoever has the most room left takes the next.
        bare = [name for name in names if not dealt[name]]
        among = bare if len(bare) == left else names
        taker = max(among, key=lambda name: room[name])
        dealt[taker].append(int(classes[i]))
        room[taker] -= float(counts[i])
    parts: list[np.ndarray] = [np.empty(0, np.int64) for _ in groups]
    for name in names:
        rows = rng.permutation(np.flatnonzero(np.isin(strata, dealt[name])))
        members = [i for i, group in enumerate(groups) if group == name]
        if len(rows) < len(members):
            raise UserError(
                f"federation.partition 'grouped': {len(members)} clients share the {len(rows)} "
                "rows of their classes; lower federation.clients."
            )
        for i, part in zip(members, np.array_split(rows, len(members)), strict=True):
            parts[i] = np.sort(part)
    return parts


def digest(partitions: list[np.ndarray]) -> str:
    """What tells a partition from any other.

    Args:
        partitions: row numbers of each client.

    Returns:
        The sha256 of all of them, in hex digits.
    """
    found = hashlib.sha256()
    for rows in partitions:
        found.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
    return found.hexdigest()


def _partition_rows(
    strata: np.ndarray, num_partitions: int, scheme: str, alpha: float, seed: int, classes: int
) -> list[np.ndarray]:
    from datasets import Dataset
    from flwr_datasets import partitioner as library

    # The partitioners cut in the order of the data set; shuffled first, a class's rows do not go to
    # a client in the order of the file (which is often an order by source). The row number travels
    # as a column, because partitions are data sets.
    rng = np.random.default_rng([zlib.crc32(b"partition"), seed])
    row = rng.permutation(np.arange(len(strata), dtype=np.int64))
    partitioner: Partitioner
    if scheme == "iid":
        partitioner = library.IidPartitioner(num_partitions)
    elif scheme in SIZES:
        partitioner = getattr(library, f"{scheme.capitalize()}Partitioner")(num_partitions)
    elif scheme == "natural":
        partitioner = library.NaturalIdPartitioner(partition_by="label")
    elif scheme == "pathological":
        partitioner = library.PathologicalPartitioner(
            num_partitions,
            partition_by="label",
            num_classes_per_partition=classes,
            class_assignment_mode="deterministic",
            shuffle=True,
            seed=seed,
        )
    elif scheme == "dirichlet":
        partitioner = library.DirichletPartitioner(
            num_partitions,
            partition_by="label",
            alpha=alpha,
            min_partition_size=_smallest_share(len(strata), num_partitions),
            self_balancing=False,
            shuffle=True,
            seed=seed,
        )
    else:
        partitioner = library.ShardPartitioner(
            num_partitions,
            partition_by="label",
            num_shards_per_partition=_SHARDS_PER_CLIENT,
            shuffle=True,
            seed=seed,
        )
    partitioner.dataset = Dataset.from_dict({"label": strata[row].tolist(), "row": row.tolist()})
    _draw(partitioner, _infeasible(scheme, num_partitions, alpha, len(strata)))
    partitions = [
        np.asarray(partitioner.load_partition(i)["row"], dtype=np.int64)
        for i in range(partitioner.num_partitions)
    ]
    if scheme == "natural":
        hands = np.array_split(rng.permutation(len(partitions)), num_partitions)
        partitions = [np.concatenate([partitions[i] for i in hand]) for hand in hands]
    # Equal shards leave a remainder of fewer rows than there are shards.
    rest = np.setdiff1d(row, np.concatenate(partitions))
    if scheme in ("shards", *SIZES) and len(rest):
        dealt = np.array_split(rng.permutation(rest), num_partitions)
        partitions = [np.concatenate(pair) for pair in zip(partitions, dealt, strict=True)]
    return [np.sort(rows) for rows in partitions]


def _draw(partitioner: Partitioner, infeasible: str) -> None:
    """Let the partitioner find proportions that leave nobody out.

    It gives up after eleven draws; asked again, it goes on in its random stream. Two classes among
    ten clients at alpha 0.1 need forty draws on average.

    Raises:
        UserError: it has not found any; `infeasible` is the message.
    """
    with warnings.catch_warnings():
        # One warning per redrawn set of proportions; that they ran out is an error below.
        warnings.simplefilter("ignore")
        for attempt in range(_DRAWS):
            try:
                partitioner.load_partition(0)
                return
            except ValueError as error:
                if attempt == _DRAWS - 1:
                    raise UserError(infeasible) from error


def _smallest_share(rows: int, num_partitions: int) -> int:
    """Rows every Dirichlet client must have; proportions are drawn again until they do.

    Returns:
        A tenth of an equal share, but 1 to 10.
    """
    return max(1, min(10, rows // (10 * num_partitions)))


def _infeasible(scheme: str, num_partitions: int, alpha: float, rows: int) -> str:
    if scheme == "pathological":
        return (
            f"federation.partition 'pathological' cannot share {rows} training rows out among "
            f"{num_partitions} clients, so that each has the classes it is to have; lower "
            "federation.clients."
        )
    if scheme == "dirichlet":
        return (
            f"federation.dirichlet-alpha {alpha:g} leaves some of the {num_partitions} clients "
            f"with too few of the {rows} training rows; raise it, or lower federation.clients."
        )
    return (
        f"federation.partition {scheme!r} cannot divide {rows} training rows among "
        f"{num_partitions} clients; lower federation.clients."
    )


def _check(partitions: list[np.ndarray], rows: int) -> None:
    joined = np.sort(np.concatenate(partitions))
    if not np.array_equal(joined, np.arange(rows)) or min(map(len, partitions)) == 0:
        raise RuntimeError("the partitioner lost, repeated or withheld rows")
