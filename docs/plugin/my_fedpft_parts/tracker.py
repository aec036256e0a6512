"""A table of all figures, `figures.csv` in the run folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Table:
    """One line for each figure."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", newline="", encoding="utf-8")
        self.lines = csv.writer(self.file)
        self.lines.writerow(["seconds", "round", "name", "value"])

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        """Add a line for each figure."""
        self.lines.writerows([now, step, name, value] for name, value in figures.items())

    def finish(self, state: str) -> None:
        """Let go of the file."""
        self.file.close()


def start(folder: Path, name: str, config: Mapping[str, Any]) -> Table:
    """Begin a table.

    Args:
        folder: the run folder.
        name: of the run; unused.
        config: every key with its value; unused.

    Returns:
        The tracker.
    """
    return Table(folder / "figures.csv")
