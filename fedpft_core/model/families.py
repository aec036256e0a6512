"""Model families: the only place that knows how a Hugging Face model names its parts.

Adding a family is one row of `FAMILIES`. Everything else reaches a model through `Family`
(which modules), `Shape` (which sizes) and `FFN` (one block's neurons).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position


@dataclass(frozen=True)
class Shape:
    """The sizes of one model, whatever its config calls them.

    Attributes:
        hidden: width of the residual stream, D.
        ffn: neurons of each FFN, F.
        blocks: number of transformer blocks.
        heads: attention heads of the queries.
        kv_heads: attention heads of keys and values; fewer than `heads` in grouped attention.
        head_dim: width of one head.
        vocabulary: token ids a text model knows; 0 for images.
        positions: tokens a text model can read; 0 for images.
        channels, height, width: the image a model takes, in pixels; 0 for texts.
        image_tokens: positions an image becomes, special ones included; 0 for texts.
    """

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 0
    positions: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0
    image_tokens: int = 0

    @property
    def attention(self) -> int:
        """Width of what attention multiplies, all heads together."""
        return self.heads * self.head_dim

    def length(self, max_length: int) -> int:
        """Positions of the longest row.

        Args:
            max_length: the most tokens of a text.

        Returns:
            `max_length` for a text model, `image_tokens` for one that reads images.
        """
        return self.image_tokens or max_length


@dataclass(frozen=True)
class ConfigNames:
    """What a family's Hugging Face config calls its sizes; empty where it has no such field."""

    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    blocks: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = ""  # empty: as many as heads
    head_dim: str = ""  # empty: hidden / heads
    vocabulary: str = "vocab_size"
    positions: str = "max_position_embeddings"


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
        hidden, heads = _size(config, n.hidden), _size(config, n.heads)
        head_dim = _size(config, n.head_dim) if n.head_dim else hidden // heads
        body = Shape(
            hidden=hidden,
            ffn=_size(config, n.ffn),
            blocks=_size(config, n.blocks),
            heads=heads,
            kv_heads=_size(config, n.kv_heads) if n.kv_heads else heads,
            head_dim=head_dim,
        )
        if self.kind == "text":
            unused = _size(config, "pad_token_id", least=0) + 1 if self.after_padding else 0
            positions = _size(config, n.positions) - unused
            return replace(body, vocabulary=_size(config, n.vocabulary), positions=positions)
        height, width = _sides(config, "image_size")
        down, across = _sides(config, "patch_size")
        patches = (height // down) * (width // across)
        return replace(
            body,
            channels=_size(config, "num_channels"),
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


FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        _bert_like("bert"),
        _bert_like("roberta"),
        _distilbert(),
        _bert_like("electra"),
        _vit_like("vit", special_tokens=1),
        _vit_like("deit", special_tokens=2),
    )
}


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _size(config: Any, name: str, least: int = 1) -> int:
    value = _field(config, name)
    if type(value) is not int or value < least:
        raise ValueError(f"the model's config has {name} = {value!r}, not a number >= {least}")
    return value


def _sides(config: Any, name: str) -> tuple[int, int]:
    """Height and width, which a config states as one number or as two."""
    value = _field(config, name)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"the model's config has {name} = {value!r}, no height and width")
    return sides


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


