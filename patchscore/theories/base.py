"""What the theories share: checks, items of one class and noise level served together, and whole-image distances."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import (
    DEFAULT_MEMORY_LIMIT,
    Denoiser,
    Estimate,
    Labels,
    alike,
    check_labels,
    check_noisy,
    check_sigma,
)
from ..posterior import accumulator_dtype

TILE_BYTES = 64 * 2**20
"""Working memory of a tile, where `memory_limit` allows it; larger ones leave the caches."""


class Theory(Denoiser):
    """A denoiser that weighs the images of a bank; sums are float64 wherever the device has it.

    Args:
        bank: the training images.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    def __init__(self, bank: PatchBank, memory_limit: int = DEFAULT_MEMORY_LIMIT):
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
        self.bank = bank
        self.shape = bank.shape
        self.memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        if moments:
            raise ValueError(f"moments: {type(self).__name__} gives the mean alone")
        z = check_noisy(z, self.shape)
        sigmas = check_sigma(sigma, len(z)).tolist()
        classes = check_labels(labels, self.bank, len(z))
        exact = accumulator_dtype(z.device)
        mean, ess, pairs = torch.empty_like(z), z.new_empty(len(z), *z.shape[2:]), 0
        for (label, level), items in alike(list(zip(classes, sigmas, strict=True))):
            some, number, counted = self._posterior(z[items].to(exact), level, label)
            mean[items], ess[items] = some.to(z.dtype), number.to(z.dtype)
            pairs += counted
        return Estimate(mean, torch.zeros_like(mean), ess, pairs, type(self).__name__)

    @abstractmethod
    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        """The items of one noise level and class: mean [b, C, H, W], ess [b, H, W] (or what broadcasts), pairs."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bank!r})"


def chunks(bank: PatchBank, z: Tensor, bytes_per_image: int, memory_limit: int) -> Iterator[tuple[int, Tensor]]:
    """The bank in pieces that fit, as (number of the first image, values [n, C, H, W] as z's).

    Raises:
        ValueError: `memory_limit` cannot hold one image's share.
    """
    if bytes_per_image > memory_limit:
        raise ValueError(f"memory_limit: got {memory_limit} bytes, one image takes {bytes_per_image}")
    count = max(1, min(TILE_BYTES, memory_limit) // bytes_per_image)
    for start in range(0, len(bank), count):
        yield start, bank.chunk(start, start + count, z.dtype, z.device)


def squared_distances(z: Tensor, bank: PatchBank, memory_limit: int) -> Tensor:
    """[b, N] squared distance of every item to every image of the bank, whole images."""
    b, pixels = len(z), z[0].numel()
    found = z.new_empty(b, len(bank))
    flat = z.flatten(1)
    for start, x in chunks(bank, z, 8 * (3 * pixels + b), memory_limit):
        p = x.flatten(1)
        part = flat.square().sum(1, keepdim=True) - 2 * flat @ p.T + p.square().sum(1)
        found[:, start : start + len(x)] = part.clamp(min=0)
    return found


def weighted_mean(weights: Tensor, bank: PatchBank, z: Tensor, memory_limit: int) -> Tensor:
    """[b, C, H, W], the images of the bank weighted by [b, N] weights that sum to 1."""
    total = z.new_zeros(len(weights), z[0].numel())
    for start, x in chunks(bank, z, 8 * 3 * z[0].numel(), memory_limit):
        total.addmm_(weights[:, start : start + len(x)], x.flatten(1))
    return total.view(len(weights), *z.shape[1:])


def effective(weights: Tensor) -> Tensor:
    """[b, 1, 1] effective sample size of [b, N] weights that sum to 1."""
    return (1 / weights.square().sum(1))[:, None, None]
