"""The folder of a run, as the commands make, check and hold it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpft_core import config
from fedpft_core.config import Scalar
from fedpft_core.disk import lock
from fedpft_core.errors import UserError

CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
CHECKPOINTS = "checkpoints"
_LEAST_FREE_BYTES = 200_000_000


def resume_config(folder: Path, changes: Mapping[str, Any]) -> dict[str, Scalar]:
    """The saved configuration of a run folder, set to continue.

    Keys that change neither the model nor what has been drawn at random may be changed, and rounds
    may be added. Then the learning rate of the rounds to come follows the new number of rounds;
    the rounds that are done stay as they are.

    Args:
        folder: the run folder to continue in.
        changes: values by dotted key, as the command line gives them, file names absolute.

    Returns:
        Every key with its value, `run.resume` true, and `run.stop-after` cleared unless given anew.

    Raises:
        UserError: the folder is no run folder, a key or value is bad, or a change contradicts the
            saved configuration.
    """
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such run folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--resume {folder}: it holds no {CONFIG_FILE}, so it is no run folder.")
    saved = config.to_flat(config.from_flat(config.read_file(folder / CONFIG_FILE)))
    config.from_flat(changes)  # wrong keys and types are named as such, not as contradictions
    name = config.changed(saved, changes)
    if name == "federation.rounds":
        raise UserError(
            f"federation.rounds = {changes[name]} is less than the run's {saved[name]}: rounds can "
            "be added to a run, and run.stop-after ends it early."
        )
    if name:
        raise UserError(
            f"{name} = {changes[name]!r} contradicts {saved[name]!r} in {folder / CONFIG_FILE}: a "
            "resumed run keeps its configuration, but for federation.rounds (only more of them) "
            f"and {', '.join(config.FREE_ON_RESUME[2:])}."
        )
    # Where the first part was told to stop does not bind the second.
    saved["run.stop-after"] = config.keys()["run.stop-after"].default
    merged = {**saved, **changes, "run.dir": str(folder), "run.resume": True}
    return config.to_flat(config.from_flat(merged))


def save_rounds(folder: Path, rounds: Scalar) -> None:
    """Note in a run folder's configuration that the run has another number of rounds from now on.

    Args:
        folder: the run folder.
        rounds: the number, checked.

    Raises:
        UserError: the file cannot be written.
    """
    saved = config.to_flat(config.from_flat(config.read_file(folder / CONFIG_FILE)))
    if saved["federation.rounds"] != rounds:
        save_config(folder, saved | {"federation.rounds": rounds})


def choose_folder(flag: str | None, key: Any) -> Path:
    """The run folder, absolute: --run-dir, else run.dir, else a new one below ./runs.

    Args:
        flag: value of --run-dir; None or empty where it is not given.
        key: value of the key `run.dir`, empty where it is not set.

    Returns:
        The folder, which need not exist yet.

    Raises:
        UserError: flag and key name different folders.
    """
    if flag and key and Path(flag).absolute() != Path(str(key)).absolute():
        raise UserError(f"--run-dir {flag} contradicts run.dir = {key}.")
    given = flag or key
    if given:
        return Path(str(given)).expanduser().absolute()
    return Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failing write into one sentence naming the folder.

    Args:
        folder: the run folder that the error names.

    Yields:
        Nothing; the block does the writing.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to the run folder {folder}: {reason}.") from error


def create_folder(folder: Path) -> None:
    """Make a new run folder, with those above it.

    Args:
        folder: where it is to be; an empty folder that is there will do.

    Raises:
        UserError: the folder holds something, cannot be written to, or has too little room.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            hint = "--resume continues it" if (folder / CONFIG_FILE).exists() else "name a new one"
            raise UserError(f"the run folder {folder} is not empty; {hint}.")
    check_room(folder)


def check_room(folder: Path) -> None:
    """Refuse a folder that cannot be written to or has no room for checkpoints.

    Args:
        folder: the run folder, which must exist; a small file is written to it and removed.

    Raises:
        UserError: the folder cannot be written to, or less than 200 MB of its disk are free.
    """
    with writing(folder):
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
    """Write the resolved configuration as YAML, whole or not at all.

    Args:
        folder: the run folder, which must exist.
        flat: every key with its value.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(folder):
        config.write_yaml(folder / CONFIG_FILE, flat)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the run folder, so that two commands never write the same run.

    Args:
        folder: the run folder, which must exist.

    Returns:
        A context manager that holds the folder while its block runs; entering it raises UserError
        when another command or a server is at work in the folder.
    """
    return lock.run_folder(folder, "command", f"the run folder {folder} is in use by another run.")
