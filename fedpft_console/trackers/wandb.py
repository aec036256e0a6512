"""Weights & Biases: files in the run folder, below `wandb/`, which `wandb sync` sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read when wandb is imported: its own faults are not reported to its maker.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb


class _WandB:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        """Add one point to each curve."""
        # Its own count of steps only grows, and some figures of a round come after the next began.
        self.run.log({**figures, "round": step})

    def finish(self, state: str) -> None:
        """Write what is left."""
        self.run.finish(exit_code=1 if state == "failed" else 0)


def start(folder: Path, name: str, config: Mapping[str, Any]) -> _WandB:
    """Begin a run; nothing leaves the machine unless WANDB_MODE=online asks for it.

    Args:
        folder: the run folder.
        name: of the run.
        config: every key with its value.

    Returns:
        The tracker.
    """
    quiet = wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True,
        init_timeout=20,
    )  # fmt: skip
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fedpft"), name=name, dir=folder,
        config=dict(config), mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        settings=quiet, reinit="create_new",
    )  # fmt: skip
    run.define_metric("round")
    run.define_metric("*", step_metric="round")
    return _WandB(run)
