"""`fedpft compare`: run experiments, and make or check what is made of their cells."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_console.compare.cell import Point
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.parse import read
from fedpft_console.compare.results import CELLS, Results
from fedpft_core.disk import whole
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpft_console.compare.crew import Crew


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the parser of `fedpft compare`.
    """
    parser.add_argument("experiment", metavar="FILE", nargs="+", help="experiment file (YAML)")
    parser.add_argument(
        "--results", metavar="DIR", help="results folder (default: beside the file, of its name)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--table", action="store_true", help="run nothing: print the tables of what is there"
    )
    what.add_argument(
        "--write", action="store_true",
        help="run nothing: make tables, plots and report.html again from the cells",
    )  # fmt: skip
    what.add_argument(
        "--check", action="store_true",
        help="run nothing: fail if the tables beside the cells are not what the cells say",
    )  # fmt: skip
    parser.add_argument(
        "--only", metavar="NAME", action="append",
        help="run only METHOD[/DATASET[/PARTITION]], wildcards allowed; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--part", metavar="I/N",
        help="run only the I-th of N parts; each in a --results folder of its own",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=0,
        help="run N cells at a time, each in a process of its own",
    )  # fmt: skip
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="run cells as tasks on this Ray cluster (RAY_AUTH_MODE=token must be set)",
    )  # fmt: skip
    parser.add_argument(
        "--cell-cpus", metavar="N", type=int, default=0,
        help="cores and threads of a cell (default: with --jobs a part of this machine's, else 1)",
    )  # fmt: skip
    parser.add_argument(
        "--cell-gpus", metavar="X", type=float, default=0.0, help="with --ray: GPUs of a cell"
    )
    parser.add_argument(
        "--cell-memory", metavar="MB", type=int, default=0, help="with --ray: memory of a cell"
    )
    parser.add_argument(
        "--merge", metavar="DIR", action="append", default=[],
        help="first take over the finished cells of another results folder; may be repeated",
    )  # fmt: skip


def command(args: argparse.Namespace, console: Console) -> int:
    """Run experiments, or make or check what is made of their cells.

    Args:
        args: as `arguments` declares them.
        console: where progress is printed; tables go to standard output.

    Returns:
        The exit status: 1 when a cell failed or a table is stale, else 0.

    Raises:
        UserError: an experiment file is bad, an option does not fit, or the results folder cannot
            be read, held or written.
    """
    from fedpft_console.compare import tables

    if args.results and len(args.experiment) > 1:
        raise UserError("--results is the folder of one experiment, and several are given.")
    jobs = []
    for name in args.experiment:
        path = Path(name)
        folder = Path(args.results) if args.results else path.with_suffix("")
        jobs.append((path, read(path), folder))
    if args.check:
        return _check(jobs)
    status = 0
    for path, experiment, folder in jobs:
        results = Results(folder)
        if args.merge or not (args.table or args.write):
            with results.writing():
                _merge(results, args.merge, console)
                if not (args.table or args.write):
                    status |= _run(args, experiment, results, console)
        _warn_of_strays(experiment, results, path)
        if not args.write:
            print(tables.markdown(experiment, results.rows), end="")
        if not args.table:
            _write(experiment, results)
    return status


def _merge(results: Results, folders: list[str], console: Console) -> None:
    for name in folders:
        if not (Path(name) / CELLS).is_file():
            raise UserError(f"--merge {name}: no {CELLS} there.")
        count = results.merge(Results(Path(name)))
        console.print(f"{count} cells taken over from {name}", highlight=False, markup=False)


def _run(
    args: argparse.Namespace, experiment: Experiment, results: Results, console: Console
) -> int:
    from fedpft_console.compare import run

    points = selected(experiment.points(), args.only, args.part)
    if not points:
        print(
            f"fedpft: --part {args.part}: there are fewer lines than parts, and none in this one; "
            "nothing is run.",
            file=sys.stderr,
        )
    if args.jobs or args.ray:
        from fedpft_console.compare import parallel

        crew, threads = _crew(args, results.folder)
        failed = parallel.run(experiment, results, console, points, crew, threads)
    else:
        failed = run.run(experiment, results, console, points)
    if failed:
        console.print(f"{failed} cells failed; starting again tries them again", highlight=False)
    return 1 if failed else 0


