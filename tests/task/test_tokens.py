"""A label for each word: which sub-word has it, entities, scores, and bad rows."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from fedpft_core.adapter import lora
from fedpft_core.config import LoraConfig, ModelConfig
from fedpft_core.data.batches import batches
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.head.refit import features, last_linear
from fedpft_core.model.families import family_of
from fedpft_core.model.load import load, task_class
from fedpft_core.model.normalise import normalise
from fedpft_core.task import make
from fedpft_core.task.row import logits
from fedpft_core.task.spans import are_tags, entities
from fedpft_core.task.words import word_figures
from fedpft_core.train.evaluate import evaluate

TAGS = ("B-x", "I-x", "B-y", "I-y", "O")
TASK, PLAIN = make("tokens", TAGS), make("tokens", ("noun", "verb", "other"))
COLUMNS = Columns(task="tokens")


def model(family: str, labels: int = len(TAGS)) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = task_class(TASK.model()).from_config(tiny.hf_config(family, labels=labels))
        for p in made.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.25)
        return normalise(made.eval())


def rows(count: int, classes: int = len(TAGS), seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    words = [tuple(text.split()) for text, _ in tiny.sentences(count, seed)]
    labels = np.full((count, max(map(len, words))), -100)
    for i, row in enumerate(words):
        labels[i, : len(row)] = rng.integers(0, classes, len(row))
    return Examples(tuple(words), labels)


# ---------------------------------------------------------------- entities


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("O O", []),
        ("B-x I-x O B-y", [(0, 2, "x"), (3, 4, "y")]),
        ("B-x B-x", [(0, 1, "x"), (1, 2, "x")]),
        ("I-x I-x I-y", [(0, 2, "x"), (2, 3, "y")]),
        ("B-x I-y", [(0, 1, "x"), (1, 2, "y")]),
        ("B-x I-x E-x S-y O U-x", [(0, 3, "x"), (3, 4, "y"), (5, 6, "x")]),
        ("B-x L-x I-x", [(0, 2, "x"), (2, 3, "x")]),
        ("E-x", [(0, 1, "x")]),
    ],
)
def test_entities_of_tags(tags: str, want: list[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == set(want)


def test_entities_of_iob2_are_those_of_the_definition() -> None:
    """Every row of four tags: an entity begins where CoNLL's scorer says so, and ends likewise."""
    for tags in product(TAGS, repeat=4):
        want, padded = set(), ["O", *tags, "O"]
        starts = [
            i for i in range(1, 5)
            if padded[i] != "O"
            and (padded[i][0] == "B" or padded[i - 1] == "O" or padded[i - 1][2:] != padded[i][2:])
        ]  # fmt: skip
        for i in starts:
            j = i + 1
            while padded[j] == f"I-{padded[i][2:]}":
                j += 1
            want.add((i - 1, j - 1, padded[i][2:]))
        assert entities(tags) == want


def test_which_labels_are_tags() -> None:
    assert are_tags(TAGS) and are_tags(("O", "S-a", "B-a", "L-a"))
    assert not are_tags(("O",)) and not are_tags(("noun", "verb")) and not are_tags(("B-x", "NP"))
    assert TASK.metric.name == "entity F1" and PLAIN.metric.name == "token accuracy"


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_the_first_sub_word_has_the_label(family: str) -> None:
    data, found = rows(12), TASK.encode(rows(12), tiny.processor(family), 32)
    assert found.labels is not None
    for i, words in enumerate(data.inputs):
        length = int(found.lengths[i])
        # One sub-word a word in this vocabulary, between two special tokens.
        assert length == len(words) + 2
        want = [-100, *data.labels[i, : len(words)].tolist(), -100]
        assert found.labels[i, :length].tolist() == want
        assert bool((found.labels[i, length:] == -100).all())


