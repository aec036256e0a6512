"""Every byte that crosses the network, booked as an event."""

from __future__ import annotations

from fedpft_core.wire.envelope import Envelope
from server_app.run import schema as ev
from server_app.state import Events


def count_bytes(
    events: Events, round: int, client: str, direction: str, envelope: Envelope
) -> None:
    """Book a message, one event for each kind of part it carries.

    Args:
        events: where the events go.
        round: the round it belongs to; 0 is before the first.
        client: name of the client.
        direction: `down`, to the client, or `up`.
        envelope: the message.
    """
    for kind, size in envelope.sizes().items():
        events.emit(
            ev.Bytes(round=round, client=client, direction=direction, kind=kind, bytes=size)
        )


def printable(text: object) -> str:
    """A client's words, fit for a terminal and a log.

    Args:
        text: what it sent, or an error that quotes it.

    Returns:
        The first 500 characters, with a question mark for each that cannot be printed.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text)[:500])
