"""Canvases: noisy images of another size than the bank's, denoised in crops of the bank's size.

A window does not depend on the image around it. Every canvas pixel lies in some crop at a position that the rule of its
machine treats alike: a pixel near a border as near to the border of its crop, any other with its whole window inside.
Engines serve crops as they serve images, and so any engine serves any canvas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import engines
from .bank import PatchBank
from .posterior import PosteriorSum
from .windows import Axis, Competition, Group, span

CROP_BYTES = 256 * 2**20
"""Bytes that crops and their sums may take at a time, where `memory_limit` allows; more were not faster."""


@dataclass(frozen=True)
class Strip:
    """Consecutive canvas coordinates of one axis that are served together.

    queries: the canvas coordinates.
    start: canvas coordinate of the crop's first pixel; a crop may reach over the border.
    axis: the same pixels in coordinates of the crop, and the windows that compete with them.
    """

    queries: range
    start: int
    axis: Axis


def strips(canvas: int, length: int, k: int, padding_mode: str) -> list[Strip]:
    """One axis of a canvas in strips, for images of this length.

    "zeros": a coordinate closer than r = k // 2 to a border competes with the one as close to that border in training
    images, any other with all interior ones. "circular": all compete with all interior ones.
    """
    r = k // 2
    interior = range(r, length - r)
    if padding_mode == "circular":
        return list(_free(range(canvas), interior))
    if canvas == length and len(interior) <= 1:
        return [Strip(range(length), 0, Axis(range(length)))]
    near = Strip(range(r), 0, Axis(range(r)))
    far = Strip(range(canvas - r, canvas), canvas - length, Axis(range(length - r, length)))
    inside = _free(range(r, canvas - r), interior)
    return [near, *inside, far] if r else list(inside)


def _free(queries: range, interior: range) -> Iterator[Strip]:
    """Strips of nearly equal lengths, each small enough to lie in the interior of a crop with the windows around it."""
    count = -(-len(queries) // len(interior))
    cuts = [queries.start + len(queries) * i // count for i in range(count + 1)]
    for first, end in itertools.pairwise(cuts):
        at = range(interior.start, interior.start + end - first)
        yield Strip(range(first, end), first - interior.start, Axis(at, interior))


def check_canvas(size: tuple[int, int], bank: tuple[int, int], k: int, padding_mode: str, name: str = "z") -> None:
    """ValueError where windows of size k do not fit in the canvas or in the images, along an axis where these differ.

    Where they do not differ, "zeros" takes any k: windows keep their position along such an axis.
    """
    for canvas, length in zip(size, bank, strict=True):
        if canvas == length and padding_mode == "zeros":
            continue
        if k > canvas:
            raise ValueError(f"{name}: a canvas of {_by(size)} is smaller than the patch size {k}")
        if k > length:
            raise ValueError(
                f"{name}: patch size {k} does not fit in the bank's {_by(bank)} images, got a canvas of {_by(size)}"
            )


def posterior_sum(
    available: Sequence[engines.Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    k: int,
    padding_mode: str,
    memory_limit: int,
    ess: bool = True,
    moments: bool = False,
) -> tuple[PosteriorSum, list[str]]:
    """As `engines.serve`, for z of any height and width: the sums of every pixel, and who took them.

    Raises:
        ValueError: as of `check_canvas`; `memory_limit` cannot hold a crop.
    """
    length = bank.shape[1:]
    check_canvas((z.shape[2], z.shape[3]), length, k, padding_mode)
    sampled = not all(engine.exact for engine in available)
    total = PosteriorSum.empty(z.shape, z.device, sampled=sampled, moments=moments, span=bank.scale)
    pairs, names = 0, []
    pieces = bank.pieces() if z.device.type == "cpu" and not sampled else [bank]
    cuts = list(calls(z, bank, k, padding_mode, memory_limit))
    for images, (competition, some) in itertools.product(pieces, cuts):
        crops = torch.cat([crop(z, row.start, col.start, length, padding_mode) for row, col in some])
        sums, served = engines.serve(
            available, named, crops, sigma.repeat(len(some)), images, competition, memory_limit, ess, moments
        )
        for i, (row, col) in enumerate(some):
            block = span(row.axis.queries), span(col.axis.queries)
            part = sums.block(slice(i * len(z), (i + 1) * len(z)), *block).to(total.m.device)
            total.add_(part, slice(None), span(row.queries), span(col.queries))
        pairs += sums.pairs or 0
        names += served
    return total.with_pairs(pairs), names


def product(
    available: Sequence[engines.Engine],
    named: str,
    transposed: bool,
    z: Tensor,
    sigma: Tensor,
    direction: Tensor,
    bank: PatchBank,
    k: int,
    padding_mode: str,
    memory_limit: int,
    combine: engines.Combine | None = None,
    whole: PosteriorSum | None = None,
) -> Tensor:
    """As `engines.serve_product`, for z of any height and width: J^T direction (transposed) or J direction.

    Where `bank` is one of several, `whole` has the sums over all of them, and this is the bank's addend.

    Raises:
        ValueError: as of `check_canvas`; `memory_limit` cannot hold a crop.
    """
    length = bank.shape[1:]
    check_canvas((z.shape[2], z.shape[3]), length, k, padding_mode)
    total = torch.zeros_like(direction)
    for competition, some in calls(z, bank, k, padding_mode, memory_limit):
        crops, parts = (
            torch.cat([crop(x, row.start, col.start, length, padding_mode) for row, col in some])
            for x in (z, direction)
        )
        # Forwards a crop's pixels move those it serves; backwards only those it serves move others.
        levels = sigma.repeat(len(some))
        of_all = combine if whole is None else _combine(whole, bank, some)
        products = engines.serve_product(
            available, named, transposed, crops, levels, parts, bank, competition, memory_limit, of_all
        )
        for (row, col), found in zip(some, products.split(len(z)), strict=True):
            if transposed:
                _add_crop(total, found, row.start, col.start, padding_mode)
            else:
                place = total[:, :, span(row.queries), span(col.queries)]
                place.copy_(found[:, :, span(row.axis.queries), span(col.axis.queries)])
    return total


def window_sums(
    available: Sequence[engines.Engine],
    named: str,
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    k: int,
    padding_mode: str,
    memory_limit: int,
    whole: PosteriorSum | None = None,
) -> tuple[PosteriorSum, Tensor, list[str]]:
    """As `engines.serve_window_sums`, for z of any height and width; `whole` as of `product`.

    Raises:
        ValueError: as of `check_canvas`; `memory_limit` cannot hold a crop.
    """
    length = bank.shape[1:]
    check_canvas((z.shape[2], z.shape[3]), length, k, padding_mode)
    total = PosteriorSum.empty(z.shape, z.device)
    sums, names, pairs = torch.zeros_like(total.v), [], 0
    for competition, some in calls(z, bank, k, padding_mode, memory_limit):
        crops = torch.cat([crop(z, row.start, col.start, length, padding_mode) for row, col in some])
        levels, of_all = sigma.repeat(len(some)), None if whole is None else _combine(whole, bank, some)
        found, windows, name = engines.serve_window_sums(
            available, named, crops, levels, bank, competition, memory_limit, of_all
        )
        for i, (row, col) in enumerate(some):
            items = slice(i * len(z), (i + 1) * len(z))
            part = found.block(items, span(row.axis.queries), span(col.axis.queries)).to(total.m.device)
            total.add_(part, slice(None), span(row.queries), span(col.queries))
            _add_crop(sums, windows[items].to(sums), row.start, col.start, padding_mode)
        names.append(name)
        pairs += 2 * len(crops) * len(bank) * competition.pairs_per_image
    return total.with_pairs(pairs), sums, names


def _combine(whole: PosteriorSum, bank: PatchBank, some: Sequence[tuple[Strip, Strip]]) -> engines.Combine:
    """What makes the sums of crops over one bank those of `whole`, in units of `bank.unit`."""
    in_unit = whole.scaled(1 / bank.scale)

    def combine(own: PosteriorSum) -> PosteriorSum:
        total, batch = PosteriorSum.empty(own.v.shape, own.m.device), len(in_unit.m)
        for i, (row, col) in enumerate(some):
            part = in_unit.block(slice(None), span(row.queries), span(col.queries)).to(own.m.device)
            total.add_(part, slice(i * batch, (i + 1) * batch), span(row.axis.queries), span(col.axis.queries))
        return total

    return combine


def calls(
    z: Tensor, bank: PatchBank, k: int, padding_mode: str, memory_limit: int
) -> Iterator[tuple[Competition, list[tuple[Strip, Strip]]]]:
    """Strips of rows and columns whose pixels are served in one call, for they share a rule, each in its own crop."""
    channels, *length = bank.shape
    by_rule = [_by_rule(strips(size, side, k, padding_mode)) for size, side in zip(z.shape[2:], length, strict=True)]
    crop_bytes = len(z) * math.prod(length) * (4 * channels + 16 * (2 * channels + 4))
    most = max(1, min(CROP_BYTES, memory_limit) // crop_bytes)
    for row_rule, row_strips in by_rule[0].items():
        for col_rule, col_strips in by_rule[1].items():
            places = [(row, col) for row in row_strips for col in col_strips]
            for first in range(0, len(places), most):
                yield Competition(k, "zeros", (Group(row_rule, col_rule),)), places[first : first + most]


def _by_rule(some: Sequence[Strip]) -> dict[Axis, list[Strip]]:
    found: dict[Axis, list[Strip]] = {}
    for strip in some:
        found.setdefault(strip.axis, []).append(strip)
    return found


def crop(z: Tensor, row: int, col: int, length: Sequence[int], padding_mode: str) -> Tensor:
    """[B, C, *length] from (row, col) on: wrapped around, or with zeros beyond the border."""
    rows, cols = _places(z, row, col, length, padding_mode)
    return F.pad(z, (0, 1, 0, 1))[:, :, rows][:, :, :, cols]


def _add_crop(canvas: Tensor, crop: Tensor, row: int, col: int, padding_mode: str) -> None:
    """Adds [B, C, *length] where `crop` took it from."""
    rows, cols = _places(canvas, row, col, crop.shape[2:], padding_mode)
    wide = crop.new_zeros(*crop.shape[:3], canvas.shape[3] + 1).index_add_(3, cols, crop)
    whole = wide.new_zeros(*crop.shape[:2], canvas.shape[2] + 1, wide.shape[3]).index_add_(2, rows, wide)
    canvas += whole[:, :, :-1, :-1]


def _places(z: Tensor, row: int, col: int, length: Sequence[int], padding_mode: str) -> list[Tensor]:
    """Rows and columns of the canvas that a crop has; one after the last stands for all beyond the border."""
    places = []
    for start, side, canvas in zip((row, col), length, z.shape[2:], strict=True):
        at = torch.arange(start, start + side, device=z.device)
        inside = (at >= 0) & (at < canvas)
        places.append(at % canvas if padding_mode == "circular" else torch.where(inside, at, canvas))
    return places


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
