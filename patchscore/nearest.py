"""Search for the nearest: training windows to each pixel's window, and training images to whole images.

Candidates are found in float32, a chunk of the bank at a time, with some to spare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import PatchBank
from .denoiser import check_noisy
from .pixels import to_values
from .windows import Axis, Competition, Group, rows_as_pixels, windows_as_rows

SPARE = 8
"""Windows found beyond those asked for, so that rounding in the search does not decide which are among them."""

BLOCK = 32
TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Nearness:
    """How near samples come to single training images.

    image: [n] the nearest training image of each, by its number in the bank.
    rms: [n] root mean squared difference of their pixels, which lie in [-1, 1].
    """

    image: Tensor
    rms: Tensor


@torch.no_grad()
def nearest_images(images: Tensor, bank: PatchBank, other_than: Sequence[int] | None = None) -> Nearness:
    """The training image nearest to each of some images [n, C, H, W]: a copy has rms 0.

    Args:
        images: in [-1, 1].
        bank: the training images.
        other_than: for each image, a training image that does not count, such as itself.
    """
    images = check_noisy(images, bank.shape, "images")
    scores = torch.cat([whole_image_scores(images, train) for _, train in chunks(bank, images, 1)], 1)
    if other_than is not None:
        scores[torch.arange(len(images)), torch.as_tensor(other_than)] = -torch.inf
    # Some to spare, as scores are float32; the distances themselves are taken in float64.
    spare = min(1 + SPARE, len(bank) - (other_than is not None))
    near = scores.topk(spare, 1).indices
    train = torch.stack([images_of(bank, row, images.device) for row in near])
    least, at = (train - images.double()[:, None]).square().mean((2, 3, 4)).sqrt().min(1)
    return Nearness(near.gather(1, at[:, None])[:, 0], least)


def usual_nearness(bank: PatchBank, n: int = 200) -> Nearness:
    """The same for up to n training images and their nearest others: the scale that a sample's distance is read on."""
    numbers = sorted({round(i * (len(bank) - 1) / max(1, n - 1)) for i in range(n)})
    return nearest_images(images_of(bank, torch.tensor(numbers), torch.device("cpu")), bank, numbers)


def nearest_windows(z: Tensor, bank: PatchBank, competition: Competition, count: int, memory_limit: int) -> Tensor:
    """The `count` competing windows nearest to each pixel's own: [3 (image, row, col), B, T, H, W] int64.

    T is at most `count`; pixels with fewer competitors, or in no group, are filled up with -1. The smallest |q - p|^2
    is the largest q.p - |p|^2 / 2. In float32, so windows whose distances differ by rounding may change places.
    """
    batch, _, height, width = z.shape
    if competition.patch_size is None:
        score = torch.cat([whole_image_scores(z, train) for _, train in chunks(bank, z, 1)], 1)
        image = score.topk(min(count, len(bank)), 1).indices[:, :, None, None].expand(-1, -1, height, width)
        row = torch.arange(height, device=z.device)[:, None].expand_as(image)
        col = torch.arange(width, device=z.device).expand_as(image)
        return torch.stack([image, row, col])
    found = torch.full((3, batch, count, height, width), -1, device=z.device)
    for group in competition.groups:
        for rows in _row_bands(group, z, competition.patch_size, memory_limit):
            band = Group(rows, group.cols)
            best = _nearest_in_group(z, bank, band, competition, count)
            spot = (..., slice(rows.queries.start, rows.queries.stop), _span(group.cols.queries))
            found[spot] = torch.stack([rows_as_pixels(part, batch, band) for part in best])
    return found


