"""The GPU backend of `pruned`: the same requests, constants and definition as on the CPU, in torch and Triton.

Expected weights are a matrix product of queries with the cells' coefficients; kernels.py plans each query, visits the
cells and scores listed windows; totals, trimming and variances are torch's, in float64. Draws are torch's, too,
from the request's key, so numbers are the same on every GPU up to rounding; they are other ones than the CPU's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...index import IndexedSize, Strata
from ...pixels import to_values
from ...posterior import PosteriorSum
from ..autotune import KernelError, started
from ..device import cache, cache_limit, missing_for_triton, on_device
from .naive import TILE
from .policy import Policy
from .request import KNOWN, Encoded, Request, Scanned, coefficients, encoded, least_bits
from .totals import Expected, Sample, Surely, posterior_sums

VISITS, WINDOWS = 16, 16
"""Of one product in the scan: the smallest that matrix units take, as most visits read a tile or two."""
CELLS = 256
"""Cells that a plan looks at together; times 16 scales they fill the registers of four warps."""


def warps(columns: int) -> int:
    """Of a block of the scan: with one its sums spill from the registers, with four half of each stands idle; those of
    many channels take four times the room, and Triton 3.6 and 3.9 spill some of them with two or four."""
    return 2 if columns <= 16 else 8


@functools.cache
def kernels() -> ModuleType:
    """kernels.py, with Triton imported on first use, as that import is slow."""
    from . import kernels

    return kernels


_broken: str | None = None
"""Why a kernel could not be compiled, once that happened."""


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run there, or None."""
    return missing_for_triton(device) or _broken


@dataclass(frozen=True)
class Placed:
    """One patch size of an index on a device.

    images: as stored. ids: [windows] int64, cell by cell. first: [cells] int64, where each cell's begin.
    size: [cells] fp32. facts: [cells, columns] fp32: 1, means of the values and of their second to fourth powers.
    value: [cells, C] fp32 means of the values.
    """

    images: Tensor
    ids: Tensor
    first: Tensor
    size: Tensor
    facts: Tensor
    value: Tensor
    axes: Tensor
    origin: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def placed(part: IndexedSize, device: torch.device) -> Placed | None:
    """Copied once; None where the images fill too much of the device."""
    images = on_device(part.images, device)
    if images is None:
        return None
    kept = cache.get(part, device, ("pruned",))
    if kept is not None:
        found: Placed = kept[0]
        return found
    cells = part.cells
    mean, square = cells.value.double(), cells.value_square.double()
    spread = (square - mean.square()).clamp(min=0)
    # Values are normal within a cell: naive.expected_variances.
    third = mean * (mean.square() + 3 * spread)
    fourth = mean.square() * (mean.square() + 6 * spread) + 3 * spread.square()
    facts = torch.cat([torch.ones_like(mean[:, :1]), mean, square, third, fourth], 1)
    facts = torch.nn.functional.pad(facts, (0, _power_of_two(facts.shape[1]) - facts.shape[1]))
    made = Placed(
        images.contiguous(),
        torch.tensor(part.ids).to(device),
        torch.tensor(part.starts, device=device),
        cells.size.float().to(device),
        facts.float().contiguous().to(device),
        cells.value.contiguous().to(device),
        part.axes.to(device, torch.float64),
        part.centre.to(device, torch.float64),
    )
    cache.put(part, device, ("pruned",), [made], cache_limit(device))
    return made


@dataclass(frozen=True)
class _Table:
    """[2 rank + 2, 2 cells] coefficients of expected log-weights at a noise level."""

    columns: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.columns]


def _table(part: IndexedSize, sigma: float, device: torch.device) -> Tensor:
    kept = cache.get(part, device, ("pruned", sigma))
    if kept is not None:
        found: Tensor = kept[0].columns
        return found
    strata = Strata(*(x.to(device) for x in part.cells))
    columns = coefficients(strata, sigma, len(part.centre)).permute(2, 1, 0).flatten(1).contiguous()
    cache.put(part, device, ("pruned", sigma), [_Table(columns)], cache_limit(device))
    return columns


