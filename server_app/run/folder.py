"""The folder a run writes to: found or made, locked against a second server."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedpft_core import config as configs
from fedpft_core.config import Config, RunConfig
from fedpft_core.disk import lock
from fedpft_core.errors import UserError
from server_app.run.events import EventLog


@dataclass(frozen=True)
class RunFolder:
    """An open run folder."""

    path: Path
    run_config: RunConfig
    events: EventLog

    @staticmethod
    @contextlib.contextmanager
    def open(config: Config) -> Iterator[RunFolder]:
        """Make or reopen `run.dir`, lock it, save the resolved configuration, open the log.

        A run that was killed before its first checkpoint starts over.

        Args:
            config: the run's configuration; with an empty run.dir a new folder is made.

        Yields:
            The folder, which stays locked as long as the block lasts.

        Raises:
            UserError: the folder cannot be written, another server uses it, it holds a checkpoint
                and resume was not asked for, it holds no run and resume was asked for, or the run
                in it has another configuration.
        """
        path = Path(config.run.dir).expanduser() if config.run.dir else _new_folder()
        path = path.resolve()
        run = replace(config.run, dir=str(path))
        with contextlib.ExitStack() as stack:
            try:
                path.mkdir(parents=True, exist_ok=True)
                refusal = f"run.dir = {path}: another server is running in this folder."
                stack.enter_context(lock.run_folder(path, "server", refusal))
                events = stack.enter_context(contextlib.closing(_begin(config, path, run)))
            except OSError as error:
                raise UserError(
                    f"run.dir = {path}: cannot be written ({error.strerror})."
                ) from error
            yield RunFolder(path, run, events)


def _begin(config: Config, path: Path, run: RunConfig) -> EventLog:
    saved = any((path / "checkpoints").glob("round-*"))
    if run.resume and not saved and not (path / "config.yaml").is_file():
        raise UserError(f"run.dir = {path}: nothing to resume, there is no run here.")
    if not run.resume and saved:
        raise UserError(
            f"run.dir = {path}: this folder already holds a run; resume it "
            "(run.resume = true) or choose another folder."
        )
    if saved and (path / "config.yaml").is_file():
        # Before the file is written anew; what the checkpoint says is held against it later.
        before = configs.to_flat(configs.from_flat(configs.read_file(path / "config.yaml")))
        now = configs.to_flat(config)
        name = configs.changed(before, now)
        if name:
            raise UserError(
                f"{name} = {now[name]!r} contradicts {before[name]!r} in {path / 'config.yaml'}: "
                "a resumed run keeps its configuration."
            )
    if not saved:
        # A run that ended before its first checkpoint starts over, and so does its log.
        (path / "events.jsonl").unlink(missing_ok=True)
    configs.write_yaml(path / "config.yaml", configs.to_flat(replace(config, run=run)))
    return EventLog(path / "events.jsonl")


def _new_folder() -> Path:
    return configs.home() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
