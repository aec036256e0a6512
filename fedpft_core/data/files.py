"""Reads CSV, JSON, JSON lines, Parquet and data sets into columns; one clear sentence per fault.

CSV and JSON are read with the standard library: cells stay exactly the text that is in the file
(``NA`` is not turned into a missing value, ``007`` not into 7), row numbers are known for messages,
and nothing is written to a cache folder. Names on the hub and folders of data files are read
through `datasets` (`fedpft_core.data.hub`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpft_core.data import hub
from fedpft_core.data.faults import Faults, RowFault
from fedpft_core.disk import plain
from fedpft_core.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""File name endings that :func:`read_columns` understands."""

Columns = dict[str, list[Any]]


def read_columns(
    path: str | Path, columns: Sequence[str], key: str = "", faults: Faults | None = None
) -> Columns:
    """Read the named columns of one data file.

    Args:
        path: a file whose name ends in one of :data:`SUFFIXES`, or a data set as
            :func:`fedpft_core.data.hub.parse` takes it. Row numbers in messages count data
            rows from 1 (a CSV header is not a row).
        columns: names of the columns to return; all must be present.
        key: configuration key that named the file, put in front of every message; "" for none.
        faults: where rows are noted that are no rows (lines that are no JSON, CSV rows with too
            few cells); their cells are None then. None = such a row is refused.

    Returns:
        One list per requested column, all of the same length (at least 1). CSV cells are ``str``;
        JSON and Parquet cells are what the file holds, ``None`` where a JSON object lacks the key.

    Raises:
        UserError: missing or unreadable file, unsupported suffix, not UTF-8, malformed content, no
            rows, or a missing column (the present ones are listed).
    """
    wanted = list(dict.fromkeys(columns))
    if hub.is_hub(path):
        return hub.read_columns(path, wanted, key)
    path = Path(path)
    where = f"{key}: {path}" if key else str(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{where}: unsupported file type {path.suffix or '(none)'!r}; use one of "
            f"{', '.join(SUFFIXES)}."
        )
    faults = faults or Faults()
    try:
        if not path.exists():
            raise UserError(
                f"{where}: there is no such file.", public="the node's data file is not there"
            )
        if not path.is_file():
            what = "folder" if path.is_dir() else "pipe or a device"
            raise UserError(f"{where}: this is a {what}, a file is needed.")
        if suffix == ".parquet":
            result = _read_parquet(path, wanted, where)
        elif suffix in (".csv", ".tsv"):
            result = _read_csv(path, wanted, where, "\t" if suffix == ".tsv" else ",", faults)
        else:
            result = _read_json(path, wanted, where, suffix != ".json", faults)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.object[error.start]:#04x} at offset "
            f"{error.start}); save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error}).") from error
    if wanted and not result[wanted[0]]:
        raise UserError(f"{where}: the file holds no rows.")
    return result


def read_text(path: str | Path, key: str = "") -> str:
    """The whole of a UTF-8 file (a byte-order mark is dropped).

    Args:
        path: a regular file.
        key: configuration key that named the file, put in front of every message; "" for none.

    Returns:
        The text, with its line ends as they are.

    Raises:
        UserError: missing, unreadable or not UTF-8.
    """
    path = Path(path)
    where = f"{key}: {path}" if key else str(path)
    try:
        # Decoded in one piece, so that the offset in a message is the offset in the file.
        return plain.read(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.object[error.start]:#04x} at offset "
            f"{error.start}); save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error}).") from error


def _check_columns(wanted: Sequence[str], present: Sequence[str], where: str) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        listed = ", ".join(repr(name) for name in present) or "none"
        raise UserError(
            f"{where}: no column named {missing[0]!r}; the columns present are {listed}.",
            public="a column that the node config names is not in the node's data file",
        )


def _read_csv(
    path: Path, wanted: Sequence[str], where: str, delimiter: str, faults: Faults
) -> Columns:
    text = read_text(path, where.removesuffix(f": {path}") if where != str(path) else "")
    if not text.strip():
        raise UserError(f"{where}: the file is empty.")
    # The default limit of 128 KiB per cell would refuse long documents.
    csv.field_size_limit(2**31 - 1)
    # splitlines() would also cut at characters such as U+2028 inside a cell.
    reader = csv.reader(_physical_lines(text), delimiter=delimiter, strict=True)
    row = 0
    try:
        header = next(reader)
        _check_columns(wanted, header, where)
        repeated = [name for name in wanted if header.count(name) > 1]
        if repeated:
            raise UserError(f"{where}: the column {repeated[0]!r} occurs more than once.")
        places = [header.index(name) for name in wanted]
        result: Columns = {name: [] for name in wanted}
        for cells in reader:
            if not cells:
                continue  # a blank line is not a row
            row += 1
            if len(cells) != len(header):
                text = f"{where}: row {row} has {len(cells)} cells, the header has {len(header)}."
                faults.note(row - 1, RowFault(text, "with another number of cells"))
                for name in wanted:
                    result[name].append(None)
                continue
            for name, place in zip(wanted, places, strict=True):
                result[name].append(cells[place])
    except csv.Error as error:
        raise UserError(f"{where}: row {row + 1} is not valid CSV ({error}).") from error
    return result


def _physical_lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _read_json(
    path: Path, wanted: Sequence[str], where: str, lines: bool, faults: Faults
) -> Columns:
    text = read_text(path, where.removesuffix(f": {path}") if where != str(path) else "")
    if not text.strip():
        raise UserError(f"{where}: the file is empty.")
    if not lines:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            # Many ".json" files on dataset hubs are JSON lines.
            if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
                at = error.lineno if isinstance(error, json.JSONDecodeError) else 1
                raise UserError(
                    f"{where}: line {at} is not valid JSON ({json_fault(error)})."
                ) from error
            lines = True
        else:
            if isinstance(value, dict):
                value = [value]
            if not isinstance(value, list):
                raise UserError(f"{where}: a list of objects is needed.")
            return _columns_of_objects(value, wanted, where, faults)
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                text = f"{where}: line {number} is not valid JSON ({json_fault(error)})."
                faults.note(len(rows), RowFault(text, "that are no JSON"))
                rows.append({})
    return _columns_of_objects(rows, wanted, where, faults)


def json_fault(error: ValueError | RecursionError) -> str:
    """Say in words why a text could not be read as JSON, without the place.

    Args:
        error: what ``json.loads`` raised.

    Returns:
        Part of a sentence, without a full stop.
    """
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits"


def _columns_of_objects(
    rows: Sequence[Any], wanted: Sequence[str], where: str, faults: Faults
) -> Columns:
    present: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            text = f"{where}: row {number} is not an object with named fields."
            faults.note(number - 1, RowFault(text, "that are no objects"))
            continue
        present.update(dict.fromkeys(row))
    if rows:
        _check_columns(wanted, list(present), where)
    objects = [row if isinstance(row, dict) else {} for row in rows]
    return {name: [row.get(name) for row in objects] for name in wanted}


def _read_parquet(path: Path, wanted: Sequence[str], where: str) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile reads this one file; read_table would treat the folder as a dataset.
        with pq.ParquetFile(path) as file:
            _check_columns(wanted, file.schema_arrow.names, where)
            table = file.read(columns=list(wanted))
            return {name: table.column(name).to_pylist() for name in wanted}
    except UnicodeDecodeError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        # The last three: dates that Python does not have, and columns of one name.
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{where}: not a readable Parquet file ({reason}).") from error
