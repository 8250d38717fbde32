"""Conditioned: a denoiser given a measurement y = A x_0 + n, for inpainting, super-resolution, deblurring.

With x_0 given z taken as a Gaussian of mean D and covariance Cov, the posterior mean given y too is Kalman's update:

    D_y(z) = D(z) + Cov A^T S^-1 (y - A D(z)),    S = noise^2 + A Cov A^T

which is D + sigma^2 grad log p(y | z) for p(y | z) = N(A D, S), as Cov = sigma^2 J^T with J = dD / dz. The methods
differ in how they approximate Cov in each of its two occurrences.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .denoiser import Denoiser, Estimate, Labels, check_noisy, check_sigma

Operator = Callable[[Tensor], Tensor]
"""A linear map of images [B, C, H, W] to [B, ...], in torch operations, so that autograd knows its transpose."""

COVARIANCES = ("diagonal", "rows", "full", "residual")
TOLERANCE = 1e-4
"""Residual of S v = r, relative to r, at which conjugate gradients stop; the result moves by as much."""
MOST_ITERATIONS = 100
"""Conjugate gradients end here where they have not converged: S is then far from a multiple of the identity."""


class Conditioned(Denoiser):
    """A denoiser given a measurement y = A x_0 + n with n ~ N(0, noise^2), for every sampler and adapter.

        known = ps.conditioned.masking(mask)
        ps.sample(ps.Conditioned(els, known, known(image), noise=0.02), n=4, sampler="ddpm")

    `covariance` is the approximation of Cov:

    - "diagonal": the posterior variances, for both. It costs no more than they do, and was the most stable in
      examples/restoration.py.
    - "rows": sigma^2 J^T in the step, and in S a diagonal matrix with its row sums, negative ones cut to 0 (TMPD, Boys
      et al. 2023, "Tweedie moment projected diffusions for inverse problems"). Takes a product with J and one with J^T.
    - "full": sigma^2 J^T in the step and sigma^2 J in S; exact for `GaussianScore`. Every iteration of the solver takes
      a product with J, which it expects to be symmetric: for local machines J is not, and the solver may stop early.
    - "residual": sigma^2 J^T in the step, and for S the mean square of y - A D, or noise^2 if that is more: along the
      gradient of |y - A D|^2, by a length that falls as the residual grows, as in DPS (Chung et al. 2023, "Diffusion
      posterior sampling for general noisy inverse problems", section 3.2).

    `estimate` has the standard errors and effective sample sizes of the denoiser without the measurement, and no
    moments.

    Args:
        denoiser: one that has moments, or a Jacobian where `covariance` is not "diagonal".
        operator: A, linear; `masking`, `downsampling` and `blurring` make some.
        measurement: y, as the operator makes it of images: [1, ...] for all images of a batch, or one for each.
        noise: standard deviation of n, in units of pixel values.
        covariance: "diagonal", "rows", "full" or "residual".

    Raises:
        TypeError: not a denoiser, an operator that is not callable, a measurement that is not a floating point tensor.
        ValueError: noise not positive and finite, an operator that is not linear or makes another shape than the
            measurement has; when denoising, a batch of another length than the measurement.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Operator,
        measurement: Tensor,
        noise: float,
        covariance: str = "diagonal",
    ):
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another Denoiser")
        if not callable(operator):
            raise TypeError(f"operator: got {type(operator).__name__}, takes a linear function of images")
        if not isinstance(measurement, Tensor) or not measurement.is_floating_point():
            got = str(measurement.dtype) if isinstance(measurement, Tensor) else type(measurement).__name__
            raise TypeError(f"measurement: got {got}, takes a floating point tensor")
        if not torch.isfinite(measurement).all():
            raise ValueError("measurement: NaN or infinite values")
        if not 0 < checks.number("noise", noise) < math.inf:
            raise ValueError(f"noise: got {noise}, takes a positive standard deviation")
        self.denoiser = denoiser
        self.operator = operator
        self.measurement = measurement
        self.noise = float(noise)
        self.covariance = checks.one_of("covariance", covariance, COVARIANCES)
        self.shape = denoiser.shape
        self.bank = getattr(denoiser, "bank", None)
        _check_operator(operator, measurement, self.shape)

    def with_parts(self, change: Callable[[Denoiser], Denoiser]) -> Conditioned:
        same = copy.copy(self)
        same.denoiser = change(self.denoiser)
        return self if same.denoiser is self.denoiser else same

    @torch.no_grad()
    def estimate(self, z: Tensor, sigma: float | Tensor, labels: Labels = None, *, moments: bool = False) -> Estimate:
        if moments:
            raise ValueError("moments: a conditioned denoiser has none")
        z = check_noisy(z, self.shape, who=type(self).__name__)
        sigmas = check_sigma(sigma, len(z))
        if len(self.measurement) not in (1, len(z)):
            raise ValueError(f"measurement: got {len(self.measurement)} for a batch of {len(z)}")
        options = {"moments": True} if self.covariance == "diagonal" else {}
        found = self.denoiser.estimate(z, sigmas, labels, **options)
        residual = self.measurement.to(z) - self.operator(found.mean)
        sigma2 = sigmas.to(z).square()[:, None, None, None]

        def jacobian(x: Tensor) -> Tensor:
            return sigma2 * self.denoiser.jvp(z, sigmas, x, labels)

        def transposed_jacobian(x: Tensor) -> Tensor:
            return sigma2 * self.denoiser.vjp(z, sigmas, x, labels)

        if self.covariance == "diagonal":
            variance = found.variance
            assert variance is not None
            step = variance * self._transposed(self._solve(residual, lambda x: variance * x, z), z)
        elif self.covariance == "rows":
            rows = jacobian(torch.ones_like(z)).clamp(min=0)
            step = transposed_jacobian(self._transposed(self._solve(residual, lambda x: rows * x, z), z))
        elif self.covariance == "full":
            step = transposed_jacobian(self._transposed(self._solve(residual, jacobian, z), z))
        else:
            size = residual.square().flatten(1).mean(1).clamp(min=self.noise**2)
            step = transposed_jacobian(self._transposed(residual / size.view(-1, *[1] * (residual.ndim - 1)), z))
        return replace(
            found, mean=found.mean + step, variance=None, entropy=None, variance_stderr=None, entropy_stderr=None
        )

    def _solve(self, residual: Tensor, covariance: Operator, z: Tensor) -> Tensor:
        """S^-1 residual with S = noise^2 + A Cov A^T."""
        return conjugate_gradients(
            lambda y: self.noise**2 * y + self.operator(covariance(self._transposed(y, z))), residual
        )

    def _transposed(self, y: Tensor, z: Tensor) -> Tensor:
        """A^T y, which for a linear A is the gradient of y.(A x) at any x."""
        with torch.enable_grad():
            x = torch.zeros_like(z, requires_grad=True)
            (found,) = torch.autograd.grad(self.operator(x), x, y)
        return found

    def __repr__(self) -> str:
        return f"Conditioned({self.denoiser!r}, noise={self.noise:g}, covariance={self.covariance!r})"


