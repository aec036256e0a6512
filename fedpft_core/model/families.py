"""Model families: the only place that knows how a Hugging Face model names its parts.

Adding a family is one row of `FAMILIES`. Everything else reaches a model through `Family`
(which modules), `Shape` (which sizes) and `FFN` (one block's neurons).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position
from fedpft_core.model.ffn import FFN
from fedpft_core.model.shape import ConfigNames, Shape, optional_size, sides, size


@dataclass(frozen=True)
class Family:
    """Where one `model_type` keeps its blocks, FFNs, LoRA targets, head and sizes.

    Paths with a leading block are relative to the block, the others to the task model.
    The order of a tuple counts: LoRA's targets are told apart by it, and the last linear layer of
    the last module of `head` is the one that gives the class scores, which plug-in refits.
    `ffn_in` lists the projections into the FFN (one, or gate then up for gated FFNs);
    `output_norm` is the LayerNorm after the FFN output of post-norm families, else empty.
    """

    model_type: str
    kind: str  # "text" or "image"
    blocks: str
    ffn_in: tuple[str, ...]
    activation: str
    ffn_out: str
    output_norm: str
    attention: tuple[str, ...]  # LoRA targets: q, k, v, attention output, in this order
    head: tuple[str, ...]  # modules of the library's classification head, as they run
    causal: bool = False  # a decoder: each position reads those before it alone
    after_padding: bool = False  # positions count from pad_token_id + 1 (RoBERTa)
    summary: Position = "first"  # the position that this head reads
    special_tokens: int = 0  # positions of an image that are no patch
    names: ConfigNames = field(default_factory=ConfigNames)

    def shape(self, config: Any) -> Shape:
        """The sizes that a config states; nothing else reads them from a config.

        Args:
            config: a Hugging Face config of this family, or the dictionary one is saved as.

        Returns:
            The sizes; `positions` without those that padding takes (RoBERTa).

        Raises:
            ValueError: a size is missing or is no positive whole number.
        """
        n = self.names
        hidden, heads = size(config, n.hidden), size(config, n.heads)
        head_dim = optional_size(config, n.head_dim) or hidden // heads
        body = Shape(
            hidden=hidden,
            ffn=size(config, n.ffn),
            blocks=size(config, n.blocks),
            heads=heads,
            kv_heads=optional_size(config, n.kv_heads) or heads,
            head_dim=head_dim,
        )
        if self.kind == "text":
            unused = size(config, "pad_token_id", least=0) + 1 if self.after_padding else 0
            positions = size(config, n.positions) - unused
            return replace(body, vocabulary=size(config, n.vocabulary), positions=positions)
        height, width = sides(config, "image_size")
        down, across = sides(config, "patch_size")
        patches = (height // down) * (width // across)
        return replace(
            body,
            channels=size(config, "num_channels"),
            height=height,
            width=width,
            image_tokens=patches + self.special_tokens,
        )

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of a task model.

        Args:
            model: FM or proxy of this family, bare or wrapped by PEFT.

        Returns:
            The model's own list of blocks, not a copy.
        """
        blocks = base_model(model).get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def ffns(self, model: nn.Module) -> list[FFN]:
        """Views of the FFNs of a task model.

        Args:
            model: FM or proxy of this family, bare or wrapped by PEFT.

        Returns:
            One view per block, in order.
        """
        return [FFN(self, block) for block in self.block_list(model)]

    @property
    def query_key(self) -> tuple[str, str]:
        """Paths of the query and the key projection, relative to the block."""
        return self.attention[0], self.attention[1]

    def lora_targets(self, blocks: Iterable[int]) -> tuple[str, ...]:
        """Full paths of the LoRA targets in the given blocks.

        They are full because suffixes such as `output.dense` would also hit the FFN.

        Args:
            blocks: the blocks' positions in the model.

        Returns:
            Query, key, value and attention output of each block, block after block.
        """
        return tuple(f"{self.blocks}.{i}.{path}" for i in blocks for path in self.attention)


def _bert_like(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        kind="text",
        blocks=f"{model_type}.encoder.layer",
        ffn_in=("intermediate.dense",),
        activation="intermediate.intermediate_act_fn",
        ffn_out="output.dense",
        output_norm="output.LayerNorm",
        attention=(
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
        head=("classifier",),
        after_padding=model_type == "roberta",
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


def _vit_like(model_type: str, special_tokens: int) -> Family:
    return Family(
        model_type=model_type,
        kind="image",
        blocks=f"{model_type}.layers",
        ffn_in=("mlp.fc1",),
        activation="mlp.activation_fn",
        ffn_out="mlp.fc2",
        output_norm="",
        attention=(
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
        ),
        head=("classifier",),
        special_tokens=special_tokens,
    )


def _llama_like(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        kind="text",
        blocks="model.layers",
        ffn_in=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        ffn_out="mlp.down_proj",
        output_norm="",
        attention=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
        head=("score",),
        causal=True,
        summary="last",
        names=ConfigNames(kv_heads="num_key_value_heads", head_dim="head_dim"),
    )


FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        _bert_like("bert"),
        _bert_like("roberta"),
        _distilbert(),
        _bert_like("electra"),
        _vit_like("vit", special_tokens=1),
        _vit_like("deit", special_tokens=2),
        _llama_like("llama"),
    )
}


def family_of(model_type: str) -> Family:
    """Look a family up.

    Args:
        model_type: what a Hugging Face config calls its kind of model.

    Returns:
        The family's row of `FAMILIES`.

    Raises:
        UserError: there is no such row; names those there are.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UserError(
            f"model.name: model type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        ) from None


def family_of_model(model: nn.Module) -> Family:
    """The family of a task model.

    Args:
        model: FM or proxy, bare or wrapped by PEFT.

    Returns:
        The family that its config's `model_type` names.

    Raises:
        UserError: the family is not supported.
    """
    config: Any = base_model(model).config
    return family_of(config.model_type)


def base_model(model: nn.Module) -> nn.Module:
    """The task model inside a PEFT wrapper, or the model itself.

    Args:
        model: bare or wrapped by PEFT.

    Returns:
        The bare task model, not a copy.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


__all__ = [
    "FAMILIES", "FFN", "ConfigNames", "Family", "Shape", "base_model", "family_of",
    "family_of_model",
]  # fmt: skip
