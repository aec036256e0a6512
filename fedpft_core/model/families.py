"""Model families: the only place that knows how a Hugging Face model names its parts.

Adding a family is one row of `FAMILIES`, or two where a field of the config decides what a model is
made of. Everything else reaches a model through `Family` (which modules), `Shape` (which sizes) and
`FFN` (one block's neurons).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedpft_core import registry
from fedpft_core.errors import UserError
from fedpft_core.model.family import Family, base_model
from fedpft_core.model.ffn import FFN
from fedpft_core.model.fused import Fused
from fedpft_core.model.shape import ConfigNames, Shape, value_of


def _bert_like(
    model_type: str,
    prefix: str = "",
    query_key_value: tuple[str, str, str] = ("query", "key", "value"),
    after_padding: bool = False,
) -> Family:
    return Family(
        model_type=model_type,
        kind="text",
        blocks=f"{prefix or model_type}.encoder.layer",
        ffn_in=("intermediate.dense",),
        activation="intermediate.intermediate_act_fn",
        ffn_out="output.dense",
        output_norm="output.LayerNorm",
        attention=(
            *(f"attention.self.{name}" for name in query_key_value),
            "attention.output.dense",
        ),
        head=("classifier",),
        after_padding=after_padding,
    )


def _distilbert() -> Family:
    return Family(
        model_type="distilbert",
        kind="text",
        blocks="distilbert.transformer.layer",
        ffn_in=("ffn.lin1",),
        activation="ffn.activation",
        ffn_out="ffn.lin2",
        output_norm="output_layer_norm",
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        head=("pre_classifier", "classifier"),
        names=ConfigNames(hidden="dim", ffn="hidden_dim", blocks="n_layers", heads="n_heads"),
    )


def _modernbert(pooling: str, **more: Any) -> Family:
    return Family(
        model_type="modernbert",
        kind="text",
        blocks="model.layers",
        ffn_in=("mlp.Wi.gate", "mlp.Wi.up"),
        activation="mlp.act",
        ffn_out="mlp.Wo",
        output_norm="",
        attention=("attn.Wqkv.q", "attn.Wqkv.k", "attn.Wqkv.v", "attn.Wo"),
        head=("classifier",),
        when=(("classifier_pooling", pooling),),
        fused=(Fused("mlp.Wi", ("gate", "up")), Fused("attn.Wqkv", ("q", "k", "v"))),
        **more,
    )


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _vit_like(model_type: str, special_tokens: int, **more: Any) -> Family:
    parts: dict[str, Any] = {
        "blocks": f"{model_type}.layers",
        "ffn_in": ("mlp.fc1",),
        "activation": "mlp.activation_fn",
        "ffn_out": "mlp.fc2",
    }
    return Family(
        model_type=model_type,
        kind="image",
        output_norm="",
        attention=tuple(f"attention.{name}" for name in _PROJECTIONS),
        head=("classifier",),
        special_tokens=special_tokens,
        **parts | more,
    )


_GATED: dict[str, Any] = {
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "activation": "mlp.act_fn",
    "ffn_out": "mlp.down_proj",
}


def _dinov2(swiglu: bool, **more: Any) -> Family:
    return _vit_like(
        "dinov2",
        special_tokens=1,
        blocks="dinov2.encoder.layer",
        when=(("use_swiglu_ffn", swiglu),),
        after_ffn="layer_scale2",
        summary="every",  # the first position beside the mean of all others
        names=ConfigNames(ffn_ratio="mlp_ratio"),
        **more,
    )


def _llama_like(model_type: str, **more: Any) -> Family:
    return Family(
        model_type=model_type,
        kind="text",
        blocks="model.layers",
        output_norm="",
        attention=tuple(f"self_attn.{name}" for name in _PROJECTIONS),
        head=("score",),
        causal=True,
        summary="last",
        names=ConfigNames(kv_heads="num_key_value_heads", head_dim="head_dim"),
        **_GATED,
        **more,
    )


def _gpt2() -> Family:
    return Family(
        model_type="gpt2",
        kind="text",
        blocks="transformer.h",
        ffn_in=("mlp.c_fc",),
        activation="mlp.act",
        ffn_out="mlp.c_proj",
        output_norm="",
        attention=("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj"),
        head=("score",),
        tokens_head="classifier",
        fused=(Fused("attn.c_attn", ("q", "k", "v")),),
        causal=True,
        summary="last",
        names=ConfigNames(
            hidden="n_embd", ffn="n_inner", ffn_default=4, blocks="n_layer", heads="n_head",
            positions="n_positions",
        ),
    )  # fmt: skip


def _opt(norm_first: bool, **more: Any) -> Family:
    return Family(
        model_type="opt",
        kind="text",
        blocks="model.decoder.layers",
        ffn_in=("fc1",),
        activation="activation_fn",
        ffn_out="fc2",
        output_norm="" if norm_first else "final_layer_norm",
        attention=tuple(f"self_attn.{name}" for name in (*_PROJECTIONS[:3], "out_proj")),
        head=("score",),
        when=(("do_layer_norm_before", norm_first),),
        causal=True,
        packs=False,
        summary="last",
        names=ConfigNames(ffn="ffn_dim"),
        **more,
    )


def _text_to_image() -> Family:
    return Family(
        model_type="text-to-image",
        kind="captioned image",
        blocks="all_blocks",
        ffn_in=("ff.net.0.proj.gate", "ff.net.0.proj.value"),
        activation="ff.net.0.act",
        ffn_out="ff.net.2",
        output_norm="",
        attention=tuple(
            f"{attention}.{name}"
            for attention in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        head=(),
        fused=(Fused("ff.net.0.proj", ("value", "gate")),),
        drops=False,
        summary="every",
        names=ConfigNames(head_dim="head_dim"),
    )


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        _bert_like("bert"),
        _bert_like("roberta", after_padding=True),
        _distilbert(),
        _bert_like("electra"),
        _vit_like("vit", special_tokens=1),
        _vit_like("deit", special_tokens=2),
        _bert_like("xlm-roberta", prefix="roberta", after_padding=True),
        _bert_like(
            "deberta-v2",
            prefix="deberta",
            query_key_value=("query_proj", "key_proj", "value_proj"),
        ),
        _modernbert("cls"),
        _modernbert("mean", variant="mean", summary="every"),
        _dinov2(swiglu=False),
        _dinov2(swiglu=True, variant="swiglu", **_GATED),
        _gpt2(),
        _opt(norm_first=True),
        _opt(norm_first=False, variant="post-norm"),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma2", after_ffn="post_feedforward_layernorm"),
        _text_to_image(),
    )
}
"""Every family by its name. One that a config does not tell from another is not in it."""


def supported(kind: str | None = None, causal: bool = False) -> str:
    """The Hugging Face model types there is a family for, for messages.

    Args:
        kind: `text`, `image` or `captioned image`; None for all.
        causal: whether only decoders are wanted.

    Returns:
        Their names, separated by commas.
    """
    rows = (
        f.model_type
        for f in (*FAMILIES.values(), *_added()[0])
        if kind in (None, f.kind) and f.causal >= causal
    )
    return ", ".join(dict.fromkeys(rows))


def family_of(name: str) -> Family:
    """Look a family up by its name.

    Args:
        name: what a plan calls it.

    Returns:
        The family's row of `FAMILIES`.

    Raises:
        UserError: there is no such row; names those there are.
    """
    found = known(name)
    if found is None:
        raise UserError(_unsupported(name))
    return found


def known(name: str) -> Family | None:
    """As `family_of`, where it is no fault that there is no such family.

    Args:
        name: what a plan calls it.

    Returns:
        The row of `FAMILIES`, or else a plugin's family; None where there is neither.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    return next((f for f in _added()[0] if f.name == name), None)


