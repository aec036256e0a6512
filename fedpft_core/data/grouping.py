"""What simulated clients share the training rows out by: labels, sources, lengths or clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from fedpft_core.data.dialogues import length_groups
from fedpft_core.data.examples import Examples
from fedpft_core.data.partition import partition_of_run
from fedpft_core.disk import plain, whole
from fedpft_core.errors import UserError

CLUSTERS = "clusters.bin"
"""The file in a run folder that says of each training row which cluster it is in (int32)."""


class Sharing(Protocol):
    """The configuration attributes that say how rows are shared out (under ``federation.``)."""

    @property
    def partition(self) -> str:
        """One of `fedpft_core.data.partition.SCHEMES`."""
        ...

    @property
    def partition_by(self) -> str:
        """What rows are told apart by: label, source, length or cluster."""
        ...

    @property
    def dirichlet_alpha(self) -> float:
        """Concentration, for the scheme of that name."""
        ...

    @property
    def classes_per_client(self) -> int:
        """For the scheme "pathological"."""
        ...

    @property
    def groups(self) -> str:
        """Names with commas between them, for the scheme "grouped"."""
        ...


def share_out(
    examples: Examples,
    strata: Callable[[Examples], np.ndarray],
    federation: Sharing,
    clients: int,
    run_seed: int,
    run_dir: str,
) -> list[np.ndarray]:
    """The rows of each simulated client, alike for everybody who knows the run's configuration.

    Args:
        examples: the training rows.
        strata: the task's own groups (see `Task.strata`).
        federation: says how rows are shared out, and by what.
        clients: how many there are.
        run_seed: of the whole run.
        run_dir: the run folder, where the server has noted the clusters; "" for none.

    Returns:
        As of :func:`fedpft_core.data.partition.partition`.

    Raises:
        UserError: rows cannot be shared out so; names the key.
    """
    f = federation
    by = "source" if f.partition == "natural" else f.partition_by
    if by == "label":
        groups = strata(examples)
    elif by == "source":
        groups = _sources(examples, f)
    elif by == "length":
        groups = _lengths(examples)
    else:
        groups = read_clusters(run_dir, len(examples))
    return partition_of_run(
        groups, clients, f.partition, f.dirichlet_alpha, run_seed, f.classes_per_client,
        [name.strip() for name in f.groups.split(",")],
    )  # fmt: skip


def _sources(examples: Examples, f: Sharing) -> np.ndarray:
    if examples.sources is None:
        what = (
            "federation.partition = natural"
            if f.partition == "natural"
            else "federation.partition-by = source"
        )
        raise UserError(
            f"{what} needs a column that says where a row is from (data.source-column)."
        )
    return examples.sources


def _lengths(examples: Examples) -> np.ndarray:
    if len(examples) and not isinstance(examples.inputs[0], str | tuple):
        raise UserError("federation.partition-by = length is for texts, and the rows are images.")
    return length_groups(examples)


def write_clusters(run_dir: Path, groups: np.ndarray) -> None:
    """Note the cluster of each training row in a run folder.

    Args:
        run_dir: the run folder.
        groups: whole numbers (rows,).
    """
    whole.write(run_dir / CLUSTERS, groups.astype("<i4").tobytes())


def read_clusters(run_dir: str, rows: int) -> np.ndarray:
    """The cluster of each training row, as the server has noted it.

    Args:
        run_dir: the run folder.
        rows: training rows.

    Returns:
        int64 (rows,).

    Raises:
        UserError: there is no such note, or it is of other rows.
    """
    try:
        found = np.frombuffer(plain.read(Path(run_dir) / CLUSTERS), "<i4").astype(np.int64)
    except OSError as error:
        raise UserError(
            "federation.partition-by = cluster needs a run folder that server and clients share "
            f"(run.dir), with {CLUSTERS} in it."
        ) from error
    if len(found) != rows:
        raise UserError(f"{CLUSTERS} in the run folder is of {len(found)} rows, not of {rows}.")
    return found
