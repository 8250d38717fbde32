"""Engine `pruned`: posterior sums from a chosen share of the windows, with the error that leaves.

Stratified sampling over the cells of a PatchIndex. A cell's moments say, in closed form, what weight to expect of its
windows at a query; the budget is spent in proportion, so near cells are summed whole and far ones by a few windows that
stand for all (Horvitz & Thompson 1952). The plan and the scan are in C++ (csrc/pruned/); this file says which cells
compete at which pixels, and with how many axes and second looks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...bank import PatchBank
from ...index import IndexedSize, PatchIndex, Region
from ...posterior import PosteriorSum
from ...windows import Competition, Group
from ..base import Engine
from ..native import missing, native

DROPPED = 0.02
"""Variance of the axes left out, in units of sigma^2; a log-weight moves by about its root, before the recheck."""

EXPECTED_DROPPED = 0.5
"""The same where only the weight of whole cells is foreseen."""

LEAST_AXES = 28
"""Axes compared in any case: those of 3 x 3 in colour. What little they hold beside the noise still moves the mean."""

RECHECK = 64
"""Windows of a query that are compared again pixel by pixel, chosen by their weights."""

SHARPEST = 0.02
"""Times the root of a window's values, 0.1 at most: noise below which the scan weighs as if it were this much, for half
floats rank no finer. The recheck weighs exactly, and takes four times as many windows there."""

FLOOR = 0.02
"""Share of the budget that is spread over all cells alike, whatever their moments say."""

EDGES = 6.0
"""The budget along edges, where a pixel competes with few windows, in units of the interior's."""

LEAST_RECHECKED, MOST_RECHECKED = 0.5, 8
"""The recheck's windows at least and at most, in units of RECHECK; by the variance that is left out."""

SUMS = ("m", "s", "v", "s2", "vv", "vs", "ss")

MOST_CHANNELS = 4
QUERY_BYTES = 100_000  # of plan, sums and sample, generously
PILOT_PIXELS = 96


class Request(NamedTuple):
    """Pixels of one region at one noise level, and the share of their pairs to spend on them.

    items:   [Q] images of z
    numbers: [Q] pixels, counted along the rows of rows x cols; random draws follow them
    """

    items: Tensor
    numbers: Tensor
    rows: range
    cols: range
    sigma: float
    part: IndexedSize
    region: int
    share: float


