"""Turns docstrings and README files into clean prose, and texts into comparable keys.

Everything here is a pure function of its text; Python sources are parsed with ``ast`` and never
imported.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from inspect import cleandoc

MIN_WORDS = 6
"""Shortest sentence or paragraph kept, in words."""
MAX_WORDS = 40
"""Longest sentence kept, in words; about 64 word pieces with a BERT vocabulary."""

_SKIPPED_SECTIONS = frozenset(
    {
        *("parameter", "parameters", "params", "args", "arg", "argument", "arguments"),
        *("keyword", "keywords", "kwargs", "options", "other", "attribute", "attributes"),
        *("return", "returns", "yield", "yields", "raise", "raises", "warns", "receives"),
        *("methods", "example", "examples", "usage", "see", "reference", "references"),
        *("shape", "shapes", "input", "inputs", "output", "outputs", "model"),
    }
)
"""First words of docstring sections that are tables or code, not prose."""

_FENCE = re.compile(r"^\s*(```|~~~)")
_HEADING = re.compile(r"^\s*#{1,6}\s+")
_UNDERLINE = re.compile(r"^\s*([-=~^\"'*+#`.])\1{2,}\s*$")
_SECTION = re.compile(r"^\**([A-Za-z]+)(?: [A-Za-z]+){0,3}\**\s*:\**\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. ")
_TABLE = re.compile(r"^\s*[|+].*[|+]\s*$|={3,} +={3,}|^\s*\|")
_FIELD = re.compile(r"^\s*:[a-z]+[^:`]*:(\s|$)|^\s*@(param|return)")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)]|\(?[a-z]\))\s+")

_ROLE = re.compile(r":(?:[a-z]+:)*[a-z_]+:`~?!?\.?([^`<]*?)(?:\s*<[^>`]*>)?`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]+>`_{0,2}")
_IMAGE = re.compile(r"\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?")
_MD_LINK = re.compile(r"\[([^\]]*)\]\([^)\s]*(?:\s\"[^\"]*\")?\)")
_MD_REFERENCE = re.compile(r"\[([^\]]+)\]\[[^\]]*\]")
_URL = re.compile(r"<?(?:https?://|www\.)[^\s>)]+>?")
_TAG = re.compile(r"</?[A-Za-z][^<>]*/?>|<!--.*?-->|\[\[[^\]]*\]\]", re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])")
_TRAILING_LINK = re.compile(r"(?<=\w)_{1,2}(?=[\s.,;:)])")
_FOOTNOTE = re.compile(r"\s*\[(?:\d+|#\w*)\]_?")
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|incl|Fig|Eq|Sec|No|Dr|Mr|St|al|a\.k\.a)|\b[A-Z])\.$"
)
_CODE = re.compile(r"[{}\\|<>@$%^~]|==|>>>|::|://|\(\s*\)\.|__|-->|=\S|\S=|;|\w\(\w+,")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
_BOILERPLATE = re.compile(
    r"copyright|licen[sc]ed? |\bSPDX\b|all rights reserved|WITHOUT WARRANTIES|\btodo\b|\bfixme\b|"
    r"pylint|noqa|auto-?generated",
    re.IGNORECASE,
)
_PROPERTY = re.compile(r"property$")
"""What the decorators of a property end in: property, cached_property, hybrid_property."""
_PARTS = frozenset({"setter", "getter", "deleter"})
_KEY_TOKENS = re.compile(r"[^\W\d_]+|\d+")


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in source order.

    Args:
        source: Python source text. Sources that do not parse (templates, other Python versions)
            yield nothing.

    Yields:
        Docstrings as they stand in the source, with their indentation.
    """
    for _, text in documented(source):
        yield text


def documented(source: str) -> Iterator[tuple[str, str]]:
    """Yield what has a docstring in a source, and the docstring, in source order.

    Args:
        source: Python source text. Sources that do not parse yield nothing.

    Yields:
        "module", "class", "function" (methods too) or "property", and the docstring as it stands
        in the source.
    """
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's sources are none of our user's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _documented(tree)


