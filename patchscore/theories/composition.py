"""PatchComposition: overlapping posterior-mean patches, averaged (Niedoba et al. 2024, arXiv 2411.19339).

Every k x k square inside the image has a posterior mean of its own, over the squares at the same position of the
training images, and a pixel is the plain mean of all squares that cover it. In the flexible form each pixel has a mask
instead of squares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from ..noise import karras
from ..scales import ScaleTable
from .base import Theory, chunks

PSPC_LEVELS = karras(18).ratios[:-1].tolist()
PSPC_SIDES = (32, 32, 32, 32, 32, 32, 32, 23, 15, 11, 7, 5, 3, 3, 3, 3, 3, 3)
"""Published side of the squares at 18 noise levels of EDM, 80 to 0.002, for 32 x 32 images."""


def pspc_sizes(sigma: float) -> int:
    """The published side of the squares: that of the nearest (by difference) of 18 EDM noise levels."""
    return PSPC_SIDES[min(range(len(PSPC_LEVELS)), key=lambda i: abs(PSPC_LEVELS[i] - sigma))]


def masks_of_heat(heat: Tensor, threshold: float) -> Tensor:
    """[P, H, W] boolean masks of heat maps, such as a network's mean squared gradients.

    Sorted from cold to hot, those pixels belong to a mask whose running share of the map's sum is at least
    1 - threshold.

    Raises:
        TypeError: not a tensor, or a threshold that is not a number.
        ValueError: another shape, negative or infinite heat, a map of zeros, a threshold outside (0, 1].
    """
    if not isinstance(heat, Tensor):
        raise TypeError(f"heat: got {type(heat).__name__}, takes a tensor [P, H, W]")
    if heat.ndim != 3 or not (heat.isfinite().all() and (heat >= 0).all() and (heat.sum((1, 2)) > 0).all()):
        raise ValueError(f"heat: got shape {list(heat.shape)}, takes numbers from 0 [P, H, W], not all 0 in a map")
    if not 0 < checks.number("threshold", threshold) <= 1:
        raise ValueError(f"threshold: got {threshold}, takes a fraction in (0, 1]")
    flat = heat.to(torch.float64).flatten(1)
    values, order = torch.sort(flat, dim=1, stable=True)
    share = values.cumsum(1) / values.sum(1, keepdim=True)
    hot = share >= 1 - threshold
    hot[:, -1] = True  # rounding does not lose the hottest
    return torch.zeros_like(hot).scatter(1, order, hot).view(heat.shape)


class Composed(Theory):
    """D(z)[i] = sum_j R_ji m_j(z)[i] / sum_j R_ji, m_j(z) = sum_a w_a(j) x_a: posterior means of several windows.

    What the windows j are, how a pixel's distance counts in each and how it is made of them, `_windows` says.
    """

    def __init__(self, bank: PatchBank, flip: bool, memory_limit: int):
        super().__init__(bank, memory_limit)
        self.flip = bool(flip)

    @abstractmethod
    def _windows(self, sigma: float, z: Tensor) -> Squares | Filters:
        """The windows at a noise level, in z's precision and on its device."""

    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        bank, windows = self.bank.of_class(label), self._windows(sigma, z)
        b, (channels, height, width) = len(z), self.shape
        copies = 2 if self.flip else 1
        image_bytes = 8 * copies * b * (3 * channels * height * width + 4 * (windows.count + height * width))
        cover = windows.spread(z.new_ones(1, windows.count))  # [1, H, W] how many windows cover a pixel

        def weights_of(x: Tensor) -> Tensor:
            """[b, n, windows] log-weights."""
            return windows.gather((z[:, None] - x).square().sum(2)) / (-2 * sigma**2)

        # First the normaliser of every window, then the weights.
        largest = z.new_full((b, windows.count), -torch.inf)
        total = z.new_zeros(b, windows.count)
        for _, x in chunks(bank, z, image_bytes, self.memory_limit):
            logits = weights_of(self._with_mirrored(x))
            m = torch.maximum(largest, logits.amax(1))
            total = total * (largest - m).exp() + (logits - m[:, None]).exp().sum(1)
            largest = m
        mean, squares = torch.zeros_like(z), z.new_zeros(b, height, width)
        for _, x in chunks(bank, z, image_bytes, self.memory_limit):
            competing = self._with_mirrored(x)
            w = (weights_of(competing) - largest[:, None]).exp() / total[:, None]
            share = windows.spread(w) / cover  # [b, n, H, W]
            mean += torch.einsum("bnhw,nchw->bchw", share, competing)
            squares += share.square().sum(1)
        return mean, 1 / squares, b * copies * len(bank) * windows.count

    def _with_mirrored(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(-1)]) if self.flip else x


