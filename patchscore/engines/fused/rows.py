"""Windows as rows of half floats, as a plan has them (plan.py), and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bank import PatchBank
from ...pixels import to_values
from ...posterior import accumulator_dtype
from ...windows import Competition, Group, windows_as_rows
from ..device import on_device
from .plan import BIAS_COLUMNS, Plan, Spectrum

PATCH_MULTIPLE = 128
"""Rows of one coordinate are filled up to a multiple of this, the largest tile, with rows of weight zero."""


# Queries.


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
    low = (q[..., : plan.q_lo] - high[..., : plan.q_lo]).to(torch.float16)
    rounded = high.to(exact)
    rounded[..., : plan.q_lo] += low
    ones = c.to(torch.float16).expand(-1, -1, BIAS_COLUMNS)
    rows = torch.cat([high, low, high[..., : plan.p_lo], ones], -1)
    rows = F.pad(rows, (0, plan.columns - rows.shape[-1])).contiguous()

    c = c[..., 0]
    half_square = 0.5 * (rounded / c[..., None]).square().sum(-1)
    bits = math.log2(math.e) / (s2 * unit**2)  # of a unit of |q - p|^2 / 2
    scale = torch.stack([bits / c, bits * half_square, c]).to(torch.float32)
    reference = -0.5 * dropped / s2
    if not plan.exact:
        reference = reference - half_square / (s2 * unit**2)
    return Queries(rows, scale.contiguous(), reference)


# Patches.


def _stored(bank: PatchBank, start: int, stop: int, device: torch.device) -> Tensor:
    """Images start..stop as stored, on the device: of a copy that is kept there, or, where all of them would fill too
    much of its memory, sent through pinned memory, which the host does not wait for."""
    if device.type != "cuda":
        return bank.stored(start, stop).to(device)
    kept = on_device(bank.images, device)
    if kept is None:
        return bank.stored(start, stop).pin_memory().to(device, non_blocking=True)
    if bank.indices is None:
        return kept[start:stop]
    return kept[bank.indices[start:stop].pin_memory().to(device, non_blocking=True)]


@dataclass(frozen=True)
class Patches:
    """Patch rows of some images.

    rows: [L, M, K] fp16, M a multiple of PATCH_MULTIPLE.
    values: [L, M, NV] fp16.
    filled: rows of each coordinate that are windows; the others have weight zero.
    """

    rows: Tensor
    values: Tensor
    filled: int

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.rows, self.values


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
    """Competing windows of images start..stop, as `plan` has it.

    Products are of float64 and of nothing else: those of float32 follow torch's switches for TF32.
    """
    exact = accumulator_dtype(device)
    raw = _stored(bank, start, stop, device)
    images = to_values(raw) * unit
    where = group.rows.centres, group.cols.centres, group
    padding = (k // 2,) * 4

    if plan.axes:
        assert spectrum is not None
        p = windows_as_rows(F.pad(images, padding).to(exact), k, *where) - spectrum.mean * unit  # [L, M, d]
        square = torch.linalg.vecdot(p, p)
        p = p @ spectrum.axes[:, : plan.size]
        square -= torch.linalg.vecdot(p, p)
        high = p.to(torch.float16)
        low = (p[..., : plan.p_lo] - high[..., : plan.p_lo]).to(torch.float16)
        p = high.to(exact)
        p[..., : plan.p_lo] += low
        square += torch.linalg.vecdot(p, p)  # of the rounded patch, and of what was dropped
        del p
    else:
        # Halves of pixels first, windows of halves second: windows are many times as many.
        high_pixels = images.to(torch.float16)
        high = windows_as_rows(F.pad(high_pixels, padding), k, *where)
        low = high[..., :0]
        pixels = high_pixels.to(exact)
        if plan.p_lo:
            low_pixels = (images - high_pixels).to(torch.float16)
            low = windows_as_rows(F.pad(low_pixels, padding), k, *where)
            pixels = pixels + low_pixels
        squares = pixels.square().sum(1, keepdim=True)
        ones = torch.ones(1, 1, k, 1, dtype=exact, device=device)
        box = F.conv2d(F.conv2d(F.pad(squares, padding), ones), ones.mT)  # [n, 1, H, W]
        square = windows_as_rows(box, 1, *where)[..., 0]

    bias = -0.5 * square  # [L, M]
    filled = square.shape[1]
    rows = torch.zeros(len(square), padded_rows(filled), plan.columns, dtype=torch.float16, device=device)
    some = rows[:, :filled]
    at = 0
    for block in (high, high[..., : plan.q_lo], low):
        some[..., at : at + block.shape[-1]] = block
        at += block.shape[-1]
    for column in range(plan.bias, plan.bias + BIAS_COLUMNS):
        some[..., column] = bias
        bias = bias - some[..., column]
    rows[:, filled:, plan.bias] = -torch.inf

    channels = images.shape[1]
    centres = windows_as_rows(images, 1, *where)  # [L, M, C]
    values = torch.zeros(*rows.shape[:2], value_columns(channels), dtype=torch.float16, device=device)
    some = values[:, :filled]
    some[..., :channels] = centres
    some[..., channels] = 1
    some[..., channels + 1 : 2 * channels + 1] = centres - some[..., :channels]
    return Patches(rows, values, filled)


def coordinates(group: Group) -> int:
    """L: locked coordinates, which have windows of their own."""
    return math.prod(len(axis.queries) for axis in (group.rows, group.cols) if axis.locked)


def padded_rows(windows: int) -> int:
    return -(-windows // PATCH_MULTIPLE) * PATCH_MULTIPLE


def stored_bytes(bank: PatchBank, group: Group, plan: Plan, images: int) -> int:
    """Of the rows of so many images, with those that fill the last tile of every locked coordinate."""
    rows = coordinates(group) * padded_rows(images * group.windows_per_image)
    return rows * (2 * plan.columns + 2 * value_columns(bank.shape[0]))


def working_bytes(bank: PatchBank, k: int, group: Group, plan: Plan, images: int) -> int:
    """Working memory that the rows of so many images take while they are made."""
    channels, height, width = bank.shape
    d = channels * k * k
    windows = coordinates(group) * images * group.windows_per_image
    # Windows as they are, centred, and as axes; or the halves of their pixels.
    made = 3 * 8 * d + 8 * plan.size if plan.axes else 2 * plan.size * (2 if plan.p_lo else 1)
    pixels = images * (channels * (height + 2 * (k // 2)) * (width + 2 * (k // 2)))
    return stored_bytes(bank, group, plan, images) + windows * (made + 48 + 8 * channels) + 40 * pixels
