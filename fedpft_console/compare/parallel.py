"""Cells side by side: the order of work, one writer, and cells whose machine is gone run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedpft_console.compare.cell import Cell, Point, best_rate
from fedpft_console.compare.crew import Crew, Lost
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.results import Results
from fedpft_console.compare.run import Board, described, schedule

if TYPE_CHECKING:
    from rich.console import Console

MOST_LOSSES = 3
"""How often a cell is begun whose process or machine is gone before it has ended."""


def run(
    experiment: Experiment,
    results: Results,
    console: Console,
    points: Sequence[Point],
    crew: Crew,
    threads: int,
) -> int:
    """Run every cell that has no result yet, as many at once as there is room for.

    The caller holds the folder; this process alone writes to it.

    Args:
        experiment: says which cells there are.
        results: where results are looked up and added.
        console: where progress is printed.
        points: lines of the tables to which the work is restricted.
        crew: who runs the cells.
        threads: of each cell that does not say `run.threads`.

    Returns:
        How many cells failed, or could not be run since no learning rate was found for them.

    Raises:
        UserError: a result cannot be written.
    """
    lost: Counter[str] = Counter()
    with Board(experiment, results, console, points) as board, crew:
        work = _Work(experiment, points, results, board)
        while True:
            for _ in range(crew.room()):
                cell = work.next()
                if cell is None:
                    break
                board.begin(cell)
                crew.begin(_with_threads(cell, threads))
            if not work.at_work:
                return board.failed
            for cell, row in crew.ended():
                digest = cell.digest()
                if isinstance(row, Lost):
                    lost[digest] += 1
                    if lost[digest] < MOST_LOSSES:
                        board.note(f"{cell.title()}: {row}; it is begun again")
                        work.again(digest)
                        continue
                    row = described(cell) | {"failed": f"{row}, {MOST_LOSSES} times", "seconds": 0}
                results.append(row)
                board.end(cell, row)
                work.done(digest, row)


def _with_threads(cell: Cell, threads: int) -> Cell:
    """The same cell on so many threads, unless the experiment says how many."""
    if cell.flat.get("run.threads"):
        return cell
    return replace(cell, flat={**cell.flat, "run.threads": threads})


class _Work:
    """What is to be done, in order: a line first chooses its rate, then come its other seeds."""

    def __init__(
        self, experiment: Experiment, points: Sequence[Point], results: Results, board: Board
    ) -> None:
        self.experiment, self.results, self.board = experiment, results, board
        self.todo: list[tuple[Point, int | None, int]] = []
        self.first: dict[Point, list[dict[str, Any] | None]] = {}
        for point, seed in schedule(experiment, points):
            if seed is None:
                count = len(list(experiment.first(point)))
                self.first[point] = [None] * count
                self.todo += [(point, None, i) for i in range(count)]
            else:
                self.todo.append((point, seed, 0))
        self.at_work: dict[str, list[tuple[Point, int | None, int]]] = {}

    def next(self) -> Cell | None:
        """The next cell that can begin; None where there is none, or none yet."""
        for entry in list(self.todo):
            point, seed, i = entry
            if seed is None:
                cell = list(self.experiment.first(point))[i]
            else:
                first = [row for row in self.first[point] if row is not None]
                if len(first) < len(self.first[point]):
                    continue
                rate = best_rate(first)
                if rate is None:
                    self.todo.remove(entry)
                    self.board.skip(point, seed)
                    continue
                cell = self.experiment.cell(point, seed, rate)
            digest = cell.digest()
            found = cell.find(self.results.rows)
            if found is not None:
                self.todo.remove(entry)
                self.board.reused()
                self._note(entry, dict(found))
                continue
            if digest in self.at_work:
                continue  # another line has it: its result will do
            self.todo.remove(entry)
            self.at_work[digest] = [entry]
            return cell
        return None

    def again(self, digest: str) -> None:
        """Put a cell back whose machine is gone."""
        self.todo[:0] = self.at_work.pop(digest)

    def done(self, digest: str, row: dict[str, Any]) -> None:
        """Take a result."""
        for entry in self.at_work.pop(digest):
            self._note(entry, row)

    def _note(self, entry: tuple[Point, int | None, int], row: dict[str, Any]) -> None:
        point, seed, i = entry
        if seed is None:
            self.first[point][i] = row
