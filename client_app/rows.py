"""A node's rows as model inputs: from the disk or encoded anew, and divided once for all rounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from client_app import rowcache
from client_app.process import Held, Rows
from client_app.rowcache import RowCache
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.faults import check_learned
from fedpft_core.errors import UserError
from fedpft_core.model.processor import from_files
from fedpft_core.task import Task, Writer

log = logging.getLogger("fedpft")


@dataclass(frozen=True)
class Source:
    """Where a node's rows come from, and where they are kept once encoded.

    Attributes:
        name: of the client, for messages.
        load: reads the rows as a task does; raises UserError for data that cannot be used.
        kept: keeps encoded rows on disk; None for no such place.
        digest: gives a digest of all the rows depend on at the source (a file's content, the
            columns), or empty where only the rows themselves can tell.
        max_bad: rows that may have no response left where they are cut to the model's length: below
            1 a share, from 1 on a number.
    """

    name: str
    load: Callable[[Task], Examples]
    kept: RowCache | None
    digest: Callable[[], str]
    max_bad: float = math.inf


def encoded(source: Source, held: Held, processors: dict[str, Any]) -> tuple[Encoded, np.ndarray]:
    """All rows and their folds: from the disk where the same have been encoded before.

    Args:
        source: of the rows.
        held: the sub-FM that is to read them.
        processors: those made so far in this process, by `Held.reader`; added to.

    Returns:
        The rows in their order, and the number of each row's fold, (rows,).

    Raises:
        UserError: there are no rows, or data that cannot be used.
    """
    digest = source.digest() if source.kept else ""
    key = key_of(held, digest)
    found = source.kept.get(key) if source.kept and digest else None
    if found:
        return found
    examples = source.load(held.model.task)
    if not len(examples):
        raise UserError(f"client {source.name} has no rows.", public="this node has no rows")
    if source.kept and not digest:
        key = key_of(held, rowcache.content_of(examples))
        found = source.kept.get(key)
        if found:
            return found
    if examples.left_out:
        log.warning("client %s: %s", source.name, examples.left_out)
    if held.reader not in processors:
        processors[held.reader] = from_files(held.files, held.model.task.reads)
    rows = held.model.task.encode(
        examples, processors[held.reader], held.model.max_length,
        lambda text: log.warning("client %s: %s", source.name, text),
    )  # fmt: skip
    if isinstance(held.model.task, Writer):
        check_learned(rows.learned_rows, len(rows), source.max_bad, "max-bad-rows")
    folds = rowcache.folds_of(examples)
    # Not what was read while the file changed, under the digest of what it was before.
    if source.kept and source.digest() == digest:
        try:
            source.kept.put(key, rows, folds)
        except OSError as error:
            log.warning("client %s: encoded rows not kept on disk: %s", source.name, error)
    return rows, folds


def divided(rows: Encoded, folds: np.ndarray, share: float, name: str) -> Rows:
    """Rows to train on, and those that are kept from training.

    Args:
        rows: all rows of a node.
        folds: the number of each row's fold, (rows,).
        share: the node's validation-share.
        name: of the client, for messages.

    Returns:
        Both parts; the second is empty where the share is 0.

    Raises:
        UserError: no row is left to train on.
    """
    out = rowcache.held_out(folds, share)
    if out.all():
        text = (
            f"client {name}: validation-share = {share:g} leaves none of its "
            f"{len(out)} rows to train on."
        )
        raise UserError(text, public=text)
    if out.any():
        return Rows(rows.select(np.flatnonzero(~out)), rows.select(np.flatnonzero(out)))
    return Rows(rows, rows.select(np.empty(0, np.int64)))


def split_sizes(rows: Examples, share: float) -> tuple[int, int]:
    """How many rows a node trains on, and how many it keeps from training.

    Args:
        rows: all its rows.
        share: about what part of them it keeps from training, in [0, 1].

    Returns:
        Both counts; together they are all rows.
    """
    out = int(rowcache.held_out(rowcache.folds_of(rows), share).sum()) if share else 0
    return len(rows) - out, out


def key_of(held: Held, digest: str) -> str:
    """Names encoded rows by everything they depend on.

    Args:
        held: the sub-FM that reads them.
        digest: of the rows at their source.

    Returns:
        The name they are kept by.
    """
    task = held.model.task
    return rowcache.key_of(
        digest, held.reader, task.labels, held.model.max_length, task.name,
        version("transformers"), version("tokenizers"), version("pillow"),
    )  # fmt: skip
