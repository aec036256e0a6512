"""The `fedpft` command."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_console.compare.command import arguments as compare_arguments
from fedpft_core import __version__, config
from fedpft_core.config import Scalar
from fedpft_core.disk.lock import held
from fedpft_core.errors import RunError, UserError
from server_app.run.events import EventLog

if TYPE_CHECKING:
    from rich.console import Console

    from fedpft_console.launch import Result
    from fedpft_console.progress import Follower

CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
CHECKPOINTS = "checkpoints"
# Keys whose value is a file the server reads; model.name and data.labels may also be one.
_FILE_KEYS = ("data.train", "data.validation", "data.test", "data.public")
_MAYBE_FILE_KEYS = ("model.name", "data.labels")
# What a resumed run may change: it alters neither the model nor what has been drawn at random.
_FREE_ON_RESUME = (
    "run.resume", "run.dir", "run.stop-after", "run.checkpoints", "run.proxy-cache",
    "federation.round-timeout", "federation.node-timeout", "federation.attempts",
)  # fmt: skip
_LEAST_FREE_BYTES = 200_000_000


# ---------------------------------------------------------------- configuration


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Keys given by --config, then by every -c in order; later ones win."""
    flat: dict[str, Any] = {}
    if args.config:
        flat |= config.read_file(Path(args.config).expanduser())
    for text in args.override or []:
        flat |= config.parse_overrides(text)
    return flat


