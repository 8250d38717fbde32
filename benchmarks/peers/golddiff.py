"""The images GoldDiff (shangxinyi/GoldDiff) sums over: a random draw, screened in two rounds, for each noisy image.

With v = sigma / sqrt(1 + sigma^2) and k_min, k_max = N / 20, N / 10 as shipped for CIFAR-10: k_max + (N - k_max)(1 - v)
images are drawn uniformly; of those the k_max nearest after average pooling stay, and of those the
k_max - (k_max - k_min)(1 - v) nearest in full resolution. What GoldDiff then sums is another score (PCA locality, one
softmax an image and pixel); as a peer of `pruned` the same windows are summed as everywhere here, exactly.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .screening import FACTOR


def images(z: torch.Tensor, sigma: float, bank_images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[k_t] positions for one noisy image z [C, H, W]; bank_images [N, C, H, W] in [-1, 1], on z's device."""
    total = len(bank_images)
    fewest, most = max(1, total // 20), max(1, total // 10)
    v = sigma / math.sqrt(1 + sigma * sigma)
    drawn = torch.randperm(total, generator=generator)[: round(most + (total - most) * (1 - v))].to(z.device)

    def nearest(among: torch.Tensor, count: int, factor: int) -> torch.Tensor:
        target, others = z[None], bank_images[among]
        if factor > 1:
            target, others = F.avg_pool2d(target, factor), F.avg_pool2d(others, factor)
        return among[(others - target).square().flatten(1).sum(1).topk(count, largest=False).indices]

    screened = nearest(drawn, min(most, len(drawn)), FACTOR)
    return nearest(screened, min(round(most - (most - fewest) * (1 - v)), len(screened)), 1)
