"""What every event of a run is, and the events by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run; each subclass names itself in its head."""

    event: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.event = name
        if name:
            KINDS[name] = cls


# Every event by its name.
KINDS: dict[str, type[Event]] = {}
