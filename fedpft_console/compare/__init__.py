"""`fedpft compare`: a grid of runs, resumable cell by cell, and what comes of it.

`experiment` says which cells there are (`cell`) and `parse` reads its file; `results` keeps them,
`run` runs them, `record` says what is kept of one; `lines` brings seeds together, `gap` holds
figures against the plug-in gap; `tables`, `plots` and `page` are made of these, `command` is the
command.
"""

from fedpft_console.compare.cell import Cell, Point, best_rate
from fedpft_console.compare.experiment import Experiment
from fedpft_console.compare.parse import read
from fedpft_console.compare.results import Results

__all__ = ["Cell", "Experiment", "Point", "Results", "best_rate", "read"]
