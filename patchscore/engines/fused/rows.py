"""What the dense kernel multiplies: windows as rows of half floats, as few and as fine as the noise asks for.

A row is a window's pixels or, where that is shorter, its leading principal axes; then the bias -|p|^2 / 2 in three
half floats, which a query meets with ones, so that one product is q.p - |p|^2 / 2. `choose_plan` holds the error model.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bank import PatchBank
from ...pixels import to_values
from ...posterior import accumulator_dtype
from ...windows import Axis, Competition, Group, windows_as_rows
from .. import device as resident

BIAS_COLUMNS = 3
PATCH_MULTIPLE = 128
"""Rows of one coordinate are filled up to a multiple of this, the largest tile, with rows of weight zero."""
UNIT_ROUNDOFF = 2.0**-11
SPECTRUM_IMAGES = 512
CACHE_SHARE = 0.4
"""The share of a GPU's memory that features may keep; what does not fit is made again from the pixels, call by call."""
CACHE_BYTES_CPU = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """The columns of a row: `size` numbers, some again as the low half of a hi + lo split, the bias, zeros up to K.

    size: pixels C k^2, or the rank where `axes`.
    axes: principal axes instead of pixels.
    q_lo, p_lo: whether queries, patches carry a low half; then lo . hi is one more block of `size` columns.
    exact: weights that decide a result are taken from differences instead of products.
    skip: tiles without a visible weight are passed over.
    """

    size: int
    axes: bool = False
    q_lo: bool = False
    p_lo: bool = False
    exact: bool = False
    skip: bool = False

    @property
    def bias(self) -> int:
        """The first column of the bias."""
        return self.size * (1 + self.q_lo + self.p_lo)

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
    windows: int


def choose_plan(spectrum: Spectrum | None, d: int, sigma: float, tolerance: float, uint8: bool, axes: bool) -> Plan:
    """The shortest rows whose denoised pixel is expected within `tolerance` of float64's, by this error model.

    Let a query q and a patch p be rounded (or cut) to q + e and p + f, and the bias be that of the rounded patch. The
    kernel then computes the exact distance between rounded points, and with q's own terms, which all windows share,
    left out, a logit is off by

        ((q - p).f - p.e) / sigma^2 + O(e^2 + f^2),      |e_i| <= u |q_i|, |f_i| <= u |p_i|, u = 2^-11,

    so by Cauchy-Schwarz at most u (|q - p| |p| + |q| |p|) / sigma^2. What moves a result is the spread of this over
    the windows that carry weight, whose (q - p)_i has variance sigma^2 and whose p_i has the posterior variance
    s_i = l_i sigma^2 / (l_i + sigma^2), l_i the variance of axis i: rounding errors have mean square u^2/6 of the
    number's, so for axes rounded on both sides the standard deviation of a logit is

        delta = u sqrt(L / 3) / sigma,   L = sum of l_i,

    and dropping an axis does the same with 1 in place of u / sqrt(3). A result moves by delta times the posterior's
    standard deviation (at most min(sigma, 1/2)) over sqrt(effective sample size), and by the part that does not
    average, the derivative of the mean, Cov(v, p) / sigma^2, times e. The effective sample size of N windows is that of
    a Gaussian bank, N prod_i sqrt(1 + 2 t) / (1 + t) e^(-t / (1 + 2 t)), t = l_i / sigma^2, divided by 300 for the
    worst pixel. Where float32 sums of products could be off by `tolerance` nats, 1.5 d 2^-22 / sigma^2 with pixels up
    to 1, the plan is `exact`; a logit error of x nats moves a mean of values in [-1, 1] by tanh(x) at most.
    docs/notes/fused.md holds this against measured errors.

    Args:
        spectrum: of the windows that compete; without one the plan is pixels, split.
        d: numbers in a window, C k^2.
        sigma: the smallest noise of the call.
        tolerance: of a denoised pixel.
        uint8: the bank came as uint8, whose pixels half floats hold exactly.
    """
    s2 = sigma * sigma
    if 1.5 * d * 2.0**-22 > tolerance * s2:
        return Plan(d, q_lo=True, p_lo=not uint8, exact=True, skip=True)
    if spectrum is None:
        return Plan(d, q_lo=True, p_lo=not uint8)
    variances = [max(v, 0.0) for v in spectrum.variances]
    total = sum(variances)
    skip = total > 200 * s2

    log_share = sum(0.5 * math.log1p(2 * v / s2) - math.log1p(v / s2) - v / (2 * v + s2) for v in variances)
    ess = max(1.0, spectrum.windows * math.exp(log_share) / 300)
    spread = 2 * min(sigma, 0.5) / math.sqrt(ess)
    centre = 2 / d  # share of a pixel in an axis, at most about that

    def error(logit_variance: float, shift_variance: float) -> float:
        return spread * math.sqrt(logit_variance / s2) + 4 * math.sqrt(centre * shift_variance / s2)

    # Pixels: patches exact or split, queries rounded or split.
    posterior = [v * s2 / (v + s2) for v in variances]
    rounding = UNIT_ROUNDOFF**2 / 6 * (spectrum.square + s2) / s2
    rounded = error(rounding * sum(posterior), rounding * sum(p * p for p in posterior))
    pixels = Plan(d, q_lo=rounded > tolerance, p_lo=not uint8, skip=skip)
    if not axes:
        return pixels

    # Principal axes, rounded on both sides: the smallest rank within the tolerance.
    kept = UNIT_ROUNDOFF**2 / 3
    kept_shift = sum(v * v * s2 / (v + s2) for v in variances) * UNIT_ROUNDOFF**2 / 6
    tail = tail_squares = 0.0
    rank = d
    for rank in range(d, 0, -1):
        v = variances[rank - 1]
        tail, tail_squares = tail + v, tail_squares + v * v
        if error(tail + kept * total, tail_squares + kept_shift) > tolerance:
            break
    if rank == d and error(kept * total, kept_shift) > tolerance:
        return pixels
    reduced = Plan(rank, axes=True, skip=skip)
    return reduced if reduced.columns < pixels.columns else pixels


