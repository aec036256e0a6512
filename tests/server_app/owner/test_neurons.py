"""The ledger of neurons: several runs, budgets, damage, and runs that write at once."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fabricate
import pytest
import torch

from fedpft_core.errors import UserError
from server_app.owner.neurons import Ledger, count, known

FM = "ab" * 32
WIDTHS = [10, 7]


def masks(*chosen: list[int]) -> tuple[torch.Tensor, ...]:
    out = []
    for width, on in zip(WIDTHS, chosen, strict=True):
        mask = torch.zeros(width, dtype=torch.bool)
        mask[on] = True
        out.append(mask)
    return tuple(out)


NONE = masks([], [])


def test_runs_add_up_and_a_run_counts_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new", FM, WIDTHS)
    assert ledger.read().count == 0
    assert ledger.add(masks([1, 2], [0]), NONE, "/a").count == 0
    assert ledger.add(masks([1, 2], [0]), masks([2], []), "/a").count == 3
    assert ledger.add(masks([2, 9], [6]), NONE, "/b").count == 3
    state = Ledger(tmp_path / "new", FM, WIDTHS).read()
    assert [m.nonzero().flatten().tolist() for m in state.neurons] == [[1, 2, 9], [0, 6]]
    assert [m.nonzero().flatten().tolist() for m in state.copied] == [[2], []]
    assert [(e.run, e.neurons, e.copied) for e in state.runs] == [("/a", 3, 1), ("/b", 3, 0)]
    ((fm, again),) = known(tmp_path / "new")
    assert fm == FM and count(again.neurons) == 5
    assert known(tmp_path / "nowhere") == []


def test_a_budget_refuses_by_name_and_notes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, FM, WIDTHS)
    ledger.add(masks([0, 1, 2], []), NONE, "/a", budget=3 / 17)
    with pytest.raises(UserError, match=r"plan.disclosure-budget = 0.2: .* 23.5 % .* 17.6 %"):
        ledger.add(masks([0, 3], []), NONE, "/b", budget=0.2)
    assert ledger.read().count == 3
    ledger.add(masks([0, 1], []), NONE, "/b", budget=0.2)
    assert len(ledger.read().runs) == 2


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"fm": 1}', {"widths": [10, 8]}, {"neurons": ["00", "00"]},
     {"neurons": ["zz00", "00"]}, {"fm": "cd" * 32}, {"runs": [{"x": 1}]}],
)  # fmt: skip
def test_a_damaged_ledger_stops_the_run(tmp_path: Path, damage: object) -> None:
    ledger = Ledger(tmp_path, FM, WIDTHS)
    ledger.add(masks([1], [1]), NONE, "/a")
    raw = json.loads(ledger.path.read_text())
    text = damage if isinstance(damage, str) else json.dumps(raw | damage)  # type: ignore[operator]
    ledger.path.write_text(text)
    with pytest.raises(UserError, match="ledger of disclosed neurons is damaged"):
        ledger.add(masks([2], []), NONE, "/b")
    assert ledger.path.read_text() == text


def one(root: str, i: int) -> None:
    Ledger(Path(root), FM, WIDTHS).add(masks([i], []), NONE, f"/{i}")


def test_runs_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=fabricate.processes()) as pool:
        list(pool.map(one, [str(tmp_path)] * 10, range(10)))
    state = Ledger(tmp_path, FM, WIDTHS).read()
    assert state.neurons[0].all() and len(state.runs) == 10
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".new-")]


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"plan\.ledger"):
        Ledger(tmp_path / "file", FM, WIDTHS).add(masks([1], []), NONE, "/a")
