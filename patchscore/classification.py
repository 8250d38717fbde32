"""Bayes classification with class-conditional denoisers: the class whose denoiser predicts the noise best.

The diffusion-classifier rule (Li et al., "Your diffusion model is secretly a zero-shot classifier", 2023; Clark & Jaini
2023): noise the image, let every class denoise it, and compare the errors. All classes see the same noise, so that what
the noise does to the errors mostly cancels between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .checks import RANGE_TOLERANCE
from .denoiser import Denoiser, check_noisy
from .sampling import image_generator


@dataclass(frozen=True)
class Classification:
    """The result of `classify`.

    Attributes:
        classes: the K labels that were compared.
        posterior: [B, K] p(class | image); each row sums to 1.
        errors: [B, K] mean over noise levels and draws of |eps - eps_hat|^2, summed over the C H W pixels.
    """

    classes: tuple[int, ...]
    posterior: Tensor
    errors: Tensor

    @property
    def labels(self) -> Tensor:
        """[B] the likeliest class of each image."""
        return torch.tensor(self.classes)[self.errors.argmin(1).cpu()]


@torch.no_grad()
def classify(
    denoiser: Denoiser,
    images: Tensor,
    sigmas: float | Sequence[float],
    classes: Iterable[int | str] | None = None,
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Classification:
    """The posterior over classes of each image, from class-conditional denoising errors.

        p(c | x) = softmax_c( - mean over sigma and eps of |eps - eps_c|^2 ),
        eps_c = (z - D(z, sigma, c)) / sigma,   z = x + sigma eps

    (Li et al. 2023, equations 5 and 6, with a uniform prior and uniform weights over the noise levels.) All classes see
    the same noise: the draws of image i depend only on (seed, i). The cost is one denoising per class, noise level and
    draw.

    Args:
        denoiser: any denoiser over a labelled bank.
        images: [B, C, H, W] clean images in [-1, 1].
        sigmas: the noise levels, in units of pixel values. Intermediate levels discriminate best.
        classes: candidate labels or names; None takes all classes of the denoiser's bank.
        draws: noise draws for each image and noise level.
        seed: any integer.
        batch_size: images denoised together.
        progress: show a bar on stderr once it has taken two seconds.

    Raises:
        ValueError: wrong shape, pixels that are NaN, infinite or outside [-1, 1], no or bad sigmas, unknown labels,
            fewer than two classes, a denoiser without labels.
        TypeError: an argument of the wrong type.
    """
    draws = checks.integer("draws", draws, at_least=1)
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    seed = checks.integer("seed", seed)
    images = check_noisy(images, denoiser.shape, name="images")
    if images.numel() and images.abs().max() > 1 + RANGE_TOLERANCE:
        low, high = images.aminmax()
        raise ValueError(f"images: values from {low:.4g} to {high:.4g}, takes [-1, 1]")
    levels = _check_sigmas(sigmas)
    known = _check_classes(denoiser, classes)

    errors = torch.zeros(len(images), len(known), dtype=torch.float64)
    with tqdm(total=errors.numel() * len(levels) * draws, unit="error", delay=2, disable=not progress) as bar:
        for first in range(0, len(images), batch_size):
            x = images[first : first + batch_size]
            generators = [image_generator(seed, first + i) for i in range(len(x))]
            for sigma in levels * draws:
                drawn = [torch.randn(denoiser.shape, generator=g, dtype=torch.float64) for g in generators]
                z = x + sigma * torch.stack(drawn).to(x)
                for column, label in enumerate(known):
                    # eps - eps_c = (D - x) / sigma, as z is the same in both.
                    missed = (denoiser.denoise(z, sigma, label) - x).double() / sigma
                    errors[first : first + len(x), column] += missed.square().flatten(1).sum(1).cpu()
                    bar.update(len(x))
    errors /= len(levels) * draws
    return Classification(tuple(known), torch.softmax(-errors, 1), errors)


def _check_sigmas(sigmas: float | Sequence[float]) -> list[float]:
    if isinstance(sigmas, Tensor):
        sigmas = sigmas.tolist()
    listed = list(sigmas) if isinstance(sigmas, Iterable) and not isinstance(sigmas, str) else [sigmas]
    levels = [checks.number("sigmas", sigma, takes="numbers") for sigma in listed]
    if not levels or not all(0 < sigma < math.inf for sigma in levels):
        raise ValueError(f"sigmas: got {levels}, takes one or more positive finite numbers")
    return levels


def _check_classes(denoiser: Denoiser, classes: Iterable[int | str] | None) -> list[int]:
    bank = getattr(denoiser, "bank", None)
    if bank is None or not bank.classes:
        raise ValueError(f"denoiser: {denoiser!r} has no labelled bank to take classes from")
    known = list(bank.classes) if classes is None else bank.label_ids(classes)
    if len(set(known)) != len(known) or len(known) < 2:
        raise ValueError(f"classes: got {known}, takes two or more different ones")
    return known
