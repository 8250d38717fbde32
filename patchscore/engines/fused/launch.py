"""Engine `fused`: exact to a stated precision on the GPU, in Triton (kernel.py).

Windows become rows of half floats (rows.py), and one kernel takes their softmax sums without ever writing a logit.
This file cuts the work into launches and merges their partial sums in float64.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...bank import PatchBank
from ...posterior import PosteriorSum, accumulator_dtype
from ...windows import Competition, Group, rows_as_pixels, span
from .. import cost
from ..autotune import Configuration, KernelError, first_that_serves, wanted
from ..base import Engine
from .rows import (
    Patches,
    Plan,
    Queries,
    Spectrum,
    cache,
    cache_limit,
    choose_plan,
    image_bytes,
    patch_rows,
    query_rows,
    spectrum_of,
    value_columns,
)

TOLERANCE = 1e-3
"""Of a denoised pixel, against float64."""
NEGLIGIBLE_BITS = 44.0
"""Tiles whose weights all lie so far below the largest are skipped: 2^-44 of 10^8 windows is 6e-6 of one."""
LARGEST_SPECTRUM = 2048
"""Beyond so many numbers in a window, principal axes take longer to find than they save."""


@functools.cache
def _kernels() -> ModuleType:
    """kernel.py; Triton is imported where it is wanted, as it takes its time."""
    from . import kernel as dense

    return dense


def configurations(plan: Plan, capability: tuple[int, int]) -> list[Configuration]:
    """What the kernel is compiled as for a plan, the likeliest first; none spills, all fit in shared memory.

    benchmarks/compile_report.py checks that and counts instructions.
    """
    columns = plan.columns
    if capability < (9, 0):
        if plan.exact:
            return [Configuration(64, 32, 4, 2, block=64 if columns > 320 else 0)]
        if columns > 320:
            return [Configuration(64, 64, 4, 3, block=64)]
        if columns > 128:
            return [Configuration(64, 64, 4, 2)]
        return [Configuration(128, 64, 4, 3), Configuration(64, 64, 4, 3)]
    if columns > 320:
        narrow = Configuration(128, 64, 4, 3, block=64)
        return [narrow] if plan.exact else [Configuration(128, 128, 8, 3, block=64), narrow]
    if plan.exact:
        return [Configuration(128, 64, 4, 3) if columns <= 128 else Configuration(128, 32, 4, 2)]
    if columns > 256:
        return [Configuration(128, 128, 8, 3, block=64), Configuration(128, 64, 4, 2)]
    if columns > 128:
        return [Configuration(128, 64, 4, 2), Configuration(256, 64, 8, 2)]
    if columns == 64 and not plan.skip:
        return [Configuration(128, 128, 4, 3), Configuration(128, 64, 4, 3)]
    return [Configuration(128, 64, 4, 3), Configuration(128, 128, 8, 3)]


def kernel_constants(plan: Plan, channels: int, configuration: Configuration) -> dict[str, Any]:
    """The constants the dense kernel is specialised for."""
    columns = plan.columns
    whole = configuration.block == 0
    first = 1 << (columns.bit_length() - 1)  # the larger of two blocks
    return {
        "K": columns,
        "KA": first if whole else 16,
        "KB": columns - first if whole else 0,
        "KC": configuration.block,
        "NV": value_columns(channels),
        "BQ": configuration.queries,
        "BP": configuration.patches,
        "SKIP": plan.skip,
        "EXACT": plan.size if plan.exact else 0,
        "Q_LO": plan.size,
        "P_LO": 2 * plan.size if plan.p_lo else 0,
        "BIAS": plan.bias,
    }


# What the engine is asked.


def runs_on(device: torch.device) -> bool:
    """CUDA devices; under Triton's interpreter (TRITON_INTERPRET=1) the CPU too, slowly, for tests."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def unavailable(device: torch.device) -> str | None:
    """What is missing to serve on `device`, or None."""
    try:
        _kernels()
    except ImportError as error:
        return f"Triton is missing ({error}); pip install 'patchscore[gpu]'"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it was written for NVIDIA's GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return _broken


_broken: str | None = None
"""Why no kernel could be compiled, once that happened."""


def posterior_sum(
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competition: Competition,
    memory_limit: int,
    tolerance: float = TOLERANCE,
) -> PosteriorSum:
    """Sums over every competing window of every pixel, the denoised pixel within `tolerance` of float64's.

    How finely and by how many numbers a window is described follows the smallest sigma of the call; `choose_plan` in
    rows.py states the bound.

    Args:
        z: [B, C, H, W] noisy images z = x_0 + sigma eps, float32 or float64.
        sigma: [B], positive.
        bank: the training images that compete.
        competition: which windows compete where.
        memory_limit: bytes of working memory beyond z, the bank, the result, and the rows kept between calls
            (CACHE_SHARE of the GPU). Where the GPU runs out of memory, chunks are halved and the call goes on.
        tolerance: of a denoised pixel, absolute.

    Returns:
        PosteriorSum with parts [B, 1 or C, H, W].

    Raises:
        KernelError: the kernel does not compile here.
        ValueError: `memory_limit` cannot hold the rows of one image.
    """
    try:
        with torch.cuda.device(z.device) if z.device.type == "cuda" else contextlib.nullcontext():
            return _posterior_sum(z, sigma, bank, competition, memory_limit, tolerance)
    except KernelError as error:
        global _broken
        _broken = f"its kernel failed to compile ({error})"
        raise KernelError(_broken) from error


