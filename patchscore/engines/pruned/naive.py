"""The definition of the engine `pruned`, in float64, for one query and at the end for an image's: read this first.

The population of a query q is the competing windows p_a with weights w_a = exp(-|q - p_a|^2 / (2 sigma^2)) and values
v_a. Wanted is the ratio of two totals, sum_a w_a v_a / sum_a w_a. The strata are the cells of an index. Steps, in the
order of the functions below:

1. expected weights: E[w] and E[w^2] in each stratum, from its moments, and how far from the bank these say anything;
2. allocation: how many windows of each stratum to evaluate (Neyman 1934; Cochran 1977, chapter 5);
3. known windows: some heavy ones, found without chance, are counted surely and weigh nothing in the sample (a stratum
   that is evaluated completely; Cochran 1977, 5.8);
4. sampling: strata that get at least a tile of windows are surely visited, the others by chance (systematic sampling
   with probability proportional to size; Madow 1949; Saerndal, Swensson & Wretman 1992, 3.6.2);
5. totals: Horvitz & Thompson 1952, the heaviest weights trimmed (Ionides 2008), and their ratio;
6. variance: within strata (Cochran 1977, 5.4) and between the strata visited by chance (Hansen & Hurwitz 1943);
7. moderated variance: where more variance was to be expected than is observed, both by their degrees of freedom (Smyth
   2004);
8. the posterior variance and the entropy, functions of totals too (of w v^2, of w log w), with errors to first order
   (Taylor linearisation; Saerndal, Swensson & Wretman 1992, 5.5);
9. pooled variances: those of an image's pixels are drawn towards their mean (empirical Bayes; Efron & Morris 1975).

All weights are positive and their sum is the denominator, so an estimate is a convex combination of values, and the
effective sample size (Kish 1965) is at least 1. Trimming keeps both. csrc/pruned does the same for all pixels of an
image, cell by cell, with three shortcuts: cells are told apart only under parents that would get some tiles; the sample
of a cell starts at a random tile and wraps around, which in a random order of windows is a simple random sample; and
that tile is drawn for the cell, not for the pixel, so that pixels share what is read (their errors are correlated). It
knows the heaviest windows of the cells of the largest expected weight, what neighbouring pixels propose (PatchMatch,
Barnes et al. 2009), and along a trajectory what was heavy at the noise level before (memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...index import Strata
from ...posterior import PosteriorSum
from .policy import POLICY, Policy

TILE = 8

TRIMMED = 8
"""Windows of a query whose weights may be trimmed."""


class Sums(NamedTuple):
    """Totals of weights (s), weighted values (v), squared weights; and the covariance of the first two.

    Then what moments take: totals of w v^2 and w log w, and the variances of s times the posterior variance and of s
    times the entropy, to first order. Names are those of `PosteriorSum`.
    """

    s: Tensor
    v: Tensor
    s2: Tensor
    ss: Tensor
    vs: Tensor
    vv: Tensor
    v2: Tensor
    sl: Tensor
    qq: Tensor
    ee: Tensor

    @property
    def mean(self) -> Tensor:
        return self.v / self.s

    @property
    def stderr(self) -> Tensor:
        """Of the ratio, to first order (delta method; Cochran 1977, 6.4)."""
        variance = self.vv - 2 * self.mean * self.vs + self.mean.square() * self.ss
        return variance.clamp(min=0).sqrt() / self.s

    @property
    def variance(self) -> Tensor:
        """Posterior variance."""
        return self.v2 / self.s - self.mean.square()

    @property
    def entropy(self) -> Tensor:
        """Of the weights, in nats."""
        return self.s.log() - self.sl / self.s


def expected_log_weights(
    features: Tensor, rest: Tensor, strata: Strata, sigma: float, dims: int
) -> tuple[Tensor, Tensor]:
    """log E[w] and log E[w^2] of each stratum: [H] each.

    A stratum is taken for a Gaussian, independent along the principal axes and isotropic beyond them. w^t is a Gaussian
    kernel of variance sigma^2 / t, and a Gaussian kernel averaged over a Gaussian N(c, l) is, along each axis,
    (1 + t l / sigma^2)^(-1/2) exp(-(q - c)^2 / (2 (sigma^2 / t + l))).

    Args:
        features: [rank] the query along the axes.
        rest: [] its squared norm beyond them.
        dims: pixels of a window.
    """
    variance, others = strata.variance.double(), dims - strata.mean.shape[1]
    beyond = strata.rest.double() / max(1, others)
    away = (features.double() - strata.mean.double()).square()
    logs = []
    for power in (1, 2):
        noise = sigma**2 / power
        along = torch.log1p(variance / noise) + away / (noise + variance)
        logs.append(-(along.sum(1) + others * torch.log1p(beyond / noise) + rest.double() / (noise + beyond)) / 2)
    return logs[0], logs[1]


def least_log_weight(spread: float, sigma: float, windows: int, policy: Policy = POLICY) -> float:
    """Log-weight of the heaviest window below which a query is too far from the bank for the moments of cells.

    Log-weights of the windows about a cell's centre c scatter by |q - c| spread^(1/2) / sigma^2, and the largest of N
    is some (2 log N)^(1/2) such deviations above the mean. Where E[w] = exp(mean + deviation^2 / 2) is decided beyond
    that, by windows that a bank of N does not hold, it says nothing of those there are (the freezing of the random
    energy model; Derrida 1981). So this is the scatter that is allowed, at the distance |q - p|^2 = -2 sigma^2 log w.

    Args:
        spread: variance of one value of a window about its cell's centre.
        windows: N, all that compete.
    """
    return -policy.reach * sigma**2 * math.log(max(2, windows)) / max(spread, 1e-30)


def size_measures(size: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of each stratum: N sd(w), and N sqrt(var(w) + TILE E[w]^2).

    To the first the optimum number of windows is proportional where the stratum is surely visited; to the second where
    it is visited by chance, TILE windows at a time, which adds the variance between strata. Of N weights the squares
    add up to at most the square of the sum; a Gaussian, which reaches further than N windows do, knows no such bound.
    """
    square = torch.minimum(second, 2 * first + size.clamp(min=1).log()).exp()
    variance = torch.maximum(square - (2 * first).exp(), 1e-6 * square)
    return size * variance.sqrt(), size * (variance + TILE * (2 * first).exp()).sqrt()