def absolute_files(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Make file names absolute, since the run works in another folder; refuse missing files."""
    out = dict(flat)
    for name in _FILE_KEYS + _MAYBE_FILE_KEYS:
        value = str(flat[name])
        if not value or value.startswith("builtin:"):
            continue
        path = Path(value).expanduser()
        if path.exists():
            out[name] = str(path.resolve())
        elif name in _FILE_KEYS:
            raise UserError(f"{name}: no such file {path.absolute()}.")
    return out


def resume_config(folder: Path, changes: Mapping[str, Any]) -> dict[str, Scalar]:
    """The saved configuration of a run folder, set to continue; refuses contradicting keys."""
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such run folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--resume {folder}: it holds no {CONFIG_FILE}, so it is no run folder.")
    saved = config.to_flat(config.from_flat(config.read_file(folder / CONFIG_FILE)))
    config.from_flat(changes)  # wrong keys and types are named as such, not as contradictions
    for name, value in changes.items():
        if name not in _FREE_ON_RESUME and saved[name] != value:
            raise UserError(
                f"{name} = {value!r} contradicts {saved[name]!r} in {folder / CONFIG_FILE}: "
                "a resumed run keeps its configuration."
            )
    # Where the first part was told to stop does not bind the second.
    saved["run.stop-after"] = config.keys()["run.stop-after"].default
    merged = {**saved, **changes, "run.dir": str(folder), "run.resume": True}
    return config.to_flat(config.from_flat(merged))


def choose_folder(flag: str | None, key: Any) -> Path:
    """The run folder, absolute: --run-dir, else run.dir, else a new one below ./runs."""
    if flag and key and Path(flag).absolute() != Path(str(key)).absolute():
        raise UserError(f"--run-dir {flag} contradicts run.dir = {key}.")
    given = flag or key
    if given:
        return Path(str(given)).expanduser().absolute()
    return Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failing write into one sentence naming the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to the run folder {folder}: {reason}.") from error


def create_folder(folder: Path) -> None:
    """Make a new run folder; refuse one that holds something, is unwritable or has no room."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            hint = "--resume continues it" if (folder / CONFIG_FILE).exists() else "name a new one"
            raise UserError(f"the run folder {folder} is not empty; {hint}.")
    check_room(folder)


def check_room(folder: Path) -> None:
    """Refuse a folder that cannot be written to or has no room for checkpoints."""
    with _writing(folder):
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        raise UserError(
            f"the run folder {folder} has {free / 1e6:.0f} MB of room; "
            f"a run needs at least {_LEAST_FREE_BYTES / 1e6:.0f} MB."
        )


def save_config(folder: Path, flat: Mapping[str, Scalar]) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    with _writing(folder):
        config.write_yaml(folder / CONFIG_FILE, flat)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the run folder, so that two commands never write the same run."""
    return held(folder / ".lock", f"the run folder {folder} is in use by another run.")


# ---------------------------------------------------------------- fedpft run


def command_run(args: argparse.Namespace, console: Console) -> int:
    """Run, and print the outcome."""
    given = collect(args)
    remote = args.superlink is not None
    if args.resume:
        if args.run_dir:
            raise UserError("--run-dir and --resume exclude each other.")
        folder = Path(args.resume).expanduser().absolute()
        flat = resume_config(folder, given)
        with _writing(folder):
            check_room(folder)
    else:
        flat = config.to_flat(config.from_flat(given))
        if not remote:
            flat = absolute_files(flat)
        folder = choose_folder(args.run_dir, flat["run.dir"])
        if not remote or args.run_dir or flat["run.dir"]:
            flat["run.dir"] = str(folder)
        create_folder(folder)
        save_config(folder, flat)
    console.print(f"run folder {folder}", soft_wrap=True, highlight=False, markup=False)
    with locked(folder):
        return _run(args, console, folder, flat)


def _run(
    args: argparse.Namespace, console: Console, folder: Path, flat: Mapping[str, Scalar]
) -> int:
    from fedpft_console import launch
    from fedpft_console.progress import Follower, View

    settings = config.from_flat(flat)
    follower = Follower(folder / EVENTS_FILE)
    outcome: Result | None = None
    with launch.signals_as_exceptions(), _writing(folder):
        try:
            with View(console, quiet=args.quiet) as view:

                def tick() -> None:
                    for event in follower.new():
                        view.show(event)

                if args.superlink is not None:
                    outcome = launch.run_deployed(
                        args.superlink, flat, folder / "flower", tick=tick, note=view.note
                    )
                else:
                    f = settings.federation
                    options = launch.federation_config(
                        f.clients, f.clients_per_round, settings.train.threads, launch.cpu_count()
                    )
                    outcome = launch.run_simulation(
                        folder, flat, federation=options, tick=tick, note=view.note
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
    with _writing(folder):
        if outcome.peak_bytes:
            # The server, the file's only other writer, has ended.
            log = EventLog(folder / EVENTS_FILE)
            log.emit("memory", process="all processes, summed", peak_rss_bytes=outcome.peak_bytes)
            log.close()
        summary = report.write(folder)
    console.print(report.headline(summary), highlight=False, markup=False)
    for table in report.render(summary):
        console.print(table)
    return 0


# ---------------------------------------------------------------- fedpft config


def key_rows() -> list[tuple[str, str, str, str, str]]:
    """(key, type, default, allowed, meaning) of every key."""
    return [
        (k.name, k.type.__name__, _shown(k.default), k.allowed, k.doc)
        for k in config.keys().values()
    ]


def _shown(value: Scalar) -> str:
    from fedpft_console.launch import toml_value

    return toml_value(value)


def config_toml() -> str:
    """The body of pyproject's `[tool.flwr.app.config]`."""
    return "".join(f"{k.name} = {_shown(k.default)}\n" for k in config.keys().values())


def config_markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run, made by `fedpft config --write`. Set keys in a YAML or TOML file",
        '(`fedpft run --config run.yaml`), on the command line (`-c "plan.keep-share=0.5 ..."`,',
        "which wins), or with `flwr run . --run-config`.",
    ]
    section = ""
    for name, kind, default, allowed, doc in key_rows():
        head = name.partition(".")[0]
        if head != section:
            section = head
            about = (type(getattr(config.Config(), head)).__doc__ or "").strip()
            lines += ["", f"## {head}", "", about, ""]
            lines += ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        cells = (f"`{name}`", kind, f"`{default}`", allowed, doc)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def replace_config(pyproject: str, body: str) -> str:
    """Put `body` under `[tool.flwr.app.config]` of a pyproject.toml, leaving the rest alone."""
    head = "[tool.flwr.app.config]\n"
    before, found, after = pyproject.partition(head)
    if not found:
        raise UserError("pyproject.toml: no [tool.flwr.app.config] section.")
    rest = after.splitlines(keepends=True)
    end = next((i for i, line in enumerate(rest) if line.startswith("[")), len(rest))
    tail = "".join(rest[end:])
    return before + head + body + ("\n" + tail if tail else "")


