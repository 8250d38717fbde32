"""Samplers: from noise to images along a schedule, with any denoiser.

All of them integrate in z = x / alpha, where noise is only added: z = x_0 + sigma eps with sigma = sigma_t / alpha_t.
In these coordinates the probability-flow ODE is dz/dsigma = (z - D(z)) / sigma for every schedule, DDIM is Euler's
method on it, and a sampler is a few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .denoiser import Denoiser, Labels, labels_per_item, listed_labels
from .gaussian import GaussianScore
from .noise import Schedule, get_schedule

Denoise = Callable[[Tensor, float], Tensor]
"""denoise(z, sigma) -> x0, with the labels already bound."""

Posterior = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""posterior(z, sigma) -> the posterior mean x0 and the posterior variance of every pixel."""

Begin = Callable[[Tensor, Labels], Tensor]
"""begin(noise, labels) -> z at the first level."""

DEFAULT_BATCH = 16


@dataclass(frozen=True)
class Step:
    """What a callback receives after each denoising step.

    Attributes:
        index: number of the step, from 0.
        of: number of steps.
        alpha: alpha_t of the level that was denoised.
        sigma: sigma_t of that level.
        x: [B, C, H, W] the noisy images x_t at that level, in the schedule's convention.
        x0: [B, C, H, W] the denoised images.
        images: numbers of these images among those requested.
    """

    index: int
    of: int
    alpha: float
    sigma: float
    x: Tensor
    x0: Tensor
    images: range


class OnStep(Protocol):
    def __call__(self, index: int, z: Tensor, x0: Tensor) -> None: ...


NoiseSource = Callable[[], Tensor]
"""White noise of z's shape; each call returns the next draw from every image's own random stream."""


