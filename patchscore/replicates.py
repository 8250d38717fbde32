"""Standard errors of what is made of many pixels, from independent draws of everything that is sampled.

`Estimate.stderr` is that of each pixel by itself. Pixels of an image share their draws, so their errors are correlated,
and nothing about a mean, a distance or an r^2 follows from it. Replicates with draws of their own need no model of that
correlation (Wolter 2007, "Introduction to Variance Estimation", chapter 2: independent random groups).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .denoiser import Denoiser


@dataclass(frozen=True)
class Replicated:
    """A summary over replicates.

    Attributes:
        value: [...] the mean of `values`.
        stderr: [...] its standard error, from their scatter; Student's t with replicates - 1 degrees of freedom. Zero
            where nothing is drawn.
        values: [replicates, ...] float64, one of each replicate.
    """

    value: Tensor
    stderr: Tensor
    values: Tensor


def replicated(summary: Callable[[Denoiser], Tensor | float], denoiser: Denoiser, replicates: int = 8) -> Replicated:
    """A summary of what a denoiser makes, with the standard error that sampling leaves in it.

        error = ps.replicated(lambda machine: machine.denoise(z, sigma).mean(), els)
        error = ps.replicated(lambda machine: ps.sample(machine, n=4).std(), els)

    The replicates differ in their random draws alone. A summary that is not linear keeps the bias that it has from one
    of them: the mean of a squared error, say, holds the variance of the denoiser's own error.

    Args:
        summary: summary(denoiser), a number or a tensor [...] of the same shape each time.
        denoiser: what draws; where it draws nothing the summary is made once.
        replicates: from 2; each costs one summary.

    Raises:
        TypeError: not a Denoiser, a summary that returns no numbers.
        ValueError: fewer than 2 replicates, summaries of different shapes.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser: got {type(denoiser).__name__}, takes a machine or another Denoiser")
    replicates = checks.integer("replicates", replicates, at_least=2)
    draws = denoiser.redrawn(0) is not denoiser
    values = [_numbers(summary(denoiser.redrawn(draw))) for draw in range(replicates if draws else 1)]
    if len({value.shape for value in values}) > 1:
        raise ValueError(f"summary: returned shapes {sorted({tuple(value.shape) for value in values})}")
    found = torch.stack(values)
    stderr = found.std(0) / len(found) ** 0.5 if draws else torch.zeros_like(found[0])
    return Replicated(found.mean(0), stderr, found)


def _numbers(value: Tensor | float) -> Tensor:
    if not isinstance(value, (Tensor, int, float)):
        raise TypeError(f"summary: returned {type(value).__name__}, takes a function that returns numbers")
    return torch.as_tensor(value).detach().to("cpu", torch.float64)
