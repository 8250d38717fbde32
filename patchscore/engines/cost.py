"""A cost model of exact sums on a GPU: the work of a pair, and the rates at which devices do it.

A pair (query pixel, window) costs exponentials, multiply-adds of half floats, issued instructions, and bytes from L2
and from memory. `rate` turns them into pairs a second; on a GPU, `engine="auto"` compares the predicted seconds. Every
figure is derived: counted in machine code (benchmarks/results/), or published for the device. None was measured.

The kernels alternate between matrix products and the softmax, so the time of a pair is

    max((products + max(exponentials, instructions)) / efficiency, L2 bytes, memory bytes),

each over its rate. An efficiency of 1 is one after the other, each at its full rate; copies overlap with both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

from ..windows import Competition, Group

Range = tuple[float, float]


@dataclass(frozen=True)
class Device:
    """Rates of a GPU. A cycle and a multiprocessor where not said otherwise.

    clock: Hz under load. products: dense multiply-adds of half floats. lanes: of issued instructions.
    l2_rate, memory_rate: bytes a second. memory: bytes.
    """

    name: str
    multiprocessors: int
    clock: float
    products: int
    l2_rate: float
    memory_rate: float
    memory: float
    lanes: int = 128
    exponentials: int = 16

    @property
    def units(self) -> float:
        """Multiprocessor cycles a second."""
        return self.clock * self.multiprocessors


L2_SHARE = 0.61
"""Fraction of the L2's peak (5,120 bytes a cycle on A100 and H100) that reads are taken to reach: 5.5e12 bytes/s on an
H100. Assumed; benchmarks/gpu.py measures it. Half of it would double the cost of rows above 256 columns."""

H100 = Device("H100 SXM", 132, 1.755e9, 2048, L2_SHARE * 5120 * 1.755e9, 3.35e12, 80e9)
H200 = Device("H200", 132, 1.755e9, 2048, L2_SHARE * 5120 * 1.755e9, 4.8e12, 141e9)
A100 = Device("A100 SXM", 108, 1.41e9, 1024, L2_SHARE * 5120 * 1.41e9, 2.04e12, 80e9)
"""Multiprocessors, memory and its rate: data sheets. Exponentials and lanes: CUDA programming guide, throughput of
arithmetic instructions. Products: the data sheets' dense half-float rates (989 and 312 TFLOPS) over boost clock and
multiprocessors. Clock: an A100's boost clock, which it holds; an H100's under load, of 1.98 GHz boost."""


@dataclass(frozen=True)
class Work:
    """Of one pair: operations, and bytes."""

    exponentials: float
    products: float
    instructions: float
    l2_bytes: float
    memory_bytes: float = 0.0

    def scaled(self, factor: float) -> Work:
        """So many times the work."""
        return Work(*(factor * amount for amount in astuple(self)))

    def costs(self, device: Device) -> dict[str, float]:
        """Seconds a pair keeps each unit busy."""
        return {
            "exponentials": self.exponentials / (device.exponentials * device.units),
            "products": self.products / (device.products * device.units),
            "instructions": self.instructions / (device.lanes * device.units),
            "L2": self.l2_bytes / device.l2_rate,
            "memory": self.memory_bytes / device.memory_rate,
        }

    def seconds(self, device: Device, efficiency: float) -> float:
        """Of a pair."""
        cost = self.costs(device)
        computing = (cost["products"] + max(cost["exponentials"], cost["instructions"])) / efficiency
        return max(computing, cost["L2"], cost["memory"])

    def binds(self, device: Device, efficiency: float) -> str:
        """What takes the time."""
        cost = self.costs(device)
        softmax = "exponentials" if cost["exponentials"] >= cost["instructions"] else "instructions"
        computing = (cost["products"] + cost[softmax]) / efficiency
        if computing < max(cost["L2"], cost["memory"]):
            return "L2" if cost["L2"] >= cost["memory"] else "memory"
        return "products" if cost["products"] > cost[softmax] else softmax


# Efficiencies: published attention kernels on an H100 over this model's time at efficiency 1 (`attention`). Figure 5 of
# FlashAttention-3 (arXiv:2407.08608), without causal mask, 16k: TFLOPS at head sizes 64, 128, 256.

PUBLISHED = {
    "FlashAttention-3": {64: 497, 128: 648, 256: 756},
    "Triton": {64: 403, 128: 395},
    "FlashAttention-2": {64: 324, 128: 370, 256: 326},
}
TRITON: Range = (0.62, 0.85)
"""Of a Triton kernel without warp specialisation, at head sizes 128 and 64."""
SPECIALISED: Range = (0.99, 1.05)
"""Of warp specialisation with two consumers in turns, as in FlashAttention-3."""
INTEGER: Range = (0.5, 0.75)
"""Of `sliding`, whose warps meet at a barrier every row: assumed, there is no published kernel like it."""

QUERIES = 128
"""Queries of a tile, of `fused` and of attention kernels."""


def rate(work: Work, device: Device, efficiency: Range) -> Range:
    """Pairs a second, low and high."""
    low, high = (1 / work.seconds(device, share) for share in efficiency)
    return low, high


def middle(of: Range) -> float:
    return math.sqrt(of[0] * of[1])


def attention(head: int, cluster: int = 1) -> Work:
    """Attention with keys and values of `head` numbers: what peers do to patches, and what published kernels do.

    Keys and values of a tile are read from L2 once for a tile of queries, or once for a `cluster` of tiles that share
    the copy, as FlashAttention-3 has it above head size 64. Instructions are not counted: where products do not bind,
    exponentials do.
    """
    return Work(exponentials=1, products=2 * head, instructions=0, l2_bytes=4 * head / (QUERIES * cluster))


# Engine `fused`.

VALUE_COLUMNS = 16  # values, their low halves and a column of ones: half floats
VALUE_PRODUCTS = 32  # columns that the second costs: wgmma reads 64 x 16 weights no faster than 32 columns take
WHOLE_ROWS, WHOLE_RUNNING = 384, 320
"""Columns up to which queries stay in registers and shared memory, with a fixed reference and a running maximum;
beyond, blocks of 64 columns."""
SOFTMAX_INSTRUCTIONS = 2.9  # of a pair and lane, where the reference log-weight is fixed
RUNNING_INSTRUCTIONS = 3.6  # more, where it is a running maximum
CUBIC_INSTRUCTIONS = 8  # more, where a polynomial takes the place of an exponential
COPY_INSTRUCTIONS, BLOCK_INSTRUCTIONS = 0.9, 0.64  # of a byte a pair brings to shared memory; rows whole, in blocks
"""Fitted to what benchmarks/compile_report.py counts, within a fifth (tests/test_cost.py)."""
PILOT = 1 / 17  # share of the tiles that are multiplied and weighed before, to fix the reference
DECISIVE = 0.08
"""Share of tiles whose weights an exact plan takes again from differences, at two instructions a number: 4 to 11% of
the tiles of CIFAR-10 and Fashion-MNIST banks of 700 and 1,000 images."""


def cubic(columns: int) -> int:
    """Of so many exponentials of a plan with a pilot one is a polynomial's, or 0: none.

    A multiprocessor of sm_90 issues eight instructions for each exponential: where products and copies leave some of
    them, one more of the polynomial's takes eight. The share keeps instructions at the exponentials' time or below.
    """
    return 4 if columns <= 128 else 8 if columns <= 256 else 0


def fused(
    columns: int,
    numbers: int = 0,
    tile: tuple[int, int] | None = None,
    whole: bool | None = None,
    pilot: bool = True,
    share: int | None = None,
) -> Work:
    """Engine `fused` at K columns; every tile evaluated, matrix products by warpgroups (sm_90).

    numbers: C k^2 where the plan is exact, else 0. pilot: the reference is fixed; never where the plan is exact.
    tile: queries x patches; the engine's first choice if not given. whole: whether rows are multiplied whole. share: of
    the polynomial (`cubic`).
    """
    pilot = pilot and not numbers
    whole = columns <= (WHOLE_ROWS if pilot else WHOLE_RUNNING) if whole is None else whole
    if tile is None:
        tile = (QUERIES, 128 if 192 < columns <= 256 and pilot else 64) if whole or numbers else (QUERIES, 128)
        tile = (2 * QUERIES, 128) if pilot and not whole else tile
    queries, patches = tile
    # Rows and values once a tile of queries; queries again for every tile of patches, where they do not stay.
    l2_bytes = 2 * (columns + VALUE_COLUMNS) / queries + (0 if whole else 2 * columns / patches)
    instructions = SOFTMAX_INSTRUCTIONS + (COPY_INSTRUCTIONS if whole else BLOCK_INSTRUCTIONS) * l2_bytes
    exponentials = 1.0
    share = cubic(columns) if share is None else share
    if not pilot:
        instructions += RUNNING_INSTRUCTIONS + 2 * DECISIVE * numbers
    elif share:
        exponentials -= 1 / share
        instructions += CUBIC_INSTRUCTIONS / share
    loop = Work(exponentials, products=columns + VALUE_PRODUCTS, instructions=instructions, l2_bytes=l2_bytes)
    return loop.scaled(1 + PILOT) if pilot else loop


class Plan(Protocol):
    """The part of a plan of `fused` that decides its cost."""

    @property
    def columns(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def pilot(self) -> bool: ...


ROWS_MULTIPLE = 128  # rows of a locked coordinate are filled up to a multiple of it
KEPT = 0.4  # share of a device's memory that rows may keep
MAKING = 3  # passes over the rows that making them takes: pixels gathered, rounded, written


def fused_seconds(device: Device, group: Group, images: int, batch: int, plan: Plan) -> float:
    """Of the pixels of one group, at the middle efficiency.

    Never the fastest where both axes are locked: a row serves no pixel but its own there, and the rows of all
    coordinates are C k^2 times the bank.
    """
    if group.rows.locked and group.cols.locked:
        return math.inf
    locked = math.prod(len(axis.queries) for axis in (group.rows, group.cols) if axis.locked)
    queries = batch * group.pixels // locked
    rows = -(-images * group.windows_per_image // ROWS_MULTIPLE) * ROWS_MULTIPLE
    tiles = -(-queries // QUERIES)
    work = fused(plan.columns, plan.size if plan.exact else 0, pilot=plan.pilot)
    computing = locked * tiles * QUERIES * rows * work.seconds(device, middle(TRITON))
    stored = 2 * (plan.columns + VALUE_COLUMNS) * locked * rows
    passes = 1 if stored <= KEPT * device.memory else 1 + MAKING
    return max(computing, passes * stored / device.memory_rate)


# Engine `sliding`, csrc/sliding: instructions of a warp for 16 queries x 4 tiles of 8 windows, counted in the machine
# code for sm_90 (benchmarks/sass.py). ROW, by values a pixel: a row of windows is weighed. SLIDE: a step of products,
# four columns of the patch, slides by one row. Where a diagonal begins, FIRST for two patch rows, BEGIN a step of them.

ROW = {1: 383, 3: 422, 4: 451}
SLIDE, FIRST, BEGIN = 44, 40, 47
TILE_QUERIES, TILE_WINDOWS, TILE_PAIRS = 16, 8, 16 * 8 * 4
STRIP, WARPS = 32, 8  # query rows of a block; its warps
FLOATS = 2  # a step of products costs so many times more for float32 banks: six products instead of three


def sliding_instructions(competition: Competition, group: Group, shape: tuple[int, int, int], floats: bool) -> float:
    """Lanes of instructions that one noisy and one training image [C, H, W] cost in a group."""
    channels, height, _ = shape
    k = competition.patch_size or 1
    values = 1 if channels == 1 else 4 if channels % 4 == 0 else 3
    steps = -(-k // 4) * -(-channels // 4) * (FLOATS if floats else 1)

    rows, cols = group.rows, group.cols
    wraps = competition.padding_mode == "circular" and len(rows.queries) == height <= STRIP and not rows.locked
    walked = begun = 0  # rows of windows, and how many of them begin a diagonal
    for first in range(0, len(rows.queries), STRIP):
        strip = min(STRIP, len(rows.queries) - first)
        if rows.locked:
            walked, begun = walked + strip, begun + min(WARPS, strip)
        else:
            windows = rows.windows_per_query
            walked, begun = walked + strip * windows, begun + (strip if wraps else strip + windows - 1)

    blocks = -(-len(cols.queries) // TILE_QUERIES)
    columns = min(TILE_QUERIES, len(cols.queries)) if cols.locked else cols.windows_per_query
    tiles = blocks * -(-columns // TILE_WINDOWS) / 4
    begin = (k + 1) // 2 * (FIRST + steps * BEGIN)
    return 32 * tiles * (walked * ROW[values] + (walked - begun) * steps * SLIDE + begun * begin)


def sliding(competition: Competition, shape: tuple[int, int, int], floats: bool = False) -> Work:
    """Engine `sliding` in the average pair of a competition; distances are of integers, its products never bind."""
    instructions = sum(sliding_instructions(competition, group, shape, floats) for group in competition.groups)
    return Work(1, 0, instructions / competition.pairs_per_image, 0)


def sliding_seconds(
    device: Device, competition: Competition, images: int, batch: int, shape: tuple[int, int, int], floats: bool = False
) -> float:
    """Of one competition, at the middle efficiency."""
    pairs = images * batch * competition.pairs_per_image
    return pairs * sliding(competition, shape, floats).seconds(device, middle(INTEGER))


# Devices.


def device_of(name: str, capability: tuple[int, int], multiprocessors: int, memory: int) -> Device:
    """The rates of a CUDA device; an unknown one gets those of an A100 or H100, scaled to its size."""
    like = A100 if capability < (9, 0) else H200 if "H200" in name else H100
    share = multiprocessors / like.multiprocessors
    rates = like.l2_rate * share, like.memory_rate * share
    return Device(name, multiprocessors, like.clock, like.products, *rates, memory)


@functools.cache
def known(device: torch.device) -> Device | None:
    """The rates of a CUDA device, or None."""
    if device.type != "cuda":
        return None
    of = torch.cuda.get_device_properties(device)
    return device_of(of.name, (of.major, of.minor), of.multi_processor_count, of.total_memory)
