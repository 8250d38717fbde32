"""How many numbers, at what precision, describe a window in `fused`: as few and as coarse as the noise allows.

A row is a window's pixels or, where that is shorter, its leading principal axes; then the bias -|p|^2 / 2 in three
half floats, which a query meets with ones, so that one product is q.p - |p|^2 / 2. `choose_plan` holds the error model.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...bank import PatchBank
from ...posterior import accumulator_dtype
from ...windows import Axis, Group, windows_as_rows
from ..device import Made

BIAS_COLUMNS = 3
UNIT_ROUNDOFF = 2.0**-11
"""Of half floats."""
SPLIT_AXES = (0, 4, 8)
"""Numbers of leading axes that may be split into hi + lo. The variance of windows lies in the first few; more than
eight gained no size of rows on CIFAR-10 at k = 5 and 7."""
PILOT_ESS = 17 * 64
"""Effective windows of the worst pixel from which on a pilot sets the reference: of 64 splits each has one among the
17th of its windows that its pilot reads. With fewer a tile of 128 queries is often done twice (docs/notes/fused.md)."""
NOISE_DEVIATIONS, ROUNDING_DEVIATIONS = 4.0, 3.0
"""Of the noise along the line between two windows, and of rounding: both at once are exceeded with a probability of
e^-12.5, once in 250,000 pixels."""
WEIGHTS_RANGE = 2 * UNIT_ROUNDOFF
"""How far rounding to half floats moves two weights apart, relative to them."""
CUBIC_RANGE = 2 * 7.5e-5
"""How far the polynomial that stands in for some exponentials does (`_power` in kernel.py)."""
SPECTRUM_IMAGES = 512


@dataclass(frozen=True)
class Plan:
    """The columns of a row: `size` numbers, low halves of the leading ones, the bias, zeros up to K.

    size: pixels C k^2, or the rank where `axes`.
    axes: principal axes instead of pixels.
    q_lo, p_lo: of how many leading numbers queries, patches carry a low half; it meets the other side's high half.
    exact: weights that decide a result are taken from differences instead of products.
    skip: tiles without a visible weight are passed over.
    pilot: a pilot sets the reference log-weight, instead of a running maximum.
    """

    size: int
    axes: bool = False
    q_lo: int = 0
    p_lo: int = 0
    exact: bool = False
    skip: bool = False
    pilot: bool = False

    @property
    def bias(self) -> int:
        """The first column of the bias."""
        return self.size + self.q_lo + self.p_lo

    @property
    def columns(self) -> int:
        """K: a size the kernel takes in one or two blocks up to 320, in blocks of 64 beyond."""
        needed = self.bias + BIAS_COLUMNS
        sizes = (32, 64, 80, 96, 128, 160, 192, 256, 320)
        return next((size for size in sizes if size >= needed), -(-needed // 64) * 64)


@dataclass
class Spectrum:
    """Mean, principal axes and their variances over the windows of a bank at one patch size; float64."""

    mean: Tensor  # [d]
    axes: Tensor  # [d, d], a column an axis
    variances: list[float]  # descending
    square: float  # mean square of a pixel
    windows: int  # how many compete


def range_of_values(sigma: float) -> float:
    """V of `choose_plan`: how far the values of two windows that share the weight lie apart."""
    return min(2 * NOISE_DEVIATIONS * sigma, 2.0)


def least_tolerance(sigma: float) -> float:
    """The error that a pixel may have by the rounding of weights alone, where two windows share the weight."""
    return range_of_values(sigma) / 4 * WEIGHTS_RANGE


def choose_plan(
    spectrum: Spectrum | None, d: int, sigma: float, tolerance: float, uint8: bool, axes: bool, largest: float = 0.0
) -> Plan:
    """The shortest rows whose denoised pixel is expected within `tolerance` of float64's, by this error model.

    Let a query q and a patch p be rounded (or cut) to q + e and p + f, and the bias be that of the rounded patch. The
    kernel then computes the exact distance between rounded points, and with q's own terms, which all windows share,
    left out, a logit is off by

        ((q - p).f - p.e) / sigma^2 + O(e^2 + f^2),      |e_i| <= u_i |q_i|, |f_i| <= u_i |p_i|,

    where u_i = u = 2^-11, or u^2 on axes that are split into hi + lo. By Cauchy-Schwarz that is at most
    u (|q - p| |p| + |q| |p|) / sigma^2. What moves a result is the spread of this over the windows that carry weight,
    whose (q - p)_i has variance sigma^2; rounding errors have mean square u_i^2/6 of the number's.

    Few windows: nothing averages out. A query is a window plus noise, so two windows p and p' can share the weight
    where the noise along their difference reaches |p - p'| / 2: within a = NOISE_DEVIATIONS standard deviations,

        |p - p'| <= R = min(2 a sigma, 2 sqrt(d)),   |v - v'| <= V = min(2 a sigma, 2),

    as pixels lie in [-1, 1]. Their logits part by (p' - p).e / sigma^2, of standard deviation at most
    R max_i(u_i |q_i|) / sqrt(6) / sigma^2; q_i^2 is 1 + sigma^2 for a pixel and l_i + sigma^2 for an axis, l_i its
    variance. Patches rounded too add 2 sum_i(u_i^2 l_i) / (6 sigma^2) to the square of that, and a dropped axis
    2 l_i / sigma^2, the one part that takes the bank's variances for those of the pair. Let X be ROUNDING_DEVIATIONS
    standard deviations, and the rounding of the weights themselves, 2 u, which acts like a logit's. A covariance is at
    most a quarter of the product of two ranges: the mean moves by V X / 4.

    Many windows: this is divided by sqrt(effective sample size), and the part that does not average, the derivative of
    the mean, Cov(v, p) / sigma^2, times e, is added, with posterior variances s_i = l_i sigma^2 / (l_i + sigma^2). The
    effective sample size of N windows is that of a Gaussian bank,
    N prod_i sqrt(1 + 2 t) / (1 + t) e^(-t / (1 + 2 t)), t = l_i / sigma^2, divided by 300 for the worst pixel, and at
    least 1. Where float32 sums of products could be off by `tolerance` nats, 1.5 d 2^-22 / sigma^2 with pixels up
    to 1, the plan is `exact`; a logit error of x nats moves a mean of values in [-1, 1] by tanh(x) at most.
    Where a pilot sets the reference some weights are a polynomial's, which errs by a function of the log-weight and so
    need not average out: V CUBIC_RANGE / 4 is added. docs/notes/fused.md holds this against measured errors.

    Args:
        spectrum: of the windows that compete; without one the plan is pixels, split.
        d: numbers in a window, C k^2.
        sigma: the smallest noise of the call.
        tolerance: of a denoised pixel.
        uint8: the bank came as uint8, whose pixels half floats hold exactly.
        axes: whether principal axes may take the place of pixels.
        largest: noise of the call, if not all of it is `sigma`; V is taken there.
    """
    s2 = sigma * sigma
    p_lo = 0 if uint8 else d
    if 1.5 * d * 2.0**-22 > tolerance * s2:
        return Plan(d, q_lo=d, p_lo=p_lo, exact=True, skip=True)
    if spectrum is None:
        return Plan(d, q_lo=d, p_lo=p_lo)
    variances = [max(v, 0.0) for v in spectrum.variances]
    skip = sum(variances) > 200 * s2

    log_share = sum(0.5 * math.log1p(2 * v / s2) - math.log1p(v / s2) - v / (2 * v + s2) for v in variances)
    ess = max(1.0, spectrum.windows * math.exp(log_share) / 300)
    values = range_of_values(max(sigma, largest))
    spread = values / math.sqrt(ess) / 4
    centre = 2 / d  # share of a pixel in an axis, at most about that
    pilot = axes and not skip and ess >= PILOT_ESS
    cubic = values * CUBIC_RANGE / 4 if pilot else 0.0

    def error(logit_variance: float, shift_variance: float) -> float:
        range_of_logit = ROUNDING_DEVIATIONS * math.sqrt(2 * logit_variance / s2) + WEIGHTS_RANGE
        return spread * range_of_logit + 4 * math.sqrt(centre * shift_variance / s2) + cubic

    # Pixels: patches exact or split, queries rounded or split.
    posterior = [v * s2 / (v + s2) for v in variances]
    farthest = min((2 * NOISE_DEVIATIONS * sigma) ** 2, 4.0 * d)
    pair = UNIT_ROUNDOFF**2 / 6 * (1 + s2) * farthest / (2 * s2)
    shifted = UNIT_ROUNDOFF**2 / 6 * (spectrum.square + s2) / s2 * sum(p * p for p in posterior)
    rounded = error(pair, shifted)
    best = Plan(d, q_lo=d if rounded > tolerance else 0, p_lo=p_lo, skip=skip)
    if not axes:
        return best

    # Principal axes, the leading ones split on both sides, the others rounded: the smallest rank within the tolerance.
    shifts = [v * p for v, p in zip(variances, posterior, strict=True)]
    tails = [*itertools.accumulate(reversed(variances), initial=0.0)][::-1]  # dropped variance, by rank
    tail_squares = [*itertools.accumulate((v * v for v in reversed(variances)), initial=0.0)][::-1]
    for split in SPLIT_AXES:
        if split > d:
            break
        u2 = [UNIT_ROUNDOFF ** (4 if i < split else 2) for i in range(d)]
        rounded = sum(u * v for u, v in zip(u2, variances, strict=True)) / 6
        rounded += max(u * (v + s2) for u, v in zip(u2, variances, strict=True)) / 6 * farthest / (2 * s2)
        shifted = sum(u * v for u, v in zip(u2, shifts, strict=True)) / 6
        errors = [error(tail + rounded, squares + shifted) for tail, squares in zip(tails, tail_squares, strict=True)]
        rank = next((rank for rank in range(max(1, split), d + 1) if errors[rank] <= tolerance), None)
        if rank is not None:
            reduced = Plan(rank, axes=True, q_lo=split, p_lo=split, skip=skip)
            best = min(best, reduced, key=lambda plan: plan.columns)
    if best.axes:
        # Columns that K has room for split more axes.
        split = min(best.size, (best.columns - BIAS_COLUMNS - best.size) // 2)
        best = replace(best, q_lo=split, p_lo=split)
    return replace(best, pilot=pilot)


_spectra: weakref.WeakKeyDictionary[PatchBank, dict[tuple[int, torch.device], tuple[Spectrum, Made]]] = (
    weakref.WeakKeyDictionary()
)


def spectrum_of(bank: PatchBank, k: int, device: torch.device) -> Spectrum:
    """Principal axes of the windows inside the images; kept with the bank.

    From all images up to SPECTRUM_IMAGES, else from every n-th: any orthonormal axes are exact, but what is dropped is
    judged by these variances.
    """
    known = _spectra.setdefault(bank, {})
    if (k, device) not in known:
        _, height, width = bank.shape
        rows, cols = range(k // 2, height - k // 2), range(k // 2, width - k // 2)
        group = Group(Axis(rows, rows), Axis(cols, cols))
        dtype = accumulator_dtype(device)
        d = bank.shape[0] * k * k
        total = torch.zeros(d, dtype=dtype, device=device)
        second = torch.zeros(d, d, dtype=dtype, device=device)
        squares = torch.zeros((), dtype=dtype, device=device)
        chosen = range(0, len(bank), -(-len(bank) // SPECTRUM_IMAGES))
        for start in chosen:
            image = bank.chunk(start, start + 1, torch.float32, device).to(dtype)
            windows = windows_as_rows(image, k, *_unpadded(k, rows, cols), group)[0]
            total += windows.sum(0)
            second += windows.T @ windows
            squares += image.square().mean()
        count = len(chosen) * len(rows) * len(cols)
        mean = total / count
        variances, axes = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        axes = axes.flip(1)
        found = Spectrum(
            mean=mean,
            axes=axes,
            variances=variances.flip(0).tolist(),
            square=squares.item() / len(chosen),
            windows=len(bank) * len(rows) * len(cols),
        )
        known[k, device] = found, Made([mean, axes])
    found, made = known[k, device]
    made.use()
    return found


def _unpadded(k: int, rows: range, cols: range) -> tuple[range, range]:
    """Centres as corners, where images carry no padding."""
    return range(rows.start - k // 2, rows.stop - k // 2), range(cols.start - k // 2, cols.stop - k // 2)
