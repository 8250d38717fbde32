"""What one would use instead of this package: one file a rival.

A peer that sums over all windows has `prepare(z, sigma, train, k)`, which returns a function without arguments that
answers [B, C, H, W]: the posterior mean of circular EquivariantLocalScore. z is [B, C, H, W], sigma a number, train
[N, C, H, W] in [-1, 1], all on one device. What `prepare` does can be kept between calls (materialised windows); a
benchmark says whether it times it. `unavailable(device)` says why a peer cannot serve there, or None.

A peer that takes a part of the images (uniform, screening, golddiff) has `images(z, sigma, bank, ...)`, and what an
exact engine sums over them is its answer; `top_k` takes the nearest windows that FAISS finds, and
`nearest_cut` the five nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import attention, compiled_attention, convolution, flex_attention, gemm, keops

Prepare = Callable[[torch.Tensor, float, torch.Tensor, int], Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Peer:
    """A rival that sums over all windows, and why it cannot serve a device."""

    prepare: Prepare
    unavailable: Callable[[torch.device], str | None] = lambda device: None


EXACT = {
    "attention": Peer(attention.prepare, attention.only_on("cpu")),
    "attention fp16": Peer(attention.half, attention.only_on("cuda")),
    "attention fp32": Peer(attention.single, attention.only_on("cuda")),
    "compiled attention": Peer(compiled_attention.prepare, compiled_attention.unavailable),
    "FlexAttention": Peer(flex_attention.prepare, flex_attention.unavailable),
    "keops": Peer(keops.prepare, keops.unavailable),
    "gemm": Peer(gemm.prepare),
    "convolution": Peer(convolution.prepare),
}
"""By the name in a benchmark's rows, the fastest first."""


def found(device: torch.device, skipped: Callable[[str], object]) -> dict[str, Prepare]:
    """Peers that can serve on a device; `skipped` is told of the others, but of those for other devices."""
    serving = {}
    for name, peer in EXACT.items():
        reason = peer.unavailable(device)
        if reason is None:
            serving[name] = peer.prepare
        elif not reason.startswith("it is for"):
            skipped(f"{name}: {reason}")
    return serving
