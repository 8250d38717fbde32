"""Exchange of posterior sums between ranks: a reduce-scatter, in which each rank adds up all ranks' sums for its part
of the pixels, then an all-gather of the totals.

That is two rounds of messages, where an all-reduce of R ranks takes 2 (R - 1) in a row. Sums are added in float64, so
that numbers are rounded twice on their way, however many ranks there are, and float32 is enough to travel in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..posterior import SAMPLING, PosteriorSum, accumulator_dtype
from .ranks import Ranks

ORDER = ("s", "v", "s2", "v2", "sl", *SAMPLING)
OF_VALUES = ("v", "v2", "vv", "vs", "qq")
"""Fields that have a number for each channel."""


def added(own: PosteriorSum, ranks: Ranks, ess: bool = True, sampled: bool = False, fine: bool = False) -> PosteriorSum:
    """The sums over the windows of all ranks, bitwise the same on all of them.

    Args:
        own: this rank's; of the same shape and with the same moments on every rank.
        ranks: who takes part; every one of them calls this.
        ess: whether s2 and the sampling covariance are wanted; they are NaN without.
        sampled: whether some rank's sums may have a sampling covariance.
        fine: whether sums are to be right to 1e-10 of what they are, and not 1e-7.
    """
    full = _with_covariance(own) if sampled else own
    names = tuple(name for name in ORDER if name in full.fields and (ess or name not in ("s2", *SAMPLING)))
    batch, channels, height, width = own.v.shape

    # Every rank gets its share of the pixels from all, and how many pairs each evaluated.
    there, back = (Wire(names, channels, fine, brief) for brief in (False, True))
    pairs = torch.tensor([own.pairs or 0], device=own.m.device).view(torch.uint8)
    shares = _shares(there.packed(_of_pixels(full)), ranks)
    found = ranks.exchange(torch.cat([shares.flatten(1), pairs.expand(ranks.size, -1)], 1))
    evaluated = _read(found[:, -len(pairs) :], torch.int64).sum()
    total = _merged(there.unpacked(found[:, : -len(pairs)].reshape(-1, shares.shape[2])), ranks)

    # All get the totals of all shares.
    rows = back.packed(total)
    found = ranks.exchange(rows.expand(ranks.size, *rows.shape)).flatten(0, 1)[: batch * height * width]
    total = _of_images(back.unpacked(found), full)
    unknown = {name: torch.full_like(x, torch.nan) for name, x in full.fields.items() if name not in total.fields}
    counted = None if own.pairs is None else int(evaluated)
    return replace(total, **unknown, pairs=counted, span=own.span)


def sum_of(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of every rank's x, on all of them, bitwise the same; every x is rounded to its own type only."""
    shares = _shares(x.reshape(-1, 1), ranks)
    total = ranks.exchange(shares).to(accumulator_dtype(x.device)).sum(0).to(x.dtype)
    return ranks.exchange(total.expand(ranks.size, *total.shape)).flatten()[: x.numel()].view_as(x)


@dataclass(frozen=True)
class Wire:
    """How the sums of a pixel are packed into bytes.

    Fields travel in float32, relative to an m that a float32 and a bfloat16 add up to. Second moments and covariances
    travel as those of v_a - c, with c the mean, as they are differences of large numbers otherwise.

    Attributes:
        names: the fields beside m.
        channels: of the images.
        fine: a bfloat16 more for each number, which adds 9 bits to its 24.
        brief: sampling covariances in bfloat16 alone: standard errors within 0.1% of what they are.
    """

    names: tuple[str, ...]
    channels: int
    fine: bool
    brief: bool

    def packed(self, sums: PosteriorSum) -> Tensor:
        """[P, bytes] the sums of P pixels, [P, C, 1, 1] each."""
        high = sums.m.float()
        low = torch.where(high.isinf(), 0, sums.m - high).bfloat16()
        sums = _centred(sums.relative_to(high.to(sums.m) + low.to(sums.m)), 1, self.fine)
        wide = [sums.fields[name].flatten(1) for name in self.names if name not in self._short]
        short = [sums.fields[name].flatten(1) for name in self._short]
        halves = [low.flatten(1), *(x - x.float() for x in wide if self.fine), *short]
        columns = torch.cat([high.flatten(1), *(x.float() for x in wide)], 1)
        return torch.cat([columns.view(torch.uint8), torch.cat([x.bfloat16() for x in halves], 1).view(torch.uint8)], 1)

    def unpacked(self, rows: Tensor) -> PosteriorSum:
        """The sums that `packed` put into rows; a missing s2 is NaN, other missing fields are None."""
        exact = accumulator_dtype(rows.device)
        wide = [name for name in self.names if name not in self._short]
        widths = [1, *map(self._width, wide)]
        columns = _read(rows[:, : 4 * sum(widths)], torch.float32).to(exact)
        halves = _read(rows[:, 4 * sum(widths) :], torch.bfloat16).to(exact)
        low = sum(widths) if self.fine else 1
        columns[:, :low] += halves[:, :low]
        m, *parts = (x[..., None, None] for x in columns.split(widths, 1))
        short = (x[..., None, None] for x in halves[:, low:].split([*map(self._width, self._short)], 1))
        fields = dict(zip((*wide, *self._short), (*parts, *short), strict=True))
        return _centred(PosteriorSum(m=m, **{"s2": torch.full_like(m, torch.nan), **fields}), -1, self.fine)

    @property
    def _short(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if self.brief and name in SAMPLING)

    def _width(self, name: str) -> int:
        return self.channels if name in OF_VALUES else 1


