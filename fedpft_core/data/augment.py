"""The usual augmentation of images while training: a random crop, resized back, and a mirror image.

Both are one affine map of each image, drawn from the seed alone. Pixels are those that the model
would get, so that nothing is decoded again.

Shape letters: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.seeds import torch_stream

_RATIO = math.log(4 / 3)  # of the sides of a crop, either way


def augmented(pixels: Tensor, least: float, seed: int) -> Tensor:
    """Each image cropped at random, resized to what it was, and mirrored every other time.

    Args:
        pixels: float [B, C, H, W].
        least: smallest share of the area that a crop keeps, above 0; 1 only mirrors.
        seed: of the crops and the mirroring.

    Returns:
        [B, C, H, W], on the same device.
    """
    draw = torch_stream(seed, "augment")
    count, least = len(pixels), min(max(least, 1e-3), 1.0)
    area, ratio, across, down, mirror = torch.rand(5, count, generator=draw)
    side = (least + (1 - least) * area).sqrt()
    stretch = ((2 * ratio - 1) * _RATIO / 2).exp() if least < 1 else torch.ones(count)
    # As shares of the image's sides; a crop never reaches beyond it.
    width, height = (side * stretch).clamp_max(1), (side / stretch).clamp_max(1)
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0] = width * torch.where(mirror < 0.5, -1.0, 1.0)
    turn[:, 1, 1] = height
    turn[:, 0, 2] = (2 * across - 1) * (1 - width)
    turn[:, 1, 2] = (2 * down - 1) * (1 - height)
    grid = F.affine_grid(turn, list(pixels.shape), align_corners=False).to(pixels)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
