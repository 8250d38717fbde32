"""PosteriorSum: the one thing engines return.

A softmax-weighted mean over a bank is a ratio of two sums, and sums can be split: over chunks, threads, shards, near
and far cells. A PosteriorSum is such a partial sum, kept relative to a reference log-weight so that it neither
overflows nor vanishes; `merge` adds two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class PosteriorSum:
    """Partial sums over windows a with log-weights l_a = -|q - p_a|^2 / (2 sigma^2) and values v_a.

    m:  [B, 1, H, W] reference log-weight, -inf where nothing was summed yet
    s:  [B, 1, H, W] sum_a e^(l_a - m)
    v:  [B, C, H, W] sum_a e^(l_a - m) v_a
    s2: [B, 1, H, W] sum_a e^(2 (l_a - m))

    m need not be the largest log-weight, only near it. Where all pixels share their weights (IdealScore), m, s and s2
    are [B, 1, 1, 1] and broadcast.
    """

    m: Tensor
    s: Tensor
    v: Tensor
    s2: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str) -> PosteriorSum:
        """The sum over no windows for images of `shape` [B, C, H, W], the neutral element of `merge`."""
        dtype = accumulator_dtype(device)
        batch, _, height, width = shape
        s = torch.zeros(batch, 1, height, width, dtype=dtype, device=device)
        return cls(torch.full_like(s, -torch.inf), s, torch.zeros(*shape, dtype=dtype, device=device), s.clone())

    @property
    def mean(self) -> Tensor:
        """[B, C, H, W], the softmax-weighted mean v / s."""
        return self.v / self.s

    @property
    def ess(self) -> Tensor:
        """[B, 1, H, W], effective sample size s^2 / s2: how many equally weighted windows would be as many."""
        return self.s**2 / self.s2

    def add_(self, part: PosteriorSum, items: slice, rows: slice, cols: slice) -> None:
        """Merges, in place, sums for a block of pixels: `part` covers items x rows x cols of this one."""
        block = PosteriorSum(*(x[items, :, rows, cols] for x in (self.m, self.s, self.v, self.s2)))
        merged = merge(block, part)
        for name in ("m", "s", "v", "s2"):
            getattr(block, name).copy_(getattr(merged, name))


def merge(a: PosteriorSum, b: PosteriorSum) -> PosteriorSum:
    """The sum over the windows of both. Associative and commutative up to rounding; `PosteriorSum.empty` is neutral."""
    m = torch.maximum(a.m, b.m)
    # Where both are empty m is -inf and (-inf) - (-inf) would be NaN; any finite reference serves there.
    reference = torch.where(torch.isneginf(m), torch.zeros_like(m), m)
    scale_a, scale_b = torch.exp(a.m - reference), torch.exp(b.m - reference)
    return PosteriorSum(
        m=m,
        s=a.s * scale_a + b.s * scale_b,
        v=a.v * scale_a + b.v * scale_b,
        s2=a.s2 * scale_a**2 + b.s2 * scale_b**2,
    )


def merge_all(parts: Iterable[PosteriorSum]) -> PosteriorSum:
    """`merge` over one or more parts, from the left."""
    return reduce(merge, parts)


def accumulator_dtype(device: torch.device | str) -> torch.dtype:
    """float64 wherever the device has it, so that millions of terms add without drift."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