@dataclass(frozen=True)
class Fused(Engine):
    """The engine, with the error that a denoised pixel may have."""

    tolerance: float = TOLERANCE
    name = "fused"

    def runs_on(self, device: torch.device) -> bool:
        return runs_on(device)

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable(device)

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        if competition.patch_size is None:
            return "whole images are one matrix product of few queries"
        return None

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        device = cost.known(z.device)
        if device is None:
            return None
        (group,) = competition.groups
        plan = _plan(z, sigma, bank, competition, group, self.tolerance)[0]
        return cost.fused_seconds(device, group, len(bank), len(z), plan)

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
    ) -> PosteriorSum:
        return posterior_sum(z, sigma, bank, competition, memory_limit, self.tolerance)


def _plan(
    z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition, group: Group, tolerance: float
) -> tuple[Plan, Spectrum | None]:
    """What the windows of a group are described by, and the principal axes of the bank where any group is free."""
    k = competition.patch_size or 0
    d = z.shape[1] * k * k
    free = any(not (one.rows.locked or one.cols.locked) for one in competition.groups)
    spectrum = spectrum_of(bank, k, z.device) if free and d <= LARGEST_SPECTRUM else None
    uint8 = bank.images.dtype == torch.uint8
    axes = not (group.rows.locked or group.cols.locked)
    return choose_plan(spectrum, d, float(sigma.min()), tolerance, uint8, axes), spectrum


