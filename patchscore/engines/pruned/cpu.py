"""The CPU backend of `pruned`: hands one image's queries to the native scan (csrc/pruned)."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...index import IndexedSize, Strata
from ...native import native
from ...posterior import PosteriorSum
from .policy import Policy

LANES = 16
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

    @property
    def settled(self) -> PosteriorSum | None:
        """The sums; None where some query is unlike anything in the bank."""
        return self.sums if self.fits.all() else None


def draw_key(seed: int, k: int, sigma: float, z: Tensor) -> int:
    """Of an image's random draws: the same wherever the image stands in a batch, another for another image."""
    digest = hashlib.sha256(f"{seed} {k} {sigma!r}".encode())
    digest.update(z.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def scan(request: Request, policy: Policy) -> Scanned | None:
    """The sums of a request; None where a query is too far outside the pixels' range to be compared."""
    part, sigma = request.part, request.sigma
    encode = _of_bytes if part.images.dtype == torch.uint8 else _of_floats
    encoded = encode(request.windows, math.log2(math.e) / (2 * sigma**2))
    if encoded is None:
        return None
    count, channels = len(request.windows), request.windows.shape[1]
    features, rest = part.project(request.windows)
    out = {name: torch.zeros(count, dtype=torch.float64) for name in ("m", "s", "s2", "ss")}
    out |= {name: torch.zeros(count, channels, dtype=torch.float64) for name in ("v", "vs", "vv")}
    if request.moments:
        out |= {name: torch.zeros_like(out["s"]) for name in ("sl", "ee")}
        out |= {name: torch.zeros_like(out["v"]) for name in ("v2", "qq")}
    remembered = None if request.remembered is None else request.remembered.clone()  # the scan writes to it
    recalled = remembered is not None and bool((remembered >= 0).any())
    fits, pairs = torch.zeros(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    competing = _competing(part, request.allowed)
    assert native is not None
    native.pruned_scan(
        images=part.images.numpy(),
        patch_size=part.k,
        sizes=part.cells.size.numpy(),
        ids=part.ids,
        tiles=part.tiles,
        allowed=None if request.allowed is None else request.allowed.numpy(),
        parents=_strata(part.parents, competing.view(-1, LANES).sum(1), part, sigma),
        children=_strata(part.cells, competing, part, sigma),
        features=features.contiguous().numpy(),
        rest=rest.numpy(),
        windows=encoded.windows.numpy(),
        shift=encoded.shift.numpy(),
        bits=encoded.bits.numpy(),
        base=encoded.base.numpy(),
        columns=request.columns,
        budget=max(1.0, (request.budget or 1.0) * request.competing),
        largest_budget=policy.exact_budget * request.competing,
        whole=request.budget is None,
        key=request.key,
        certain_from=policy.certain_from,
        prior_degrees=policy.prior_degrees,
        trimming=policy.trimming,
        misfit=policy.misfit,
        unknown=policy.unknown,
        further=policy.further,
        further_most=policy.further_most,
        whole_pixels=policy.whole_pixels,
        opened_from=policy.opened_from,
        pilot=policy.recalled_pilot if recalled else policy.pilot,
        known=policy.known,
        **{"v2": None, "sl": None, "qq": None, "ee": None} | {name: x.numpy() for name, x in out.items()},
        fits=fits.numpy(),
        pairs=pairs.numpy(),
        remembered=None if remembered is None else remembered.numpy(),
        threads=torch.get_num_threads(),
        simd=os.environ.get("PATCHSCORE_SIMD", ""),
    )  # fmt: skip
    sums = {name: x if x.ndim == 2 else x[:, None] for name, x in out.items()}
    return Scanned(PosteriorSum(**sums, span=1.0, pairs=int(pairs.sum())), fits.bool(), remembered)


def table(strata: Strata, sigma: float, dims: int) -> Tensor:
    """[groups, 2, 2 rank + 2, LANES] coefficients of log2 E[w] and log2 E[w^2]; see naive.expected_log_weights."""
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
    whole = torch.stack(columns, 1) * math.log2(math.e)  # [strata, 2, columns]
    padded = functional.pad(whole, (0, 0, 0, 0, 0, -len(whole) % LANES))
    return padded.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).float().contiguous()


def _strata(strata: Strata, competing: Tensor, part: IndexedSize, sigma: float) -> tuple:
    tables = part.__dict__.setdefault("_tables", {})
    key = (sigma, len(strata.size))
    found = tables.get(key)  # other threads may clear the tables at any time
    if found is None:
        if len(tables) >= 2 and not any(held[0] == sigma for held in list(tables)):
            tables.clear()
        found = tables[key] = table(strata, sigma, len(part.centre))
    values = (strata.value.contiguous().numpy(), strata.value_square.contiguous().numpy())
    return found.numpy(), competing.float().numpy(), *values


def _competing(part: IndexedSize, allowed: Tensor | None) -> Tensor:
    """[cells] windows that compete."""
    if allowed is None:
        return part.cells.size
    held = part.__dict__.setdefault("_competing", {})
    if id(allowed) not in held:
        image = torch.from_numpy(part.ids // part.windows_per_image)
        cell = torch.repeat_interleave(torch.arange(len(part.cells.size)), part.cells.size)
        count = torch.bincount(cell[allowed[image].bool()], minlength=len(part.cells.size))
        held[id(allowed)] = (allowed, count)
    return held[id(allowed)][1]


class Encoded(NamedTuple):
    """Queries as they are compared. The log2 of a weight is bits times a score, less base.

    windows: [Q, 2 pairs], the last column 0 where the number of values is odd.
    shift: [Q] int32; bits, base: [Q] float64.
    """

    windows: Tensor
    shift: Tensor
    bits: Tensor
    base: Tensor


def _of_bytes(windows: Tensor, scale: float) -> Encoded | None:
    """For scores dot - 2^shift |p|^2: queries in bytes less 128, times 2^(1 + shift) and rounded to int16.

    The largest shift for which no dot product with a window leaves 30 bits.

    Args:
        scale: of the log2 of a weight, for each squared unit of pixels.
    """
    u = windows.flatten(1).double() * BYTE - 0.5
    largest, total = u.abs().amax(1), u.abs().sum(1)
    shift = torch.full((len(u),), -1, dtype=torch.int32)
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
    count = len(flat)
    bits = torch.full((count,), scale, dtype=torch.float64)
    return Encoded(_even(flat), torch.zeros(count, dtype=torch.int32), bits, torch.zeros_like(bits))


def _even(windows: Tensor) -> Tensor:
    return functional.pad(windows, (0, windows.shape[1] % 2)).contiguous()
