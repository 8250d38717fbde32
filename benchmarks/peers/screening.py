"""Whole images screened at low resolution: the nearest to any noisy image of the batch are summed exactly."""

from __future__ import annotations

import torch
from torch.nn import functional as F

FACTOR = 4  # by which images are averaged


def coarse(images: torch.Tensor) -> torch.Tensor:
    """[N, d] images at a quarter of the resolution; kept between calls."""
    return F.avg_pool2d(images, FACTOR).flatten(1)


def images(z: torch.Tensor, coarse_bank: torch.Tensor, count: int) -> torch.Tensor:
    """[count] positions."""
    return torch.cdist(coarse(z), coarse_bank).amin(0).topk(count, largest=False).indices
