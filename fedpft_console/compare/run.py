"""Running the cells of an experiment, in this process, one after another."""

from __future__ import annotations

import contextlib
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_console.compare.cell import Cell, Point, best_rate, measure_of
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.record import summary
from fedpft_console.compare.results import Results
from fedpft_console.text import human_seconds, number
from fedpft_core import config as configs
from fedpft_core.errors import RunError, UserError
from server_app.run import schema as ev
from server_app.run.events import EventLog, read_events
from server_app.run.record import fold

if TYPE_CHECKING:
    from rich.console import Console

_BULKY = ("clients", "checkpoints")


def run(
    experiment: Experiment,
    results: Results,
    console: Console,
    points: Sequence[Point] | None = None,
) -> int:
    """Run every cell that has no result yet. The caller holds the folder.

    A failed cell is recorded with its reason and the rest goes on; the next start tries it again.

    Args:
        experiment: says which cells there are.
        results: where results are looked up and added; runs and cached sub-FMs lie in its folder.
        console: where progress is printed.
        points: lines of the tables to which the work is restricted; None runs all.

    Returns:
        How many cells failed, or could not be run since no learning rate was found for them.

    Raises:
        UserError: a result cannot be written.
    """
    points = experiment.points() if points is None else points
    best: dict[Point, float | None] = {}
    with Board(experiment, results, console, points) as board:
        for point, seed in schedule(experiment, points):
            if seed is None:
                first = [_result(c, results, board) for c in experiment.first(point)]
                best[point] = best_rate(first)
            elif best[point] is None:
                board.skip(point, seed)
            else:
                _result(experiment.cell(point, seed, best[point]), results, board)
    return board.failed


def schedule(experiment: Experiment, points: Sequence[Point]) -> Iterator[tuple[Point, int | None]]:
    """The order of work: a line first chooses its rate, then come its other seeds.

    Seed by seed over the lines of a data set, so that what an interrupted run leaves can be
    compared.

    Args:
        experiment: says which seeds each line has.
        points: the lines to run.

    Yields:
        A line with None, for its first seed at every rate, or with one of its other seeds.
    """
    for place in dict.fromkeys(p.place for p in points):
        here = {p: experiment.seeds_of(p)[1:] for p in points if p.place == place}
        yield from ((point, None) for point in here)
        for seed in dict.fromkeys(s for seeds in here.values() for s in seeds):
            yield from ((point, seed) for point, seeds in here.items() if seed in seeds)


def _result(cell: Cell, results: Results, board: Board) -> dict[str, Any]:
    found = cell.find(results.rows)
    if found:
        board.reused()
        return dict(found)
    board.begin(cell)
    folder = results.folder / "runs" / cell.digest()
    row = result(cell, folder, results.folder / "cache", board.watch)
    results.append(row)
    board.end(cell, row)
    return row


def described(cell: Cell) -> dict[str, Any]:
    """What a result says of its cell before it has run.

    Args:
        cell: the cell.

    Returns:
        JSON values: its digest, place, seed, learning rate and settings.
    """
    return {
        "digest": cell.digest(), "method": cell.method, "dataset": cell.dataset,
        **({"partition": cell.partition} if cell.partition else {}),
        "seed": cell.seed, "lr": cell.lr, "config": cell.resolved,
    }  # fmt: skip


def result(
    cell: Cell, folder: Path, cache: Path, watch: Callable[[ev.Event], None] = lambda event: None
) -> dict[str, Any]:
    """Run a cell, and whatever happens make a result of it.

    Args:
        cell: the cell.
        folder: its run folder; what is bulky in it is removed afterwards.
        cache: folder of the sub-FMs that cells share.
        watch: told each event as it is written.

    Returns:
        The row of the results: figures, or the reason under `failed`, and the seconds it took.
    """
    row = described(cell)
    start = time.perf_counter()
    try:
        row |= run_cell(cell, folder, cache, watch)
    except Exception as error:
        # Whatever it was, hours of other cells are waiting.
        known = isinstance(error, UserError | RunError)
        row["failed"] = str(error) if known else f"{type(error).__name__}: {error}"
    finally:
        for bulky in _BULKY:
            shutil.rmtree(folder / bulky, ignore_errors=True)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def run_cell(
    cell: Cell, folder: Path, cache: Path, watch: Callable[[ev.Event], None]
) -> dict[str, Any]:
    """One run in this process, clients after one another, and what the tables need of it.

    Distilled sub-FMs are shared with the other cells, unless the experiment names a folder of its
    own.

    Args:
        cell: what to run.
        folder: the run folder, emptied first.
        cache: folder of the sub-FMs that cells share.
        watch: told each event as it is written.

    Returns:
        The figures of `record.summary`, and version, torch, device and threads that it ran with.

    Raises:
        UserError: the configuration or the data are bad.
        RunError: the run failed.
    """
    # The composition root: the pipeline lives in the apps, which this package may not import
    # at its top.
    from client_app.node import client_for
    from client_app.process import ProcessCache
    from server_app.app import run as run_server
    from server_app.transport import LocalTransport

    shutil.rmtree(folder, ignore_errors=True)  # what a killed run of this cell has left
    flat = {"run.proxy-cache": str(cache)} | cell.flat | {"run.dir": str(folder)}
    config = configs.from_flat(flat)
    count = config.federation.clients
    # Its own, so that a cell neither gains from the one before nor holds its memory.
    shared = ProcessCache(max_clients=count)
    clients = {}
    for i in range(count):
        client = client_for({"partition-id": i, "num-partitions": count}, flat)
        client.cache = shared
        clients[i + 1] = client.handle
    log = Watched(folder / "events.jsonl", watch)
    _forget_peak()
    try:
        run_server(config, LocalTransport(clients), log)
    finally:
        log.close()
    lengths = [n for rows in shared.rows.values() for n in rows.train.lengths]
    out = summary(
        fold(line for _, line in read_events(folder / "events.jsonl")),
        config.train.batch_size,
        float(statistics.fmean(lengths)) if lengths else None,
    )
    return out | _machine(config)


