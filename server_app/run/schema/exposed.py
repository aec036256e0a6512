"""The events of what leaves of the FM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from server_app.run.schema.event import Event


class ExposedPart(TypedDict):
    """Parameters of one part of the FM.

    Attributes:
        part: embeddings | attention | FFN | norms | other.
        fm: how many the FM has.
        sent: how many of them the sub-FM holds, changed or not.
        copied: how many of those have the FM's bits.
    """

    part: str
    fm: int
    sent: int
    copied: int


@dataclass(frozen=True, kw_only=True)
class Exposed(Event, name="exposed"):
    """What of the FM a version of the sub-FM holds, said before it is sent."""

    digest: str  # of the version
    fm: str  # digest of the FM's FFNs, by which the ledger knows it
    parts: list[ExposedPart]  # without the head, which belongs to the adapter
    bytes: int  # size of the sub-FM's weights
    neurons: int  # FFN neurons of the FM
    disclosed: int  # those of them that the sub-FM holds, changed or not
    copied: int  # those with the FM's bits in all rows, columns and biases
    ever: int  # those that have left in this or any run before, by the ledger
    simulated: bool  # whether nothing leaves this machine, and the ledger stays as it is
    disguised: bool = False  # whether order and scale are secret (plan.disguise)
    withheld: int = 0  # rows of the embedding table that stay home (plan.embeddings)
