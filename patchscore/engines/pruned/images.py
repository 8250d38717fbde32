"""Cluster sampling: whole training images are drawn and summed exactly, in random groups whose scatter gives the error.

A simple random sample of n of N images without replacement (Cochran 1977, chapter 9: single-stage cluster sampling),
cut into G groups. Totals are Horvitz-Thompson estimates; their covariance follows from the scatter of the groups
(Wolter 2007, 2.2) with finite-population correction; the mean is their ratio, and so are the posterior variance and
the entropy functions of them, whose errors follow to first order (delta method; Wolter 2007, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...bank import PatchBank
from ...posterior import PosteriorSum
from ...windows import Competition
from .policy import Policy


def drawn(
    exact: Callable[[PatchBank], PosteriorSum],
    key: int,
    bank: PatchBank,
    competition: Competition,
    share: float,
    policy: Policy,
) -> PosteriorSum:
    """Sums over a random fraction of the images.

    Args:
        exact: sums exactly over a bank.
        key: of the draws.
    """
    count = round(share * len(bank))
    groups = min(policy.image_groups, count)
    members = order(bank, key)[:count]
    found = [exact(subset(bank, members[group::groups])) for group in range(groups)]
    moments = tuple(x.to(found[0].s.device) for x in pixel_moments(bank, members))
    total = combine(found, count, len(bank), moments)
    return total.with_pairs(count * competition.pairs_per_image)


def order(bank: PatchBank, key: int) -> Tensor:
    """The images of a bank in the order in which they are drawn."""
    return torch.randperm(len(bank), generator=torch.Generator().manual_seed(key >> 1))


def subset(bank: PatchBank, members: Tensor) -> PatchBank:
    """Some images of a bank, not copied, in the order in which they lie there."""
    chosen = members if bank.indices is None else bank.indices[members]
    return bank.take(members[chosen.argsort()])


def pixel_moments(bank: PatchBank, members: Tensor) -> tuple[Tensor, ...]:
    """Means of the first four powers of the drawn images' pixels, [1, C, 1, 1] each."""
    values = subset(bank, members[:256]).chunk(0, 256, torch.float64)
    return tuple((values**power).mean((0, 2, 3), keepdim=True) for power in (1, 2, 3, 4))


def combine(found: Sequence[PosteriorSum], drawn: int, size: int, moments: tuple[Tensor, ...]) -> PosteriorSum:
    """The estimate from the sums of random groups, with its covariance.

    The observed covariance has as many degrees of freedom as groups that carry weight, less one; beside it counts, for
    one, what a sample of that effective size leaves open (moderated variance, as for cells): where a single image
    carries all weight the groups' scatter says nothing.
    """
    groups, f, up = len(found), drawn / size, size / drawn
    m = torch.stack([part.m for part in found]).amax(0)
    at_m = [part.relative_to(m) for part in found]
    s, v = torch.stack([part.s for part in at_m]), torch.stack([part.v for part in at_m])
    s2 = torch.stack([part.s2 for part in at_m]).sum(0)
    total_s, total_v = s.sum(0), v.sum(0)
    # Of totals over the sample; ratios do not change when all are scaled up to the bank.
    factor = (1 - f) * groups / (groups - 1)
    degrees = (total_s**2 / (s**2).sum(0) - 1).clamp(min=0)
    open_ = (1 - f) * s2

    def covariance(a: Tensor, b: Tensor, expected: Tensor) -> Tensor:
        observed = factor * ((a - a.mean(0)) * (b - b.mean(0))).sum(0)
        return up**2 * (degrees * observed + open_ * expected) / (degrees + 1)

    one = torch.ones_like(total_s)
    vv, vs, ss = covariance(v, v, moments[1]), covariance(v, s, moments[0]), covariance(s, s, one)
    total = PosteriorSum(m, up * total_s, up * total_v, up * s2, vv, vs, ss)
    if any(part.v2 is None or part.sl is None for part in at_m):
        return total
    v2, sl = (torch.stack([part.fields[name] for part in at_m]) for name in ("v2", "sl"))
    square, mean, log = v2.sum(0) / total_s, total_v / total_s, sl.sum(0) / total_s
    variance = square - mean.square()
    # Derivatives of v2 / s - (v / s)^2 and of ln s - sl / s by the totals, times s.
    q, e = v2 - 2 * mean * v + (mean.square() - variance) * s, (1 + log) * s - sl
    p1, p2, p3, p4 = moments
    fourth = p4 - 4 * mean * p3 + 6 * mean**2 * p2 - 4 * mean**3 * p1 + mean**4  # of pixels about the mean
    spread = fourth - 2 * variance * (p2 - 2 * mean * p1 + mean**2) + variance**2
    # Were log-weights normal with variance t, the entropy would be t / 2 above the logarithm of the effective size; and
    # a window that alone has the weight may be one of one or, as it counts here, of `up`.
    entropy, effective = total_s.log() - log, total_s**2 / s2
    logs = 2 * (entropy - effective.log()).clamp(min=0) + (1 + math.log(up) ** 2) / effective
    qq, ee = covariance(q, q, spread), covariance(e, e, logs)
    # The logarithm is bent: its bias, by the jackknife (Wolter 2007, 4.2), counts as an error.
    left = total_s - s
    entropies = (left * groups / (groups - 1)).log() - (sl.sum(0) - sl) / left
    bias = (1 - f) * (groups - 1) * (entropies.mean(0) - entropy)
    ee = ee + (up * total_s * bias.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)) ** 2
    return replace(total, v2=up * v2.sum(0), sl=up * sl.sum(0), qq=qq, ee=ee)