def _forget_peak() -> None:
    """Let peak memory count from here on (Linux); elsewhere it is that of all cells so far."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _machine(config: configs.Config) -> dict[str, Any]:
    """What a cell's times depend on, and its bits may."""
    import torch

    from fedpft_core import __version__
    from fedpft_core.model.device import pick_device

    device = pick_device(config.run.device, "run.device")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": name,
        "threads": config.run.threads or torch.get_num_threads(),
    }


class Watched(EventLog):
    """An event log that also tells somebody what it writes."""

    def __init__(self, path: Path, tell: Callable[[ev.Event], None]) -> None:
        super().__init__(path)
        self.tell = tell

    def emit(self, event: ev.Event, arm: str = "") -> None:
        """Append one event, and tell of it.

        Args:
            event: what happened.
            arm: which side run it belongs to; empty = the run itself.
        """
        super().emit(event, arm)
        self.tell(event)


class Board:
    """Progress over the cells: bars on a terminal, a line for each finished cell elsewhere too."""

    def __init__(
        self, experiment: Experiment, results: Results, console: Console, points: Sequence[Point]
    ) -> None:
        self.console = console
        self.failed = 0
        self.done = 0
        self._cells = [
            (point.method, point.dataset)
            for point, seed in schedule(experiment, points)
            for _ in (experiment.first(point) if seed is None else (seed,))
        ]
        self._results = results
        self._bars: Any = None
        self._tasks: Any = ()
        self._about = ""
        self._ran = 0
        self._start = 0.0

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[note]}", markup=False, style="dim"),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self._tasks = (
                self._bars.add_task("cells", total=len(self._cells), note=""),
                self._bars.add_task("", total=None, note=""),
            )
            self._bars.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def reused(self) -> None:
        """Count a cell that had a result already."""
        self.done += 1
        self._update()

    def begin(self, cell: Cell) -> None:
        """Show that a cell is under way.

        Args:
            cell: the cell that is about to run.
        """
        self._about = cell.title()
        self._update()
        if self._bars:
            self._bars.reset(self._tasks[1], total=None, description=self._about, note="")

    def watch(self, event: ev.Event) -> None:
        """Show how far the cell under way is.

        Args:
            event: an event of the cell's run; starts of rounds and phases move its bar on a
                terminal.
        """
        if not self._bars:
            return
        if isinstance(event, ev.RoundStarted):
            self._bars.update(
                self._tasks[1], total=event.rounds, completed=event.round - 1,
                note=f"round {event.round}/{event.rounds}",
            )  # fmt: skip
        elif isinstance(event, ev.PhaseStarted) and event.phase != "round":
            self._bars.update(self._tasks[1], note=event.phase)

    def end(self, cell: Cell, row: dict[str, Any]) -> None:
        """Count a cell that has run, and print a line about it.

        Args:
            cell: the cell that `begin` was told of.
            row: its result: `seconds`, and either its values or the reason under `failed`.
        """
        self.done += 1
        self._ran += 1
        if "failed" in row:
            self.failed += 1
            figures = f"failed: {row['failed']}"
        else:
            split = cell.resolved["run.eval-split"]
            named = (("plugged-in", f"fm_{split}"), ("sub-FM", f"proxy_{split}"))
            m = measure_of(row)
            figures = ", ".join(f"{n} {m.plain(m.scaled(row[k]))}" for n, k in named if k in row)
        self._line(f"{cell.title()}: {figures} ({human_seconds(row['seconds'])}{self._left()})")
        self._update()

    def note(self, text: str) -> None:
        """Print a line that counts no cell.

        Args:
            text: the line.
        """
        self._line(text)

    def skip(self, point: Point, seed: int) -> None:
        """Count a cell as failed that cannot run, because no learning rate has been found for it.

        Args:
            point: the line that has no learning rate.
            seed: the seed at which it is not run.
        """
        self.done += 1
        self.failed += 1
        self._line(f"{point.label} on {'/'.join(filter(None, point.place))} seed {seed}: not run, "
                   "no learning rate could be chosen at the first seed")  # fmt: skip
        self._update()

    def _line(self, text: str) -> None:
        stamp = f"[{self.done}/{len(self._cells)}] "
        self.console.print(stamp + text, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """Time left, by what cells of the same method and dataset took, else by all."""
        todo = self._cells[self.done :]
        past: dict[tuple[str, str], list[float]] = {}
        for row in self._results.rows:
            if "failed" not in row and "seconds" in row:
                past.setdefault((row["method"], row["dataset"]), []).append(row["seconds"])
        known = [s for some in past.values() for s in some]
        if not todo or not known:
            return ""
        mean = statistics.fmean(known)
        left = sum(statistics.fmean(past.get((m, d), [mean])) for m, d in todo)
        return f"; about {human_seconds(left)} left"

    def _update(self) -> None:
        if not self._bars:
            return
        hours = (time.perf_counter() - self._start) / 3600
        rate = f", {number(self._ran / hours)} cells/h" if self._ran and hours else ""
        self._bars.update(
            self._tasks[0], completed=self.done,
            note=f"{self.done}/{len(self._cells)}{rate}{self._left()}",
        )  # fmt: skip
