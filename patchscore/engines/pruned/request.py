"""What the engine `pruned` asks a backend, and what it is answered; and queries as backends compare them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...index import IndexedSize, Strata
from ...posterior import PosteriorSum
from .naive import least_log_weight
from .policy import Policy

KNOWN = 16
"""Windows that a query can know; MOST_KNOWN in pruned.h."""

BYTE = 127.5
"""Bytes for a pixel value of 1."""

LARGEST = 1e12
"""Values of a query of floats up to which its squared distances are float32; the exact engines take no larger ones."""


@dataclass(frozen=True)
class Request:
    """Queries of one noisy image at one noise level, all of which compete with the windows of one patch size.

    windows: [Q, C, k, k] the queries.
    allowed: [images of the index] uint8, which compete; None for all.
    competing: windows that compete.
    budget: fraction of them to evaluate; None for every window.
    columns: of the grid of pixels that the queries are; 0 if they are none.
    moments: whether the sums have moments.
    remembered: [Q, KNOWN] int64 windows of the part that are to be known, or -1; None where nothing is remembered.
    memory_limit: bytes of working memory, for a backend that has all visits of a query in memory at once.
    """

    part: IndexedSize
    windows: Tensor
    sigma: float
    allowed: Tensor | None
    competing: int
    budget: float | None
    key: int
    columns: int = 0
    moments: bool = False
    remembered: Tensor | None = None
    memory_limit: int = 2**30


@dataclass(frozen=True)
class Scanned:
    """What a scan found.

    sums: [Q, ...].
    fits: [Q] bool, whether each is reliable, or the query unlike anything in the bank.
    remembered: [Q, KNOWN] as of the request: the heaviest windows met, or None.
    """

    sums: PosteriorSum
    fits: Tensor
    remembered: Tensor | None


def draw_key(seed: int, k: int, sigma: float, z: Tensor) -> int:
    """Of an image's random draws: the same wherever the image stands in a batch, another for another image."""
    digest = hashlib.sha256(f"{seed} {k} {sigma!r}".encode())
    digest.update(z.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def least_bits(request: Request, policy: Policy) -> float:
    """Log2 of the weight of its heaviest known window below which a query gets exact sums."""
    nats = least_log_weight(request.part.spread, request.sigma, request.competing, policy)
    return nats * math.log2(math.e)


def coefficients(strata: Strata, sigma: float, dims: int) -> Tensor:
    """[strata, 2, 2 rank + 2] of log2 E[w] and log2 E[w^2] as sums over a query's squared features, its features, its
    squared norm beyond them, and 1; see naive.expected_log_weights."""
    mean, variance = strata.mean.double(), strata.variance.double()
    spread = strata.rest.double() / max(1, dims - mean.shape[1])
    columns = []
    for power in (1, 2):
        noise = sigma**2 / power
        inverse = 1 / (noise + variance)
        constant = -(torch.log1p(variance / noise).sum(1) + (dims - mean.shape[1]) * torch.log1p(spread / noise)) / 2
        constant = constant - (inverse * mean.square()).sum(1) / 2
        columns.append(
            torch.cat([-inverse / 2, inverse * mean, (-1 / (noise + spread) / 2)[:, None], constant[:, None]], 1)
        )
    return torch.stack(columns, 1) * math.log2(math.e)


class Encoded(NamedTuple):
    """Queries as they are compared. The log2 of a weight is bits times a score, less base.

    windows: [Q, 2 pairs], the last column 0 where the number of values is odd.
    shift: [Q] int32; bits, base: [Q] float64.
    """

    windows: Tensor
    shift: Tensor
    bits: Tensor
    base: Tensor


def encoded(windows: Tensor, dtype: torch.dtype, sigma: float) -> Encoded | None:
    """Queries [Q, C, k, k] for windows of images of this type; None where one is too large to be compared."""
    encode = _of_bytes if dtype == torch.uint8 else _of_floats
    return encode(windows, math.log2(math.e) / (2 * sigma**2))


def _of_bytes(windows: Tensor, scale: float) -> Encoded | None:
    """For scores dot - 2^shift |p|^2: queries in bytes less 128, times 2^(1 + shift) and rounded to int16.

    The largest shift for which no dot product with a window leaves 30 bits.

    Args:
        scale: of the log2 of a weight, for each squared unit of pixels.
    """
    u = windows.flatten(1).double() * BYTE - 0.5
    largest, total = u.abs().amax(1), u.abs().sum(1)
    shift = torch.full_like(largest, -1, dtype=torch.int32)
    for candidate in range(14):
        unit = 2.0 ** (1 + candidate)
        fits = (largest * unit < 32767) & (
            128 * (total * unit + u.shape[1]) + 2**candidate * 16384 * u.shape[1] < 2**30
        )
        shift[fits] = candidate
    if (shift < 0).any():
        return None
    units = 2.0 ** (1 + shift.double())
    digits = (u * units[:, None]).round()
    per_byte = scale / BYTE**2
    return Encoded(
        _even(digits.to(torch.int16)), shift, 2 * per_byte / units, per_byte * digits.square().sum(1) / units.square()
    )


def _of_floats(windows: Tensor, scale: float) -> Encoded | None:
    """For scores -|q - p|^2: queries as they are."""
    flat = windows.flatten(1).float()
    if flat.abs().max().item() > LARGEST:
        return None
    bits = torch.full_like(flat[:, 0], scale, dtype=torch.float64)
    return Encoded(_even(flat), torch.zeros_like(bits, dtype=torch.int32), bits, torch.zeros_like(bits))


def _even(windows: Tensor) -> Tensor:
    return functional.pad(windows, (0, windows.shape[1] % 2)).contiguous()
