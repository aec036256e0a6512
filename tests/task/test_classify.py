"""The classification task: its score and error, its fields, and where heads read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from fedpft_core.config import TASKS
from fedpft_core.data.batches import batches
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position, read_at
from fedpft_core.model.families import FAMILIES
from fedpft_core.task import KINDS, confusion, kind_of, make, mean_score
from fedpft_core.task.classify import _by_class, _macro_f1, _matthews, logits

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def test_looked_up_by_the_name_in_packages() -> None:
    for name in KINDS:
        task = make(name, ["a", "b"])
        assert (task.name, task.labels) == (name, ("a", "b"))
        assert task == make(name, ("a", "b")) and hash(task) == hash(make(name, ("a", "b")))
        other = "image" if name.startswith("image") else "text"
        assert task.reads == ("captioned image" if name == "text-to-image" else other)
    with pytest.raises(UserError, match="'poem' is no kind of task; there are text, pair, image"):
        make("poem")


def test_columns_tell_the_kind() -> None:
    assert kind_of(Columns()) == "text"
    assert kind_of(Columns(text_pair="other")) == "pair"
    assert kind_of(Columns(image="image")) == "image"
    assert kind_of(Columns(task="regress", text_pair="other")) == "pair-regression"
    assert kind_of(Columns(task="multi-label")) == "text-labels"
    assert kind_of(Columns(task="tokens")) == "tokens"
    assert {kind_of(Columns(task=task)) for task in TASKS} <= KINDS.keys()


def test_score_is_the_share_right_with_its_standard_error() -> None:
    right = np.random.default_rng(0).random(400) < 0.8
    score = tiny.TASK.score({"rows": 400, "correct": int(right.sum()), "loss": 100.0}, 2.5)
    assert score.value == right.mean()
    # The standard error of a mean of numbers that are 0 or 1.
    assert score.error == pytest.approx(right.std() / math.sqrt(400))
    assert (score.loss, score.rows, score.seconds) == (0.25, 400, 2.5)
    assert score.metric.fields() == {
        "metric": "accuracy", "higher_is_better": True, "share": True,
    }  # fmt: skip
    assert score.fields() == {
        "metric": "accuracy", "value": score.value, "error": score.error, "loss": 0.25,
        "rows": 400, "more": {},
    }  # fmt: skip
    assert replace(score, loss=math.nan).fields()["loss"] is None


@families
def test_macro_f1_is_scikit_learns(family: str) -> None:
    """Over batches of uneven size, and where a class is neither in the rows nor named."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    from fedpft_core.train.evaluate import evaluate

    model, task = tiny.model(family), tiny.task_of(family)
    for rows in (1, 2, 7, 40):
        data = tiny.encoded(family, rows)
        score = evaluate(model, task, data, 3)
        named, labels = [], []
        for batch in batches(data, 5, None):
            with torch.no_grad():
                named += logits(model, batch).argmax(-1).tolist()
            labels += batch["labels"].tolist()
        assert score.more == {
            "macro-F1": pytest.approx(f1_score(labels, named, average="macro")),
            "Matthews correlation": pytest.approx(matthews_corrcoef(labels, named)),
        }
        assert score.fields()["more"] == dict(score.more)
        assert list(score.more) == [metric.name for metric in task.further]


def test_macro_f1_of_made_up_predictions() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = np.random.default_rng(0)
    for classes in (2, 3, 10):
        for rows in (1, 5, 200):
            named, labels = rng.integers(0, classes, rows), rng.integers(0, classes, rows)
            sums = _by_class(torch.as_tensor(named), torch.as_tensor(labels), classes)
            want = f1_score(labels, named, average="macro")
            assert _macro_f1(sums) == {"macro-F1": pytest.approx(want)}
            want = matthews_corrcoef(labels, named)
            assert _matthews(sums) == {"Matthews correlation": pytest.approx(want)}
    assert _macro_f1({}) == _matthews({}) == {}


def test_a_baselines_macro_f1_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 4)) + labels[:, None]
    train, test = (x[:60], labels[:60]), (x[60:], labels[60:])
    score = tiny.TASK.fit_baseline("linear-probe", train, test, 0)
    probe = LogisticRegression(C=0.1, max_iter=300, random_state=0)
    found = make_pipeline(StandardScaler(), probe).fit(*train)
    want = f1_score(test[1], found.predict(test[0]), average="macro")
    assert score.more["macro-F1"] == pytest.approx(want)


