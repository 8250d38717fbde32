"""A denoiser as a diffusers UNet: `DDIMPipeline(unet=PatchScoreUNet(machine, scheduler), scheduler=scheduler)`.

Every scheduler has a convention: the x = alpha_t x_0 + sigma_t eps that it gives to a network at a timestep, and the
quantity that it expects back. The denoiser takes z = x / alpha_t and sigma = sigma_t / alpha_t. A table here names the
convention of every scheduler; one that is not in it is refused, so that none is served at a wrong noise level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
from ..noise import LEAST_ALPHA
from .module import DenoiserModule

# What a scheduler asks a network for, at x = alpha x_0 + sigma eps.


@dataclass(frozen=True)
class Level:
    """x = alpha x_0 + sigma eps is what the scheduler gives at a timestep; sigma_data as in EDM, elsewhere 1."""

    alpha: float
    sigma: float
    sigma_data: float = 1.0

    @property
    def ratio(self) -> float:
        """The noise level that denoisers take."""
        return self.sigma / self.alpha


Numbers = dict[str, Tensor]
"""alpha, sigma and sigma_data of every item, [B, 1, 1, 1], beside x and x0 [B, C, H, W]."""


def _epsilon(n: Numbers) -> Tensor:
    return (n["x"] - n["alpha"] * n["x0"]) / n["sigma"]


def _v(n: Numbers) -> Tensor:
    """Salimans & Ho 2022, appendix D; where alpha^2 + sigma^2 = 1."""
    return n["alpha"] * _epsilon(n) - n["sigma"] * n["x0"]


def _sample(n: Numbers) -> Tensor:
    return n["x0"]


def _flow(n: Numbers) -> Tensor:
    """The velocity eps - x_0 at x = (1 - sigma) x_0 + sigma eps (Liu et al. 2023; Lipman et al. 2023)."""
    return (n["x"] - n["x0"]) / n["sigma"]


def _edm(n: Numbers) -> Tensor:
    """F with D = c_skip z + c_out F (Karras et al. 2022, table 1)."""
    z, level, data = n["x"] / n["alpha"], n["sigma"] / n["alpha"], n["sigma_data"]
    total = (level**2 + data**2).sqrt()
    return (n["x0"] - (data / total) ** 2 * z) * total / (level * data)


PREDICTED: dict[str, dict[str, Callable[[Numbers], Tensor]]] = {
    "preserving": {"epsilon": _epsilon, "v_prediction": _v, "sample": _sample},
    "flow": {"flow_prediction": _flow, "epsilon": _epsilon, "sample": _sample},
    "inverted": {"flow_prediction": lambda n: -_flow(n)},
    "edm": {"epsilon": _edm, "v_prediction": lambda n: -_edm(n)},
}
"""By convention of x, what a network returns for each prediction type."""


# The schedulers.

NO_SAMPLE, ALL = ("epsilon", "v_prediction"), ("epsilon", "v_prediction", "sample")
FLOW = ("flow_prediction", "epsilon", "sample")

BY_TIMESTEP = {
    "DDIMScheduler": ALL,
    "DDIMParallelScheduler": ALL,
    "DDPMScheduler": ALL,
    "DDPMParallelScheduler": ALL,
    "CogVideoXDDIMScheduler": ALL,
    "LCMScheduler": ALL,
    "TCDScheduler": ALL,
    "UnCLIPScheduler": ("epsilon", "sample"),
    "PNDMScheduler": NO_SAMPLE,
}
"""alpha_t^2 is alphas_cumprod at the timestep. With what they predict, here and below."""

BY_STEP = {
    "EulerDiscreteScheduler": ALL,
    "EulerAncestralDiscreteScheduler": NO_SAMPLE,
    "HeunDiscreteScheduler": ALL,
    "KDPM2DiscreteScheduler": NO_SAMPLE,
    "KDPM2AncestralDiscreteScheduler": NO_SAMPLE,
    "LMSDiscreteScheduler": NO_SAMPLE,
    "DPMSolverSDEScheduler": NO_SAMPLE,
    "DPMSolverMultistepScheduler": ALL,
    "DPMSolverSinglestepScheduler": ALL,
    "DEISMultistepScheduler": ALL,
    "UniPCMultistepScheduler": ALL,
    "SASolverScheduler": ALL,
}
"""A list of sigmas has sigma_t / alpha_t of each step, or with use_flow_sigmas sigma_t of x = (1 - sigma) x_0 + sigma
eps."""

BY_FLOW_STEP = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
"""A list of sigmas has sigma_t of each step, and velocities are predicted."""

BY_EDM_STEP = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
"""A list of sigmas has the noise level of z, and x = z / sqrt(sigma^2 + sigma_data^2)."""

REFUSED = {
    "DDIMInverseScheduler": "it asks at another timestep than that of its x",
    "DPMSolverMultistepInverseScheduler": "it goes from images to noise",
    "CogVideoXDPMScheduler": "it steps by earlier predictions that only its own pipeline keeps",
    "RePaintScheduler": "it goes back and forth in time with a mask that only its own pipeline gives",
    "IPNDMScheduler": "it begins at alpha_t = 0, where the epsilon that it takes says nothing of x_0",
    "CMStochasticIterativeScheduler": "it takes a consistency model, which is no posterior mean",
    "SCMScheduler": "it takes a consistency model, which is no posterior mean",
    "ConsistencyDecoderScheduler": "it takes a consistency model, which is no posterior mean",
    "FlowMapEulerDiscreteScheduler": "it takes a flow map, which is no posterior mean",
    "PiflowScheduler": "it takes several predictions at once",
    "HeliosScheduler": "its stages are those of its own pipeline",
    "HeliosDMDScheduler": "its stages are those of its own pipeline",
    "KarrasVeScheduler": "its pipeline scales images in its own way; PatchScoreDenoiser serves EDM's samplers",
    "ScoreSdeVeScheduler": "it takes a score at the noise levels of its own pipeline",
    "ScoreSdeVpScheduler": "it takes a score at the noise levels of its own pipeline",
    "DDPMWuerstchenScheduler": "its timesteps are ratios of its own pipeline",
    "RFD4ProteinaScheduler": "it samples proteins",
    "AmusedScheduler": "it samples tokens",
    "BlockRefinementScheduler": "it samples tokens",
    "DiscreteDDIMScheduler": "it samples tokens",
    "EntropyBoundScheduler": "it samples tokens",
    "VQDiffusionScheduler": "it samples tokens",
}
"""Schedulers that are known and not served, and why."""


def convention(kind: type, flow_sigmas: bool = False) -> tuple[str, tuple[str, ...]]:
    """What a class of schedulers means by x, and the prediction types that it is served with.

    x is "preserving" (alpha_t^2 + sigma_t^2 = 1), "flow" (alpha_t + sigma_t = 1) or "edm" (x = c_in z).

    Args:
        kind: the class, or one derived from it.
        flow_sigmas: whether it has use_flow_sigmas=True.

    Raises:
        ValueError: a class that is not known or not served.
    """
    for known in (above.__name__ for above in kind.__mro__):
        if known in REFUSED:
            raise ValueError(f"scheduler: {kind.__name__} is not served: {REFUSED[known]}")
        if known in BY_TIMESTEP:
            return "preserving", BY_TIMESTEP[known]
        if known in BY_STEP:
            return ("flow", FLOW) if flow_sigmas else ("preserving", BY_STEP[known])
        if known in BY_FLOW_STEP:
            return "flow", ("flow_prediction",)
        if known in BY_EDM_STEP:
            return "edm", NO_SAMPLE
    raise ValueError(f"scheduler: {kind.__name__} is not known; docs/adapters.md lists those that are served")


class PatchScoreUNet(DenoiserModule):
    """A denoiser with the interface of `diffusers.UNet2DModel`.

    The scheduler determines what is predicted and the noise level of a timestep: where it keeps a list of sigmas with
    its timesteps, the sigma of the step that it is at; otherwise `alphas_cumprod`, interpolated in log sigma between
    whole timesteps. Pass the scheduler that the sampling loop uses. At x = alpha_t x_0 + sigma_t eps:

        epsilon = (x - alpha_t D) / sigma_t,   v = alpha_t epsilon - sigma_t D,   sample = D,
        flow = (x - D) / sigma_t at alpha_t = 1 - sigma_t,   EDM's F = (D - c_skip z) / c_out

    (Ho et al. 2020; Salimans & Ho 2022, appendix D; Liu et al. 2023; Karras et al. 2022, table 1). A table in
    docs/adapters.md lists every scheduler of diffusers and what is served.

    Args:
        machine: the denoiser.
        scheduler: a diffusers scheduler.
        class_labels: labels for calls without any, such as those of DDIMPipeline and DDPMPipeline, which have no
            classes: one for all images, or a list as long as the batch.

    Raises:
        TypeError: not a denoiser.
        ValueError: a scheduler that is not known or not served, of another prediction type than it is served with, or
            with a learned variance (named).
    """

    def __init__(self, machine: Denoiser, scheduler: Any, class_labels: Labels = None):
        super().__init__(machine)
        name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
        flow_sigmas = bool(config.get("use_flow_sigmas", False))
        self._scaling, predictions = convention(type(scheduler), flow_sigmas)
        prediction_type = config.get("prediction_type", predictions[0])
        if prediction_type not in predictions:
            takes = ", ".join(map(repr, predictions)) + (" with use_flow_sigmas=True" if flow_sigmas else "")
            raise ValueError(f"scheduler: {name} predicts {prediction_type!r}, takes {takes}")
        if str(config.get("variance_type") or "").startswith("learned"):
            raise ValueError(f"scheduler: {name} has a learned variance, and a denoiser predicts none")
        channels, height, width = machine.shape
        self.scheduler = scheduler
        self.prediction_type = prediction_type
        self.class_labels = class_labels
        if config.get("invert_sigmas", False):
            self._scaling = "inverted"
        self._predict = PREDICTED[self._scaling][prediction_type]
        self._log_sigmas: list[float] = []
        if self._scaling == "preserving":
            kept = scheduler.alphas_cumprod.detach().cpu().double().clamp(min=LEAST_ALPHA**2)
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
            ValueError: images unlike the bank's, or that require grad of a denoiser that is no `Differentiable`; a
                timestep that the scheduler does not have, an unknown label.
        """
        self.check_images(sample, "sample")
        with self.denoiser.graph():
            predicted = self._predicted(sample, timestep, class_labels)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    def _predicted(self, sample: Tensor, timestep: Tensor | float, class_labels: Labels) -> Tensor:
        levels = self.levels_at(timestep, len(sample))
        if self.prediction_type == "epsilon" and min(level.alpha for level in levels) <= LEAST_ALPHA:
            raise ValueError(
                f"timestep: got {_shown(timestep)}, pure noise (alpha_t = 0), where epsilon says nothing of x_0; takes "
                "a scheduler that predicts v_prediction or sample"
            )
        x = sample.to(self.compute_dtype)
        names = ("alpha", "sigma", "sigma_data")
        numbers = {name: self._each(x, [getattr(level, name) for level in levels]) for name in names}

        labels = self.labels_from(self.class_labels if class_labels is None else class_labels)
        sigma = torch.tensor([level.ratio for level in levels], dtype=torch.float64)
        x0 = self.denoiser.denoise(x / numbers["alpha"], sigma, labels)
        return self._predict({**numbers, "x": x, "x0": x0}).to(sample.dtype)

    @staticmethod
    def _each(x: Tensor, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(x)[:, None, None, None]

    def sigmas_at(self, timestep: Tensor | float, batch: int) -> list[float]:
        """The noise level sigma_t / alpha_t of each item."""
        return [level.ratio for level in self.levels_at(timestep, batch)]

    def levels_at(self, timestep: Tensor | float, batch: int) -> list[Level]:
        """What the scheduler means by x, for each item.

        Raises:
            TypeError: a timestep that is not a number.
            ValueError: timesteps for another batch, or one that the scheduler does not have.
        """
        if timestep is None or isinstance(timestep, (bool, str)):
            raise TypeError(f"timestep: got {timestep!r}, takes a number or one for each item")
        timesteps = torch.as_tensor(timestep).detach().cpu().double().flatten()
        if len(timesteps) not in (1, batch):
            raise ValueError(f"timestep: got {len(timesteps)} for a batch of {batch}")
        return [self._level_at(t) for t in timesteps.expand(batch).tolist()]

    def _level_at(self, timestep: float) -> Level:
        listed = self._sigma_of_step(timestep)
        if self._scaling == "preserving":
            sigma = self._sigma_at(timestep) if listed is None else listed
            return Level((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5)
        if listed is None:
            raise ValueError(f"timestep: got {timestep:g}, which is none of the scheduler's; set_timesteps makes them")
        if self._scaling == "edm":
            data = float(self.scheduler.config.sigma_data)
            scale = (listed**2 + data**2) ** -0.5
            return Level(scale, listed * scale, data)
        sigma = 1 - listed if self._scaling == "inverted" else listed
        return Level(max(1 - sigma, LEAST_ALPHA), sigma)

    def _sigma_at(self, timestep: float) -> float:
        """From alphas_cumprod."""
        last = len(self._log_sigmas) - 1
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep: got {timestep:g}, the scheduler has 0 to {last}")
        low = min(int(timestep), last - 1) if last else 0
        fraction = timestep - low
        return math.exp((1 - fraction) * self._log_sigmas[low] + fraction * self._log_sigmas[min(low + 1, last)])

    def _sigma_of_step(self, timestep: float) -> float | None:
        """The sigma that the scheduler lists for this timestep, or None.

        Its timesteps may be rounded, repeated or shifted, or interpolated differently from ours, so only its own list
        gives the sigma that it uses.
        """
        scheduler = self.scheduler
        sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
        if sigmas is None or timesteps is None:
            return None
        listed = timesteps.detach().cpu().double()
        current = getattr(scheduler, "step_index", None)
        if current is None:
            current = getattr(scheduler, "begin_index", None)
        elif not getattr(scheduler, "state_in_first_order", True):
            inner = _inner_sigma(scheduler, current)
            if inner is not None and _same(float(listed[current]), timestep):
                return inner
        steps = (listed == timestep).nonzero().flatten().tolist()
        if not steps:
            return None
        if current not in steps:
            # Of timesteps that repeat, diffusers starts at the second (index_for_timestep).
            current = steps[1] if len(steps) > 1 else steps[0]
        sigma = float(sigmas[current])
        return sigma if sigma > 0 or self._scaling == "inverted" else None


def _inner_sigma(scheduler: Any, step: int) -> float | None:
    """The sigma between two of its list at which a second-order scheduler takes its second prediction, or None."""
    if hasattr(scheduler, "sigmas_interpol"):
        ancestral = hasattr(scheduler, "sigmas_up")
        return float(scheduler.sigmas_interpol[step - 1 if ancestral else step])
    middle = getattr(scheduler, "mid_point_sigma", None)
    return None if middle is None else float(middle)


def _same(a: float, b: float) -> bool:
    """Timesteps may be NaN, where a scheduler interpolates beyond its least sigma."""
    return a == b or (math.isnan(a) and math.isnan(b))


def _shown(timestep: Tensor | float) -> str:
    return ", ".join(f"{t:g}" for t in torch.as_tensor(timestep).flatten().tolist())