def _posterior_sum(
    z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition, memory_limit: int, tolerance: float
) -> PosteriorSum:
    device, exact = z.device, accumulator_dtype(z.device)
    k = competition.patch_size or 0
    d = z.shape[1] * k * k
    uint8 = bank.images.dtype == torch.uint8
    unit = 127.5 / 128 if uint8 else 1.0  # bytes become multiples of 1/256, which half floats hold
    plans = [_plan(z, sigma, bank, competition, group, tolerance) for group in competition.groups]
    sigma = _levels(sigma, device, exact)

    total = PosteriorSum.empty(z.shape, device)
    for group, (plan, spectrum) in zip(competition.groups, plans, strict=True):
        # A query's row and its sums of every split take far less than a patch row's share of the limit.
        per_item = group.pixels * (8 * d + 4 * plan.columns + 64 * value_columns(z.shape[1]))
        items = min(len(z), max(1, memory_limit // 4 // per_item))
        limit, keep, first = memory_limit, True, 0
        while first < len(z):
            some = slice(first, first + items)
            try:
                queries = query_rows(z[some], sigma[some], competition, group, plan, spectrum, unit)
                parts: list[tuple[Tensor, Tensor]] = []
                for patches in _all_patches(bank, k, group, plan, spectrum, unit, device, limit, keep):
                    parts.append(launch(queries, patches, plan, z.shape[1]))
                sums = _merged(parts, queries, z.shape[1], unit)
                m, s, v, s2 = (rows_as_pixels(x, len(z[some]), group) for x in sums)
            except torch.OutOfMemoryError:
                # Give back what is kept; then fewer images at a time, then fewer patches.
                if items == 1 and not keep:
                    limit //= 2
                if limit < 2 * image_bytes(bank, k, group, plan):
                    raise
                items, keep = max(1, items // 2), False
                cache.clear()
                torch.cuda.empty_cache()
                continue
            total.add_(PosteriorSum(m, s, v, s2), some, span(group.rows.queries), span(group.cols.queries))
            first += items
    return total


def _levels(sigma: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """sigma on the device, run by run of equal numbers: a fill waits for nothing, and a CUDA graph can hold it."""
    runs = [(level, len(list(run))) for level, run in itertools.groupby(sigma.tolist())]
    return torch.cat([torch.full((length,), level, dtype=dtype, device=device) for level, length in runs])


def _merged(parts: list[tuple[Tensor, Tensor]], queries: Queries, channels: int, unit: float) -> tuple[Tensor, ...]:
    """m, s, v and s2 [L, Q, 1 or C] of all splits of all launches."""
    exact = queries.reference.dtype
    sums = torch.cat([part[0] for part in parts]).to(exact)  # [S, L, Q, NV]
    bits, s2 = torch.cat([part[1] for part in parts]).to(exact).unbind(-1)  # [S, L, Q]
    top = bits.amax(0)
    fade = torch.exp2(bits - top)
    sums = (sums * fade[..., None]).sum(0)
    s2 = (s2 * fade.square()).sum(0)
    v = (sums[..., :channels] + sums[..., channels + 1 : 2 * channels + 1]) / unit
    m = top * math.log(2) + queries.reference
    return m[..., None], sums[..., channels : channels + 1], v, s2[..., None]


def _all_patches(
    bank: PatchBank,
    k: int,
    group: Group,
    plan: Plan,
    spectrum: Spectrum | None,
    unit: float,
    device: torch.device,
    memory_limit: int,
    keep: bool,
) -> Iterator[Patches]:
    """Patch rows of the whole bank in chunks: kept ones, or made now and with `keep` kept if there is room for all."""
    # Only what the patches' own columns depend on.
    where = group.rows.centres, group.cols.centres, group.rows.locked, group.cols.locked
    key = (device, k, where, plan.size, plan.axes, plan.q_lo, plan.p_lo)
    kept = cache.get(bank, key)
    if kept is not None:
        yield from kept
        return
    per_image = image_bytes(bank, k, group, plan)
    count = min(memory_limit // 2 // per_image, len(bank))
    if count == 0:
        if per_image > memory_limit:
            raise ValueError(f"memory_limit: got {memory_limit} bytes, the rows of one image take {per_image}")
        count = 1
    keep = keep and per_image * len(bank) <= cache_limit(device)
    made: list[Patches] = []
    start = 0
    while start < len(bank):
        try:
            stop = min(start + count, len(bank))
            patches = patch_rows(bank, start, stop, k, group, plan, spectrum, unit, device)
        except torch.OutOfMemoryError:
            if count == 1 and not made:
                raise
            # Give back what is kept, then go on in halves.
            keep, made, count = False, [], max(1, count // 2)
            cache.clear()
            torch.cuda.empty_cache()
            continue
        if keep:
            made.append(patches)
        yield patches
        start = stop
    if keep:
        cache.put(bank, key, made, cache_limit(device))


# Launching.

SMALLEST_TUNED = 2**30
"""Pairs of a launch that is worth timing."""


def launch(queries: Queries, patches: Patches, plan: Plan, channels: int) -> tuple[Tensor, Tensor]:
    """Partial sums [splits, L, Q, NV] and [splits, L, Q, 2] of all queries over some patches.

    The first large launch of a plan on a device times the configurations of its table, where there is more than one, on
    the work at hand, and the fastest is remembered; small work takes what is known, else the first that compiles, and
    PATCHSCORE_AUTOTUNE=0 always that. Configurations add in different orders, so results differ between them in the
    last digits of float32.
    """
    device = queries.rows.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    pairs = queries.rows.shape[0] * queries.rows.shape[1] * patches.rows.shape[1]
    tune = wanted() and pairs >= SMALLEST_TUNED and device.type == "cuda"
    key = (name, plan, channels)
    candidates = configurations(plan, capability)
    if device.type != "cuda":
        # Small arrays are what an interpreter likes.
        candidates = [Configuration(32, 32, 4, 1, block=64 if plan.columns > 320 else 0)]
    return first_that_serves(key, candidates, lambda candidate: run(queries, patches, plan, channels, candidate), tune)


def run(
    queries: Queries, patches: Patches, plan: Plan, channels: int, configuration: Configuration
) -> tuple[Tensor, Tensor]:
    """One launch: tiles of queries, each over a share of the patches, as many shares as keep the device busy."""
    locked, n_queries, _ = queries.rows.shape
    n_patches = patches.rows.shape[1]
    device = queries.rows.device
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tiles = -(-n_queries // configuration.queries) * locked
    patch_tiles = n_patches // configuration.patches
    # Four programs a multiprocessor, of no fewer than eight tiles each.
    splits = max(1, min(4 * multiprocessors // tiles, patch_tiles // 8))
    per_split = -(-patch_tiles // splits)
    splits = -(-patch_tiles // per_split)
    dense = _kernels()
    constants = kernel_constants(plan, channels, configuration)
    sums = torch.empty(splits, locked, n_queries, constants["NV"], dtype=torch.float32, device=device)
    other = torch.empty(splits, locked, n_queries, 2, dtype=torch.float32, device=device)
    dense.dense_kernel[(tiles, splits)](
        queries.rows,
        queries.scale,
        patches.rows,
        patches.values,
        sums,
        other,
        locked,
        n_queries,
        n_patches,
        per_split * configuration.patches,
        plan.columns,
        float(dense.HEADROOM.value) - NEGLIGIBLE_BITS,
        **constants,
        num_warps=configuration.warps,
        num_stages=configuration.stages,
    )
    return sums, other
