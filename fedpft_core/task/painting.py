"""Letting a diffusion model make images, by DDIM in few steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.data.batches import noise_seeds
from fedpft_core.data.examples import Captioned, Examples
from fedpft_core.model.captioned import CaptionedProcessor
from fedpft_core.model.device import device_of
from fedpft_core.model.diffusion import library
from fedpft_core.model.families import base_model


@torch.inference_mode()
def paint(
    model: nn.Module,
    prompts: Sequence[str],
    processor: CaptionedProcessor,
    steps: int,
    batch_size: int,
) -> Tensor:
    """Images for prompts, each from noise that its place in the list alone decides.

    So two models begin with the same noise, and what differs is what they make of it.
    Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021 (arXiv:2010.02502), eq. 12
    with sigma = 0.

    Args:
        model: a text-to-image model, bare or with the adapter; left in eval mode.
        prompts: one for each image.
        processor: the model's.
        steps: of the sampler, at least 1.
        batch_size: images at once.

    Returns:
        uint8 [images, C, H, W].
    """
    model.eval()
    bare: Any = base_model(model)
    device = device_of(model)
    schedule = library().DDIMScheduler.from_config(bare.config.scheduler)
    schedule.set_timesteps(steps, device=device)
    unet = bare.config.unet
    size = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
    made = [
        torch.zeros(0, processor.channels, processor.height, processor.width, dtype=torch.uint8)
    ]
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        seeds = noise_seeds(np.arange(start, start + len(chosen)), 0)
        noise = [
            torch.randn(size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds.tolist()
        ]
        read = bare.prompts(processor.prompts(chosen).to(device))
        latents = torch.stack(noise).to(read) * schedule.init_noise_sigma
        for step in schedule.timesteps:
            given = schedule.scale_model_input(latents, step)
            found = bare.unet(given, step, encoder_hidden_states=read).sample
            latents = schedule.step(found, step, latents).prev_sample
        pixels = bare.pixels(latents)
        made.append(((pixels + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(made)


def prompts_of(examples: Examples) -> list[str]:
    """The prompts of some rows.

    Args:
        examples: images with prompts.

    Returns:
        One for each row.
    """
    return [row.prompt for row in examples.inputs if isinstance(row, Captioned)]


def side_by_side(images: Sequence[bytes], height: int = 64) -> bytes:
    """Images in one row.

    Args:
        images: files of one size, at least one.
        height: the least height of the row in pixels; smaller images are enlarged by whole numbers.

    Returns:
        A PNG file.
    """
    from PIL import Image

    decoded = [Image.open(io.BytesIO(content)).convert("RGB") for content in images]
    times = max(1, -(-height // decoded[0].height))
    size = (decoded[0].width * times, decoded[0].height * times)
    gap = 4
    row = Image.new("RGB", (len(decoded) * (size[0] + gap) - gap, size[1]), "white")
    for i, one in enumerate(decoded):
        row.paste(one.resize(size, Image.Resampling.NEAREST), (i * (size[0] + gap), 0))
    buffer = io.BytesIO()
    row.save(buffer, "PNG")
    return buffer.getvalue()


def png(image: Tensor) -> bytes:
    """An image as a file.

    Args:
        image: uint8 [C, H, W] with one or three channels.

    Returns:
        A PNG file.
    """
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


__all__ = ["paint", "png", "prompts_of", "side_by_side"]
