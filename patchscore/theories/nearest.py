"""NearestScore: the training image nearest to the noisy one, a baseline of Lukoianov et al. 2025 (arXiv 2509.09672)."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from .base import Theory, squared_distances

SCALINGS = ("preserving", "exploding")


class NearestScore(Theory):
    """D(z) = the bank's image nearest to x_t in L2; the first of several equally near ones.

    The published baseline looks for the image nearest to x_t = z / sqrt(1 + sigma^2) rather than to z, which at high
    noise is another one: x_t has the spread of an image where z has that of noise.

    Args:
        bank: the training images.
        scaling: "preserving", x_t as published; or "exploding", z itself, the limit of `IdealScore` as sigma -> 0.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    def __init__(self, bank: PatchBank, scaling: str = "preserving", memory_limit: int = DEFAULT_MEMORY_LIMIT):
        super().__init__(bank, memory_limit)
        self.scaling = checks.one_of("scaling", scaling, SCALINGS)

    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        bank = self.bank.of_class(label)
        x = z / (1 + sigma**2) ** 0.5 if self.scaling == "preserving" else z
        nearest = squared_distances(x, bank, self.memory_limit).argmin(1).tolist()
        mean = bank.take(nearest).chunk(0, len(nearest), z.dtype, z.device)
        return mean, z.new_ones(len(z), 1, 1), len(z) * len(bank)
