"""Regression: correlations as scipy has them, what clients may send, and bad cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpft_core.data.batches import batches
from fedpft_core.data.examples import Examples
from fedpft_core.data.partition import partition
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.model.load import task_class
from fedpft_core.task import make
from fedpft_core.task.regress import _sums
from fedpft_core.task.row import logits
from fedpft_core.train.evaluate import evaluate

TASK = make("text-regression")


def model() -> torch.nn.Module:
    config = tiny.hf_config("bert", labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return task_class(TASK.model()).from_config(config).eval()


def rows(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    texts = tuple(text for text, _ in tiny.sentences(count, seed))
    return Examples(texts, rng.normal(3, 2, count))


def test_scores_are_scipys() -> None:
    made = model()
    for count in (2, 3, 40):
        data = TASK.encode(rows(count), tiny.processor("bert"), 32)
        score = evaluate(made, TASK, data, 3)
        found, labels = [], []
        for batch in batches(data, 5, None):
            with torch.no_grad():
                found += logits(made, batch)[:, 0].tolist()
            labels += batch["labels"].tolist()
        r = stats.pearsonr(labels, found).statistic
        assert score.value == pytest.approx(r, abs=1e-5)
        assert score.error == pytest.approx((1 - r**2) / math.sqrt(count - 1), abs=1e-5)
        mse = float(np.square(np.subtract(labels, found)).mean())
        assert score.loss == pytest.approx(mse)
        assert score.more == {
            "Spearman correlation": pytest.approx(stats.spearmanr(labels, found).statistic),
            "RMSE": pytest.approx(math.sqrt(mse)),
        }
        assert list(score.more) == [m.name for m in TASK.further]


def test_nothing_that_varies_has_no_correlation() -> None:
    for label, answer in (([1.0, 2, 3], [5.0] * 3), ([4.1] * 3, [1.0, 2, 3])):
        score = TASK.score(_sums(np.array(label), np.array(answer), range(3)))
        assert (score.value, score.more["Spearman correlation"]) == (0.0, 0.0)
    none = TASK.score({})
    assert (none.value, none.rows, none.loss) == (0.0, 0, 0.0)


def test_the_loss_is_the_squared_error_of_the_first_output() -> None:
    made, data = model(), TASK.encode(rows(7), tiny.processor("bert"), 32)
    (batch,) = batches(data, 7, None)
    out = logits(made, batch)[:, 0]
    want = sum((a - b) ** 2 for a, b in zip(out.tolist(), batch["labels"].tolist(), strict=True))
    assert float(TASK.loss(made, batch, "sum")) == pytest.approx(want, rel=1e-5)
    assert float(TASK.loss(made, batch)) == pytest.approx(want / TASK.count(batch), rel=1e-5)
    assert TASK.merit(logits(made, batch), batch["labels"]) == pytest.approx(-want, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e4]),
    mean=st.sampled_from([0, 5, 1e3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_honest_sums_pass(n: int, scale: float, mean: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.normal(mean, scale, n)
    answer = label + rng.normal(0, scale / (1 + seed % 3), n) * (seed % 2)
    sums = _sums(label, answer, range(n))
    sent = {name: sums[name] for name in TASK.sent}
    TASK.check_sums(sent, n)
    assert "Spearman correlation" not in TASK.score(sent).more


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": math.nan}, "no finite number"),
        ({"label": 10**400}, "no finite number"),
        ({"rows": 9}, "not the 10 announced"),
        ({"label": 1e6}, "no validation rows"),
        ({"label^2": -1.0}, "no validation rows"),
        ({"label*answer": 1e4}, "no validation rows"),
        ({"loss": 0.0}, "not that of their sums"),
        ({"label 0": 1.0}, "the figures"),
    ],
)
def test_sums_that_no_rows_have_are_refused(change: dict[str, float], words: str) -> None:
    rng = np.random.default_rng(0)
    sums = _sums(rng.normal(size=10), rng.normal(size=10), range(10))
    good = {name: sums[name] for name in TASK.sent}
    TASK.check_sums(good, 10)
    TASK.check_sums({}, 0)
    with pytest.raises(ValueError, match=words):
        TASK.check_sums(good | change, 10)


@pytest.mark.parametrize("cell", ["high", "nan", "inf", "1e40", "1,5"])
def test_a_cell_that_is_no_number_is_named_and_not_quoted(cell: str, tmp_path: Path) -> None:
    path = tiny.write_csv(tmp_path / "rows.csv", [("a", "1.5"), ("b", cell)])
    with pytest.raises(UserError, match="row 2 has a label that is no finite number") as caught:
        TASK.read(path, Columns(task="regress"))
    assert cell not in str(caught.value).replace("finite", "")
    good = tiny.write_csv(tmp_path / "good.csv", [("a", "1.5"), ("b", " -2 "), ("c", "1e3")])
    assert TASK.read(good, Columns(task="regress")).labels.tolist() == [1.5, -2.0, 1000.0]


def test_names_for_numbers_are_refused() -> None:
    from fedpft_core.data.rows import Table

    with pytest.raises(UserError, match=r"the labels of data.task = regress are numbers"):
        TASK.settled(Table((), (), "x"), "a,b")


def test_groups_are_tenths_and_partitions_may_go_by_them() -> None:
    data = rows(200)
    groups = TASK.strata(data)
    assert np.bincount(groups).tolist() == [20] * 10
    assert data.labels[groups == 0].max() <= data.labels[groups == 1].min()
    assert TASK.strata(Examples(("a", "b"), np.ones(2))).tolist() == [1, 1]
    shares = partition(groups, 5, "shards", 1.0, 0)
    spread = [data.labels[share].std() for share in shares]
    assert sorted(np.concatenate(shares).tolist()) == list(range(200))
    assert np.median(spread) < data.labels.std()
    counts = TASK.histogram(data)
    assert sum(counts.values()) == 200 and len(counts) == 4


def test_baselines_find_what_words_say() -> None:
    texts = [text for text, _ in tiny.sentences(200)]
    labels = np.array([float(len(text.split())) for text in texts], dtype=np.float32)
    for name, x in (("tf-idf", texts), ("linear-probe", labels[:, None] * np.ones((1, 3)))):
        score = TASK.fit_baseline(name, (x[:150], labels[:150]), (x[150:], labels[150:]), 0)
        assert score.value > 0.5 and score.rows == 50
