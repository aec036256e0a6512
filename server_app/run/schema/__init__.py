"""The events of a run: each class is one, and its fields are those of its line in events.jsonl.

Every line has `t` (Unix seconds) and `event` (the name in the class's head) besides. A line of a
side run has `arm` too and is no part of the main run's figures (the federation on the undistilled
sub-FM has `arm = "undistilled"`). A field that has a default is left out of the line where it has
that value.
"""

from __future__ import annotations

from server_app.run.schema.course import (
    Files,
    Memory,
    PhaseFinished,
    PhaseStarted,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Waiting,
    Warned,
)
from server_app.run.schema.event import KINDS, Event
from server_app.run.schema.exposed import Exposed, ExposedPart
from server_app.run.schema.models import (
    Agreement,
    Alignment,
    AlignmentCheck,
    BlockAgreement,
    BlockError,
    Distilled,
)
from server_app.run.schema.rounds import (
    Adapter,
    Aggregated,
    Bytes,
    Joined,
    Merged,
    PrivacySpent,
    Reply,
    RoundFinished,
    RoundStarted,
    Stopped,
)
from server_app.run.schema.scores import (
    Backdoor,
    Baseline,
    Check,
    ClientValidation,
    Confusion,
    Evaluation,
    Guarded,
    HeadSet,
    LeftOut,
    Partition,
    Pictures,
    Plugged,
    Refit,
    Sample,
    Samples,
    Scored,
    Validation,
)
from server_app.run.schema.subject import BlockSize, Metric, Model, Nodes, Task
from server_app.run.schema.widths import (
    WidthAgreement,
    WidthDistilled,
    WidthGiven,
    Widths,
    WidthScored,
    WidthSize,
)

__all__ = [
    "KINDS",
    "Adapter",
    "Aggregated",
    "Agreement",
    "Alignment",
    "AlignmentCheck",
    "Backdoor",
    "Baseline",
    "BlockAgreement",
    "BlockError",
    "BlockSize",
    "Bytes",
    "Check",
    "ClientValidation",
    "Confusion",
    "Distilled",
    "Evaluation",
    "Event",
    "Exposed",
    "ExposedPart",
    "Files",
    "Guarded",
    "HeadSet",
    "Joined",
    "LeftOut",
    "Memory",
    "Merged",
    "Metric",
    "Model",
    "Nodes",
    "Partition",
    "PhaseFinished",
    "PhaseStarted",
    "Pictures",
    "Plugged",
    "PrivacySpent",
    "Progress",
    "Refit",
    "Reply",
    "RoundFinished",
    "RoundStarted",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "Sample",
    "Samples",
    "Scored",
    "Stopped",
    "Task",
    "Validation",
    "Waiting",
    "Warned",
    "WidthAgreement",
    "WidthDistilled",
    "WidthGiven",
    "WidthScored",
    "WidthSize",
    "Widths",
]
