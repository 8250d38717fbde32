"""GaussianScore: the optimal denoiser of a Gaussian with the bank's mean and covariance, the Wiener filter.

With mu and Sigma = U diag(lambda) U^T the mean and covariance of the training images, everything is diagonal in U: the
posterior mean, the probability flow from one noise level to another, and the marginal at any level. At high noise every
score of the bank looks like this one (Wang & Vastola, "The unreasonable effectiveness of Gaussian score approximation
for diffusion models and its applications", 2024), so that a sampler may start with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .denoiser import (
    DEFAULT_MEMORY_LIMIT,
    Denoiser,
    Estimate,
    Labels,
    check_direction,
    check_labels,
    check_noisy,
    check_sigma,
)
from .posterior import accumulator_dtype

T = TypeVar("T")

RELATIVE_NULL = 1e-12
"""Variances below this fraction of the largest are rounding error of a float64 decomposition, and are set to 0."""


@dataclass(frozen=True)
class Axes:
    """Mean and principal axes of n images of d = C H W pixels.

    Attributes:
        n: number of images.
        mean: [d] mu.
        basis: [d, r] U, orthonormal columns.
        variances: [r] lambda, descending; 0 outside the span of U.
    """

    n: int
    mean: Tensor
    basis: Tensor
    variances: Tensor

    def to(self, device: torch.device) -> Axes:
        dtype = accumulator_dtype(device)
        mean, basis, variances = (x.to(device, dtype) for x in (self.mean, self.basis, self.variances))
        return Axes(self.n, mean, basis, variances)


class GaussianScore(Denoiser):
    """The optimal denoiser for a Gaussian N(mu, Sigma) with the mean and covariance of the bank, the Wiener filter.

        D(z) = mu + U diag(lambda / (lambda + sigma^2)) U^T (z - mu)

    With labels, mu and Sigma are those of the class; each class is decomposed once, when it is first used. Arithmetic
    is float64 wherever the device supports it.

    `estimate` has stderr 0 and pairs 0, because it evaluates no window. D(z) is a weighted sum of the training images,
    w_n = 1 / N + (x_n - mu)^T a / (N - ddof) with a = (Sigma + sigma^2)^-1 (z - mu), and ess is the effective sample
    size (sum w)^2 / sum w^2 = 1 / (1 / N + a^T Sigma a / (N - ddof)), the same at all pixels.

    Args:
        bank: the training images.
        rank: number of leading principal axes to keep (by a randomized SVD that streams over the bank); the variance
            along all others is taken as 0. None keeps all.
        memory_limit: bytes that a decomposition may use.
        ddof: the covariance is divided by N - ddof: 0 as in PSPC (Niedoba et al. 2024), 1 as in Lukoianov et al. 2025.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; on the first use of a class, a decomposition that needs more than
            `memory_limit`, or no more than `ddof` images.
    """

    def __init__(
        self, bank: PatchBank, rank: int | None = None, memory_limit: int = DEFAULT_MEMORY_LIMIT, ddof: int = 0
    ):
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
        self.bank = bank
        self.shape = bank.shape
        self.rank = None if rank is None else checks.integer("rank", rank, at_least=1)
        self.memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)
        self.ddof = checks.integer("ddof", ddof, at_least=0, at_most=1)
        self._axes: dict[tuple[int | None, torch.device], Axes] = {}

    def axes(self, label: int | str | None = None, device: torch.device | str = "cpu") -> Axes:
        """Mean and principal axes of a class, or of the whole bank for None."""
        (known,) = check_labels([label], self.bank, 1)
        home, asked = torch.device("cpu"), torch.device(device)
        if (known, home) not in self._axes:
            bank = self.bank if known is None else self.bank.select(known)
            if len(bank) <= self.ddof:
                raise ValueError(f"ddof: got {self.ddof}, with {len(bank)} image there is no covariance; takes 0")
            axes = principal_axes(bank, self.rank, self.memory_limit)
            self._axes[known, home] = replace(axes, variances=axes.variances * (axes.n / (axes.n - self.ddof)))
        if (known, asked) not in self._axes:
            self._axes[known, asked] = self._axes[known, home].to(asked)
        return self._axes[known, asked]

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        """As of `Denoiser`; the entropy of a pixel is the differential entropy of its Gaussian posterior.

        The posterior covariance is P = U diag(lambda sigma^2 / (lambda + sigma^2)) U^T at every z. With P_i the C x C
        block of pixel i, its entropy is ln det(2 pi e P_i) / 2 nats, -inf where a channel is certain.
        """
        z = check_noisy(z, self.shape, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        mean, ess = torch.empty_like(z), z.new_empty(len(z), *z.shape[2:])
        variance, entropy = (torch.empty_like(z), torch.empty_like(ess)) if moments else (None, None)
        for label, items in self._by_class(labels, len(z)):
            axes = self.axes(label, z.device)
            noise_variance = sigmas[items, None].to(axes.mean) ** 2
            c = (z[items].flatten(1).to(axes.mean) - axes.mean) @ axes.basis  # [b, r] coordinates along U
            total = axes.variances + noise_variance
            mean[items] = (axes.mean + (c * axes.variances / total) @ axes.basis.T).view(-1, *self.shape).to(z.dtype)
            spread = (axes.variances * (c / total) ** 2).sum(1)  # a^T Sigma a
            sizes = 1 / (1 / axes.n + spread / (axes.n - self.ddof))
            ess[items] = sizes.to(z.dtype)[:, None, None].expand(-1, *z.shape[2:])
            if variance is not None and entropy is not None:
                for item in items:
                    blocks = self._pixel_covariances(axes, sigmas[item].item())
                    variance[item] = blocks.diagonal(dim1=-2, dim2=-1).T.reshape(self.shape).to(z.dtype)
                    blocks = 2 * math.pi * math.e * blocks
                    entropy[item] = (blocks.logdet() / 2).nan_to_num(nan=-math.inf).view(self.shape[1:]).to(z.dtype)
        estimate = Estimate(mean, torch.zeros_like(mean), ess, 0, "closed-form", variance, entropy)
        if not moments:
            return estimate
        return replace(estimate, variance_stderr=torch.zeros_like(mean), entropy_stderr=torch.zeros_like(ess))

    @torch.no_grad()
    def with_divergence(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        """As of `Denoiser`; the divergence is sum lambda / (lambda + sigma^2), the same at every z."""
        mean = self.denoise(z, sigma, labels)
        sigmas = check_sigma(sigma, len(z))
        found = mean.new_empty(len(z), dtype=accumulator_dtype(z.device))
        for label, items in self._by_class(labels, len(z)):
            variances = self.axes(label, z.device).variances
            found[items] = (variances / (variances + sigmas[items, None].to(variances) ** 2)).sum(1)
        return mean, found

    @torch.no_grad()
    def vjp(self, z: Tensor, sigma: float | Tensor, u: Tensor, labels: Labels = None) -> Tensor:
        """As of `Denoiser`: J = U diag(lambda / (lambda + sigma^2)) U^T is its own transpose, the same at every z."""
        z = check_noisy(z, self.shape)
        u, sigmas, product = check_direction(u, z, "u"), check_sigma(sigma, len(z)), torch.empty_like(z)
        for label, items in self._by_class(labels, len(z)):
            axes = self.axes(label, z.device)
            gain = axes.variances / (axes.variances + sigmas[items, None].to(axes.mean) ** 2)
            along = u[items].flatten(1).to(axes.mean) @ axes.basis
            product[items] = ((along * gain) @ axes.basis.T).view(-1, *self.shape).to(z.dtype)
        return product

    def jvp(self, z: Tensor, sigma: float | Tensor, t: Tensor, labels: Labels = None) -> Tensor:
        return self.vjp(z, sigma, check_direction(t, check_noisy(z, self.shape), "t"), labels)

    def _pixel_covariances(self, axes: Axes, sigma: float) -> Tensor:
        """[H W, C, C] posterior covariance of the channels of every pixel."""
        spread = axes.variances * sigma**2 / (axes.variances + sigma**2)
        basis = axes.basis.view(self.shape[0], -1, len(spread)).transpose(0, 1)  # [H W, C, r]
        return (basis * spread) @ basis.mT

    @torch.no_grad()
    def flow(self, z: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor, labels: Labels = None) -> Tensor:
        """The probability-flow ODE dz/dsigma = (z - D(z)) / sigma, solved exactly from one noise level to another.

            z_b = mu + U diag(sqrt((lambda + sigma_b^2) / (lambda + sigma_a^2))) U^T (z_a - mu)

        and outside U, where lambda = 0, z_b - mu shrinks by sigma_b / sigma_a. Wang & Vastola 2024, section 4.

        Args:
            z: [B, C, H, W] at sigma_from.
            sigma_from: noise level of z, a number or [B].
            sigma_to: noise level of the result, likewise; either may be the larger.
            labels: as in `denoise`.

        Returns:
            [B, C, H, W] at sigma_to, float64 if z is, else float32.
        """
        z = check_noisy(z, self.shape, who=type(self).__name__)
        start, end = check_sigma(sigma_from, len(z)), check_sigma(sigma_to, len(z))
        moved = torch.empty_like(z)
        for label, items in self._by_class(labels, len(z)):
            axes = self.axes(label, z.device)
            a, b = (level[items, None].to(axes.mean) for level in (start, end))
            gain = ((axes.variances + b**2) / (axes.variances + a**2)).sqrt()
            offset = z[items].flatten(1).to(axes.mean) - axes.mean
            moved[items] = self._stretch(axes, offset, gain, outside=b / a).to(z.dtype)
        return moved

    @torch.no_grad()
    def marginal(self, noise: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """Maps white noise to a draw from the marginal at a noise level: mu + (Sigma + sigma^2)^(1/2) noise.

        This is the limit of the probability flow that starts from z = sigma' noise, as sigma' -> infinity.

        Args:
            noise: [B, C, H, W] white noise of variance 1.
            sigma: noise level, a number or [B].
            labels: as in `denoise`.
        """
        noise = check_noisy(noise, self.shape)
        sigmas = check_sigma(sigma, len(noise))
        drawn = torch.empty_like(noise)
        for label, items in self._by_class(labels, len(noise)):
            axes = self.axes(label, noise.device)
            level = sigmas[items, None].to(axes.mean)
            gain = (axes.variances + level**2).sqrt()
            drawn[items] = self._stretch(axes, noise[items].flatten(1).to(axes.mean), gain, outside=level).to(
                noise.dtype
            )
        return drawn

    @torch.no_grad()
    def log_density(self, z: Tensor, sigma: float | Tensor, labels: Labels = None) -> Tensor:
        """ln N(z; mu, Sigma + sigma^2): [B] in nats, float64 wherever the device has it.

        Args:
            z: [B, C, H, W].
            sigma: noise level, a number or [B].
            labels: as in `denoise`.
        """
        z = check_noisy(z, self.shape)
        sigmas = check_sigma(sigma, len(z))
        found = z.new_empty(len(z), dtype=accumulator_dtype(z.device))
        for label, items in self._by_class(labels, len(z)):
            axes = self.axes(label, z.device)
            noise_variance = sigmas[items, None].to(axes.mean) ** 2
            offset = z[items].flatten(1).to(axes.mean) - axes.mean
            c = offset @ axes.basis
            total = axes.variances + noise_variance
            outside = offset.square().sum(1) - c.square().sum(1)  # of U, where the variance is sigma^2
            squared = (c**2 / total).sum(1) + outside / noise_variance[:, 0]
            others = offset.shape[1] - c.shape[1]
            log_det = total.log().sum(1) + others * noise_variance[:, 0].log()
            found[items] = -(squared + log_det + offset.shape[1] * math.log(2 * math.pi)) / 2
        return found

    def _stretch(self, axes: Axes, offset: Tensor, gain: Tensor, outside: Tensor) -> Tensor:
        """mu + U diag(gain) U^T offset + outside (1 - U U^T) offset."""
        stretched = axes.mean + outside * offset + (offset @ axes.basis * (gain - outside)) @ axes.basis.T
        return stretched.view(-1, *self.shape)

    def _by_class(self, labels: Labels, batch: int) -> list[tuple[int | None, list[int]]]:
        parts: dict[int | None, list[int]] = {}
        for item, label in enumerate(check_labels(labels, self.bank, batch)):
            parts.setdefault(label, []).append(item)
        return list(parts.items())

    def __repr__(self) -> str:
        ddof = f", ddof={self.ddof}" if self.ddof else ""
        return f"GaussianScore({self.bank!r}, rank={self.rank}{ddof})"


def principal_axes(bank: PatchBank, rank: int | None = None, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> Axes:
    """Mean, principal axes and variances of a bank, in float64 on the CPU.

    All axes come from the covariance [d, d] or, where there are fewer images than pixels, from the Gram matrix [n, n].
    The leading `rank` of them come from a randomized SVD that never holds more than [d, rank].

    Raises:
        ValueError: the decomposition needs more than `memory_limit` bytes.
    """
    n, d = len(bank), math.prod(bank.shape)
    mean = sum(_centred(bank, start, stop, 0).sum(0) for start, stop in _chunks(n, d)) / n
    assert isinstance(mean, Tensor)
    if rank is not None and rank + OVERSAMPLING < min(n, d):
        _check_memory(bank, f"rank={rank}", 8 * 4 * d * (rank + OVERSAMPLING), memory_limit)
        basis, variances = _randomized(bank, mean, rank)
    elif n <= d:
        _check_memory(bank, f"all {n} images", 8 * (4 * n * n + 2 * n * d), memory_limit)
        centred = _centred(bank, 0, n, mean)
        variances, weights = torch.linalg.eigh(centred @ centred.T / n)
        kept = variances > RELATIVE_NULL * variances[-1]
        variances = variances[kept]
        basis = centred.T @ (weights[:, kept] / (n * variances).sqrt())
    else:
        _check_memory(bank, f"all {d} pixels", 8 * 4 * d * d, memory_limit)
        covariance = torch.zeros(d, d, dtype=torch.float64)
        for start, stop in _progress(_chunks(n, d)):
            centred = _centred(bank, start, stop, mean)
            covariance.addmm_(centred.T, centred, alpha=1 / n)
        variances, basis = torch.linalg.eigh(covariance)
        kept = variances > RELATIVE_NULL * variances[-1]
        variances, basis = variances[kept], basis[:, kept]
    leading = slice(None) if rank is None else slice(rank)
    return Axes(n, mean, basis.flip(1)[:, leading].contiguous(), variances.flip(0)[leading])


OVERSAMPLING = 16
POWER_ITERATIONS = 8


def _randomized(bank: PatchBank, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading axes by subspace iteration on a random start (Halko et al. 2011, algorithms 4.4 and 5.3), ascending."""
    start = torch.randn(len(mean), rank + OVERSAMPLING, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    for _ in _progress(range(POWER_ITERATIONS)):
        basis = torch.linalg.qr(_covariance_times(bank, mean, basis)).Q
    # Rayleigh-Ritz: the covariance within the subspace, diagonalised.
    variances, turn = torch.linalg.eigh(basis.T @ _covariance_times(bank, mean, basis))
    return basis @ turn, variances.clamp(min=0)


def _covariance_times(bank: PatchBank, mean: Tensor, basis: Tensor) -> Tensor:
    product = torch.zeros_like(basis)
    for start, stop in _chunks(len(bank), len(mean)):
        centred = _centred(bank, start, stop, mean)
        product.addmm_(centred.T, centred @ basis, alpha=1 / len(bank))
    return product


def _chunks(n: int, d: int) -> list[tuple[int, int]]:
    """Ranges of images that take 64 MiB in float64."""
    step = max(1, (64 << 20) // (8 * d))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _progress(work: Sequence[T]) -> tqdm[T]:
    return tqdm(work, desc="principal axes", delay=2)


def _centred(bank: PatchBank, start: int, stop: int, mean: Tensor | int) -> Tensor:
    """[stop - start, d] images minus their mean."""
    return bank.chunk(start, stop, torch.float64, "cpu").flatten(1) - mean


def _check_memory(bank: PatchBank, what: str, needed: int, memory_limit: int) -> None:
    if needed > memory_limit:
        raise ValueError(
            f"memory_limit: principal axes of {bank!r} for {what} take {needed / 2**30:.2g} GiB, the limit is "
            f"{memory_limit / 2**30:.2g} GiB; give a smaller rank, or more memory"
        )
