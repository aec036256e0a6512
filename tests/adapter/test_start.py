"""Where LoRA's A starts: orthonormal rows, and the directions of a layer's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.start import by_inputs, orthonormal
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.families import base_model
from fedpft_core.tensors import Tensors

FAMILY = "bert"
PATH = "bert.encoder.layer.1.attention.output.dense"


def attached() -> tuple[Any, Tensors]:
    fm, _, _, _ = tiny.pair(FAMILY)
    start = adapters.initial(fm, 3)
    adapters.load(fm, start)
    return fm, start


def is_orthonormal(rows: Tensor) -> bool:
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def of_a(tensors: Tensors) -> Tensors:
    return {k: t for k, t in tensors.items() if k.endswith("lora_A.weight")}


def test_orthonormal_rows_follow_from_seed_and_name() -> None:
    _, start = attached()
    one, again, other = orthonormal(start, 1), orthonormal(start, 1), orthonormal(start, 2)
    assert all(is_orthonormal(t) for t in of_a(one).values())
    assert tiny.same_bits(one, again)
    assert all(not torch.equal(t, other[k]) for k, t in of_a(one).items())
    a, b = list(of_a(one).values())[:2]
    assert not torch.equal(a, b)
    assert all(torch.equal(t, start[k]) for k, t in one.items() if k not in of_a(one))


def test_the_rows_are_the_inputs_leading_directions() -> None:
    fm, start = attached()
    batches = tiny.public(FAMILY, 3)
    made = by_inputs(start, fm, batches)
    assert all(torch.equal(t, start[k]) for k, t in made.items() if k not in of_a(made))
    seen: list[np.ndarray] = []
    layer = base_model(fm).get_submodule(PATH)
    handle = layer.register_forward_pre_hook(
        lambda _m, args: seen.extend(args[0][batch["attention_mask"].bool()].detach().numpy())
    )
    with torch.no_grad():
        for batch in batches:
            fm(**inputs_of(batch))
    handle.remove()
    x = np.array(seen, np.float64)
    directions = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    rows = made[f"{PATH}.lora_A.weight"].numpy()
    for row, direction in zip(rows, directions, strict=False):
        assert abs(row @ direction) == pytest.approx(1.0, abs=1e-4)
        assert row[np.abs(row).argmax()] > 0
    assert is_orthonormal(torch.from_numpy(rows))


@pytest.mark.parametrize("start", ["orthonormal", "inputs"])
def test_a_run_starts_there(start: str, tmp_path: Path) -> None:
    flat = tiny.write_task(FAMILY, tmp_path) | {
        "federation.rounds": 1,
        "train.lr": 1e-9,
        "wire.adapter": "fp32",
        "distill.steps": 1,
        "plug.method": "as-trained",
        "lora.start": start,
    }
    tiny.run(flat, tmp_path / "run")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    rows = {k: t for k, t in saved.items() if k.endswith("lora_A.weight")}
    assert rows
    assert all(is_orthonormal(t) for t in rows.values())
