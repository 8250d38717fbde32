"""What tests share: small banks of smooth random images, and machines by name."""

import pytest
import torch

import patchscore as ps


def smooth_images(n, channels, height, width, seed=0, dtype=torch.uint8):
    """Random images with the slow variation of photographs, so that windows resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, height // 4 + 2, width // 4 + 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    images = (fine * 0.5 + 0.1 * torch.randn(n, channels, height, width, generator=generator)).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8) if dtype == torch.uint8 else images.to(dtype)


def machine_named(name, bank, k, **options):
    if name == "ideal":
        return ps.IdealScore(bank, **options)
    if name == "local":
        return ps.LocalScore(bank, k, **options)
    return ps.EquivariantLocalScore(bank, k, padding_mode=name.removeprefix("els-"), **options)


MACHINES = ("ideal", "local", "els-circular", "els-zeros")


@pytest.fixture
def bank():
    """20 colour images of 12 x 10 in three classes."""
    return ps.PatchBank(smooth_images(20, 3, 12, 10), torch.arange(20) % 3, ("red", "green", "blue"))


def noisy(bank, sigma, batch=1, seed=1, dtype=torch.float64):
    """z = x_0 + sigma eps around images of the bank."""
    generator = torch.Generator().manual_seed(seed)
    x0 = bank.chunk(0, batch, dtype)
    return x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=dtype)
