"""The command line, launching, progress, reports and comparisons: what stands above the apps."""

import os

# As in server_app, before anything loads torch; what is launched from here inherits it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