def _added() -> tuple[list[Family], list[str]]:
    """The families of plugins, and in a sentence each what is wrong with those that have none."""
    found, faults = [], []
    for name in registry.names("family"):
        try:
            family = registry.held("family", name)
            if not isinstance(family, Family):
                raise UserError(f"the plugin {name} has a FAMILY that is no Family.")
            found.append(family)
        except UserError as error:
            faults.append(str(error))
    return found, faults


def _unsupported(name: object) -> str:
    # One that cannot be imported may be the one that is missed.
    faults = "".join(f" {fault[0].upper()}{fault[1:]}" for fault in _added()[1])
    return f"model.name: model type {name!r} is not supported; supported are {supported()}.{faults}"


def family_of_config(config: Any) -> Family:
    """The family of the models that a config describes.

    Args:
        config: a Hugging Face config, or the dictionary one is saved as.

    Returns:
        The row of `FAMILIES` that fits it, or else a plugin's family.

    Raises:
        UserError: there is none; names the model types there are, or the fields that must be other.
    """
    model_type = value_of(config, "model_type")
    rows = [f for f in FAMILIES.values() if f.model_type == model_type]
    rows = rows or [f for f in _added()[0] if f.model_type == model_type]
    if not rows:
        raise UserError(_unsupported(model_type))
    for row in rows:
        if row.fits(config):
            return row
    known = " or ".join(
        ", ".join(f"{name} = {value!r}" for name, value in row.when) for row in rows
    )
    raise UserError(f"model.name: of {model_type} models those with {known} are supported.")


def family_of_model(model: nn.Module) -> Family:
    """The family of a task model.

    Args:
        model: FM or proxy, bare or wrapped by PEFT.

    Returns:
        The family that its config names.

    Raises:
        UserError: the family is not supported.
    """
    config: Any = base_model(model).config
    return family_of_config(config)


__all__ = [
    "FAMILIES", "FFN", "Family", "Shape", "base_model", "family_of", "family_of_config",
    "family_of_model", "known", "supported",
]  # fmt: skip
