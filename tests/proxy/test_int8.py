"""A client's frozen base in 8 bits: exact where the package is, and kept in 8 bits throughout."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import LoraConfig
from fedpft_core.errors import ReplyError
from fedpft_core.model.families import family_of
from fedpft_core.proxy import int8, memory
from fedpft_core.proxy.build import build
from fedpft_core.proxy.int8 import Int8Linear
from fedpft_core.proxy.package import ClientModel, blank, make_package, rebuild
from fedpft_core.train.private import fine_tune_private
from fedpft_core.train.tune import LocalSettings, fine_tune
from fedpft_core.wire import rounding
from fedpft_core.wire.package import Package
from tests import tiny

SETTINGS = LocalSettings(1e-2, 8, 1, 3, 0.0, 1.0, 1)


def package_of(family: str, fmt: str, **keys: Any) -> Package:
    fm = tiny.model(family)
    plan = tiny.plan_for(fm, **keys)
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2, dropout=0.1))
    kind = tiny.task_of(family).name
    return make_package(
        build(fm, plan), plan, spec, tiny.processor(family), kind, tiny.LABELS, 16, fmt
    )


def in_int8(made: ClientModel) -> list[Int8Linear]:
    return [m for m in made.model.modules() if isinstance(m, Int8Linear)]


def trained(made: ClientModel, family: str) -> dict[str, Tensor]:
    start = adapters.initial(made.model, 1, made.plan)
    generator = torch.Generator().manual_seed(2)
    start = {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in start.items()}
    adapters.load(made.model, start, made.plan)
    fine_tune(made.model, made.task, tiny.encoded(family, 24), SETTINGS, 5)
    found = adapters.read(made.model, made.plan)
    assert not tiny.same_bits(found, start)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_of_an_int8_package_clients_train_the_same_to_the_bit(family: str) -> None:
    package = package_of(family, "int8")
    plain, small = rebuild(package), rebuild(package, "int8")
    layers = in_int8(small)
    assert not in_int8(plain)
    blocks = family_of(family).block_list(small.model.get_base_model())
    linears = [
        m for block in blocks for name, m in block.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name
    ]  # fmt: skip
    assert linears and set(map(id, linears)) == set(map(id, layers))
    assert not any(p.is_meta for p in small.model.parameters())
    batch = tiny.batch_of(family)
    with torch.no_grad():
        assert torch.equal(small.model(**batch).logits, plain.model(**batch).logits)
    assert tiny.same_bits(trained(small, family), trained(plain, family))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_that_write_keep_their_tied_table(family: str, tied: bool) -> None:
    fm = tiny.writer(family, tie_word_embeddings=tied)
    plan = tiny.plan_for(fm)
    spec = adapters.AdapterSpec(2, 4.0, 0.0, family_of(family).lora_targets(plan.present), ())
    package = make_package(
        build(fm, plan), plan, spec, tiny.writer_tokenizer(), "generate", (), 16, "int8"
    )
    plain, small = rebuild(package), rebuild(package, "int8")
    bare: Any = small.model.get_base_model()
    assert (bare.lm_head.weight is bare.get_input_embeddings().weight) == tied
    ids = torch.randint(5, len(tiny.vocabulary()), (2, 7))
    with torch.no_grad():
        found, wanted = (m.model(input_ids=ids).logits for m in (small, plain))
    assert in_int8(small) and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_layer_has_outputs_and_gradients_of_its_floats(
    dtype: torch.dtype, bias: bool, axis: int
) -> None:
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 20, generator=stream)
    weight = rounding.of_int8(*rounding.to_int8(weight, axis))
    b = torch.randn(33, generator=stream).to(dtype) if bias else None
    layer = Int8Linear(weight, b, dtype)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, weight.to(dtype))
    x = torch.randn(3, 5, 20, generator=stream).to(dtype)
    up = torch.randn(3, 5, 33, generator=stream).to(dtype)
    grads = []
    for forward in (layer, lambda x: nn.functional.linear(x, weight.to(dtype), b)):
        own = x.clone().requires_grad_()
        y = forward(own)
        y.backward(up)
        grads.append((y.detach(), own.grad))
    assert all(torch.equal(a, c) for a, c in zip(*grads, strict=True))


def test_what_eight_bits_do_not_hold_is_rounded_row_by_row() -> None:
    package = package_of("bert", "fp32")
    plain, small = rebuild(package), rebuild(package, "int8")
    for layer in in_int8(small):
        assert layer.get_buffer("q").dtype == torch.int8
    pairs = zip(plain.model.modules(), small.model.modules(), strict=True)
    errors = []
    for theirs, mine in pairs:
        if isinstance(mine, Int8Linear):
            w = theirs.get_parameter("weight")
            assert not torch.equal(mine.weight, w)
            errors.append(((mine.weight - w).abs() / w.abs().amax(1, keepdim=True)).max())
    assert max(errors) < 0.006  # half a step of 1 / 127, and the scale's bfloat16


@pytest.mark.parametrize("base", ["float", "int8"])
def test_nothing_of_a_float_weight_is_kept_for_the_backward_pass(base: str) -> None:
    made = rebuild(package_of("llama", "int8"), base)
    weights = {id(p) for p in made.model.parameters()}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    shapes = {tuple(m.weight.shape) for m in in_int8(rebuild(package_of("llama", "int8"), "int8"))}
    shapes |= {shape[::-1] for shape in shapes}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made.task.loss(made.model, tiny.batch_of("llama") | {"labels": torch.zeros(7).long()})
    frozen = [t for t in kept if tuple(t.shape) in shapes and id(t) not in weights]
    assert any(t.is_floating_point() for t in frozen) == (base == "float")


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_base_are_those_of_its_model(family: str, dtype: torch.dtype) -> None:
    package = package_of(family, "fp32")
    package = replace(package, weights={k: t.to(dtype) for k, t in package.weights.items()})
    found = []
    for base in int8.BASES:
        bare = rebuild(package, base).model
        held = [p for p in bare.parameters() if not p.requires_grad]
        head = [m for name, m in bare.named_modules() if name.endswith("original_module")]
        held = [p for p in held if not any(p is own for m in head for own in m.parameters())]
        scales = sum(m.get_buffer("scale").nbytes for m in in_int8(rebuild(package, base)))
        made = sum(p.nbytes for p in held) + scales
        made += sum(m.get_buffer("q").nbytes for m in in_int8(rebuild(package, base)))
        assert memory.base_bytes(package, base) == made - scales
        assert scales < 0.1 * made
        batch, step = 4, memory.step_bytes(package.meta, 4)
        copies = memory.BASE_BYTES + 2 * memory.weight_bytes(package) + step
        found.append(memory.training_bytes(package, batch, base=base) - copies)
    assert found[0] == memory.weight_bytes(package) > found[1]


def test_example_level_privacy_trains_the_same_to_the_bit() -> None:
    package = package_of("bert", "int8")
    found = []
    for base in int8.BASES:
        made = rebuild(package, base)
        adapters.load(made.model, adapters.initial(made.model, 1, made.plan), made.plan)
        source = random.Random(3).randbytes
        rows = tiny.encoded("bert", 12)
        fine_tune_private(made.model, made.task, rows, SETTINGS, 0, 1.0, 0.5, source)
        found.append(adapters.read(made.model, made.plan))
    assert tiny.same_bits(*found)


def test_layers_are_made_without_float_memory_in_this_thread_alone() -> None:
    made: list[nn.Linear] = []
    with int8.hollow():
        assert nn.Linear(3, 4).weight.is_meta and not nn.Embedding(3, 4).weight.is_meta
        thread = threading.Thread(target=lambda: made.append(nn.Linear(3, 4)))
        thread.start()
        thread.join()
        tied = nn.Linear(3, 4)
        table = nn.Embedding(4, 3)
        tied.weight = table.weight
        assert not tied.weight.is_meta
    assert not made[0].weight.is_meta and not nn.Linear(3, 4).weight.is_meta


def test_a_blank_model_is_held_so_too() -> None:
    made = blank(package_of("bert", "int8").meta, "int8")
    assert in_int8(made)
    trained(made, "bert")


def test_packages_that_do_not_fit_are_refused() -> None:
    package = package_of("bert", "int8")
    made = rebuild(package, "int8")
    bare: Any = made.model.get_base_model()
    name = next(n for n, m in bare.named_modules() if isinstance(m, Int8Linear))
    name = f"{name.replace('.base_layer', '')}.weight"
    less = {k: t for k, t in package.weights.items() if k != name}
    wrong = package.weights | {name: torch.zeros(2, 3)}
    for weights in (less, wrong, package.weights | {"more": torch.zeros(1)}):
        with pytest.raises(ReplyError, match="malformed"):
            rebuild(replace(package, weights=weights), "int8")


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    class Family:
        name = "odd"

        @staticmethod
        def block_list(model: nn.Module) -> list[nn.Module]:
            return [model]

    with pytest.raises(int8.NotHeldError, match=r"base = int8 .* odd model has none"):
        int8.put(nn.Sequential(nn.LayerNorm(3)), Family(), (), None)  # type: ignore[arg-type]
