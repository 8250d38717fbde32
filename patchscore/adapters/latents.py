"""Latents: images encoded by an autoencoder, so that patches are taken in its latent space.

    bank = ps.PatchBank(encode(vae, images), value_range="data")
    images = decode(vae, ps.sample(ps.EquivariantLocalScore(bank, 5), n=4))

Latents are in the units in which latent diffusion models see them, (latent - shift_factor) * scaling_factor of a
diffusers AutoencoderKL (Rombach et al. 2022, section 3.1 and appendix G).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor, batch_size: int = 16) -> Tensor:
    """[N, c, h, w] float32 on the CPU: the latents of images [N, C, H, W] in [-1, 1].

    Args:
        autoencoder: a diffusers AutoencoderKL, whose posterior mean is taken; or a callable of a batch.
        images: a tensor.
        batch_size: images encoded together.

    Raises:
        TypeError: an autoencoder that is neither.
        ValueError: images of another shape.
    """

    def one(batch: Tensor) -> Tensor:
        if not hasattr(autoencoder, "encode"):
            return autoencoder(batch)
        scale, shift = _units(autoencoder)
        parameter = next(autoencoder.parameters())
        return (autoencoder.encode(batch.to(parameter)).latent_dist.mode() - shift) * scale

    return _batches(autoencoder, "images", images, batch_size, one)


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor, batch_size: int = 16) -> Tensor:
    """[N, C, H, W] float32 on the CPU: the images of latents, the inverse of `encode`; not clamped.

    Args:
        autoencoder: a diffusers AutoencoderKL, or a callable of a batch.
        latents: [N, c, h, w], as `encode` gives them and a sampler makes them.
        batch_size: latents decoded together.

    Raises:
        TypeError: an autoencoder that is neither.
        ValueError: latents of another shape.
    """

    def one(batch: Tensor) -> Tensor:
        if not hasattr(autoencoder, "decode"):
            return autoencoder(batch)
        scale, shift = _units(autoencoder)
        parameter = next(autoencoder.parameters())
        return autoencoder.decode((batch / scale + shift).to(parameter)).sample

    return _batches(autoencoder, "latents", latents, batch_size, one)


def _units(autoencoder: Any) -> tuple[float, float]:
    """Scale and shift of an AutoencoderKL; a configuration without a shift has 0."""
    config = autoencoder.config
    return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)


def _batches(autoencoder: Any, name: str, given: Tensor, batch_size: int, one: Callable[[Tensor], Tensor]) -> Tensor:
    if not callable(autoencoder):
        raise TypeError(f"autoencoder: got {type(autoencoder).__name__}, takes an AutoencoderKL or a callable")
    if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point():
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: got {got}, takes a floating point tensor [N, C, H, W]")
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    return torch.cat([one(batch).to("cpu", torch.float32) for batch in given.split(batch_size)])
