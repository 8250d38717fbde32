"""PcaLocality: local denoising whose windows come from the data's covariance (Lukoianov et al. 2025, arXiv 2509.09672).

The Wiener filter A = S (S + sigma^2)^-1 of the training images says how much pixel n moves the denoised pixel m. Where
its entry is large enough, n belongs to the window of m; each pixel then has the posterior mean of the images that
resemble z in its window, at the same position.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT
from ..gaussian import Axes, GaussianScore
from ..posterior import PosteriorSum, accumulator_dtype
from .base import Theory, chunks

SMALL = 1e-6
"""Diagonal entries of the filter below this count as 1, as published: pixels that hardly vary."""
KEPT = 256 * 2**20
"""Bytes of masks that are kept between calls: those of all levels of a usual schedule, as booleans at 32 x 32 x 3."""


def locality_mask(axes: Axes, sigma: float, threshold: float) -> Tensor:
    """[d, d] the window of every pixel and channel at a noise level: B[n, m] is whether m's distance counts n.

    With A = U diag(lambda / (lambda + sigma^2)) U^T of the variances in `axes` (sample covariance, n - 1) and
    M[n, m] = A[n, m] / A[n, n], B is |M| >= threshold max |M|; with threshold 0 it is M itself, signs and all. Diagonal
    entries of A below 1e-6 in size are taken as 1.
    """
    gain = axes.variances / (axes.variances + sigma**2)
    a = (axes.basis * gain) @ axes.basis.T
    diagonal = a.diagonal()
    diagonal.copy_(torch.where(diagonal.abs() < SMALL, torch.ones_like(diagonal), diagonal))
    m = a / diagonal.clone()[:, None]
    if threshold == 0:
        return m
    return m.abs() >= threshold * m.abs().max()


class Masks:
    """`locality_mask` of a bank, made once for each class and noise level and kept as far as `KEPT` goes."""

    def __init__(self, bank: PatchBank, threshold: float, memory_limit: int):
        self.threshold = checks.number("threshold", threshold)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, takes a number in [0, 1]")
        self.memory_limit = memory_limit
        self.gaussian = GaussianScore(bank, ddof=1, memory_limit=memory_limit)
        self.made: OrderedDict[tuple[int | None, float, torch.device], Tensor] = OrderedDict()

    def __call__(self, label: int | None, sigma: float, device: torch.device) -> Tensor:
        """[d, d] in the device's widest floating point type."""
        d = math.prod(self.gaussian.bank.shape)
        if (needed := 8 * 4 * d * d) > self.memory_limit:
            raise ValueError(
                f"memory_limit: the PCA mask of {d} pixels and channels takes {needed / 2**30:.2g} GiB, the limit is "
                f"{self.memory_limit / 2**30:.2g} GiB; take smaller images, or more memory"
            )
        key = (label, sigma, device)
        if key not in self.made:
            mask = locality_mask(self.gaussian.axes(label, device), sigma, self.threshold)
            self.made[key] = mask
            while len(self.made) > 1 and sum(one.nbytes for one in self.made.values()) > KEPT:
                self.made.popitem(last=False)
        self.made.move_to_end(key)
        return self.made[key].to(accumulator_dtype(device))


def masked_sum(z: Tensor, x: Tensor, mask: Tensor, scale: float) -> PosteriorSum:
    """Sums over images x [n or b, n, d] with log-weights -sum_n (z_n - x_n)^2 mask[n, m] / scale at every pixel m.

    z is [b, d]. Pixels and channels are rows of the result: m, s and s2 are [b, 1, d, 1].
    """
    x = x.expand(len(z), -1, -1)
    logits = (z[:, None] - x).square() @ mask / -scale  # [b, n, d]
    m = logits.amax(1, keepdim=True)
    w = (logits - m).exp()
    parts = (m, w.sum(1, keepdim=True), (w * x).sum(1, keepdim=True), w.square().sum(1, keepdim=True))
    return PosteriorSum(*(part[..., None] for part in parts))


class PcaLocality(Theory):
    """D(z)[m] = sum_a w_a(m) x_a[m], w_a(m) proportional to exp(-sum_n B[n, m] (z_n - x_an)^2 / (2 sigma^2 T)).

    n and m run over pixels and channels, and B is the mask of `locality_mask`. With labels, mask and images are those
    of the class. `ess` is the mean over the channels of a pixel.

    Args:
        bank: the training images.
        threshold: the least entry of the normalised filter that counts, as a fraction of the largest, in [0, 1].
        temperature: T, a factor of sigma^2.
        batch_size: None is the posterior mean over all images. The published code takes a softmax in each batch of its
            loader and the plain mean of the batches' answers, the last, shorter one counting as much; a number of
            images does the same, in the order of the bank.
        memory_limit: bytes of working memory beyond the bank.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; when it denoises, images too large for a mask within
            `memory_limit` (d^2 numbers for d pixels and channels), or one image alone, which has no covariance.
    """

    def __init__(
        self,
        bank: PatchBank,
        threshold: float = 0.005,
        temperature: float = 1.0,
        batch_size: int | None = None,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ):
        super().__init__(bank, memory_limit)
        self.temperature = check_temperature(temperature)
        self.batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, at_least=1)
        self.masks = Masks(bank, threshold, self.memory_limit)

    def _posterior(self, z: Tensor, sigma: float, label: int | None) -> tuple[Tensor, Tensor, int]:
        bank = self.bank.of_class(label)
        mask = self.masks(label, sigma, z.device)
        b, d = len(z), z[0].numel()
        size = self.batch_size or len(bank)
        batches = [bank.take(range(i, min(i + size, len(bank)))) for i in range(0, len(bank), size)]
        mean, squares = z.new_zeros(b, 1, d, 1), z.new_zeros(b, 1, d, 1)
        everything = slice(None)
        for batch in batches:
            total = PosteriorSum.empty((b, 1, d, 1), z.device)
            for _, x in chunks(batch, z, 8 * 4 * b * d, self.memory_limit):
                part = masked_sum(z.flatten(1), x.flatten(1), mask, 2 * sigma**2 * self.temperature)
                total.add_(part, everything, everything, everything)
            mean += total.mean / len(batches)
            squares += 1 / total.ess / len(batches) ** 2
        return mean.view(z.shape), per_pixel(1 / squares, z), b * len(bank) * d

    def __repr__(self) -> str:
        batches = "" if self.batch_size is None else f", batch_size={self.batch_size}"
        return f"PcaLocality({self.bank!r}, threshold={self.masks.threshold:g}{batches})"


def per_pixel(ess: Tensor, z: Tensor) -> Tensor:
    """[b, 1, d, 1] effective sample sizes of pixels and channels as [b, H, W], the mean over channels."""
    return ess.view(z.shape).mean(1)


def check_temperature(temperature: float) -> float:
    number = checks.number("temperature", temperature)
    if not 0 < number < float("inf"):
        raise ValueError(f"temperature: got {temperature}, takes a positive number")
    return number
