"""Rows that cannot be used: left out and counted up to a limit, beyond which reading stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from fedpft_core.errors import UserError

_Row = TypeVar("_Row")

LARGEST_SHARE = 0.99
"""Of the rows of a file; a larger share leaves nothing to speak of."""


class RowFault(UserError):
    """One row cannot be used, and the others may be.

    Attributes:
        kind: what is wrong in a few words, without anything that stands in the row.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class Faults:
    """The rows of one source that are left out.

    Args:
        limit: how many may be: below 1 a share of the source's rows, from 1 on a number; with 0
            the first one ends reading.
        key: the setting that the limit is from, for messages.
    """

    def __init__(self, limit: float = 0.0, key: str = "data.max-bad-rows") -> None:
        self.limit, self.key = limit, key
        self.bad: set[int] = set()
        self._kinds: Counter[str] = Counter()
        self._first: RowFault | None = None

    def note(self, row: int, fault: RowFault) -> None:
        """Leave a row out.

        Args:
            row: its number in the source, from 0.
            fault: what is wrong with it.

        Raises:
            RowFault: no row may be left out.
        """
        if not self.limit:
            raise fault
        if row not in self.bad:
            self.bad.add(row)
            self._kinds[fault.kind] += 1
            self._first = self._first or fault

    def each(self, rows: int, read: Callable[[int], _Row]) -> list[_Row]:
        """Read the rows that can be used, and hold the number of the others against the limit.

        Args:
            rows: how many the source has, those that are noted already among them.
            read: gives row i, from 0; raises `RowFault` where it cannot be used.

        Returns:
            What was read, in order.

        Raises:
            UserError: more rows than may be cannot be used; names the first of them.
        """
        found = []
        for i in range(rows):
            if i in self.bad:
                continue
            try:
                found.append(read(i))
            except RowFault as fault:
                self.note(i, fault)
        if self._first is not None and (exceeded(len(self.bad), rows, self.limit) or not found):
            counted = f"{len(self.bad)} of {rows} rows cannot be used"
            raise UserError(
                f"{str(self._first).rstrip('.')} ({counted}, {self.key} = {self.limit:g}).",
                public=f"{counted}, which is more than this node's {self.key} allows",
            ) from self._first
        return found

    def said(self, rows: int) -> str:
        """What was left out, in words.

        Args:
            rows: how many the source has.

        Returns:
            Part of a sentence, with nothing that stands in a row; empty where nothing was.
        """
        if not self.bad:
            return ""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self._kinds.most_common())
        verb = "is" if len(self.bad) == 1 else "are"
        return f"{len(self.bad)} of {rows} rows cannot be used and {verb} left out ({kinds})"


def exceeded(bad: int, rows: int, limit: float) -> bool:
    """Whether more rows than may be cannot be used.

    Args:
        bad: rows that cannot be used.
        rows: of how many.
        limit: below 1 a share of the rows, from 1 on a number.

    Returns:
        Whether there are too many; a share of few rows may be less than one row.
    """
    return bad > (limit if limit >= 1 else limit * rows)


def check_limit(limit: float, name: str) -> None:
    """Refuse a limit that is neither a share nor a number of rows.

    Args:
        limit: the setting's value.
        name: of the setting, for messages.

    Raises:
        UserError: it is negative, between 0.99 and 1, or above 1 and not whole.
    """
    whole = limit >= 1 and limit == int(limit) if limit < 2**53 else False
    if not (0 <= limit <= LARGEST_SHARE or whole):
        raise UserError(
            f"{name} = {limit:g}: expected a share of the rows from 0 to {LARGEST_SHARE:g}, or a "
            "whole number of rows."
        )


def check_learned(learned: int, rows: int, limit: float, key: str) -> None:
    """Refuse rows of which more than may be have nothing that is learned.

    Args:
        learned: rows with at least one token that is learned.
        rows: of how many.
        limit: below 1 a share of the rows, from 1 on a number.
        key: the setting that the limit is from, for messages.

    Raises:
        UserError: there are too many, or no row is learned at all.
    """
    empty = rows - learned
    if rows and empty and (not learned or exceeded(empty, rows, limit)):
        text = (
            f"in {empty} of {rows} rows the prompt leaves no room for any of the response, which "
            f"is more than {key} = {limit:g} allows: raise data.max-length"
        )
        raise UserError(f"{text}.", public=text)
