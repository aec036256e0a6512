"""Errors whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right; the message is one sentence naming key, file or row."""


class RunError(Exception):
    """The run cannot go on (too few good clients, lost state); what finished is kept."""


class ReplyError(ValueError):
    """A client's reply that must not be used; the message says which check it failed."""