def command_config(args: argparse.Namespace, console: Console) -> int:
    """List the keys, or regenerate (or check) the files made from the list."""
    if args.write or args.check:
        root = Path.cwd()
        project = root / "pyproject.toml"
        if not project.is_file() or not (root / "fedpft_core").is_dir():
            raise UserError(
                f"--write and --check work in the root of a checkout, and {root} is none."
            )
        old = project.read_text(encoding="utf-8")
        fresh = {
            project: replace_config(old, config_toml()),
            root / "docs" / "config.md": config_markdown(),
        }
        for path, text in fresh.items():
            if args.write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            elif not path.is_file() or path.read_text(encoding="utf-8") != text:
                raise RunError(f"{path} is out of date; `fedpft config --write` renews it.")
        print("wrote" if args.write else "up to date:", "pyproject.toml and docs/config.md")
    elif args.format == "toml":
        print(config_toml(), end="")
    elif args.format == "markdown":
        print(config_markdown(), end="")
    elif args.format == "yaml":
        import yaml

        flat = config.to_flat(config.Config())
        print(yaml.safe_dump(config.to_tree(flat), sort_keys=False), end="")
    else:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table("key", "type", "default", "allowed", "meaning", box=box.SIMPLE_HEAD)
        table.columns[0].no_wrap = True
        for row in key_rows():
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    return 0


# ---------------------------------------------------------------- fedpft compare, report, inspect


def command_compare(args: argparse.Namespace, console: Console) -> int:
    """Run the cells of grids that have no result yet, or make what is made of them."""
    from fedpft_console.compare import command

    return command.command(args, console)


def command_report(args: argparse.Namespace, console: Console) -> int:
    """Make the report of a run folder again."""
    from fedpft_console import report

    folder = Path(args.run).expanduser().absolute()
    if not (folder / EVENTS_FILE).is_file():
        raise UserError(f"{folder}: no {EVENTS_FILE} there, so it is no run folder.")
    with _writing(folder):
        summary = report.write(folder)
    for table in report.render(summary):
        console.print(table)
    return 0


def command_inspect(args: argparse.Namespace, console: Console) -> int:
    """Print sizes and costs of the foundation model and its proxy."""
    flat = absolute_files(config.to_flat(config.from_flat(collect(args))))
    from fedpft_core.proxy.cost import inspect

    if args.json:
        from fedpft_core.proxy.size import describe

        print(describe(config.from_flat(flat)).to_json(), end="")
        return 0
    found: Mapping[str, Any] = inspect(config.from_flat(flat))
    for table in found.get("tables", [found]):
        _print_table(console, table)
    return 0


def command_node_check(args: argparse.Namespace, console: Console) -> int:
    """Look at everything a node needs; status 1 when something is not as it must be."""
    import warnings

    from client_app.check import node as check
    from client_app.check import probes as nodecheck

    if args.insecure and args.root_certificates:
        raise UserError("--insecure and --root-certificates exclude each other.")
    # What one library thinks of another is of no use to who sets up a node.
    warnings.simplefilter("ignore", FutureWarning)
    found = check.check(
        check.Options(
            node_config=args.node_config,
            superlink=args.superlink,
            insecure=args.insecure,
            root_certificates=args.root_certificates,
            key=args.auth_supernode_private_key,
            plan=args.plan,
            sub_fm_mb=args.sub_fm_mb,
            labels=args.labels,
            timeout=args.timeout,
        )
    )
    if args.json:
        print(nodecheck.as_json(found))
    else:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "", box=box.SIMPLE_HEAD)
        style = {nodecheck.PASS: "green", nodecheck.FAIL: "bold red", nodecheck.SKIPPED: "dim"}
        for f in found:
            table.add_row(f.name, Text(f.status, style=style[f.status]), Text(f.text))
        console.print(table)
    return 1 if any(f.status == nodecheck.FAIL for f in found) else 0