def allocation(size: Tensor, sure: Tensor, chance: Tensor, budget: float) -> Tensor:
    """[H] expected windows of each stratum: min(N, max(k sure, min(k chance, TILE))), with k such that they add up to
    the budget (by bisection)."""
    low, high = -200.0, 400.0
    for _ in range(80):
        k = math.exp((low + high) / 2)
        windows = torch.minimum(size, torch.maximum(k * sure, (k * chance).clamp(max=TILE)))
        low, high = ((low + high) / 2, high) if windows.sum() <= budget else (low, (low + high) / 2)
    return windows


def trimmed(
    s: Tensor, v: Tensor, s2: Tensor, heavy: Sequence[tuple[float, float, Tensor]], evaluated: int, policy: Policy
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of w, w v and w^2, in which no expanded weight is more than a share of the first: biased, with less mean
    squared error where few windows have most of the weight (Ionides 2008).

    Args:
        v: whatever is weighted: values, their squares, log-weights.
        heavy: of the heaviest window of each sampled stratum the weight, expanded and as it is, and the weighted means
            of `v` in the stratum's sample.
        evaluated: windows of the sample.
    """
    share = max(evaluated, 1) ** -policy.trimming
    for expanded, weight, mean in sorted(heavy, key=lambda x: -x[0])[:TRIMMED]:
        if share < 1:
            cut = max(0.0, expanded - max(weight, share / (1 - share) * (s.item() - expanded)))
            s, v, s2 = s - cut, v - cut * mean, s2 - cut * weight
    return s, v, s2


class Expected(NamedTuple):
    """Variances of totals that the strata's moments let expect; names as in `Sums`."""

    ss: Tensor
    vs: Tensor
    vv: Tensor
    qq: Tensor
    ee: Tensor


def expected_variances(
    of_weights: Tensor, strata: Strata, log_moments: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, log: Tensor
) -> Expected:
    """What a stratum's weights leave open counts for its values too: weight and value are taken for independent.

    Values are normal within a stratum. Log-weights there, each as likely as its squared weight, have mean f'(2) and
    variance f''(2), where f(t) = log E[w^t] is taken for a parabola through 0, log E[w] and log E[w^2].

    Args:
        of_weights: [H] variance of the sum of each stratum's weights.
        log_moments: relative to the reference of the weights.
        mean, variance, log: [C], [C], [] weighted means of the values, of their squared deviations, of log-weights.
    """
    value, square = strata.value.double(), strata.value_square.double()
    away, spread = value - mean, (square - value.square()).clamp(min=0)
    second = away.square() + spread
    fourth = away**4 + 6 * away.square() * spread + 3 * spread.square()
    first, twice = log_moments
    twice = torch.minimum(twice, 2 * first + strata.size.clamp(min=1).log())
    from_log = (1 + log - 1.5 * twice + 2 * first).square() + (twice - 2 * first).clamp(min=0)
    return Expected(
        of_weights.sum(),
        of_weights @ value,
        of_weights @ square,
        of_weights @ (fourth - 2 * variance * second + variance.square()),
        of_weights @ from_log,
    )


def estimate(
    weights: Tensor, values: Tensor, strata: Strata, log_moments: tuple[Tensor, Tensor], budget: float,
    generator: torch.Generator, policy: Policy = POLICY, known: Sequence[int] = (),
) -> Sums:  # fmt: skip
    """Sums of one query from a sample drawn by `generator`.

    Args:
        weights, values: [N], [N, C] of all windows, stratum by stratum; only those sampled are looked at.
        log_moments: `expected_log_weights`, relative to the same reference as the weights.
        budget: windows to evaluate, in expectation.
        known: windows that are counted surely.
    """
    surely = _weighted(weights[list(known)].double(), values[list(known)].double()).sum(0)
    surely_s2 = weights[list(known)].double().square().sum()
    weights = weights.clone()
    weights[list(known)] = 0
    size = strata.size.double()
    starts = (strata.size.cumsum(0) - strata.size).tolist()
    sure, chance = size_measures(size, *log_moments)
    windows = allocation(size, sure, chance, budget)
    channels = values.shape[1]
    totals, s2 = torch.zeros(2 + 2 * channels).double(), torch.zeros(()).double()
    covariance = torch.zeros(len(totals), len(totals)).double()
    of_weights = torch.zeros(len(size)).double()  # expected variance of each stratum's sum
    fourth, hits, heavy, evaluated = 0.0, [], [], 0
    climb = torch.rand((), generator=generator).item()
    for h, n in enumerate(windows.tolist()):
        count, w_mean = int(strata.size[h]), log_moments[0][h].exp().item()
        variance = (sure[h] / size[h]).item() ** 2 if count else 0.0
        if count == 0:
            continue
        if n >= policy.certain_from * count or (n >= 0.999 * TILE and count <= 2 * TILE):
            taken, factor = torch.arange(count), 1.0
        elif n >= 0.999 * TILE:
            taken = torch.randperm(count, generator=generator)[: max(2 * TILE, math.ceil(n))]
            factor = count / len(taken)
            of_weights[h] = count**2 * variance * (1 - 1 / factor) / len(taken)
        else:
            probability, before = n / TILE, climb
            climb += probability
            uncertainty = (count * w_mean) ** 2 + count**2 * variance / TILE
            of_weights[h] = max(uncertainty * (1 - probability), count**2 * variance / TILE * (1 - n / count)) / max(
                probability, 1e-300
            )
            taken, factor = torch.arange(0), 0.0
            if math.floor(climb) > math.floor(before):
                taken = torch.randperm(count, generator=generator)[:TILE]
                factor = count / len(taken) / probability
        if len(taken) == 0:
            continue
        w = weights[starts[h] + taken].double()
        y = _weighted(w, values[starts[h] + taken].double())
        total = factor * y.sum(0)
        totals, s2 = totals + total, s2 + factor * w.square().sum()
        evaluated += len(taken)
        if factor > 1 and w.sum() > 0:
            heavy.append((factor * w.max().item(), w.max().item(), total[1:] / total[0]))
        if n < 0.999 * TILE:
            hits.append(total)
        elif factor > 1:
            centred = y - y.mean(0)
            part = count**2 * (1 - 1 / factor) / len(taken) * centred.T @ centred / (len(taken) - 1)
            covariance += part
            fourth += part[0, 0].item() ** 2
    if hits:
        stacked = torch.stack(hits)
        centred = stacked - stacked.mean(0) if len(hits) > 1 else stacked
        part = centred.T @ centred * (len(hits) / (len(hits) - 1) if len(hits) > 1 else 1)
        covariance += part
        squares = stacked[:, 0].square()
        scatter = squares - squares.mean() if len(hits) > 1 else squares
        fourth += max(scatter.square().sum().item(), part[0, 0].item() ** 2 / len(hits))
    degrees = covariance[0, 0].item() ** 2 / fourth if fourth else 0.0
    # Where the sample holds more weight than was expected, so does its variance: the coefficient of variation stays.
    more = max(1.0, totals[0].item() / (size * log_moments[0].exp()).sum().item())
    raised = log_moments[0] + math.log(more), log_moments[1] + 2 * math.log(more)
    totals, s2 = totals + surely, s2 + surely_s2
    s, others, s2 = trimmed(totals[0], totals[1:], s2, heavy, evaluated, policy)
    v, v2, sl = others.split([channels, channels, 1])
    mean, log = v / s, sl[0] / s
    variances = v2 / s - mean.square()
    # Derivatives of s (v2 / s - (v / s)^2) and of s (ln s - sl / s) by the totals, at fixed s in front.
    by_totals = torch.zeros(channels + 1, len(totals)).double()
    by_totals[:channels, 0], by_totals[channels, 0] = mean.square() - variances, 1 + log
    by_totals[:channels, 1 : 1 + channels] = torch.diag(-2 * mean)
    by_totals[:channels, 1 + channels : -1] = torch.eye(channels)
    by_totals[channels, -1] = -1
    linear = ((by_totals @ covariance) * by_totals).sum(1)
    observed = Expected(
        covariance[0, 0],
        covariance[0, 1 : 1 + channels],
        covariance.diagonal()[1 : 1 + channels],
        linear[:channels],
        linear[channels],
    )
    predicted = expected_variances(of_weights * more**2, strata, raised, mean, variances, log)
    own = degrees / (degrees + policy.prior_degrees)

    def moderated(names: Sequence[str], error: Callable[[Expected], Tensor]) -> dict[str, Tensor]:
        share = 1.0 if error(observed) >= error(predicted) else own
        return {name: share * getattr(observed, name) + (1 - share) * getattr(predicted, name) for name in names}

    return Sums(
        s, v, s2, v2=v2, sl=sl[0],
        **moderated(["ss", "vs", "vv"], lambda x: (x.vv - 2 * mean * x.vs + mean.square() * x.ss).clamp(min=0).sum()),
        **moderated(["qq"], lambda x: x.qq.sum()),
        **moderated(["ee"], lambda x: x.ee),
    )  # fmt: skip


def pooled(sums: PosteriorSum, fits: Tensor, share: float) -> PosteriorSum:
    """Sums of an image's pixels [Q, ...] with every variance, relative to the sum of weights, drawn to their mean.

    A pixel whose sample missed a heavy window in a cell that lets none expect states too little; how often that happens
    shows in all pixels of the image. The mean of the squared standard errors stays. What a pixel gets of the sum's mean
    variance moves numerator and denominator alike and leaves their ratio.

    Args:
        fits: [Q] bool, which pixels' samples are reliable; the mean is theirs.
        share: of the mean in each variance.
    """
    if not fits.any():
        return sums
    assert sums.vv is not None
    assert sums.vs is not None
    assert sums.ss is not None
    mean, square = sums.mean, sums.s.square()

    def shrunk(variance: Tensor, common: Tensor) -> Tensor:
        return (1 - share) * variance + share * square * common

    of_sum = (sums.ss / square)[fits].mean(0)
    of_ratio = ((sums.vv - 2 * mean * sums.vs + mean.square() * sums.ss).clamp(min=0) / square)[fits].mean(0)
    fields = {
        "ss": shrunk(sums.ss, of_sum),
        "vs": shrunk(sums.vs, mean * of_sum),
        "vv": shrunk(sums.vv, of_ratio + mean.square() * of_sum),
    }
    if sums.qq is not None and sums.ee is not None:
        fields |= {name: shrunk(x, (x / square)[fits].mean(0)) for name, x in (("qq", sums.qq), ("ee", sums.ee))}
    return replace(sums, **fields)  # type: ignore[arg-type]


def _weighted(w: Tensor, values: Tensor) -> Tensor:
    """[n, 2 + 2 C] of n windows w, w v, w v^2, w log w."""
    return torch.cat([w[:, None], w[:, None] * values, w[:, None] * values.square(), torch.xlogy(w, w)[:, None]], 1)
