"""Names of nodes: one spelling each, and none that passes for another's.

A name decides the order of sums, the seed of a client's work, and what of a sub-FM it is known to
have; so nobody may have one that a person takes for somebody else's.
"""

from __future__ import annotations

import unicodedata

from fedpft_core.errors import ReplyError

_LONGEST = 64
_SIGNS = frozenset(" -_.@:+()#/'")

# Letters of other scripts that look like Latin ones, and signs that look alike in most type.
_ALIKE = str.maketrans(
    "авеіјкмнорсԛѕтухһԁɡⅼӏ" "αβεικνορτυχγ" "ıȷɑɩοօսոց" "01|",
    "abeijkmhopcqstyxhdgll" "abeiknoptuxy" "ijaioounq" "oll",
)  # fmt: skip


def usable_name(name: str) -> str:
    """A name as the server uses it.

    Args:
        name: what a node calls itself.

    Returns:
        The same.

    Raises:
        ReplyError: it is not 1 to 64 letters, digits, blanks and plain signs, begins or ends with a
            blank, is not in Unicode's composed form (NFC), or mixes alphabets.
    """
    if not 0 < len(name) <= _LONGEST or not name.isprintable():
        raise ReplyError("its name is not a printable text of 1 to 64 characters")
    if name != name.strip() or "  " in name:
        raise ReplyError("its name begins or ends with a blank, or has two in a row")
    if name != unicodedata.normalize("NFC", name):
        raise ReplyError("its name is not in Unicode's composed form (NFC)")
    odd = [c for c in name if not (c.isalpha() or c.isdecimal() or c in _SIGNS)]
    if odd:
        raise ReplyError(f"its name has the character {odd[0]!r}; letters, digits, blanks and "
                         f"{' '.join(sorted(_SIGNS - {' '}))} will do")  # fmt: skip
    if len({_script(c) for c in name if c.isalpha()}) > 1:
        raise ReplyError("its name mixes alphabets")
    return name


def looks(name: str) -> str:
    """What a name looks like: equal for two names that a person may take for one another.

    Args:
        name: a usable name.

    Returns:
        A text to compare, of no other use.
    """
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c)).translate(_ALIKE)


def _script(letter: str) -> str:
    """The alphabet of a letter, by the first word of its Unicode name."""
    first = unicodedata.name(letter, "?").split()[0]
    return "CJK" if first in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL") else first
