"""The embedded task and public corpus: size, balance, disjointness, cache."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpft_core.config import DataConfig
from fedpft_core.data import builtin, installed, prose
from fedpft_core.data.builtin import KINDS, LIBRARIES, ROWS_PER_CLASS, DocstringRows
from fedpft_core.data.public import load_public
from fedpft_core.errors import UserError
from fedpft_core.task import load_task


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows(cache: Path) -> DocstringRows:
    return builtin.docstring_rows(cache)


@pytest.fixture(scope="module")
def public(cache: Path, rows: DocstringRows) -> tuple[str, ...]:
    return builtin.public_paragraphs(cache)


def test_balanced_and_large_enough(rows: DocstringRows) -> None:
    counts = Counter(zip(rows.split, rows.label, strict=True))
    assert counts == {(s, name): n for s, n in ROWS_PER_CLASS.items() for name in KINDS}
    total = Counter(rows.split)
    assert total["train"] >= 400
    assert total["test"] >= 1000
    assert total["validation"] >= 400


def test_no_file_and_no_text_in_two_splits(rows: DocstringRows) -> None:
    splits_of_file: dict[str, set[str]] = {}
    for split, source in zip(rows.split, rows.source, strict=True):
        splits_of_file.setdefault(source, set()).add(split)
        assert source.split("/")[0] in LIBRARIES
    assert {len(splits) for splits in splits_of_file.values()} == {1}
    keys = [prose.key(text) for text in rows.text]
    assert len(set(keys)) == len(keys)
    assert max(Counter(zip(rows.source, rows.label, strict=True)).values()) <= builtin.ROWS_PER_FILE


def test_rows_are_clean_sentences(rows: DocstringRows) -> None:
    for text in rows.text:
        assert builtin.MIN_ROW_WORDS <= len(text.split()) <= builtin.MAX_ROW_WORDS
        assert text[0].isupper() and text[-1] in ".!?", text
        assert not set("\n`{}|") & set(text), text
        assert ">>>" not in text and "://" not in text and ":param" not in text, text


def test_labels_are_what_the_sentence_documents(rows: DocstringRows) -> None:
    """Against the interpreter's own view of one library: what the objects themselves say."""
    import sqlalchemy
    from sqlalchemy import engine, orm, pool

    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for module in (sqlalchemy, engine, orm, pool):
        for thing in vars(module).values():
            if inspect.isclass(thing):
                seen["class"].add(first(thing))
                for name, part in vars(thing).items():
                    if isinstance(part, property | functools.cached_property):
                        seen["property"].add(first(part))
                    elif inspect.isfunction(part) and not name.startswith("_"):
                        seen["function"].add(first(part))
            elif inspect.ismodule(thing):
                seen["module"].add(first(thing))
    checked = Counter[str]()
    for text, label in zip(rows.text, rows.label, strict=True):
        found = {kind for kind in KINDS if prose.key(text) in seen[kind]}
        if found:
            assert label in found, text
            checked[label] += 1
    assert sum(checked.values()) >= 20 and len(checked) >= 3, checked


def first(thing: object) -> str:
    """The key of the first sentence of an object's docstring."""
    own = thing.func if isinstance(thing, functools.cached_property) else thing
    sentences = [s for p in prose.paragraphs(own.__doc__ or "")[:1] for s in prose.sentences(p)]
    return prose.key(sentences[0]) if sentences else ""


def test_from_the_cache(rows: DocstringRows, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, list[str]]:
        raise AssertionError("built although cached")

    monkeypatch.setattr(builtin, "_build_docstrings", refuse)
    assert builtin.docstring_rows(cache) == rows


