"""One cell, wherever it runs: in this process, in one of several, or on a Ray cluster."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path

from fedpft_console.compare.cell import Cell
from fedpft_console.compare.run import result
from fedpft_core.config import home


def to_text(cell: Cell) -> str:
    """A cell as it is handed to another process.

    Args:
        cell: the cell.

    Returns:
        JSON in one line.
    """
    return json.dumps([cell.method, cell.dataset, cell.seed, cell.lr, cell.flat, cell.partition])


def elsewhere(text: str) -> tuple[str, dict[str, bytes]]:
    """Run a cell on a machine that has no part in the results folder.

    Args:
        text: as `to_text` gives it.

    Returns:
        The result as JSON, and the files of its run folder by their relative names.
    """
    with tempfile.TemporaryDirectory(prefix="fedpft-cell-") as name:
        folder = Path(name) / "run"
        row = result(Cell(*json.loads(text)), folder, home() / "sub-fms")
        files = {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
    return json.dumps(row), files


def main() -> None:
    """Run the cell of the first line of standard input; the result goes to the file named there.

    Standard input stays open as long as whoever has asked lives; this process ends with it.
    """
    folder, cache, out, cell = json.loads(sys.stdin.readline())

    def end_with_the_other() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_other, daemon=True).start()
    row = result(Cell(*json.loads(cell)), Path(folder), Path(cache))
    Path(out).write_text(json.dumps(row), encoding="utf-8")
    os._exit(0)  # past the thread that reads


if __name__ == "__main__":
    main()