def _tokenizers() -> dict[str, Any]:
    """Sub-words as BERT, GPT-2 (the blank belongs to the word) and SentencePiece cut them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    texts = ["unhappily seen dogs", "the unhappy dog was seen", "a catlike dog, seen unhappily"]
    out: dict[str, Any] = {}
    for name, before, after in (
        ("whitespace", pre_tokenizers.Whitespace(), None),
        ("bytes", pre_tokenizers.ByteLevel(add_prefix_space=False), processors.ByteLevel(
            trim_offsets=False)),
        ("bytes, trimmed", pre_tokenizers.ByteLevel(add_prefix_space=True), processors.ByteLevel()),
        ("metaspace", pre_tokenizers.Metaspace(), None),
    ):  # fmt: skip
        core = Tokenizer(models.BPE(unk_token="[UNK]"))
        core.pre_tokenizer = before
        if after:
            core.post_processor = after
        trainer = trainers.BpeTrainer(
            vocab_size=40, special_tokens=["[UNK]", "[PAD]"], show_progress=False
        )
        core.train_from_iterator(texts, trainer)
        out[name] = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]"
        )
    return out


@pytest.mark.parametrize("name", ["whitespace", "bytes", "bytes, trimmed", "metaspace"])
def test_sub_words_of_every_kind(name: str) -> None:
    tokenizer = _tokenizers()[name]
    words = ("a", "catlike", "dog,", "unhappily", "seen")
    data = Examples((words, words[:2]), np.array([[0, 1, 2, 3, 4], [3, 4, -100, -100, -100]]))
    found = TASK.encode(data, tokenizer, 64)
    assert found.labels is not None and found.ids is not None and found.offsets is not None
    assert found.lengths[0] > 5  # some word is several sub-words
    for i, own in enumerate(data.inputs):
        begin, end = found.offsets[i : i + 2].tolist()
        labels = found.labels[i, : end - begin]
        assert labels[labels != -100].tolist() == data.labels[i, : len(own)].tolist()
        # From each label to the next is one word.
        at = torch.nonzero(labels != -100).flatten().tolist()
        ids = found.ids[begin:end].tolist()
        for word, a, b in zip(own, at, [*at[1:], end - begin], strict=True):
            cut = "".join(tokenizer.convert_ids_to_tokens(ids[a:b]))
            assert cut.replace("Ġ", "").replace("▁", "") == word
    short = TASK.encode(data, tokenizer, 4)
    assert int(short.lengths.max()) == 4 and bool((short.labels != -100).any())


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="needs a tokenizer that tells where its sub-words"):
        TASK.encode(rows(2), object(), 8)


# ---------------------------------------------------------------- model and scores


@pytest.mark.parametrize("family", [f for f in tiny.TEXT_FAMILIES if not f.startswith("opt")])
def test_what_the_head_reads_gives_the_outputs(family: str) -> None:
    """Of every family: features at the words, times the last linear layer, are the scores."""
    made = model(family)
    data = TASK.encode(rows(9), tiny.processor(family), 32)
    head = TASK.head(family_of(family))
    plan = tiny.plan_for(made)
    spec = lora.make_spec(family_of(family), plan, (), LoraConfig(rank=2), head)
    wrapped = lora.attach(made, spec).eval()
    (batch,) = batches(data, 9, None)
    read = features(wrapped, [batch], TASK)
    assert len(read) == TASK.count(batch) == len(TASK.answers(batch))
    layer = last_linear(wrapped)
    with torch.no_grad():
        want = TASK.each(logits(wrapped, batch), batch)
        torch.testing.assert_close(layer(read.float()), want, rtol=1e-4, atol=1e-5)
    blind = {k: v for k, v in batch.items() if k != "labels"}
    assert len(features(wrapped, [blind], TASK)) == int(batch["attention_mask"].sum())


def test_a_family_without_a_token_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AutoModelForTokenClassification"):
        load(ModelConfig(name=str(tiny.folder("opt", tmp_path))), TASK.model(), 0)


@pytest.mark.parametrize("task", [TASK, PLAIN])
def test_scores_are_scikit_learns(task: Any) -> None:
    made, data = model("bert", len(task.labels)), rows(40, len(task.labels))
    encoded = task.encode(data, tiny.processor("bert"), 32)
    score = evaluate(made, task, encoded, 7)
    given_words, words, top, below, loss = [], [], 0, 0, 0.0
    for batch in batches(encoded, 1, None):
        with torch.no_grad():
            found = logits(made, batch)[0]
        keep = batch["labels"][0, : len(found)] != -100
        y, p = batch["labels"][0, : len(found)][keep], found[keep].argmax(-1)
        loss += float(torch.nn.functional.cross_entropy(found[keep], y, reduction="sum"))
        a, b = (entities([task.labels[c] for c in part.tolist()]) for part in (p, y))
        top, below = top + len(a & b), below + len(a) + len(b)
        words += y.tolist()
        given_words += p.tolist()
    accuracy = metrics.accuracy_score(words, given_words)
    macro = metrics.f1_score(words, given_words, average="macro")
    assert score.loss == pytest.approx(loss / len(words), rel=1e-5)
    assert score.more["token macro-F1"] == pytest.approx(macro)
    assert list(score.more) == [m.name for m in task.further]
    if task is TASK:
        assert score.value == pytest.approx(2 * top / below)
        assert score.more["token accuracy"] == pytest.approx(accuracy)
    else:
        assert score.value == pytest.approx(accuracy)
    assert 0 < score.error < 0.2


def test_the_mean_loss_is_over_words_and_padding_counts_nothing() -> None:
    made, data = model("bert"), TASK.encode(rows(5), tiny.processor("bert"), 32)
    (batch,) = batches(data, 5, None)
    total, count = float(TASK.loss(made, batch, "sum")), TASK.count(batch)
    assert float(TASK.loss(made, batch)) == pytest.approx(total / count, rel=1e-6)
    alone = [next(batches(data.select(np.array([i])), 1, None)) for i in range(5)]
    with torch.no_grad():
        assert sum(float(TASK.loss(made, b, "sum")) for b in alone) == pytest.approx(
            total, rel=1e-4
        )
        out = TASK.outputs(made, batch)
    assert bool((out[batch["attention_mask"] == 0] == 0).all())
    nobody = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert float(TASK.loss(made, nobody)) == 0.0
    one = batch | {"labels": TASK.any_labels(5)}
    assert TASK.count(one) == 5 and math.isfinite(float(TASK.loss(made, one)))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 999))
def test_honest_sums_pass(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for task in (TASK, PLAIN):
        made = []
        for _ in range(n):
            length = int(rng.integers(0, 12))
            made.append(tuple(rng.integers(0, len(task.labels), (2, length))))
        sums = word_figures(made, task.labels) | {"loss": 1.0}
        sent = {name: sums[name] for name in task.sent}
        task.check_sums(sent, n)
        whole, part = task.score(sums), task.score(sent)
        assert (part.value, part.error, part.more) == (whole.value, whole.error, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"words": 10**400}, "cannot have"),
        ({"words": 1}, "words cannot have these counts"),
        ({"rows": 1}, "announced"),
        ({"loss": -1.0}, "loss"),
        ({"top": 10**6}, "counts"),
        ({"top": True}, "whole numbers"),
        ({"correct": 1}, "figures"),
    ],
)
def test_sums_that_no_rows_have_are_refused(change: dict[str, float], words: str) -> None:
    rng = np.random.default_rng(0)
    sums = word_figures([tuple(rng.integers(0, 5, (2, 9))) for _ in range(8)], TASK.labels) | {
        "loss": 1.0
    }
    good = {name: sums[name] for name in TASK.sent}
    TASK.check_sums(good, 8)
    TASK.check_sums({}, 0)
    with pytest.raises(ValueError, match=words):
        TASK.check_sums(good | change, 8)


# ---------------------------------------------------------------- rows


def write(path: Path, made: list[tuple[Any, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": w, "label": y}) + "\n" for w, y in made))
    return path


def test_rows_of_words_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(["a", "b"], ["O", "B-x"]), (["c"], ["I-x"])])
    found = TASK.read(path, COLUMNS)
    assert found.inputs == (("a", "b"), ("c",))
    assert found.labels.tolist() == [[4, 0], [1, -100]]
    learned = make("tokens").learn(path, COLUMNS)
    assert learned.labels == ("B-x", "I-x", "O")
    assert learned.histogram(learned.read(path, COLUMNS)) == {"B-x": 1, "I-x": 1, "O": 1}
    assert TASK.histogram(found) == {"B-x": 1, "I-x": 1, "B-y": 0, "I-y": 0, "O": 1}
    numbered = write(tmp_path / "b.jsonl", [(["a", "b"], [4, 0])])
    assert TASK.read(numbered, COLUMNS).labels.tolist() == [[4, 0]]


def test_rows_go_by_their_rarest_label() -> None:
    data = Examples((("a",),) * 4, np.array([[4, 0], [4, 4], [4, 2], [4, 2]]))
    assert TASK.strata(data).tolist() == [0, 4, 2, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((["a", "b"], ["O"]), "row 1 has 2 words but 1 labels"),
        (([], []), "row 1 has no words in column 'text'"),
        (("a b", ["O", "O"]), "row 1 holds str instead of a list of words in column 'text'"),
        ((["a"], "O"), "row 1 holds str instead of a list of words and a list of their labels"),
        ((["a", ""], ["O", "O"]), "row 1 has a word that is no text"),
        ((["a", 3], ["O", "O"]), "row 1 has a word that is no text"),
        ((["a"], [None]), "row 1 has a word whose label is no name"),
        ((["a"], [1.5]), "row 1 has a word whose label is no name"),
        ((["a"], ["secret"]), "row 1 has an unknown label at word 1; known are 'B-x'"),
        ((["a"], None), "row 1 has no label"),
    ],
)
def test_bad_rows_are_named_and_not_quoted(
    row: tuple[Any, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        TASK.read(write(tmp_path / "rows.jsonl", [row]), COLUMNS)
    assert "secret" not in str(caught.value)
