"""PosteriorSum: the one thing engines return.

A softmax-weighted mean over a bank is a ratio of two sums, and sums can be split: over chunks, threads, shards, cells
of an index. A PosteriorSum is such a partial sum, kept relative to a reference log-weight so that it neither overflows
nor underflows; `merge` adds two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

POWERS = {"s": 1, "v": 1, "v2": 1, "s2": 2, "vv": 2, "vs": 2, "ss": 2, "qq": 2, "ee": 2}
"""How many factors e^(l - m) the terms of a sum have."""

SAMPLING = ("vv", "vs", "ss", "qq", "ee")
"""What sums have that were estimated from a sample."""


@dataclass(frozen=True)
class PosteriorSum:
    """Partial sums over windows a with log-weights l_a = -|q - p_a|^2 / (2 sigma^2) and values v_a.

    m need not be the largest log-weight, only near it. Where all pixels have the same weights (IdealScore), m, s and s2
    are [B, 1, 1, 1] and broadcast. vv, vs and ss are the sampling covariance of sums that were estimated from a sample
    of the windows, relative to e^(2 m); covariances of independent parts add as the sums do.

    Attributes:
        m: [B, 1, H, W] reference log-weight, -inf where nothing was summed yet.
        s: [B, 1, H, W] sum_a e^(l_a - m).
        v: [B, C, H, W] sum_a e^(l_a - m) v_a.
        s2: [B, 1, H, W] sum_a e^(2 (l_a - m)).
        vv: [B, C, H, W] variance of v; None where every window was summed, and so are vs and ss.
        vs: [B, C, H, W] covariance of v and s.
        ss: [B, 1, H, W] variance of s.
        pairs: (pixel, window) pairs that were evaluated, None for all.
        v2: [B, C, H, W] sum_a e^(l_a - m) v_a^2; None where moments were not asked for, and so is sl.
        sl: [B, 1, H, W] sum_a e^(l_a - m) (l_a - m).
        qq: [B, C, H, W] sampling variance of s times the posterior variance, to first order; None as vv, or without
            moments, and so is ee.
        ee: [B, 1, H, W] sampling variance of s times the entropy, to first order.
        span: values lie in [-span, span], which bounds the error of a mean where hardly any weight was found.
    """

    m: Tensor
    s: Tensor
    v: Tensor
    s2: Tensor
    vv: Tensor | None = None
    vs: Tensor | None = None
    ss: Tensor | None = None
    pairs: int | None = field(default=None, kw_only=True)
    v2: Tensor | None = field(default=None, kw_only=True)
    sl: Tensor | None = field(default=None, kw_only=True)
    qq: Tensor | None = field(default=None, kw_only=True)
    ee: Tensor | None = field(default=None, kw_only=True)
    span: float = field(default=1.0, kw_only=True)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        device: torch.device | str,
        sampled: bool = False,
        moments: bool = False,
        span: float = 1.0,
    ) -> PosteriorSum:
        """The sum over no windows for images of `shape` [B, C, H, W], the neutral element of `merge`.

        With `sampled` it has room for a sampling covariance, so that `add_` takes estimated parts; with `moments` for
        v2 and sl.
        """
        dtype = accumulator_dtype(device)
        batch, _, height, width = shape
        s = torch.zeros(batch, 1, height, width, dtype=dtype, device=device)
        v = torch.zeros(*shape, dtype=dtype, device=device)
        total = cls(torch.full_like(s, -torch.inf), s, v, s.clone(), span=span)
        if sampled:
            total = replace(total, vv=v.clone(), vs=v.clone(), ss=s.clone())
        if moments:
            total = replace(total, v2=v.clone(), sl=s.clone())
        return replace(total, qq=v.clone(), ee=s.clone()) if sampled and moments else total

    @property
    def mean(self) -> Tensor:
        """[B, C, H, W], the softmax-weighted mean v / s."""
        return self.v / self.s

    @property
    def ess(self) -> Tensor:
        """[B, 1, H, W], effective sample size s^2 / s2 (Kish): n windows of equal weight have n."""
        return self.s**2 / self.s2

    @property
    def variance(self) -> Tensor:
        """[B, C, H, W], posterior variance v2 / s - mean^2, at least 0. The sums need moments."""
        assert self.v2 is not None
        return (self.v2 / self.s - self.mean**2).clamp(min=0)

    @property
    def entropy(self) -> Tensor:
        """[B, 1, H, W], entropy of the weights, -sum_a w_a ln w_a = ln s - sl / s in nats. The sums need moments."""
        assert self.sl is not None
        return (self.s.log() - self.sl / self.s).clamp(min=0)

    @property
    def stderr(self) -> Tensor:
        """[B, C, H, W], standard error of `mean`, of a ratio to first order; zero where all windows were summed.

        It is at most 2 `span`: where hardly any weight was found, the first order says nothing.
        """
        if self.vv is None or self.vs is None or self.ss is None:
            return torch.zeros_like(self.v)
        mean = self.mean
        variance = (self.vv - 2 * mean * self.vs + mean**2 * self.ss).clamp(min=0) / self.s**2
        most = 2 * self.span
        return variance.sqrt().nan_to_num(nan=most).clamp(max=most)

    @property
    def variance_stderr(self) -> Tensor:
        """[B, C, H, W], standard error of `variance`, to first order; zero where all windows were summed."""
        if self.qq is None:
            return torch.zeros_like(self.v)
        most = self.span**2  # the largest variance of numbers in [-span, span]
        return (self.qq.clamp(min=0).sqrt() / self.s).nan_to_num(nan=most).clamp(max=most)

    @property
    def entropy_stderr(self) -> Tensor:
        """[B, 1, H, W], standard error of `entropy` in nats, to first order; zero where all windows were summed."""
        return torch.zeros_like(self.s) if self.ee is None else self.ee.clamp(min=0).sqrt() / self.s

    @property
    def fields(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        found = {name: getattr(self, name) for name in ("m", "s", "v", "s2", "v2", "sl", *SAMPLING)}
        return {name: x for name, x in found.items() if x is not None}

    def block(self, items: slice, rows: slice, cols: slice) -> PosteriorSum:
        """The sums of some pixels, as views."""
        return self._with({name: x[items, :, rows, cols] for name, x in self.fields.items()})

    def add_(self, part: PosteriorSum, items: slice, rows: slice, cols: slice) -> None:
        """Merges, in place, sums for a block of pixels: `part` covers items x rows x cols of this one."""
        block = self.block(items, rows, cols)
        merged = merge(block, part)
        for name, x in block.fields.items():
            x.copy_(getattr(merged, name))

    def to(self, device: torch.device) -> PosteriorSum:
        """The same sums on `device`."""
        return self._with({name: x.to(device) for name, x in self.fields.items()})

    def _with(self, fields: dict[str, Tensor]) -> PosteriorSum:
        return PosteriorSum(**fields, pairs=None, span=self.span)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PosteriorSum:
        """The same sums with their pixels elsewhere, such as mirrored; `pairs` is kept."""
        return replace(self, **{name: change(x) for name, x in self.fields.items()})  # type: ignore[arg-type]

    def relative_to(self, m: Tensor) -> PosteriorSum:
        """The same sums relative to another reference log-weight m [B, 1, H, W], or -inf where they are empty."""
        # Where both are empty (-inf) - (-inf) would be NaN; any finite reference serves there.
        reference = torch.where(torch.isneginf(m), torch.zeros_like(m), m)
        scale = torch.exp(self.m - reference)
        found = {name: x * scale ** POWERS[name] for name, x in self.fields.items() if name in POWERS}
        if self.sl is not None:
            # sum_a e^(l_a - m) (l_a - reference); the sum over no windows has no part in it.
            moved = torch.where(torch.isneginf(self.m), torch.zeros_like(m), self.m - reference)
            found["sl"] = (self.sl + moved * self.s) * scale
        return PosteriorSum(m=m, **found, pairs=self.pairs, span=self.span)

    def scaled(self, scale: float) -> PosteriorSum:
        """The same sums of values that are `scale` times as large."""
        powers = {"v": 1, "vv": 2, "vs": 1, "v2": 2, "qq": 4}
        times = {name: x * scale ** powers[name] for name, x in self.fields.items() if name in powers}
        return replace(self, **times, span=self.span * scale)  # type: ignore[arg-type]

    def with_pairs(self, pairs: int) -> PosteriorSum:
        """The same sums, of so many evaluated pairs."""
        return replace(self, pairs=pairs)


def merge(a: PosteriorSum, b: PosteriorSum) -> PosteriorSum:
    """The sum over the windows of both. Associative and commutative up to rounding; `PosteriorSum.empty` is neutral."""
    m = torch.maximum(a.m, b.m)
    found = a.relative_to(m).fields, b.relative_to(m).fields
    # Sums over all windows have no sampling covariance to add; moments are those of both or of none.
    total = {}
    for name in POWERS.keys() | {"sl"}:
        parts = [part[name] for part in found if name in part]
        if len(parts) == 2 or (parts and name in SAMPLING):
            total[name] = reduce(torch.add, parts)
    pairs = None if a.pairs is None or b.pairs is None else a.pairs + b.pairs
    return PosteriorSum(m=m, **total, pairs=pairs, span=max(a.span, b.span))


def merge_all(parts: Iterable[PosteriorSum]) -> PosteriorSum:
    """`merge` over one or more parts, from the left."""
    return reduce(merge, parts)


def merge_served(parts: Sequence[tuple[PosteriorSum, list[str]]]) -> tuple[PosteriorSum, list[str]]:
    """`merge_all` of sums with the names of the engines that took them; pairs that nobody counted are none."""
    total = merge_all([part for part, _ in parts])
    return total.with_pairs(sum(part.pairs or 0 for part, _ in parts)), [name for _, names in parts for name in names]


def accumulator_dtype(device: torch.device | str) -> torch.dtype:
    """float64 wherever the device has it, so that millions of terms add without drift."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
