"""Generation: perplexity with its error, what clients may send, writing and judging."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from fedpft_core.config import DataConfig
from fedpft_core.data.batches import batches
from fedpft_core.data.chat import PLAIN, begin
from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import columns_of
from fedpft_core.errors import UserError
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.families import FAMILIES
from fedpft_core.task import Writer, kind_of, make, sample
from fedpft_core.task.writing import Sample, exact, rouge_l, write
from fedpft_core.train.evaluate import evaluate

TASK = make("generate")
DECODERS = tuple(name for name, family in FAMILIES.items() if family.causal)
decoders = pytest.mark.parametrize("family", DECODERS)


def tokenizer() -> Any:
    made = tiny.writer_tokenizer()
    made.chat_template = PLAIN
    return made


def examples(rows: int, seed: int = 0) -> Examples:
    return Examples(tuple(tiny.dialogues(rows, seed)), np.zeros(rows))


def encoded(rows: int, seed: int = 0) -> Encoded:
    return TASK.encode(examples(rows, seed), tokenizer(), 24)


def test_columns_or_the_key_tell_that_it_is_generation() -> None:
    assert kind_of(Columns(response="r")) == kind_of(Columns(messages="m")) == "generate"
    assert kind_of(Columns(task="generate")) == "generate"
    assert kind_of(Columns(task="classify", response="r")) == "text"
    assert kind_of(Columns()) == "text"
    assert isinstance(TASK, Writer) and not isinstance(tiny.TASK, Writer)
    family = FAMILIES[DECODERS[0]]
    assert (TASK.head(family), TASK.position(family), TASK.refits) == ((), "every", False)


def by_row(model: Any, rows: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Loss and tokens of each row, one by one by the library's scores."""
    loss, tokens = [], []
    for i in range(len(rows)):
        (batch,) = batches(rows.select(np.array([i])), 1, None)
        target = batch["labels"][0, 1:]
        scores = model(**inputs_of(batch)).logits[0, :-1]
        loss.append(float(F.cross_entropy(scores, target, ignore_index=UNLEARNED, reduction="sum")))
        tokens.append(int((target != UNLEARNED).sum()))
    return np.array(loss), np.array(tokens)


@decoders
def test_perplexity_and_its_error_are_those_of_an_oracle(family: str) -> None:
    model, rows = tiny.writer(family).double(), encoded(41)
    score = evaluate(model, TASK, rows, 7)
    with torch.no_grad():
        loss, tokens = by_row(model, rows)
    mean = loss.sum() / tokens.sum()
    assert score.loss == pytest.approx(mean, rel=1e-9)
    assert score.value == pytest.approx(math.exp(mean), rel=1e-9) and score.rows == 41
    # Delta method: the ratio's deviations row by row, times the exponential's slope.
    spread = np.sqrt(np.square(loss - mean * tokens).sum()) / tokens.sum()
    assert score.error == pytest.approx(math.exp(mean) * spread, rel=1e-6)
    # And what drawing rows anew would show, within what a thousand draws can tell.
    stream = np.random.default_rng(0)
    drawn = stream.integers(0, 41, (1000, 41))
    again = np.exp(loss[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert score.error == pytest.approx(again, rel=0.2)


def test_what_clients_send_gives_the_value_but_no_error() -> None:
    sums = TASK.sums(tiny.writer("llama"), next(batches(encoded(5), 5, None)))
    sent = {name: sums[name] for name in TASK.sent}
    whole, part = TASK.score(sums), TASK.score(sent)
    assert part.value == whole.value and math.isnan(part.error) and whole.error > 0
    assert part.fields()["error"] is None
    TASK.check_sums(sent, 5, 24)
    assert TASK.score({}).value == 0 and TASK.score({"rows": 3, "tokens": 0}).value == math.inf
    assert TASK.score({"rows": 1, "tokens": 1, "loss": 1e9}).value < math.inf


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 5 * 24 + 1}, "cannot have 121 tokens"),
        ({"tokens": -1}, "cannot have -1 tokens"),
        ({"tokens": 3.0}, "cannot have 3.0 tokens"),
        ({"tokens": True}, "cannot have True tokens"),
        ({"rows": 6}, "row count 6 is not the 5 announced"),
        ({"loss": -0.1}, "no finite number"),
        ({"loss": math.nan}, "no finite number"),
        ({"loss": math.inf}, "no finite number"),
        ({"tokens": 0}, "no finite number"),
        ({"loss2": 1.0}, "the figures of validation rows are"),
    ],
)
def test_figures_that_rows_cannot_have_are_refused(change: dict[str, Any], reason: str) -> None:
    good = {"rows": 5, "tokens": 30, "loss": 60.0}
    TASK.check_sums(good, 5, 24)
    TASK.check_sums({}, 0, 24)
    with pytest.raises(ValueError, match=re.escape(reason)):
        TASK.check_sums(good | change, 5, 24)
    with pytest.raises(ValueError, match="the figures"):
        TASK.check_sums({}, 5, 24)


