"""Engine `reference`: the definition, in torch, written to be read.

Every window becomes a row of d = C k^2 numbers, a squared distance is |q|^2 - 2 q.p + |p|^2, and the softmax over
windows is summed tile by tile. Distances are float64 wherever the device has it: the expansion cancels at low noise,
which float64 leaves 1e-9 nats off at sigma = 0.005 and float32 a third of a nat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank import PatchBank
from ..posterior import PosteriorSum, accumulator_dtype
from ..windows import Axis, Competition, Group, rows_as_pixels, span, windows_as_rows
from .base import Combine, Engine
from .whole import whole_product

TILE_BYTES = 64 * 2**20
"""Working memory of a tile where `memory_limit` allows it; larger tiles leave the cache and were no faster."""
ALLOCATOR = 2
"""Memory a process grows by for each byte of a tile: the allocator keeps some of what earlier tiles gave back (measured
by the peak of the resident set, 60 images of 32 x 32 in colour)."""


class Reference(Engine):
    """The definition, on every device that torch has."""

    name = "reference"
    float64 = True
    moments = True
    gradients = True

    def runs_on(self, device: torch.device) -> bool:
        return True

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
        moments: bool = False,
    ) -> PosteriorSum:
        if competition.patch_size is None:
            return _whole_images(z, sigma, bank, memory_limit, moments)
        exact = accumulator_dtype(z.device)
        total = PosteriorSum.empty(z.shape, z.device, moments=moments)
        for group in competition.groups:
            for items, images, part in _tiles(group, z.shape, len(bank), competition.patch_size, memory_limit):
                train = bank.chunk(images.start, images.stop, exact, z.device)
                tile = _tile(z[items], sigma[items], train, part, competition, moments)
                total.add_(tile, items, span(part.rows.queries), span(part.cols.queries))
        return total

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigma: Tensor,
        direction: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> Tensor:
        total = self.first_pass(z, sigma, bank, competition, memory_limit, combine)
        if competition.patch_size is None:
            return whole_product(z, sigma, direction, bank, total, memory_limit)
        product = _vjp if transposed else _jvp
        return product(z, sigma, direction, bank, competition, memory_limit, total).to(direction.dtype)

    def window_sums(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> tuple[PosteriorSum, Tensor]:
        # The transpose of cutting windows, of every query's posterior-mean window.
        total, k = self.first_pass(z, sigma, bank, competition, memory_limit, combine), competition.patch_size
        assert k is not None
        padded = F.pad(torch.zeros_like(total.v), (k // 2,) * 4)
        for group in competition.groups:
            for items, images, part in _tiles(group, z.shape, len(bank), k, memory_limit // 2):
                train = bank.chunk(images.start, images.stop, padded.dtype, z.device)
                q, p = _query_rows(z[items], part, competition), _window_rows(train, part, competition)[0]
                _add_windows(padded[items], _weights(q, p, z[items], sigma[items], part, total, items) @ p, part, k)
        return total, _without_padding(padded, k // 2, competition.padding_mode)


def _tile(
    z: Tensor, sigma: Tensor, train: Tensor, group: Group, competition: Competition, moments: bool
) -> PosteriorSum:
    """The sums of one group of pixels over the windows of a few training images.

    Locked coordinates are a batch dimension L; the remaining query pixels Q and windows M meet in a matrix product.
    """
    q, p, v = _query_rows(z, group, competition), *_window_rows(train, group, competition)
    sigma2 = _sigma_rows(z, sigma, group).square()  # [L, Q, 1]

    # Log-weights -|q - p|^2 / (2 sigma^2) = (q.p - |p|^2 / 2) / sigma^2 - |q|^2 / (2 sigma^2), the last term common to
    # all windows of a pixel: the reference takes it. All in place, for this is the memory of a tile.
    logits = q @ p.mT  # [L, Q, M]
    logits.sub_(0.5 * _squared_norm(p).mT).div_(sigma2)
    largest = logits.amax(-1, keepdim=True)
    m = largest - _squared_norm(q) / (2 * sigma2)

    # The sums, relative to the largest log-weight.
    relative = logits.sub_(largest)
    w = relative.exp() if moments else relative.exp_()
    wv = w @ v
    sums = (m, wv[..., -1:], wv[..., :-1], _squared_norm(w))
    total = PosteriorSum(*(rows_as_pixels(x, len(z), group) for x in sums))
    if not moments:
        return total
    v2, sl = w @ v[..., :-1].square(), (w * relative).sum(-1, keepdim=True)
    return replace(total, v2=rows_as_pixels(v2, len(z), group), sl=rows_as_pixels(sl, len(z), group))


def _query_rows(z: Tensor, group: Group, competition: Competition) -> Tensor:
    """[L, Q, d] windows of images, continued beyond their border as z is."""
    k = competition.patch_size or 0
    mode = "circular" if competition.padding_mode == "circular" else "constant"
    padded = F.pad(z.to(accumulator_dtype(z.device)), (k // 2,) * 4, mode=mode)
    return windows_as_rows(padded, k, group.rows.queries, group.cols.queries, group)


def _window_rows(train: Tensor, group: Group, competition: Competition) -> tuple[Tensor, Tensor]:
    """[L, M, d] training windows, and [L, M, C + 1] the values at their centres beside a column of ones."""
    k, centres = competition.patch_size or 0, (group.rows.centres, group.cols.centres)
    windows = windows_as_rows(F.pad(train, (k // 2,) * 4), k, *centres, group)
    return windows, windows_as_rows(F.pad(train, (0, 0, 0, 0, 0, 1), value=1.0), 1, *centres, group)


def _pixel_rows(x: Tensor, group: Group) -> Tensor:
    """[L, Q, C] what [B, C, H, W] has at the group's pixels."""
    return windows_as_rows(x.to(accumulator_dtype(x.device)), 1, group.rows.queries, group.cols.queries, group)


