"""Free text as tokens: what is learned of it, what is cut off and said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny

from fedpft_core.data.batches import batches
from fedpft_core.data.chat import PLAIN, begin, encode_told, prepare, tell, template_of
from fedpft_core.data.encoded import UNLEARNED
from fedpft_core.data.examples import Examples, Input
from fedpft_core.data.stream import public_batches, tokenise_public
from fedpft_core.errors import UserError

TURNS = (
    ("system", "very old"),
    ("user", "the cat"),
    ("assistant", "seen near"),
    ("user", "in rome"),
    ("assistant", "one of two"),
)
# As many models have it: roles in words, and thoughts that only the last response has.
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ 'old ' if m.role == 'user' else 'new ' }}"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'new ' }}{% endif %}"
)
THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ 'some ' }}{% endif %}"
    "{{ m.content + ' ' }}{% endfor %}"
)


def tokenizer(template: str = PLAIN) -> Any:
    made = tiny.writer_tokenizer()
    made.chat_template = template
    return made


def shown(row: Input, template: str = PLAIN) -> tuple[str, str]:
    """The tokens of a row, and those that are learned."""
    made = tokenizer(template)
    told = tell(row, made)
    words = made.convert_ids_to_tokens(told.ids)
    return " ".join(words), " ".join(
        w for w, yes in zip(words, told.learned, strict=True) if yes
    )  # fmt: skip


def rows(*inputs: Input) -> Examples:
    return Examples(inputs, np.zeros(len(inputs)))


def test_of_a_pair_the_response_with_its_end_is_learned() -> None:
    whole, learned = shown(("the cat", "seen near"))
    assert whole == "[CLS] the cat seen near [SEP]" and learned == "seen near [SEP]"


def test_of_a_conversation_all_responses_are_learned() -> None:
    whole, learned = shown(TURNS, MARKED)
    assert whole == (
        "[CLS] new very old [SEP] old the cat [SEP] new seen near [SEP] old in rome [SEP] "
        "new one of two [SEP]"
    )
    assert learned == "seen near [SEP] one of two [SEP]"


def test_only_the_last_where_the_template_writes_earlier_ones_otherwise() -> None:
    whole, learned = shown(TURNS, THOUGHTS)
    assert whole == "very old the cat seen near in rome some one of two"
    assert learned == "some one of two"


def test_a_text_is_learned_whole_and_ended() -> None:
    assert shown("the cat") == ("the cat [SEP]", "the cat [SEP]")


def test_a_template_of_ones_own() -> None:
    template = template_of("very {prompt} is ")
    whole, learned = shown(("the cat", "seen near"), template)
    assert whole == "[CLS] very the cat is seen near [SEP]" and learned == "seen near [SEP]"
    odd = "it's \\ {{ bos_token }} {prompt}\n"
    made = tokenizer(template_of(odd))
    text = made.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], tokenize=False
    )
    assert text == "[CLS]" + odd.replace("{prompt}", "x") + "y[SEP]"
    with pytest.raises(UserError, match=r"data\.prompt-template is 'x'; it must contain"):
        template_of("x")


def test_the_prompt_has_the_tokens_that_stand_before_the_response() -> None:
    """What a model is given to go on with is what it saw in front of responses while tuning."""
    for template in (PLAIN, MARKED, template_of("very {prompt} is ")):
        for row in (("the cat", "seen near"), TURNS):
            made = tokenizer(template)
            told, (begun,) = tell(row, made), begin([row], made, 100)
            n = len(begun.ids)
            assert told.ids[:n] == begun.ids
            assert told.learned[n] and not told.learned[n - 1]
            assert begun.reference == row[-1][1] if row is TURNS else row[1]
    (begun,) = begin(["the cat is seen in rome"], tokenizer(), 100)
    assert (begun.prompt, begun.reference) == ("the cat is", "seen in rome")
    (begun,) = begin([("the big old cat", "two")], tokenizer(), 3)
    assert tokenizer().convert_ids_to_tokens(begun.ids) == ["big", "old", "cat"]


def test_a_template_that_refuses_says_so_without_what_was_said() -> None:
    strict = "{{ raise_exception('secret ' + messages[0].content) }}"
    with pytest.raises(UserError, match=r"row 1: the tokenizer's chat template refuses") as caught:
        encode_told(rows(("the cat", "two")), tokenizer(strict), 9)
    assert "secret" not in str(caught.value) and "cat" not in str(caught.value)
    silent = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="puts no response behind its prompt"):
        encode_told(rows(("the cat", "two")), tokenizer(silent), 9)


def test_what_is_cut_is_counted_and_said_once() -> None:
    heard: list[str] = []
    examples = rows(
        ("the cat", "one two three four"), ("the very big old cat is seen", "one"), ("a", "one")
    )
    encoded = encode_told(examples, tokenizer(), 6, heard.append)
    assert encoded.lengths.tolist() == [6, 6, 4]
    assert [text.split(":")[0] for text in heard] == [
        "2 of 3 rows are longer than data.max-length = 6 tokens; what is behind them is cut off",
        "of 1 of 3 rows the prompt fills the whole window (data.max-length = 6 tokens)",
    ]
    labels = encoded.token_labels
    assert labels is not None
    assert (labels[6:12] == UNLEARNED).all() and (labels[3:6] == encoded.ids[3:6]).all()
    heard.clear()
    encode_told(examples, tokenizer(), 20, heard.append)
    assert heard == []


def test_batches_have_a_label_for_every_token() -> None:
    examples = rows(("the cat", "one two"), ("a", "one"), "in rome")
    encoded = encode_told(examples, tokenizer(), 20)
    (batch,) = batches(encoded, 3, None)
    made = tokenizer()
    for place, i in enumerate(batch["index"].tolist()):
        told = tell(examples.inputs[i], made)
        want = [
            t if yes and at else UNLEARNED
            for at, (t, yes) in enumerate(zip(told.ids, told.learned, strict=True))
        ]
        found = batch["labels"][place].tolist()
        assert found[: len(want)] == want and set(found[len(want) :]) <= {UNLEARNED}
    (one,) = batches(encoded.select(np.array([1])), 1, None)
    assert one["labels"].tolist() == [[UNLEARNED, UNLEARNED, *tell(("a", "one"), made).ids[2:]]]
    again = type(encoded).from_tensors(encoded.tensors())
    assert again.token_labels is encoded.token_labels


def test_prepare_says_what_it_sets_and_refuses_what_does_not_fit() -> None:
    heard: list[str] = []
    made = tiny.writer_tokenizer()
    prepare(made, "", 100, "fm", heard.append)
    assert made.chat_template == PLAIN and len(heard) == 1 and "no chat template" in heard[0]
    prepare(made, "", 100, "fm", heard.append)
    assert len(heard) == 1  # it has one now
    prepare(made, "x {prompt}", 100, "fm", heard.append)
    assert made.chat_template == template_of("x {prompt}") and len(heard) == 1
    words = len(tiny.vocabulary())
    prepare(made, "", words, "fm", heard.append)
    with pytest.raises(UserError, match=f"a token number {words - 1}, but the model knows 20"):
        prepare(made, "", 20, "fm", heard.append)
    bare = tiny.tokenizer("bert")
    with pytest.raises(UserError, match=r"model\.name = fm: the tokenizer has no end token"):
        prepare(bare, "", 100, "fm", heard.append)


def test_public_texts_are_ended_for_decoders() -> None:
    made = tiny.writer_tokenizer()
    texts = ["the cat", "in rome", "", "one"]
    ended = tokenise_public(texts, made, ended=True)
    assert [made.decode(row) for row in ended] == ["the cat [SEP]", "in rome [SEP]", "one [SEP]"]
    assert [len(row) for row in tokenise_public(texts, made)] == [2, 2, 1]
    ids = next(public_batches(ended, made, 1, 8, 1, 0))["input_ids"][0]
    assert (ids == made.eos_token_id).sum() == 3
