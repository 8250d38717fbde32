"""From what visits to cells hold to posterior sums and their errors: steps 5 to 8 of naive.py, for many queries.

Tensors are float64, [q, V] for the visits of q queries unless said; C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .naive import TRIMMED
from .policy import Policy

LN2 = math.log(2)


class Expected(NamedTuple):
    """What the cells' moments let expect of queries.

    reference: [q] bits, of all that follows.
    total, sampled: [q] sums of weights over all cells, and over those that are not evaluated whole.
    variances: [q, columns] of the sum of weights, times 1, the mean of the values, of their squares, third and fourth
        powers.
    logs: [q, 2] the same times log-weights in nats (not relative), and their squares.
    """

    reference: Tensor
    total: Tensor
    sampled: Tensor
    variances: Tensor
    logs: Tensor


class Surely(NamedTuple):
    """Windows that are counted surely, [q, n]: weights, their logarithms in bits (-inf of none), values [q, n, C]."""

    w: Tensor
    x: Tensor
    values: Tensor


@dataclass(frozen=True)
class Sample:
    """What visits hold, with weights relative to one reference a query.

    count: windows evaluated; 0 where there is no visit.
    factor: what sums are expanded by.
    chance: bool, whether the cell was visited by chance.
    within: what takes the scatter inside a visit to the variance of its cell's total; 0 of visits by chance.
    single: the heaviest weight.
    w, w2: [q, V, columns] sums of w and of w^2, times 1 and powers of values about the cell's mean.
    logs: [q, V, 3] sums of w x, w^2 x, w^2 x^2, x in bits; None where moments are not asked for.
    value: [q, V, C] the cells' mean values.
    """

    count: Tensor
    factor: Tensor
    chance: Tensor
    within: Tensor
    single: Tensor
    w: Tensor
    w2: Tensor
    logs: Tensor | None
    value: Tensor

    def about(self, sums: Tensor, centre: Tensor | float) -> list[Tensor]:
        """[q, V, C] of the powers 0, 1, .. of values about a centre [q, 1, C]: the binomial theorem."""
        channels, powers = self.value.shape[2], 2 if self.logs is None else 4
        away = self.value - centre
        raw = [sums[..., :1].expand(*sums.shape[:2], channels)]
        raw += [sums[..., 1 + i * channels : 1 + (i + 1) * channels] for i in range(powers)]
        return [
            sum((math.comb(p, i) * away ** (p - i) * raw[i] for i in range(p + 1)), torch.zeros_like(raw[0]))
            for p in range(len(raw))
        ]

    @cached_property
    def hits(self) -> Tensor:
        """[q] visits by chance."""
        return self.chance.sum(1).double()

    @cached_property
    def spread(self) -> Tensor:
        """[q] of hits, n / (n - 1); 1 of a single one, which is its own variance."""
        return torch.where(self.hits > 1, self.hits / (self.hits - 1).clamp(min=1), 1.0)

    @cached_property
    def one_over_hits(self) -> Tensor:
        return torch.where(self.hits > 1, 1 / self.hits.clamp(min=1), 0.0)

    def covariance(self, squares: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[q] or [q, C] of two totals, from sums of w^2 times both over each visit, and from the sums themselves:
        within the cells that are surely visited, and between the others (Hansen & Hurwitz 1943)."""
        shape = [-1, squares.shape[1]] + [1] * (squares.ndim - 2)
        count = self.count.clamp(min=1).view(shape)
        within = (self.within.view(shape) * (squares - x * y / count)).sum(1)
        fx, fy = ((self.factor * self.chance).view(shape) * z for z in (x, y))
        shape = [-1] + [1] * (squares.ndim - 2)
        between = (fx * fy).sum(1) - self.one_over_hits.view(shape) * fx.sum(1) * fy.sum(1)
        return within + self.spread.view(shape) * between

    def of_weights(self) -> tuple[Tensor, Tensor]:
        """[q] the variance of the sum of weights, and its degrees of freedom (Satterthwaite 1946)."""
        w, w2, y = self.w[..., 0], self.w2[..., 0], self.factor * self.w[..., 0]
        by_cell = (self.within * (w2 - w.square() / self.count.clamp(min=1))).clamp(min=0)
        yy = torch.where(self.chance, y.square(), 0.0)
        hit = (y * self.chance).sum(1)
        by_chance = (self.spread * (yy.sum(1) - self.one_over_hits * hit.square())).clamp(min=0)
        variance = by_cell.sum(1) + by_chance
        of_chance = torch.maximum(
            yy.square().sum(1) - self.one_over_hits * yy.sum(1).square(), by_chance.square() / self.hits.clamp(min=1)
        )
        fourth = by_cell.square().sum(1) + torch.where(self.hits > 0, of_chance, 0.0)
        return variance, torch.where(fourth > 0, variance.square() / fourth.clamp(min=1e-300), 0.0)

    def trimmed(self, s: Tensor, s2: Tensor, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
        """naive.trimmed: the sums of w and w^2, and [q, V] what each visit's sums then count for, its mean being taken
        off with the weight."""
        w = self.w[..., 0]
        heavy = torch.where((self.factor > 1) & (w > 0), self.factor * self.single, 0.0)
        expanded, at = heavy.topk(min(TRIMMED, heavy.shape[1]), 1)
        share = self.count.sum(1).clamp(min=1) ** -policy.trimming
        cuts = torch.zeros_like(heavy)
        for i in range(at.shape[1]):
            weight = self.single.gather(1, at[:, i : i + 1])[:, 0]
            beyond = expanded[:, i] - torch.maximum(weight, share / (1 - share) * (s - expanded[:, i]))
            cut = torch.where((share < 1) & (expanded[:, i] > 0), beyond.clamp(min=0), 0.0)
            s, s2 = s - cut, s2 - cut * weight
            cuts.scatter_(1, at[:, i : i + 1], cut[:, None])
        return s, s2, self.factor - torch.where(cuts > 0, cuts / w.clamp(min=1e-300), 0.0)


def posterior_sums(
    sample: Sample, surely: Surely, expected: Expected | None, m: Tensor, policy: Policy
) -> tuple[dict[str, Tensor], Tensor]:
    """Names as in `PosteriorSum`, [q] or [q, C], and [q] bool whether they are reliable.

    Args:
        expected: None where every window was evaluated.
        m: [q] the reference, in bits.
    """
    channels = sample.value.shape[2]
    w, w2 = sample.w[..., 0], sample.w2[..., 0]
    wv, (_, w2v, w2v2, *_) = sample.about(sample.w, 0.0)[1], sample.about(sample.w2, 0.0)
    sampled, v_surely = (sample.factor * w).sum(1), (surely.w[..., None] * surely.values).sum(1)
    s = sampled + surely.w.sum(1)
    s2 = (sample.factor * w2).sum(1) + surely.w.square().sum(1)
    centre = (((sample.factor[..., None] * wv).sum(1) + v_surely) / s[:, None])[:, None]
    ss, degrees = sample.of_weights()
    vs, vv = sample.covariance(w2v, w[..., None], wv), sample.covariance(w2v2, wv, wv)
    s, s2, counted = sample.trimmed(s, s2, policy)
    v = (counted[..., None] * wv).sum(1) + v_surely
    ratio = v / s[:, None]
    found = {"m": m * LN2, "s": s, "s2": s2, "v": v, "ss": ss, "vs": vs, "vv": vv}
    fits, model = torch.ones_like(s, dtype=torch.bool), None
    if expected is not None:
        log_s, log_sampled, log_total, log_left = (
            torch.log2(x.clamp(min=1e-300)) for x in (s, sampled, expected.total, expected.sampled)
        )
        # Where the sample holds more weight than was expected, so does its variance: the coefficient of variation
        # stays.
        more = m + log_sampled - expected.reference - log_total
        times = torch.exp2((2 * (expected.reference - m + more.clamp(min=0))).clamp(max=500))
        model = _Model(expected, times, m - more.clamp(min=0), degrees / (degrees + policy.prior_degrees))
        of_s, of_v, of_v2 = (times[:, None] * x for x in _powers(expected.variances, channels)[:3])
        own = model.own(_of_ratio(ss[:, None], vs, vv, ratio).sum(1), _of_ratio(of_s, of_v, of_v2, ratio).sum(1))
        found["ss"] = own * ss + (1 - own) * of_s[:, 0]
        found["vs"] = own[:, None] * vs + (1 - own)[:, None] * of_v
        found["vv"] = own[:, None] * vv + (1 - own)[:, None] * of_v2
        errors = _of_ratio(found["ss"][:, None], found["vs"], found["vv"], ratio)
        largest = (errors / s.square()[:, None]).amax(1)
        # More is expected of what was sampled than was found altogether, or more was sampled than was expected.
        misfit = torch.maximum(expected.reference + log_left - m - log_s, more)
        fits = (s > 0) & (misfit <= policy.misfit) & (largest <= policy.unknown**2)
    if sample.logs is not None:
        found |= _moments(sample, surely, counted, s, ss, ratio, centre, model)
    return found, fits


class _Model(NamedTuple):
    """Variances that were expected, and [q] how many times larger they are here, about `reference`, in bits; and the
    share of an observed variance where a larger one was expected (Smyth 2004)."""

    expected: Expected
    times: Tensor
    reference: Tensor
    share: Tensor

    def own(self, observed: Tensor, predicted: Tensor) -> Tensor:
        """[q] the weight of what was observed."""
        return torch.where(observed >= predicted, 1.0, self.share)


def _powers(variances: Tensor, channels: int) -> tuple[Tensor, ...]:
    return variances[:, : 1 + 4 * channels].split([1] + [channels] * 4, 1)


def _of_ratio(ss: Tensor, vs: Tensor, vv: Tensor, ratio: Tensor) -> Tensor:
    """s^2 times the variance of v / s, to first order (delta method)."""
    return vv - 2 * ratio * vs + ratio.square() * ss


def _moments(
    sample: Sample, surely: Surely, counted: Tensor, s: Tensor, ss: Tensor, ratio: Tensor, centre: Tensor,
    model: _Model | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Sums of w v^2 and w log w, and the variances of s times the posterior variance and of s times the entropy.

    Values are about a centre near the posterior mean, so that a variance far below its square keeps its digits.
    """
    assert sample.logs is not None
    w = sample.w[..., :1]
    (_, wu, wq, *_), (_, w2u, w2q, w2u3, w2u4) = sample.about(sample.w, centre), sample.about(sample.w2, centre)
    wx, w2x, w2x2 = sample.logs.unbind(2)
    off = surely.values - centre
    u, q = (
        ((counted[..., None] * of).sum(1) + (surely.w[..., None] * off**power).sum(1)) / s[:, None]
        for power, of in ((1, wu), (2, wq))
    )
    of_known = torch.where(surely.w > 0, surely.w * surely.x, 0.0)
    log = LN2 * ((counted * wx).sum(1) + of_known.sum(1)) / s
    variance = (q - u.square()).clamp(min=0)
    # s times the derivatives of the variance by the totals of w and w u; that by the total of w q is 1.
    cov, by_w, by_u = sample.covariance, u.square() - variance, -2 * u
    qq = by_w.square() * ss[:, None] + by_u.square() * cov(w2q, wu, wu) + cov(w2u4, wq, wq)
    qq = qq + 2 * by_w * (by_u * cov(w2u, wu, w) + cov(w2q, wq, w))
    qq = (qq + 2 * by_u * cov(w2u3, wq, wu)).clamp(min=0)
    # s times the derivatives of ln s - sl / s by the totals are 1 + log and -1.
    by_s = 1 + log
    ee = by_s.square() * ss - 2 * by_s * LN2 * cov(w2x, wx, w[..., 0]) + LN2**2 * cov(w2x2, wx, wx)
    ee = ee.clamp(min=0)
    if model is not None:
        one, first, second, third, fourth = _powers(model.expected.variances, ratio.shape[1])
        about2 = second - 2 * ratio * first + ratio.square() * one
        about4 = fourth + ratio * (-4 * third + ratio * (6 * second + ratio * (-4 * first + ratio * one)))
        predicted = model.times[:, None] * (about4 - 2 * variance * about2 + variance.square() * one)
        own = model.own(qq.sum(1), predicted.sum(1))[:, None]
        qq = own * qq + (1 - own) * predicted
        at_log, (of_log, of_square) = by_s + LN2 * model.reference, model.expected.logs.unbind(1)
        predicted = at_log.square() * one[:, 0] - 2 * at_log * of_log + of_square
        predicted = model.times * predicted.clamp(min=0)
        own = model.own(ee, predicted)
        ee = own * ee + (1 - own) * predicted
    return {"v2": s[:, None] * (variance + ratio.square()), "sl": s * log, "qq": qq, "ee": ee}
