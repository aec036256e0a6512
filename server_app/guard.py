"""A bound on what a reply may bring into this process, kept while Flower fetches it.

Flower 1.41 fetches all of a reply, object by object, before anybody can look at it. Here its client
for the Runtime API is told what the reply to each message can be at most, and gives out no more of
it: what a larger one costs is that many bytes, and one object for each of the fetching threads.
The size of one object is the SuperLink's proxy to bound (docs/systemd/fedpft-nginx.conf).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

_SLACK = 2**16  # bytes of Flower's own for a message and its records
_OBJECTS = 256  # objects of a message, besides those that hold its bytes
_OBJECT_BYTES = 2**20  # Flower's are larger, all but the last of an array
_CHUNK = 5 * 2**20  # bytes of Flower's pieces of an array


class Guard:
    """What may still be fetched of each reply.

    Args:
        client: Flower's client for the Runtime API; two of its methods are replaced.
    """

    def __init__(self, client: Any) -> None:
        self._limits: dict[str, int] = {}  # by the id of the message that is replied to
        self._reply_of: dict[str, str] = {}  # by object id, the same
        self._left: dict[str, int] = {}
        self._nothing: Any = None  # the answer for what is not given out
        self._lock = threading.Lock()
        self.refused: set[str] = set()  # messages whose reply was too large
        self.came: set[str] = set()  # messages whose reply Flower is, or was last, fetching
        self._messages, self._object = client.PullMessages, client.PullObject
        client.PullMessages, client.PullObject = self._pull_messages, self._pull_object

    def expect(self, message: str, most: int) -> None:
        """Say how large the reply to a message can be.

        Args:
            message: its id.
            most: bytes; 0 for no limit.
        """
        if most:
            self._limits[message] = most + most // 64 + _SLACK

    def forget(self, message: str) -> None:
        """Nothing more is asked of a message.

        Args:
            message: its id, whose reply has been taken.
        """
        with self._lock:
            self._limits.pop(message, None)
            self._left.pop(message, None)
            self._reply_of = {k: v for k, v in self._reply_of.items() if v != message}

    def _pull_messages(self, request: Any) -> Any:
        found = self._messages(request)
        self.came = {reply.metadata.reply_to_message_id for reply in found.messages_list}
        for reply, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            message = reply.metadata.reply_to_message_id
            limit = self._limits.get(message)
            if limit is None:
                continue
            ids = list(_ids(tree))
            with self._lock:
                many = len(ids) > _OBJECTS + limit // _OBJECT_BYTES
                self._left[message] = 0 if many else limit
                self._reply_of.update(dict.fromkeys(ids, message))
        return found

    def _pull_object(self, request: Any) -> Any:
        message = self._reply_of.get(request.object_id)
        if message in self.refused:
            return self._nothing
        found = self._object(request)
        if message is not None:
            with self._lock:
                self._left[message] = self._left.get(message, 0) - _cost(found.object_content)
                if self._left[message] < 0:
                    # Without its fields it says that there is no such object, and Flower gives up.
                    self._nothing = type(found)()
                    self.refused.add(message)
                    return self._nothing
        return found


def of_grid(grid: Any) -> Guard | None:
    """A guard on a Grid that fetches over the network.

    Args:
        grid: Flower's.

    Returns:
        The guard; None for a Grid in the SuperLink's own process, which has the replies anyway.
    """
    if not hasattr(type(grid), "_runtime_client"):
        return None
    return Guard(grid._runtime_client)


def _ids(tree: Any) -> Iterator[str]:
    """Ids of the objects of a tree, the root's first."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node.object_id
        stack.extend(node.children)


def _cost(content: bytes) -> int:
    """Bytes that an object brings: its own, and of an array the pieces that it names repeatedly."""
    if not content.startswith(b"Array "):
        return len(content)
    try:
        named = json.loads(content.partition(b"\x00")[2])["arraychunk_ids"]
        return len(content) + _CHUNK * (len(named) - len(set(named)))
    except (ValueError, KeyError, TypeError):
        return len(content)  # Flower will not read it either
