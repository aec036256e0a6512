"""Errors whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right; the message is one sentence naming key, file or row.

    Attributes:
        public: what of it a node may tell the server: nothing from a cell, no path. Empty where
            that is only that there is a fault.
    """

    def __init__(self, text: str = "", *, public: str = "") -> None:
        super().__init__(text)
        self.public = public


class RunError(Exception):
    """The run cannot go on (too few good clients, lost state); what finished is kept."""


class ReplyError(ValueError):
    """A client's reply that must not be used; the message says which check it failed."""


def first_line(error: Exception) -> str:
    """What a foreign library's error says, in one line without its full stop.

    Args:
        error: any exception.

    Returns:
        The first line of its message, or the name of its type where it has no message.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
