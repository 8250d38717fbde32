"""Engine `pruned`: posterior sums from a sample of the windows, with the standard error of the sample.

Two sampling designs. With an index, the strata are its cells: windows are sampled, allocated by the weights expected
from the moments of the cells. Without one, and where weights are nearly uniform, whole training images are drawn and
summed exactly. Pixels unlike anything in the bank, of which no sample is reliable, get exact sums. naive.py
is the definition, policy.py holds the constants.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...bank import PatchBank
from ...index import PatchIndex
from ...native import missing, native
from ...posterior import PosteriorSum
from ...windows import Competition, Group, span
from ..base import Engine, serve
from ..device import recording
from ..fused.launch import Fused
from ..reference import Reference
from ..sliding.cpu import SlidingCpu
from ..sliding.cuda import SlidingCuda
from . import cpu, gpu, images
from .memory import Memory, Remembered
from .naive import pooled
from .policy import POLICY, Policy
from .request import Request, Scanned, draw_key

MOST_CHANNELS = 16
"""Of an index; the scan keeps sums of so many in registers and on the stack."""


class Pruned(Engine):
    """The engine for one index, or none, and one budget or tolerance.

    Args:
        index: the cells; None draws whole images.
        budget: fraction of the (pixel, window) pairs to evaluate, in (0, 1]; or
        tolerance: with an index, rms standard error that an image's pixels may have; a pilot finds the budget for it.
        seed: of the sample. The same seed and image give the same numbers, alone or in a batch.
    """

    name = "pruned"
    exact = False
    moments = True

    def __init__(
        self,
        index: PatchIndex | None,
        budget: float | None,
        tolerance: float | None,
        seed: int,
        policy: Policy = POLICY,
    ):
        self.index, self.budget, self.tolerance, self.seed, self.policy = index, budget, tolerance, seed, policy
        self.memory: Memory | None = None
        """Of the trajectory that is followed, if one is."""
        self._allowed: dict[int, tuple[PatchBank, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_allowed": {}, "memory": None}  # both know banks by addresses of this process

    def runs_on(self, device: torch.device) -> bool:
        return True

    def unavailable(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"it runs on CPUs and NVIDIA's GPUs, not on {device.type}"
        if device.type == "cpu" and native is None:
            return missing
        if self.index is None:
            return None
        if device.type == "cuda" and (reason := gpu.missing(device)):
            return reason
        if self.index.bank.shape[0] > MOST_CHANNELS:
            return f"with an index it takes up to {MOST_CHANNELS} channels, not {self.index.bank.shape[0]}"
        return None

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        """Sums that exact engines compute as fast: large budgets, tiny banks, edges, very low noise."""
        if recording():
            return "how much it draws is counted on the CPU, which no CUDA graph can hold"
        if self.index is None:
            drawn = round((self.budget or 0) * len(bank))
            return "a sample of images takes two or more, and not all" if not 2 <= drawn < len(bank) else None
        if competition.patch_size is None:
            return "whole images are not in an index"
        if competition.patch_size not in self.index.patch_sizes:
            return f"the index has patch sizes {self.index.patch_sizes}, not {competition.patch_size}"
        if any(group.rows.locked or group.cols.locked for group in competition.groups):
            return "windows along edges compete with few others"
        if (self.budget or 0) >= self.policy.exact_budget and self._sampled_images() == len(self.index.bank):
            return f"from a budget of {self.policy.exact_budget} on exact sums are as fast"
        if bank.images.dtype == torch.uint8 and float(sigma.min()) < self.policy.sharpest:
            return f"below sigma = {self.policy.sharpest} a query cannot be rounded to parts of a byte"
        return None

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        """Of a tolerance, at least: what the budget takes that the search for one begins with."""
        if self.index is None or competition.patch_size is None:
            return None
        (group,) = competition.groups
        part, policy = self.index.at(competition.patch_size), self.policy
        drawn = (self.budget or policy.pilot_budget) * len(bank) * group.windows_per_image
        if z.device.type == "cuda":
            pixel = policy.gpu_cell_seconds * len(part.cells.size) + policy.gpu_window_seconds * drawn
            return len(z) * (policy.gpu_call_seconds + group.pixels * pixel)
        window = policy.window_seconds if part.tiles is not None else policy.gathered_seconds
        pixel = policy.pixel_seconds + policy.cell_seconds * len(part.cells.size) + window * drawn
        return len(z) * group.pixels * pixel

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
        """Estimated sums over the competing windows, with their sampling covariance."""
        z32 = z.detach().float()

        def exact(items: list[int], groups: tuple[Group, ...], bank: PatchBank = bank) -> PosteriorSum:
            some = competition.only(groups)
            if z.device.type == "cpu":
                return SlidingCpu().posterior_sum(z32[items], sigma[items], bank, some, memory_limit, moments=moments)
            engines = (Fused(), SlidingCuda(), Reference())
            return serve(engines, "auto", z32[items], sigma[items], bank, some, memory_limit, moments=moments)[0]

        keys = [
            draw_key(self.seed, competition.patch_size or 0, float(sigma[item]), z32[item]) for item in range(len(z))
        ]
        if self.index is None:
            assert self.budget is not None
            parts = [
                images.drawn(
                    partial(exact, [item], competition.groups), key, bank, competition, self.budget, self.policy
                )
                for item, key in enumerate(keys)
            ]
            fields = {name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields}
            joined = dataclasses.replace(parts[0], **fields)  # type: ignore[arg-type]
            return joined.with_pairs(sum(part.pairs or 0 for part in parts))
        total = PosteriorSum.empty(z.shape, z.device, sampled=True, moments=moments)
        pairs = 0
        for group in competition.groups:
            assert not group.rows.locked, "lacks() leaves edges to exact engines"
            assert not group.cols.locked, "lacks() leaves edges to exact engines"
            left: list[int] = []
            for item in range(len(z)):
                level, only = float(sigma[item]), competition.only((group,))
                found = self._drawn_images(partial(exact, [item], (group,)), keys[item], level, bank, only)
                if found is not None:
                    _put(total, [item], group, found.block(slice(None), *_spans(group)))
                    pairs += found.pairs or 0
                    continue
                scanned = self._image(
                    item, z32[item], keys[item], level, bank, competition, group, moments, memory_limit
                )
                if scanned is None:
                    left.append(item)
                    continue
                apart = self.policy.exact_pixels
                unlike = rectangles(~scanned.fits.unflatten(0, (-1, len(group.cols.queries))), apart)
                if sum(len(rows) * len(cols) + apart for rows, cols in unlike) >= group.pixels:
                    left.append(item)
                    continue
                _put(total, [item], group, scanned.sums.mapped(partial(_as_pixels, group=group)))
                pairs += scanned.sums.pairs or 0
                at = [(group.rows.queries[span(rows)], group.cols.queries[span(cols)]) for rows, cols in unlike]
                few = tuple(some for rows, cols in at for some in only.at(rows, cols).groups)
                sums = exact([item], few) if few else scanned.sums
                for some in few:
                    _put(total, [item], some, sums.block(slice(None), *_spans(some)))
                    pairs += len(bank) * some.pixels * some.windows_per_image
            if left:
                sums = exact(left, (group,))
                pairs += len(left) * len(bank) * group.pixels * group.windows_per_image
                _put(total, left, group, sums.block(slice(None), *_spans(group)))
        return total.with_pairs(pairs)

    def _drawn_images(
        self, exact: Callable[[PatchBank], PosteriorSum], key: int, sigma: float, bank: PatchBank, of: Competition
    ) -> PosteriorSum | None:
        """The sums of one noisy image from whole training images, where weights are so flat that these serve better."""
        policy, count = self.policy, len(bank)
        if (
            sigma < policy.flat_from
            or count < policy.pilot_images / policy.exact_budget
            or self._sampled_images() < count
        ):
            return None
        (group,) = of.groups
        pilot = exact(images.subset(bank, images.order(bank, key)[: policy.pilot_images]))
        ess = pilot.block(slice(None), *_spans(group)).ess.median().item()
        if ess < policy.flat * policy.pilot_images * group.windows_per_image:
            return None
        share = policy.image_pairs * (self.budget or 0)
        if self.tolerance is not None:
            pilot = images.drawn(exact, key, bank, of, policy.pilot_images / count, policy)
            error = _rms(pilot.block(slice(None), *_spans(group)).stderr)
            # The squared error falls as (1 - share) / share.
            odds = policy.pilot_images / (count - policy.pilot_images) * (error / (0.8 * self.tolerance)) ** 2
            share = odds / (1 + odds)
        if share > policy.exact_share:
            return None
        return images.drawn(exact, key, bank, of, max(share, policy.pilot_images / count), policy)

    def _image(
        self,
        item: int,
        z: Tensor,
        key: int,
        sigma: float,
        bank: PatchBank,
        competition: Competition,
        group: Group,
        moments: bool,
        memory_limit: int,
    ) -> Scanned | None:
        """The sums of one image's pixels; None leaves them to the exact engine."""
        assert self.index is not None
        assert competition.patch_size is not None
        part = self.index.at(competition.patch_size)
        held = None if self.memory is None else self.memory.of(bank, item, z, sigma)
        allowed = self._competing_images(bank)
        competing = self._sampled_images() if allowed is None else int(allowed.sum())
        request = Request(
            part,
            _windows(z, part.k, competition.padding_mode, group),
            sigma,
            allowed,
            competing * part.windows_per_image,
            self.budget,
            key,
            len(group.cols.queries),
            moments,
            None if held is None else held.recall(part, group),
            memory_limit,
        )
        scanned = self._scan(request) if self.tolerance is None else self._within(request, held)
        if scanned is None:
            return None
        if held is not None and scanned.remembered is not None:
            held.keep(part, group, scanned.remembered)
        return dataclasses.replace(scanned, sums=pooled(scanned.sums, scanned.fits, self.policy.pooled))

    def _within(self, request: Request, held: Remembered | None) -> Scanned | None:
        """Sums whose rms standard error is at most the tolerance; None where exact ones are as fast.

        A pilot of some pixels finds the budget, all pixels confirm it. Along a trajectory the search begins at half the
        budget that the noise level before took.
        """
        assert self.tolerance is not None
        count = len(request.windows)
        pixels = torch.linspace(0, count - 1, min(self.policy.pilot_pixels, count)).round().long().unique()
        remembered = None if request.remembered is None else request.remembered[pixels]
        pilot = dataclasses.replace(
            request, windows=request.windows[pixels], columns=0, moments=False, remembered=remembered
        )
        budget = self.policy.pilot_budget
        if held is not None and held.budget is not None:
            budget = max(budget, held.budget / 2)
        while budget < self.policy.exact_budget:
            found = self._scan(dataclasses.replace(pilot, budget=budget))
            if found is None or not found.fits.any():
                return None
            over = _error(found) / (0.8 * self.tolerance)
            if over <= 1:
                found = self._scan(dataclasses.replace(request, budget=budget))
                if found is None or _error(found) <= self.tolerance:
                    if held is not None:
                        held.budget = budget
                    return found
                over = 1.1
            # Errors fall at least as one over the root of the budget.
            budget *= 2 ** min(3, math.ceil(2 * math.log2(over)))
        return None

    def _scan(self, request: Request) -> Scanned | None:
        """The answer of the backend for the device; under Triton's interpreter the GPU's serves the CPU, slowly."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return (gpu if request.windows.is_cuda or interpreted else cpu).scan(request, self.policy)

    def _sampled_images(self) -> int:
        """Images whose windows are in the index, at every size it has."""
        assert self.index is not None
        sizes = [self.index.at(k).meta["subsampled_images"] for k in self.index.patch_sizes]
        return min([size for size in sizes if size is not None], default=len(self.index.bank))

    def _competing_images(self, bank: PatchBank) -> Tensor | None:
        """[images of the index] uint8, which compete: those of a selection; None for all."""
        assert self.index is not None
        whole = self.index.bank
        if len(bank) == len(whole):
            return None
        if id(bank) not in self._allowed:
            numbers = torch.full((len(whole.images),), -1)
            numbers[torch.arange(len(whole)) if whole.indices is None else whole.indices] = torch.arange(len(whole))
            assert bank.indices is not None
            allowed = torch.zeros(len(whole), dtype=torch.uint8)
            allowed[numbers[bank.indices]] = 1
            self._allowed[id(bank)] = (bank, allowed)
        return self._allowed[id(bank)][1]


def _windows(z: Tensor, k: int, padding_mode: str, group: Group) -> Tensor:
    """[rows * cols, C, k, k] the windows of a group's pixels."""
    around = "circular" if padding_mode == "circular" else "constant"
    padded = functional.pad(z[None], (k // 2,) * 4, mode=around)[0]
    windows = padded.unfold(1, k, 1).unfold(2, k, 1)[:, span(group.rows.queries), span(group.cols.queries)]
    return windows.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def rectangles(marked: Tensor, apart: int) -> list[tuple[range, range]]:
    """Rows and columns of rectangles, no two of which overlap, that hold every marked pixel of [rows, cols].

    Two are made one where they overlap, or where that takes at most `apart` pixels more than both.
    """
    found: list[tuple[int, int, int, int]] = []
    for row, col in marked.nonzero().tolist():
        one = (row, row + 1, col, col + 1)
        at = 0
        while at < len(found):
            a, b = one, found[at]
            both = (min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))
            meet = max(a[0], b[0]) < min(a[1], b[1]) and max(a[2], b[2]) < min(a[3], b[3])
            if meet or _area(both) <= _area(a) + _area(b) + apart:
                found.pop(at)
                one, at = both, 0
            else:
                at += 1
        found.append(one)
    return [(range(top, bottom), range(left, right)) for top, bottom, left, right in found]


def _area(rectangle: tuple[int, int, int, int]) -> int:
    top, bottom, left, right = rectangle
    return (bottom - top) * (right - left)


def _as_pixels(x: Tensor, group: Group) -> Tensor:
    """[1, C, rows, cols] of [rows * cols, C]."""
    return x.unflatten(0, (1, len(group.rows.queries), len(group.cols.queries))).permute(0, 3, 1, 2)


def _spans(group: Group) -> tuple[slice, slice]:
    return span(group.rows.queries), span(group.cols.queries)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _error(scanned: Scanned) -> float:
    """Rms standard error of the pixels that are not summed exactly."""
    return _rms(scanned.sums.stderr[scanned.fits]) if scanned.fits.any() else 0.0


def _put(total: PosteriorSum, items: list[int], group: Group, sums: PosteriorSum) -> None:
    """Enters the sums of a group's pixels; exact ones have no sampling covariance."""
    entered, (rows, cols) = sums.fields, _spans(group)
    for name, x in total.fields.items():
        x[items, :, rows, cols] = entered.get(name, 0.0)
