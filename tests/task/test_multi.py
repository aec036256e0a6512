"""Several labels a row: scores as scikit-learn has them, what clients may send, and bad cells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.task import make
from fedpft_core.task.multi import _figures

NAMES = ("a", "b", "c", "d")
TASK = make("text-labels", NAMES)
COLUMNS = Columns(task="multi-label")


def made_up(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    has = rng.random((n, 4)) < 0.3
    return rng.normal(size=(n, 4)) + has, has


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_scores_are_scikit_learns(rows: int) -> None:
    odds, has = made_up(rows)
    score, given_labels = TASK.score(_figures(odds, has) | {"loss": 3.0}), odds > 0
    assert score.value == pytest.approx(
        metrics.f1_score(has, given_labels, average="micro", zero_division=0)
    )
    assert score.more == {
        "macro-F1": pytest.approx(
            metrics.f1_score(has, given_labels, average="macro", zero_division=0)
        ),
        "exact match": pytest.approx(metrics.accuracy_score(has, given_labels)),
        "ranking precision": pytest.approx(
            metrics.label_ranking_average_precision_score(has, odds)
        ),
    }
    assert list(score.more) == [m.name for m in TASK.further]
    assert score.loss == 3.0 / rows


def test_the_standard_error_is_that_of_drawing_other_rows() -> None:
    odds, has = made_up(400)
    score = TASK.score(_figures(odds, has))
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(400):
        some = rng.integers(0, 400, 400)
        drawn.append(metrics.f1_score(has[some], odds[some] > 0, average="micro"))
    assert score.error == pytest.approx(np.std(drawn), rel=0.15)


def test_figures_of_batches_add_up() -> None:
    odds, has = made_up(30)
    parts = [_figures(odds[i : i + 7], has[i : i + 7]) for i in range(0, 30, 7)]
    added = {name: sum(part[name] for part in parts) for name in parts[0]}
    got, want = TASK.score(added), TASK.score(_figures(odds, has))
    assert (got.value, got.error, got.rows) == (want.value, want.error, want.rows)
    assert got.more == pytest.approx(want.more)
    none = TASK.score({})
    assert (none.value, none.error, none.rows) == (0.0, 0.0, 0)


def test_loss_and_merit_row_by_row() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> Any:
            return type("Out", (), {"logits": inputs["odds"]})

    odds, has = (torch.tensor(part).double() for part in made_up(9))
    has[0], odds[0] = 0, -1.0
    batch = {"odds": odds, "labels": has}
    want = 0.0
    for o, y in zip(odds.flatten().tolist(), has.flatten().tolist(), strict=True):
        want += math.log1p(math.exp(-o)) if y else math.log1p(math.exp(o))
    assert float(TASK.loss(Fixed(), batch, "sum")) == pytest.approx(want / 4)
    assert float(TASK.loss(Fixed(), batch)) == pytest.approx(want / 4 / 9)
    f1 = [metrics.f1_score(y > 0, o > 0, zero_division=1.0) for o, y in zip(odds, has, strict=True)]
    assert TASK.merit(odds, has) == pytest.approx(sum(f1))
    assert float(TASK.divergence(odds, odds)) == pytest.approx(0, abs=1e-9)
    assert float(TASK.divergence(odds + 1, odds)) > 0


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 999))
def test_honest_sums_pass(n: int, seed: int) -> None:
    sums = _figures(*made_up(n, seed)) | {"loss": 1.0}
    sent = {name: sums[name] for name in TASK.sent}
    TASK.check_sums(sent, n)
    whole, part = TASK.score(sums), TASK.score(sent)
    assert (part.value, part.error) == (whole.value, whole.error)
    assert set(part.more) == {"exact match"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": math.inf}, "loss"),
        ({"exact": 11}, "cannot match"),
        ({"rows": 9}, "announced"),
        ({"top": 10**400}, "counts"),
        ({"top": 1.5}, "whole numbers"),
        ({"below": -1}, "whole numbers"),
        ({"below^2": 0}, "counts"),
        ({"top*below": 10**6}, "counts"),
        ({"hits 0": 1}, "figures"),
    ],
)
def test_sums_that_no_rows_have_are_refused(change: dict[str, float], words: str) -> None:
    sums = _figures(*made_up(10)) | {"loss": 1.0}
    good = {name: sums[name] for name in TASK.sent}
    TASK.check_sums(good, 10)
    TASK.check_sums({}, 0)
    with pytest.raises(ValueError, match=words):
        TASK.check_sums(good | change, 10)


def write(path: Path, labels: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": "t", "label": y}) + "\n" for y in labels))
    return path


def test_lists_texts_and_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [["b", "a"], "d, a", [], "", ["c"]])
    want = [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert TASK.read(path, COLUMNS).labels.tolist() == want
    assert make("text-labels").learn(path, COLUMNS).labels == NAMES
    found = TASK.read(path, COLUMNS)
    assert TASK.histogram(found) == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert TASK.strata(found).tolist() == [0, 0, 4, 4, 2]
    other = write(tmp_path / "b.jsonl", ["b;a"])
    assert TASK.read(other, Columns(task="multi-label", separator=";")).labels.sum() == 2
    csv = tiny.write_csv(tmp_path / "c.csv", [("x", "a,c"), ("y", "")])
    assert TASK.read(csv, COLUMNS).labels.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([["a"], ["secret"]], "row 2 has an unknown label; known are 'a', 'b', 'c', 'd'"),
        ([["a", None]], "row 1 has a label of type NoneType"),
        ([["a", ""]], "row 1 has an empty label"),
        ([{"a": 1}], "row 1 holds dict, not a list of labels"),
        ([None], "row 1 has no label"),
    ],
)
def test_bad_cells_are_named_and_not_quoted(labels: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        TASK.read(write(tmp_path / "rows.jsonl", labels), COLUMNS)
    assert "secret" not in str(caught.value)


def test_no_label_at_all_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has a label"):
        make("text-labels").learn(write(tmp_path / "rows.jsonl", [[], []]), COLUMNS)


def test_baselines_learn_each_label() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((200, 4)) < 0.4).astype(np.float32)
    y[:, 3] = 0
    x = y @ rng.normal(size=(4, 6)) + 0.3 * rng.normal(size=(200, 6))
    score = TASK.fit_baseline("linear-probe", (x[:150], y[:150]), (x[150:], y[150:]), 0)
    assert score.value > 0.8 and math.isnan(score.loss)


def test_no_rows_have_no_groups() -> None:
    assert TASK.strata(Examples((), np.zeros((0, 4), np.float32))).tolist() == []
