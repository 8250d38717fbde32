"""A uniform sample of whole training images, summed exactly."""

from __future__ import annotations

import torch


def images(count: int, bank_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """[count] positions, without replacement."""
    return torch.randperm(bank_size, generator=generator)[:count]
