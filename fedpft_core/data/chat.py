"""Free text as token ids: what of a row is learned, and what stands before it.

A conversation is put into text by the tokenizer's own chat template, a prompt with its response as
a conversation of two messages. Only what the assistant says is learned, its end token included.
Texts by themselves are learned whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.encoding import pad_id
from fedpft_core.data.examples import Chat, Examples, Input
from fedpft_core.errors import UserError

Say = Callable[[str], None]
"""Takes one sentence that a person should know."""

_START = "{{ bos_token if bos_token else '' }}{% for m in messages %}"
_END = "{{ eos_token if eos_token else '' }}"
PLAIN = (
    _START + "{{ m['content'] }}{% if m['role'] == 'assistant' %}" + _END
    + "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)  # fmt: skip
"""The template of a tokenizer that has none: what is said, a line each, responses ended."""


def template_of(prompt: str) -> str:
    """A chat template from a text with {prompt} in it.

    Args:
        prompt: what stands before a response, with `{prompt}` where the prompt goes.

    Returns:
        A Jinja template that puts every message of the user's so, and ends every response.

    Raises:
        UserError: the text lacks `{prompt}`.
    """
    before, found, after = prompt.partition("{prompt}")
    if not found:
        raise UserError(f"data.prompt-template is {prompt!r}; it must contain {{prompt}}.")
    return (
        _START + "{% if m['role'] == 'user' %}{{ " + _literal(before) + " + m['content'] + "
        + _literal(after) + " }}{% else %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        + _END + "{% else %}{{ '\\n' }}{% endif %}{% endif %}{% endfor %}"
    )  # fmt: skip


def _literal(text: str) -> str:
    """A text as Jinja writes it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def prepare(tokenizer: Any, prompt: str, vocabulary: int, name: str, say: Say) -> None:
    """Make a tokenizer fit for generation, in place: give it a chat template.

    Args:
        tokenizer: the FM's.
        prompt: data.prompt-template; "" for the tokenizer's own template, or `PLAIN`.
        vocabulary: token ids the FM knows.
        name: of the FM, for messages.
        say: told what was set.

    Raises:
        UserError: the tokenizer has no end token, or the template cannot be used.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name = {name}: the tokenizer has no end token, so that no response ends."
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise UserError(
            f"model.name = {name}: the tokenizer has a token number {largest}, but the model knows "
            f"{vocabulary} tokens: the two do not fit."
        )
    if prompt:
        tokenizer.chat_template = template_of(prompt)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
        say(
            "the tokenizer has no chat template: a prompt is followed by a new line and the "
            "response (data.prompt-template)"
        )


@dataclass(frozen=True)
class Told:
    """A row as token ids.

    Attributes:
        ids: its tokens.
        learned: of each whether it is learned.
    """

    ids: list[int]
    learned: list[bool]


def tell(row: Input, tokenizer: Any) -> Told:
    """One row as token ids, whatever its length.

    Args:
        row: a text, a prompt with its response, or a conversation.
        tokenizer: one that has a chat template; see :func:`prepare`.

    Returns:
        The tokens; of a conversation those of the assistant's messages are learned, or of the last
        one only where the template writes earlier ones in another way (as some do with thoughts).

    Raises:
        UserError: the template refuses the messages, or puts no response behind its prompt.
    """
    if isinstance(row, str):
        ids = list(tokenizer(row, truncation=False, verbose=False)["input_ids"])
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return Told(ids, [True] * len(ids))
    chat = _chat_of(row)
    turns = [i for i, (role, _) in enumerate(chat) if role == "assistant" and i > 0]
    pieces = _pieces(chat, turns, tokenizer) or _pieces(chat, turns[-1:], tokenizer)
    if not pieces:
        raise UserError("the tokenizer's chat template puts no response behind its prompt.")
    ids, learned, text = [], [], ""
    for piece, is_learned in pieces:
        text += piece
        # Token by token as the whole text is read, so that a prompt has the same tokens before a
        # response is there; pieces are read apart where a token would span their border.
        whole = _ids(text, tokenizer)
        grown = whole if whole[: len(ids)] == ids else [*ids, *_ids(piece, tokenizer)]
        learned += [is_learned] * (len(grown) - len(ids))
        ids = grown
    return Told(ids, learned)


def _pieces(chat: Chat, turns: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """What stands before each response and the response; empty where they do not follow."""
    pieces: list[tuple[str, bool]] = []
    text = ""
    for turn in turns:
        for learned in (False, True):
            grown = _rendered(chat[: turn + learned], tokenizer, not learned)
            if not grown.startswith(text) or len(grown) == len(text):
                return []
            pieces.append((grown[len(text) :], learned))
            text = grown
    return pieces


def _chat_of(row: Input) -> Chat:
    assert isinstance(row, tuple)
    if isinstance(row[0], str):
        prompt, response = row
        return (("user", str(prompt)), ("assistant", str(response)))
    return tuple((str(role), str(said)) for role, said in row)


def _rendered(chat: Chat, tokenizer: Any, prompt: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        # What a template raises may quote what was said, which is no business of the server's.
        raise UserError(
            f"the tokenizer's chat template refuses its messages ({type(error).__name__})."
        ) from error
    return text


def _ids(text: str, tokenizer: Any) -> list[int]:
    found = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    return list(found["input_ids"])


def encode_told(
    examples: Examples, tokenizer: Any, max_length: int, say: Say | None = None
) -> Encoded:
    """Rows of free text as model inputs with token labels.

    Args:
        examples: texts, prompts with responses, or conversations.
        tokenizer: one that has a chat template; see :func:`prepare`.
        max_length: tokens of a row at most; what is behind them is cut off.
        say: told how many rows were cut, and how many have no response left; None for nobody.

    Returns:
        The rows in their order. A token that is not learned has the label -100.

    Raises:
        UserError: a row cannot be put into text; names its number, from 1.
    """
    import torch

    ids: list[int] = []
    labels: list[int] = []
    ends = [0]
    cut = filled = 0
    for number, row in enumerate(examples.inputs, start=1):
        try:
            told = tell(row, tokenizer)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error
        cut += len(told.ids) > max_length
        kept, learned = told.ids[:max_length], told.learned[:max_length]
        # The first token stands behind nothing from which it could be told.
        if learned:
            learned[0] = False
        filled += not any(learned)
        ids += kept
        labels += [t if yes else UNLEARNED for t, yes in zip(kept, learned, strict=True)]
        ends.append(len(ids))
    rows = len(examples)
    if say and cut:
        say(
            f"{cut} of {rows} rows are longer than data.max-length = {max_length} tokens; what is "
            "behind them is cut off"
        )
    if say and filled:
        say(
            f"of {filled} of {rows} rows the prompt fills the whole window (data.max-length = "
            f"{max_length} tokens): nothing is learned of them"
        )
    return Encoded(
        labels=None,
        ids=torch.tensor(ids, dtype=torch.int32),
        offsets=torch.tensor(ends, dtype=torch.int64),
        token_labels=torch.tensor(labels, dtype=torch.int32),
        pad_id=pad_id(tokenizer),
    )


@dataclass(frozen=True)
class Begun:
    """A row up to where a model goes on.

    Attributes:
        ids: tokens of the prompt.
        prompt: the same as text, to be shown.
        reference: what the row says instead.
    """

    ids: list[int]
    prompt: str
    reference: str


def begin(rows: Iterable[Input], tokenizer: Any, max_length: int) -> list[Begun]:
    """Rows up to the response that a model is to write: the last one of a conversation.

    Args:
        rows: texts, prompts with responses, or conversations.
        tokenizer: one that has a chat template; see :func:`prepare`.
        max_length: tokens of a prompt at most; the last ones are kept. A text by itself is begun
            with the first half of as many tokens.

    Returns:
        One for each row.

    Raises:
        UserError: a row cannot be put into text.
    """
    found = []
    for row in rows:
        if isinstance(row, str):
            told = tell(row, tokenizer).ids[:max_length]
            half = max(1, len(told) // 2)
            ids, rest = told[:half], told[half:]
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            reference = tokenizer.decode(rest, skip_special_tokens=True)
        else:
            chat = _chat_of(row)
            ids = _ids(_rendered(chat[:-1], tokenizer, True), tokenizer)
            shown = "\n".join(said for _, said in chat[:-1])
            reference = chat[-1][1]
        found.append(Begun(ids[-max_length:], shown, reference))
    return found
