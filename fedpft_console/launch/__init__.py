"""Run the Flower app: on a SuperLink of our own for simulation, or on one the user names."""

from fedpft_console.launch.again import going_on
from fedpft_console.launch.app import assemble_app, toml, toml_value
from fedpft_console.launch.deployed import run_deployed
from fedpft_console.launch.flower import COMPLETED, Result, last_error
from fedpft_console.launch.signals import Terminated, signals_as_exceptions
from fedpft_console.launch.simulation import cpu_count, federation_config, run_simulation

__all__ = [
    "COMPLETED", "Result", "Terminated", "assemble_app", "cpu_count", "federation_config",
    "going_on", "last_error", "run_deployed", "run_simulation", "signals_as_exceptions",
    "toml", "toml_value",
]  # fmt: skip
