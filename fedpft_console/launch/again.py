"""Go on by itself with a simulated run of which a client's process has died.

Flower never replaces such a process, and every message to it fails at once. The server therefore
ends the run as soon as it sees one, and this module starts it anew from its last checkpoint: the
round under way is lost, and the bits are those of a run without the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpft_console.launch.flower import Result
from fedpft_core.config import Scalar
from fedpft_core.disk import evict
from fedpft_core.errors import RunError

if TYPE_CHECKING:
    from fedpft_console.progress import Follower

MOST_IN_A_ROUND = 3
"""How often a run goes on by itself without one more round being done in between."""


def going_on(
    start: Callable[[Mapping[str, Scalar]], Result],
    flat: Mapping[str, Scalar],
    follower: Follower,
    checkpoints: Path,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> Result:
    """Simulate a run, and go on with it where a client's process has died.

    Args:
        start: simulates the run with the given configuration.
        flat: every key with its value.
        follower: reads the run's events, and is set to those of the part under way.
        checkpoints: the folder of the run's checkpoints.
        say: told in a sentence that the run goes on.
        tick: called when a part has ended, to read and show its last events.

    Returns:
        How the last part ended.

    Raises:
        RunError: as `start` says, unless the run can go on.
    """
    tries, last = 0, -1
    while True:
        outcome: Result | None = None
        failed: RunError | None = None
        try:
            outcome = start(flat)
        except RunError as error:
            failed = error
        tick()
        done = max(evict.rounds(checkpoints), default=0)
        tries = 1 if done > last else tries + 1
        last = max(done, last)
        if not follower.again or tries > MOST_IN_A_ROUND:
            if failed is not None:
                raise failed
            assert outcome is not None
            return outcome
        where = f"round {done + 1}" if done else "the beginning"
        say(f"{follower.failure} The run goes on from {where}.")
        flat = {**flat, "run.resume": True}
        follower.restart()
