"""Names of labels: from a setting or from rows, and the number that a cell's name stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedpft_core.data import files
from fedpft_core.data.rows import cell_text
from fedpft_core.errors import UserError

STRANGE = "a row of this node has a label that is none of the run's"
"""What a node may say to others of a label that it does not know."""


def label_index(value: Any, names: Sequence[str]) -> int | None:
    """The class number that a label cell stands for, or None if it stands for none.

    A cell is first compared with the names, as text without surrounding blanks (``3``, ``3.0`` and
    ``" 3 "`` are all the text "3"). An integer that is no name is an index into ``names``, unless
    all names are integers themselves, where it would be a label nobody has declared.

    Args:
        value: the cell.
        names: the task's labels in order.

    Returns:
        Its position in `names`.
    """
    return LabelTable(names).index(value)


class LabelTable:
    """Looks label cells up in the list of names; see :func:`label_index`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_name = {cell_text(name): i for i, name in enumerate(names)}
        self.all_integers = all(_as_integer(name) is not None for name in names)
        if self.all_integers:
            self.by_name = {str(_as_integer(name)): i for i, name in enumerate(names)}

    def index(self, value: Any) -> int | None:
        """The class number of a cell, or None if it stands for no label.

        Args:
            value: the cell.

        Returns:
            A position in the list of names.
        """
        text = cell_text(value)
        number = _as_integer(text)
        if self.all_integers:
            return None if number is None else self.by_name.get(str(number))
        if text in self.by_name:
            return self.by_name[text]
        if number is not None and 0 <= number < len(self.by_name):
            return number
        return None


def _as_integer(value: Any) -> int | None:
    """The integer a cell's text writes ("007" and "3.0" do), or None."""
    text = cell_text(value)
    if text.endswith(".0"):
        text = text[:-2]
    digits = text[1:] if text[:1] in "+-" else text
    # No label is a number of so many digits that Python would refuse to read it.
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 1000 else None


def label_names(setting: str) -> tuple[str, ...]:
    """The label names that ``data.labels`` lists.

    Args:
        setting: a path to a JSON list of names, or names separated by commas.

    Returns:
        The names in order.

    Raises:
        UserError: it names fewer than two, one twice, or an unreadable file.
    """
    if setting.lower().endswith(".json"):
        text = files.read_text(setting, "data.labels")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise UserError(
                f"data.labels: {setting}: line {at} is not valid JSON ({files.json_fault(error)})."
            ) from error
        if not isinstance(values, list) or not all(
            isinstance(value, str | int) and not isinstance(value, bool) for value in values
        ):
            raise UserError(f"data.labels: {setting}: a JSON list of names is needed.")
        names = tuple(cell_text(value) for value in values)
    else:
        names = tuple(cell_text(name) for name in setting.split(","))
    if not all(names):
        raise UserError("data.labels: a label name is empty.")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"data.labels: the name {name!r} occurs more than once.")
    if len(names) < 2:
        raise UserError(f"data.labels: {setting!r} is one name; two or more are needed.")
    return names


def names_from_rows(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """Sorted unique labels; numerically, and spelt as plain integers, if all are integers.

    Args:
        labels: cells, one label each.
        where: key and file, put in front of the message.

    Returns:
        The names in order.

    Raises:
        UserError: there is no cell.
    """
    if not labels:
        raise UserError(f"{where}: the file holds no rows.")
    texts = {cell_text(value) for value in labels}
    numbers = {_as_integer(text) for text in texts}
    if None not in numbers:
        return tuple(str(number) for number in sorted(n for n in numbers if n is not None))
    return tuple(sorted(texts))


def shown(names: Sequence[str]) -> str:
    """Some of the names, for a message.

    Args:
        names: the task's labels.

    Returns:
        The first eight in quotes, and how many more there are.
    """
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(repr(name) for name in names[:8]) + more


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """The fields of a model's config that name its outputs.

    Args:
        names: the task's labels in order.

    Returns:
        By field.
    """
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