def _print_table(console: Console, table: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [[_cell(v) for v in row] for row in table["rows"]]
    shown = Table(box=box.SIMPLE_HEAD, title=table.get("title"), title_justify="left")
    for i, name in enumerate(table["columns"]):
        cells = [row[i] for row in rows if row[i]]
        numeric = all(re.fullmatch(r"[-+]?[\d,.e/ %x+-]+", cell) for cell in cells)
        shown.add_column(str(name), justify="right" if numeric and cells else "left")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    for note in table.get("notes", ()):
        console.print(str(note), markup=False, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- command line


def _node_arguments(node: argparse.ArgumentParser) -> None:
    actions = node.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="before a machine joins: data, room, connection, certificate, speed"
    )
    check.add_argument(
        "--node-config", required=True, metavar='"KEY=VALUE ..."', help="as for flower-supernode"
    )
    check.add_argument("--superlink", default="", metavar="HOST:PORT")
    check.add_argument("--insecure", action="store_true", help="the SuperLink has no TLS")
    check.add_argument(
        "--root-certificates", type=Path, metavar="FILE", help="certificate of the authority (PEM)"
    )
    check.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE")
    check.add_argument(
        "--plan", type=Path, metavar="FILE", help="from `fedpft inspect --json` at the server"
    )
    check.add_argument(
        "--sub-fm-mb", type=float, default=0.0, metavar="MB", help="instead of --plan: size only"
    )
    check.add_argument("--labels", default="", metavar="A,B,...", help="label names of the server")
    check.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(function=command_node_check)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="fedpft",
        description="Federated fine-tuning of a foundation model through a compressed proxy.",
    )
    main_parser.add_argument("--version", action="version", version=f"fedpft {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument("--config", metavar="FILE", help="YAML or TOML file with configuration keys")
    keys.add_argument(
        "-c", dest="override", action="append", metavar='"KEY=VALUE ..."',
        help="configuration keys; may be repeated, later ones win (`fedpft config` lists them)",
    )  # fmt: skip

    run = commands.add_parser("run", parents=[keys], help="run a federation and report on it")
    run.add_argument("--run-dir", metavar="DIR", help="new run folder (default ./runs/<time>)")
    run.add_argument("--resume", metavar="RUN", help="continue the run in this run folder")
    run.add_argument(
        "--superlink", metavar="NAME",
        help="submit to this connection of your Flower configuration, instead of simulating",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="print only the folder and the outcome")
    run.set_defaults(function=command_run)

    show = commands.add_parser("config", help="list all configuration keys")
    show.add_argument("--format", choices=("table", "markdown", "toml", "yaml"), default="table")
    show.add_argument(
        "--write", action="store_true",
        help="in a checkout: regenerate docs/config.md and pyproject.toml's run config",
    )  # fmt: skip
    show.add_argument(
        "--check", action="store_true", help="in a checkout: fail if --write would change a file"
    )
    show.set_defaults(function=command_config)

    again = commands.add_parser("report", help="make the report of a run folder again")
    again.add_argument("run", metavar="RUN", help="run folder, of a running or failed run too")
    again.set_defaults(function=command_report)

    look = commands.add_parser(
        "inspect", parents=[keys], help="sizes and costs of the foundation model and its proxy"
    )
    look.add_argument(
        "--json", action="store_true",
        help="print what `fedpft node check --plan` needs to know of the plan's size, as JSON",
    )  # fmt: skip
    look.set_defaults(function=command_inspect)
    _node_arguments(commands.add_parser("node", help="look after a node of a federation"))

    grid = commands.add_parser(
        "compare", help="run a grid of methods, data and seeds in process, and report on it"
    )
    compare_arguments(grid)
    grid.set_defaults(function=command_compare)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 good, 1 failed, 2 bad input, 130 Ctrl-C)."""
    from rich.console import Console

    args = parser().parse_args(argv)
    # Tables need room: a pipe has no width, and rich would assume 80 columns.
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width)
    try:
        status: int = args.function(args, console)
        return status
    except UserError as error:
        print(f"fedpft: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fedpft: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
