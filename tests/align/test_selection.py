"""Which neurons an alignment moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from fedpft_core import registry
from fedpft_core.align import selection
from fedpft_core.align.losses import output_error
from fedpft_core.align.selection import View, choose
from fedpft_core.model.device import Batch, to_device
from fedpft_core.model.families import FFN
from fedpft_core.model.plan import BlockPlan, Plan, pruned_ffns

families = pytest.mark.parametrize("family", tiny.BUILDS)


def test_the_highest_apoz_is_chosen_the_paper_way() -> None:
    rates = {1: torch.tensor([0.1, 0.9, 0.5, 0.7]), 2: torch.tensor([0.4, 0.3, 0.2, 0.1])}
    chosen = choose("apoz", View(rates), 0.5)
    assert {b: i.tolist() for b, i in chosen.items()} == {1: [1, 3], 2: [0, 1]}
    chosen = choose("active", View(rates), 0.5)
    assert {b: i.tolist() for b, i in chosen.items()} == {1: [0, 2], 2: [2, 3]}


@pytest.mark.parametrize("selection", ["apoz", "active", "random"])
@pytest.mark.parametrize(("share", "size"), [(1.0, 10), (0.5, 5), (0.3, 3), (0.8, 8), (0.01, 1)])
def test_sizes_and_order(selection: str, share: float, size: int) -> None:
    rates = {4: torch.rand(10, generator=torch.Generator().manual_seed(0)).double()}
    (index,) = choose(selection, View(rates, 1), share).values()
    assert index.dtype == torch.int64
    assert len(index) == len(set(index.tolist())) == size
    assert index.tolist() == sorted(index.tolist())


@pytest.mark.parametrize("selection", ["apoz", "active"])
def test_ties_keep_the_lower_position(selection: str) -> None:
    rates = {0: torch.full((1000,), 0.5).double()}
    (index,) = choose(selection, View(rates, 0), 0.01).values()
    assert index.tolist() == list(range(10))


def test_random_choice_is_a_function_of_seed_and_block() -> None:
    rates = {1: torch.zeros(50), 2: torch.zeros(50)}
    torch.manual_seed(0)
    first = choose("random", View(rates, 1), 0.5)
    torch.manual_seed(1)
    again = choose("random", View(rates, 1), 0.5)
    assert all(torch.equal(first[b], again[b]) for b in rates)
    assert not torch.equal(first[1], first[2])
    other = choose("random", View(rates, 2), 0.5)
    assert not torch.equal(first[1], other[1])


# --- discrepancy --------------------------------------------------------------------------


def _view(family: str) -> View:
    teacher, student, plan, _ = tiny.pair(family)
    teacher.double(), student.double()
    batches = [tiny.double(b) for b in tiny.public(family, 2)]
    return View({}, 0, teacher, student, plan, lambda: batches)


@families
def test_discrepancy_is_how_fast_the_error_falls_when_the_neuron_moves(family: str) -> None:
    """Against finite differences of the output error along the neuron's steepest direction."""
    view = _view(family)
    assert view.teacher and view.student and view.plan and view.public
    found = registry.load("selection", "discrepancy").scores(view)
    assert {b: len(s) for b, s in found.items()} == view.sizes()

    def error() -> float:
        per_block = output_error(view.teacher, view.student, view.plan, view.public())
        # `output_error` is the mean over batches, the score sums over them.
        return 2 * sum(per_block.values()) / len(per_block)

    step = 1e-6
    for block, ffn in pruned_ffns(view.student, view.plan).items():
        for j in (0, ffn.neurons - 1):
            square = 0.0
            for part, p in ffn.parts().items():
                axis = FFN.neuron_axis(part)
                if axis is None:
                    continue
                # A view of the neuron's numbers, one row or column, or its single bias.
                numbers = p.detach().narrow(axis, j, 1).squeeze()
                numbers = numbers[None] if numbers.dim() == 0 else numbers
                for i in range(len(numbers)):
                    value, sides = float(numbers[i]), []
                    for sign in (1, -1):
                        numbers[i] = value + sign * step
                        sides.append(error())
                    numbers[i] = value
                    square += ((sides[0] - sides[1]) / (2 * step)) ** 2
            assert float(found[block][j]) == pytest.approx(square**0.5, rel=1e-4)


