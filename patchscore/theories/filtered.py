"""FilteredMeans: posterior means under filters of any form (Niedoba et al. 2026, arXiv 2605.24192).

A collection has three parts: how much a pixel's distance counts in each of its posterior means (precisions), how much
of each pixel each of them makes (responses), and which images compete (the source). Whole images, windows that stay at
their place and patch composition are collections; soft filters lie between a window and the whole image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from ..scales import ScaleTable
from .composition import Composed, Filters

Table = Tensor | Callable[[float], Tensor]


class FilteredMeans(Composed):
    """D(z)[i] = sum_j R_ji m_j(z)[i] / sum_j R_ji, with m_j(z) = sum_a w_a(j) x_a a posterior mean under filter j.

    w_a(j) is proportional to exp(-sum_n P_jn |z_n - x_an|^2 / (2 sigma^2)), n over pixels, distances over all channels,
    and sums to 1 over the images. With one row of ones this is `IdealScore`; with rows of windows and R the identity,
    `LocalScore`; with P = R the masks of squares, `PatchComposition`.

    Args:
        bank: the training images.
        precisions: [J, H, W] P in units of 1 / sigma^2, from 0; or a function from sigma to them, as of
            `soft_squares`.
        responses: [J, H, W] R, from 0, every pixel made by one at least; or a function from sigma to them; None
            takes P.
        flip: whether mirror images compete too.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        bank: PatchBank,
        precisions: Table,
        responses: Table | None = None,
        flip: bool = False,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, flip, memory_limit)
        self.precisions, self.responses = precisions, responses
        if not callable(precisions) and not callable(responses):
            self._tables(precisions, precisions if responses is None else responses)

    def _tables(self, precisions: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Both [J, H W] in float64, checked."""
        height, width = self.shape[1:]
        for name, given in (("precisions", precisions), ("responses", responses)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: got {type(given).__name__}, takes a tensor [J, {height}, {width}]")
            if given.ndim != 3 or tuple(given.shape[1:]) != (height, width) or not len(given):
                raise ValueError(f"{name}: got shape {list(given.shape)}, takes [J, {height}, {width}]")
            if not (given.isfinite().all() and (given >= 0).all()):
                raise ValueError(f"{name}: takes finite numbers from 0")
        if len(precisions) != len(responses):
            raise ValueError(f"responses: got {len(responses)} rows, precisions have {len(precisions)}")
        if not (responses > 0).any(0).all():
            raise ValueError("responses: a pixel has none, takes one at least for every pixel")
        return precisions.flatten(1).to(torch.float64), responses.flatten(1).to(torch.float64)

    def _windows(self, sigma: float, z: Tensor) -> Filters:
        precisions = self.precisions(sigma) if callable(self.precisions) else self.precisions
        given = precisions if self.responses is None else self.responses
        responses = given(sigma) if callable(given) else given
        counts, makes = self._tables(precisions, responses)
        return Filters(counts.to(z), makes.to(z), self.shape[1:])

    def __repr__(self) -> str:
        return f"FilteredMeans({self.bank!r}{', flip=True' if self.flip else ''})"


def soft_squares(
    shape: tuple[int, int, int], patch_size: int | ScaleTable | Callable[[float], int], whole: float = 0.0
) -> Callable[[float], Tensor]:
    """Precisions for `FilteredMeans`: about each pixel j a Gaussian as wide as a square of side k, and the whole image.

    P_jn = exp(-|j - n|^2 / (2 s^2)) + whole, with s^2 = (k^2 - 1) / 12 the variance of a coordinate in the square. A
    weight is then that of the soft window times that of the whole image to the power `whole`.

    Args:
        shape: (C, H, W) of the images.
        patch_size: k, from 1; a ScaleTable; or a function from sigma to k.
        whole: from 0.

    Returns:
        A function from sigma to [H W, H, W].

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """
    _, height, width = shape
    if checks.number("whole", whole) < 0:
        raise ValueError(f"whole: got {whole}, takes a number from 0")
    side = patch_size if callable(patch_size) else checks.integer("patch_size", patch_size, at_least=1)

    def along(length: int, k: int) -> Tensor:
        """[length, length] one axis; a square of one pixel is that pixel."""
        gap = torch.arange(length, dtype=torch.float64)
        squares = (gap[:, None] - gap).square()
        return (-squares * 6 / (k * k - 1)).exp() if k > 1 else (squares == 0).to(torch.float64)

    def precisions(sigma: float) -> Tensor:
        k = checks.integer("patch_size", side(sigma) if callable(side) else side, at_least=1)
        rows, cols = along(height, k), along(width, k)
        return torch.einsum("am,bn->abmn", rows, cols).reshape(-1, height, width) + whole

    return precisions
