"""Engine `fused`: exact to a stated precision on the GPU, in Triton.

plan.py decides how a window is described, rows.py makes the rows, kernel.py takes their softmax sums without ever
writing a logit. This file cuts the work into launches and merges their partial sums in float64.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...bank import PatchBank
from ...posterior import PosteriorSum, accumulator_dtype
from ...windows import Competition, Group, rows_as_pixels, span
from .. import cost
from ..autotune import Configuration, KernelError, first_that_serves
from ..base import Engine
from ..device import cache, cache_limit, missing_for_triton, recording
from .plan import Plan, Spectrum, choose_plan, least_tolerance, spectrum_of
from .rows import Patches, Queries, patch_rows, query_rows, stored_bytes, value_columns, working_bytes

TOLERANCE = 1e-3
"""Of a denoised pixel, against float64."""
NEGLIGIBLE_BITS = 44.0
"""Tiles whose weights all lie so far below the largest are skipped: 2^-44 of 10^8 windows is 6e-6 of one."""
LARGEST_SPECTRUM = 2048
"""Beyond so many numbers in a window, principal axes take longer to find than they save."""
PILOT = 17
"""Every 17th tile of patches sets the reference of a program: a sixth of an instruction a pair, and prime to the powers
of two that images' sizes are made of."""


@functools.cache
def _kernels() -> ModuleType:
    """kernel.py, with Triton imported on first use, as that import is slow."""
    from . import kernel

    return kernel


# Configurations.


