"""torch's scaled dot product attention over materialised windows, |p|^2 as one more column."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .rows import images_of, with_bias


def prepare(z, sigma, train, k, dtype=torch.float32, backend: SDPBackend | None = None):
    # The fused CPU kernel wants values as wide as keys; without it the logits are materialised, which is slower.
    q, p, v = with_bias(z, sigma, train, k, dtype)

    def work():
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return images_of(F.scaled_dot_product_attention(q, p, v, scale=1.0)[0, 0], z)

    return work


def half(z, sigma, train, k):
    """Half floats, FlashAttention: logits are rounded to 11 bits, so at low noise its answers are wrong."""
    return prepare(z, sigma, train, k, torch.float16, SDPBackend.FLASH_ATTENTION)


def single(z, sigma, train, k):
    """float32, the memory-efficient kernel."""
    return prepare(z, sigma, train, k, torch.float32, SDPBackend.EFFICIENT_ATTENTION)


def only_on(kind: str) -> Callable[[torch.device], str | None]:
    return lambda device: None if device.type == kind else f"it is for {kind}"
