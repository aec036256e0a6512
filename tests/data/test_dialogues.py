"""Rows of free text: which columns they come from, what is refused, how they are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpft_core.data.dialogues import groups, length_groups, read_dialogues
from fedpft_core.data.examples import Examples, texts_of
from fedpft_core.data.partition import partition
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError

PAIRS = Columns(text="prompt", response="response")
CHATS = Columns(messages="messages")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    file = path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def said(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    }  # fmt: skip


def test_pairs_texts_and_conversations(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b", "more": "x"},
        {"prompt": "c", "response": "d", "more": ""},
    ]
    file = lines(tmp_path, rows)
    assert read_dialogues(file, PAIRS).inputs == (("a", "b"), ("c", "d"))
    with_more = Columns(text="prompt", text_pair="more", response="response")
    assert read_dialogues(file, with_more).inputs == (("a\n\nx", "b"), ("c", "d"))
    assert read_dialogues(file, Columns(text="prompt")).inputs == ("a", "c")
    file = lines(tmp_path, [said("hi", "there", "and now?"), said("one", "two", "three", "four")])
    first, second = read_dialogues(file, CHATS).inputs
    # What nobody answers is not part of a row.
    assert first == (("user", "hi"), ("assistant", "there"))
    assert texts_of(second) == ("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (PAIRS, {"prompt": "secret", "response": " "}, "row 2 has no response in 'response'"),
        (PAIRS, {"prompt": "secret", "response": None}, "row 2 has no response in 'response'"),
        (PAIRS, {"prompt": "", "response": "secret"}, "row 2 has no text in column 'prompt'"),
        (PAIRS, {"prompt": 3, "response": "secret"}, "row 2 holds int instead of text"),
        (PAIRS, {"prompt": "secret", "response": 4}, "row 2 holds int instead of text"),
        (CHATS, {"messages": "secret"}, "row 2: 'messages' holds no list of messages"),
        (CHATS, {"messages": []}, "row 2: 'messages' holds no list of messages"),
        (CHATS, {"messages": ["secret"]}, "row 2: message 1 lacks a role or content"),
        (CHATS, {"messages": [{"role": "user", "content": 1}]}, "row 2: message 1 lacks a role"),
        (CHATS, {"messages": [{"role": "secret", "content": "a"}]}, "role of message 1 is none"),
        (CHATS, said("secret", ""), "row 2: message 2 has an empty response"),
        (CHATS, said("", "secret"), "row 2: message 1 has no content"),
        (CHATS, said("secret"), "row 2: there is no response"),
        (
            CHATS,
            {"messages": [{"role": "assistant", "content": "secret"}]},
            "row 2: there is no response",
        ),
    ],
)
def test_refused_rows_are_named_and_not_quoted(
    tmp_path: Path, columns: Columns, row: dict[str, Any], reason: str
) -> None:
    good = said("a", "b") | {"prompt": "a", "response": "b"}
    with pytest.raises(UserError) as caught:
        read_dialogues(lines(tmp_path, [good, row]), columns, "data.train")
    assert reason in str(caught.value) and str(caught.value).startswith("data.train: ")
    assert "secret" not in str(caught.value)


def test_builtin_data_are_no_dialogues() -> None:
    with pytest.raises(UserError, match="needs files of its own"):
        read_dialogues("builtin:docstrings", Columns())


def test_rows_go_by_source_or_else_by_length(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "from": n} for n in ("web", "book", "web", "chat")]
    file = lines(tmp_path, rows)
    named = read_dialogues(file, Columns(text="prompt", response="response", source="from"))
    assert groups(named).tolist() == named.labels.tolist() == [2, 0, 2, 1]
    lengths = np.random.default_rng(0).permutation(200) + 1
    rows_by_length = Examples(tuple("x" * int(n) for n in lengths), np.zeros(200))
    found = groups(rows_by_length)
    assert found.tolist() == length_groups(rows_by_length).tolist()
    assert found.tolist() == ((lengths - 1) // 20).tolist()
    assert groups(Examples((), np.zeros(0))).tolist() == []
    assert length_groups(Examples(("a", "b"), np.zeros(2))).tolist() == [0, 1]


def test_clients_get_rows_of_few_sources_or_lengths() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 400)
    rows = Examples(tuple("x" * int(n) for n in lengths), np.zeros(400))
    found = groups(rows)
    few = partition(found, 5, "shards", 1.0, 0)
    assert all(len(set(found[part].tolist())) <= 3 for part in few)
    even = partition(found, 5, "iid", 1.0, 0)
    assert all(len(set(found[part].tolist())) == 10 for part in even)