class Pruned(Engine):
    """The engine bound to an index and to what it may spend.

    Args:
        index: the cells.
        budget: share of the pairs to evaluate, in (0, 1], EDGES times as much along edges; or
        tolerance: rms standard error that the denoised pixels may have; a few pixels tell the budget for it.
        seed: of the sample. The same seed gives the same numbers.
    """

    def __init__(self, index: PatchIndex, budget: float | None, tolerance: float | None, seed: int):
        self.index = index
        self.budget = budget
        self.tolerance = tolerance
        self.seed = seed
        self._allowed: dict[int, tuple[PatchBank, Tensor, dict[int, Tensor]]] = {}

    name = "pruned"
    exact = False

    def runs_on(self, device: torch.device) -> bool:
        return True

    def unavailable(self, device: torch.device) -> str | None:
        """Why this engine cannot serve on `device`, or None."""
        if self.index.bank.shape[0] > MOST_CHANNELS:
            return f"it takes up to {MOST_CHANNELS} channels, not {self.index.bank.shape[0]}"
        return missing

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        """Whole images, corners, sizes that the index lacks, and edges where it has none, are summed exactly."""
        if competition.patch_size is None:
            return "whole images are not in an index"
        if competition.patch_size not in self.index.patch_sizes:
            return f"the index has patch sizes {self.index.patch_sizes}, not {competition.patch_size}"
        part = self.index.at(competition.patch_size)
        if any(not list(_regions(part, group)) for group in competition.groups):
            return "windows that are tied to their place are not in an index"
        return None

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
    ) -> PosteriorSum:
        """Estimated sums over the competing windows, with their sampling covariance."""
        assert competition.patch_size is not None
        part = self.index.at(competition.patch_size)
        z32 = z.detach().to("cpu", torch.float32)
        margins = (part.k // 2,) * 4
        around = "circular" if competition.padding_mode == "circular" else "constant"
        padded = functional.pad(z32, margins, mode=around).contiguous()
        total = PosteriorSum.empty(z.shape, "cpu", sampled=True)
        estimated = [place for group in competition.groups for place in _regions(part, group)]
        pairs = 0
        # Whole images at a time, for their pixels learn from each other.
        step = max(1, memory_limit // (z.shape[2] * z.shape[3] * QUERY_BYTES))
        for start in range(0, len(z), step):
            requests: list[Request] = []
            for region, rows, cols in estimated:
                requests += self._requests(
                    range(start, min(start + step, len(z))), sigma, part, region, rows, cols, padded, bank
                )
            for request, sums in zip(requests, self._scan(requests, padded, bank), strict=True):
                items = request.items.unique()
                shape = (len(items), len(request.rows), len(request.cols))
                block = {name: x.unflatten(0, shape).permute(0, 3, 1, 2) for name, x in _tensors(sums).items()}
                pairs += sums.pairs or 0
                _put(total, items, request.rows, request.cols, _of(block))
        return total.with_pairs(pairs)

    def _requests(
        self,
        items: range,
        sigma: Tensor,
        part: IndexedSize,
        region: int,
        rows: range,
        cols: range,
        padded: Tensor,
        bank: PatchBank,
    ) -> list[Request]:
        """The pixels of some items in one region. An item's budget is its own, whatever else is in the batch; items of
        one noise level and budget are scanned together."""
        numbers = torch.arange(len(rows) * len(cols))
        alike: dict[tuple[float, float], list[int]] = {}
        for item in items:
            level = float(sigma[item])
            request = Request(torch.full_like(numbers, item), numbers, rows, cols, level, part, region, 0.0)
            alike.setdefault((level, self._budget(request, padded, bank)), []).append(item)
        return [
            Request(
                torch.tensor(members).repeat_interleave(len(numbers)),
                numbers.repeat(len(members)),
                rows,
                cols,
                level,
                part,
                region,
                share,
            )
            for (level, share), members in alike.items()
        ]

    def _budget(self, item: Request, padded: Tensor, bank: PatchBank) -> float:
        """The share of pairs to evaluate: as asked for, or what brings a pilot's error down to the tolerance."""
        if self.budget is not None:
            return min(1.0, (1.0 if item.region == 0 else EDGES) * self.budget)
        assert self.tolerance is not None
        count = len(item.numbers)
        pixels = torch.linspace(0, count - 1, min(PILOT_PIXELS, count)).round().long().unique()
        pilot = item._replace(items=item.items[pixels], numbers=item.numbers[pixels])
        share = 0.001
        while share < 1:
            (sums,) = self._scan([pilot._replace(share=share)], padded, bank)
            error = sums.stderr.square().mean().sqrt().item()
            if error <= 0.8 * self.tolerance:
                break
            # Errors fall a little faster than one over the root of the share; in steps, so that items share budgets.
            raised = max(1.0, math.log2((error / (0.8 * self.tolerance)) ** 1.4))
            share = min(1.0, share * 2 ** math.ceil(min(raised, 3.0)))
        return share

    def _scan(self, requests: Sequence[Request], padded: Tensor, bank: PatchBank) -> list[PosteriorSum]:
        """Sums [queries, 1 or C] of every request."""
        scans = [self._prepare(request, padded, bank) for request in requests]
        assert native is not None
        native.scan_lists(scans, torch.get_num_threads(), os.environ.get("PATCHSCORE_SIMD", ""))
        return [_of({name: _column(scan[name]) for name in SUMS}).with_pairs(int(scan["pairs"][0])) for scan in scans]

    def _prepare(self, request: Request, padded: Tensor, bank: PatchBank) -> dict[str, Any]:
        """What the native scan reads of a request and its region, and room for what it finds."""
        items, numbers, rows, cols, sharp, part, region, share = request
        place = part.regions[region]
        cells = slice(place.first_cell, place.first_cell + place.cells)
        allowed, competing = self._competing(bank, part, region)
        sigma = max(sharp, min(0.1, SHARPEST * math.sqrt(len(part.centre[region]))))
        used = max(part.rank_at(region, sigma, DROPPED), min(part.rank, LEAST_AXES))
        # The more variance is left out, in units of sigma^2, the more windows are compared again.
        left = float(part.tail[region][used]) / sigma**2
        recheck = round(RECHECK * min(MOST_RECHECKED, max(4.0 if sharp < sigma else LEAST_RECHECKED, left / 0.05)))
        first, final = int(part.starts[cells.start]), cells.stop - 1
        last = int(part.starts[final] + part.sizes[final])
        counts = part.counts
        out = {name: torch.empty(len(items), dtype=torch.float64).numpy() for name in ("m", "s", "s2", "ss")}
        out |= {
            name: torch.empty(len(items), padded.shape[1], dtype=torch.float64).numpy() for name in ("v", "vv", "vs")
        }
        return {
            "data": part.data,
            "offsets": part.offsets[cells].numpy(),
            "sizes": part.sizes[cells].numpy(),
            "starts": part.starts[cells].numpy() - first,
            "values": part.values[first:last],
            "counts": None if counts is None else counts[first:last],
            "allowed": None if allowed is None else allowed.numpy(),
            "competing": competing.numpy(),
            "repeats": None if part.repeats is None else part.repeats.numpy(),
            "first_cell": place.first_cell,
            "mean": part.mean.numpy(),
            "variance": part.variance.numpy(),
            "parent_mean": part.parent_mean.numpy(),
            "parent_variance": part.parent_variance.numpy(),
            "log_repeats": part.log_repeats[cells].numpy(),
            "moments": part.moments[cells].numpy(),
            "rank": part.rank,
            "place": (place.rows.start, place.cols.start, len(place.rows), len(place.cols)),
            "images": self.index.images.numpy(),
            "patch_size": part.k,
            "axes": part.axes[region].numpy(),
            "centre": part.centre[region].numpy(),
            "z": padded.numpy(),
            "items": items.numpy(),
            "numbers": numbers.numpy(),
            "pixels": (rows.start, cols.start, len(rows), len(cols)),
            "used_rank": used,
            "foreseen_rank": min(used, part.rank_at(region, sigma, EXPECTED_DROPPED)),
            "sigma": sigma,
            "exact_sigma": sharp,
            "budget": share,
            "floor": FLOOR * share,
            "recheck": recheck,
            "seed": hash((self.seed, part.k, region, sharp)) & 0x7FFFFFFFFFFFFFFF,
            **out,
            "pairs": torch.zeros(1, dtype=torch.int64).numpy(),
        }

    def _competing(self, bank: PatchBank, part: IndexedSize, region: int) -> tuple[Tensor | None, Tensor]:
        """Which images of the index compete, and how many windows of each cell: all, or those of a selection."""
        place = part.regions[region]
        cells = range(place.first_cell, place.first_cell + place.cells)
        whole = self.index.bank
        if len(bank) == len(whole):
            return None, part.competing[cells.start : cells.stop]
        if id(bank) not in self._allowed:
            numbers = torch.full((len(whole.images),), -1)
            numbers[torch.arange(len(whole)) if whole.indices is None else whole.indices] = torch.arange(len(whole))
            assert bank.indices is not None
            allowed = torch.zeros(len(whole), dtype=torch.uint8)
            allowed[numbers[bank.indices]] = 1
            self._allowed[id(bank)] = (bank, allowed, {})
        _, allowed, counted = self._allowed[id(bank)]
        key = part.k * 1000 + region
        if key not in counted:
            per_image = len(place.rows) * len(place.cols)
            inside = allowed.numpy()
            counted[key] = torch.tensor([float(inside[part.ids(c) // per_image].sum()) for c in cells])
        return allowed, counted[key]


def _column(x: Any) -> Tensor:
    found = torch.from_numpy(x)
    return found if found.ndim == 2 else found[:, None]


def _regions(part: IndexedSize, group: Group) -> Iterator[tuple[int, range, range]]:
    """The index's regions that serve a group, with the query rows and columns of each; none where it is exact."""
    rows, cols = group.rows, group.cols
    if rows.windows is not None and cols.windows is not None:
        yield part.region_at[_key(rows.windows, cols.windows)], rows.queries, cols.queries
    elif cols.windows is not None and _key(range(rows.queries[0], rows.queries[0] + 1), cols.windows) in part.region_at:
        for i in rows.queries:
            yield part.region_at[_key(range(i, i + 1), cols.windows)], range(i, i + 1), cols.queries
    elif rows.windows is not None and _key(rows.windows, range(cols.queries[0], cols.queries[0] + 1)) in part.region_at:
        for j in cols.queries:
            yield part.region_at[_key(rows.windows, range(j, j + 1))], rows.queries, range(j, j + 1)


def _key(rows: range, cols: range) -> tuple[int, int, int, int]:
    return Region(rows, cols, 0, 0).key()


def _tensors(sums: PosteriorSum) -> dict[str, Tensor]:
    every = {name: getattr(sums, name) for name in SUMS}
    return {name: x for name, x in every.items() if x is not None}


def _of(parts: dict[str, Tensor]) -> PosteriorSum:
    m, s, v, s2, vv, vs, ss = (parts.get(name) for name in SUMS)
    assert m is not None
    assert s is not None
    assert v is not None
    assert s2 is not None
    return PosteriorSum(m, s, v, s2, vv, vs, ss)


def _pixels(sums: PosteriorSum, rows: range, cols: range) -> PosteriorSum:
    block = {name: x[:, :, rows.start : rows.stop, cols.start : cols.stop] for name, x in _tensors(sums).items()}
    return _of(block)


def _put(total: PosteriorSum, items: Tensor, rows: range, cols: range, sums: PosteriorSum) -> None:
    """Enters the sums of some pixels, each of which has one region only."""
    first, last = int(items[0]), int(items[-1])
    at = slice(first, last + 1) if last - first + 1 == len(items) else items
    for name, x in _tensors(sums).items():
        getattr(total, name)[at, :, rows.start : rows.stop, cols.start : cols.stop] = x
