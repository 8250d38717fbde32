"""An index on a GPU, for the Triton half of `pruned`: tables of all cells, what is asked of them, windows as rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...index import SIBLINGS, IndexedSize
from ..device import cache, cache_limit
from ..fused.plan import BIAS_COLUMNS

COLUMNS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
"""Numbers of a row: a power of two, or two. A row is a window's leading axes and its bias -|p|^2 / 2 in three parts,
which a query meets with ones. Axes that find no room are left to the second look."""

UPLOADED = 64 * 2**20
"""Bytes of the index that are unpacked at a time."""


@functools.cache
def kernels() -> ModuleType:
    """kernels.py; Triton is imported where it is wanted, as it takes its time."""
    from . import kernels as lists

    return lists


@dataclass(frozen=True)
class Selection:
    """images: [N] whether an image of the index competes, None for all; counts: [cells] int32 competing windows.

    Of the parents, of what competes: windows [parents] fp32; log_repeats [parents]; moments [parents, 1 + C] 1, mean of
    the values.
    """

    images: Tensor | None
    counts: Tensor
    windows: Tensor
    log_repeats: Tensor
    moments: Tensor

    @classmethod
    def of(cls, images: Tensor | None, counts: Tensor, cells: Cells) -> Selection:
        n = counts.float()
        windows = n.view(-1, SIBLINGS).sum(1)
        repeats = (n * cells.log_repeats.exp()).view(-1, SIBLINGS).sum(1) / windows.clamp(min=1)
        moments = n[:, None] * cells.moments[:, : 1 + cells.channels]
        moments = moments.unflatten(0, (-1, SIBLINGS)).sum(1) / windows.clamp(min=1)[:, None]
        return cls(images, counts, windows, repeats.clamp(min=1).log(), moments)


@dataclass(frozen=True)
class Cells:
    """What is known of the cells without looking into them.

    sizes, first: [cells] int64, windows and where they begin; mean, variance: [rank, cells]; parent_mean,
    parent_variance: [rank, parents]; log_repeats: [cells]; moments: [cells, NM] 1, mean of the values, mean of their
    squares, zeros. Of the regions: centre [regions, C k^2], axes [regions, C k^2, rank]; places [regions, 5] int32,
    first row and column, rows, columns, and which region.
    """

    channels: int
    sizes: Tensor
    first: Tensor
    mean: Tensor
    variance: Tensor
    parent_mean: Tensor
    parent_variance: Tensor
    log_repeats: Tensor
    moments: Tensor
    centre: Tensor
    axes: Tensor
    places: Tensor

    @classmethod
    def of(cls, part: IndexedSize, device: torch.device) -> Cells:
        channels = part.moments.shape[1] // 2
        moments = torch.cat([torch.ones(len(part.moments), 1), part.moments], 1)
        moments = functional.pad(moments, (0, moment_columns(channels) - moments.shape[1]))
        features = part.mean, part.variance, part.parent_mean, part.parent_variance
        places = [
            [of.rows.start, of.cols.start, len(of.rows), len(of.cols), number] for number, of in enumerate(part.regions)
        ]
        tables = part.log_repeats, moments, part.centre, part.axes, torch.tensor(places, dtype=torch.int32)
        every = part.sizes, part.starts, *features, *tables
        return cls(channels, *(table.contiguous().to(device) for table in every))


def moment_columns(channels: int) -> int:
    """NM: ones, values and squares, to a power of two."""
    return 1 << (2 * channels).bit_length()


def value_columns(channels: int) -> int:
    """NV: ones, inverse counts, values, their low halves and squares, to a power of two of at least 16."""
    return max(16, 1 << (1 + 3 * channels).bit_length())


def columns_for(part: IndexedSize) -> int:
    """K: the least number of COLUMNS that holds all axes and the bias, or the most."""
    return next((size for size in COLUMNS if size >= part.rank + BIAS_COLUMNS), COLUMNS[-1])


# What is asked of it.


class Span(NamedTuple):
    """Queries first .. last - 1: their place, the share of the windows to take, and under how many parents to look."""

    place: int
    first: int
    last: int
    share: float = 0.0
    families: int = 0


@dataclass(frozen=True)
class Queries:
    """Noisy windows, place by place and item by item.

    windows: [Q, C k^2] fp32; q: [Q, axes] fp32 features; geometry: [Q, 5] int32, as `propose_kernel` takes it; pixel:
    [Q] int64, counted along the noisy images with a border of one around each; luck: [2, Q] fp32 in (0, 1).
    """

    windows: Tensor
    q: Tensor
    spans: list[Span]
    geometry: Tensor
    pixel: Tensor
    luck: Tensor

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, some: slice) -> Queries:
        start, stop = some.start, some.stop
        spans = [
            span._replace(first=max(span.first, start) - start, last=min(span.last, stop) - start)
            for span in self.spans
            if span.first < stop and span.last > start
        ]
        names = ("windows", "q", "geometry", "pixel")
        return Queries(
            spans=spans, luck=self.luck[:, some].contiguous(), **{name: getattr(self, name)[some] for name in names}
        )


# Windows on the device.


@dataclass
class Rows:
    """The windows of consecutive cells: rows [n, K] and values [n, NV] in fp16; ids [n] int64; log_counts [n], bits."""

    cells: range
    sizes: Tensor  # [cells] int64
    rows: Tensor
    values: Tensor
    ids: Tensor
    log_counts: Tensor | None
    orders: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.rows, self.values, self.ids, self.log_counts, self.sizes) if x is not None]

    def ordered(self, images: Tensor, part: IndexedSize) -> tuple[Tensor, Tensor]:
        """Windows of the chosen images, cell by cell, as int32 rows; and how many each cell has."""
        if id(images) not in self.orders:
            per_image = torch.empty_like(self.sizes)
            for region in part.regions:
                first, last = region.first_cell - self.cells.start, region.first_cell + region.cells - self.cells.start
                per_image[max(0, first) : max(0, last)] = len(region.rows) * len(region.cols)
            image = self.ids // per_image.repeat_interleave(self.sizes, output_size=len(self.ids))
            chosen = images[image]
            before = functional.pad(chosen.cumsum(0), (1, 0))
            ends = self.sizes.cumsum(0)
            order = chosen.nonzero().flatten().to(torch.int32)
            self.orders[id(images)] = images, order, (before[ends] - before[ends - self.sizes]).to(torch.int32)
        return self.orders[id(images)][1:]


def row_bytes(part: IndexedSize) -> int:
    """Of one window on the device."""
    counted = 0 if part.counts is None else 4
    return 2 * columns_for(part) + 2 * value_columns(part.values.shape[1]) + 8 + counted


def pieces(part: IndexedSize, device: torch.device) -> Iterator[Rows]:
    """All windows of an index at one patch size: kept on the device where they fit, else piece by piece, every time.

    CACHE_SHARE of the GPU's memory is for these and the rows of `fused` together; a piece takes a quarter of that, or
    of what there was no memory for.
    """
    kept = cache.get(part, device, ())
    if kept is not None:
        yield from kept
        return
    limit = cache_limit(device)
    each = row_bytes(part)
    sizes = part.sizes.tolist()
    if each * sum(sizes) <= limit:
        try:
            made = [_load(part, range(len(sizes)), device)]
        except torch.OutOfMemoryError:
            cache.clear(device)
            torch.cuda.empty_cache()
            limit = each * sum(sizes)
        else:
            cache.put(part, device, (), made, limit)
            yield from made
            return
    start = held = 0
    for cell, size in enumerate(sizes):
        if held and (held + size) * each > limit // 4:
            yield _load(part, range(start, cell), device)
            start, held = cell, 0
        held += size
    yield _load(part, range(start, len(sizes)), device)


def _load(part: IndexedSize, cells: range, device: torch.device) -> Rows:
    sizes = part.sizes[cells.start : cells.stop]
    count, first = int(sizes.sum()), int(part.starts[cells.start])
    columns, channels = columns_for(part), part.values.shape[1]
    axes = min(part.rank, columns - BIAS_COLUMNS)
    rows = torch.zeros(count, columns, dtype=torch.float16, device=device)
    ids = torch.empty(count, dtype=torch.int64, device=device)
    # In the file a cell is its windows' features, then their ids; both are whole numbers of eight bytes.
    words = part.rank // 4
    ends = sizes.cumsum(0)
    done = 0
    while done < count:
        at = int(torch.searchsorted(ends, done, right=True))
        upto = int(torch.searchsorted(ends, done + max(1, UPLOADED // (8 * words + 8)), right=True))
        upto = max(upto, at + 1)
        some = sizes[at:upto]
        windows = int(some.sum())
        offset = int(part.offsets[cells.start + at])
        raw = torch.from_numpy(part.data[offset : offset + windows * 8 * (words + 1)].copy()).view(torch.int64)
        raw, some = raw.to(device), some.to(device)
        before = some.cumsum(0) - some
        place = torch.arange(windows, device=device) - before.repeat_interleave(some, output_size=windows)
        start = (before * (words + 1)).repeat_interleave(some, output_size=windows)
        size = some.repeat_interleave(some, output_size=windows)
        read = raw[(start + place * words)[:, None] + torch.arange(words, device=device)]
        rows[done : done + windows, :axes] = read.view(torch.float16)[:, :axes]
        ids[done : done + windows] = raw[start + size * words + place]
        done += windows

    bytes_ = part.index.bank.images.dtype == torch.uint8
    pixels = torch.from_numpy(part.values[first : first + count].copy()).to(device)
    repeats = None
    if part.counts is not None and part.repeats is not None:
        codes = torch.from_numpy(part.counts[first : first + count].astype("int32")).to(device)
        repeats = part.repeats.to(device)[codes]
    values = torch.zeros(count, value_columns(channels), dtype=torch.float16, device=device)
    for low in range(0, count, 1 << 20):
        some_rows = slice(low, low + (1 << 20))
        v = (pixels[some_rows].float() - 127.5) / 128 if bytes_ else pixels[some_rows]
        values[some_rows, 0] = 1
        values[some_rows, 1] = kernels().COUNT_UNIT.value / (1 if repeats is None else repeats[some_rows])
        values[some_rows, 2 : 2 + channels] = v
        values[some_rows, 2 + channels : 2 + 2 * channels] = v - v.half()
        values[some_rows, 2 + 2 * channels : 2 + 3 * channels] = v * v
        bias = -0.5 * rows[some_rows, :axes].float().square().sum(1)
        for column in range(axes, axes + BIAS_COLUMNS):
            rows[some_rows, column] = bias
            bias = bias - rows[some_rows, column]
    log_counts = None if repeats is None else repeats.log2()
    return Rows(cells, sizes.to(device), rows, values, ids, log_counts)
