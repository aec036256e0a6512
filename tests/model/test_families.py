"""One table knows every family: FFN views, activation sites, LoRA targets, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracles
import pytest
import tiny
import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import LoraConfig
from fedpft_core.errors import UserError
from fedpft_core.head.refit import last_linear
from fedpft_core.model.families import (
    FAMILIES,
    FFN,
    Shape,
    family_of,
    family_of_config,
    family_of_model,
)
from fedpft_core.model.taps import keep, watch
from fedpft_core.task.classify import logits

families = pytest.mark.parametrize("family", tiny.FAMILIES)
SUFFIXES = ("output.dense",)  # of BERT's attention output as of its FFN's
# Families with a norm behind query and key, or behind what leaves attention.
NORMED = {"qk": ("qwen3",), "vo": ("gemma2",)}
text_families = pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)


@families
def test_a_model_is_of_the_family_that_its_config_names(family: str) -> None:
    assert family_of_model(tiny.model(family)) is FAMILIES[family]


@families
def test_an_unsupported_family_names_the_supported_ones(family: str) -> None:
    with pytest.raises(UserError, match="'t5'.* " + FAMILIES[family].model_type + "[,.]"):
        family_of("t5")


def test_a_config_that_no_variant_fits_names_the_field() -> None:
    config = tiny.hf_config("opt").to_dict() | {"do_layer_norm_before": None}
    with pytest.raises(UserError, match=r"opt models .*do_layer_norm_before = True or do_layer"):
        family_of_config(config)


@families
def test_one_row_fits_a_config(family: str) -> None:
    config = tiny.hf_config(family)
    for form in (config, config.to_dict()):
        assert [name for name, row in FAMILIES.items() if row.fits(form)] == [family]
        assert family_of_config(form) is FAMILIES[family]


@families
def test_blocks_are_found_bare_and_wrapped(family: str) -> None:
    fm, _, _, _ = tiny.pair(family)
    row = family_of(family)
    assert len(row.block_list(tiny.model(family))) == len(row.block_list(fm)) == 4


@families
def test_ffn_is_two_linears_around_the_activation(family: str) -> None:
    """Running the named parts by hand gives what the block's own FFN computes."""
    model = tiny.model(family)
    for ffn in family_of(family).ffns(model):
        seen: dict[str, Any] = {}
        handles = [
            ffn.ins[0].register_forward_hook(
                lambda _m, i, o, seen=seen: seen.update(x=i[0], pre=o)
            ),
            ffn.activation.register_forward_hook(
                lambda _m, i, o, seen=seen: seen.update(act_in=i[0], act=o)
            ),
            ffn.out.register_forward_hook(
                lambda _m, i, o, seen=seen: seen.update(out_in=i[0], y=o)
            ),
        ]
        with torch.no_grad():
            logits(model, tiny.batch_of(family))
        for handle in handles:
            handle.remove()
        assert torch.equal(seen["act_in"], seen["pre"])
        if len(ffn.ins) == 1:
            assert torch.equal(
                seen["out_in"].reshape(-1, ffn.neurons), seen["act"].reshape(-1, ffn.neurons)
            )
        with torch.no_grad():
            torch.testing.assert_close(ffn.inner(seen["x"]), seen["out_in"])
            torch.testing.assert_close(ffn(seen["x"]), seen["y"])
        assert seen["act"].shape[-1] == ffn.neurons == tiny.neurons(family)
        assert seen["x"].shape[-1] == seen["y"].shape[-1] == 16


@families
def test_only_post_norm_families_have_a_norm_in_the_ffn_output(family: str) -> None:
    for ffn in family_of(family).ffns(tiny.model(family)):
        assert (ffn.norm is not None) == bool(family_of(family).output_norm)
        if ffn.norm is not None:
            assert isinstance(ffn.norm, torch.nn.LayerNorm)


@families
def test_parts_are_the_ffn_and_nothing_else(family: str) -> None:
    model = tiny.model(family)
    row = family_of(family)
    for ffn, block in zip(row.ffns(model), row.block_list(model), strict=True):
        expected = [*(f"in{i}" for i in range(len(row.ffn_in))), "out"]
        leaves = ["weight", "bias"] if ffn.out.bias is not None else ["weight"]
        if row.output_norm:
            expected += ["norm"]
        assert list(ffn.parts()) == [f"{part}.{leaf}" for part in expected for leaf in leaves]
        named = {id(p): n for n, p in block.named_parameters()}
        names = [named[id(p)] for p in ffn.parts().values()]
        assert not any("attention" in n for n in names)
        # What is left of the block is attention and norms.
        left = [n for n in named.values() if n not in names]
        beside = ("attn", "attention", "norm", "layer_scale", "ln_")
        assert all(any(word in n.lower() for word in beside) for n in left)


