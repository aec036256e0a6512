"""The folder a run writes to: found or made, locked against a second server."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from fedpft_core import config as configs
from fedpft_core.config import Config, RunConfig
from fedpft_core.errors import UserError
from fedpft_core.events import EventLog


@dataclass
class RunFolder:
    """An open run folder; a context manager that lets go of the lock."""

    path: Path
    run_config: RunConfig
    events: EventLog
    _lock: IO[Any]

    @staticmethod
    def open(config: Config) -> RunFolder:
        """Make or reopen `run.dir`, lock it, save the resolved configuration, open the log.

        Raises UserError when it cannot be written, another server is using it, or it holds a
        run already and resume was not asked for.
        """
        path = Path(config.run.dir).expanduser() if config.run.dir else _new_folder()
        path = path.resolve()
        run = replace(config.run, dir=str(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / "lock", "a")
        except OSError as error:
            raise UserError(f"run.dir = {path}: cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(f"run.dir = {path}: another server is running in this folder.") from None
        try:
            if run.resume and not (path / "checkpoints").is_dir():
                raise UserError(f"run.dir = {path}: nothing to resume, there is no checkpoint here.")
            if not run.resume and (path / "checkpoints").is_dir():
                raise UserError(
                    f"run.dir = {path}: this folder already holds a run; resume it "
                    "(run.resume = true) or choose another folder."
                )
            _save_config(path, replace(config, run=run))
            events = EventLog(path / "events.jsonl")
        except OSError as error:
            lock.close()
            raise UserError(f"run.dir = {path}: cannot be written ({error.strerror}).") from error
        except UserError:
            lock.close()
            raise
        return RunFolder(path, run, events, lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.events.close()
        self._lock.close()


def _new_folder() -> Path:
    home = Path(os.environ.get("FEDPFT_HOME") or "~/.fedpft").expanduser()
    return home / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _save_config(path: Path, config: Config) -> None:
    import yaml

    text = yaml.safe_dump(configs.to_tree(configs.to_flat(config)), sort_keys=False)
    temp = path / ".config.yaml.new"
    temp.write_text(text, encoding="utf-8")
    os.replace(temp, path / "config.yaml")