class PatchComposition(Composed):
    """D(z)[i] = the mean over the squares S that cover pixel i of sum_a w_a(S) x_a[i], each S with its own posterior.

    w_a(S) is proportional to exp(-|z - x_a|^2 / (2 sigma^2)) on the square, and sums to 1 over the images. Squares lie
    inside the image; distances are over all channels. The average is taken on the weights: with n_i the number of
    squares that cover pixel i, D_i = (1 / n_i) `sum_a x_ai Box_k[w_a](i)`, a running sum at any k.

    Args:
        bank: the training images.
        patch_size: side k of the squares, odd or even; a ScaleTable; or a function from sigma to k, such as
            `pspc_sizes`, the published one. Cut to the image's smaller side.
        flip: whether mirror images compete too, as by default in the published program.
        masks: instead of squares, for the flexible form: [P, H, W] booleans, or a function from sigma to them;
            `masks_of_heat` makes them. Every pixel must lie in one.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | ScaleTable | Callable[[float], int] | None = None,
        flip: bool = False,
        masks: Tensor | Callable[[float], Tensor] | None = None,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, flip, memory_limit)
        if (patch_size is None) == (masks is None):
            raise ValueError("patch_size, masks: takes one of the two")
        self.patch_size = patch_size
        if patch_size is not None and not callable(patch_size):
            self.patch_size = checks.integer("patch_size", patch_size, at_least=1)
        self.masks = masks
        if masks is not None and not callable(masks):
            self._cover(masks)

    def _cover(self, masks: Tensor) -> Tensor:
        """[P, H W] the masks as numbers, checked."""
        height, width = self.shape[1:]
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            raise TypeError("masks: takes a boolean tensor [P, H, W]")
        if masks.ndim != 3 or tuple(masks.shape[1:]) != (height, width) or not masks.any(0).all():
            got = list(masks.shape)
            raise ValueError(f"masks: got shape {got}, takes [P, {height}, {width}] with every pixel in one")
        return masks.flatten(1).to(torch.float64)

    def _windows(self, sigma: float, z: Tensor) -> Squares | Filters:
        if self.masks is not None:
            masks = self._cover(self.masks(sigma) if callable(self.masks) else self.masks).to(z)
            return Filters(masks, masks, self.shape[1:])
        k = self.patch_size(sigma) if callable(self.patch_size) else self.patch_size
        return Squares(min(checks.integer("patch_size", k, at_least=1), *self.shape[1:]), self.shape[1:])

    def __repr__(self) -> str:
        windows = f"patch_size={self.patch_size!r}" if self.masks is None else "masks"
        return f"PatchComposition({self.bank!r}, {windows}{', flip=True' if self.flip else ''})"


class Squares:
    """All k x k squares inside an image."""

    def __init__(self, k: int, shape: tuple[int, int]):
        self.k = k
        self.rows, self.cols = (length - k + 1 for length in shape)
        self.count = self.rows * self.cols

    def gather(self, x: Tensor) -> Tensor:
        """[..., H, W] -> [..., count], the sum over each square."""
        return _box(x, self.k).flatten(-2)

    def spread(self, w: Tensor) -> Tensor:
        """[..., count] -> [..., H, W], the sum over the squares that cover a pixel: the transpose of `gather`."""
        return _box(F.pad(w.view(*w.shape[:-1], self.rows, self.cols), [self.k - 1] * 4), self.k)


class Filters:
    """Windows of any form: how much a pixel's distance counts in each, and how much of a pixel each makes; [J, H W]."""

    def __init__(self, precisions: Tensor, responses: Tensor, shape: tuple[int, int]):
        self.precisions, self.responses = precisions, responses
        self.shape = shape
        self.count = len(precisions)

    def gather(self, x: Tensor) -> Tensor:
        """[..., H, W] -> [..., count], the weighted sum over each window."""
        return x.flatten(-2) @ self.precisions.T

    def spread(self, w: Tensor) -> Tensor:
        """[..., count] -> [..., H, W], the weighted sum over the windows that make a pixel."""
        return (w @ self.responses).view(*w.shape[:-1], *self.shape)


def _box(x: Tensor, k: int) -> Tensor:
    """Sums over k x k squares of the last two axes, by differences of running sums."""
    for axis in (-1, -2):
        total = F.pad(x.cumsum(axis), (1, 0) if axis == -1 else (0, 0, 1, 0))
        length = x.shape[axis] - k + 1
        x = total.narrow(axis, k, length) - total.narrow(axis, 0, length)
    return x