class FFN:
    """The feed-forward network of one block, neuron by neuron.

    F neurons, model width D. Neuron j is row j of every in-projection [F, D] with its bias and
    column j of the out-projection [D, F] (paper section 4.1).
    """

    def __init__(self, family: Family, block: nn.Module) -> None:
        self.family = family
        self.block = block

    def _linear(self, path: str) -> nn.Linear:
        module = self.block.get_submodule(path)
        assert isinstance(module, nn.Linear), f"{path} is {type(module).__name__}"
        return module

    @property
    def ins(self) -> list[nn.Linear]:
        """The projections into the FFN, each with weight [F, D]: one, or gate then up."""
        return [self._linear(path) for path in self.family.ffn_in]

    @property
    def out(self) -> nn.Linear:
        """The projection out of the FFN, with weight [D, F]."""
        return self._linear(self.family.ffn_out)

    @property
    def activation(self) -> nn.Module:
        """The module whose output is the neurons' activations [..., F]."""
        return self.block.get_submodule(self.family.activation)

    def inner(self, x: Tensor) -> Tensor:
        """What enters the out-projection.

        Args:
            x: the FFN's input [..., D].

        Returns:
            [..., F]: the activations, in gated FFNs times the up-projection.
        """
        ins = self.ins
        a: Tensor = self.activation(ins[0](x))
        return a * ins[1](x) if len(ins) > 1 else a

    def __call__(self, x: Tensor) -> Tensor:
        """The FFN alone, [..., D] → [..., D]: no residual, no norm, no dropout."""
        y: Tensor = self.out(self.inner(x))
        return y

    @property
    def norm(self) -> nn.Module | None:
        """The LayerNorm after the FFN output (post-norm families), else None."""
        path = self.family.output_norm
        return self.block.get_submodule(path) if path else None

    @property
    def neurons(self) -> int:
        """Neurons of this FFN: F of the FM, or as many as the plan has kept."""
        return self.out.in_features

    def parts(self) -> dict[str, Tensor]:
        """Every parameter alignment may move, by a family-independent name.

        Returns:
            The parameters themselves: `in0.weight`, `in0.bias` (for gated FFNs `in1` as well),
            `out.weight`, `out.bias`, and `norm.*` of post-norm families.
        """
        named: dict[str, Tensor] = {}
        for i, linear in enumerate(self.ins):
            named[f"in{i}.weight"] = linear.weight
            if linear.bias is not None:
                named[f"in{i}.bias"] = linear.bias
        named["out.weight"] = self.out.weight
        if self.out.bias is not None:
            named["out.bias"] = self.out.bias
        norm = self.norm
        if norm is not None:
            named |= {f"norm.{k}": p for k, p in norm.named_parameters()}
        return named

    @staticmethod
    def neuron_axis(part: str) -> int | None:
        """Which axis of a part counts neurons.

        Args:
            part: a name that `parts` gives.

        Returns:
            0 for in-projections, 1 for `out.weight`, None where all neurons share the part.
        """
        if part.startswith("in"):
            return 0
        return 1 if part == "out.weight" else None

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Copies of the chosen neurons' rows and columns and of the shared parts.

        Args:
            index: int64 [m], positions of the neurons in this FFN, on its device.

        Returns:
            By the names of `parts`: rows [m, D], biases [m], columns as they lie [D, m].
        """
        out = {}
        for part, p in self.parts().items():
            axis = self.neuron_axis(part)
            value = p.detach() if axis is None else p.detach().index_select(axis, index)
            out[part] = value.clone()
        return out

    @torch.no_grad()
    def write(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Set chosen neurons and the shared parts, in place: the inverse of `read`.

        Args:
            index: int64 [m], positions of the neurons in this FFN.
            values: what `read` gave for as many neurons, of any device and float type.

        Raises:
            ValueError: parts are missing or too much, or a shape does not fit.
        """
        parts = self.parts()
        if set(values) != set(parts):
            raise ValueError(f"expected parts {sorted(parts)}, got {sorted(values)}")
        for part, p in parts.items():
            axis, value = self.neuron_axis(part), values[part].to(p.dtype).to(p.device)
            want = list(p.shape)
            if axis is not None:
                want[axis] = len(index)
            if list(value.shape) != want:
                raise ValueError(f"{part}: expected shape {want}, got {list(value.shape)}")
            if axis is None:
                p.copy_(value)
            else:
                p.index_copy_(axis, index.to(p.device), value)

    def resized(self, neurons: int) -> dict[str, nn.Linear]:
        """Uninitialised linears of this FFN for another number of neurons.

        Args:
            neurons: how many they are for.

        Returns:
            By path relative to the block, with bias, device and float type as in this FFN.
        """
        out: dict[str, nn.Linear] = {}
        for path in self.family.ffn_in:
            old = self._linear(path)
            out[path] = _empty_linear(old.in_features, neurons, old)
        old = self.out
        out[self.family.ffn_out] = _empty_linear(neurons, old.out_features, old)
        return out


def _empty_linear(d_in: int, d_out: int, like: nn.Linear) -> nn.Linear:
    return nn.utils.skip_init(
        nn.Linear,
        d_in,
        d_out,
        bias=like.bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
