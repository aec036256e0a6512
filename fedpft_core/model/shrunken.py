"""A random model of any family, small enough to train in a second, with the processor it needs.

What `fedpft run --dry-run` builds in the place of a model that is too large, or not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedpft_core.errors import UserError
from fedpft_core.model.families import Family, family_of
from fedpft_core.model.load import TaskModel, quiet, task_class

BLOCKS = 4
"""Blocks of a shrunken model: the first, the last, and two that are pruned."""
_HIDDEN, _HEADS, _FFN, _SIDE, _PATCH = 32, 2, 64, 32, 8
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TOKEN_TYPES = ("bert", "electra")  # whose tokenizers tell the two texts of a pair apart


def write(
    folder: Path, family: str, task: TaskModel, words: Sequence[str], positions: int, seed: int
) -> None:
    """Save a random model of a family with its tokenizer or image processor, as the hub has them.

    Args:
        folder: is made.
        family: a row of `FAMILIES`.
        task: what the model is for.
        words: what the tokenizer knows.
        positions: tokens that a text model can read.
        seed: of the weights.

    Raises:
        UserError: models of the family are made of several parts, or the task needs a decoder.
    """
    row = family_of(family)
    if row.kind == "captioned image":
        raise UserError(f"model.family = {family}: a dry run builds no diffusion pipelines.")
    if task.causal and not row.causal:
        raise UserError(f"model.family = {family} writes no text, which the task is to learn.")
    vocabulary = [*_SPECIAL, *dict.fromkeys(words)]
    config = _config(row, len(vocabulary), positions)
    for name, value in task.settings.items():
        setattr(config, name, value)
    found = task_class(task)._model_mapping[type(config)]
    # Where the library has several, the first is the plain one (DeiT has one with a teacher too).
    config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task_class(task).from_config(config)
    with quiet():
        model.save_pretrained(folder)
    _processor(row, vocabulary, positions).save_pretrained(folder)


def _config(row: Family, vocabulary: int, positions: int) -> Any:
    """The family's config with small sizes, under the names that it has for them."""
    from transformers import AutoConfig

    names = row.names
    sizes: dict[str, Any] = {
        names.hidden: _HIDDEN, names.blocks: BLOCKS, names.heads: _HEADS, names.ffn: _FFN
    }  # fmt: skip
    if names.head_dim:
        sizes[names.head_dim] = _HIDDEN // _HEADS
    if names.kv_heads:
        sizes[names.kv_heads] = 1
    if names.ffn_ratio:
        sizes[names.ffn_ratio] = sizes.pop(names.ffn) // _HIDDEN
    if row.kind == "text":
        # RoBERTa counts positions from behind that of padding.
        sizes |= {names.vocabulary: vocabulary, names.positions: positions + 2}
        sizes |= {
            f"{token}_token_id": i
            for token, i in (("pad", 0), ("bos", 2), ("cls", 2), ("eos", 3), ("sep", 3))
        }
    else:
        sizes |= {"image_size": _SIDE, "patch_size": _PATCH, "num_channels": 3}
    own = {"electra": {"embedding_size": _HIDDEN}, "opt": {"word_embed_proj_dim": _HIDDEN}}
    return AutoConfig.for_model(
        row.model_type, **(sizes | own.get(row.model_type, {}) | dict(row.when))
    )


def _processor(row: Family, vocabulary: list[str], positions: int) -> Any:
    import transformers

    if row.kind == "image":
        side = {"height": _SIDE, "width": _SIDE}
        kind = transformers.ViTImageProcessorPil
        return kind(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    numbers = {word: i for i, word in enumerate(vocabulary)}
    special = dict(zip(("pad", "unk", "cls", "sep", "mask"), _SPECIAL, strict=True))
    tokens = {f"{name}_token": token for name, token in special.items()}
    if row.causal:
        tokens |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    if row.model_type == "qwen2":
        return _qwen2(vocabulary, numbers, tokens, positions)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(numbers, row.causal),
        model_input_names=[
            "input_ids", *["token_type_ids"] * (row.model_type in _TOKEN_TYPES), "attention_mask",
        ],
        model_max_length=positions,
        **tokens,
    )  # fmt: skip


def _words(numbers: dict[str, int], causal: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if not causal:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return made


def _qwen2(
    vocabulary: list[str], numbers: dict[str, int], tokens: dict[str, str], positions: int
) -> Any:
    """The same words in the class that the library takes for Qwen2 whatever its folder says."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    made = Qwen2Tokenizer(vocab=numbers, merges=[], model_max_length=positions, **tokens)
    made.add_tokens(
        [
            AddedToken(word, single_word=True, lstrip=True, normalized=False)
            for word in vocabulary[len(_SPECIAL) :]
        ]
    )
    return made
