"""What the Triton kernels of `pruned` compute, in plain torch and float64: the same arguments, the same outputs."""

import math
from unittest import mock

import torch
from torch.nn import functional

from patchscore.engines.pruned import gpu, naive
from patchscore.pixels import to_values

NONE, NONE_FLOAT = -(2**30), -3e38


class Constant:
    """As tl.constexpr has it."""

    def __init__(self, value):
        self.value = value


class Kernel:
    """Started as Triton's are: kernel[grid](...)."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return self.function


def plan(logs, size, competing, facts, climb, budget, cells, taken, units, found, model, n_cells, n_facts, most,
         certain_from, NF, BH):  # fmt: skip
    share = (competing / size.clamp(min=1)).double()
    size = size.double()
    tiles = (size / naive.TILE).ceil()
    for q in range(len(logs)):
        reference = logs[q, 0, competing > 0].max().double()
        relative = (logs[q].double() - torch.tensor([[1.0], [2.0]]) * reference) * math.log(2)
        first, second = relative + share.log()
        sure, chance = naive.size_measures(size, first, second)
        sure, chance = sure * (share > 0), chance * (share > 0)
        windows = naive.allocation(size, sure, chance, float(budget[q]))
        surely = (chance > 0) & (windows > 0.999 * naive.TILE)
        read = torch.where(
            (windows >= certain_from * size) | (tiles <= 2),
            tiles,
            torch.minimum(tiles, (windows / naive.TILE).ceil().clamp(min=2)),
        )
        hits = torch.where((chance > 0) & ~surely, windows / naive.TILE, 0.0)
        climbed = climb[q] + functional.pad(hits.cumsum(0), (1, 0))
        visited = surely | (climbed[1:].floor() > climbed[:-1].floor())
        at = visited.nonzero()[:most, 0]
        cells[q, : len(at)] = at.int()
        taken[q, : len(at)] = torch.where(surely, read, 1.0)[at].int()
        units[q, : len(at)] = torch.where(surely, 0.0, tiles / hits.clamp(min=1e-30))[at].float()
        expected = size * first.exp()
        within = sure.square() / windows.clamp(min=1e-30) * (1 - windows / size.clamp(min=1)).clamp(min=0)
        between = (expected.square() + sure.square() / naive.TILE) * (1 - hits).clamp(min=0) / hits.clamp(min=1e-30)
        of_sure = sure.square() * (1 - read / tiles.clamp(min=1)) / (read.clamp(min=1) * naive.TILE)
        variance = torch.where(surely, of_sure, torch.maximum(between, within)) * (chance > 0)
        model[q, :n_facts] = (variance @ facts.double())[:n_facts].float()
        first, second = logs[q].double()
        second = torch.minimum(second, 2 * first + size.clamp(min=1).log2())
        log = math.log(2) * (1.5 * second - 2 * first)
        spread = log.square() + math.log(2) * (second - 2 * first).clamp(min=0)
        rest = (expected * ~(surely & (read == tiles))).sum()
        found[q] = torch.stack([
            torch.tensor(len(at)).double(), reference, expected.sum(), rest,
            (variance * torch.where(variance > 0, log, 0.0)).sum(),
            (variance * torch.where(variance > 0, spread, 0.0)).sum(),
        ])  # fmt: skip


def pixels(images, ids, per_image, cols, k):
    """[..., C, k, k] of the windows with these numbers."""
    place = ids % per_image
    at = torch.arange(k)
    row, col = (place // cols)[..., None, None] + at[:, None], (place % cols)[..., None, None] + at
    found = images[(ids // per_image)[..., None, None], :, row, col]  # [..., k, k, C]
    return found.movedim(-1, -3)


def score(of, q, shift):
    """Of windows [..., D] with queries [..., D]."""
    if of.dtype == torch.uint8:
        p, q = of.long() - 128, q.long()
        return (p * q).sum(-1) - (p.square().sum(-1) << shift.long())
    return -(of.double() - q.double()).square().sum(-1)


def scan(images, ids, first, size, start, centre, allowed, windows, shift, bits, known, least, about, taken, order,
         block_cell, block_first, block_visits, sums, logs, top, top_id, most, n_values, per_image, cols, width, plane,
         C, K, POWERS, NV, BYTES, ALLOWED, MOMENTS, KNOWN, BV, BW, BD, num_warps):  # fmt: skip
    none = NONE if BYTES else NONE_FLOAT
    cell = torch.repeat_interleave(block_cell.long(), block_visits.long())
    rank = torch.arange(len(cell)) - torch.repeat_interleave(block_visits.cumsum(0) - block_visits, block_visits.long())
    visit = order[torch.repeat_interleave(block_first, block_visits.long()) + rank]
    for some in torch.arange(len(cell)).split(256):
        _visits(images, ids, first, size, start, centre, allowed if ALLOWED else None, windows[:, : C * K * K], shift,
                bits, known, about, taken, cell[some], visit[some] // most, visit[some] % most, sums, logs, top, top_id,
                none, per_image, cols, K, POWERS, MOMENTS)  # fmt: skip


def _visits(images, ids, first, size, start, centre, allowed, windows, shift, bits, known, about, taken, c, q, place,
            sums, logs, top, top_id, none, per_image, cols, K, POWERS, MOMENTS):  # fmt: skip
    """Of cells c [V], by queries q, which keep them at `place`."""
    tiles = (size[c] / naive.TILE).ceil().long()[:, None]
    number = taken[q, place][:, None]
    lane = torch.arange(naive.TILE * int(number.max()))
    at = (start[c][:, None] + lane // naive.TILE) % tiles * naive.TILE + lane % naive.TILE
    seen = (lane // naive.TILE < number) & (at < size[c][:, None])
    members = ids[torch.where(seen, first[c][:, None] + at, 0)]  # [V, lanes]
    if allowed is not None:
        seen &= allowed[members // per_image] > 0
    seen &= (members[..., None] != known[q][:, None]).all(2)
    window = pixels(images, members, per_image, cols, K)
    t = score(window.flatten(2), windows[q][:, None], shift[q][:, None])
    t = torch.where(seen & (t > none), t, none)
    best = t.amax(1)
    top[q, place] = best.to(top.dtype)
    top_id[q, place] = torch.where((t == best[:, None]) & (t > none), members, -1).amax(1)
    w = torch.where(t > none, torch.exp2((t - best[:, None]).double() * bits[q][:, None]), 0.0)
    value = to_values(window[..., K // 2, K // 2]).double() - centre[c][:, None]
    columns = torch.cat([torch.ones_like(value[..., :1]), *(value**p for p in range(1, POWERS + 1))], 2)
    for i, power in enumerate((w, w.square())):
        sums[q, place, i, : columns.shape[2]] = (power[:, None] @ columns)[:, 0].float()
    if MOMENTS:
        x = torch.where(t > none, (t - about[q][:, None]).double() * bits[q][:, None], 0.0)
        of_logs = torch.stack([(w * x).sum(1), (w**2 * x).sum(1), (w * x).square().sum(1)], 1)
        logs[q, place] = of_logs.float()


def scores(images, listed, allowed, windows, shift, out, n_listed, n_values, per_image, cols, width, plane, C, K,
           BYTES, ALLOWED, BW, BD):  # fmt: skip
    there = listed >= 0
    if ALLOWED:
        there &= allowed[listed.clamp(min=0) // per_image] > 0
    seen = pixels(images, listed.clamp(min=0), per_image, cols, K).flatten(2)
    found = score(seen, windows[:, None, : C * K * K], shift[:, None])
    out.copy_(torch.where(there, found, NONE if BYTES else NONE_FLOAT))


class Kernels:
    NONE, NONE_FLOAT = Constant(NONE), Constant(NONE_FLOAT)
    plan_kernel, scan_kernel, score_kernel = Kernel(plan), Kernel(scan), Kernel(scores)


def plain_kernels():
    """A context in which the GPU backend starts these in place of Triton's."""
    return mock.patch.object(gpu, "kernels", return_value=Kernels)
