"""What a node says of its faults to the server: nothing from a cell and no path.

A text for the node's owner names file, row and cell. It goes to the node's own log; the server
gets the kind of fault, unless the text is of what the server itself sent.
"""

from __future__ import annotations

import logging
import os
import re

from fedpft_core.errors import ReplyError, UserError

log = logging.getLogger("fedpft")
_LONGEST = 1000  # characters of a reason
_PATH = re.compile(r"(?<![\w/])(?:~|\.{0,2})?(?:/|[A-Za-z]:\\|\\\\)[^\s:;,'\"()]+")
_SEE = "the node's own log says more"


def reason(error: Exception, name: str, own_rows: bool = True) -> str:
    """The reason of a refusal, fit to leave the machine; the whole of it is logged here.

    Args:
        error: why the node cannot answer.
        name: the node's.
        own_rows: whether the rows are the node's; in a simulation they are the run's, and nothing
            is held back.

    Returns:
        One sentence.
    """
    whole = str(error) or type(error).__name__
    if not own_rows:
        return (f"disk or file error: {whole}" if isinstance(error, OSError) else whole)[:_LONGEST]
    unforeseen = not isinstance(error, UserError | ReplyError | OSError)
    # A message's words may be in it: nothing of them is obeyed by a terminal.
    whole = "".join(c if c.isprintable() else repr(c)[1:-1] for c in whole)
    log.warning("client %s cannot answer: %s", name, whole, exc_info=error if unforeseen else None)
    return _fit(error)[:_LONGEST]


def _fit(error: Exception) -> str:
    if isinstance(error, UserError):
        return error.public or f"this node's settings or data cannot be used; {_SEE}"
    if isinstance(error, ReplyError):
        return _PATH.sub("…", str(error))
    if isinstance(error, OSError):
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        return f"disk or file error ({what}); {_SEE}"
    return f"internal error ({type(error).__name__}); {_SEE}"
