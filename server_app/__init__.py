"""The Flower ServerApp: owns the FM, builds the proxy, runs the rounds."""

import os

# Before torch is loaded: threads that wait for each other otherwise spin for long, and take the
# processor from the clients of a simulation, or from whatever else this machine is doing.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

SIMULATION = "FEDPFT_SIMULATION"
"""Variable of the environment that says that Flower simulates the clients, on this machine."""