@decoders
def test_writing_is_the_likeliest_token_each_time_row_by_row(family: str) -> None:
    """Left padding, keys and values kept, several rows at once: what a plain loop writes."""
    model, made, rows = tiny.writer(family, seed=3), tokenizer(), examples(7)
    found = write(model, rows, made, 24, 6, 3)
    assert not model.config.use_cache and not model.training
    for one, begun, (prompt, response) in zip(
        found, begin(rows.inputs, made, 24), rows.inputs, strict=True
    ):
        ids = list(begun.ids)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == made.eos_token_id:
                    break
        want = made.decode(ids[len(begun.ids) :], skip_special_tokens=True).strip()
        assert one == Sample(str(prompt), str(response), want)
    assert family != "llama" or len({s.response for s in found}) > 1


def longest_by_hand(a: list[str], b: list[str]) -> int:
    """The longest common subsequence, by trying every subsequence of the shorter one."""
    a, b = sorted((a, b), key=len)
    for n in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, n):
            rest = iter(b)
            if all(word in rest for word in chosen):
                return n
    return 0


def test_rouge_l_is_that_of_every_subsequence() -> None:
    stream = np.random.default_rng(0)
    for _ in range(60):
        a, b = (list(stream.choice(list("abcd"), int(stream.integers(0, 8)))) for _ in range(2))
        n = longest_by_hand(a, b)
        want = 2 * (n / len(a)) * (n / len(b)) / (n / len(a) + n / len(b)) if n else 0.0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(want)
    assert rouge_l("The Cat, sat!", "the cat sat") == 1.0
    assert rouge_l("", "") == rouge_l("...", "a") == 0.0


@pytest.mark.parametrize(
    ("reference", "response", "same"),
    [
        ("A big cat", "  a BIG  cat ", True),
        ("a big cat", "a cat", False),
        ("6 times 7 is 42\n#### 42", "that makes 40 + 2 = 42.", True),
        ("so much\n#### 1,200", "the answer is $1200", True),
        ("so much\n#### 42", "42 or 43", False),
        ("so much\n#### 42", "none", False),
        ("18", "it is 18", True),
        ("-3.50", "so -3.5", True),
        ("18 cats", "it is 18", False),
    ],
)
def test_exact_match_takes_the_last_number_where_the_answer_is_one(
    reference: str, response: str, same: bool
) -> None:
    assert exact(Sample("q", reference, response)) is same


def test_metrics_of_writing_are_those_the_task_names() -> None:
    found = TASK.judge([Sample("", "a b", "a b"), Sample("", "a b", "c")])
    assert found == {"exact match": 0.5, "ROUGE-L": 0.5}
    assert set(found) == {m.name for m in TASK.further}
    assert TASK.judge([]) == {}


def test_a_task_without_rows_has_the_kind_of_the_run() -> None:
    data = DataConfig()
    assert sample("text", columns_of(data)) == make("text", ("a", "b"))
    assert sample("text", columns_of(replace(data, response_column="r"))) == TASK
    assert sample("text", columns_of(replace(data, task="generate")), ("x", "y")) == TASK


def test_there_is_no_such_kind() -> None:
    with pytest.raises(UserError, match="'poem' is no kind of task"):
        make("poem")
