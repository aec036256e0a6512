"""MLflow: a local store beside the run folder, unless MLFLOW_TRACKING_URI names a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read when mlflow is imported. Nobody shall wait minutes for a server that is down.
for _name, _value in (("MAX_RETRIES", "1"), ("TIMEOUT", "10"), ("BACKOFF_FACTOR", "1")):
    os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{_name}", _value)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is told to its maker

from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

_MOST = 100  # figures and parameters that a server takes at once
_STATES = {"finished": "FINISHED", "failed": "FAILED"}


class _MLflow:
    def __init__(self, client: MlflowClient, run: str) -> None:
        self.client, self.run = client, run

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        """Add one point to each curve."""
        when = int(1000 * now)
        points = [Metric(_named(k), float(v), when, step) for k, v in figures.items()]
        self.client.log_batch(self.run, metrics=points)

    def finish(self, state: str) -> None:
        """Say how the run has ended; one that still goes on stays open."""
        if state in _STATES:
            self.client.set_terminated(self.run, _STATES[state])


def _named(name: str) -> str:
    """A name as MLflow allows it: it takes letters, digits, and a few other characters."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)


def start(folder: Path, name: str, config: Mapping[str, Any]) -> _MLflow:
    """Begin an MLflow run; `mlflow ui --backend-store-uri RUNS/mlruns` shows those of a folder.

    Args:
        folder: the run folder; the store is `mlruns` beside it.
        name: of the run.
        config: every key with its value, which become parameters.

    Returns:
        The tracker.
    """
    where = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not where:
        # Files need no server and no database; MLflow asks for consent to what it calls old.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        where = (folder.parent / "mlruns").as_uri()
    client = MlflowClient(tracking_uri=where)
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedpft")
    known = client.get_experiment_by_name(title)
    experiment = known.experiment_id if known else client.create_experiment(title)
    run = client.create_run(experiment, run_name=name).info.run_id
    texts = [Param(k, str(v)) for k, v in config.items()]
    for first in range(0, len(texts), _MOST):
        client.log_batch(run, params=texts[first : first + _MOST])
    client.log_batch(run, tags=[RunTag("run folder", str(folder))])
    return _MLflow(client, run)