def _sigma_rows(z: Tensor, sigma: Tensor, group: Group) -> Tensor:
    """[L, Q, 1] the noise level of every query."""
    levels = sigma.to(z.device, accumulator_dtype(z.device)).reshape(-1, 1, 1, 1)
    return _pixel_rows(levels.expand(-1, 1, *z.shape[2:]), group)


def _squared_norm(rows: Tensor) -> Tensor:
    """[..., n, d] -> [..., n, 1], without a copy of the rows."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square()


def _whole_images(z: Tensor, sigma: Tensor, bank: PatchBank, memory_limit: int, moments: bool) -> PosteriorSum:
    """One window, the whole image: the sums of `IdealScore`."""
    exact = accumulator_dtype(z.device)
    batch, pixels = len(z), z[0].numel()
    total = PosteriorSum.empty((batch, pixels, 1, 1), z.device, moments=moments)
    q, sigma2 = z.to(exact).flatten(1), sigma.to(z.device, exact).square()[:, None]
    image_bytes = ALLOCATOR * 8 * (3 * pixels + batch)  # its values and what they are made from, its weights
    if image_bytes > memory_limit:
        raise ValueError(f"memory_limit: got {memory_limit} bytes, one image takes {image_bytes}")
    count = max(1, min(ALLOCATOR * TILE_BYTES, memory_limit) // image_bytes)
    for start in range(0, len(bank), count):
        p = bank.chunk(start, start + count, exact, z.device).flatten(1)
        logits = (q @ p.T).sub_(0.5 * _squared_norm(p).T).div_(sigma2)
        largest = logits.amax(1, keepdim=True)
        m = largest - _squared_norm(q) / (2 * sigma2)
        relative = logits.sub_(largest)
        w = relative.exp() if moments else relative.exp_()
        sums = (m, w.sum(1, keepdim=True), w @ p, _squared_norm(w))
        part = PosteriorSum(*(x[:, :, None, None] for x in sums))
        if moments:
            squares, logs = w @ p.square(), (w * relative).sum(1, keepdim=True)
            part = replace(part, v2=squares[:, :, None, None], sl=logs[:, :, None, None])
        total.add_(part, slice(None), slice(None), slice(None))
    v2 = None if total.v2 is None else total.v2.reshape(z.shape)
    return replace(total, v=total.v.reshape(z.shape), v2=v2)


# Products with the Jacobian J = dD / dz. A second pass knows every weight w_a and the mean D.
#
#     J^T u = sum over queries of  sigma^-2 sum_a c_a (p_a - q)  at their windows' places,  c_a = w_a u.(v_a - D)
#     J t   = sigma^-2 sum_a w_a (v_a - D) t.(p_a - q)  at every query, t here being its window of the direction


def _vjp(
    z: Tensor,
    sigma: Tensor,
    u: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    total: PosteriorSum,
) -> Tensor:
    """As sum_a c_a = 0, q does not count; taken from p_a it keeps digits at low noise."""
    k = competition.patch_size
    assert k is not None
    gradient = F.pad(torch.zeros_like(total.v), (k // 2,) * 4)
    for group in competition.groups:
        for items, images, part in _tiles(group, z.shape, len(bank), k, memory_limit // 2):
            train = bank.chunk(images.start, images.stop, gradient.dtype, z.device)
            q, p, v = _query_rows(z[items], part, competition), *_window_rows(train, part, competition)
            mean, direction = _pixel_rows(total.mean[items], part), _pixel_rows(u[items], part)
            c = _weights(q, p, z[items], sigma[items], part, total, items)  # [L, Q, M]
            c *= direction @ v[..., :-1].mT - (direction * mean).sum(-1, keepdim=True)
            windows = (c @ p - c.sum(-1, keepdim=True) * q) / _sigma_rows(z[items], sigma[items], part).square()
            _add_windows(gradient[items], windows, part, k)
    return _without_padding(gradient, k // 2, competition.padding_mode)


def _jvp(
    z: Tensor,
    sigma: Tensor,
    t: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    total: PosteriorSum,
) -> Tensor:
    k, product = competition.patch_size, torch.zeros_like(total.v)
    assert k is not None
    for group in competition.groups:
        for items, images, part in _tiles(group, z.shape, len(bank), k, memory_limit // 2):
            train = bank.chunk(images.start, images.stop, product.dtype, z.device)
            q, p, v = _query_rows(z[items], part, competition), *_window_rows(train, part, competition)
            direction = _query_rows(t[items], part, competition)
            c = _weights(q, p, z[items], sigma[items], part, total, items)  # [L, Q, M]
            c *= direction @ p.mT - (direction * q).sum(-1, keepdim=True)
            sums = c @ v  # with the column of ones
            pixels = sums[..., :-1] - _pixel_rows(total.mean[items], part) * sums[..., -1:]
            pixels = pixels / _sigma_rows(z[items], sigma[items], part).square()
            place = product[items, :, span(part.rows.queries), span(part.cols.queries)]
            place += rows_as_pixels(pixels, len(z[items]), part)
    return product


def _weights(q: Tensor, p: Tensor, z: Tensor, sigma: Tensor, group: Group, total: PosteriorSum, items: slice) -> Tensor:
    """[L, Q, M] w_a, which over all windows of the bank sum to one."""
    sigma2 = _sigma_rows(z, sigma, group).square()
    logits = (q @ p.mT).sub_(0.5 * (_squared_norm(p).mT + _squared_norm(q))).div_(sigma2)
    return logits.sub_(_pixel_rows(total.m[items] + total.s[items].log(), group)).exp_()


def _add_windows(padded: Tensor, rows: Tensor, group: Group, k: int) -> None:
    """Adds windows [L, Q, C k^2] at their positions in padded images [B, C, H + k - 1, W + k - 1]."""
    high, wide = len(group.rows.queries), len(group.cols.queries)
    windows = rows_as_pixels(rows, len(padded), group).unflatten(1, (-1, k, k))
    top, left = group.rows.queries.start, group.cols.queries.start
    for y in range(k):
        for x in range(k):
            padded[:, :, top + y : top + y + high, left + x : left + x + wide] += windows[:, :, y, x]


def _without_padding(padded: Tensor, r: int, padding_mode: str) -> Tensor:
    """What padding by r did, transposed: the border is dropped, or added where it was copied from."""
    for axis in (2, 3):
        size = padded.shape[axis] - 2 * r
        if padding_mode == "circular":
            sources = (torch.arange(size + 2 * r, device=padded.device) - r) % size
            shape = [*padded.shape[:axis], size, *padded.shape[axis + 1 :]]
            padded = padded.new_zeros(shape).index_add_(axis, sources, padded)
        else:
            padded = padded.narrow(axis, r, size)
    return padded


def _tiles(
    group: Group, shape: tuple[int, ...], images: int, k: int, memory_limit: int
) -> Iterator[tuple[slice, slice, Group]]:
    """Cuts items x training images x rows into tiles that fit, halving whichever side of the product is longer."""
    batch, channels, height, width = shape
    rows, cols = group.rows, group.cols
    n_items, n_images, n_queries, n_windows = batch, max(1, images), len(rows.queries), len(rows.centres)

    def tile_bytes() -> int:
        locked = (n_queries if rows.locked else 1) * (len(cols.queries) if cols.locked else 1)
        q = n_items * n_queries * len(cols.queries)
        p = n_images * n_windows * len(cols.centres)
        windows = channels * k * k * (q + p) + (channels + 1) * p
        padded = 3 * channels * (height + k - 1) * (width + k - 1)  # images: read, converted, padded
        return ALLOCATOR * 8 * (windows + padded * (n_items + n_images) + q * p // locked)

    while tile_bytes() > min(ALLOCATOR * TILE_BYTES, memory_limit):
        if rows.locked:
            queries_are_longer = n_items > n_images
        else:
            queries_are_longer = n_items * n_queries * len(cols.queries) > n_images * n_windows * len(cols.centres)
        if queries_are_longer and n_items > 1:
            n_items = (n_items + 1) // 2
        elif n_images > 1:
            n_images = (n_images + 1) // 2
        elif n_items > 1:
            n_items = (n_items + 1) // 2
        elif max(n_queries, n_windows) > 1:
            n_queries, n_windows = (n_queries + 1) // 2, (n_windows + 1) // 2
        elif tile_bytes() > memory_limit:
            raise ValueError(f"memory_limit: got {memory_limit} bytes, one row of windows takes {tile_bytes()}")
        else:
            break

    for part in _row_parts(rows, n_queries, n_windows):
        for item in range(0, batch, n_items):
            for image in range(0, images, n_images):
                yield slice(item, item + n_items), slice(image, image + n_images), Group(part, cols)


def _row_parts(rows: Axis, n_queries: int, n_windows: int) -> Iterator[Axis]:
    """The axis cut into pieces; a locked axis is cut once for queries and windows together."""
    for first in range(0, len(rows.queries), n_queries):
        queries = rows.queries[first : first + n_queries]
        if rows.windows is None:
            yield Axis(queries)
        else:
            for start in range(0, len(rows.windows), n_windows):
                yield Axis(queries, rows.windows[start : start + n_windows])
