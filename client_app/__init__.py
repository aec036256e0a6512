"""The Flower ClientApp: a node's rows, its store, and one message at a time."""

import os

# As in server_app: threads that wait must not take the processor from those that work.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
