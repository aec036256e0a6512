"""`fedpft run`: run a federation and print the outcome."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_console.commands import settings
from fedpft_console.commands.folder import (
    CHECKPOINTS,
    EVENTS_FILE,
    check_room,
    choose_folder,
    create_folder,
    locked,
    resume_config,
    save_config,
    save_rounds,
    writing,
)
from fedpft_console.launch import cluster
from fedpft_core import config
from fedpft_core.config import Scalar
from fedpft_core.errors import RunError, UserError
from server_app.run.events import EventLog
from server_app.run.schema import Memory

if TYPE_CHECKING:
    from rich.console import Console

    from fedpft_console.launch import Result
    from fedpft_console.progress import Follower


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `run` is added.
    """
    run = commands.add_parser(
        "run", parents=[settings.arguments()], help="run a federation and report on it"
    )
    run.add_argument("--run-dir", metavar="DIR", help="new run folder (default ./runs/<time>)")
    run.add_argument("--resume", metavar="RUN", help="continue the run in this run folder")
    run.add_argument(
        "--rounds", type=int, metavar="N",
        help="rounds in all, as federation.rounds; with --resume more than there were, to add some",
    )  # fmt: skip
    run.add_argument(
        "--superlink", metavar="NAME",
        help="submit to this connection of your Flower configuration, instead of simulating",
    )  # fmt: skip
    run.add_argument(
        "--ray", metavar="ADDRESS",
        help="simulate the clients on this Ray cluster (RAY_AUTH_MODE=token must be set)",
    )  # fmt: skip
    run.add_argument(
        "--tracker", metavar="NAME", action="append", default=[],
        help="also hand the figures to this tracker, such as tensorboard; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true",
        help="try the configuration in seconds: two rounds of a small random model of the same "
        "family on fabricated rows; nothing is kept",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="print only the folder and the outcome")
    run.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Run a federation, or continue one, and print the outcome.

    Args:
        args: the keys (`config`, `override`), where to run (`run_dir`, `resume`, `superlink`),
            `quiet`.
        console: where folder, progress and outcome are printed; what went wrong goes to standard
            error.

    Returns:
        The exit status: 0 when the run has ended well, 1 when it failed, 130 when it was
        interrupted, 128 plus the signal's number when it was terminated.

    Raises:
        UserError: --run-dir and --resume are both given, a key is bad, or the folder cannot be
            used.
    """
    given = settings.collect(args)
    if args.dry_run:
        return _dry_run(args, console, given)
    remote = args.superlink is not None
    if args.ray:
        if remote:
            raise UserError("--superlink and --ray exclude each other.")
        cluster.check("--ray", args.ray)
    if args.rounds is not None:
        given["federation.rounds"] = args.rounds
    if not remote:
        given = settings.absolute_files(given)
    if args.resume:
        if args.run_dir:
            raise UserError("--run-dir and --resume exclude each other.")
        folder = Path(args.resume).expanduser().absolute()
        flat = resume_config(folder, given)
        with writing(folder):
            check_room(folder)
        if _has_ended(folder, flat["federation.rounds"]):
            console.print(
                f"this run has ended after its {flat['federation.rounds']} rounds; what follows "
                "them (plug-in, scores, export) is done again, and --rounds adds rounds",
                soft_wrap=True,
            )
        save_rounds(folder, flat["federation.rounds"])
    else:
        resolved = config.from_flat(given)
        flat = config.to_flat(resolved)
        if not remote:
            from fedpft_console.commands import preflight

            if not resolved.data.train:
                raise UserError(
                    "data.train is empty: without --superlink the clients are simulated, on the "
                    "rows that it names."
                )
            preflight.check(resolved)
        folder = choose_folder(args.run_dir, flat["run.dir"])
        if not remote or args.run_dir or flat["run.dir"]:
            flat["run.dir"] = str(folder)
        create_folder(folder)
        save_config(folder, flat)
    console.print(f"run folder {folder}", soft_wrap=True, highlight=False, markup=False)
    with locked(folder):
        return _run(args, console, folder, flat)


def _dry_run(args: argparse.Namespace, console: Console, given: Mapping[str, Any]) -> int:
    """A small run in a folder that is removed afterwards; where it fails, its log is kept."""
    from fedpft_console.commands import dry_run

    for name, value in (("--resume", args.resume), ("--superlink", args.superlink)):
        if value is not None:
            raise UserError(f"--dry-run and {name} exclude each other.")
    resolved = config.from_flat(dict(given))
    folder = Path(tempfile.mkdtemp(prefix="fedpft-dry-run-"))
    flat = dry_run.shrink(resolved, folder / "fabricated")
    if args.rounds is not None:
        flat["federation.rounds"] = args.rounds
    run_dir = folder / "run"
    flat["run.dir"] = str(run_dir)
    create_folder(run_dir)
    save_config(run_dir, flat)
    with locked(run_dir):
        status = _run(args, console, run_dir, flat)
    if status == 0:
        shutil.rmtree(folder, ignore_errors=True)
        console.print(dry_run.said(flat), soft_wrap=True, highlight=False, markup=False)
    return status


def _run(
    args: argparse.Namespace, console: Console, folder: Path, flat: Mapping[str, Scalar]
) -> int:
    from fedpft_console import launch
    from fedpft_console.progress import Follower, View
    from fedpft_console.trackers import Trackers

    resolved = config.from_flat(flat)
    follower = Follower(folder / EVENTS_FILE)
    outcome: Result | None = None
    with launch.signals_as_exceptions(), writing(folder):
        try:
            with (
                Trackers(args.tracker, folder, flat) as trackers,
                View(console, quiet=args.quiet) as view,
            ):

                def tick() -> None:
                    for event in follower.new():
                        view.show(event)
                        trackers.show(event)

                if args.superlink is not None:
                    outcome = launch.run_deployed(
                        args.superlink, flat, folder / "flower", tick=tick, note=view.note
                    )
                else:
                    f = resolved.federation
                    options = launch.federation_config(
                        f.clients, f.clients_per_round, resolved.train.threads,
                        launch.cpu_count(), cluster=bool(args.ray),
                    )  # fmt: skip

                    def simulate(flat: Mapping[str, Scalar]) -> Result:
                        return launch.run_simulation(
                            folder, flat, federation=options, ray=args.ray or "", tick=tick,
                            note=view.note,
                        )  # fmt: skip

                    outcome = launch.going_on(
                        simulate, flat, follower, folder / CHECKPOINTS, view.line, tick
                    )
                tick()
        except KeyboardInterrupt:
            return _stopped(folder, 130, "interrupted", args.superlink)
        except launch.Terminated as error:
            return _stopped(folder, 128 + error.signum, "terminated", args.superlink)
        except RunError as error:
            follower.new()
            return _failed(folder, follower.failure or str(error), args.superlink)
    return _conclude(args, console, folder, follower, outcome)


def _stopped(folder: Path, code: int, how: str, superlink: str | None = None) -> int:
    _remake_report(folder)
    print(
        f"fedpft: {how}; the run has been stopped.{_next_step(folder, superlink)}", file=sys.stderr
    )
    return code


def _next_step(folder: Path, superlink: str | None) -> str:
    saved = folder / CHECKPOINTS
    if saved.is_dir() and any(saved.iterdir()):
        where = f" --superlink {superlink}" if superlink is not None else ""
        return f" Continue with: fedpft run --resume {folder}{where}"
    return ""


def _failed(folder: Path, reason: str, superlink: str | None = None) -> int:
    _remake_report(folder)
    print(f"fedpft: error: {reason}", file=sys.stderr)
    print(
        f"fedpft: what finished is kept in {folder}.{_next_step(folder, superlink)}",
        file=sys.stderr,
    )
    return 1


def _has_ended(folder: Path, rounds: Scalar) -> bool:
    """Whether a run's log says that it is over, after so many rounds."""
    from fedpft_console import report

    # What is wrong with a log is for the server to say, which goes on from a checkpoint.
    with contextlib.suppress(UserError):
        record = report.read(folder)
        return record.state == "finished" and bool(record.run and record.run.rounds == rounds)
    return False


