"""Where whole images compete, the Jacobian of the posterior mean is Cov(x_0 | z) / sigma^2: two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bank import PatchBank
from ..posterior import PosteriorSum, accumulator_dtype

CHUNK_BYTES = 128 * 2**20
"""Working memory of a chunk of images where `memory_limit` allows it."""


def whole_product(
    z: Tensor, sigma: Tensor, direction: Tensor, bank: PatchBank, total: PosteriorSum, memory_limit: int
) -> Tensor:
    """J direction, which is J^T direction too, from the posterior sums `total`: [B, C, H, W] as direction.

    Raises:
        ValueError: `memory_limit` cannot hold one image.
    """
    exact = accumulator_dtype(z.device)
    q, u, mean = (x.to(z.device, exact).flatten(1) for x in (z, direction, total.mean))
    sigma2 = sigma.to(z.device, exact).square()[:, None]
    evidence = (total.m + total.s.log()).to(z.device, exact).flatten(1)
    product = torch.zeros_like(q)
    image_bytes = 8 * (4 * q.shape[1] + 4 * len(q))  # its values and what they are made from, its weights
    if image_bytes > memory_limit:
        raise ValueError(f"memory_limit: got {memory_limit} bytes, one image takes {image_bytes}")
    count = max(1, min(CHUNK_BYTES, memory_limit) // image_bytes)
    for start in range(0, len(bank), count):
        p = bank.chunk(start, start + count, exact, z.device).flatten(1)
        squared = p.square().sum(1) - 2 * q @ p.T + q.square().sum(1, keepdim=True)
        c = (-squared / (2 * sigma2) - evidence).exp() * (u @ p.T - (u * mean).sum(1, keepdim=True))
        product += c @ p - c.sum(1, keepdim=True) * mean
    return (product / sigma2).view_as(direction).to(direction.dtype)
