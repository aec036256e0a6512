"""Run the app on a SuperLink that the user names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpft_console.launch.app import assemble_app, toml
from fedpft_console.launch.flower import Flower, Result, environment, last_error
from fedpft_console.launch.signals import signals_held
from fedpft_core.config import Scalar
from fedpft_core.errors import RunError

_SILENT_SECONDS = 120.0  # how long a SuperLink that is not ours may be away before we give up


def run_deployed(
    connection: str,
    flat: Mapping[str, Scalar],
    folder: Path,
    *,
    app: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Submit the app to a SuperLink named in the user's own Flower configuration and follow it.

    Interrupting this stops the run; the SuperLink and its nodes are not ours and are left alone.

    Args:
        connection: name of the SuperLink's connection in that configuration.
        flat: the run config by dotted key.
        folder: where the app, the run config and the log go; it is made if need be.
        app: a Flower app folder in place of this package's.
        tick: called about five times a second while the run is on.
        note: told in words what is being done before there are events.

    Returns:
        How the run ended; memory is not measured (`peak_bytes` is 0).

    Raises:
        RunError: Flower refuses the run, or the SuperLink has not answered for 120 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flower = Flower(connection, environment({}), folder / "run.log")
    run_config = folder / "run-config.toml"
    run_config.write_text(toml(flat), encoding="utf-8")
    over = False
    silent_since: float | None = None
    try:
        note(f"submitting the run to {connection}")
        flower.submit(app or assemble_app(folder / "app"), run_config)
        while True:
            while flower.streaming():
                tick()
                time.sleep(0.2)
            run_id = flower.run_id()
            if not run_id:
                raise RunError(
                    f"Flower refused the run: {last_error(flower.text())} (log: {flower.log})"
                )
            status, details = flower.status(run_id)
            if status.startswith("finished"):
                over = True
                return Result(status, details, run_id, flower.log)
            # The log stream broke off while the run goes on: keep asking, seldom.
            if status:
                silent_since = None
            elif silent_since is None:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > _SILENT_SECONDS:
                over = True  # it cannot be asked to stop the run either
                raise RunError(
                    f"the SuperLink {connection} has not answered for {_SILENT_SECONDS:.0f} s, "
                    f"so the end of run {run_id} is not known (log: {flower.log})"
                )
            for _ in range(50):
                tick()
                time.sleep(0.2)
    finally:
        with signals_held():
            run_id = flower.run_id()
            flower.end()
            if run_id and not over:
                flower.stop(run_id)
