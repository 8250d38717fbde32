"""The GPU half of engine `pruned`, in Triton (kernels.py).

The same estimate as on the CPU: weights are foreseen for parents first, then for the cells of those that matter; a
query takes a share of each, as large as the cell's moments let expect, and what it takes stands for the rest. Here a
query looks under a fixed number of parents, one program plans it, takers are sorted by cell so that a block of queries
reads a tile of windows once, and the host waits once a part of the call, for the length of the list.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...bank import PatchBank
from ...index import SIBLINGS, IndexedSize
from ...posterior import PosteriorSum
from ...windows import Competition
from ..autotune import Configuration, KernelError, first_that_serves, started, wanted
from ..device import cache
from ..fused.launch import Fused
from ..fused.plan import BIAS_COLUMNS
from .device_index import Cells, Queries, Rows, Selection, Span, columns_for, kernels, pieces, value_columns
from .engine import (
    EDGES,
    FLOOR,
    MOST_CHANNELS,
    PILOT_PIXELS,
    RECHECK,
    SHARPEST,
    Pruned,
    _put,
    _regions,
    _tensors,
)
from .recheck import PROPOSED, ROUNDS, Recheck, Sample

TILE = 64
"""Windows of a tile."""

QUANTUM = 16
"""A prefix is a multiple of so many windows, or the whole cell: fewer would leave most of a tile idle."""

LEAST_FAMILIES = 0.08
"""Share of the parents that a query looks under in any case, or four budgets; more where the noise asks for it."""

MOST_SKIPPED = 0.02
"""Share of a query's foreseen weight that may lie under other parents, for most queries."""

PROBES = 64
"""Queries by which the number of families is found."""

PLANNED = 64
"""Queries of a block that is foreseen."""

FORESEEN_AXES = 16
"""Axes that are foreseen by at a time."""

EXPECTED_SHARE = 0.1
"""The part of the variance expected of windows not taken that is added to the variance seen."""

NEGLIGIBLE_BITS = 42.0
"""Tiles whose weights all lie so far below the largest known are skipped, however many windows they stand for."""

DOUBT = 1 / (9 * EXPECTED_SHARE)
"""What is foreseen of other parents is known to within a third, in units of that."""

SLOT_BYTES = 192
"""Of one (family, query) pair: what is foreseen of its cells, and the sorting."""

ITEM_BYTES = 328
"""Of one (cell, query) pair: where and how much, its sums, and the sorting."""

PICK_BYTES = 256
"""Of one window that is looked at a second time."""

SMALLEST_TUNED = 2**28
"""Pairs of a scan that is worth timing."""


def unavailable(device: torch.device) -> str | None:
    """Why the GPU half cannot serve on `device`, or None. As of `fused`, whose requirements are its own."""
    return Fused().unavailable(device) or _broken


_broken: str | None = None
"""Why no kernel could be compiled, once that happened."""


