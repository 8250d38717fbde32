"""Engine `pruned`: posterior sums from a chosen share of the windows, with the error that leaves.

Stratified sampling over the cells of a PatchIndex. A cell's moments say, in closed form, what weight to expect of its
windows at a query; the budget is spent in proportion, so near cells are summed whole and far ones by a few windows that
stand for all (Horvitz & Thompson 1952). The scan is in C++ (csrc/lists_*); this file says what to expect and asks.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..bank import PatchBank
from ..index import IndexedSize, PatchIndex, Region
from ..posterior import PosteriorSum
from ..windows import Competition, Group
from . import reference, sliding
from .sliding import _native

DROPPED = 0.02
"""Variance of the axes left out, in units of sigma^2; a log-weight moves by about its root, before the recheck."""

EXPECTED_DROPPED = 0.1
"""The same where only the weight of whole cells is foreseen."""

RECHECK = 64
"""Windows of a query that are compared again pixel by pixel, chosen by their weights."""

SHARPEST = 0.02
"""Times the root of a window's values, 0.1 at most: noise below which the scan weighs as if it were this much, for half
floats rank no finer. The recheck weighs exactly, and takes four times as many windows there."""

FLOOR = 0.02
"""Share of the budget that is spread over all cells alike, whatever their moments say."""

EDGES = 3.0
"""The budget of an edge's few windows, in units of the interior's."""

TIED = "windows tied to their place are not in an index"

MOST_CHANNELS = 4
QUERIES_A_SCAN = 16384
PLAN_BYTES = 160_000  # of a query's plan and sums, generously
PILOT_PIXELS = 96


class Pruned:
    """The engine bound to an index and to what it may spend.

    Args:
        index: the cells.
        budget: share of the pairs to evaluate, in (0, 1]; or
        tolerance: rms standard error that the denoised pixels may have; a few pixels tell the budget for it.
        seed: of the sample. The same seed gives the same numbers.
    """

    def __init__(self, index: PatchIndex, budget: float | None, tolerance: float | None, seed: int):
        self.index = index
        self.budget = budget
        self.tolerance = tolerance
        self.seed = seed
        self._allowed: dict[int, tuple[PatchBank, Tensor, dict[int, Tensor]]] = {}

    def unavailable(self, device: torch.device) -> str | None:
        """Why this engine cannot serve on `device`, or None."""
        if self.index.bank.shape[0] > MOST_CHANNELS:
            return f"it takes up to {MOST_CHANNELS} channels, not {self.index.bank.shape[0]}"
        return sliding.unavailable(device)

    def lacks(self, competition: Competition) -> str | None:
        """Why it cannot serve this competition, or None."""
        if competition.patch_size is None:
            return "whole images are not in an index"
        if all(group.rows.locked and group.cols.locked for group in competition.groups):
            return TIED
        if competition.patch_size not in self.index.patch_sizes:
            return f"the index has patch sizes {self.index.patch_sizes}, not {competition.patch_size}"
        return None

    def posterior_sum(
        self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition, memory_limit: int
    ) -> PosteriorSum:
        """Estimated sums over the competing windows, with their sampling covariance; the rest as other engines.

        Corners, and edges where the index has none, are summed exactly.
        """
        assert competition.patch_size is not None
        part = self.index.at(competition.patch_size)
        z32 = z.detach().to("cpu", torch.float32)
        total = PosteriorSum.empty(z.shape, "cpu", sampled=True)
        pairs = 0
        exact: list[Group] = []
        for group in competition.groups:
            regions = list(_regions(part, group))
            if not regions:
                exact.append(group)
                continue
            for region, rows, cols in regions:
                for level in sigma.unique().tolist():
                    items = (sigma == level).nonzero().flatten()
                    sums = self._region_sum(
                        z32[items], level, bank, part, region, competition.padding_mode, rows, cols, memory_limit
                    )
                    pairs += sums.pairs or 0
                    _put(total, items, rows, cols, sums)
        if exact:
            engine = reference if sliding.unavailable(torch.device("cpu")) else sliding
            rest = Competition(competition.patch_size, competition.padding_mode, tuple(exact))
            for group in exact:
                pairs += len(z) * len(bank) * group.pixels * group.windows_per_image
            sums = engine.posterior_sum(z32, sigma, bank, rest, memory_limit)
            for group in exact:
                rows, cols = group.rows.queries, group.cols.queries
                _put(total, torch.arange(len(z)), rows, cols, _pixels(sums, rows, cols))
        return dataclasses.replace(total, pairs=pairs)

    def _region_sum(
        self,
        z: Tensor,
        sigma: float,
        bank: PatchBank,
        part: IndexedSize,
        region: int,
        padding_mode: str,
        rows: range,
        cols: range,
        memory_limit: int,
    ) -> PosteriorSum:
        r, k = part.k // 2, part.k
        padded = functional.pad(z, (r, r, r, r), mode="circular" if padding_mode == "circular" else "constant")
        around = padded[:, :, rows.start : rows.stop + 2 * r, cols.start : cols.stop + 2 * r]
        windows = around.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()
        pixels = len(rows) * len(cols)
        numbers = torch.arange(pixels)
        # An item's budget is its own, whatever else is in the batch; items of one budget are scanned together.
        shares = torch.tensor(
            [self._budget(item, numbers, sigma, bank, part, region, memory_limit) for item in windows.split(pixels)]
        )
        whole: dict[str, Tensor] = {}
        pairs = 0
        for share in shares.unique().tolist():
            members = (shares == share).repeat_interleave(pixels)
            chosen = windows if bool(members.all()) else windows[members]
            every = numbers.repeat(len(chosen) // pixels)
            sums = self._scan(chosen, every, sigma, bank, part, region, share, memory_limit)
            for name, x in _tensors(sums).items():
                whole.setdefault(name, x.new_empty(len(windows), x.shape[1]))[members] = x
            pairs += sums.pairs or 0
        shape = (len(z), len(rows), len(cols))
        return PosteriorSum(
            **{name: x.unflatten(0, shape).permute(0, 3, 1, 2) for name, x in whole.items()}, pairs=pairs
        )

    def _budget(
        self,
        windows: Tensor,
        numbers: Tensor,
        sigma: float,
        bank: PatchBank,
        part: IndexedSize,
        region: int,
        memory_limit: int,
    ) -> float:
        """The share of pairs to evaluate: as asked for, or what brings a pilot's error down to the tolerance."""
        scale = 1.0 if region == 0 else EDGES
        if self.budget is not None:
            return min(1.0, scale * self.budget)
        assert self.tolerance is not None
        pixels = torch.linspace(0, len(windows) - 1, min(PILOT_PIXELS, len(windows))).round().long().unique()
        share = 0.001
        while share < 1:
            sums = self._scan(windows[pixels], numbers[pixels], sigma, bank, part, region, share, memory_limit)
            error = sums.stderr.square().mean().sqrt().item()
            if error <= 0.8 * self.tolerance:
                break
            # Errors fall a little faster than one over the root of the share; in steps, so that items share budgets.
            raised = max(1.0, math.log2((error / (0.8 * self.tolerance)) ** 1.4))
            share = min(1.0, share * 2 ** math.ceil(min(raised, 3.0)))
        return share

    def _scan(
        self,
        windows: Tensor,
        numbers: Tensor,
        sigma: float,
        bank: PatchBank,
        part: IndexedSize,
        region: int,
        share: float,
        memory_limit: int,
    ) -> PosteriorSum:
        """Sums [queries, 1 or C] for `windows` [queries, C, k, k] over the cells of a region."""
        place = part.regions[region]
        cells = slice(place.first_cell, place.first_cell + place.cells)
        allowed, competing = self._competing(bank, part, region)
        sharp, sigma = sigma, max(sigma, min(0.1, SHARPEST * math.sqrt(windows[0].numel())))
        used = part.rank_at(region, sigma, DROPPED)
        # The more variance is left out, in units of sigma^2, the more windows are compared again.
        left = float(part.tail[region][used]) / sigma**2
        recheck = RECHECK * round(min(8.0, max(4.0 if sharp < sigma else 1.0, left / 0.05)))
        q = part.project(windows, region).contiguous()
        few = part.rank_at(region, sigma, EXPECTED_DROPPED)
        mean, variance = part.mean[cells, :few], part.variance[cells, :few]
        repeats = part.stand_for[cells].log()
        out = {name: torch.empty(len(q), dtype=torch.float64) for name in ("m", "s", "s2", "ss")}
        out |= {name: torch.empty(len(q), windows.shape[1], dtype=torch.float64) for name in ("v", "vv", "vs")}
        step = max(1, min(QUERIES_A_SCAN, memory_limit // (4 * place.cells + PLAN_BYTES)))
        values, counts = part.values, part.counts
        first = int(part.starts[place.first_cell])
        last = first + int(part.sizes[cells].sum())
        evaluated = 0
        for start in range(0, len(q), step):
            block = slice(start, start + step)
            expected = _log_expected(q[block, :few], mean, variance, repeats, sigma**2)
            pairs = torch.zeros(1, dtype=torch.int64)
            _native.scan_lists(
                data=part.data,
                offsets=part.offsets[cells].numpy(),
                sizes=part.sizes[cells].numpy(),
                starts=(part.starts[cells] - first).numpy(),
                values=values[first:last],
                counts=None if counts is None else counts[first:last],
                allowed=None if allowed is None else allowed.numpy(),
                competing=competing.numpy(),
                mean=part.mean[cells].numpy(),
                variance=part.variance[cells].numpy(),
                log_repeats=repeats.numpy(),
                moments=part.moments[cells].numpy(),
                rank=part.rank,
                place=(place.rows.start, place.cols.start, len(place.rows), len(place.cols)),
                images=self.index.images.numpy(),
                numbers=numbers[block].numpy(),
                q=q[block].numpy(),
                windows=windows[block].numpy(),
                expected=expected.numpy(),
                used_rank=used,
                sigma=sigma,
                exact_sigma=sharp,
                budget=share,
                floor=FLOOR * share,
                recheck=recheck,
                seed=hash((self.seed, part.k, region, sharp)) & 0x7FFFFFFFFFFFFFFF,
                **{name: x[block].numpy() for name, x in out.items()},
                pairs=pairs.numpy(),
                threads=torch.get_num_threads(),
                simd=os.environ.get("PATCHSCORE_SIMD", ""),
            )
            evaluated += int(pairs)
        columns = {name: x if x.ndim == 2 else x[:, None] for name, x in out.items()}
        return PosteriorSum(**columns, pairs=evaluated)

    def _competing(self, bank: PatchBank, part: IndexedSize, region: int) -> tuple[Tensor | None, Tensor]:
        """Which images of the index compete, and how many windows of each cell: all, or those of a selection."""
        place = part.regions[region]
        cells = range(place.first_cell, place.first_cell + place.cells)
        whole = self.index.bank
        if len(bank) == len(whole):
            return None, part.sizes[cells.start : cells.stop].float()
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


def _log_expected(q: Tensor, mean: Tensor, variance: Tensor, repeats: Tensor, sigma2: float) -> Tensor:
    """[Q, cells] log E exp(-|q - p|^2 / (2 sigma2)) over p normal with a cell's mean and variances.

    A Gaussian kernel over a Gaussian cell is a Gaussian of their summed variance:
    -1/2 sum_d log(1 + variance_d / sigma2) + (q_d - mean_d)^2 / (sigma2 + variance_d). `repeats` adds the log of how
    many windows a stored one stands for.
    """
    precision = 1 / (sigma2 + variance)
    constant = repeats - 0.5 * (torch.log1p(variance / sigma2).sum(1) + (precision * mean.square()).sum(1))
    return torch.addmm(constant, torch.cat([q, q.square()], 1), torch.cat([precision * mean, -0.5 * precision], 1).T)


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


def _tensors(sums: PosteriorSum) -> dict[str, Any]:
    every = {name: getattr(sums, name) for name in ("m", "s", "v", "s2", "vv", "vs", "ss")}
    return {name: x for name, x in every.items() if x is not None}


def _pixels(sums: PosteriorSum, rows: range, cols: range) -> PosteriorSum:
    block = {name: x[:, :, rows.start : rows.stop, cols.start : cols.stop] for name, x in _tensors(sums).items()}
    return PosteriorSum(**block)


def _put(total: PosteriorSum, items: Tensor, rows: range, cols: range, sums: PosteriorSum) -> None:
    """Enters the sums of some pixels, each of which has one region only."""
    for name, x in _tensors(sums).items():
        getattr(total, name)[items, :, rows.start : rows.stop, cols.start : cols.stop] = x
