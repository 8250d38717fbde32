"""SmoothedScore: the score of the training set, smoothed (Scarvelis, Borde & Solomon 2023, arXiv 2310.12395).

The ideal denoiser is averaged over Gaussian perturbations of its input, so that it lands between training images rather
than on one. In the published code the perturbation has a fixed width in x_t = z / sqrt(1 + sigma^2), so it is
std sqrt(1 + sigma^2) wide in z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from .base import Theory, effective, squared_distances, weighted_mean


class SmoothedScore(Theory):
    """D(z) = mean over draws e of I(z + std sqrt(1 + sigma^2) e), I the posterior mean over whole images.

    I takes all images of the bank, w_n proportional to exp(-|z - x_n|^2 / (2 sigma^2)), or only the nearest ones, as
    the paper does with an approximate search; here the search is exact.

    Args:
        bank: the training images.
        std: width of the smoothing in x_t, in pixel values.
        neighbors: how many of the nearest images to weigh; None weighs all.
        noise: [draws, C, H, W] the perturbations e of unit variance, the same for every item and noise level; None
            draws them from the seed.
        draws: how many, where they are drawn.
        seed: of the draws. The published code draws anew at every step; a fixed sample makes D a function of z.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        bank: PatchBank,
        std: float,
        neighbors: int | None = None,
        noise: Tensor | None = None,
        draws: int = 10,
        seed: int = 0,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, memory_limit)
        self.std = checks.number("std", std)
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std: got {std}, takes a number from 0")
        self.neighbors = None if neighbors is None else checks.integer("neighbors", neighbors, at_least=1)
        draws = checks.integer("draws", draws, at_least=1)
        generator = torch.Generator().manual_seed(checks.integer("seed", seed) % 2**63)
        if noise is None:
            noise = torch.randn(draws, *bank.shape, generator=generator, dtype=torch.float64)
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            raise TypeError(f"noise: got {type(noise).__name__}, takes a floating point tensor [draws, C, H, W]")
        if noise.ndim != 4 or noise.shape[1:] != bank.shape or not len(noise) or not noise.isfinite().all():
            takes = ", ".join(map(str, bank.shape))
            raise ValueError(f"noise: got shape {list(noise.shape)}, takes finite numbers [draws, {takes}]")
        self.noise = noise

    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        bank, draws = self.bank.of_class(label), len(self.noise)
        width = self.std * (1 + sigma**2) ** 0.5
        perturbed = (z[:, None] + width * self.noise.to(z)).flatten(0, 1)
        logits = -squared_distances(perturbed, bank, self.memory_limit) / (2 * sigma**2)  # [b draws, N]
        if self.neighbors is not None and self.neighbors < len(bank):
            nearest = logits.topk(self.neighbors, 1)
            logits = torch.full_like(logits, -torch.inf).scatter(1, nearest.indices, nearest.values)
        weights = logits.softmax(1).view(len(z), draws, len(bank)).mean(1)
        mean = weighted_mean(weights, bank, z, self.memory_limit)
        return mean, effective(weights), len(z) * len(bank) * draws
