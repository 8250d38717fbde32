"""Noise schedules: the levels a sampler visits, from most noise to none.

x_t = alpha_t x_0 + sigma_t eps. Denoisers only see the ratio sigma_t / alpha_t; a schedule keeps both, so that images
can be shown and compared in the convention they were published in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels in sampling order, from most noise to none.

    Attributes:
        name: the schedule's name.
        alphas: [n + 1] float64. The last level is clean: alpha = 1.
        sigmas: [n + 1] float64; 0 at the last level.
        start_std: standard deviation of the white noise x from which a sampler starts at the first level.

    Raises:
        TypeError: levels that are not numbers.
        ValueError: alphas or start_std not positive, sigma / alpha not falling strictly to a clean last level.
    """

    name: str
    alphas: Tensor
    sigmas: Tensor
    start_std: float

    def __post_init__(self) -> None:
        for name in ("alphas", "sigmas"):
            try:
                object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, takes numbers") from None
        if self.alphas.shape != self.sigmas.shape or self.alphas.ndim != 1 or len(self.alphas) < 2:
            shapes = f"{list(self.alphas.shape)} and {list(self.sigmas.shape)}"
            raise ValueError(f"alphas, sigmas: got {shapes}, takes as many of each, from two")
        if not (self.alphas > 0).all() or not 0 < self.start_std < math.inf:
            raise ValueError("alphas, start_std: takes positive numbers")
        if not (self.ratios.diff() < 0).all() or self.sigmas[-1] != 0 or self.alphas[-1] != 1:
            raise ValueError("alphas, sigmas: sigma / alpha must fall strictly, to sigma = 0 and alpha = 1 at the last")

    @property
    def ratios(self) -> Tensor:
        """[n + 1] sigma_t / alpha_t, the noise level that denoisers take."""
        return self.sigmas / self.alphas

    def __len__(self) -> int:
        """The number of denoising steps."""
        return len(self.alphas) - 1


MOST_STEPS = 10_000
"""More steps change no image and only take time; a slip of the keyboard should not take all memory either."""


def cosine(steps: int = 20) -> Schedule:
    """The published schedule: beta(t) = 1 - cos^2(t / 1.008 * pi / 2), alpha^2 = 1 - beta, sigma^2 = beta.

    Levels t = j / steps for j = steps - 1 down to 0; a sampler starts from pure noise, x ~ N(0, 1), at j = steps - 1.
    Kamb & Ganguli 2024; `steps` levels make steps - 1 denoising steps.
    """
    steps = checks.integer("steps", steps, at_least=2, at_most=MOST_STEPS)
    t = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps
    angle = t / 1.008 * (math.pi / 2)
    return Schedule("cosine", angle.cos(), angle.sin(), start_std=1.0)


def linear(steps: int = 20) -> Schedule:
    """DDPM's schedule: 1,000 betas from 1e-4 to 0.02, alpha_t^2 = prod (1 - beta), sigma_t^2 = 1 - alpha_t^2.

    `steps` of the 1,000 levels, evenly spaced from last to first, then the clean image. Ho et al. 2020, section 4.
    """
    steps = checks.integer("steps", steps, at_least=1, at_most=1000)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept = alphas_cumprod[torch.linspace(999, 0, steps, dtype=torch.float64).round().long()]
    levels = torch.cat([kept, torch.ones(1, dtype=torch.float64)])
    return Schedule("linear", levels.sqrt(), (1 - levels).sqrt(), start_std=1.0)


def karras(steps: int = 20, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """EDM's levels: sigma_i = (sigma_max^(1/rho) + i/(steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0.

    Variance exploding: alpha = 1, and a sampler starts from x ~ N(0, sigma_max^2). Karras et al. 2022, equation 5.
    """
    steps = checks.integer("steps", steps, at_least=2, at_most=MOST_STEPS)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: got {sigma_min} and {sigma_max}, takes 0 < sigma_min < sigma_max")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: got {rho}, takes a positive number")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
    return Schedule("karras", torch.ones_like(sigmas), sigmas, start_std=sigma_max)


LEAST_ALPHA = 2.0**-20
"""Replaces alpha = 0 (pure noise), where z = x / alpha is undefined; sigma / alpha is then 2^20."""


def flow(steps: int = 20, shift: float = 1.0) -> Schedule:
    """Rectified flow: x = (1 - s) x_0 + s eps at s = shift u / (1 + (shift - 1) u), u = i / steps from 1 down to 0.

    Euler's method on its velocity eps - x_0 is DDIM on these levels. Liu et al. 2023; the shift is that of Esser et al.
    2024, section 5.3.2. At s = 1 alpha is 2^-20 in place of 0.
    """
    steps = checks.integer("steps", steps, at_least=1, at_most=MOST_STEPS)
    if not 0 < checks.number("shift", shift) < math.inf:
        raise ValueError(f"shift: got {shift}, takes a positive number")
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    sigmas = shift * u / (1 + (shift - 1) * u)
    return Schedule("flow", (1 - sigmas).clamp(min=LEAST_ALPHA), sigmas, start_std=1.0)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": cosine, "linear": linear, "karras": karras, "flow": flow}


def get_schedule(schedule: str | Schedule, steps: int) -> Schedule:
    """The schedule of that name with `steps` levels; a Schedule is returned unchanged.

    Raises:
        ValueError: an unknown name, or a number of steps that the schedule does not take.
    """
    if isinstance(schedule, Schedule):
        return schedule
    return SCHEDULES[checks.one_of("schedule", schedule, SCHEDULES)](steps)
