"""Docstrings and READMEs to prose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpft_core.data import prose


def test_docstrings_in_source_order_with_nested_definitions() -> None:
    source = '''"""m"""
import x
if x:
    class A:
        """a"""
        async def f(self):
            """f"""
            def inner():
                """inner"""
else:
    def g():
        """g"""
try:
    pass
except E:
    def h(): "h"
match x:
    case 1:
        """not a docstring"""
'''
    assert list(prose.docstrings(source)) == ["m", "a", "f", "inner", "g", "h"]
    assert list(prose.docstrings("def broken(:\n")) == []
    assert list(prose.docstrings("x = '\0'")) == []


NUMPY_STYLE = """
    Compute a thing of ``x`` with :func:`~pkg.mod.other` and :class:`Thing <pkg.Thing>`.

    See `the guide <https://example.org/guide>`_ for more [1]_. It is **very** useful, e.g. Here.

    Parameters
    ----------
    x : int
        A number that is described at length here.

    Notes
    -----
    This note is prose as well. Code follows::

        literal = block()

    .. versionadded:: 1.2
        Hidden text.

    Back to prose.

    Examples
    --------
    >>> f(1)
    2
    """


def test_numpy_style() -> None:
    assert prose.paragraphs(NUMPY_STYLE) == [
        "Compute a thing of x with pkg.mod.other and Thing.",
        "See the guide for more. It is very useful, e.g. Here.",
        "This note is prose as well. Code follows:",
        "Back to prose.",
    ]


def test_google_and_sphinx_style() -> None:
    text = """Load the [rows](https://a.b/c) of a file.

    Args:
        path (`str`, *optional*): Where it is.

    Returns:
        The rows.

    Example:

    ```py
    load("x")
    ```

    <Tip>

    Rows stay in order.

    </Tip>

    :param path: where
        it goes on
    """
    # Sections hide everything up to the next heading, so the tip goes with the example.
    assert prose.paragraphs(text) == ["Load the rows of a file."]


def test_readme() -> None:
    text = """# Title

[![badge](https://a/b.svg)](https://c) A library for things.

| a | b |
|---|---|

```
code here.
```

## Usage

Hidden as a usage section.

## Why

- First point of the list.
- Second point.
"""
    assert prose.paragraphs(text) == [
        "A library for things.",
        "First point of the list.",
        "Second point.",
    ]


def test_indented_paragraphs_only_on_request() -> None:
    text = "Outer one.\n\n    Inner one.\n\nOuter two."
    assert prose.paragraphs(text) == ["Outer one.", "Outer two."]
    assert prose.paragraphs(text, indented=True) == ["Outer one.", "Inner one.", "Outer two."]


def test_sentences() -> None:
    assert prose.sentences("One is here. Two, e.g. A or B, is i.e. Three! Why? (Because.) End") == [
        "One is here.",
        "Two, e.g. A or B, is i.e. Three!",
        "Why?",
        "(Because.)",
        "End",
    ]
    assert prose.sentences("Uses numpy.array in version 1.2 here.") == [
        "Uses numpy.array in version 1.2 here."
    ]
    assert prose.sentences("") == []


def test_is_prose() -> None:
    assert prose.is_prose("Return the number of rows in the table.")
    for text in (
        "Too short a text.",
        "return the number of rows in the table.",
        "Return the number of rows in the table",
        "Return the number of rows in the table...",
        "Return f(a, b) == c for rows in the table.",
        "Copyright of the number of rows in the table.",
        "Return 1 2 3 4 5 6 7 8 9 10 rows.",
        "Return " + "the " * 40 + "rows.",
    ):
        assert not prose.is_prose(text), text


def test_key() -> None:
    assert prose.key("Load the ``k``-th row, 12 times.") == prose.key("load the k th row 7 TIMES")
    assert prose.key("a b") != prose.key("ab")


@given(st.text())
def test_nothing_crashes_and_key_is_stable(text: str) -> None:
    for paragraph in prose.paragraphs(text, indented=True):
        assert "\n" not in paragraph
        prose.sentences(paragraph)
    assert prose.key(prose.key(text)) == prose.key(text)


SOURCE = '''
# A comment first.
r"""What the module
is for."""

class A(Base):
    """What A is."""

    @property
    def b(self):
        """What b is."""

    @b.setter
    def b(self, value):
        """How b is set."""

    @functools.cached_property
    def c(self):
        """What c is."""

    @hybrid_property
    def d(self):
        """What d is."""

    @property_of_another_name(1)
    def e(self):
        """What e does."""

if TYPE_CHECKING:
    async def f():
        """What f does."""
'''


def test_documented() -> None:
    assert list(prose.documented(SOURCE)) == [
        ("module", "What the module\nis for."),
        ("class", "What A is."),
        ("property", "What b is."),
        ("property", "How b is set."),
        ("property", "What c is."),
        ("property", "What d is."),
        ("function", "What e does."),
        ("function", "What f does."),
    ]
    assert list(prose.documented("def (")) == []


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (SOURCE, "What the module\nis for."),
        ("import os\n'no docstring'", ""),
        ("'''Open", ""),
        ("f'a{1}'", ""),
        ("b'bytes'", ""),
        ("", ""),
        ("\n\n  \n'here'\nthis is not Python (", "here"),
    ],
)
def test_module_docstring(source: str, want: str) -> None:
    assert prose.module_docstring(source) == want
