"""Hand a message to the node's worker, or find out that the work has to be done here."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_app.warm.frames import BrokenLink, receive, send
from client_app.warm.place import Place, code, key_of
from fedpft_core.config import home
from fedpft_core.wire.form import Envelope

log = logging.getLogger("fedpft")

IDLE_SECONDS = 600
MEMORY_MB = 4096
_GREETING_SECONDS = 30.0
_START_SECONDS = 300.0  # the imports of a worker, on a slow and busy machine


def ask(
    node_config: Mapping[str, Any], run_config: Mapping[str, Any], envelope: Envelope
) -> Envelope | None:
    """Have a message answered by the node's worker, which is started where there is none.

    Args:
        node_config: as Flower has it.
        run_config: the run's configuration, flat.
        envelope: what came.

    Returns:
        The sealed answer. None where the message has to be answered here: this node has no worker,
        the worker is at work on another message, or it died over this one.
    """
    idle = node_config.get("worker-idle", IDLE_SECONDS)
    memory = node_config.get("worker-memory", MEMORY_MB)
    # A node of a simulation is in a process that stays. What is wrong is said where it is checked.
    if not node_config.get("data-path") or not hasattr(socket, "AF_UNIX"):
        return None
    if type(idle) is not int or type(memory) is not int or idle <= 0 or memory <= 0:
        return None
    try:
        place = Place(_root(node_config))
        link = _worker(place, key_of(node_config), idle, memory)
    except (OSError, ValueError, TypeError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("no worker for this node: %s", error)
        return None
    if link is None:
        return None
    with link:
        try:
            return _answer(link, node_config, run_config, envelope)
        except BrokenLink as error:
            log.warning("the node's worker did not answer (%s): done without it", error)
            return None


def _root(node_config: Mapping[str, Any]) -> Path:
    given = node_config.get("cache-dir")
    if given:
        return Path(given).expanduser()
    return home() / node_config["name"]


def _worker(place: Place, key: str, idle: int, memory: int) -> socket.socket | None:
    """A worker that waits for a message of ours; None where it has another at hand."""
    link = place.connect(_GREETING_SECONDS)
    if link is not None:
        state = _greet(link, key)
        if state == "ready":
            return link
        link.close()
        if state == "busy":
            return None
        # Of another code or configuration, or on the point of going: it ends by itself.
    place.make()
    link = _start(place, key, idle, memory)
    if _greet(link, key) == "ready":
        return link
    link.close()
    return None


def _greet(link: socket.socket, key: str) -> str:
    try:
        send(link, {"key": key}, {})
        return str(receive(link)[0].get("state"))
    except BrokenLink:
        return "gone"


def _start(place: Place, key: str, idle: int, memory: int) -> socket.socket:
    """Start a worker; its first connection is the one returned."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(_START_SECONDS)
    path = os.pathsep.join(p for p in (str(code()), os.environ.get("PYTHONPATH", "")) if p)
    command = [
        sys.executable, "-m", "client_app.warm.worker", str(place.folder.parent), key,
        str(theirs.fileno()), str(os.getppid()), str(idle), str(memory),
    ]  # fmt: skip
    with theirs, open(place.log, "wb") as out:
        subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, cwd=place.folder,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[theirs.fileno()],
            start_new_session=True,
        )  # fmt: skip
    return ours


def _answer(
    link: socket.socket,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    envelope: Envelope,
) -> Envelope:
    head = {
        "node": dict(node_config), "run": dict(run_config), "kind": envelope.kind,
        "head": envelope.head, "check": envelope.check,
    }  # fmt: skip
    link.settimeout(_START_SECONDS)
    send(link, head, envelope.parts)
    link.settimeout(None)  # training takes as long as it takes; a worker that dies is noticed
    while True:
        found, parts = receive(link)
        if "log" in found:
            with contextlib.suppress(ValueError, TypeError):
                name, level, text = found["log"]
                logging.getLogger(name).log(level, "%s", text)
            continue
        if not all(isinstance(found.get(k), str) for k in ("kind", "head", "check")):
            raise BrokenLink("it says what is no answer")
        return Envelope(found["kind"], found["head"], parts, found["check"])