def _merged(parts: PosteriorSum, ranks: Ranks) -> PosteriorSum:
    """What `merge_all` makes of the parts of all ranks, [size P, C, 1, 1] each."""
    parts = parts.mapped(lambda x: x.unflatten(0, (ranks.size, -1)))
    parts = parts.relative_to(parts.m.amax(0))
    return replace(parts, **{name: x.sum(0) for name, x in parts.fields.items() if name != "m"})  # type: ignore[arg-type]


def _centred(sums: PosteriorSum, sign: int, fine: bool) -> PosteriorSum:
    """Second moments and covariances of v_a - c instead of v_a; with sign -1, back again. v itself stays."""
    # As both sides find it. Values lie in [-1, 1]; a sum over no windows has no mean.
    exact = accumulator_dtype(sums.v.device)
    c = (sums.v.float().to(exact) / sums.s.float().to(exact)).nan_to_num(0.0).clamp(-1, 1)
    found = {}
    if sums.v2 is not None:
        found["v2"] = sums.v2 - sign * c * (2 * sums.v - c * sums.s)
    if sums.vv is not None and sums.vs is not None and sums.ss is not None:
        found["vs"] = sums.vs - sign * c * sums.ss
        found["vv"] = sums.vv - sign * 2 * c * sums.vs + c**2 * sums.ss
    return replace(sums, **found)  # type: ignore[arg-type]


def _with_covariance(own: PosteriorSum) -> PosteriorSum:
    """The same sums; with zeros where nothing was sampled."""
    found = {"vv": own.v, "vs": own.v, "ss": own.s}
    if own.v2 is not None and own.sl is not None:
        found |= {"qq": own.v2, "ee": own.sl}
    return replace(own, **{name: torch.zeros_like(x) for name, x in found.items() if name not in own.fields})  # type: ignore[arg-type]


def _of_pixels(sums: PosteriorSum) -> PosteriorSum:
    """[P, C, 1, 1] each: every pixel by itself, with weights of its own."""
    batch, _, height, width = sums.v.shape
    return sums.mapped(lambda x: x.expand(batch, -1, height, width).permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1))


def _of_images(sums: PosteriorSum, like: PosteriorSum) -> PosteriorSum:
    """The pixels where they were; whole images have one weight for all of theirs."""
    batch, _, height, width = like.v.shape
    fields = {}
    for name, x in sums.fields.items():
        rows, cols = like.fields[name].shape[2:]
        placed = x.view(batch, height, width, -1).permute(0, 3, 1, 2)
        fields[name] = placed[..., :rows, :cols].contiguous()
    return replace(sums, **fields)  # type: ignore[arg-type]


def _read(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, bytes] as numbers of a type; copied, as bytes in the midst of others need not lie where torch takes them."""
    return rows.reshape(-1).clone().view(dtype).view(len(rows), -1)


def _shares(rows: Tensor, ranks: Ranks) -> Tensor:
    """[size, share, ...] rows for each rank; zeros where they do not divide."""
    share = -(-len(rows) // ranks.size)
    missing = rows.new_zeros(share * ranks.size - len(rows), *rows.shape[1:])
    return torch.cat([rows, missing]).view(ranks.size, share, *rows.shape[1:])
