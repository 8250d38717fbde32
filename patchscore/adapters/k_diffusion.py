"""A denoiser for k-diffusion's samplers and for EDM's: both call `denoiser(x, sigma, ...)` with x = x_0 + sigma eps.

That is this package's own convention, so the adapter only translates labels and provides the attributes that EDM's
sampler reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from .module import DenoiserModule


class PatchScoreDenoiser(DenoiserModule):
    """A denoiser as k-diffusion's `model(x, sigma, **extra_args)` and as EDM's `net(x, sigma, class_labels)`.

        K.sampling.sample_heun(PatchScoreDenoiser(machine), x, sigmas, extra_args={"class_labels": labels})

    Crowson, k-diffusion; Karras et al. 2022 (EDM), whose attributes it has: `sigma_min`, `sigma_max`, `round_sigma`,
    `img_resolution`, `img_channels`, `label_dim`. EDM's one-hot labels count the bank's classes in ascending order.

    EDM's sampler passes float64 images, and its networks compute in float32. So does this adapter, except after
    `.to(torch.float64)`.

    Args:
        machine: the denoiser.
        sigma_min: the lowest noise level that EDM's sampler may ask for.
        sigma_max: the highest.

    Raises:
        TypeError: not a denoiser.
        ValueError: not 0 < sigma_min < sigma_max.
    """

    def __init__(self, machine: Denoiser, sigma_min: float = 0.002, sigma_max: float = 80.0):
        super().__init__(machine)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min, sigma_max: got {sigma_min} and {sigma_max}, takes 0 < sigma_min < sigma_max")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.img_channels, height, width = machine.shape
        self.img_resolution = height if height == width else (height, width)
        self.label_dim = len(self.classes)

    def forward(self, x: Tensor, sigma: float | Tensor, class_labels: Any = None, class_cond: Any = None) -> Tensor:
        """D(x; sigma): [B, C, H, W] in x's dtype.

        Args:
            x: [B, C, H, W] noisy images x_0 + sigma eps.
            sigma: noise level, a number or [B] (or [B, 1, 1, 1], as in EDM).
            class_labels: labels or names, one for all or [B] (None among them means every class), or one-hot rows
                [B, label_dim], where a row of zeros means every class.
            class_cond: k-diffusion's name for the same.

        Raises:
            ValueError: images unlike the bank's, or that require grad (as in k-diffusion's log_likelihood) of a
                denoiser that is no `Differentiable`; bad noise levels, an unknown label, labels under both names.
        """
        self.check_images(x, "x")
        if class_labels is not None and class_cond is not None:
            raise ValueError("class_labels, class_cond: got both, takes one")
        labels = self.labels_from(class_labels if class_cond is None else class_cond)
        level = sigma.flatten() if isinstance(sigma, Tensor) else sigma
        with self.denoiser.graph():
            return self.denoiser.denoise(x.to(self.compute_dtype), level, labels).to(x.dtype)

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """Returns sigma unchanged: every noise level is served."""
        return torch.as_tensor(sigma)