def sample_ddim(denoise: Denoise, z: Tensor, sigmas: Sequence[float], noise: NoiseSource, on_step: OnStep) -> Tensor:
    """DDIM (Song et al. 2021, equation 12 with eta = 0), which is Euler's method on dz/dsigma = (z - D) / sigma."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(z, sigma)
        on_step(i, z, x0)
        z = x0 + sigma_next / sigma * (z - x0)
    return z


def sample_ddpm(denoise: Denoise, z: Tensor, sigmas: Sequence[float], noise: NoiseSource, on_step: OnStep) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, equations 6 and 7): draws from q(z' | z, x_0 = D(z)) at every step."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(z, sigma)
        on_step(i, z, x0)
        kept = (sigma_next / sigma) ** 2
        z = x0 + kept * (z - x0)
        if sigma_next > 0:
            z = z + sigma_next * (1 - kept) ** 0.5 * noise()
    return z


def sample_ddpm_optimal(
    posterior: Posterior, z: Tensor, sigmas: Sequence[float], noise: NoiseSource, on_step: OnStep
) -> Tensor:
    """Ancestral sampling with the optimal variance of every pixel (Bao et al. 2022, "Analytic-DPM", theorem 1).

    q(z' | z, x_0) has the mean x_0 + kept (z - x_0) and the variance sigma'^2 (1 - kept), kept = (sigma' / sigma)^2.
    `sample_ddpm` puts D(z) in the place of x_0; what the posterior leaves open of x_0 adds (1 - kept)^2 Var(x_0 | z).
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, variance = posterior(z, sigma)
        on_step(i, z, x0)
        kept = (sigma_next / sigma) ** 2
        z = x0 + kept * (z - x0)
        if sigma_next > 0:
            z = z + (sigma_next**2 * (1 - kept) + (1 - kept) ** 2 * variance).sqrt() * noise()
    return z


def sample_heun(denoise: Denoise, z: Tensor, sigmas: Sequence[float], noise: NoiseSource, on_step: OnStep) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1 without churn): two evaluations a step."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(z, sigma)
        on_step(i, z, x0)
        z_next = x0 + sigma_next / sigma * (z - x0)
        if sigma_next > 0:
            slope, slope_next = (z - x0) / sigma, (z_next - denoise(z_next, sigma_next)) / sigma_next
            z_next = z + (sigma_next - sigma) * (slope + slope_next) / 2
        z = z_next
    return z


SAMPLERS = {"ddim": sample_ddim, "ddpm": sample_ddpm, "euler": sample_ddim, "heun": sample_heun}
"""Samplers by name. In z-coordinates Euler's method and DDIM are the same algorithm, listed under both names."""

MOMENT_SAMPLERS = {"ddpm-optimal": sample_ddpm_optimal}
"""Samplers that take the posterior variance besides the mean."""

SAMPLER_NAMES = (*SAMPLERS, *MOMENT_SAMPLERS)


def sample(
    denoiser: Denoiser,
    n: int = 16,
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    sampler: str = "ddim",
    labels: Labels = None,
    seed: int = 0,
    *,
    first: int = 0,
    batch_size: int = DEFAULT_BATCH,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    gaussian_until: float | None = None,
    sigma_max: float | None = None,
    gaussian: GaussianScore | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
    size: tuple[int, int] | None = None,
    tolerance: float | None = None,
) -> Tensor:
    """Samples images from noise.

    The initial noise of image i depends only on (seed, i), so image i is the same (up to rounding) for every n and
    batch size. With the defaults and a published table this is the published sampler: DDIM over 20 cosine steps, from
    pure noise at step 19; the result is the denoised image of step 1.

    Args:
        denoiser: a machine, or anything with `shape` and `denoise(z, sigma, labels)`.
        n: how many images.
        steps: noise levels of the schedule (ignored where `schedule` is a Schedule). The last level of the cosine
            schedule is the clean image, so it makes steps - 1 evaluations, as published. Take 10 or more: with fewer,
            its first level has too little noise to start from.
        schedule: "cosine", "linear", "karras", "flow" or a Schedule.
        sampler: "ddim", "ddpm", "euler", "heun", or "ddpm-optimal" for denoisers that have moments.
        labels: None, one label for all, or a list whose entries image i takes in turn: labels[i % len(labels)].
        seed: any integer.
        first: number of the first image; images first .. first + n - 1 are made.
        batch_size: images denoised together.
        device: where the denoising happens.
        dtype: torch.float32 or torch.float64.
        gaussian_until: jump from the start to the schedule's first level at or below this sigma in one step, by the
            probability flow of the bank's Gaussian, and sample from there; None visits every level.
        sigma_max: omit the levels above this sigma, and start at the first remaining level from the marginal of the
            Gaussian instead of from white noise.
        gaussian: the Gaussian for the two arguments above; None fits one to the denoiser's bank (pass it where the bank
            is large, or for several calls). Each image uses the Gaussian of its class.
        callback: called with a `Step` after each denoising step of each batch.
        progress: show a bar on stderr once it has taken two seconds.
        size: (height, width) of the images; None makes them as large as the denoiser's own, and some denoisers
            (`Denoiser.any_size`) take every other.
        tolerance: for machines with an index, instead of their own budget or tolerance: the rms by which an image may
            differ from what exact sums make of the same noise. Every step may contribute as much (`step_tolerances`).
            Where noise is high, the path to an image may split, and a small error then decides for another image.

    Returns:
        [n, C, H, W] on `device`, in [-1, 1]; not clamped where the denoiser's bank has a value_range.

    Raises:
        ValueError: an argument out of its range, or an unknown label.
    """
    if not (hasattr(denoiser, "denoise") and hasattr(denoiser, "shape")):
        raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another Denoiser")
    n = checks.integer("n", n, at_least=1)
    first = checks.integer("first", first, at_least=0)
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    seed = checks.integer("seed", seed)
    checks.one_of("sampler", sampler, SAMPLER_NAMES)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: got {dtype}, takes torch.float32 or torch.float64")
    levels, begin = _beginning(denoiser, get_schedule(schedule, steps), sigma_max, gaussian_until, gaussian)
    shape = _check_size(size, denoiser, levels)
    if shape != tuple(denoiser.shape) and not (sigma_max is None and gaussian_until is None):
        raise ValueError("sigma_max, gaussian_until: take images of the bank's size, as the Gaussian is of such")
    _check_tolerance(denoiser, tolerance)
    images = range(first, first + n)
    listed = labels_in_turn(labels, images)
    device = checks.device(device)

    done = []
    with tqdm(total=n * len(levels), unit="step", desc="sampling", delay=2, disable=not progress) as bar:
        for start in range(0, n, batch_size):
            batch = images[start : start + batch_size]
            batch_labels = None if listed is None else listed[start : start + batch_size]
            done.append(
                _sample_batch(
                    _of_steps(denoiser, levels.ratios.tolist(), sampler, tolerance),
                    denoiser,
                    shape,
                    batch,
                    levels,
                    begin,
                    sampler,
                    batch_labels,
                    seed,
                    device,
                    dtype,
                    callback,
                    bar,
                )
            )
    return torch.cat(done)


def _check_size(size: tuple[int, int] | None, denoiser: Denoiser, levels: Schedule) -> tuple[int, ...]:
    """(C, H, W) of the images to make."""
    own = tuple(denoiser.shape)
    if size is None:
        return own
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"size: got {size!r}, takes (height, width)") from None
    wanted = checks.integer("size", height, at_least=1), checks.integer("size", width, at_least=1)
    if wanted != own[1:]:
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"size: got {height} x {width}, {type(denoiser).__name__} says nothing of other sizes")
        denoiser.check_size(wanted, levels.ratios[:-1].tolist())
    return own[0], *wanted