def test_another_process_builds_the_same_and_imports_nothing(
    tmp_path: Path, cache: Path, rows: DocstringRows, public: tuple[str, ...]
) -> None:
    code = (
        "import sys; from pathlib import Path; from fedpft_core.data import builtin as b;"
        f"b.public_paragraphs(Path({str(tmp_path)!r}));"
        # numpy and pandas may come with pyarrow.
        "print([n for n in b.LIBRARIES if n in sys.modules and n not in ('numpy', 'pandas')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in names] == ["docstrings", "public"]
    assert sorted(path.name for path in cache.iterdir()) == names
    assert builtin.docstring_rows(tmp_path) == rows
    assert builtin.public_paragraphs(tmp_path) == public


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys; from fedpft_core.data import batches, builtin, encoding, files, partition, "
        "pixels, prose, public, examples, rows, splits, stream;"
        "print([n for n in ('torch', 'pyarrow', 'pandas', 'datasets', 'flwr_datasets', 'flwr', "
        "'sklearn', 'PIL', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def small(calls: list[int]) -> dict[str, list[str]]:
    calls.append(1)
    return {"text": ["a", "b"]}


def test_cache_is_keyed_by_versions_and_rebuilt_when_corrupt(tmp_path: Path) -> None:
    calls: list[int] = []

    def get(versions: list[str]) -> dict[str, list[str]]:
        return builtin._cached("x", versions, ("text",), lambda: small(calls), tmp_path)

    assert get(["a==1"]) == get(["a==1"]) == {"text": ["a", "b"]}
    assert len(calls) == 1
    get(["a==2"])
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert get(["a==1"]) == {"text": ["a", "b"]}
    assert len(calls) == 3
    assert get(["a==1"]) == {"text": ["a", "b"]}
    assert len(calls) == 3
    assert [p.suffix for p in tmp_path.iterdir()] == [".parquet", ".parquet"]


def test_recipe_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for recipe in (1, 2, 2):
        monkeypatch.setattr(builtin, "RECIPE", recipe)
        builtin._cached("x", [], ("text",), lambda: small(calls), tmp_path)
    assert len(calls) == 2


def test_cache_of_other_columns_is_rebuilt(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls: list[int] = []
    builtin._cached("x", [], ("text",), lambda: small(calls), tmp_path)
    (path,) = tmp_path.iterdir()
    for table in (pa.table({"words": ["a"]}), pa.table({"text": pa.array([], pa.string())})):
        pq.write_table(table, path)
        builtin._cached("x", [], ("text",), lambda: small(calls), tmp_path)
    assert len(calls) == 3


def test_unusable_cache_folder_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    calls: list[int] = []
    for _ in range(2):
        got = builtin._cached("x", [], ("text",), lambda: small(calls), tmp_path / "file" / "sub")
        assert got == {"text": ["a", "b"]}
    assert len(calls) == 2


def test_concurrent_builders_agree(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    results: list[dict[str, list[str]]] = []

    def build() -> dict[str, list[str]]:
        barrier.wait(timeout=20)  # all four are building before any writes
        return {"text": ["a", "b"]}

    def run() -> None:
        results.append(builtin._cached("x", [], ("text",), build, tmp_path))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"text": ["a", "b"]}] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path))
    assert builtin.default_cache_dir() == tmp_path
    monkeypatch.delenv("FEDPFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin.default_cache_dir() == tmp_path / ".cache" / "fedpft"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin, "LIBRARIES", ("torch", "no_such_library"))
    with pytest.raises(UserError, match="'no_such_library', which is not installed"):
        builtin.docstring_rows(tmp_path)
    # A module of the standard library, and one that is part of the interpreter.
    for name in ("csv", "sys"):
        monkeypatch.setattr(builtin, "LIBRARIES", ("torch", name))
        with pytest.raises(UserError, match=f"'{name}', which is here as a single file"):
            builtin.docstring_rows(tmp_path)


def fake_files(monkeypatch: pytest.MonkeyPatch, properties: int) -> None:
    """Files of one row of each kind each, of which only some have a property."""

    def files() -> list[tuple[str, Path]]:
        return [(f"torch/{i}.py", Path(str(i))) for i in range(200)]

    def rows(source: str, kinds: set[str]) -> dict[str, list[tuple[str, str]]]:
        here = kinds if int(source) < properties else kinds - {"property"}
        found = {kind: [(f"{kind} {source}", f"{kind} {source}")] for kind in here}
        if "class" in found and "module" in found:  # of two kinds: neither keeps it
            for kind in ("class", "module"):
                found[kind].append((f"both {source}", f"both {source}"))
        return found

    monkeypatch.setattr(builtin, "_files", files)
    monkeypatch.setattr(builtin, "read", str)
    monkeypatch.setattr(builtin, "_rows_of_file", rows)


def test_poor_class_shrinks_all_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_files(monkeypatch, 30)
    columns = builtin._build_docstrings()
    counts = Counter(zip(columns["label"], columns["split"], strict=True))
    for split in ROWS_PER_CLASS:
        (count,) = {counts[kind, split] for kind in KINDS}
        assert count == sum(builtin._split_of(f"torch/{i}.py") == split for i in range(30))
    assert not [text for text in columns["text"] if text.startswith("both")]
    assert "there are no more of class property" in caplog.text


def test_without_any_rows_of_a_class_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_files(monkeypatch, 0)
    with pytest.raises(UserError, match="too few readable docstrings"):
        builtin._build_docstrings()


@pytest.mark.parametrize(
    ("kinds", "parsed"),
    [
        ({"module"}, False),
        ({"module", "property"}, False),
        (set(), False),
        ({"class"}, True),
    ],
)
def test_a_file_is_parsed_only_where_needed(
    kinds: set[str], parsed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        '"""Tools to look at the rows of a table."""\n'
        'class A:\n    """One of the many rows of a table."""'
    )
    calls: list[str] = []
    real = prose.documented

    def documented(text: str) -> Iterator[tuple[str, str]]:
        calls.append(text)
        return real(text)

    monkeypatch.setattr(prose, "documented", documented)
    found = builtin._rows_of_file(source, kinds)
    assert bool(calls) == parsed
    assert {kind: [text for _, text in rows] for kind, rows in found.items()} == {
        kind: {
            "module": ["Tools to look at the rows of a table."],
            "class": ["One of the many rows of a table."],
        }.get(kind, [])
        for kind in kinds
    }


def test_task_uses_the_splits(rows: DocstringRows, cache: Path) -> None:
    data = DataConfig(max_test_rows=80)
    task = load_task(data, 0, cache)
    assert task.task.name == "text"
    assert task.task.labels == KINDS
    want = [t for t, s in zip(rows.text, rows.split, strict=True) if s == "train"]
    assert list(task.train.inputs) == want
    assert len(task.validation) == ROWS_PER_CLASS["validation"] * len(KINDS)
    assert Counter(task.test.labels.tolist()) == dict.fromkeys(range(4), 20)
    sets = [set(e.inputs) for e in (task.train, task.validation, task.test)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_task_is_neither_trivial_nor_noise(rows: DocstringRows, cache: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    task = load_task(DataConfig(), 0, cache)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=300)
    model.fit(vectorizer.fit_transform(task.train.inputs), task.train.labels)
    right = model.predict(vectorizer.transform(task.test.inputs)) == task.test.labels
    assert 0.5 < right.mean() < 0.75  # chance is 0.25; a leaked label would give near 1


def test_public_is_large_and_clean(public: tuple[str, ...]) -> None:
    assert len(public) >= 5000
    assert sum(len(text.split()) for text in public) >= 150_000
    assert len({prose.key(text) for text in public}) == len(public)
    assert not [text for text in public if ">>>" in text or "```" in text or "http://" in text]
    assert max(len(text.split()) for text in public) <= 120


def test_public_is_disjoint_from_the_task(rows: DocstringRows, public: tuple[str, ...]) -> None:
    task = {prose.key(text) for text in rows.text}
    for text in public:
        for part in (text, *prose.sentences(text)):
            assert prose.key(part) not in task


def test_task_sentences_are_kept_out_of_public(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = "Ray does one thing here today. It is a second sentence of the same paragraph."
    monkeypatch.setattr(builtin, "source_files", lambda root: [])
    monkeypatch.setattr(builtin, "readme_packages", lambda without: ("x",))
    monkeypatch.setattr(builtin, "readme", lambda name: readme)
    assert builtin._build_public(set()) == {"text": [readme]}
    assert builtin._build_public({prose.key("ray does one thing here today")}) == {"text": []}


def test_public_readmes_leave_out_the_eight() -> None:
    packages = installed.readme_packages(builtin.LIBRARIES)
    assert not set(packages) & {
        "torch",
        "transformers",
        "ray",
        "pandas",
        "sqlalchemy",
        "flwr",
        "numpy",
        "huggingface-hub",
    }
    assert {"peft", "scikit-learn", "rich"} <= set(packages)
    assert "pytest" not in packages


def test_load_public_builtin(public: tuple[str, ...], cache: Path, rows: DocstringRows) -> None:
    task = load_task(DataConfig(), 0, cache)
    texts = load_public("builtin:public", "", "text", [task.train, task.test], 500, 3, cache)
    assert len(texts) == 500
    assert set(texts) <= set(public)
    again = load_public("builtin:public", "", "text", [task.train, task.test], 500, 3, cache)
    assert texts == again
