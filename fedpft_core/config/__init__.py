"""Every key of a run, and how keys become a configuration."""

from fedpft_core.config.keys import *  # noqa: F403
