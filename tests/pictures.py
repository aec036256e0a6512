"""A tiny random pipeline in the layout of Stable Diffusion, and images with prompts for it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from torch import nn

from fedpft_core.data.examples import Captioned, Examples
from fedpft_core.model.diffusion import TextToImage
from fedpft_core.model.load import Loaded, load
from fedpft_core.task import make

TASK = make("text-to-image")
PROMPTS = ("a big cat", "a small dog", "the old horse")
SIDE = 8


def tokenizer() -> Any:
    """Words of the tiny text models; prompts of six tokens."""
    made = tiny.tokenizer("roberta")
    made.model_max_length = 6
    return made


def unet(**more: Any) -> Any:
    """Two levels of different width and one block in the middle: seven transformer blocks."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": SIDE, "in_channels": 1, "out_channels": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
        "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**settings | more)


def text_encoder() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tiny.vocabulary()), hidden_size=12, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=6,
            bos_token_id=2, eos_token_id=3, pad_token_id=0,
        )
    )  # fmt: skip


def folder(path: Path, seed: int = 0, vae: bool = False, **more: Any) -> Path:
    """Save a pipeline with random weights, large enough that every part of it matters."""
    from diffusers import AutoencoderKL, DDPMScheduler

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {"unet": unet(**more), "text_encoder": text_encoder()}
        if vae:
            parts["vae"] = AutoencoderKL(
                in_channels=3, out_channels=3, latent_channels=1, norm_num_groups=2,
                down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(4, 4),
                up_block_types=("UpDecoderBlock2D",) * 2, sample_size=2 * SIDE,
            )  # fmt: skip
        for name, p in parts["unet"].named_parameters():
            if "transformer_blocks" in name and p.dim() > 1:
                nn.init.normal_(p, std=0.25)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
    }
    for name, part in parts.items():
        part.save_pretrained(path / name)
    tokenizer().save_pretrained(path / "tokenizer")
    DDPMScheduler(num_train_timesteps=50).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def loaded(path: Path, **more: Any) -> Loaded:
    """The pipeline as a run has it."""
    from fedpft_core.config import ModelConfig

    return load(ModelConfig(name=str(folder(path, **more))), TASK.model(), 0)


def image(kind: int, rng: np.random.Generator) -> bytes:
    """A grey PNG with a bright bar at a place of its kind."""
    from PIL import Image

    pixels = rng.integers(0, 60, size=(SIDE, SIDE), dtype=np.uint8)
    pixels[:, 2 * kind : 2 * kind + 2] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def examples(rows: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    kinds = np.arange(rows) % len(PROMPTS)
    return Examples(tuple(Captioned(image(k, rng), PROMPTS[k]) for k in kinds), kinds)


def batch(model: TextToImage, processor: Any, rows: int = 4, seed: int = 0) -> dict[str, Any]:
    from fedpft_core.data.batches import batches

    served = batches(TASK.encode(examples(rows, seed), processor, 0), rows, None)
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in next(served).items()}


def write_file(path: Path, rows: int, seed: int) -> str:
    """A CSV file of prompts with images beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        for i, row in enumerate(examples(rows, seed).inputs):
            assert isinstance(row, Captioned)
            name = f"{path.stem}-{i}.png"
            (path.parent / name).write_bytes(row.image)
            writer.writerow([name, row.prompt])
    return str(path)


def write_task(path: Path) -> dict[str, Any]:
    """A pipeline's folder and data files below `path`, and a run's keys for them."""
    path.mkdir(parents=True, exist_ok=True)
    flat = tiny.write_task("bert", path / "other")
    return flat | {
        "model.name": str(folder(path / "fm")),
        "data.task": "text-to-image",
        "data.image-column": "image",
        "data.text-column": "text",
        "data.train": write_file(path / "train.csv", 48, 0),
        "data.test": write_file(path / "test.csv", 12, 1),
        "data.public": write_file(path / "public.csv", 24, 2),
        "data.public-column": "image",
        "plug.method": "best",
        "plug.distil-steps": 5,
        "run.samples": 3,
        "run.evaluate-every": 2,
        "train.lr": 1e-2,
    }
