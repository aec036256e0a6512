"""The sizes of a model, read from a Hugging Face config whatever it calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        image_tokens: positions an image becomes, special ones included; 0 for texts. Where blocks
            read different numbers of them, the most.
        prompt_tokens: tokens of the prompt that comes with an image; 0 where none does.
        block_tokens: positions that each block reads; empty where they all read as many.
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
    prompt_tokens: int = 0
    block_tokens: tuple[int, ...] = ()

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
    kv_heads: str = ""  # empty, or null there: as many as heads
    head_dim: str = ""  # empty, or null there: hidden / heads
    vocabulary: str = "vocab_size"
    positions: str = "max_position_embeddings"
    ffn_default: int = 0  # where `ffn` may be null: so many times hidden
    ffn_ratio: str = ""  # the field that says instead of `ffn` how many times hidden

    def neurons(self, config: Any, hidden: int, gated: bool) -> int:
        """Neurons of each FFN.

        Args:
            config: a Hugging Face config, or the dictionary one is saved as.
            hidden: width of the residual stream.
            gated: whether the FFN is gated.

        Returns:
            F.

        Raises:
            ValueError: the config does not tell.
        """
        if self.ffn_ratio:
            f = hidden * size(config, self.ffn_ratio)
            # Gated ones keep two thirds, rounded up to a multiple of 8 (DINOv2).
            return (int(f * 2 / 3) + 7) // 8 * 8 if gated else f
        if self.ffn_default:
            return optional_size(config, self.ffn) or self.ffn_default * hidden
        return size(config, self.ffn)


def size(config: Any, name: str, least: int = 1) -> int:
    """A whole number that a config states.

    Args:
        config: a Hugging Face config, or the dictionary one is saved as.
        name: its field.
        least: the smallest value that makes sense.

    Returns:
        The number.

    Raises:
        ValueError: it is missing, no whole number or too small.
    """
    value = value_of(config, name)
    if type(value) is not int or value < least:
        raise ValueError(f"the model's config has {name} = {value!r}, not a number >= {least}")
    return value


def optional_size(config: Any, name: str) -> int | None:
    """The same of a field that a config may leave out.

    Args:
        config: a Hugging Face config, or the dictionary one is saved as.
        name: its field; empty for none.

    Returns:
        The number, or None where the config has none.

    Raises:
        ValueError: it is there and is no whole number of at least 1.
    """
    if not name or value_of(config, name) is None:
        return None
    return size(config, name)


def sides(config: Any, name: str) -> tuple[int, int]:
    """Height and width, which a config states as one number or as two.

    Args:
        config: a Hugging Face config, or the dictionary one is saved as.
        name: its field.

    Returns:
        Height and width.

    Raises:
        ValueError: the field has neither.
    """
    value = value_of(config, name)
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2 or any(type(side) is not int or side < 1 for side in both):
        raise ValueError(f"the model's config has {name} = {value!r}, no height and width")
    return both


def value_of(config: Any, name: str) -> Any:
    """What a config says in a field.

    Args:
        config: a Hugging Face config, or the dictionary one is saved as.
        name: the field.

    Returns:
        Its value; None where there is no such field.
    """
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
