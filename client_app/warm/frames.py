"""What goes over the worker's socket: frames of a JSON head and byte parts."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

_LENGTH = struct.Struct(">Q")
_MOST_HEAD = 2**26  # bytes; a message's own head is bounded when it is opened


class BrokenLink(OSError):
    """The other side has gone, or says what is no frame."""


def send(link: socket.socket, head: Mapping[str, Any], parts: Mapping[str, bytes]) -> None:
    """Send a frame.

    Args:
        link: a connected stream socket.
        head: JSON values by name; `parts` is not among the names.
        parts: bytes by name.

    Raises:
        BrokenLink: the other side has gone, or takes nothing within the socket's time.
    """
    sizes = [[name, len(data)] for name, data in parts.items()]
    text = json.dumps({**head, "parts": sizes}).encode("ascii")
    try:
        link.sendall(_LENGTH.pack(len(text)) + text)
        for data in parts.values():
            link.sendall(data)
    except OSError as error:
        raise BrokenLink(str(error)) from error


def receive(link: socket.socket) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Wait for the next frame.

    Args:
        link: a connected stream socket.

    Returns:
        The head, and the parts by name.

    Raises:
        BrokenLink: the other side has gone, sends no frame, or nothing within the socket's time.
    """
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if length > _MOST_HEAD:
        raise BrokenLink("this is no frame")
    try:
        head = json.loads(_exactly(link, length))
        parts = {name: _exactly(link, size) for name, size in head.pop("parts")}
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise BrokenLink("this is no frame") from error
    return head, parts


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        try:
            count = link.recv_into(view[done:])
        except OSError as error:
            raise BrokenLink(str(error)) from error
        if not count:
            raise BrokenLink("the other side has gone")
        done += count
    return bytes(data)