def _crew(args: argparse.Namespace, folder: Path) -> tuple[Crew, int]:
    """Who runs the cells, and on how many threads each."""
    from fedpft_console.compare import crew
    from fedpft_console.launch import cpu_count

    least = {"--jobs": args.jobs, "--cell-cpus": args.cell_cpus, "--cell-gpus": args.cell_gpus,
             "--cell-memory": args.cell_memory}  # fmt: skip
    for name, value in least.items():
        if value < 0:
            raise UserError(f"{name} {value:g}: expected at least 0.")
    if args.jobs and args.ray:
        raise UserError("--jobs and --ray exclude each other.")
    if args.ray:
        cpus = args.cell_cpus or 1
        memory = args.cell_memory * 10**6
        return crew.RayTasks(args.ray, folder, cpus, args.cell_gpus, memory), cpus
    return crew.Processes(args.jobs, folder), args.cell_cpus or max(1, cpu_count() // args.jobs)


def selected(points: list[Point], only: list[str] | None, part: str | None) -> list[Point]:
    """The lines that --only and --part leave.

    Args:
        points: all lines of the experiment, in order.
        only: patterns METHOD[/DATASET[/PARTITION]]; None or empty keeps all lines.
        part: I/N, for every N-th of those lines beginning with the I-th; None or empty keeps all.

    Returns:
        The lines, in their order; empty where a part has none.

    Raises:
        UserError: a pattern names nothing, or `part` is not of the form I/N with I from 1 to N.
    """
    if only:
        for pattern in only:
            if not any(p.matches([pattern]) for p in points):
                raise UserError(f"--only {pattern}: nothing in the experiment has that name.")
        points = [p for p in points if p.matches(only)]
    if part:
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
        if not match or int(match[1]) > int(match[2]):
            raise UserError(f"--part {part}: expected I/N with I from 1 to N.")
        # A line is never cut: its seeds need the rate that its first seed has chosen.
        points = points[int(match[1]) - 1 :: int(match[2])]
    return points


def _write(experiment: Experiment, results: Results) -> None:
    from fedpft_console.compare import page, plots

    made: dict[str, bytes] = {name: text.encode() for name, text in texts(experiment, results)}
    made |= plots.files(experiment, results.rows)
    made["report.html"] = page.html(experiment, results.rows).encode()
    try:
        results.folder.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            whole.write(results.folder / name, data)
    except OSError as error:
        raise UserError(f"{results.folder}: cannot be written ({error.strerror}).") from error
    print(f"{results.folder}: {', '.join(made)}")


def texts(experiment: Experiment, results: Results) -> list[tuple[str, str]]:
    """The files that are committed beside the cells, and checked.

    Args:
        experiment: which lines there are.
        results: the cells run so far.

    Returns:
        (file name, content) of table.md and table.csv; equal cells give equal texts.
    """
    from fedpft_console.compare import table_csv, tables

    return [
        ("table.md", tables.markdown(experiment, results.rows)),
        ("table.csv", table_csv.text(experiment, results.rows)),
    ]


def _check(jobs: list[tuple[Path, Experiment, Path]]) -> int:
    status = 0
    for path, experiment, folder in jobs:
        results = Results(folder)
        if not results.rows:
            print(f"{path}: no cells yet")
            continue
        for name, text in texts(experiment, results):
            file = folder / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                why = " ".join(_strays(experiment, results))
                print(
                    f"fedpft: error: {file} is not what {folder / CELLS} says; "
                    f"`fedpft compare {path} --write` renews it.{' ' if why else ''}{why}",
                    file=sys.stderr,
                )
                status = 1
                break
        else:
            print(f"{path}: up to date")
    return status


def _strays(experiment: Experiment, results: Results) -> list[str]:
    """Cells of this name that were run with other settings, such as a default since changed."""
    from fedpft_console.compare import tables

    out: dict[str, None] = {}
    for cell in tables.wanted(experiment, results.rows):
        if cell.find(results.rows) is None and cell.failure(results.rows) is None:
            differing = tables.nearest(cell, results.rows)
            if differing:
                said = ", ".join(f"{k} = {a!r}, now {b!r}" for k, (a, b) in differing.items())
                out[f"{cell.method} on {cell.dataset} was run with {said}."] = None
    return list(out)


def _warn_of_strays(experiment: Experiment, results: Results, path: Path) -> None:
    for text in _strays(experiment, results):
        print(f"fedpft: {path}: {text}", file=sys.stderr)