@families
def test_what_a_client_may_send_gives_the_accuracy_and_nothing_by_class(family: str) -> None:
    model, task = tiny.model(family), tiny.task_of(family)
    with torch.no_grad():
        sums = task.sums(model, tiny.batch_of(family))
    assert set(task.sent) == {"rows", "correct", "loss"}
    by_class = [name for name in sums if name.startswith(("hits ", "named ", "given "))]
    assert len(by_class) == 3 * len(task.labels) and confusion(sums)
    sent = {name: sums[name] for name in task.sent}
    task.check_sums(sent, 7)
    with pytest.raises(ValueError, match="the figures of validation rows are correct, given 0"):
        task.check_sums(sums, 7)
    whole, part = task.score(sums), task.score(sent)
    assert (part.value, part.error, part.loss, part.rows) == (
        whole.value, whole.error, whole.loss, whole.rows,
    )  # fmt: skip
    assert whole.more and not part.more


def test_the_mean_of_scores_has_the_mean_of_further_metrics() -> None:
    found = [replace(tiny.TASK.score({}), more={"macro-F1": value}) for value in (0.25, 0.75)]
    assert mean_score(found).more == {"macro-F1": 0.5}


def test_no_rows_score_nothing() -> None:
    score = tiny.TASK.score({})
    assert (score.value, score.error, score.loss, score.rows) == (0.0, 0.0, 0.0, 0)
    assert score.more == {}


@families
def test_sums_of_batches_add_up_to_those_of_all_rows(family: str) -> None:
    model, task = tiny.model(family).double(), tiny.task_of(family)
    parts = [tiny.double(tiny.batch_of(family, 5, seed)) for seed in (1, 2)]
    whole = [task.sums(model, batch) for batch in parts]
    added = {k: whole[0].get(k, 0) + whole[1].get(k, 0) for k in {**whole[0], **whole[1]}}
    assert added["rows"] == 10
    right, loss = 0, 0.0
    for batch in parts:
        for scores, label in zip(logits(model, batch), batch["labels"].tolist(), strict=True):
            right += int(scores.argmax()) == label
            loss += float(scores.logsumexp(0) - scores[label])
    assert added["correct"] == right
    assert added["loss"] == pytest.approx(loss)
    assert task.score(added).value == right / 10
    mean = task.loss(model, parts[0])
    assert float(mean.detach()) == pytest.approx(whole[0]["loss"] / task.count(parts[0]))


@families
def test_the_loss_depends_on_what_the_head_reads_and_on_nothing_else(family: str) -> None:
    """The gradient of the class scores for the last block's output says where the head reads."""
    model, task = tiny.model(family), tiny.task_of(family)
    row, batch = FAMILIES[family], tiny.batch_of(family)
    seen: list[torch.Tensor] = []

    def keep(_m: object, _i: object, out: torch.Tensor | tuple[torch.Tensor]) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)
        seen[0].retain_grad()

    row.block_list(model)[-1].register_forward_hook(keep)
    task.loss(model, batch).backward()
    grad = seen[0].grad
    assert grad is not None
    read = read_at(grad, batch, task.position(row))
    assert read.any(1).all()
    assert float(read.abs().sum()) == pytest.approx(float(grad.abs().sum()))


@pytest.mark.parametrize(
    ("position", "want"),
    [("first", [0, 3, 6]), ("last", [2, 3, 7]), ("every", [0, 1, 2, 3, 6, 7])],
)
def test_positions(position: Position, want: list[int]) -> None:
    h = torch.arange(9.0).reshape(3, 3, 1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    assert read_at(h, {"attention_mask": mask}, position).flatten().tolist() == want


def test_histogram_counts_labels_that_no_row_has() -> None:
    rows = Examples(("x", "y", "z"), np.array([2, 0, 2]))
    assert tiny.TASK.histogram(rows) == {"animal": 1, "number": 0, "place": 2}
    assert tiny.TASK.strata(rows).tolist() == [2, 0, 2]


def test_labels_that_are_learned_from_rows(tmp_path: object) -> None:
    path = tiny.write_csv(tmp_path / "a.csv", [("x", "b"), ("y", "a")])  # type: ignore[operator]
    task = make("text").learn(path, Columns())
    assert task.labels == ("a", "b")
    assert task.read(path, Columns()).labels.tolist() == [1, 0]


def test_baselines_are_those_that_make_sense() -> None:
    assert make("image", tiny.LABELS).baselines == ("linear-probe",)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 4)) + 3 * labels[:, None]
    score = tiny.TASK.fit_baseline("linear-probe", (x[:60], labels[:60]), (x[60:], labels[60:]), 0)
    assert score.value > 0.9 and score.rows == 30 and math.isnan(score.loss)
    words = [t for t, _ in tiny.sentences(90)]
    numbers = np.array([tiny.LABELS.index(y) for _, y in tiny.sentences(90)])
    score = tiny.TASK.fit_baseline("tf-idf", (words, numbers), (words, numbers), 0)
    assert score.value > 0.9 and score.rows == 90