def _remake_report(folder: Path) -> None:
    """Report what there is; the reason the run ended matters more than a report that fails."""
    from fedpft_console import report

    with contextlib.suppress(Exception):
        if (folder / EVENTS_FILE).exists():
            report.write(folder)


def _conclude(
    args: argparse.Namespace, console: Console, folder: Path, follower: Follower, outcome: Result
) -> int:
    """Tell success from failure and print the tables."""
    from fedpft_console import launch, report

    if not outcome.completed or follower.failure:
        text = outcome.log.read_text(encoding="utf-8", errors="replace")
        found = outcome.details or launch.last_error(text) or f"Flower says {outcome.status}"
        reason = follower.failure or f"{found} (log: {outcome.log})"
        return _failed(folder, reason, args.superlink)
    if not follower.finished:
        if args.superlink is not None and not follower.count:
            console.print(
                "completed; the run folder is on the machine of the SuperLink", highlight=False
            )
            return 0
        return _failed(
            folder,
            f"Flower completed the run, but its end was not recorded (log: {outcome.log}).",
            args.superlink,
        )
    with writing(folder):
        if outcome.peak_bytes:
            # The server, the file's only other writer, has ended.
            log = EventLog(folder / EVENTS_FILE)
            every = "all processes, summed"
            log.emit(Memory(process=every, peak_rss_bytes=outcome.peak_bytes))
            log.close()
        summary = report.write(folder)
    for said in (report.headline(summary), report.sentence(summary)):
        if said:
            console.print(said, highlight=False, markup=False)
    for table in report.render(summary):
        console.print(table)
    return 0
