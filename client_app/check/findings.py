"""What a check has found: pass, fail or skipped, and why in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from fedpft_core.errors import UserError

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
_LONGEST = 600  # characters of a finding


@dataclass(frozen=True)
class Finding:
    """One line of the table: pass, fail or skipped, and why in one sentence."""

    name: str
    status: str
    text: str


UNFORESEEN = "this cannot be checked"


def guarded(name: str, check: Callable[[], str]) -> Finding:
    """Run a check, whatever becomes of it.

    Args:
        name: the name of the finding.
        check: returns what is good in one sentence; raises UserError or OSError for what is not.

    Returns:
        The finding. Any other exception makes one that begins with `UNFORESEEN`: whatever a node
        is given, its check ends in a table.
    """
    try:
        return Finding(name, PASS, printable(check()))
    except UserError as error:
        return Finding(name, FAIL, printable(str(error)))
    except OSError as error:
        return Finding(name, FAIL, printable(f"{_because(error)}."))
    except Exception as error:
        return Finding(name, FAIL, printable(f"{UNFORESEEN}: {fault(error)}."))


def fault(error: Exception) -> str:
    """The first line of an exception that a library raised, with its kind.

    Args:
        error: the exception.

    Returns:
        One line without a full stop; the kind alone where the exception says nothing.
    """
    first = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def printable(text: str) -> str:
    """One line that any terminal can show: what a file holds may be neither.

    Args:
        text: what is to be shown.

    Returns:
        Its first 600 characters, with escapes for those that cannot be printed.
    """
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def _because(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def as_json(findings: list[Finding]) -> str:
    """The findings for programs.

    Args:
        findings: all of a check.

    Returns:
        JSON with `ok`, which is false where one has failed, and `checks`, the findings in order.
    """
    checks = [f.__dict__ for f in findings]
    return json.dumps({"ok": all(f.status != FAIL for f in findings), "checks": checks}, indent=1)