def module_docstring(source: str) -> str:
    """The docstring of a module, without parsing more of the source than that.

    Args:
        source: Python source text.

    Returns:
        The docstring as it stands in the source; empty where there is none.
    """
    beside = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type in beside:
                    continue
                value = ast.literal_eval(token.string) if token.type == tokenize.STRING else ""
                return value if isinstance(value, str) else ""
    except (SyntaxError, ValueError, tokenize.TokenError):
        pass
    return ""


def _kind(node: Definition) -> str:
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    names = (ast.unparse(d).split("(")[0].split(".") for d in node.decorator_list)
    return (
        "property" if any(_PROPERTY.search(n[-1]) or n[-1] in _PARTS for n in names) else "function"
    )


def _documented(node: Definition) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield _kind(node), text
    # Only statements can hold definitions, and looking into expressions would cost most of the
    # time; definitions under `if`, `try` and `with` are reached through their bodies.
    stack: list[ast.AST] = list(reversed(node.body))
    while stack:
        child = stack.pop()
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)
        else:
            for field in ("finalbody", "orelse", "handlers", "body"):
                inner = getattr(child, field, None)
                if isinstance(inner, list):
                    stack.extend(reversed(inner))


def string_values(source: str) -> Iterator[str]:
    """Yield the string values of dictionaries in a Python source, in source order.

    Args:
        source: Python source text. One that does not parse yields nothing.

    Yields:
        The strings; the values of a dictionary within another follow those of the outer one.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def paragraphs(text: str, indented: bool = False) -> list[str]:
    """Prose paragraphs of a docstring or README, without markup, code, tables and field lists.

    Args:
        text: reStructuredText, Markdown, or numpy- or Google-style docstring.
        indented: also take indented paragraphs, which in docstrings describe parameters and in
            other texts are as often quotations of code.

    Returns:
        Paragraphs in order, each on one line with single blanks.
    """
    return [p for p in (_clean(block) for block in _blocks(cleandoc(text), indented)) if p]


def sentences(text: str) -> list[str]:
    """Split one line of prose into sentences; "e.g." and the like do not end one.

    Args:
        text: a paragraph, on one line.

    Returns:
        The sentences in order, without surrounding blanks; none for an empty text.
    """
    pieces = _SENTENCE_END.split(text)
    result: list[str] = []
    for piece in pieces:
        if result and _ABBREVIATION.search(result[-1]):
            result[-1] += " " + piece
        else:
            result.append(piece)
    return [piece.strip() for piece in result if piece.strip()]


def is_prose(text: str, max_words: int = MAX_WORDS) -> bool:
    """Whether a text is a plain English statement of MIN_WORDS to ``max_words`` words.

    Refused: code, formulas, licence notes, texts that do not start with a capital and end with a
    full stop (headings, list fragments), and texts with few letters.

    Args:
        text: one sentence, on one line.
        max_words: the longest that will do, in words.

    Returns:
        Whether it may become a row of the task.
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= max_words or len(text) > 9 * max_words:
        return False
    if not text[0].isupper() or text[-1] not in ".!?" or text.endswith("..."):
        return False
    if _CODE.search(text) or _BOILERPLATE.search(text):
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.88 * len(text):
        return False
    plain = sum(_WORD.fullmatch(word.strip(".,:()'\"`!?")) is not None for word in words)
    return plain >= 0.7 * len(words)


