"""Log-likelihoods of images along the probability flow, with exact divergences.

The probability flow dz/dsigma = (z - D(z)) / sigma carries an image from sigma_min to sigma_max, where its density is
known, and changes the density by the divergence of the flow on the way (Song et al. 2021, "Score-based generative
modeling through stochastic differential equations", section 4.3). Posterior variances give that divergence without
random probes. A denoiser that samples its windows moves an image by its errors too, which later divergences depend on:
the error of the whole is taken from runs with independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .denoiser import Denoiser, Labels, check_noisy
from .gaussian import GaussianScore
from .noise import MOST_STEPS
from .sampling import DEFAULT_BATCH, image_generator, labels_in_turn

GRAY_LEVELS = 127.5
"""8-bit values to one unit of pixel value: an image in [-1, 1] has 255 steps of 1 / 127.5."""


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihoods of a batch and the error of their integration.

    Attributes:
        nats: [B] float64, ln of the density of the images at sigma_min, pixel values being in [-1, 1].
        error: [B] float64, estimated error of `nats` by the integration: the difference from half the steps over 3, as
            Heun's error falls with the square of the steps (Richardson).
        sampling_error: [B] float64, standard error of `nats` by what a denoiser draws, from replicates; 0 where it
            draws nothing.
        latents: [B, C, H, W] where the flow takes the images at sigma_max; divided by sigma_max, the noise that the
            flow would make them from.
        steps: Heun steps that were taken.
        sigma_min: the noise level of the images.
        sigma_max: the noise level of the latents.
    """

    nats: Tensor
    error: Tensor
    sampling_error: Tensor
    latents: Tensor
    steps: int
    sigma_min: float
    sigma_max: float

    @property
    def dimensions(self) -> int:
        """Numbers in an image, C H W."""
        return self.latents[0].numel()

    @property
    def bits_per_dim(self) -> Tensor:
        """[B] bits to code a pixel value of 8 bits: -log2 of the density, times the width 1 / 127.5 of a value."""
        return (math.log(GRAY_LEVELS) - self.nats / self.dimensions) / math.log(2)

    @property
    def bits_per_dim_error(self) -> Tensor:
        """[B] `error` in bits a dimension."""
        return self.error / self.dimensions / math.log(2)

    @property
    def bits_per_dim_sampling_error(self) -> Tensor:
        """[B] `sampling_error` in bits a dimension."""
        return self.sampling_error / self.dimensions / math.log(2)

    def __repr__(self) -> str:
        """The mean and its integration error in a line."""
        bits, error = self.bits_per_dim.mean().item(), self.bits_per_dim_error.max().item()
        noise = f"sigma {self.sigma_min:g} to {self.sigma_max:g} in {self.steps} steps"
        return f"LogLikelihood({len(self.nats)} images, {bits:.4g} bits a dimension, error to {error:.2g}, {noise})"


