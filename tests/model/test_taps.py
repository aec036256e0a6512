"""What passes inside a model is seen as it is, may be replaced, and no hook stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedpft_core.model import taps


class Block(nn.Module):
    """Adds one; gives a tuple, as blocks of some families do."""

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return x + scale, "more"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Identity()
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        out, more = self.second(self.first(x)[0], 2.0)
        assert more == "more"
        self.ran += 1
        return self.head(out)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_and_inputs_are_those_of_the_pass() -> None:
    model, x = Model(), torch.zeros(2)
    parts = {"a": model.first, "b": model.second}
    with taps.keep(parts) as out, taps.keep(parts, inputs=True) as entered:
        model(x)
        assert {k: t.tolist() for k, t in out.items()} == {"a": [1, 1], "b": [3, 3]}
        assert {k: t.tolist() for k, t in entered.items()} == {"a": [0, 0], "b": [1, 1]}
        model(x + 1)
        assert out["b"].tolist() == [4, 4]
    assert hooks(model) == 0


@pytest.mark.parametrize(("inputs", "want"), [(False, 13), (True, 13)])
def test_what_is_returned_takes_the_place(inputs: bool, want: int) -> None:
    model = Model()

    def ten_more(key: str, value: Tensor) -> Tensor:
        return value + 10

    with taps.watch({"b": model.second}, ten_more, inputs):
        assert model(torch.zeros(1)).tolist() == [want]
    assert model(torch.zeros(1)).tolist() == [3]


def test_nothing_after_the_last_module_is_run() -> None:
    model = Model()
    found = taps.run_to(model, {"x": torch.zeros(1)}, {1: model.first, 2: model.second})
    assert {k: t.tolist() for k, t in found.items()} == {1: [1], 2: [3]}
    assert model.ran == 0 and hooks(model) == 0
    assert model(torch.zeros(1)).tolist() == [3]


def test_no_hook_outlives_an_error() -> None:
    model = Model()

    def fail(key: str, value: Tensor) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), taps.watch({"a": model.first}, fail):
        model(torch.zeros(1))
    assert hooks(model) == 0
