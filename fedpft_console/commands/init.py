"""`fedpft init`: five questions, and the file that a run needs."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_console.commands import settings
from fedpft_core import config
from fedpft_core.disk import whole
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Question:
    """One thing to ask: the option that answers it, the words, and what holds without an answer."""

    option: str
    text: str
    default: str


_QUESTIONS = (
    Question("model", "Which model? A name on the Hugging Face Hub, or a folder", "builtin:minilm"),
    Question("train", "Training rows? A CSV, JSON lines or Parquet file", "builtin:docstrings"),
    Question("test", "Test rows? Another such file", ""),
    Question(
        "columns",
        "Which columns? INPUT,LABEL; INPUT+SECOND,LABEL for pairs; image:INPUT,LABEL for images",
        "text,label",
    ),
    Question("clients", "How many clients share the training rows?", "5"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `init` is added.
    """
    init = commands.add_parser(
        "init", help="ask five questions and write run.yaml",
        description="Asks what is not given. Without a terminal, or with --yes, it asks nothing.",
    )  # fmt: skip
    init.add_argument("file", nargs="?", default="run.yaml", metavar="FILE", help="what to write")
    for question in _QUESTIONS:
        said = f"{question.text} (default {question.default or 'none'})"
        init.add_argument(f"--{question.option}", metavar=question.option.upper(), help=said)
    init.add_argument(
        "--public", metavar="FILE", help="public rows of the server (needed for images)"
    )
    init.add_argument("--rounds", type=int, metavar="N", help="rounds (default 12)")
    init.add_argument("--yes", action="store_true", help="ask nothing: take the defaults")
    init.add_argument("--force", action="store_true", help="replace FILE")
    init.set_defaults(function=command)


def command(args: argparse.Namespace, console: Console) -> int:
    """Ask what is not given, check it against the data, and write the file.

    Args:
        args: `file`, an answer for each question or None, `public`, `rounds`, `yes`, `force`.
        console: where what comes next is printed; questions go to standard error.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the file is there, cannot be written, or an answer cannot be used.
    """
    from fedpft_console.commands import preflight

    path = Path(args.file).expanduser()
    if path.exists() and not args.force:
        raise UserError(f"{path} is there already; --force replaces it.")
    asks = sys.stdin.isatty() and not args.yes
    given = {q.option: getattr(args, q.option) for q in _QUESTIONS}
    flat = answers(given, _ask if asks else None)
    if args.public:
        flat["data.public"] = args.public
    if args.rounds is not None:
        flat["federation.rounds"] = args.rounds
    preflight.check(config.from_flat(settings.absolute_files(flat)))
    try:
        whole.write(path, _text(flat).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
    console.print(f"{path} is written; start with: fedpft run --config {path}",
                  soft_wrap=True, highlight=False, markup=False)  # fmt: skip
    return 0


def answers(
    given: Mapping[str, str | None], ask: Callable[[str, str], str] | None
) -> dict[str, Any]:
    """The configuration keys that the answers come to.

    Args:
        given: answers by option; None where there is none yet.
        ask: puts a question, of its text and what holds without an answer; None asks nothing.

    Returns:
        Values by dotted key, only of keys that are not at their default.

    Raises:
        UserError: an answer cannot be used.
    """
    found: dict[str, str] = {}
    for q in _QUESTIONS:
        builtin = found.get("train", "").startswith("builtin:")
        if builtin and q.option in ("test", "columns"):  # built-in rows have both
            found[q.option] = given[q.option] or ""
            continue
        text, default = q.text, q.default
        if q.option == "columns":
            present = columns_in(Path(found["train"]).expanduser())
            text += f" (there are {', '.join(present)})" if present else ""
        said = given[q.option]
        found[q.option] = said if said is not None else ask(text, default) if ask else default
    flat: dict[str, Any] = {
        "model.name": found["model"], "data.train": found["train"], "data.test": found["test"],
        **_columns(found["columns"]),
    }  # fmt: skip
    try:
        flat["federation.clients"] = clients = int(found["clients"])
    except ValueError:
        raise UserError(f"--clients {found['clients']}: expected a whole number.") from None
    flat["federation.clients-per-round"] = min(clients, 5)
    flat["federation.min-clients"] = min(clients, 2)
    defaults = config.keys()
    config.from_flat(flat)
    return {k: v for k, v in flat.items() if v != defaults[k].default}


def columns_in(path: Path) -> list[str]:
    """Names of the columns of a file, where they are quickly had.

    Args:
        path: a data file.

    Returns:
        The names; empty for a file that is not there, or of a kind whose head does not tell.
    """
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                return next(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","), [])
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError, csv.Error):
        pass  # what is wrong with the file is said when its rows are read
    return []


def _columns(text: str) -> dict[str, str]:
    """`INPUT,LABEL` and its kin as keys."""
    if not text:
        return {}
    inputs, comma, label = text.rpartition(",")
    inputs, label = inputs.strip(), label.strip()
    if not (comma and inputs and label):
        raise UserError(f"--columns {text}: expected INPUT,LABEL.")
    if inputs.startswith("image:"):
        return {"data.image-column": inputs.removeprefix("image:"), "data.label-column": label}
    first, _, second = inputs.partition("+")
    return {
        "data.text-column": first, "data.text-pair-column": second, "data.label-column": label
    }  # fmt: skip


def _ask(text: str, default: str) -> str:
    print(f"{text}{f' [{default}]' if default else ''}: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or default


def _text(flat: Mapping[str, Any]) -> str:
    import yaml

    body = yaml.safe_dump(config.to_tree(flat), sort_keys=False, allow_unicode=True)
    return (
        "# Made by `fedpft init`. `fedpft config` lists every key with its unit and default.\n"
        "# File names are relative to the folder that the run is started in.\n"
        f"{body if flat else '{}'}".rstrip()
        + "\n"
    )