def conjugate_gradients(times: Operator, target: Tensor) -> Tensor:
    """x with times(x) = target [B, ...], for each item a symmetric positive matrix (Hestenes & Stiefel 1952)."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (target.ndim - 1))

    x, residual, direction = torch.zeros_like(target), target, target
    size = dot(residual, residual)
    enough = TOLERANCE**2 * size
    for _ in range(MOST_ITERATIONS):
        if (size <= enough).all():
            break
        product = times(direction)
        # Items that are done have no direction left.
        length = torch.where(size > enough, size / dot(direction, product), 0.0)
        x, residual = x + length * direction, residual - length * product
        before, size = size, dot(residual, residual)
        direction = residual + torch.where(before > 0, size / before, 0.0) * direction
    return x


# Operators.


def masking(mask: Tensor) -> Operator:
    """Keeps the pixels where the mask [H, W], [C, H, W] or [1, C, H, W] is true and makes the others 0: inpainting."""
    if not isinstance(mask, Tensor) or mask.ndim < 2:
        raise TypeError("mask: takes a tensor [H, W], [C, H, W] or [1, C, H, W]")
    kept = mask.bool()
    return lambda x: x * kept.to(x)


def downsampling(factor: int) -> Operator:
    """Means of factor x factor blocks: super-resolution."""
    factor = checks.integer("factor", factor, at_least=1)
    return lambda x: F.avg_pool2d(x, factor)


def blurring(std: float, r: int | None = None) -> Operator:
    """Convolution with a Gaussian of this standard deviation in pixels, cut at r (three of them), zeros around."""
    if not 0 < checks.number("std", std) < math.inf:
        raise ValueError(f"std: got {std}, takes a positive number of pixels")
    r = math.ceil(3 * std) if r is None else checks.integer("r", r, at_least=0)
    weights = torch.exp(-(torch.arange(-r, r + 1, dtype=torch.float64) ** 2) / (2 * std**2))
    weights = weights / weights.sum()

    def blurred(x: Tensor) -> Tensor:
        line = weights.to(x)
        channels = x.shape[1]
        down = F.conv2d(x, line.view(1, 1, -1, 1).expand(channels, -1, -1, -1), padding=(r, 0), groups=channels)
        return F.conv2d(down, line.view(1, 1, 1, -1).expand(channels, -1, -1, -1), padding=(0, r), groups=channels)

    return blurred


def _check_operator(operator: Operator, measurement: Tensor, shape: Sequence[int]) -> None:
    zeros = measurement.new_zeros(1, *shape)
    try:
        made = operator(zeros)
    except RuntimeError as error:
        raise ValueError(f"operator: does not take images {[1, *shape]}: {str(error).splitlines()[0]}") from None
    if not isinstance(made, Tensor) or made.shape[1:] != measurement.shape[1:]:
        got = list(made.shape[1:]) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"operator: makes {got} of an image, the measurement has {list(measurement.shape[1:])}")
    if made.any():
        raise ValueError("operator: takes a linear one, got one that makes something of nothing")