def step_tolerances(ratios: Sequence[float], sampler: str, tolerance: float) -> list[float]:
    """What the denoised image of each level may be off by, for the last image to be off by `tolerance` (both rms).

    A step adds a multiple of its denoised image to z, 1 - s with s = sigma' / sigma for Euler's method, half of that
    and half of the step before for Heun's, 1 - s^2 for ancestral steps. Steps draw independently, so squares add up, to
    equal parts here; what an earlier step left is taken to be neither amplified nor damped by those after it.
    """
    shares = []
    for i, (sigma, sigma_next) in enumerate(pairwise(ratios)):
        step = sigma_next / sigma
        if sampler in ("ddpm", "ddpm-optimal"):
            shares.append(1 - step**2)
        elif sampler == "heun":
            before = (ratios[i - 1] - sigma) / sigma if i else 0.0
            shares.append((1 - step if sigma_next == 0 else (1 - step) / 2) + before / 2)
        else:
            shares.append(1 - step)
    return [tolerance / len(shares) ** 0.5 / share for share in shares]


def _check_tolerance(denoiser: Denoiser, tolerance: float | None) -> None:
    if tolerance is None:
        return
    if not 0 < checks.number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, takes a positive error of pixels")
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"tolerance: {type(denoiser).__name__} says nothing of errors, takes a Denoiser")
    denoiser.within(tolerance)


def _of_steps(
    denoiser: Denoiser, ratios: list[float], sampler: str, tolerance: float | None
) -> Callable[[float], Denoiser]:
    """The denoiser that one batch asks at a level."""
    following = denoiser.following() if isinstance(denoiser, Denoiser) else denoiser
    if tolerance is None:
        return lambda sigma: following
    given = zip(ratios, step_tolerances(ratios, sampler, tolerance), strict=False)
    return {sigma: following.within(of_step) for sigma, of_step in given}.__getitem__