# Principal axes.

_spectra: weakref.WeakKeyDictionary[PatchBank, dict[tuple[int, torch.device], Spectrum]] = weakref.WeakKeyDictionary()


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
            image = bank.chunk(start, start + 1, torch.float32, device)
            windows = windows_as_rows(image, k, *_unpadded(k, rows, cols), group)[0]
            total += windows.sum(0, dtype=dtype)
            second += windows.T @ windows
            squares += image.square().mean()
        count = len(chosen) * len(rows) * len(cols)
        mean = total / count
        variances, axes = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        known[k, device] = Spectrum(
            mean=mean,
            axes=axes.flip(1),
            variances=variances.flip(0).tolist(),
            square=squares.item() / len(chosen),
            windows=len(bank) * len(rows) * len(cols),
        )
    return known[k, device]


def _unpadded(k: int, rows: range, cols: range) -> tuple[range, range]:
    """Centres as corners, where images carry no padding."""
    return range(rows.start - k // 2, rows.stop - k // 2), range(cols.start - k // 2, cols.stop - k // 2)


# Rows of queries.


@dataclass(frozen=True)
class Queries:
    """Query rows of one group, and what turns sums of the kernel into a PosteriorSum.

    rows: [L, Q, K] fp16.
    scale: [3, L, Q] fp32, as the kernel takes it.
    reference: [L, Q] what the kernel's reference leaves out of a log-weight, -|q|^2 / (2 sigma^2).
    """

    rows: Tensor
    scale: Tensor
    reference: Tensor


def query_rows(
    z: Tensor, sigma: Tensor, competition: Competition, group: Group, plan: Plan, spectrum: Spectrum | None, unit: float
) -> Queries:
    """Windows of z around the pixels of a group, as `plan` has it."""
    k = competition.patch_size or 0
    exact = accumulator_dtype(z.device)
    mode = "circular" if competition.padding_mode == "circular" else "constant"
    padded = F.pad(z.to(exact), (k // 2,) * 4, mode=mode)
    q = windows_as_rows(padded, k, group.rows.queries, group.cols.queries, group)  # [L, Q, d]
    sigma_at = sigma.reshape(-1, 1, 1, 1).expand(-1, 1, *z.shape[2:])
    s2 = windows_as_rows(sigma_at, 1, group.rows.queries, group.cols.queries, group)[..., 0].square()  # [L, Q]
    dropped = torch.zeros_like(s2)
    if plan.axes:
        assert spectrum is not None
        q = q - spectrum.mean
        dropped = q.square().sum(-1)
        q = q @ spectrum.axes[:, : plan.size]
        dropped = dropped - q.square().sum(-1)
    q = q * unit

    if not plan.exact:
        # Float32 must hold logits to a fraction of a bit: queries of absurd size are brought nearer.
        reach = 2.0**21 / math.log2(math.e) * s2[..., None] / q.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        q = q * reach.clamp(max=1.0)

    # Powers of two keep far-off queries inside the range of half floats.
    largest = q.abs().amax(-1, keepdim=True).clamp(min=1.0)
    c = torch.exp2(-torch.ceil(torch.log2(largest / 8192)).clamp(0, 24))  # [L, Q, 1]
    q = q * c
    high = q.to(torch.float16)
    low = (q - high).to(torch.float16)
    blocks = [high] + [low] * plan.q_lo + [high] * plan.p_lo + [c.to(torch.float16).expand(-1, -1, BIAS_COLUMNS)]
    rows = torch.cat(blocks, -1)
    rows = F.pad(rows, (0, plan.columns - rows.shape[-1])).contiguous()

    c = c[..., 0]
    rounded = (high.to(exact) + low if plan.q_lo else high.to(exact)) / c[..., None]
    half_square = 0.5 * rounded.square().sum(-1)
    bits = math.log2(math.e) / (s2 * unit**2)  # of a unit of |q - p|^2 / 2
    scale = torch.stack([bits / c, bits * half_square, c]).to(torch.float32)
    reference = -0.5 * dropped / s2
    if not plan.exact:
        reference = reference - half_square / (s2 * unit**2)
    return Queries(rows, scale.contiguous(), reference)


# Rows of patches.


def _stored(bank: PatchBank, start: int, stop: int, device: torch.device) -> Tensor:
    """Images start..stop as stored, on the device: of a copy that is kept there, or, where all of them would fill too
    much of its memory, sent through pinned memory, which the host does not wait for."""
    if device.type != "cuda":
        return bank.stored(start, stop).to(device)
    kept = resident.on_device(bank.images, device)
    if kept is None:
        return bank.stored(start, stop).pin_memory().to(device, non_blocking=True)
    if bank.indices is None:
        return kept[start:stop]
    return kept[bank.indices[start:stop].pin_memory().to(device, non_blocking=True)]


@dataclass(frozen=True)
class Patches:
    """Patch rows of some images: rows [L, M, K] and values [L, M, NV], fp16, M a multiple of PATCH_MULTIPLE."""

    rows: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.values.nbytes


def value_columns(channels: int) -> int:
    """NV: high and low halves of the values and a column of ones, 16 or more."""
    return max(16, 1 << (2 * channels).bit_length())


def patch_rows(
    bank: PatchBank,
    start: int,
    stop: int,
    k: int,
    group: Group,
    plan: Plan,
    spectrum: Spectrum | None,
    unit: float,
    device: torch.device,
) -> Patches:
    """Competing windows of images start..stop, as `plan` has it."""
    exact = accumulator_dtype(device)
    raw = _stored(bank, start, stop, device)
    images = to_values(raw) * unit
    where = group.rows.centres, group.cols.centres, group
    padding = (k // 2,) * 4

    if plan.axes:
        assert spectrum is not None
        p = windows_as_rows(F.pad(images, padding), k, *where) - (spectrum.mean * unit).to(torch.float32)  # [L, M, d]
        square = p.square().sum(-1, dtype=exact)
        p = p @ spectrum.axes[:, : plan.size].to(torch.float32)
        square -= p.square().sum(-1, dtype=exact)
        high = p.to(torch.float16)
        square += high.to(exact).square().sum(-1)  # of the rounded patch, and of what was dropped
        blocks = [high]
    else:
        # Halves of pixels first, windows of halves second: windows are many times as many.
        high_pixels = images.to(torch.float16)
        low_pixels = (images - high_pixels).to(torch.float16)
        high = windows_as_rows(F.pad(high_pixels, padding), k, *where)
        blocks = [high] + [high] * plan.q_lo
        pixels = high_pixels.to(exact)
        if plan.p_lo:
            blocks.append(windows_as_rows(F.pad(low_pixels, padding), k, *where))
            pixels = pixels + low_pixels
        squares = pixels.square().sum(1, keepdim=True)
        ones = torch.ones(1, 1, k, 1, dtype=exact, device=device)
        box = F.conv2d(F.conv2d(F.pad(squares, padding), ones), ones.mT)  # [n, 1, H, W]
        square = windows_as_rows(box, 1, *where)[..., 0]

    bias = -0.5 * square  # [L, M]
    parts = []
    for _ in range(BIAS_COLUMNS):
        parts.append(bias.to(torch.float16))
        bias = bias - parts[-1]
    length = -(-square.shape[1] // PATCH_MULTIPLE) * PATCH_MULTIPLE
    rows = torch.zeros(len(square), length, plan.columns, dtype=torch.float16, device=device)
    filled = rows[:, : square.shape[1]]
    for i, block in enumerate(blocks):
        filled[..., i * plan.size : (i + 1) * plan.size] = block
    filled[..., plan.bias : plan.bias + BIAS_COLUMNS] = torch.stack(parts, -1)
    rows[:, square.shape[1] :, plan.bias] = -torch.inf

    channels = images.shape[1]
    centres = windows_as_rows(images, 1, *where)  # [L, M, C]
    values = torch.zeros(len(square), length, value_columns(channels), dtype=torch.float16, device=device)
    filled = values[:, : square.shape[1]]
    filled[..., :channels] = centres
    filled[..., channels] = 1
    filled[..., channels + 1 : 2 * channels + 1] = centres - filled[..., :channels]
    return Patches(rows, values)


def image_bytes(bank: PatchBank, k: int, group: Group, plan: Plan) -> int:
    """Working memory that one image's rows take while they are made."""
    axes = (group.rows, group.cols)
    locked = math.prod(len(axis.queries) for axis in axes if axis.locked)
    windows = locked * group.windows_per_image
    channels = bank.shape[0]
    made = 4 * channels * k * k * 2 + 4 * plan.size if plan.axes else 2 * plan.size * (1 + plan.p_lo)
    return windows * (2 * plan.columns + 2 * value_columns(channels) + made + 48)


# Rows kept with their bank.


class Cache:
    """Rows by their owner (a bank, or a part of an index) and purpose, the least recently used given up first.

    Those of an owner die with it.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, list[Any]] = OrderedDict()
        self.finalizers: dict[int, weakref.finalize] = {}

    def get(self, owner: object, key: tuple) -> list[Any] | None:
        full = (id(owner), *key)
        if full in self.entries:
            self.entries.move_to_end(full)
        return self.entries.get(full)

    def put(self, owner: object, key: tuple, rows: list[Any], limit: int) -> None:
        while self.entries and self.nbytes + sum(part.nbytes for part in rows) > limit:
            self.entries.popitem(last=False)
        full = (id(owner), *key)
        self.entries[full] = rows
        if id(owner) not in self.finalizers:
            self.finalizers[id(owner)] = weakref.finalize(owner, self.forget, id(owner))

    def forget(self, owner_id: int) -> None:
        self.finalizers.pop(owner_id, None)
        for key in [key for key in self.entries if key[0] == owner_id]:
            del self.entries[key]

    def clear(self) -> None:
        self.entries.clear()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for rows in self.entries.values() for part in rows)


cache = Cache()


def cache_limit(device: torch.device) -> int:
    """Bytes of rows that may be kept on a device."""
    if device.type != "cuda":
        return CACHE_BYTES_CPU
    return int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
