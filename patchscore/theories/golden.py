"""GoldenSubset: PCA locality over few, well chosen images (arXiv 2602.16498).

Most images have no weight. A random part of the bank is searched at low resolution, the best of it at full resolution,
and only what remains is weighed. The less noise, the fewer remain; the more noise, the less is searched. An
approximation of `PcaLocality`, and random.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from .base import Theory, chunks, squared_distances
from .pca import Masks, check_temperature, masked_sum, per_pixel


class GoldenSubset(Theory):
    """`PcaLocality` over a subset of the images, chosen for each item. With v = sigma / sqrt(1 + sigma^2):

    - round(k_max + (N - k_max) (1 - v)) images are drawn uniformly at random;
    - of those, the k_max nearest to z after average pooling to low_res x low_res pixels;
    - of those, the round(k_max - (k_max - k_min) (1 - v)) nearest to z at full resolution.

    The mask is that of the whole bank (of the class, with labels).

    Args:
        bank: the training images.
        k_min: images that remain as sigma -> 0; None takes N / 20, as published for CIFAR-10, rounded up.
        k_max: images that remain as sigma -> infinity; None takes N / 10, likewise.
        low_res: side in pixels of the coarse search; at most the image's smaller side.
        threshold: as of `PcaLocality`; 0.02 as published.
        temperature: likewise.
        seed: of the draw, which depends on the seed and sigma alone: an item's answer does not depend on its batch.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; when it denoises, as `PcaLocality`.
    """

    def __init__(
        self,
        bank: PatchBank,
        k_min: int | None = None,
        k_max: int | None = None,
        low_res: int = 8,
        threshold: float = 0.02,
        temperature: float = 1.0,
        seed: int = 0,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, memory_limit)
        self.k_min = None if k_min is None else checks.integer("k_min", k_min, at_least=1)
        self.k_max = None if k_max is None else checks.integer("k_max", k_max, at_least=self.k_min or 1)
        self.low_res = checks.integer("low_res", low_res, at_least=1)
        self.temperature = check_temperature(temperature)
        self.seed = checks.integer("seed", seed)
        self.masks = Masks(bank, threshold, self.memory_limit)

    def sizes(self, n: int, sigma: float) -> tuple[int, int, int]:
        """(drawn, kept at low resolution, kept at full resolution) of n images at a noise level."""
        most = min(n, -(-n // 10) if self.k_max is None else self.k_max)
        least = min(most, -(-n // 20) if self.k_min is None else self.k_min)
        clean = 1 - sigma / (1 + sigma**2) ** 0.5
        return round(most + (n - most) * clean), most, round(most - (most - least) * clean)

    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        bank = self.bank.of_class(label)
        mask = self.masks(label, sigma, z.device)
        drawn, coarse, fine = self.sizes(len(bank), sigma)
        entropy = [self.seed % 2**64, int(np.float64(sigma).view(np.uint64))]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        searched = bank.take(torch.randperm(len(bank), generator=generator)[:drawn].sort().values)

        side = min(self.low_res, *z.shape[2:])
        pixels = z[0].numel()
        pooled = [_pooled(x, side) for _, x in chunks(searched, z, 8 * 4 * pixels, self.memory_limit)]
        near = torch.cdist(_pooled(z, side), torch.cat(pooled)).topk(coarse, 1, largest=False)
        mean, ess = torch.empty_like(z), z.new_empty(len(z), *z.shape[2:])
        for i, candidates in enumerate(near.indices.cpu()):
            some = searched.take(candidates)
            order = squared_distances(z[i : i + 1], some, self.memory_limit)[0].topk(fine, largest=False).indices
            x = some.take(order).chunk(0, fine, z.dtype, z.device).flatten(1)
            total = masked_sum(z[i : i + 1].flatten(1), x, mask, 2 * sigma**2 * self.temperature)
            mean[i], ess[i] = total.mean.view(z[i].shape), per_pixel(total.ess, z[i : i + 1])[0]
        return mean, ess, len(z) * fine * pixels


def _pooled(x: Tensor, side: int) -> Tensor:
    """[n, C, H, W] -> [n, C side^2], averages over a grid of side x side parts."""
    return F.adaptive_avg_pool2d(x, side).flatten(1)