def test_discrepancy_leaves_the_models_as_they_were() -> None:
    view = _view("bert")
    assert view.teacher and view.student
    models = (view.teacher, view.student)
    before = [{n: p.requires_grad for n, p in m.named_parameters()} for m in models]
    weights = tiny.weights(view.student)
    chosen = choose("discrepancy", view, 0.5)
    assert {b: len(i) for b, i in chosen.items()} == {1: 3, 2: 3}
    after = [{n: p.requires_grad for n, p in m.named_parameters()} for m in models]
    assert after == before
    assert tiny.same_bits(tiny.weights(view.student), weights)
    assert all(p.grad is None for p in view.student.parameters())


def test_discrepancy_is_zero_where_there_is_no_error() -> None:
    """Damage to one block's FFN gives its neurons scores; the blocks before it have none."""
    pruned = BlockPlan("pruned", tuple(range(24)))
    plan = Plan("bert", 24, (pruned,) * 3 + (BlockPlan("whole"),))
    teacher, student, _, _ = tiny.pair("bert", plan)
    with torch.no_grad():
        pruned_ffns(student, plan)[2].out.weight[:, 7] += 1.0
    batches = tiny.public("bert", 2)
    view = View({}, 0, teacher, student, plan, lambda: batches)
    found = registry.load("selection", "discrepancy").scores(view)
    assert float(found[2].min()) > 0
    damage = registry.load("selection", "discrepancy").scores(replace(view, student=teacher))
    assert all(float(s.max()) == 0 for s in damage.values())


def test_public_batches_are_taken_to_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    view = _view("bert")
    taken: list[tuple[int, torch.device]] = []

    def record(batch: Batch, device: torch.device) -> Batch:
        taken.append((id(batch), device))
        return to_device(batch, device)

    elsewhere = torch.device("cpu", 0)  # such that the models' is told from any other
    monkeypatch.setattr(
        selection, "device_of", lambda model: {id(view.student): elsewhere}[id(model)]
    )
    monkeypatch.setattr(selection, "to_device", record)
    registry.load("selection", "discrepancy").scores(view)
    assert view.public
    assert taken == [(id(batch), elsewhere) for batch in view.public()]


def test_scores_may_be_on_any_device() -> None:
    """Positions index tensors of either device, which only those on the CPU can."""

    class Elsewhere(torch.Tensor):
        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            brought.append(self)
            return self.as_subclass(torch.Tensor)

    brought: list[torch.Tensor] = []
    score = torch.tensor([0.1, 0.9, 0.5]).as_subclass(Elsewhere)
    (index,) = choose("apoz", View({1: score}), 0.5).values()
    assert len(brought) == 1 and type(index) is torch.Tensor and index.tolist() == [1, 2]


def test_only_selections_that_look_at_counts_ask_for_them() -> None:
    asks = {n: selection.needs_counts(n, 0.5) for n in registry.names("selection")}
    assert asks == {"apoz": True, "active": True, "random": False, "discrepancy": False}
    assert not any(selection.needs_counts(n, 1.0) for n in asks)


def test_all_neurons_move_without_being_counted() -> None:
    plan = tiny.plan_for(tiny.model("bert"))
    sizes = {b: len(plan.blocks[b].kept) for b in plan.pruned}
    chosen = selection.choose("apoz", View({}, 0, plan=plan), 1.0)
    assert {b: i.tolist() for b, i in chosen.items()} == {b: [*range(k)] for b, k in sizes.items()}
