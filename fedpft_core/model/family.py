"""A family of models: where its members keep their parts, and how to reach them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fedpft_core.model.batch import Position
from fedpft_core.model.ffn import FFN
from fedpft_core.model.fused import Fused
from fedpft_core.model.shape import ConfigNames, Shape, optional_size, sides, size, value_of


@dataclass(frozen=True)
class Family:
    """Where models of one kind keep their blocks, FFNs, LoRA targets, head and sizes.

    Paths with a leading block are relative to the block, the others to the task model.
    The order of a tuple counts: LoRA's targets are told apart by it, and the last linear layer of
    the last module of `head` is the one that gives the class scores, which plug-in refits.
    `ffn_in` lists the projections into the FFN (one, or gate then up for gated FFNs);
    `output_norm` is the LayerNorm after the FFN output of post-norm families, else empty, and
    `after_ffn` what the FFN's output passes before it is added to the residual, if anything.
    Where a model keeps several projections in one layer, the paths are those that
    :func:`fedpft_core.model.normalise.normalise` gives them, the layer's and the part's.
    """

    model_type: str  # what the Hugging Face config calls it
    kind: str  # "text", "image" or "captioned image"
    blocks: str
    ffn_in: tuple[str, ...]
    activation: str
    ffn_out: str
    output_norm: str
    # LoRA targets: q, k, v, attention output, in this order; where a block has a second attention,
    # its four behind those of the first.
    attention: tuple[str, ...]
    head: tuple[str, ...]  # modules of the library's classification head, as they run
    tokens_head: str = ""  # that of its token classifier; empty: the last module of `head`
    variant: str = ""  # told from others of its model_type by `when`
    when: tuple[tuple[str, Any], ...] = ()  # fields of the config and what they must be
    after_ffn: str = ""
    fused: tuple[Fused, ...] = ()  # layers of a block that hold several projections
    causal: bool = False  # a decoder: each position reads those before it alone
    drops: bool = True  # whether a block can be left out
    packs: bool = True  # a decoder of the library's that tells packed documents by positions
    after_padding: bool = False  # positions count from pad_token_id + 1 (RoBERTa)
    summary: Position = "first"  # the position that this head reads
    special_tokens: int = 0  # positions of an image that are no patch
    names: ConfigNames = field(default_factory=ConfigNames)

    @property
    def name(self) -> str:
        """What plans call the family: the config's `model_type`, and the variant if it is one."""
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules of `head`, and the token classifier's where it is called otherwise."""
        return (*self.head, self.tokens_head) if self.tokens_head else self.head

    def fits(self, config: Any) -> bool:
        """Whether a model with this config is of this family.

        Args:
            config: a Hugging Face config, or the dictionary one is saved as.

        Returns:
            True where `model_type` and all of `when` agree.
        """
        fields = (("model_type", self.model_type), *self.when)
        return all(value_of(config, name) == value for name, value in fields)

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
            ffn=n.neurons(config, hidden, gated=len(self.ffn_in) > 1),
            blocks=size(config, n.blocks),
            heads=heads,
            kv_heads=optional_size(config, n.kv_heads) or heads,
            head_dim=head_dim,
        )
        if self.kind == "text":
            unused = size(config, "pad_token_id", least=0) + 1 if self.after_padding else 0
            positions = size(config, n.positions) - unused
            return replace(body, vocabulary=size(config, n.vocabulary), positions=positions)
        if self.kind == "captioned image":
            body = replace(
                body,
                vocabulary=size(config, n.vocabulary),
                prompt_tokens=size(config, "prompt_tokens"),
                block_tokens=tuple(value_of(config, "block_tokens") or ()),
            )
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


def base_model(model: nn.Module) -> nn.Module:
    """The task model inside a PEFT wrapper, or the model itself.

    Args:
        model: bare or wrapped by PEFT.

    Returns:
        The bare task model, not a copy.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model