class PrunedOnDevice(Pruned):
    """Engine `pruned`, on the GPU where z is there, else on the CPU."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._images: dict[torch.device, Tensor] = {}
        self._tables: dict[tuple[int, torch.device], Cells] = {}
        self._selections: dict[tuple[int, int, torch.device], tuple[PatchBank, Selection]] = {}
        self._reach: dict[tuple[int, int, float], float] = {}
        self._draws: dict[tuple[int, float, torch.Size, torch.device], tuple[Tensor, Tensor]] = {}

    def unavailable(self, device: torch.device) -> str | None:
        if device.type == "cuda" and self.index.bank.shape[0] <= MOST_CHANNELS:
            return unavailable(device)
        return super().unavailable(device)

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
    ) -> PosteriorSum:
        if not Fused().runs_on(z.device) or unavailable(z.device) is not None:
            return super().posterior_sum(z, sigma, bank, competition, memory_limit)
        try:
            with torch.cuda.device(z.device) if z.device.type == "cuda" else contextlib.nullcontext():
                return self._on_device(z, sigma, bank, competition, memory_limit)
        except KernelError as error:
            global _broken
            _broken = f"its kernel failed to compile ({error})"
            raise KernelError(_broken) from error

    def _on_device(
        self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition, memory_limit: int
    ) -> PosteriorSum:
        assert competition.patch_size is not None
        part = self.index.at(competition.patch_size)
        noisy = z.detach().to(torch.float32)
        total = PosteriorSum.empty(z.shape, z.device, sampled=True)
        places = [Place(*place) for group in competition.groups for place in _regions(part, group)]
        pairs = 0
        for level in sigma.unique().tolist():
            alike = (sigma == level).nonzero().flatten()
            # Whole images at a time, for their pixels learn from each other.
            kept = PICK_BYTES * (_picks(part, places, level, z.shape[1]) + 4 * PROPOSED * ROUNDS)
            for items in alike.split(max(1, memory_limit // (z.shape[2] * z.shape[3] * kept))):
                first, last = int(items[0]), int(items[-1])
                # Numbers that are copied to the device are what the host would wait for.
                at = slice(first, last + 1) if last - first + 1 == len(items) else items.to(z.device)
                scan = Scan(self, part, bank, level, noisy[at], places, competition.padding_mode, memory_limit)
                for place, sums in zip(places, scan.run(), strict=True):
                    _put(total, items, place.rows, place.cols, sums)
                pairs += scan.pairs
        return total.with_pairs(pairs)

    def images(self, device: torch.device) -> Tensor:
        """The index's images as stored, kept on the device."""
        if device not in self._images:
            self._images[device] = self.index.images.contiguous().to(device)
        return self._images[device]

    def cells(self, part: IndexedSize, device: torch.device) -> Cells:
        """The tables of all cells, kept on the device."""
        key = part.k, device
        if key not in self._tables:
            self._tables[key] = Cells.of(part, device)
        return self._tables[key]

    def selection(self, bank: PatchBank, part: IndexedSize, device: torch.device) -> Selection:
        """Which windows of the index compete."""
        key = id(bank), part.k, device
        if key not in self._selections:
            self._selections[key] = bank, self._selected(bank, part, device)
        return self._selections[key][1]

    def _selected(self, bank: PatchBank, part: IndexedSize, device: torch.device) -> Selection:
        cells = self.cells(part, device)
        sizes, whole = cells.sizes, self.index.bank
        if len(bank) == len(whole):
            return Selection.of(None, sizes.to(torch.int32), cells)
        # Indices count from the bank that both are selected from; images of the index count from its own first.
        assert bank.indices is not None
        held = torch.arange(len(whole.images)) if whole.indices is None else whole.indices
        images = torch.isin(held, bank.indices).to(device)
        counts = torch.empty(len(sizes), dtype=torch.int32, device=device)
        for rows in pieces(part, device):
            counts[rows.cells.start : rows.cells.stop] = rows.ordered(images, part)[1]
        return Selection.of(images, counts, cells)

    def draws(self, part: IndexedSize, sigma: float, pixels: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """[2, H, W] fp32 and [cells] fp64 in (0, 1), kept: they follow the seed, the noise level and the pixel or cell,
        not what else is in the call."""
        key = part.k, sigma, pixels, device
        if key not in self._draws:
            generator = torch.Generator().manual_seed(hash((self.seed, part.k, sigma)) & 0x7FFFFFFFFFFFFFFF)
            luck = torch.rand(2, *pixels, generator=generator).clamp(1e-6, 1 - 1e-6)
            turns = torch.rand(len(part.sizes), generator=generator, dtype=torch.float64)
            self._draws[key] = luck.to(device), turns.to(device)
        return self._draws[key]

    def reach(self, part: IndexedSize, region: int, sigma: float) -> float:
        """The share of a region's parents under which nearly all of a query's weight is to be expected.

        Nine in ten of PROBES queries, drawn as the cells' moments have it, leave out no more than MOST_SKIPPED. It
        follows from the index and the noise alone, so queries are planned alike whatever else is asked.
        """
        key = part.k, region, sigma
        if key not in self._reach:
            of = part.regions[region]
            here = slice(of.first_cell // SIBLINGS, (of.first_cell + of.cells) // SIBLINGS)
            mean, variance = part.parent_mean[:, here], part.parent_variance[:, here]
            windows = part.sizes[of.first_cell : of.first_cell + of.cells].view(-1, SIBLINGS).sum(1)
            marks = (torch.arange(PROBES) + 0.5) / PROBES * windows.sum()
            drawn = torch.searchsorted(windows.cumsum(0), marks).clamp(max=len(windows) - 1)
            generator = torch.Generator().manual_seed(0)
            spread = (variance[:, drawn] + sigma**2).sqrt()
            q = mean[:, drawn] + spread * torch.randn(len(mean), PROBES, generator=generator)
            linear, square, constant = _gaussian(mean, variance, sigma**2)
            share = torch.softmax(q.T @ linear + q.square().T @ square + constant + windows.log(), 1)
            skipped = 1 - share.sort(1, descending=True).values.double().cumsum(1)
            needed = 1 + (skipped > MOST_SKIPPED).sum(1)
            self._reach[key] = min(1.0, float(needed.double().quantile(0.9)) / len(windows))
        return self._reach[key]


def _gaussian(mean: Tensor, variance: Tensor, kernel: float) -> tuple[Tensor, Tensor, Tensor]:
    """What q, its square and one are multiplied by, [axes, cells] twice and [cells], to give the log of E[w].

    w = exp((|q|^2 - |q - p|^2) / (2 kernel)), p normal with a cell's mean and variances: a Gaussian kernel over a
    Gaussian cell is a Gaussian.
    """
    precision = 1 / (kernel + variance)
    constant = torch.log1p(variance / kernel).sum(0) + (precision * mean.square()).sum(0)
    return precision * mean, 0.5 * variance * precision / kernel, -0.5 * constant


@dataclass(frozen=True)
class Place:
    """Pixels that one region of the index serves."""

    region: int
    rows: range
    cols: range


def configurations(columns: int, capability: tuple[int, int]) -> list[Configuration]:
    """Tiles of the scan and how it is compiled, the likeliest first; none spills, all fit in shared memory.

    benchmarks/compile_report.py checks that and counts instructions.
    """
    served = [Configuration(128, TILE, 8, 2), Configuration(64, TILE, 4, 3)]
    return [Configuration(128, TILE, 4, 2), *served] if capability >= (9, 0) and columns <= 128 else served


def _blocks(first: Tensor, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of at most `size` of `count` sorted things that share a key: key int32, first, end int64 of each.

    `first` [keys + 1] int64 says where the things of a key begin. There are more blocks than are needed, so that the
    host need not know how many; those past the end have a key past the last.
    """
    ends = ((first.diff() + size - 1) // size).cumsum(0)
    block = torch.arange(count // size + min(len(first), count), device=first.device)
    owner = torch.searchsorted(ends, block, right=True)
    before = functional.pad(ends, (1, 0))
    start = first[owner] + (block - before[owner]) * size
    return owner.to(torch.int32), start, first[(owner + 1).clamp(max=len(first) - 1)]


# A scan.


@dataclass(frozen=True)
class Foreseen:
    """What is to be expected of the families that queries look under; names as in the kernels.

    windows: [Q] fp32 that compete at a query in all. Of all other parents: skipped [Q, 1 + C], weight foreseen and that
    times their values, relative to 2^parent_top [Q].
    """

    foreseen: Tensor
    family: Tensor
    first_slot: Tensor
    n_slots: Tensor
    windows: Tensor
    skipped: Tensor
    parent_top: Tensor


@dataclass(frozen=True)
class Items:
    """(cell, query) pairs, query by query; names as in the kernels."""

    first_item: Tensor  # [Q + 1] int64
    query: Tensor
    cell: Tensor
    take: Tensor
    factor: Tensor
    chance: Tensor
    first_tile: Tensor
    tiles: int
    pairs: int
    share: Tensor
    promising: Tensor  # [Q] int64
    sure: Tensor  # [Q]
    far: Tensor  # [Q, NM]
    unseen: Tensor  # [Q, NM]

    def __len__(self) -> int:
        return len(self.cell)


@dataclass(frozen=True)
class Sums:
    """What a scan leaves of each item; `sums` and `squares` [items, NV], `top` [items], `tile_sums` [tiles]."""

    sums: Tensor
    squares: Tensor
    top: Tensor
    tile_sums: Tensor


def _picks(part: IndexedSize, places: Sequence[Place], sigma: float, channels: int) -> int:
    """How many windows of a query are looked at a second time: the more variance is left out, in units of sigma^2."""
    blurred = _blurred(part, sigma, channels)
    axes = min(part.rank, columns_for(part) - BIAS_COLUMNS)
    left = max((float(part.tail[place.region][axes]) for place in places), default=0.0) / blurred**2
    return RECHECK * round(min(8.0, max(4.0 if sigma < blurred else 1.0, left / 0.05)))


def _blurred(part: IndexedSize, sigma: float, channels: int) -> float:
    """The noise that the scan weighs by."""
    return max(sigma, min(0.1, SHARPEST * math.sqrt(channels * part.k**2)))


class Scan:
    """Posterior sums at one noise level, for pixels of some places."""

    def __init__(
        self,
        engine: PrunedOnDevice,
        part: IndexedSize,
        bank: PatchBank,
        sigma: float,
        z: Tensor,
        places: Sequence[Place],
        padding_mode: str,
        memory_limit: int,
    ):
        self.engine, self.part, self.places, self.memory_limit = engine, part, list(places), memory_limit
        self.device = z.device
        self.shape = z.shape
        self.channels = z.shape[1]
        self.bytes = part.index.bank.images.dtype == torch.uint8
        self.unit = 127.5 / 128 if self.bytes else 1.0
        self.sharp, self.sigma = sigma, _blurred(part, sigma, self.channels)
        self.bits = math.log2(math.e) / self.sigma**2
        self.axes = min(part.rank, columns_for(part) - BIAS_COLUMNS)
        self.picks = _picks(part, places, sigma, self.channels)
        self.cells = engine.cells(part, self.device)
        self.selection = engine.selection(bank, part, self.device)
        self.luck, turns = engine.draws(part, sigma, z.shape[2:], self.device)
        self.turn = (turns * self.selection.counts).to(torch.int32)
        r = part.k // 2
        self.padded = functional.pad(z, (r, r, r, r), mode="circular" if padding_mode == "circular" else "constant")
        noise = self.sigma, self.sharp
        self.recheck = Recheck(engine.images(self.device), part, self.cells, self.axes, *noise, z.shape)
        self._expectation()
        self.pairs = 0

    def run(self) -> list[PosteriorSum]:
        """The sums of every place, [B, 1 or C, rows, cols]."""
        if not self.places:
            return []
        whole = self._sum(self._shared(self._queries([None] * len(self.places)), self._budgets()))
        self.pairs = whole.pairs or 0
        parts = []
        first = 0
        for place in self.places:
            shape = (self.shape[0], len(place.rows), len(place.cols))
            cut = slice(first, first + math.prod(shape))
            first = cut.stop
            sums = {name: x[cut].unflatten(0, shape).movedim(-1, 1) for name, x in _tensors(whole).items()}
            parts.append(PosteriorSum(**sums))
        return parts

    # What is asked.

    def _queries(self, pixels: Sequence[Tensor | None]) -> Queries:
        """The pixels of every place, all or some, of every item; a span a place, without a share yet."""
        k, made = self.part.k, []
        names = ("windows", "q", "geometry", "pixel", "luck")
        spans: list[Span] = []
        first = 0
        batch, _, height, width = self.shape
        every = torch.arange(batch * (height + 2) * (width + 2), device=self.device)
        every = every.view(batch, height + 2, width + 2)[:, 1:-1, 1:-1]
        for number, (place, some) in enumerate(zip(self.places, pixels, strict=True)):
            around = self.padded[
                :, :, place.rows.start : place.rows.stop + k - 1, place.cols.start : place.cols.stop + k - 1
            ]
            windows = around.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            luck = self.luck[:, place.rows.start : place.rows.stop, place.cols.start : place.cols.stop].flatten(1)
            pixel = every[:, place.rows.start : place.rows.stop, place.cols.start : place.cols.stop].flatten(1)
            if some is not None:
                windows, pixel, luck = windows[:, some], pixel[:, some], luck[:, some]
            luck = luck.repeat(1, len(windows))
            windows = windows.flatten(0, 1)  # [B P, C k^2]
            # Products of float64: those of float32 follow torch's switches for TF32.
            axes = self.cells.axes[place.region, :, : self.axes].double()
            q = ((windows - self.cells.centre[place.region]).double() @ axes).float()
            # Queries of absurd size are brought nearer: half floats must hold them, and float32 their logits.
            reach = torch.minimum(
                3e4 / q.abs().amax(1, keepdim=True), 2.0**21 / self.bits / q.abs().sum(1, keepdim=True)
            )
            q = q * reach.clamp(max=1.0)
            made.append((windows, q, self.cells.places[place.region].expand(len(q), -1), pixel.flatten(), luck.T))
            spans.append(Span(number, first, first + len(q)))
            first += len(q)
        joined = {name: torch.cat(list(x)).contiguous() for name, x in zip(names, zip(*made, strict=True), strict=True)}
        joined["luck"] = joined["luck"].T.contiguous()
        return Queries(spans=spans, **joined)

    def _shared(self, queries: Queries, shares: Tensor) -> Queries:
        """The same with `shares` [places, B] of the windows to take; neighbours that are planned alike share a span."""
        spans: list[Span] = []
        for place, first, last, *_ in queries.spans:
            each = (last - first) // self.shape[0]
            for share in shares[place].tolist():
                span = Span(place, first, first + each, share, self._families(self.places[place].region, share))
                if spans and spans[-1]._replace(first=0, last=0) == span._replace(first=0, last=0):
                    span = span._replace(first=spans.pop().first)
                spans.append(span)
                first += each
        return replace(queries, spans=spans)

    def _families(self, region: int, share: float) -> int:
        """Under how many parents a query of a region looks."""
        parents = self.part.regions[region].cells // SIBLINGS
        needed = max(LEAST_FAMILIES, 4 * share, self.engine.reach(self.part, region, self.sigma))
        return min(parents, math.ceil(needed * parents))

    def _budgets(self) -> Tensor:
        """[places, B] the share of pairs to take: as asked for, or what brings pilots' errors down to the tolerance."""
        batch = self.shape[0]
        budget, tolerance = self.engine.budget, self.engine.tolerance
        if budget is not None:
            asked = [min(1.0, budget * (1.0 if place.region == 0 else EDGES)) for place in self.places]
            return torch.tensor(asked)[:, None].expand(-1, batch)
        assert tolerance is not None
        counts = [len(place.rows) * len(place.cols) for place in self.places]
        pixels = [torch.linspace(0, n - 1, min(PILOT_PIXELS, n)).round().long().unique() for n in counts]
        pilots = self._queries(pixels)
        owner = torch.cat([(n * batch + torch.arange(batch)).repeat_interleave(len(p)) for n, p in enumerate(pixels)])
        share = torch.full((len(self.places) * batch,), 0.001)
        short = torch.ones_like(share, dtype=torch.bool)
        while short.any():
            # All pilots again, though some are content: their shares stay, and launches are what costs.
            sums = self._sum(self._shared(pilots, share.unflatten(0, (len(self.places), batch))))
            square = sums.stderr.square().mean(1).cpu()
            error = torch.zeros_like(share, dtype=square.dtype).index_add_(0, owner, square)
            error = (error / torch.bincount(owner, minlength=len(share))).sqrt()
            short = (error > 0.8 * tolerance) & (share < 1)
            # Errors fall a little faster than one over the root of the share; in steps, as on the CPU.
            raised = (1.4 * (error / (0.8 * tolerance)).log2()).clamp(1.0, 3.0).ceil()
            share = torch.where(short, (share * 2**raised).clamp(max=1.0).float(), share)
        return share.unflatten(0, (len(self.places), batch))

    def _expectation(self) -> None:
        """What features and their squares are multiplied by, in bits: of parents, and of the cells by family.

        Weights of parents by E[w]. Of cells E[w], and what shares go by: Neyman's allocation goes by sqrt(E[w^2]),
        which a normal cell's far tail inflates, so the score is its geometric mean with E[w]. Both times how many
        windows a stored one stands for.
        """
        cells, square = self.cells, self.sigma**2
        bits = math.log2(math.e)
        *factors, constant = _gaussian(cells.parent_mean[: self.axes], cells.parent_variance[: self.axes], square)
        self.parent_factors = bits * torch.cat(factors)  # [2 axes, parents]
        self.parent_constant = bits * (constant + self.selection.log_repeats)
        mean, variance = cells.mean[: self.axes], cells.variance[: self.axes]
        once, twice = _gaussian(mean, variance, square), _gaussian(mean, variance, square / 2)
        expected = *once[:2], once[2] + cells.log_repeats
        scored = [
            0.5 * a + 0.25 * b for a, b in zip(expected, (*twice[:2], twice[2] + 2 * cells.log_repeats), strict=True)
        ]
        room = (0, 0, 0, -self.axes % FORESEEN_AXES)

        def by_family(of: Sequence[Tensor]) -> Tensor:
            return torch.cat([functional.pad(x, room) for x in of[:2]]).unflatten(1, (-1, SIBLINGS)).movedim(1, 0)

        self.cell_factors = bits * torch.cat([by_family(expected), by_family(scored)], 2)  # [parents, K, 2 SIBLINGS]
        constants = [of[2].view(-1, SIBLINGS) for of in (expected, scored)]
        self.cell_constants = bits * torch.cat(constants, 1)

    def _foresee(self, queries: Queries) -> Foreseen:
        """The families that queries look under, and what is to be expected of their cells."""
        chosen, skipped, tops, windows, owners = [], [], [], [], []
        for span in queries.spans:
            region = self.part.regions[self.places[span.place].region]
            here = slice(region.first_cell // SIBLINGS, (region.first_cell + region.cells) // SIBLINGS)
            q, n = queries.q[span.first : span.last], self.selection.windows[here]
            weight = torch.addmm(
                self.parent_constant[here].double(),
                torch.cat([q, q.square()], 1).double(),
                self.parent_factors[:, here].double(),
            ).float()
            weight += n.log2()  # of all its windows; -inf where none compete
            top = weight.amax(1).clamp(min=float(kernels().LEAST.value))
            if span.families < weight.shape[1]:
                families = weight.topk(span.families, sorted=False).indices.sort().values
                weight = (weight - top[:, None]).exp2_().scatter_(1, families, 0.0)
                skipped.append(weight @ self.selection.moments[here])
            else:
                families = torch.arange(span.families, device=self.device).expand(len(q), -1)
                skipped.append(weight.new_zeros(len(q), 1 + self.channels))
            chosen.append((families + here.start).flatten().to(torch.int32))
            tops.append(top)
            windows.append(n.sum().expand(len(q)))
            owner = torch.arange(span.first, span.last, dtype=torch.int32, device=self.device)
            owners.append(owner.repeat_interleave(span.families, output_size=len(q) * span.families))
        n_slots = torch.cat(
            [
                torch.full_like(top, span.families, dtype=torch.int32)
                for top, span in zip(tops, queries.spans, strict=True)
            ]
        )
        family, query = torch.cat(chosen), torch.cat(owners)
        ordered, slot = torch.sort(family, stable=True)
        parents, columns = len(self.cell_factors), self.cell_factors.shape[1]
        size = 16 if self.device.type == "cpu" else PLANNED
        first = torch.searchsorted(ordered, torch.arange(parents + 1, dtype=torch.int32, device=self.device))
        blocks = _blocks(first, len(family), size)
        q = functional.pad(queries.q, (0, columns // 2 - self.axes))
        foreseen = torch.empty(len(family), 2 * SIBLINGS, device=self.device)
        started(
            kernels().foresee_kernel, (len(blocks[0]),), torch.cat([q, q.square()], 1), self.cell_factors,
            self.cell_constants, *blocks, slot, query, foreseen, parents, K=columns, BK=FORESEEN_AXES, BQ=size,
        )  # fmt: skip
        first_slot = n_slots.long().cumsum(0) - n_slots
        return Foreseen(foreseen, family, first_slot, n_slots, torch.cat(windows), torch.cat(skipped), torch.cat(tops))

    # The sums.

    def _sum(self, queries: Queries) -> PosteriorSum:
        """Sums [Q, 1 or C]; in halves where the memory does not hold all of it."""
        most = max(span.families for span in queries.spans)
        planned = 12 * len(self.cell_factors) + SLOT_BYTES * most
        per_query = planned + (PICK_BYTES + 8 * self.channels) * self.picks + 8192
        step = max(1, self.memory_limit // 2 // per_query)
        parts = []
        start = 0
        while start < len(queries):
            step = min(step, len(queries) - start)
            try:
                part = self._part(queries[start : start + step], self.memory_limit if step > 1 else None)
            except torch.OutOfMemoryError:
                if step == 1:
                    raise
                cache.clear(self.device)
                torch.cuda.empty_cache()
                part = None
            if part is None:
                step = (step + 1) // 2
                continue
            parts.append(part)
            start += step
        every = [sums for sums, _ in parts]
        pairs = sum(sums.pairs or 0 for sums in every)
        names = _tensors(every[0])
        joined = PosteriorSum(**{name: torch.cat([getattr(x, name) for x in every]) for name in names}, pairs=pairs)
        sample = Sample._make(map(torch.cat, zip(*(sample for _, sample in parts), strict=True)))
        return self.recheck.correct(*self.recheck.propose(queries, joined, sample))

    def _part(self, queries: Queries, memory_limit: int | None) -> tuple[PosteriorSum, Sample] | None:
        """Sums of the scan, and a sample, in one go; or None where the list is too long for half of the limit."""
        items = self._items(queries, memory_limit)
        if items is None:
            return None
        if len(items) == 0:
            n, c = len(queries), self.channels
            nothing = torch.zeros(n, 1 + 3 * c, dtype=torch.float64, device=self.device)
            s, v, vv, vs = nothing.split([1] + [c] * 3, 1)
            none = s.expand(n, self.picks)
            single, threshold = none.float(), torch.full_like(s, torch.inf)
            values = single[..., None].expand(-1, -1, c)
            sample = Sample(none.long(), single, single, none, none, none, values, threshold)
            return PosteriorSum(torch.full_like(s, -torch.inf), s, v, s, vv=vv, vs=vs, ss=s, pairs=0), sample
        q = functional.pad(queries.q.half(), (0, BIAS_COLUMNS), value=1.0)
        q = functional.pad(q, (0, columns_for(self.part) - q.shape[1]))
        # The most promising cell of every query first: tiles far below what it holds need no exponentials.
        least = torch.full((len(queries),), float(kernels().LEAST.value), device=self.device)
        found = self._scan(q, items, self._pilot(q, items, least))
        return self._finish(queries, q, items, found)

    def _items(self, queries: Queries, memory_limit: int | None) -> Items | None:
        """Which cells every query takes, and how much of them."""
        n_queries = len(queries)
        of = self._foresee(queries)
        integers: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        counts, level = torch.empty(3, n_queries, **integers), torch.empty(3, n_queries, **numbers)
        budget = torch.cat([torch.full((span.last - span.first,), span.share, **numbers) for span in queries.spans])
        floor = torch.where(budget < 1, FLOOR * budget, 1.0)
        n = self.selection.counts.float()
        constants = {"QUANTUM": QUANTUM, "BC": 512 if self.device.type == "cpu" else 256}
        cells = of.foreseen, of.family, n, of.first_slot, of.n_slots
        lists = kernels()
        started(
            lists.allocate_kernel, (n_queries,), *cells, budget * of.windows, floor, queries.luck[0], level, counts,
            n_queries, BP=TILE, **constants,
        )  # fmt: skip
        first_item = functional.pad(counts[0].long().cumsum(0), (1, 0))
        # All that the host waits for.
        total, tiles, pairs = counts.sum(1).tolist()
        if memory_limit is not None and 2 * (total * ITEM_BYTES + 4 * tiles) > memory_limit:
            return None
        cell, take = torch.empty(total, **integers), torch.empty(total, **integers)
        factor, chance, share = (torch.empty(total, **numbers) for _ in range(3))
        promising = torch.empty(n_queries, dtype=torch.int64, device=self.device)
        columns, c = self.cells.moments.shape[1], self.channels
        sure, far, unseen = (torch.empty(n_queries, *size, **numbers) for size in ((), (columns,), (columns,)))
        found = cell, take, factor, chance
        started(
            lists.list_kernel, (n_queries,), *cells, floor, queries.luck[0], level, self.cells.moments, first_item,
            *found, share, promising, sure, far, unseen, n_queries, NM=columns, **constants,
        )  # fmt: skip
        # What lies under other parents is not looked into at all: foreseen, and in doubt by a third of it.
        others = of.skipped * torch.exp2((of.parent_top - level[0]).clamp(max=115))[:, None]
        far[:, : 1 + c] += others
        unseen[:, : 1 + c] += DOUBT * others[:, :1] * others
        unseen[:, 1 + c : 1 + 2 * c] += DOUBT * others[:, 1:].square()
        query = torch.arange(n_queries, **integers).repeat_interleave(counts[0], output_size=total)
        per_item = (take.long() + TILE - 1) // TILE
        first_tile = per_item.cumsum(0) - per_item
        return Items(first_item, query, *found, first_tile, tiles, pairs, share, promising, sure, far, unseen)

    def _pilot(self, q: Tensor, items: Items, least: Tensor) -> Tensor:
        """[Q] a log-weight known to be there, of the cell of which most is expected."""
        some = items.promising.clamp(max=len(items) - 1)
        out = Sums(least, least, torch.empty(len(items), device=self.device), least)
        self._launch(q, items, some, least, out, pilot=True)
        return torch.where(items.first_item.diff() > 0, out.top[some], least)

    def _scan(self, q: Tensor, items: Items, reference: Tensor) -> Sums:
        """Sums of all items; `reference` [Q] holds log-weights that are known to be there."""
        columns = value_columns(self.channels)
        sizes = (len(items), columns), (len(items), columns), (len(items),), (items.tiles,)
        out = Sums(*(torch.empty(size, device=self.device) for size in sizes))
        self._launch(q, items, torch.arange(len(items), device=self.device), reference, out, pilot=False)
        return out

    def _launch(self, q: Tensor, items: Items, some: Tensor, reference: Tensor, out: Sums, pilot: bool) -> None:
        # By cell, and inside by falling take, so that the queries of a block go about as far.
        by_cell, order = torch.sort((items.cell[some].long() << 32) - items.take[some], stable=True)
        item, cell = some[order], (by_cell + (1 << 31)) >> 32
        first = torch.searchsorted(cell, torch.arange(len(self.turn) + 1, device=self.device))

        def run(configuration: Configuration) -> None:
            size = configuration.queries
            blocks = _blocks(first, len(item), size)
            for rows in pieces(self.part, self.device):
                kernels().scan_kernel[len(blocks[0]),](
                    q, *self._windows(rows), *blocks, item, items.query, items.take, items.first_tile, reference,
                    out.sums, out.squares, out.top, out.tile_sums, rows.cells.start, rows.cells.stop, self.bits,
                    float(kernels().HEADROOM.value) - NEGLIGIBLE_BITS, **self._constants(rows),
                    NV=value_columns(self.channels), BQ=size, PILOT=pilot, num_warps=configuration.warps,
                    num_stages=configuration.stages,
                )  # fmt: skip

        cuda = self.device.type == "cuda"
        resident = cache.has(self.part, self.device, ())
        pairs = items.tiles * TILE
        tune = cuda and resident and not pilot and wanted() and pairs >= SMALLEST_TUNED
        capability = torch.cuda.get_device_capability(self.device) if cuda else (9, 0)
        name = torch.cuda.get_device_name(self.device) if cuda else "interpreter"
        candidates = configurations(q.shape[1], capability) if cuda else [Configuration(16, TILE, 4, 1)]
        flags = self.part.counts is not None, self.selection.images is not None
        key = (name, "lists", q.shape[1], self.channels, pilot, *flags)
        first_that_serves(key, candidates, run, tune)

    def _windows(self, rows: Rows) -> tuple[Tensor, ...]:
        """The arguments of kernels that say where a piece's windows are."""
        counts = self.selection.counts
        order = rows.ids  # never read
        first = self.cells.first - self.cells.first[rows.cells.start]
        if self.selection.images is not None:
            order, _ = rows.ordered(self.selection.images, self.part)
            first = counts.long().cumsum(0) - counts
            first = first - first[rows.cells.start]
        counted = self.parent_constant if rows.log_counts is None else rows.log_counts  # else never read
        return rows.rows, counted, rows.values, order, first, counts, self.turn

    def _constants(self, rows: Rows) -> dict[str, Any]:
        columns = rows.rows.shape[1]
        larger = 1 << (columns.bit_length() - 1)
        return {
            "KA": larger,
            "KB": columns - larger,
            "BP": TILE,
            "COUNTED": rows.log_counts is not None,
            "ORDERED": self.selection.images is not None,
        }

    # The result.

    def _finish(self, queries: Queries, q: Tensor, items: Items, found: Sums) -> tuple[PosteriorSum, Sample]:
        """Adds up items and what cells lead to expect of windows not taken; sums are relative to 2^m, m in bits."""
        n, c = len(queries), self.channels
        reference = torch.empty(3, n, device=self.device)
        total = torch.empty(n, 1 + c, 3, dtype=torch.float64, device=self.device)
        moments = self.cells.moments
        started(
            kernels().sum_kernel, (n, 1 + c), found.sums, found.squares, found.top, items.cell, items.take,
            items.factor, items.chance, items.share, moments, items.sure, items.far, items.first_item, reference, total,
            n, self.unit, C=c, NV=value_columns(c), NM=moments.shape[1],
            BI=512 if self.device.type == "cpu" else 128, num_warps=1,
        )  # fmt: skip
        m, unit, raw = (x[:, None] for x in reference.double().unbind(0))
        s, s2, ss = (x[:, None] for x in total[:, 0].unbind(1))
        v, vs, vv = total[:, 1:].unbind(2)
        v, vs, vv = v / self.unit, vs / self.unit, vv / self.unit**2
        # A part of the variance that the cells' moments let expect, since where nothing was seen scatter says nothing;
        # values' range is 2.
        unseen = items.unseen[:, : 1 + 2 * c].double()
        guard = torch.minimum(EXPECTED_SHARE * unit.square(), 4 * s.square() / unseen[:, :1].clamp(min=1e-300))
        unseen = unseen * guard
        ss, vs, vv = ss + unseen[:, :1], vs + unseen[:, 1 : 1 + c], vv + unseen[:, 1 + c :]
        sums = PosteriorSum(m, s, v, s2, vv=vv, vs=vs, ss=ss, pairs=items.pairs)
        return sums, self._draw(queries, sums, raw, q, items, found)

    def _draw(self, queries: Queries, sums: PosteriorSum, raw: Tensor, q: Tensor, items: Items, found: Sums) -> Sample:
        """Windows drawn by their weights, and compared pixel by pixel.

        Systematic sampling: `picks` marks evenly along a query's running sum, which comes to `raw`; a window of weight
        w is met with the chance min(1, w picks / raw), once or more.
        """
        n, picks = len(queries), self.picks
        # Running sums in whole numbers, whose order of addition does not matter: a mark is 2^32.
        share = found.sums[:, 0].double() * torch.exp2(found.top.double() - sums.m[items.query, 0]) * items.factor
        mark = (share / raw[items.query, 0] * picks * 2.0**32).nan_to_num(0.0).round().long()
        running = mark.cumsum(0)
        before = running - mark
        first, last = items.first_item[:-1], (items.first_item[1:] - 1).clamp(min=0)
        base = before[first.clamp(max=len(items) - 1)]
        steps = torch.arange(picks, device=self.device) + queries.luck[1].double()[:, None]
        point = base[:, None] + (steps * 2.0**32).long()  # [Q, R]
        picked = torch.searchsorted(running, point.flatten(), right=True).view_as(point)
        picked = torch.minimum(torch.maximum(picked, first[:, None]), last[:, None]).clamp(max=len(items) - 1)
        inside = ((point - before[picked]).double() / mark[picked].clamp(min=1)).clamp(0, 1 - 1e-7).float()

        window = torch.zeros(n, picks, dtype=torch.int64, device=self.device)
        weight = torch.zeros(n, picks, device=self.device)
        repeats = torch.zeros(n, picks, device=self.device)
        for rows in pieces(self.part, self.device):
            windows, counted, _, order, *cells = self._windows(rows)
            started(
                kernels().pick_kernel, (n * picks,), q, windows, counted, order, *cells, picked, inside, items.query,
                items.cell, items.take, items.first_tile, found.tile_sums, rows.ids, window, weight, repeats,
                rows.cells.start, rows.cells.stop, self.bits, BT=32, num_warps=1, **self._constants(rows),
            )  # fmt: skip
        place, distance, values = self.recheck.look(queries, window)
        stands_for = items.factor[picked].double().log2()
        lightest = sums.m + (raw / picks).log2()
        chance = torch.exp2((weight.double() + stands_for - lightest).clamp(max=0.0))
        again = functional.pad(window[:, 1:] == window[:, :-1], (1, 0))
        met = (1 / chance).masked_fill(again | ~(raw > 0), 0.0)
        threshold = lightest.masked_fill(~(raw > 0), torch.inf)
        return Sample(place, weight, repeats, stands_for, met, distance, values, threshold)
