"""Cluster sampling: whole training images are drawn and summed exactly, in random groups that tell the error.

A simple random sample of n of N images without replacement (Cochran 1977, chapter 9: single-stage cluster sampling),
cut into G groups. Totals are Horvitz-Thompson estimates; their covariance follows from the scatter of the groups
(Wolter 2007, 2.2) with finite-population correction; the mean is their ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...bank import PatchBank
from ...posterior import PosteriorSum
from ...windows import Competition
from .policy import Policy


def posterior_sum(
    exact: Callable[..., PosteriorSum],
    keys: Sequence[int],
    bank: PatchBank,
    competition: Competition,
    budget: float,
    policy: Policy,
) -> PosteriorSum:
    """Sums over a share of the images, drawn anew for each item of a batch.

    Args:
        exact: exact(items, groups, bank) sums exactly over a bank.
        keys: of each item's draws.
    """
    drawn = round(budget * len(bank))
    groups = min(policy.image_groups, drawn)
    parts = []
    for item, key in enumerate(keys):
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(key >> 1))
        found = [exact([item], competition.groups, subset(bank, order[g:drawn:groups])) for g in range(groups)]
        parts.append(combine(found, drawn, len(bank), pixel_moments(bank, order[:drawn])))
    fields = {name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields}
    return PosteriorSum(**fields, pairs=len(keys) * drawn * competition.pairs_per_image)


def subset(bank: PatchBank, members: Tensor) -> PatchBank:
    """Some images of a bank, not copied, in the order in which they lie there."""
    chosen = members if bank.indices is None else bank.indices[members]
    return bank.take(members[chosen.argsort()])


def pixel_moments(bank: PatchBank, members: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the drawn images' pixels, [1, C, 1, 1] each."""
    values = subset(bank, members[:256]).chunk(0, 256, torch.float64)
    return values.mean((0, 2, 3), keepdim=True), values.square().mean((0, 2, 3), keepdim=True)


def combine(found: Sequence[PosteriorSum], drawn: int, size: int, moments: tuple[Tensor, Tensor]) -> PosteriorSum:
    """The estimate from the sums of random groups, with its covariance.

    The observed covariance has as many degrees of freedom as groups that carry weight, less one; beside it counts, for
    one, what a sample of that effective size leaves open (moderated variance, as for cells): where a single image
    carries all weight the groups' scatter says nothing.
    """
    groups, f = len(found), drawn / size
    m = torch.stack([part.m for part in found]).amax(0)
    scale = [torch.exp(part.m - m) for part in found]
    s = torch.stack([part.s * c for part, c in zip(found, scale, strict=True)])
    v = torch.stack([part.v * c for part, c in zip(found, scale, strict=True)])
    s2 = torch.stack([part.s2 * c**2 for part, c in zip(found, scale, strict=True)]).sum(0)
    total_s, total_v = s.sum(0), v.sum(0)
    # Of totals over the sample; ratios do not change when all are scaled up to the bank.
    ds, dv = s - s.mean(0), v - v.mean(0)
    factor = (1 - f) * groups / (groups - 1)
    observed = factor * (ds**2).sum(0), factor * (dv * ds).sum(0), factor * (dv**2).sum(0)
    degrees = (total_s**2 / (s**2).sum(0) - 1).clamp(min=0)
    effective = total_s**2 / s2
    open_ = (1 - f) * total_s**2 / effective
    prior = open_, open_ * moments[0], open_ * moments[1]
    ss, vs, vv = ((degrees * a + b) / (degrees + 1) for a, b in zip(observed, prior, strict=True))
    up = size / drawn
    return PosteriorSum(m, up * total_s, up * total_v, up * s2, up**2 * vv, up**2 * vs, up**2 * ss)