def configurations(plan: Plan, capability: tuple[int, int], ess: bool) -> list[Configuration]:
    """What the kernel is compiled as for a plan, the likeliest first; none spills, all fit in shared memory.

    benchmarks/compile_report.py checks that and counts instructions. `cost.cubic` says which share of the exponentials
    a polynomial takes; one choice is always without. The largest tiles have no registers left for sums of squares.
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
        wide = Configuration(128, 128, 8, 3, block=64)
        if plan.exact:
            return [narrow]
        if not plan.pilot or (ess and columns != 384):
            return [wide, narrow]
        # 256 queries read three quarters as much from L2 as 128; whole rows of 384 columns half of that.
        widest = Configuration(256, 128, 8, 3, block=64)
        return [Configuration(128, 64, 8, 2) if columns == 384 else widest, wide]
    if plan.exact:
        return [Configuration(128, 64, 4, 3) if columns <= 128 else Configuration(128, 32, 4, 2)]
    if columns > 256:
        # Whole rows read half as much from L2, one program a multiprocessor; blocks run two with a running maximum.
        rows = Configuration(128, 64, 8, 2)
        if ess and not plan.pilot:
            return [rows]
        return [rows, Configuration(128 if ess or not plan.pilot else 256, 128, 8, 3, block=64)]
    if not plan.pilot:
        if columns > 128:
            return [Configuration(128, 64, 8 if columns > 192 else 4, 2)]
        return [Configuration(128, 64, 4, 3), Configuration(128, 128, 8, 3)]
    share = cost.cubic(columns)
    if columns > 192:
        return [Configuration(128, 128, 8, 2, cubic=share), Configuration(128, 64, 8, 2)]
    if columns > 128:
        return [Configuration(128, 64, 4, 2, cubic=share), Configuration(128, 64, 4, 2)]
    # Three programs a multiprocessor, or two of fewer instructions, or five.
    plain, many = Configuration(128, 64, 4, 3), Configuration(64, 64, 4, 3)
    if ess and capability >= (10, 0):
        return [plain, many]  # Triton 3.6 spills 16 bytes of the polynomial's tile at K = 64
    other = Configuration(128, 128, 4, 3, cubic=share) if columns == 64 and not ess else many
    return [replace(plain, cubic=share), other, plain]


def kernel_constants(plan: Plan, channels: int, configuration: Configuration, ess: bool) -> dict[str, Any]:
    """The constants the kernel is specialised for."""
    columns = plan.columns
    whole = configuration.block == 0
    first = 1 << (columns.bit_length() - 1)  # the larger of two blocks
    return {
        "K": columns,
        "KA": first if whole else 16,
        "KB": columns - first if whole else 0,
        "KC": configuration.block,
        "NV": value_columns(channels),
        "ONES": channels,
        "BQ": configuration.queries,
        "BP": configuration.patches,
        "PILOT": PILOT if plan.pilot else 0,
        "CUBIC": configuration.cubic if plan.pilot else 0,
        "ESS": ess,
        "SKIP": plan.skip,
        "EXACT": plan.size if plan.exact else 0,
        "Q_LO": plan.size,
        "P_LO": plan.size + plan.q_lo if plan.p_lo else 0,
        "BIAS": plan.bias,
    }


# What the engine is asked.

_broken: str | None = None
"""Why no kernel could be compiled, once that happened."""


@dataclass(frozen=True)
class Fused(Engine):
    """Sums over every competing window, the denoised pixel within `tolerance` of float64's.

    How finely and by how many numbers a window is described follows the smallest sigma of the call; `choose_plan` in
    plan.py states the bound. Under Triton's interpreter (TRITON_INTERPRET=1) it serves the CPU, slowly, for tests.
    """

    tolerance: float = TOLERANCE
    name: ClassVar[str] = "fused"

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")

    def unavailable(self, device: torch.device) -> str | None:
        return missing_for_triton(device) or _broken

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        if competition.patch_size is None:
            return "whole images are one matrix product of few queries"
        corners = any(group.rows.locked and group.cols.locked for group in competition.groups)
        if corners and not recording():  # the next engine reads from the device, which no CUDA graph can hold
            return "rows of a pixel locked on both axes serve no other pixel"
        if self.tolerance < (least := least_tolerance(float(sigma.max()))):
            return f"its half-precision weights hold {least:.1g} at this noise, {self.tolerance:g} is asked"
        return None

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        device = cost.known(z.device)
        if device is None:
            return None
        (group,) = competition.groups
        plan = _Described(bank, competition, z.device, self.tolerance).plan(group, sigma)
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
        """As every engine's.

        Rows that are kept between calls (CACHE_SHARE of the GPU) come on top of `memory_limit`. Where the GPU runs out
        of memory, they are given up, chunks are halved, and the call goes on.

        Raises:
            KernelError: the kernel does not compile here.
            ValueError: `memory_limit` cannot hold the rows of one image.
        """
        try:
            with torch.cuda.device(z.device) if z.device.type == "cuda" else contextlib.nullcontext():
                described = _Described(bank, competition, z.device, self.tolerance)
                return _posterior_sum(z, sigma, described, competition, memory_limit, ess)
        except KernelError as error:
            global _broken
            _broken = f"its kernel failed to compile ({error})"
            raise KernelError(_broken) from error


# One call.


@dataclass
class _Room:
    """How much is done at a time: noisy images, bytes of patch rows; whether these are kept."""

    items: int
    bytes: int
    keep: bool = True


def _posterior_sum(
    z: Tensor, sigma: Tensor, described: _Described, competition: Competition, memory_limit: int, ess: bool
) -> PosteriorSum:
    """The work of `Fused.posterior_sum`."""
    total = PosteriorSum.empty(z.shape, z.device)
    for group in competition.groups:
        plan = described.plan(group, sigma)
        # A query's row and its sums of every split take far less than a patch row's share of the limit.
        per_item = group.pixels * (8 * described.numbers + 4 * plan.columns + 64 * value_columns(z.shape[1]))
        room = _Room(min(len(z), max(1, memory_limit // 4 // per_item)), memory_limit)
        first = 0
        while first < len(z):
            some = slice(first, first + room.items)
            sums = None
            try:
                sums = _sums(z[some], sigma[some], described, competition, group, plan, room, ess)
            except torch.OutOfMemoryError:
                if room.items == 1 and not room.keep:
                    room.bytes //= 2
                if room.bytes < 2 * described.working_bytes(group, plan, 1):
                    raise
            if sums is None:
                # What the try held is free by now. Give back what is kept; then fewer images at a time, then fewer
                # patches.
                room.items, room.keep = max(1, room.items // 2), False
                cache.clear(z.device)
                torch.cuda.empty_cache()
                continue
            total.add_(sums, some, span(group.rows.queries), span(group.cols.queries))
            first += room.items
    return total


def _sums(
    z: Tensor,
    sigma: Tensor,
    described: _Described,
    competition: Competition,
    group: Group,
    plan: Plan,
    room: _Room,
    ess: bool,
) -> PosteriorSum:
    """Of the pixels of one group, with every window of the bank."""
    channels, unit = z.shape[1], described.unit
    queries = query_rows(z, _levels(sigma, z.device), competition, group, plan, described.spectrum, unit)
    parts = [launch(queries, patches, plan, channels, ess) for patches in described.patches(group, plan, room)]
    m, s, v, s2 = (rows_as_pixels(x, len(z), group) for x in merged(parts, queries, channels, unit))
    return PosteriorSum(m, s, v, s2)


@dataclass
class _Described:
    """The windows of a bank as one call describes them, whatever the noisy images."""

    bank: PatchBank
    competition: Competition
    device: torch.device
    tolerance: float
    k: int = field(init=False)
    uint8: bool = field(init=False)
    numbers: int = field(init=False)  # in a window
    unit: float = field(init=False)
    spectrum: Spectrum | None = field(init=False)

    def __post_init__(self) -> None:
        self.k = self.competition.patch_size or 0
        self.uint8 = self.bank.images.dtype == torch.uint8
        self.numbers = self.bank.shape[0] * self.k * self.k
        # Bytes become multiples of 1/256, which half floats hold.
        self.unit = 127.5 / 128 if self.uint8 else 1.0
        free = any(not (group.rows.locked or group.cols.locked) for group in self.competition.groups)
        few = self.numbers <= LARGEST_SPECTRUM
        self.spectrum = spectrum_of(self.bank, self.k, self.device) if free and few else None

    def plan(self, group: Group, sigma: Tensor) -> Plan:
        """Rows of locked coordinates are pixels: an unfold is cheaper than a rotation for so few queries. One window an
        image counts there, so that edges and corners have one plan: a CUDA graph that takes corners finds it compiled.
        """
        axes = not (group.rows.locked or group.cols.locked)
        windows = len(self.bank) * (group.windows_per_image if axes else 1)
        spectrum = self.spectrum and replace(self.spectrum, windows=windows)
        least, largest = map(float, sigma.aminmax())
        return choose_plan(spectrum, self.numbers, least, self.tolerance, self.uint8, axes, largest)

    def patches(self, group: Group, plan: Plan, room: _Room) -> Iterator[Patches]:
        """Patch rows of the whole bank in chunks: kept ones, or made now and kept if there is room for all."""
        # Only what the patches' own columns depend on.
        where = group.rows.centres, group.cols.centres, group.rows.locked, group.cols.locked
        key = (self.k, where, plan.size, plan.axes, plan.q_lo, plan.p_lo)
        kept = cache.get(self.bank, self.device, key)
        if kept is not None:
            yield from kept
            return
        count = self._chunk(group, plan, room)
        limit = cache_limit(self.device)
        keep = room.keep and stored_bytes(self.bank, group, plan, len(self.bank)) <= limit
        made: list[Patches] = []
        start = 0
        while start < len(self.bank):
            stop = min(start + count, len(self.bank))
            patches = self._made(group, plan, start, stop, can_retry=count > 1 or bool(made))
            if patches is None:
                # Give back what is kept, then go on in halves.
                keep, made, count = False, [], max(1, count // 2)
                cache.clear(self.device)
                torch.cuda.empty_cache()
                continue
            if keep:
                made.append(patches)
            yield patches
            start = stop
        if keep:
            cache.put(self.bank, self.device, key, made, limit)

    def _made(self, group: Group, plan: Plan, start: int, stop: int, can_retry: bool) -> Patches | None:
        """Patch rows of some images, or None where there was no memory for them."""
        try:
            return patch_rows(self.bank, start, stop, self.k, group, plan, self.spectrum, self.unit, self.device)
        except torch.OutOfMemoryError:
            if not can_retry:
                raise
        return None

    def _chunk(self, group: Group, plan: Plan, room: _Room) -> int:
        """Images whose rows are made at a time: in half of the memory, one at least."""
        one = self.working_bytes(group, plan, 1)
        if one > room.bytes:
            raise ValueError(f"memory_limit: got {room.bytes} bytes, the rows of one image take {one}")
        count = len(self.bank)
        while count > 1 and (taken := self.working_bytes(group, plan, count)) > room.bytes // 2:
            count = max(1, min(count - 1, count * (room.bytes // 2) // taken))
        return count

    def working_bytes(self, group: Group, plan: Plan, images: int) -> int:
        """What rows of so many images take while they are made."""
        return working_bytes(self.bank, self.k, group, plan, images)


def _levels(sigma: Tensor, device: torch.device) -> Tensor:
    """sigma on the device, run by run of equal numbers: a fill waits for nothing, and a CUDA graph can hold it."""
    dtype = accumulator_dtype(device)
    runs = [(level, len(list(run))) for level, run in itertools.groupby(sigma.tolist())]
    return torch.cat([torch.full((length,), level, dtype=dtype, device=device) for level, length in runs])


def merged(parts: list[tuple[Tensor, Tensor]], queries: Queries, channels: int, unit: float) -> tuple[Tensor, ...]:
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


# Launching.

SMALLEST_TUNED = 2**30
"""Pairs of a launch that is worth timing."""


def launch(queries: Queries, patches: Patches, plan: Plan, channels: int, ess: bool) -> tuple[Tensor, Tensor]:
    """Partial sums [splits, L, Q, NV] and [splits, L, Q, 2] of all queries over some patches.

    The first large launch of a plan on a device times the configurations of its table, where there is more than one, on
    the work at hand, and the fastest is remembered for large launches; small ones take the first that compiles, and so
    do all with PATCHSCORE_AUTOTUNE=0. Configurations add in different orders, so results differ between them in the
    last digits of float32.
    """
    device = queries.rows.device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "interpreter"
    pairs = queries.rows.shape[0] * queries.rows.shape[1] * patches.rows.shape[1]
    candidates = configurations(plan, torch.cuda.get_device_capability(device) if cuda else (9, 0), ess)
    if not cuda:
        # Small arrays are what an interpreter likes.
        block = 64 if plan.columns > 320 else 0
        candidates = [Configuration(32, 32, 4, 1, block, cubic=cost.cubic(plan.columns))]
    return first_that_serves(
        (name, plan, channels, ess),
        candidates,
        lambda candidate: run(queries, patches, plan, channels, candidate, ess),
        tune=cuda and pairs >= SMALLEST_TUNED,
    )


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


FEW_PROGRAMS, MANY_PROGRAMS = 4, 32
"""Programs a multiprocessor: four run at a time, and eight turns of them waste a sixteenth of the last one."""
FEW_TILES, MANY_TILES = 8, 64
"""Tiles of patches that a program reads at least: fewer to have four programs, more beyond that."""
LARGEST_SPLIT = 2**20
"""Patches of a program at most: MEAN_BITS in kernel.py counts on it."""


def tiles_per_split(tiles: int, blocks: int, largest: int, multiprocessors: int) -> int:
    """How many of `tiles` tiles of patches a program takes, of `blocks` tiles of queries; no split is empty."""
    few = min(-(-FEW_PROGRAMS * multiprocessors // blocks), tiles // FEW_TILES)
    many = min(-(-MANY_PROGRAMS * multiprocessors // blocks), tiles // MANY_TILES)
    return min(-(-tiles // max(1, few, many)), largest)


def run(
    queries: Queries, patches: Patches, plan: Plan, channels: int, configuration: Configuration, ess: bool
) -> tuple[Tensor, Tensor]:
    """One launch: tiles of queries, each over a share of the patches, as many shares as keep the device busy."""
    locked, n_queries, _ = queries.rows.shape
    device = queries.rows.device
    blocks = -(-n_queries // configuration.queries) * locked
    tiles = -(-patches.filled // configuration.patches)
    each = tiles_per_split(tiles, blocks, LARGEST_SPLIT // configuration.patches, multiprocessors(device))
    splits = -(-tiles // each)
    kernels = _kernels()
    constants = kernel_constants(plan, channels, configuration, ess)
    sums = torch.empty(splits, locked, n_queries, constants["NV"], dtype=torch.float32, device=device)
    other = torch.empty(splits, locked, n_queries, 2, dtype=torch.float32, device=device)
    kernels.posterior_kernel[(blocks, splits)](
        queries.rows,
        queries.scale,
        patches.rows,
        patches.values,
        sums,
        other,
        locked,
        n_queries,
        patches.rows.shape[1],
        patches.filled,
        each * configuration.patches,
        plan.columns,
        float(kernels.HEADROOM.value) - NEGLIGIBLE_BITS,
        **constants,
        num_warps=configuration.warps,
        num_stages=configuration.stages,
    )
    return sums, other
