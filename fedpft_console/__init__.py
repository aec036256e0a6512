"""The command line, launching, progress, reports and comparisons: what stands above the apps."""