@families
def test_write_is_the_inverse_of_read(family: str) -> None:
    ffn = family_of(family).ffns(tiny.model(family))[1]
    before = {k: p.detach().clone() for k, p in ffn.parts().items()}
    index = torch.tensor([2, 5, 23])
    held = ffn.read(index)
    for part, value in held.items():
        axis = FFN.neuron_axis(part)
        whole = before[part]
        if axis is None:
            assert torch.equal(value, whole)
            continue
        for place, neuron in enumerate(index.tolist()):
            assert torch.equal(value.select(axis, place), whole.select(axis, neuron))
    with torch.no_grad():
        for p in ffn.parts().values():
            p.add_(1.0)
    ffn.write(index, held)
    others = torch.tensor([j for j in range(ffn.neurons) if j not in (2, 5, 23)])
    for part, p in ffn.parts().items():
        axis = FFN.neuron_axis(part)
        if axis is None:
            assert torch.equal(p, before[part])
            continue
        assert torch.equal(p.index_select(axis, index), before[part].index_select(axis, index))
        shifted = before[part].index_select(axis, others) + 1.0
        assert torch.equal(p.index_select(axis, others), shifted)


@families
def test_write_refuses_what_does_not_fit(family: str) -> None:
    ffn = family_of(family).ffns(tiny.model(family))[0]
    held = ffn.read(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected parts"):
        ffn.write(torch.tensor([0, 1]), {k: v for k, v in held.items() if k != "out.weight"})
    with pytest.raises(ValueError, match="shape"):
        ffn.write(torch.tensor([0, 1, 2]), held)


@families
def test_lora_targets_are_full_paths_of_attention_linears(family: str) -> None:
    model = tiny.model(family)
    row = family_of(family)
    targets = row.lora_targets(range(4))
    assert len(targets) == len(set(targets)) == 4 * 4
    for target in targets:
        module = model.get_submodule(target)
        assert isinstance(module, torch.nn.Linear)
        grouped = target.endswith(row.attention[1:3]) and row.names.kv_heads
        assert tuple(module.weight.shape) == (8 if grouped else 16, 16)
        assert "attn." in target or ".attention." in target


# --- query, key, value and output are what the table calls them ----------------------------


def exact(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float64 model whose attention decides, and rows of uneven length."""
    return tiny.model(family).double(), tiny.double(tiny.batch_of(family))


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


@torch.no_grad()
def scaled(model: nn.Module, family: str, **factors: float) -> None:
    """Scale what the projections of every block give; of `o` only what it makes of its input."""
    for block in family_of(family).block_list(model):
        for name, path in zip("qkvo", family_of(family).attention, strict=True):
            for part, p in block.get_submodule(path).named_parameters():
                if name != "o" or part != "bias":
                    p.mul_(factors.get(name, 1.0))


@families
def test_scales_that_cancel_between_projections_change_nothing(family: str) -> None:
    """Scores are products of query and key; what leaves attention is linear in value and output."""
    model, batch = exact(family)
    before = outputs(model, batch)
    pairs: list[dict[str, float]] = [{"q": 2.0, "k": 0.5}, {"v": 2.0, "o": 0.5}]
    for factors in pairs[1:] if family in NORMED["qk"] else pairs:
        scaled(model, family, **factors)
        torch.testing.assert_close(outputs(model, batch), before, rtol=1e-12, atol=1e-12)


@families
@pytest.mark.parametrize("name", "qkvo")
def test_one_projection_scaled_alone_changes_the_output(family: str, name: str) -> None:
    model, batch = exact(family)
    before = outputs(model, batch)
    scaled(model, family, **{name: 2.0})
    if family in NORMED["qk" if name in "qk" else "vo"]:
        torch.testing.assert_close(outputs(model, batch), before, rtol=0.05, atol=0.05)
        return  # a norm behind it takes the scale off again, but for its epsilon
    assert float((outputs(model, batch) - before).abs().max()) > 1e-3


def rotated(x_Ld: Tensor, theta: float) -> Tensor:
    """Each pair (x_i, x_{i+d/2}) of position t turned by the angle t theta^(-2i/d)."""
    length, d = x_Ld.shape
    out = x_Ld.clone()
    for i in range(d // 2):
        # The library takes the angles in float32.
        rate = 1.0 / (theta ** (torch.tensor(2 * i, dtype=torch.float32) / d))
        angle = torch.arange(length, dtype=torch.float32) * rate
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x_Ld[:, i], x_Ld[:, i + d // 2]
        out[:, i], out[:, i + d // 2] = a * cos - b * sin, b * cos + a * sin
    return out


@dataclass(frozen=True)
class Attention:
    """What a family's attention does beside softmax(q k' / sqrt(d)) v."""

    shape: Shape
    real: Tensor  # bool [B, L]
    scale: float
    theta: float | None = None  # of rotary positions
    causal: bool = False
    window: int | None = None  # positions at most so far apart, minus one
    cap: float | None = None  # scores s become cap tanh(s / cap)
    norms: tuple[Any, Any] | None = None  # of each head's query and key

    @staticmethod
    def of(family: str, model: Any, index: int, real: Tensor) -> Attention:
        row, config = family_of(family), model.config
        shape = row.shape(config)
        block = row.block_list(model)[index]
        whole = block.get_submodule(row.attention[3].partition(".")[0])
        theta: Any = getattr(config, "rope_parameters", None)
        if theta:
            kinds = getattr(config, "layer_types", None)
            theta = (theta if "rope_theta" in theta else theta[kinds[index]])["rope_theta"]
        norms = (whole.q_norm, whole.k_norm) if hasattr(whole, "q_norm") else None
        window = getattr(whole, "sliding_window", getattr(config, "sliding_window", None))
        scale = getattr(config, "query_pre_attn_scalar", shape.head_dim) ** -0.5
        relative = len(getattr(config, "pos_att_type", None) or ())
        if relative:  # DeBERTa's relative parts share the scale, which it takes in float32
            scale = 1 / float(torch.tensor(shape.head_dim * (1.0 + relative)).sqrt())
        cap = getattr(config, "attn_logit_softcapping", None)
        return Attention(
            shape, real, scale, theta or None, row.causal, window, cap, norms
        )  # fmt: skip

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shares times values of each row and head, [B, L, heads * d]; no share to padding."""
        d, shape, rows = self.shape.head_dim, self.shape, []
        for row, real in enumerate(self.real):
            of_heads = []
            for h in range(shape.heads):
                own = slice(h * d, (h + 1) * d)
                group = h * shape.kv_heads // shape.heads
                shared = slice(group * d, (group + 1) * d)
                query, key = q[row, :, own], k[row, :, shared]
                if self.norms:
                    query, key = self.norms[0](query), self.norms[1](key)
                if self.theta:
                    query, key = rotated(query, self.theta), rotated(key, self.theta)
                scores = query @ key.T * self.scale
                if self.cap:
                    scores = self.cap * torch.tanh(scores / self.cap)
                away = torch.arange(len(real))[:, None] - torch.arange(len(real))
                hidden = ~real.expand(len(real), -1)
                if self.causal:
                    hidden = hidden | (away < 0)
                if self.window:
                    hidden = hidden | (away.abs() >= self.window)
                shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                of_heads.append(shares @ v[row, :, shared])
            rows.append(torch.cat(of_heads, -1))
        return torch.stack(rows)


class Once:
    """What projections give the first time they run; DeBERTa's run again on relative positions."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.seen = modules, dict[str, Tensor]()

    def __enter__(self) -> dict[str, Tensor]:
        def hold(name: str, out: Tensor) -> None:
            self.seen.setdefault(name, out)

        self.watching = watch(dict(zip("qkv", self.modules, strict=True)), hold)
        self.watching.__enter__()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.watching.__exit__(None, None, None)


@families
def test_attention_by_hand_from_the_named_projections_is_what_the_output_projection_reads(
    family: str,
) -> None:
    """It tells a query from a key: exchanged, each row of shares would be over the wrong axis."""
    model, batch = exact(family)
    row = family_of(family)
    for i, block in enumerate(row.block_list(model)):
        q, k, v, o = (block.get_submodule(path) for path in row.attention)
        if hasattr(model, "deberta"):  # its relative part has projections of zeros, no bias: none
            with torch.no_grad():
                model.deberta.encoder.rel_embeddings.weight.zero_()
                model.deberta.encoder.LayerNorm.bias.zero_()
                q.bias.zero_(), k.bias.zero_()
        with Once(q, k, v) as gives, keep({"o": o}, inputs=True) as reads:
            outputs(model, batch)
        seen = gives | reads
        real = batch.get("attention_mask", torch.ones(seen["q"].shape[:2])).bool()
        attention = Attention.of(family, model, i, real)
        found = attention.by_hand(seen["q"], seen["k"], seen["v"])
        torch.testing.assert_close(found[real], seen["o"][real], rtol=1e-9, atol=1e-11)
        # The check can fail: other orders of the first three are noticed.
        for order in ("kqv", "vkq", "qvk"):
            same = {seen[name].shape for name in (order[1], "k")}
            if len(same) > 1 or seen[order[0]].shape != seen["q"].shape:
                continue  # grouped-query attention: other orders do not even fit
            wrong = attention.by_hand(*(seen[name] for name in order))
            assert float((wrong - seen["o"])[real].abs().max()) > 1e-3, order


# --- the head -----------------------------------------------------------------------------


@families
def test_the_last_linear_layer_of_the_head_gives_the_class_scores(family: str) -> None:
    model, batch = tiny.model(family), tiny.batch_of(family)
    with keep({"last": last_linear(model)}) as seen:
        scores = outputs(model, batch)
    last = seen["last"]
    if last.dim() == 3:  # at every position, of which the library takes one
        last = oracles.head_reads(last, batch, family_of(family).summary)
    assert torch.equal(last, scores)


@families
def test_modules_of_the_head_are_named_in_the_order_they_run(family: str) -> None:
    model = tiny.model(family)
    ran: list[str] = []
    for path in family_of(family).head:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _m, _i, _o, path=path: ran.append(path))
    outputs(model, tiny.batch_of(family))
    assert tuple(ran) == family_of(family).head


def test_a_head_in_the_wrong_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = FAMILIES["distilbert"]
    assert len(row.head) == 2
    monkeypatch.setitem(FAMILIES, "distilbert", replace(row, head=row.head[::-1]))
    for check in (
        test_the_last_linear_layer_of_the_head_gives_the_class_scores,
        test_modules_of_the_head_are_named_in_the_order_they_run,
    ):
        with pytest.raises(AssertionError):
            check("distilbert")


@families
def test_lora_touches_no_ffn_module(family: str) -> None:
    fm, proxy, plan, spec = tiny.pair(family)
    assert spec.targets
    for model in (fm, proxy):
        wrapped = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert len(wrapped) == 16
        for ffn in family_of(family).ffns(model):
            inside = [*ffn.ins, ffn.out]
            assert all(type(m) is torch.nn.Linear for m in inside)
    names = adapters.parameters(proxy, plan)
    row = family_of(family)
    for path in (*row.ffn_in, row.ffn_out):
        assert not any(f".{i}.{path}." in n for n in names for i in range(4))


@pytest.mark.parametrize("family", [f for f, row in FAMILIES.items() if row.ffn_out in SUFFIXES])
def test_suffix_targets_would_have_hit_the_ffn(family: str) -> None:
    """What full paths protect from: PEFT matches a list by suffix."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    wrapped = get_peft_model(tiny.model(family), PeftConfig(target_modules=list(SUFFIXES)))
    assert any(hasattr(f.out, "lora_A") for f in _loose(wrapped, family))


def _loose(model: torch.nn.Module, family: str) -> list[Any]:
    class Loose(FFN):
        def _linear(self, path: str) -> Any:
            return self.block.get_submodule(path)

    row = family_of(family)
    return [Loose(row, block) for block in row.block_list(model)]


@text_families
def test_longest_input_is_what_the_model_can_read(family: str) -> None:
    model = tiny.model(family)
    limit = family_of(family).shape(model.config).positions
    ids = torch.full((1, limit), 7)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if not any(n.endswith(("position_embeddings", "wpe", "embed_positions"))
                   for n, _ in model.named_modules()):  # fmt: skip
            return  # rotations and relative positions have no end
        longer = torch.full((1, limit + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer, attention_mask=torch.ones_like(longer))


@families
def test_every_family_can_carry_an_adapter(family: str) -> None:
    plan = tiny.plan_for(tiny.model(family))
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig())
    assert spec.modules == family_of(family).head