def _sample_batch(
    asked: Callable[[float], Denoiser],
    denoiser: Denoiser,
    shape: tuple[int, ...],
    images: range,
    levels: Schedule,
    begin: Begin,
    sampler: str,
    labels: list[int | str | None] | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    callback: Callable[[Step], None] | None,
    bar: tqdm,
) -> Tensor:
    alphas, sigmas, ratios = levels.alphas.tolist(), levels.sigmas.tolist(), levels.ratios.tolist()
    generators = [image_generator(seed, image) for image in images]

    def noise() -> Tensor:
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
        return torch.stack(drawn).to(device, dtype)

    def denoise(z: Tensor, sigma: float) -> Tensor:
        return asked(sigma).denoise(z, sigma, labels)

    def posterior(z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        found = asked(sigma).estimate(z, sigma, labels, moments=True)
        assert found.variance is not None
        return found.mean, found.variance

    def on_step(index: int, z: Tensor, x0: Tensor) -> None:
        bar.update(len(images))
        if callback is not None:
            alpha = alphas[index]
            callback(Step(index, len(levels), alpha, sigmas[index], alpha * z, x0, images))

    z = begin(noise(), labels)
    if sampler in MOMENT_SAMPLERS:
        made = MOMENT_SAMPLERS[sampler](posterior, z, ratios, noise, on_step)
    else:
        made = SAMPLERS[sampler](denoise, z, ratios, noise, on_step)
    bank = getattr(denoiser, "bank", None)
    return made.clamp(-1, 1) if bank is None or bank.value_range is None else made


def _beginning(
    denoiser: Denoiser,
    levels: Schedule,
    sigma_max: float | None,
    gaussian_until: float | None,
    gaussian: GaussianScore | None,
) -> tuple[Schedule, Begin]:
    """The remaining levels, and the function that maps white noise to the first of them."""
    scale, ratios = levels.start_std / levels.alphas[0].item(), levels.ratios.tolist()
    if sigma_max is None and gaussian_until is None:
        return levels, lambda noise, labels: scale * noise

    known = _check_gaussian(gaussian, denoiser)
    first = 0 if sigma_max is None else _first_level(ratios, sigma_max, "sigma_max")
    landing = first if gaussian_until is None else max(first, _first_level(ratios, gaussian_until, "gaussian_until"))

    def begin(noise: Tensor, labels: Labels) -> Tensor:
        z = scale * noise if sigma_max is None else known.marginal(noise, ratios[first], labels)
        return z if landing == first else known.flow(z, ratios[first], ratios[landing], labels)

    return replace(levels, alphas=levels.alphas[landing:], sigmas=levels.sigmas[landing:]), begin


def _first_level(ratios: list[float], sigma: float, name: str) -> int:
    """The first level at or below sigma; a level that is sigma up to rounding counts."""
    sigma = checks.number(name, sigma, takes="a number or None")
    if not 0 < sigma < math.inf:
        raise ValueError(f"{name}: got {sigma}, takes a positive number")
    at = next(i for i, ratio in enumerate(ratios) if ratio <= sigma * (1 + 1e-9))
    if at == len(ratios) - 1:
        raise ValueError(f"{name}: got {sigma}, below the schedule's last noise level {ratios[-2]:.6g}")
    return at


def _check_gaussian(gaussian: GaussianScore | None, denoiser: Denoiser) -> GaussianScore:
    if gaussian is None:
        bank = getattr(denoiser, "bank", None)
        if bank is None:
            raise ValueError(f"gaussian: {type(denoiser).__name__} has no bank to take it from, give a GaussianScore")
        return GaussianScore(bank)
    if not isinstance(gaussian, GaussianScore):
        raise TypeError(f"gaussian: got {type(gaussian).__name__}, takes a GaussianScore")
    if tuple(gaussian.shape) != tuple(denoiser.shape):
        of, takes = (" x ".join(map(str, shape)) for shape in (gaussian.shape, denoiser.shape))
        raise ValueError(f"gaussian: of {of} images, the denoiser's are {takes}")
    return gaussian


def image_generator(seed: int, image: int) -> torch.Generator:
    """The random stream of one image, from (seed, image) alone."""
    state = np.random.SeedSequence([seed % 2**64, image]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def labels_in_turn(labels: Labels, images: range) -> list[int | str | None] | None:
    """The label of each image: `labels` taken in turn by image number."""
    if labels is None:
        return None
    listed = listed_labels(labels)
    if listed is None:
        return labels_per_item(labels, len(images))
    if not listed:
        raise ValueError("labels: got an empty list")
    return [listed[image % len(listed)] for image in images]
