"""Tiny random models of every family, tokenizers and tasks on disk, made in well under a second.

Everything here is the real format a user would have on disk: `config.json`,
`model.safetensors`, tokenizer or image-processor files, CSV and Parquet data.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fedpft_core import adapters, config, sub_fm
from fedpft_core.data.batches import Encoded, encode
from fedpft_core.data.tasks import Examples
from fedpft_core.families import Family, family_of
from fedpft_core.sub_fm import Plan
from torch import nn

FAMILIES = ("bert", "roberta", "vit", "deit")
TEXT_FAMILIES = ("bert", "roberta")
LABELS = ("animal", "number", "place")
WORDS = {
    "animal": "cat dog horse cow sheep goat bird fish wolf bear".split(),
    "number": "one two three four five six seven eight nine ten".split(),
    "place": "paris london tokyo cairo delhi lima oslo rome quito kyoto".split(),
}
_FILLER = "the a is of in and to very big small old new seen near some".split()
_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def vocabulary() -> list[str]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *_FILLER, *(w for ws in WORDS.values() for w in ws)]


def tokenizer(family: str) -> Any:
    """A word-level fast tokenizer with the special tokens the family needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = vocabulary()
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "attention_mask"]
    if family == "bert":
        names.insert(1, "token_type_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names,
        model_max_length=32,
    )


def hf_config(family: str, labels: int = len(LABELS), **shape: Any) -> Any:
    """A tiny config of the family; keyword arguments change its shape."""
    size = _SHAPE | shape
    if family in TEXT_FAMILIES:
        size |= {"vocab_size": len(vocabulary()), "max_position_embeddings": 40, "pad_token_id": 0}
    else:
        size |= {"image_size": 16, "patch_size": 4, "num_channels": 3}
    cls = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "vit": transformers.ViTConfig,
        "deit": transformers.DeiTConfig,
    }[family]
    made = cls(num_labels=labels, **size)
    made.architectures = [
        {
            "bert": "BertForSequenceClassification",
            "roberta": "RobertaForSequenceClassification",
            "vit": "ViTForImageClassification",
            "deit": "DeiTForImageClassification",
        }[family]
    ]
    return made


def model(family: str, seed: int = 0, **shape: Any) -> nn.Module:
    """A bare task model in eval mode with weights large enough that every part matters."""
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if family in TEXT_FAMILIES
        else transformers.AutoModelForImageClassification
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = auto.from_config(hf_config(family, **shape))
        for p in made.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.25)
            else:
                nn.init.normal_(p, mean=float("norm" in str(p)), std=0.1)
        for m in made.modules():
            if isinstance(m, nn.LayerNorm):
                nn.init.normal_(m.weight, mean=1.0, std=0.1)
    return made.eval()


def folder(family: str, path: Path, **shape: Any) -> Path:
    """Save a tiny pretrained body (no head) with its processor as a Hugging Face folder."""
    task = model(family, **shape)
    body = getattr(task, family)
    body.config.architectures = [type(body).__name__]
    body.save_pretrained(path)
    processor(family).save_pretrained(path)
    return path


def processor(family: str) -> Any:
    if family in TEXT_FAMILIES:
        return tokenizer(family)
    cls = transformers.ViTImageProcessorPil
    return cls(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def sentences(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label name) rows of uneven length that a word decides."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(rows):
        label = LABELS[i % len(LABELS)]
        words = [str(w) for w in rng.choice(_FILLER, size=int(rng.integers(1, 9)))]
        words.insert(int(rng.integers(0, len(words) + 1)), str(rng.choice(WORDS[label])))
        out.append((" ".join(words), label))
    return out


def image(label: int, rng: np.random.Generator) -> bytes:
    """A small PNG whose colour tells its label."""
    from PIL import Image

    pixels = rng.integers(0, 90, size=(16, 16, 3), dtype=np.uint8)
    pixels[..., label] += 140
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def examples(family: str, rows: int, seed: int = 0) -> Examples:
    if family in TEXT_FAMILIES:
        pairs = sentences(rows, seed)
        labels = np.array([LABELS.index(label) for _, label in pairs])
        return Examples(tuple(t for t, _ in pairs), labels)
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(LABELS)
    return Examples(tuple(image(int(y), rng) for y in labels), labels)


def encoded(family: str, rows: int, seed: int = 0) -> Encoded:
    return encode(examples(family, rows, seed), processor(family), 32)


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return path


def plan_for(fm: nn.Module, **keys: Any) -> Plan:
    return sub_fm.make_plan(fm, config.PlanConfig(**keys), seed=0)


def pair(
    family: str, plan: Plan | None = None, seed: int = 0, dropout: float = 0.0
) -> tuple[nn.Module, nn.Module, Plan, adapters.AdapterSpec]:
    """FM and proxy with adapters attached at the same non-zero adapter."""
    fm = model(family, seed)
    plan = plan or plan_for(fm)
    proxy = sub_fm.build(fm, plan)
    spec = adapters.make_spec(
        family_of(family), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=dropout)
    )
    fm, proxy = adapters.attach(fm, spec), adapters.attach(proxy, spec, plan)
    tensors = random_adapter(proxy, spec, plan, seed)
    adapters.load(proxy, tensors, plan)
    live = adapters.read(fm)
    adapters.load(fm, live | tensors)
    return fm, proxy, plan, spec


def random_adapter(
    proxy: nn.Module, spec: adapters.AdapterSpec, plan: Plan, seed: int = 0
) -> dict[str, torch.Tensor]:
    """An adapter whose A and B are both non-zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = adapters.initial(proxy, spec, seed, plan)
    return {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}


def family(name: str) -> Family:
    return family_of(name)
