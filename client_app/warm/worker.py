"""The process that stays: it answers a node's messages one after the other, until it is not needed.

It ends when nobody has asked for so long, when the program that starts the node's processes has
ended, when it holds more memory than it may, when it is asked by a process of another code or
configuration, and at once when the process whose message it works on has gone: Flower has given up
the message then, or sends it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import selectors
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from client_app import answer, node
from client_app.process import PROCESS_CACHE
from client_app.warm.frames import BrokenLink, receive, send
from client_app.warm.place import Place, user_of
from fedpft_core.disk import lock
from fedpft_core.errors import UserError
from fedpft_core.wire.form import Envelope

log = logging.getLogger("fedpft")

_TICK_SECONDS = 0.25
_PATIENCE_SECONDS = 5.0  # for a worker that has been told to end
_GREETING_SECONDS = 1.0
_MESSAGE_SECONDS = 60.0  # for a message to come over the socket once it was announced
_GONE = 75  # exit status


class Worker:
    """Answers messages, each from a connection of its own; one at a time."""

    def __init__(self, place: Place, key: str, parent: int, idle: int, memory: int) -> None:
        self.place, self.key, self.idle = place, key, idle
        self.most_bytes = memory * 2**20
        self.parent = _process(parent)
        self.waiting: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self.busy = threading.Lock()
        self.current: socket.socket | None = None  # whose message is being worked on
        self.ending = False

    def serve(self, first: socket.socket) -> None:
        """Answer messages until there is a reason to end.

        Args:
            first: the connection of the process that has started this one.

        Raises:
            OSError: the socket cannot be opened.
        """
        listener = self.place.listen()
        mine = self.place.socket.lstat().st_ino
        threading.Thread(target=self._doorman, args=(listener,), daemon=True).start()
        self._welcome(first)
        asked = time.monotonic()
        while not self.ending:
            try:
                link = self.waiting.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                late = time.monotonic() - asked > self.idle
                if late or self._orphaned() or not self._found(mine):
                    break
                continue
            try:
                with link:
                    self._work(link)
            except BrokenLink as error:
                log.warning("a message was not answered: %s", error)
            finally:
                self.current = None
                self.busy.release()
            asked = time.monotonic()
            if psutil.Process().memory_info().rss > self.most_bytes:
                break
        # Nobody is to connect to what will not answer. One who has connected does without.
        if self._found(mine):
            self.place.socket.unlink(missing_ok=True)

    def _work(self, link: socket.socket) -> None:
        link.settimeout(_MESSAGE_SECONDS)
        head, parts = receive(link)
        try:
            config, run = head["node"], head["run"]
            envelope = Envelope(head["kind"], head["head"], parts, head["check"])
        except (KeyError, TypeError) as error:
            raise BrokenLink("this is no message") from error
        link.settimeout(None)
        self.current = link
        with _Forwarded(link):
            reply = answer.answer(config, run, lambda: envelope)
        self.current = None
        if not node.rows_tell(config):
            PROCESS_CACHE.rows.clear()
        said = {"kind": reply.kind, "head": reply.head, "check": reply.check}
        send(link, said, reply.parts)

    def _doorman(self, listener: socket.socket) -> None:
        """Let in who comes while nothing is being done, and see when the one at work goes."""
        with selectors.DefaultSelector() as doors:
            doors.register(listener, selectors.EVENT_READ)
            while True:
                for _ in doors.select(_TICK_SECONDS):
                    link, _ = listener.accept()
                    link.settimeout(_GREETING_SECONDS)
                    self._welcome(link)
                at_work = self.current
                # Looked at again: a link is closed as well when its answer has been sent.
                if at_work is not None and _hung_up(at_work) and self.current is at_work:
                    os._exit(_GONE)

    def _welcome(self, link: socket.socket) -> None:
        """Say whether a message may come; if so, it is waited for."""
        try:
            if user_of(link) != os.getuid():
                link.close()
                return
            key = receive(link)[0].get("key")
            if key != self.key:
                self.ending = True
                send(link, {"state": "busy" if self.busy.locked() else "other"}, {})
            elif self.ending or not self.busy.acquire(blocking=False):
                send(link, {"state": "busy"}, {})
            else:
                try:
                    send(link, {"state": "ready"}, {})
                except BrokenLink:
                    self.busy.release()
                    raise
                self.waiting.put(link)
                return
        except BrokenLink:
            pass
        link.close()

    def _orphaned(self) -> bool:
        return self.parent is not None and not self.parent.is_running()

    def _found(self, mine: int) -> bool:
        """Whether the socket is still the one that was opened here."""
        try:
            return self.place.socket.lstat().st_ino == mine
        except OSError:
            return False


class _Forwarded(logging.Handler):
    """Sends what is logged during a message to the process that the message came from."""

    def __init__(self, link: socket.socket) -> None:
        super().__init__()
        self.link = link
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            send(self.link, {"log": [record.name, record.levelno, self.format(record)]}, {})
        except BrokenLink:
            self.handleError(record)

    def __enter__(self) -> _Forwarded:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger().removeHandler(self)


def _hung_up(link: socket.socket) -> bool:
    """Whether the other side, which sends nothing now, has closed its end."""
    try:
        return not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def main() -> None:
    """Be the worker of a node, unless there is one."""
    parser = argparse.ArgumentParser(prog="client_app.warm.worker", description=__doc__)
    parser.add_argument("root", type=Path, help="the node's folder")
    parser.add_argument("key", help="what an asker must have in common with this process")
    parser.add_argument("first", type=int, help="file descriptor of the first connection")
    parser.add_argument("parent", type=int, help="this process ends when that one has ended")
    parser.add_argument("idle", type=int, help="seconds without a message after which it ends")
    parser.add_argument("memory", type=int, help="MB above which it ends after a message")
    args: Any = parser.parse_args()
    place = Place(args.root)
    first = socket.socket(fileno=args.first)
    first.settimeout(_MESSAGE_SECONDS)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with lock.held(place.lock, "this node has a worker"):
                Worker(place, args.key, args.parent, args.idle, args.memory).serve(first)
                return
        except UserError:
            if time.monotonic() > deadline:
                return  # another one was quicker to start; who asked does without
            time.sleep(_TICK_SECONDS)


if __name__ == "__main__":
    main()