def _nearest_in_group(z: Tensor, bank: PatchBank, group: Group, competition: Competition, count: int) -> list[Tensor]:
    """Image, row and column [L, Q, count] of the nearest windows of a group's pixels, by a running selection."""
    k = competition.patch_size or 0
    padding = (k // 2,) * 4
    noisy = F.pad(z.float(), padding, mode="circular" if competition.padding_mode == "circular" else "constant")
    q = windows_as_rows(noisy, k, group.rows.queries, group.cols.queries, group)  # [L, Q, d]
    best = q.new_full((*q.shape[:2], count), -torch.inf)
    which = torch.full(best.shape, -1, device=z.device)
    windows = group.windows_per_image

    per_image = q.shape[0] * windows * (q.shape[2] + q.shape[1]) * 4
    for start, train in chunks(bank, z, per_image):
        p = windows_as_rows(F.pad(train, padding), k, group.rows.centres, group.cols.centres, group)  # [L, M, d]
        score = torch.baddbmm(p.square().sum(-1)[:, None] * -0.5, q, p.mT)  # [L, Q, M]
        values, places = _largest(score, count)
        best, order = torch.cat([best, values], -1).topk(count, -1)
        which = torch.cat([which, places + start * windows], -1).gather(-1, order)

    # A window's number counts images, then the free coordinates; a locked coordinate is the query's own.
    missing = which < 0
    image, inside = which.div(windows, rounding_mode="floor"), which.remainder(windows)
    row, col = _coordinates(inside, group, z)
    return [torch.where(missing, -1, part) for part in (image, row, col)]


def _largest(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk along the last axis. The winners lie in the `count` blocks with the largest maxima: most is never sorted."""
    length = score.shape[-1]
    count = min(count, length)
    if length <= 4 * BLOCK * count:
        return score.topk(count, -1)
    padded = F.pad(score, (0, -length % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK))
    blocks = padded.amax(-1).topk(count, -1).indices  # [L, Q, count]
    kept = padded.gather(-2, blocks[..., None].expand(*blocks.shape, BLOCK))  # [L, Q, count, BLOCK]
    values, places = kept.flatten(-2).topk(count, -1)
    block = blocks.gather(-1, places.div(BLOCK, rounding_mode="floor"))
    return values, block * BLOCK + places.remainder(BLOCK)


def _coordinates(inside: Tensor, group: Group, z: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of windows [L, Q, T] by their number within an image."""
    rows, cols = group.rows, group.cols
    across = 1 if cols.locked else len(cols.centres)
    locked_rows = torch.arange(rows.queries.start, rows.queries.stop, device=z.device)
    locked_cols = torch.arange(cols.queries.start, cols.queries.stop, device=z.device)
    n_rows, n_cols = (len(locked_rows) if rows.locked else 1), (len(locked_cols) if cols.locked else 1)
    if rows.locked:
        row = locked_rows.repeat_interleave(n_cols)[:, None, None].expand_as(inside)
    else:
        row = rows.centres.start + inside.div(across, rounding_mode="floor")
    if cols.locked:
        col = locked_cols.repeat(n_rows)[:, None, None].expand_as(inside)
    else:
        col = cols.centres.start + inside.remainder(across)
    return row, col


def images_of(bank: PatchBank, numbers: Tensor, device: torch.device) -> Tensor:
    """[n, C, H, W] float64: those images of a bank or a selection, by their number in it."""
    return to_values(bank.stored_at(numbers.cpu()).to(device), torch.float64) * bank.scale


def whole_image_scores(z: Tensor, train: Tensor) -> Tensor:
    p = train.flatten(1)
    return z.float().flatten(1) @ p.T - 0.5 * p.square().sum(1)


def chunks(bank: PatchBank, z: Tensor, bytes_per_image: int) -> Iterator[tuple[int, Tensor]]:
    """The bank as float32 on z's device, so many images at a time that their tile stays small."""
    step = max(1, min(TILE_BYTES // max(bytes_per_image, 1), (64 << 20) // (4 * z[0].numel())))
    for start in range(0, len(bank), step):
        yield start, bank.chunk(start, start + step, torch.float32, z.device)


def _row_bands(group: Group, z: Tensor, k: int, memory_limit: int) -> Iterator[Axis]:
    """The group's query rows in bands, so that the windows of one band and its tile with one training image fit."""
    row_bytes = 4 * len(z) * len(group.cols.queries) * (group.windows_per_image + z.shape[1] * k * k)
    step = max(1, min(4 * TILE_BYTES, memory_limit) // row_bytes)
    for start in range(0, len(group.rows.queries), step):
        yield Axis(group.rows.queries[start : start + step], group.rows.windows)


def _span(coordinates: range) -> slice:
    return slice(coordinates.start, coordinates.stop)