def scan(request: Request, policy: Policy) -> Scanned | None:
    """The sums of a request, on the device of its queries.

    None where a query is too far outside the pixels' range to be compared, or the images do not fit on the device.

    Raises:
        KernelError: a kernel does not compile here.
    """
    place = placed(request.part, request.windows.device)
    queries = encoded(request.windows, request.part.images.dtype, request.sigma)
    if place is None or queries is None:
        return None
    device = request.windows.device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return _Scan(request, policy, place, queries).run()
    except KernelError as error:
        global _broken
        _broken = f"a kernel failed to compile ({error})"
        raise KernelError(_broken) from error


class _Visits(NamedTuple):
    """The visits of q queries to cells, V at most; and what is expected of their sums, None where nothing is drawn.

    cells, taken: [q, V] int32, a cell and the tiles read there. units: [q, V] fp32, 0 where the visit is sure, else the
    cell's tiles over the expected hits. number: [q] visits.
    """

    cells: Tensor
    taken: Tensor
    units: Tensor
    number: Tensor
    expected: Expected | None


class _Scan:
    """One request while it is answered, for Q queries, some q of them at a time."""

    def __init__(self, request: Request, policy: Policy, place: Placed, queries: Encoded):
        self.request, self.policy, self.place, self.queries = request, policy, place, queries
        part, device = request.part, request.windows.device
        self.count, self.channels = request.windows.shape[:2]
        self.of_bytes = part.images.dtype == torch.uint8
        kernel = kernels()
        self.none = kernel.NONE.value if self.of_bytes else kernel.NONE_FLOAT.value
        self.bits = queries.bits.float()
        self.allowed = None if request.allowed is None else request.allowed.to(device)
        self.competing = place.size
        if self.allowed is not None:
            member = self.allowed[place.ids // part.windows_per_image].long()
            sums = torch.nn.functional.pad(member.cumsum(0), (1, 0))
            self.competing = (sums[place.first + place.size.long()] - sums[place.first]).float()
        self.tiles = (place.size / TILE).ceil().long()
        remembered = request.remembered
        self.remembered = None if remembered is None else remembered.to(device)
        recalled = self.remembered is not None and bool((self.remembered >= 0).any())
        self.pilot = policy.recalled_pilot if recalled else policy.pilot
        self.table = _table(part, request.sigma, device)
        self.whole = request.budget is None or request.budget > policy.exact_budget
        scores = torch.int32 if self.of_bytes else torch.float32
        self.known = torch.full((self.count, KNOWN), -1, device=device)
        self.known_scores = torch.full((self.count, KNOWN), self.none, dtype=scores, device=device)
        self.about = torch.zeros(self.count, dtype=scores, device=device)
        self.pairs = torch.zeros(self.count, dtype=torch.int64, device=device)

    def run(self) -> Scanned | None:
        request, policy, device = self.request, self.policy, self.about.device
        budget = torch.full((self.count,), max(1.0, (request.budget or 1.0) * request.competing), device=device)
        left = torch.arange(self.count, device=device)
        fits = torch.zeros(self.count, dtype=torch.bool, device=device)
        answers: dict[str, Tensor] = {}
        if not self.whole:
            self._find_heavy(budget)
            left = left[~self._far()]
            if 2 * len(left) < self.count:  # the image gets exact sums
                return None
        plan = self._plan_whole if self.whole else self._plan
        for round_ in itertools.count():
            generator = torch.Generator().manual_seed((request.key + round_) % 2**63)
            start = torch.rand(len(self.tiles), generator=generator, dtype=torch.float64).to(device)
            climb = torch.rand(self.count, generator=generator, dtype=torch.float64).to(device)
            start = torch.minimum((start * self.tiles).long(), (self.tiles - 1).clamp(min=0)).int()
            most = self._most_visits(budget[left].amax().item())
            for some in left.split(self._together(most)):
                visits = plan(some, budget[some], climb[some], most)
                for name, x in self._sums(some, visits, start).items():
                    answers.setdefault(name, x.new_zeros(self.count, *x.shape[1:]))[some] = x
            fits[left] = answers.pop("fits")[left]
            # A rejected sample is drawn again, larger, while that takes less than an exact sum.
            left = left[~fits[left]]
            budget[left] *= policy.further
            left = left[budget[left] <= policy.further_most * request.competing]
            if not len(left):
                break
        sums = {name: x if x.ndim == 2 else x[:, None] for name, x in answers.items()}
        remembered = None if self.remembered is None else self.known.cpu()
        return Scanned(PosteriorSum(**sums, span=1.0, pairs=int(self.pairs.sum())), fits, remembered)

    def _far(self) -> Tensor:
        """[Q] bool: nothing was found near the query, or nothing at all."""
        least = least_bits(self.request, self.policy)
        heaviest = self.queries.bits * self.known_scores[:, 0].double() - self.queries.base
        return torch.where(self.known[:, 0] >= 0, heaviest < least, self.policy.known > 0)

    # How much at once.

    def _most_visits(self, budget: float) -> int:
        """Of a query with this budget: each reads a tile that the budget has, but for one by chance."""
        if self.whole:
            return len(self.tiles)
        return min(len(self.tiles), math.ceil(budget / TILE) + 16)

    def _together(self, visits: int) -> int:
        """Queries whose expected weights, and sums of so many visits, fit in the memory limit."""
        columns = self._columns()
        return max(1, self.request.memory_limit // (24 * len(self.tiles) + visits * (64 + 8 * columns + 64 * columns)))

    def _columns(self) -> int:
        """Of sums of a visit: 1, powers of the values, filled up."""
        return max(WINDOWS, _power_of_two(1 + self._powers() * self.channels))

    def _powers(self) -> int:
        return 4 if self.request.moments else 2

    # Plans.

    def _logs(self, some: Tensor) -> Tensor:
        """[q, 2, H] log2 E[w] and log2 E[w^2], in float64, as float32 products may go through TF32."""
        windows = self.request.windows[some].flatten(1).double() - self.place.origin
        features = windows @ self.place.axes
        rest = (windows.square().sum(1) - features.square().sum(1)).clamp(min=0)
        rows = torch.cat([features.square(), features, rest[:, None], torch.ones_like(rest)[:, None]], 1)
        return (rows @ self.table).float().unflatten(1, (2, -1))

    def _plan(self, some: Tensor, budget: Tensor, climb: Tensor, most: int) -> _Visits:
        device, place = some.device, self.place
        logs = self._logs(some)
        cells, taken = (torch.zeros(len(some), most, dtype=torch.int32, device=device) for _ in range(2))
        units = torch.zeros(len(some), most, device=device)
        found = torch.empty(len(some), 6, device=device)
        variances = torch.zeros(len(some), place.facts.shape[1], device=device)
        started(
            kernels().plan_kernel, (len(some),), logs, place.size, self.competing, place.facts, climb,
            ((1 - self.pilot) * budget).float(), cells, taken, units, found, variances, len(place.size),
            1 + 4 * self.channels, most, self.policy.certain_from, NF=place.facts.shape[1], BH=CELLS,
        )  # fmt: skip
        number, reference, total, sampled = found[:, :4].double().unbind(1)
        expected = Expected(reference, total, sampled, variances.double(), found[:, 4:].double())
        most = max(1, int(number.max()))  # visits read several tiles each, so there are fewer than there may be
        cells, taken, units = (x[:, :most].contiguous() for x in (cells, taken, units))
        return _Visits(cells, taken, units, number.long(), expected)

    def _plan_whole(self, some: Tensor, budget: Tensor, climb: Tensor, most: int) -> _Visits:
        """Every tile of every cell."""
        cells = self.tiles.nonzero()[:, 0]
        shape = (len(some), len(cells))
        count = torch.full((len(some),), len(cells), device=some.device)
        units = torch.zeros(shape, device=some.device)
        return _Visits(
            cells.int().expand(shape).contiguous(),
            self.tiles[cells].int().expand(shape).contiguous(),
            units,
            count,
            None,
        )

    # Known windows.

    def _find_heavy(self, budget: Tensor) -> None:
        """In the cells of the largest expected weight, then by neighbours, who propose theirs shifted by a pixel."""
        policy, place = self.policy, self.place
        share = self.pilot if policy.known else 0.0
        for some in torch.arange(self.count, device=budget.device).split(self._together(1)):
            first = self._logs(some)[:, 0].masked_fill(self.competing == 0, -torch.inf)
            best = first.topk(min(policy.pilot_cells, len(self.tiles)), 1).indices
            tiles = self.tiles[best]
            left = (share * budget[some, None] / TILE).long().clamp(min=1)
            windows = TILE * torch.minimum(tiles, (left - tiles.cumsum(1) + tiles).clamp(min=0))
            windows = torch.minimum(windows, place.size[best].long())
            ends = windows.cumsum(1)
            slot = torch.arange(int(ends[:, -1].max()), device=budget.device).expand(len(some), -1).contiguous()
            which = torch.searchsorted(ends, slot, right=True).clamp(max=best.shape[1] - 1)
            at = place.first[best.gather(1, which)] + slot - (ends - windows).gather(1, which)
            listed = torch.where(slot < ends[:, -1:], place.ids[at.clamp(max=len(place.ids) - 1)], -1)
            scores = self._scores(some, listed)
            heaviest = scores.topk(min(KNOWN, scores.shape[1]), 1)
            self._offer(some, listed.gather(1, heaviest.indices), heaviest.values)
        every = torch.arange(self.count, device=budget.device)
        if policy.known and self.remembered is not None:
            self._offer(every, self.remembered, self._scores(every, self.remembered))
        columns = self.request.columns
        for _ in range(policy.sweeps if policy.known and columns else 0):
            listed = self._proposals(self.known.view(-1, columns, KNOWN)).flatten(0, 1)
            self._offer(every, listed, self._scores(every, listed))
        seen = self.known_scores[:, 0] != self.none
        self.about = torch.where(seen, self.known_scores[:, 0], self.about)
        if policy.known == 0:
            self.known[:], self.known_scores[:] = -1, self.none

    def _proposals(self, known: Tensor) -> Tensor:
        """[rows, columns, 4 KNOWN] windows that neighbours know, moved along, which a pixel does not know; or -1."""
        part = self.request.part
        cols, per_image = len(part.cols), part.windows_per_image
        found = []
        for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            theirs = torch.full_like(known, -1)
            rows, columns = known.shape[:2]
            to = (slice(max(down, 0), rows + min(down, 0)), slice(max(right, 0), columns + min(right, 0)))
            of = (slice(max(-down, 0), rows + min(-down, 0)), slice(max(-right, 0), columns + min(-right, 0)))
            theirs[to] = known[of]
            row, col = theirs % per_image // cols + down, theirs % cols + right
            inside = (theirs >= 0) & (row >= 0) & (row < len(part.rows)) & (col >= 0) & (col < cols)
            found.append(torch.where(inside, theirs + down * cols + right, -1))
        listed = torch.cat(found, 2)
        return torch.where((listed[..., None] == known[..., None, :]).any(3), -1, listed)

    def _scores(self, some: Tensor, listed: Tensor) -> Tensor:
        """[q, n] scores of listed windows; `none` where there is none that competes."""
        scores = torch.empty(listed.shape, dtype=self.known_scores.dtype, device=listed.device)
        block = 64
        started(
            kernels().score_kernel, (len(some), math.ceil(listed.shape[1] / block)), self.place.images,
            listed.contiguous(), self._if_allowed(), self.queries.windows[some], self.queries.shift[some], scores,
            listed.shape[1], self.queries.windows.shape[1], **self._layout(), ALLOWED=self.allowed is not None,
            BW=block, BD=32,
        )  # fmt: skip
        self.pairs[some] += (listed >= 0).sum(1)
        return scores

    def _offer(self, some: Tensor, ids: Tensor, scores: Tensor) -> None:
        """Keeps the heaviest windows, each once; of equally heavy ones those that come first in the bank."""
        ids, scores = torch.cat([self.known[some], ids], 1), torch.cat([self.known_scores[some], scores], 1)
        ids, order = torch.sort(ids, dim=1, stable=True)
        scores = scores.gather(1, order)
        twice = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
        scores = scores.masked_fill(twice | (ids < 0), self.none)
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        ids = ids.gather(1, order).masked_fill(scores == self.none, -1)
        most = max(1, self.policy.known)
        self.known[some, :most], self.known_scores[some, :most] = ids[:, :most], scores[:, :most]

    # Sums.

    def _sums(self, some: Tensor, visits: _Visits, start: Tensor) -> dict[str, Tensor]:
        """What a query's visits add up to: its posterior sums, and whether they are reliable (`fits`)."""
        read, place = self._read(some, visits, start), self.place
        bits, known = self.queries.bits[some, None], self.known[some]
        known_scores, top = self.known_scores[some].double(), read.top.double()
        there = torch.arange(top.shape[1], device=top.device) < visits.number[:, None]
        visited = there & (read.top != self.none)
        # Weights are relative to the heaviest window of a query.
        best = torch.maximum(
            torch.where(visited, top, -torch.inf).amax(1), torch.where(known >= 0, known_scores, -torch.inf)[:, 0]
        )
        best = torch.where(best == -torch.inf, 0.0, best)[:, None]
        lift = torch.where(visited, torch.exp2(((top - best) * bits).clamp(max=0)), 0.0)
        cells = visits.cells.long()
        tiles, taken = self.tiles[cells].double(), visits.taken.double()
        # Windows of a visit, but for those that the last tile lacks.
        last = start[cells].double() + taken >= tiles
        n = TILE * taken - torch.where(last, TILE * tiles - place.size[cells].double(), 0.0)
        n = torch.where(there, n, 0.0)
        chance = visited & (visits.units > 0)
        factor = torch.where(chance, visits.units.double(), tiles / taken.clamp(min=1))
        within = factor.square() * (1 - taken / tiles.clamp(min=1)) * n / (n - 1).clamp(min=1)
        w, w2 = read.sums[:, :, 0].double() * lift[..., None], read.sums[:, :, 1].double() * lift.square()[..., None]
        logs = None
        if self.request.moments:
            wx, w2x, w2x2 = (read.logs.double() * torch.stack([lift, lift.square(), lift.square()], 2)).unbind(2)
            shift = (self.about[some, None].double() - best) * bits
            wx, w2x, w2x2 = (
                wx + shift * w[..., 0],
                w2x + shift * w2[..., 0],
                w2x2 + 2 * shift * w2x + shift.square() * w2[..., 0],
            )
            logs = torch.stack([wx, w2x, w2x2], 2)
        sample = Sample(
            n, factor, chance, torch.where(visited & ~chance & (n > 1), within, 0.0), torch.minimum(w[..., 0], lift),
            w, w2, logs, place.value.double()[cells],
        )  # fmt: skip
        x = torch.where(known >= 0, (known_scores - best) * bits, -torch.inf)
        surely = Surely(torch.exp2(x), x, self._values(known))
        m = (bits * best)[:, 0] - self.queries.base[some]
        found, fits = posterior_sums(sample, surely, visits.expected, m, self.policy)
        self.pairs[some] += n.sum(1).long()
        if self.policy.known:
            met = read.top.topk(min(KNOWN, read.top.shape[1]), 1)
            self._offer(some, read.top_ids.gather(1, met.indices), met.values)
        return found | {"fits": fits}

    def _read(self, some: Tensor, visits: _Visits, start: Tensor) -> _Read:
        """The sums of every visit, cell by cell, so that the visits of a cell share what is read."""
        device, place, most = some.device, self.place, visits.cells.shape[1]
        slots = (torch.arange(most, device=device) < visits.number[:, None]).flatten().nonzero()[:, 0]
        cells, taken = visits.cells.flatten()[slots].long(), visits.taken.flatten()[slots].long()
        # Those of a cell that read the most tiles first.
        key = (cells << 31 | (2**31 - 1 - taken)).sort(stable=True)
        order, cells = slots[key.indices], cells[key.indices]
        begin = torch.searchsorted(cells, torch.arange(len(self.tiles) + 1, device=device))
        blocks = (begin.diff() + VISITS - 1) // VISITS
        ends = blocks.cumsum(0)
        count = int(ends[-1])
        cell = torch.repeat_interleave(blocks, output_size=count)
        first = begin[cell] + VISITS * (torch.arange(count, device=device) - (ends - blocks)[cell])
        held = (begin[cell + 1] - first).clamp(max=VISITS)
        columns = self._columns()
        shape = (len(some), most)
        sums = torch.zeros(*shape, 2, columns, device=device)
        logs = torch.zeros(*shape, 3, device=device) if self.request.moments else sums
        top = torch.full(shape, self.none, dtype=self.known_scores.dtype, device=device)
        top_ids = torch.full(shape, -1, device=device)
        known = self.known[some]
        lightest = self.known_scores[some].masked_fill(known < 0, _largest(top.dtype)).amin(1)
        if not self.of_bytes:  # what a score of the same window may be where its terms are added in another order
            lightest = torch.where(lightest < 0, lightest * 1.00001, lightest)
        if count:
            started(
                kernels().scan_kernel, (count,), place.images, place.ids, place.first, place.size, start, place.value,
                self._if_allowed(), self.queries.windows[some], self.queries.shift[some], self.bits[some], known,
                lightest, self.about[some], visits.taken, order, cell.int(), first, held.int(), sums, logs, top,
                top_ids, most, self.queries.windows.shape[1], **self._layout(), POWERS=self._powers(), NV=columns,
                ALLOWED=self.allowed is not None, MOMENTS=self.request.moments, KNOWN=KNOWN, BV=VISITS, BW=WINDOWS,
                BD=32, num_warps=warps(columns),
            )  # fmt: skip
        return _Read(sums, logs, top, top_ids)

    def _layout(self) -> dict[str, Any]:
        """How windows lie in the images."""
        part, (_, channels, height, width) = self.request.part, self.place.images.shape
        return {
            "per_image": part.windows_per_image,
            "cols": len(part.cols),
            "width": width,
            "plane": height * width,
            "C": channels,
            "K": part.k,
            "BYTES": self.of_bytes,
        }

    def _if_allowed(self) -> Tensor:
        return self.place.ids if self.allowed is None else self.allowed

    def _values(self, ids: Tensor) -> Tensor:
        """[q, n, C] float64 centre pixels of windows; of none, those of the first."""
        part, images = self.request.part, self.place.images
        ids = ids.clamp(min=0)
        place = ids % part.windows_per_image
        cols, r = len(part.cols), part.k // 2
        return to_values(images[ids // part.windows_per_image, :, place // cols + r, place % cols + r]).double()


class _Read(NamedTuple):
    """sums: [q, V, 2, columns] of w and w^2 over the windows of a visit, times powers of values about the cell's mean;
    logs: [q, V, 3] of w x, w^2 x and w^2 x^2, with x in bits about `_Scan.about`. Weights are relative to the visit's
    heaviest window, whose score and number are top and top_ids [q, V]."""

    sums: Tensor
    logs: Tensor
    top: Tensor
    top_ids: Tensor


def _largest(dtype: torch.dtype) -> float:
    return torch.iinfo(dtype).max if dtype == torch.int32 else torch.finfo(dtype).max


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
