"""report.html of a run, from fabricated events: what it says, and that it is whole HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from runlog import event, scored, whole_run

from fedpft_console import report
from fedpft_console.report import verdict
from server_app.run.record import fold

VOID = {"meta", "br", "img", "path", "use", "rect", "hr", "input", "link"}


class Outline(HTMLParser):
    """Headings in order, and that every element is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))


def full() -> list[dict[str, Any]]:
    events = whole_run()
    nodes = next(i for i, e in enumerate(events) if e["event"] == "nodes")
    shares = {str(c): {"a": 5 * c + 3, "b": 20 - 4 * c} for c in range(4)}
    events.insert(nodes, event(103, "partition", scheme="dirichlet", clients=shares))
    counts = [[0, 0, 150], [0, 1, 50], [1, 0, 150], [1, 1, 50]]
    said = event(129, "confusion", round=2, model="fm", split="test", counts=counts)
    return [*events[:-1], said, events[-1]]


@pytest.mark.parametrize("cut", [0, 1, 4, 6, 12, 20, 30, len(full())])
def test_any_beginning_of_a_run_makes_a_whole_page(cut: int) -> None:
    found = Outline(report.html(fold(full()[:cut])))
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    # No level is left out on the way down, as readers who jump from heading to heading expect.
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = report.html(fold(full()))
    found = Outline(text)
    assert not {tag for tag, _ in found.elements} & {"script", "link", "iframe", "img", "object"}
    loaded = [v for _, a in found.elements for k, v in a.items() if k in ("src", "xlink:href")]
    assert all(v and v.startswith("#") for v in loaded)
    assert "@import" not in text and "url(http" not in text


def test_links_within_the_page_lead_somewhere_and_ids_are_not_repeated() -> None:
    found = Outline(report.html(fold(full())))
    ids = [a["id"] for _, a in found.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a in found.elements if tag == "a"]
    assert links and all(link and link[1:] in ids for link in links)


def test_plots_are_described_and_tables_scroll_by_themselves() -> None:
    found = Outline(report.html(fold(full())))
    plots = [a for tag, a in found.elements if tag == "svg"]
    assert len(plots) == 4, "scores, traffic, agreement, partition"
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in plots)
    boxes = [a for tag, a in found.elements if a.get("class") == "scroll"]
    tables = [tag for tag, _ in found.elements if tag == "table"]
    assert len(boxes) == len(tables) > 6
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)


def test_what_the_product_reaches_stands_beside_the_reference_points() -> None:
    record = fold(full())
    assert verdict.sentence(record) == (
        "The plugged-in FM is 10.0 points behind linear probe on the FM, level with TF-IDF, "
        "10.0 points ahead of undistilled sub-FM, plugged in."
    )
    rows = {row[0]: row[1:] for row in verdict.sheet(record).rows}
    assert rows["linear probe on the FM"] == ["60.0 ± 2.4 %", "-10.0 ± 3.5"]
    assert verdict.sentence(record) in report.html(record)
    assert verdict.sentence(record) in report.markdown(record)


def test_a_small_difference_is_called_that() -> None:
    events = [*whole_run(), event(131, "baseline", name="majority-class", **scored(0.49))]
    said = verdict.sentence(fold(events))
    assert "1.0 points ahead of majority class (may be chance)" in said


def test_lower_is_better_where_it_is() -> None:
    events = whole_run()
    for e in events:
        if e["event"] == "task":
            e |= {"metric": "perplexity", "higher_is_better": False, "share": False}
    assert "ahead of linear probe" in verdict.sentence(fold(events))


def test_labels_are_counted_as_the_confusion_table_says() -> None:
    each, table = verdict.labels(fold(full()))
    assert each.rows == [
        ["a", "200", "300", "50.0 %", "75.0 %", "60.0 %"],
        ["b", "200", "100", "50.0 %", "25.0 %", "33.3 %"],
    ]
    assert table.rows == [["a", "150", "50"], ["b", "150", "50"]]
    assert verdict.labels(fold(whole_run())) == []


def test_side_runs_count_as_bytes_and_as_nothing_else() -> None:
    rows = {s.title: s.rows for s in report.sheets(fold(whole_run()))}["Traffic"]
    found = {row[0]: row[1:] for row in rows}
    assert found["all"] == ["45.4 MB", "3.0 kB", "45.4 MB"]
    assert found["side run: undistilled"][0] == "1.00 GB"
    assert found["with side runs"][0] == "1.05 GB"


def test_clients_are_listed_with_their_rows_and_bytes() -> None:
    text = report.html(fold(full()))
    assert "Plot of training rows by client: 4 clients with 23 to 26 rows." in text
    assert "federation.partition = dirichlet" in text
    # A partition of other clients than those that came is not theirs.
    events = [e | {"names": ["x", "y"]} if e["event"] == "nodes" else e for e in full()]
    assert "federation.partition" not in report.html(fold(events))


def test_what_others_wrote_is_text() -> None:
    bad = "<script>alert(1)</script>"
    events = full()
    for e in events:
        if e["event"] == "task":
            e |= {"name": bad, "labels": [bad, "b"]}
        if e["event"] in ("reply", "bytes"):
            e["client"] = bad
        if e["event"] == "run_started":
            e["method"] = bad
    assert "<script" not in report.html(fold([*events, event(130, "warning", text=bad)]))


def test_equal_records_give_equal_pages() -> None:
    assert report.html(fold(full())) == report.html(fold(full()))


def test_no_path_of_this_machine_is_on_the_page() -> None:
    events = full()
    for e in events:
        if e["event"] == "task":
            e |= {"name": "/home/somebody/rows/train.csv"}
        if e["event"] == "model":
            e |= {"name": "/home/somebody/models/bert"}
        if e["event"] == "files":
            e["paths"] = {"adapter": "/home/somebody/run/adapter"}
    text = report.html(fold(events))
    assert "somebody" not in text and "rows/train.csv: report of a run" in text
