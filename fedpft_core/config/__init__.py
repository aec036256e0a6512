"""Every key of a run, and how keys become a configuration.

`keys` is the list of keys, `values` makes a checked configuration of them, `sources` reads and
writes files and `key=value` texts, `methods` names the method that settings amount to.
"""

from fedpft_core.config.keys import (
    AlignConfig,
    Config,
    DataConfig,
    DistillConfig,
    FederationConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    PlanConfig,
    PlugConfig,
    PrivacyConfig,
    RunConfig,
    Scalar,
    SimulateConfig,
    TrainConfig,
    WireConfig,
)
from fedpft_core.config.methods import method_name
from fedpft_core.config.model import OWN_TASKS, TASKS
from fedpft_core.config.resume import FREE_ON_RESUME, changed
from fedpft_core.config.sources import home, parse_overrides, read_file, write_yaml
from fedpft_core.config.values import KeyInfo, flatten, from_flat, keys, to_flat, to_tree

__all__ = [
    "FREE_ON_RESUME",
    "OWN_TASKS",
    "TASKS",
    "AlignConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "FederationConfig",
    "HeadConfig",
    "KeyInfo",
    "LoraConfig",
    "ModelConfig",
    "PlanConfig",
    "PlugConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar", "SimulateConfig",
    "TrainConfig",
    "WireConfig",
    "changed",
    "flatten",
    "from_flat",
    "home",
    "keys",
    "method_name",
    "parse_overrides",
    "read_file",
    "to_flat",
    "to_tree",
    "write_yaml",
]  # fmt: skip