def is_readable(text: str, max_words: int) -> bool:
    """Whether a text is English of at least 4 words, code names in it allowed.

    A looser rule than :func:`is_prose`, for unlabelled text: mentions of calls and operators stay,
    code, tables and licence notes go.

    Args:
        text: one sentence, on one line.
        max_words: the longest that will do, in words.

    Returns:
        Whether it may become part of the public corpus.
    """
    words = text.split()
    if not 4 <= len(words) <= max_words or len(text) > 12 * max_words:
        return False
    if text.rstrip("\"')]")[-1:] not in tuple(".!?:") or _BOILERPLATE.search(text):
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.8 * len(text):
        return False
    plain = sum(_WORD.fullmatch(word.strip(".,:()'\"`!?")) is not None for word in words)
    return plain >= 0.6 * len(words)


def key(text: str) -> str:
    """What a text is compared by: its words in lower case, digits as 0, all else dropped.

    Two rows with the same key count as the same text, for instance "Load the ``k``-th row." and
    "load the k th row".

    Args:
        text: any text.

    Returns:
        The words with single blanks between them; empty for a text without letters and digits.
    """
    tokens = _KEY_TOKENS.findall(text.lower())
    return " ".join("0" if token.isdigit() else token for token in tokens)


def _blocks(text: str, indented: bool) -> Iterator[str]:
    """Paragraphs of raw prose.

    They are separated by blank lines, at the outer indentation, not in a section of parameters or
    examples, and not code.

    Yields:
        Paragraphs with their line breaks; empty ones among them.
    """
    lines = text.expandtabs().split("\n")
    block: list[str] = []
    fenced = False
    skipping = False  # inside a skipped section
    hidden_indent = -1  # a directive or literal block hides lines indented deeper than this
    doctest = False
    for i, line in enumerate(lines):
        stripped = line.strip()
        if _FENCE.match(line):
            fenced = not fenced
            yield "\n".join(block)
            block = []
            continue
        if fenced:
            continue
        if not stripped:
            doctest = False
            yield "\n".join(block)
            block = []
            continue
        indent = len(line) - len(line.lstrip())
        if hidden_indent >= 0:
            if indent > hidden_indent:
                continue
            hidden_indent = -1
        following = lines[i + 1] if i + 1 < len(lines) else ""
        section = _SECTION.match(stripped)
        underlined = bool(_UNDERLINE.match(following)) and not _UNDERLINE.match(line)
        if indent == 0 and (section or underlined or _HEADING.match(line)):
            yield "\n".join(block)
            block = []
            words = re.findall(r"[a-z]+", stripped.lower())
            skipping = bool(words) and words[0] in _SKIPPED_SECTIONS
            continue
        if stripped.startswith(">>>") or stripped.startswith("In ["):
            doctest = True
        if doctest or skipping or _UNDERLINE.match(line) or _TABLE.search(line):
            yield "\n".join(block)
            block = []
            continue
        if _DIRECTIVE.match(line) or _FIELD.match(line):
            yield "\n".join(block)
            block = []
            hidden_indent = indent
            continue
        if indent > 0 and not block and not indented:
            continue  # indented paragraphs are descriptions of parameters, or literal blocks
        if _LIST_ITEM.match(line):
            yield "\n".join(block)
            block = []
        block.append(stripped)
        if stripped.endswith("::"):
            block[-1] = stripped[:-1]
            yield "\n".join(block)
            block = []
            hidden_indent = indent
    yield "\n".join(block)


def _clean(block: str) -> str:
    if not block:
        return ""
    text = " ".join(block.split())
    text = _IMAGE.sub("", text)
    text = _ROLE.sub(r"\1", text)
    text = _RST_LINK.sub(r"\1", text)
    text = _MD_LINK.sub(r"\1", text)
    text = _MD_REFERENCE.sub(r"\1", text)
    text = _URL.sub("", text)
    text = _TAG.sub("", text)
    text = text.replace("`", "")
    text = _EMPHASIS.sub(r"\2", text)
    text = _FOOTNOTE.sub("", text)
    text = _TRAILING_LINK.sub("", text)
    text = _LIST_ITEM.sub("", text)
    text = re.sub(r"\s+([.,;:)])(?=\s|$)", r"\1", text)
    return " ".join(text.split())
