"""Random changes to a batch of training images, drawn per image and computed on the device."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_wandb.config import AugmentConfig

ELASTIC_CELL_PIXELS = 7
"""Distance of the random displacements that an elastic distortion interpolates between."""


def is_off(config: AugmentConfig) -> bool:
    """Whether the configuration changes nothing."""
    return config == AugmentConfig()


def augment(images: Tensor, config: AugmentConfig) -> Tensor:
    """Change each image at random; what comes in from outside is black.

    Args:
        images: uint8 or float (N, 1, H, W) in [0, 255]. Not changed.
        config: how much; all randomness is drawn from torch's global generator of the device.

    Returns:
        Tensor of the same shape in [0, 255]; uint8 as long as whole pixels are moved, float32
        after interpolation.
    """
    if config.rotation_degrees or config.zoom or config.shear_degrees or config.elastic:
        images = _warp(images.float(), config)
    elif config.translate_pixels:
        images = _translate(images, config.translate_pixels)
    if config.erase_fraction:
        images = _erase(images, config.erase_fraction)
    return images


def _uniform(count: int, limit: float, like: Tensor) -> Tensor:
    """Values in [-limit, limit], float32 (count,)."""
    return torch.empty(count, device=like.device).uniform_(-limit, limit)


def _translate(images: Tensor, limit: int) -> Tensor:
    """Shift by whole pixels: pad, then read each image's window."""
    count, _, height, width = images.shape
    padded = F.pad(images, (limit,) * 4)[:, 0]
    shift = torch.randint(0, 2 * limit + 1, (2, count, 1, 1), device=images.device)
    rows = torch.arange(height, device=images.device)[:, None] + shift[0]
    columns = torch.arange(width, device=images.device)[None, :] + shift[1]
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded[image, rows, columns][:, None]


def _warp(images: Tensor, config: AugmentConfig) -> Tensor:
    """Rotation, zoom, shear, shift and elastic displacement in one bilinear interpolation.

    The affine part maps output positions to input positions, both relative to the image centre.
    The elastic part interpolates a coarse field of normal displacements, a cheaper form of
    Simard et al. 2003, "Best Practices for Convolutional Neural Networks".
    """
    count, _, height, width = images.shape
    angle = _uniform(count, math.radians(config.rotation_degrees), images)
    shear = _uniform(count, math.tan(math.radians(config.shear_degrees)), images)
    scale = 1 / (1 + _uniform(count, config.zoom, images))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    right, down = (_uniform(count, config.translate_pixels, images) for _ in range(2))
    # What the output's x, y and 1 add to the input's x and y: rotation · shear · scale, shift.
    matrix = torch.stack([cos, sin, cos * shear - sin, sin * shear + cos, right, down], dim=1)
    places, unit = _places(height, width, images.device)
    grid = (places @ (matrix.view(-1, 3, 2) * unit)).view(count, height, width, 2)
    if config.elastic:
        cells = (math.ceil(height / ELASTIC_CELL_PIXELS), math.ceil(width / ELASTIC_CELL_PIXELS))
        coarse = torch.randn(count, 2, *cells, device=images.device)
        coarse *= config.elastic * unit[:, None, None]
        field = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        grid += field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


@functools.lru_cache(maxsize=8)
def _places(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, y and 1 of each pixel from the centre (1, H·W, 3); one pixel as `grid_sample` counts (2,).

    It wants positions in [-1, 1], measured over the pixels' outer edges.
    """
    y = torch.arange(height, device=device) - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    x, y = torch.meshgrid(x, y, indexing="xy")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)
    return places, torch.tensor([2 / width, 2 / height], device=device)


def _erase(images: Tensor, fraction: float) -> Tensor:
    """Blacken one rectangle per image that covers `fraction` of the area.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation" (aspect ratio 0.3 to 3.3).
    """
    count, _, height, width = images.shape
    ratio = torch.exp(_uniform(count, math.log(1 / 0.3), images))
    tall = (fraction * height * width * ratio).sqrt().clamp(fraction * height, height)
    wide = fraction * height * width / tall
    top = torch.rand(count, device=images.device) * (height - tall)
    left = torch.rand(count, device=images.device) * (width - wide)

    def inside(size: int, start: Tensor, length: Tensor) -> Tensor:
        at = torch.arange(size, device=images.device) + 0.5
        return (at >= start[:, None]) & (at < (start + length)[:, None])

    hole = inside(height, top, tall)[:, :, None] & inside(width, left, wide)[:, None, :]
    return images.masked_fill(hole[:, None], 0)