def log_likelihood(
    denoiser: Denoiser,
    images: Tensor,
    labels: Labels = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    steps: int = 50,
    tolerance: float | None = None,
    gaussian: GaussianScore | None = None,
    seed: int = 0,
    replicates: int = 4,
    batch_size: int = DEFAULT_BATCH,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> LogLikelihood:
    """The log-likelihood of images under the density that the probability flow of a denoiser carries.

        ln p(z at sigma_min) = ln p(z at sigma_max) + integral of (dim - div D(z; sigma)) / sigma d sigma

    along dz/dsigma = (z - D) / sigma (Song et al. 2021, equations 36 to 39), with exact divergences. Noise levels are
    spaced evenly in ln sigma; z moves by Heun's method (Karras et al. 2022, algorithm 1 without churn), and the
    integral is the trapezoidal rule's. For a denoiser whose score is the gradient of a density, such as IdealScore and
    GaussianScore, this is that density; for others it is the density of the images that the flow makes from noise.

    Args:
        denoiser: one that has a divergence: machines, GaussianScore, and Guided and Switch of such.
        images: [B, C, H, W]. uint8 images are spread over their values' width first, x = (u + r) / 127.5 - 1 with r
            uniform in [-1/2, 1/2]; floats in [-1, 1] are taken as they are.
        labels: as in `Denoiser.denoise`; images in turn, as in `sample`.
        sigma_min: the noise level at which the density is taken. The density of a bank of images is a sum of spikes of
            this width, so bits per dimension depend on it.
        sigma_max: the noise level from which the density is known.
        steps: Heun steps from sigma_min to sigma_max, from 2; half as many again are taken to estimate the error.
        tolerance: double `steps` until the estimated error is at most this, in nats a dimension; None: take `steps`.
        gaussian: the density at sigma_max is its marginal N(mu, Sigma + sigma_max^2), of the image's class; None:
            white noise N(0, sigma_max^2), which is what `sample` starts from.
        seed: of the dequantisation; image i depends on (seed, i) alone.
        replicates: how often a denoiser that samples (`budget=`, an index) is run, with draws of its own at every
            step of every run, from 2. The result is the mean, and `sampling_error` its standard error, which does not
            cover the bias of sampled variances (docs/moments.md). One that draws nothing runs once.
        batch_size: images evaluated together.
        dtype: torch.float32 or torch.float64, of z.
        progress: show a bar on stderr once it has taken two seconds.

    Raises:
        ValueError: images unlike the denoiser's, noise levels that are not 0 < sigma_min < sigma_max, an unknown label,
            a denoiser without a divergence, a tolerance that 10,000 steps do not reach.
        TypeError: an argument of another type.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another Denoiser")
    steps = checks.integer("steps", steps, at_least=2, at_most=MOST_STEPS)
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    replicates = checks.integer("replicates", replicates, at_least=2)
    low, high = checks.number("sigma_min", sigma_min), checks.number("sigma_max", sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min, sigma_max: got {low:g} and {high:g}, takes 0 < sigma_min < sigma_max")
    if tolerance is not None and not 0 < checks.number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, takes a positive error in nats a dimension")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: got {dtype}, takes torch.float32 or torch.float64")
    if gaussian is not None and tuple(gaussian.shape) != tuple(denoiser.shape):
        raise ValueError(f"gaussian: of {tuple(gaussian.shape)} images, the denoiser's are {tuple(denoiser.shape)}")
    x = dequantised(images, checks.integer("seed", seed))
    x = check_noisy(x, denoiser.shape, "images", any_size=denoiser.any_size).to(dtype)
    if not len(x):
        raise ValueError("images: got none")
    listed = labels_in_turn(labels, range(len(x)))

    draws = denoiser.redrawn(0) is not denoiser
    runs = [denoiser.redrawn(draw) for draw in range(replicates)] if draws else [denoiser]
    parts = []
    with tqdm(total=len(x), unit="image", desc="log-likelihood", delay=2, disable=not progress) as bar:
        for start in range(0, len(x), batch_size):
            batch = x[start : start + batch_size]
            some = None if listed is None else listed[start : start + batch_size]
            parts.append(_of_batch(runs, batch, some, low, high, steps, tolerance, gaussian))
            bar.update(len(batch))
    nats, error, sampling_error, latents = (torch.cat(found) for found in list(zip(*parts, strict=True))[:4])
    return LogLikelihood(nats, error, sampling_error, latents, max(part[4] for part in parts), low, high)


def dequantised(images: Tensor, seed: int = 0) -> Tensor:
    """uint8 images as float64 pixel values, spread uniformly over the width 1 / 127.5 of each; floats unchanged."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        return images
    generators = [image_generator(seed, i) for i in range(len(images))]
    drawn = [torch.rand(images.shape[1:], generator=generator, dtype=torch.float64) for generator in generators]
    spread = torch.stack(drawn).to(images.device) if drawn else images.double()
    return (images.double() + spread - 0.5) / GRAY_LEVELS - 1


def _of_batch(
    runs: Sequence[Denoiser],
    x: Tensor,
    labels: list[int | str | None] | None,
    low: float,
    high: float,
    steps: int,
    tolerance: float | None,
    gaussian: GaussianScore | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """nats, their errors by integration and by sampling, latents of the first run, and the steps taken."""

    def run(count: int) -> tuple[Tensor, Tensor, Tensor]:
        found = [_flow(denoiser, x, labels, _levels(low, high, count)) for denoiser in runs]
        nats = torch.stack([gained + log_prior(latents, high, labels, gaussian) for latents, gained in found])
        spread = nats.std(0) / len(runs) ** 0.5 if len(runs) > 1 else torch.zeros_like(nats[0])
        return found[0][0], nats.mean(0), spread

    coarse_steps = steps // 2
    _, coarse, _ = run(coarse_steps)
    while True:
        latents, nats, sampling_error = run(steps)
        error = (nats - coarse).abs() / ((steps / coarse_steps) ** 2 - 1)
        if tolerance is None or error.max().item() <= tolerance * x[0].numel():
            return nats, error, sampling_error, latents, steps
        if 2 * steps > MOST_STEPS:
            raise ValueError(f"tolerance: got {tolerance:g}, {steps} steps leave {error.max() / x[0].numel():.2g}")
        coarse_steps, coarse, steps = steps, nats, 2 * steps


def _levels(low: float, high: float, steps: int) -> list[float]:
    """steps + 1 noise levels, evenly spaced in ln sigma, upwards."""
    ratio = (high / low) ** (1 / steps)
    return [low * ratio**i for i in range(steps)] + [high]


def _flow(
    denoiser: Denoiser, z: Tensor, labels: list[int | str | None] | None, levels: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """z at the last level, and the integral of (dim - div D) d ln sigma on the way, [B] float64."""
    dimensions = z[0].numel()
    gained: Tensor | None = None
    before: Tensor | None = None
    for i, sigma in enumerate(levels):
        x0, divergence = denoiser.with_divergence(z, sigma, labels)
        rate = dimensions - divergence
        if before is None or gained is None:
            gained = torch.zeros_like(rate)
        else:
            gained = gained + math.log(sigma / levels[i - 1]) * (before + rate) / 2
        before = rate
        if i + 1 == len(levels):
            break
        above = levels[i + 1]
        slope = (z - x0) / sigma
        reached = z + (above - sigma) * slope
        slope_there = (reached - denoiser.denoise(reached, above, labels)) / above
        z = z + (above - sigma) * (slope + slope_there) / 2
    assert gained is not None
    return z, gained


def log_prior(
    z: Tensor, sigma: float, labels: list[int | str | None] | None = None, gaussian: GaussianScore | None = None
) -> Tensor:
    """[B] float64 log-density at noise level sigma: of white noise, or of a Gaussian's marginal."""
    if gaussian is not None:
        return gaussian.log_density(z, sigma, labels)
    z = z.double()
    return -0.5 * (z / sigma).square().flatten(1).sum(1) - z[0].numel() * math.log(sigma * math.sqrt(2 * math.pi))
