"""A denoiser as a diffusers UNet: `DDIMPipeline(unet=PatchScoreUNet(machine, scheduler), scheduler=scheduler)`.

A diffusers UNet takes x = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, and a timestep that encodes the
noise level; the denoiser takes z = x / alpha_t and sigma = sigma_t / alpha_t. Schedulers that work in sigma-space (such
as Euler) divide their samples by sqrt(sigma^2 + 1) before the UNet, which gives the same form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.unets.unet_2d import UNet2DOutput
except ImportError as error:
    raise ImportError(
        f'patchscore.adapters.diffusers needs diffusers ({error}): pip install "patchscore[diffusers]"'
    ) from None

from ..denoiser import Denoiser, Labels
from .module import DenoiserModule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

LEAST_ALPHA_CUMPROD = 2.0**-40
"""Replaces alpha_t^2 = 0 (zero terminal SNR), where z = x / alpha_t is undefined; sigma_t / alpha_t is then 2^20."""


class PatchScoreUNet(DenoiserModule):
    """A denoiser with the interface of `diffusers.UNet2DModel`.

    The scheduler determines the prediction (`prediction_type`) and the noise level of a timestep: where it keeps a list
    of sigmas with its timesteps, the sigma of that step; otherwise `alphas_cumprod`, interpolated in log sigma between
    whole timesteps. Pass the scheduler that the sampling loop uses.

        epsilon = (x - alpha_t D) / sigma_t,   v = alpha_t epsilon - sigma_t D,   sample = D

    (Ho et al. 2020; Salimans & Ho 2022, appendix D).

    Args:
        machine: the denoiser.
        scheduler: a diffusers scheduler with `alphas_cumprod`, predicting epsilon, v_prediction or sample.
        class_labels: labels for calls without any, such as those of DDIMPipeline and DDPMPipeline, which have no
            classes: one for all images, or a list as long as the batch.

    Raises:
        TypeError: not a denoiser.
        ValueError: a scheduler without `alphas_cumprod`, with flow sigmas, or of another prediction type (named).
    """

    def __init__(self, machine: Denoiser, scheduler: Any, class_labels: Labels = None):
        super().__init__(machine)
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None or not hasattr(scheduler, "config"):
            raise ValueError(f"scheduler: got {type(scheduler).__name__}, takes one that has alphas_cumprod")
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} predicts {prediction_type!r}, "
                f"takes {', '.join(map(repr, PREDICTION_TYPES))}"
            )
        if scheduler.config.get("use_flow_sigmas", False):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} has use_flow_sigmas=True, "
                "whose sigmas are not sigma_t / alpha_t; takes one without"
            )
        channels, height, width = machine.shape
        self.scheduler = scheduler
        self.prediction_type = prediction_type
        self.class_labels = class_labels
        kept = alphas_cumprod.detach().cpu().double().clamp(min=LEAST_ALPHA_CUMPROD)
        self._log_sigmas = (((1 - kept) / kept).log() / 2).tolist()
        self.config = FrozenDict(
            in_channels=channels,
            out_channels=channels,
            sample_size=height if height == width else (height, width),
            num_class_embeds=len(self.classes) or None,
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Labels = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The quantity that the scheduler's prediction type names, for the noisy `sample`.

        Args:
            sample: [B, C, H, W] noisy images x, after `scheduler.scale_model_input`.
            timestep: a number or a tensor, one for all images or [B]; may be fractional.
            class_labels: labels or names, one for all or [B] (None among them means every class), or one-hot rows.
            return_dict: whether to return a UNet2DOutput; otherwise a tuple with one element.

        Raises:
            ValueError: images unlike the bank's or that require grad, a timestep that the scheduler has not, an unknown
                label.
        """
        self.check_images(sample, "sample")
        with torch.no_grad():
            predicted = self._predicted(sample, timestep, class_labels)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    def _predicted(self, sample: Tensor, timestep: Tensor | float, class_labels: Labels) -> Tensor:
        ratios = self.sigmas_at(timestep, len(sample))
        x = sample.to(self.compute_dtype)
        sigma = torch.tensor(ratios, dtype=torch.float64)
        alpha_t = ((1 + sigma**2) ** -0.5).to(x)[:, None, None, None]
        sigma_t = (sigma * (1 + sigma**2) ** -0.5).to(x)[:, None, None, None]

        labels = self.labels_from(self.class_labels if class_labels is None else class_labels)
        x0 = self.denoiser.denoise(x / alpha_t, sigma, labels)
        if self.prediction_type == "sample":
            predicted = x0
        else:
            epsilon = (x - alpha_t * x0) / sigma_t
            predicted = epsilon if self.prediction_type == "epsilon" else alpha_t * epsilon - sigma_t * x0
        return predicted.to(sample.dtype)

    def sigmas_at(self, timestep: Tensor | float, batch: int) -> list[float]:
        """The noise level sigma_t / alpha_t of each item."""
        if timestep is None or isinstance(timestep, (bool, str)):
            raise TypeError(f"timestep: got {timestep!r}, takes a number or one for each item")
        timesteps = torch.as_tensor(timestep).detach().cpu().double().flatten()
        if len(timesteps) not in (1, batch):
            raise ValueError(f"timestep: got {len(timesteps)} for a batch of {batch}")
        return [self._sigma_at(t) for t in timesteps.expand(batch).tolist()]

    def _sigma_at(self, timestep: float) -> float:
        listed = self._sigma_of_step(timestep)
        if listed is not None:
            return listed
        last = len(self._log_sigmas) - 1
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep: got {timestep:g}, the scheduler has 0 to {last}")
        low = min(int(timestep), last - 1) if last else 0
        fraction = timestep - low
        return math.exp((1 - fraction) * self._log_sigmas[low] + fraction * self._log_sigmas[min(low + 1, last)])

    def _sigma_of_step(self, timestep: float) -> float | None:
        """The sigma that a sigma-space scheduler lists for this timestep, or None.

        Its timesteps may be rounded, or interpolated differently from ours, so only its own list gives the sigma that
        `scale_model_input` used. Inner steps between two of its sigmas have timesteps interpolated as ours are.
        """
        scheduler = self.scheduler
        sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
        if sigmas is None or timesteps is None:
            return None
        inner = not getattr(scheduler, "state_in_first_order", True)
        if inner and (hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma")):
            return None
        steps = [step for step, t in enumerate(timesteps.tolist()) if t == timestep]
        if not steps:
            return None
        current = getattr(scheduler, "step_index", None)
        if current is None:
            current = getattr(scheduler, "begin_index", None)
        if current not in steps:
            # Of timesteps that repeat, diffusers starts at the second (index_for_timestep).
            current = steps[1] if len(steps) > 1 else steps[0]
        sigma = float(sigmas[current])
        return sigma if sigma > 0 else None
