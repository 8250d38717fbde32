"""The kernels of engine `pruned` on the GPU: which windows a query takes, their sums, and a sample for a second look.

A query takes a prefix of some cells, of the families that matter to it. Takers are sorted by cell, so that a tile of
windows is read once for a block of queries; each (cell, query) pair, an item, leaves its sums in a place of its own,
and a last kernel adds the items of a query in order: no atomics, the same numbers every time. Names: o_ offsets, p_
pointers, b_ blocks, m_ masks; a comment gives each block's shape, BQ queries, BP windows, BC cells, BI items, K axes.
Log-weights are in bits (base 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..fused.kernel import HEADROOM

SIBLINGS = tl.constexpr(16)
"""Cells of a family, as the index has them."""
LEAST = tl.constexpr(-1e30)
"""A log-weight below all others, and finite."""
BELOW = tl.constexpr(-120.0)
"""Log-weights so far below the largest are taken for this: float32 ends soon after."""
SURE = tl.constexpr(1.5e-4)
"""Cells so few bits below the one of which most is expected are looked into for sure."""
MOST_FORESEEN = tl.constexpr(4.0)
"""Weight foreseen of other cells, in units of what sure ones hold: beyond, foresight is no guide."""
SQUARES = tl.constexpr(0.0078125)
"""Weights are squared in units of 2^7: half floats then hold the square of 2^HEADROOM."""
COUNT_UNIT = tl.constexpr(1024.0)
"""The column of 1 / count is in units of this, so that half floats hold it for counts of millions."""


@triton.jit(do_not_specialize=["n_parents"])
def foresee_kernel(
    q,  # [Q, K] fp32, features, then their squares
    weights,  # [parents, K, 2 SIBLINGS] fp32: of a family's cells, to expect; to score
    constant,  # [parents, 2 SIBLINGS] fp32
    block_key,  # [blocks] int32, parents; blocks past the end have one past the last
    block_first,  # [blocks] int64, of the sorted slots
    block_end,  # [blocks] int64, where the slots of the parent end
    slot,  # [slots] int64, (query, family) pairs sorted by parent
    query,  # [slots] int32
    foreseen,  # [slots, 2 SIBLINGS] fp32, out: log-weights to expect of the cells' windows; what shares go by
    n_parents,
    K: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
):
    """What is to be expected of a family's cells: Gaussian kernels over Gaussian cells, quadratic in the features."""
    block = tl.program_id(0)
    parent = tl.load(block_key + block)
    if parent >= n_parents:
        return
    start = tl.load(block_first + block)
    end = tl.load(block_end + block)
    o_i = start + tl.arange(0, BQ)  # [BQ]
    b_slot = tl.load(slot + tl.minimum(o_i, end - 1))
    b_query = tl.load(query + b_slot).to(tl.int64)
    o_k, o_c = tl.arange(0, BK), tl.arange(0, 2 * SIBLINGS)
    p_q = q + b_query[:, None] * K + o_k[None, :]
    p_w = weights + parent.to(tl.int64) * (K * 2 * SIBLINGS) + o_k[:, None] * (2 * SIBLINGS) + o_c[None, :]
    b_l = tl.zeros([BQ, 2 * SIBLINGS], tl.float32)
    for k in range(0, K, BK):
        # Logs of thousands of bits, to a fraction of one: products of full float32.
        b_l = tl.dot(tl.load(p_q + k), tl.load(p_w + k * (2 * SIBLINGS)), b_l, input_precision="ieee")
    b_l += tl.load(constant + parent * (2 * SIBLINGS) + o_c)[None, :]
    tl.store(foreseen + b_slot[:, None] * (2 * SIBLINGS) + o_c[None, :], b_l, mask=(o_i < end)[:, None])


@triton.jit
def _candidates(foreseen, family, n, first_slot, c, cells, BC: tl.constexpr):
    """[BC] cells c .. c + BC of a query's families: which, how many windows, log-weight to expect, score."""
    o_c = c + tl.arange(0, BC)
    m_c = o_c < cells
    o_slot = first_slot + o_c // SIBLINGS
    b_cell = tl.load(family + o_slot, mask=m_c, other=0) * SIBLINGS + o_c % SIBLINGS
    b_n = tl.load(n + b_cell, mask=m_c, other=0.0)
    p_l = foreseen + o_slot * (2 * SIBLINGS) + o_c % SIBLINGS
    b_expected = tl.load(p_l, mask=m_c, other=LEAST)
    b_score = tl.load(p_l + SIBLINGS, mask=m_c, other=LEAST)
    return b_cell, b_n, b_expected, b_score


@triton.jit
def _below(b_l, top):
    """Relative to the largest; what is expected of an empty cell means nothing, and must not be larger."""
    return tl.minimum(tl.maximum(b_l - top, BELOW), 0.0)


@triton.jit
def _prefixes(b_l, m_sure, b_n, t, floor, carry, QUANTUM: tl.constexpr):
    """[BC] windows taken of each cell, the chance that any are, and the running sum of chances modulo 1.

    The share of a cell is 2^(l + t) between `floor` and 1. What it comes to in groups of QUANTUM windows is rounded up
    or down by systematic sampling: a group more is drawn wherever the running sum passes an integer. Of a sure cell
    there is one at least.
    """
    b_share = tl.minimum(tl.maximum(tl.exp2(b_l + t), floor), 1.0)
    b_want = b_n * b_share
    b_group = tl.maximum(tl.minimum(b_n, QUANTUM), 1.0)
    m_whole = (b_share >= 1.0) | ((b_n > QUANTUM) & (b_want >= b_n - QUANTUM // 2))
    b_groups = tl.where(m_whole | (b_n == 0), 0.0, tl.maximum(b_want / b_group, tl.where(m_sure, 1.0, 0.0)))
    b_fraction = b_groups - tl.floor(b_groups)
    b_sum = carry + tl.cumsum(b_fraction, 0)
    m_drawn = b_sum - tl.floor(b_sum) < b_fraction
    b_drawn = tl.minimum(b_n, (tl.floor(b_groups) + m_drawn.to(tl.float32)) * b_group)
    b_take = tl.where(m_whole, b_n, b_drawn)
    b_chance = tl.where(m_whole, 1.0, tl.minimum(b_groups, 1.0))
    carry += tl.sum(b_fraction)
    return b_take, b_chance, carry - tl.floor(carry)


@triton.jit(do_not_specialize=["n_queries"])
def allocate_kernel(
    foreseen,  # as above
    family,  # [slots] int32, the parents that a query looks under
    n,  # [cells] fp32, competing windows
    first_slot,  # [Q] int64, where the slots of a query begin
    n_slots,  # [Q] int32, and how many they are
    wanted,  # [Q] fp32, windows to take
    floor,  # [Q] fp32, least share of any cell
    luck,  # [Q] fp32 in (0, 1)
    level,  # [3, Q] fp32, out: the largest log-weight expected; the largest score; t
    counts,  # [3, Q] int32, out: items, tiles of their windows, windows
    n_queries,
    QUANTUM: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Finds the t at which shares min(1, max(floor, 2^(score - best + t))) add up to what is wanted; counts draws."""
    query = tl.program_id(0)
    slots = tl.load(first_slot + query)
    cells = tl.load(n_slots + query) * SIBLINGS
    least = tl.load(floor + query)
    b_top = tl.full([BC], LEAST, tl.float32)
    b_best = tl.full([BC], LEAST, tl.float32)
    b_all = tl.zeros([BC], tl.float32)
    for c in range(0, cells, BC):
        _, b_n, b_expected, b_score = _candidates(foreseen, family, n, slots, c, cells, BC)
        b_top = tl.maximum(b_top, tl.where(b_n > 0, b_expected, LEAST))
        b_best = tl.maximum(b_best, tl.where(b_n > 0, b_score, LEAST))
        b_all += b_n
    top, best = tl.max(b_top), tl.max(b_best)
    # At least two groups, so that there is something to go by.
    all_windows = tl.sum(b_all)
    goal = tl.minimum(all_windows, tl.maximum(tl.load(wanted + query), 2.0 * QUANTUM))

    # Newton's steps on t, or the middle of the bracket where they leave it.
    t = top * 0.0
    low, high = t - 128.0, t + 128.0
    step = 0
    going = True
    while going:
        b_taken = tl.zeros([BC], tl.float32)
        b_rising = tl.zeros([BC], tl.float32)
        for c in range(0, cells, BC):
            _, b_n, _, b_score = _candidates(foreseen, family, n, slots, c, cells, BC)
            b_raw = tl.exp2(_below(b_score, best) + t)
            b_taken += b_n * tl.minimum(tl.maximum(b_raw, least), 1.0)
            b_rising += tl.where((b_raw > least) & (b_raw < 1.0), b_n * b_raw, 0.0)
        missing = goal - tl.sum(b_taken)
        low = tl.where(missing > 0, t, low)
        high = tl.where(missing > 0, high, t)
        next_t = t + 1.4426950408889634 * missing / tl.maximum(tl.sum(b_rising), 1e-30)
        next_t = tl.where((next_t > low) & (next_t < high), next_t, 0.5 * (low + high))
        step += 1
        going = (tl.abs(missing) > 2e-3 * goal) & (step < 32)
        t = tl.where(going, next_t, t)

    carry = tl.load(luck + query)
    b_items = tl.zeros([BC], tl.int32)
    b_tiles = tl.zeros([BC], tl.int32)
    b_windows = tl.zeros([BC], tl.int32)
    for c in range(0, cells, BC):
        _, b_n, b_expected, b_score = _candidates(foreseen, family, n, slots, c, cells, BC)
        m_sure = b_expected >= top - SURE
        b_take, _, carry = _prefixes(_below(b_score, best), m_sure, b_n, t, least, carry, QUANTUM)
        b_items += (b_take > 0).to(tl.int32)
        b_tiles += (b_take.to(tl.int32) + BP - 1) // BP
        b_windows += b_take.to(tl.int32)
    tl.store(level + query, top)
    tl.store(level + n_queries + query, best)
    tl.store(level + 2 * n_queries + query, t)
    tl.store(counts + query, tl.sum(b_items))
    tl.store(counts + n_queries + query, tl.sum(b_tiles))
    tl.store(counts + 2 * n_queries + query, tl.sum(b_windows))


@triton.jit(do_not_specialize=["n_queries"])
def list_kernel(
    foreseen,
    family,
    n,
    first_slot,
    n_slots,
    floor,
    luck,
    level,  # all as above
    moments,  # [cells, NM] fp32: 1, mean of the values, mean of their squares, zeros
    first_item,  # [Q + 1] int64
    cell,  # [items] int32, out
    take,  # [items] int32, out: windows of the prefix
    factor,  # [items] fp32, out: windows that a taken one stands for
    chance,  # [items] fp32, out: that the cell was drawn at all
    share,  # [items] fp32, out: weight foreseen of a cell taken by chance, relative to 2^top; 0 of a sure one
    promising,  # [Q] int64, out: the sure item of which most is expected
    sure,  # [Q] fp32, out: weight foreseen of sure cells
    far,  # [Q, NM] fp32, out: weight foreseen of the others, times moments
    unseen,  # [Q, NM] fp32, out: variance that the cells' moments expect of what is not taken, relative to 2^(2 top)
    n_queries,
    QUANTUM: tl.constexpr,
    NM: tl.constexpr,
    BC: tl.constexpr,
):
    """Lists the items that `allocate_kernel` counted, and adds up what is foreseen."""
    query = tl.program_id(0)
    o_m = tl.arange(0, NM)
    slots = tl.load(first_slot + query)
    cells = tl.load(n_slots + query) * SIBLINGS
    least = tl.load(floor + query)
    top = tl.load(level + query)
    best = tl.load(level + n_queries + query)
    t = tl.load(level + 2 * n_queries + query)
    carry = tl.load(luck + query)
    at = tl.load(first_item + query)
    end = tl.load(first_item + query + 1)
    most, most_at = top * 0.0 + 2 * LEAST, at
    b_sure = tl.zeros([BC], tl.float32)
    b_far = tl.zeros([NM], tl.float32)
    b_unseen = tl.zeros([NM], tl.float32)
    for c in range(0, cells, BC):
        b_cell, b_n, b_expected, b_score = _candidates(foreseen, family, n, slots, c, cells, BC)
        m_sure = b_expected >= top - SURE
        b_take, b_chance, carry = _prefixes(_below(b_score, best), m_sure, b_n, t, least, carry, QUANTUM)
        b_weight = b_n * tl.exp2(_below(b_expected, top))  # [BC]
        m_taken = b_take > 0
        m_chance = b_chance < 1.0
        b_at = at + tl.cumsum(m_taken.to(tl.int32), 0) - 1  # [BC]
        # `allocate_kernel` counted with the same scan, in the same layout (a test holds that); were it to count less,
        # the next query's items would be overwritten.
        m_at = m_taken & (b_at < end)
        tl.store(cell + b_at, b_cell, mask=m_at)
        tl.store(take + b_at, b_take.to(tl.int32), mask=m_at)
        tl.store(factor + b_at, b_n / (tl.maximum(b_take, 1.0) * b_chance), mask=m_at)
        tl.store(chance + b_at, b_chance, mask=m_at)
        tl.store(share + b_at, tl.where(m_chance, b_weight, 0.0), mask=m_at)
        b_mass = tl.where(m_taken & (b_chance >= 1.0), tl.log2(b_weight), 2 * LEAST)
        mass = tl.max(b_mass)
        # Of several as good, the first.
        mass_at = tl.min(tl.where(b_mass == mass, b_at, 2147483647))
        most_at = tl.where(mass > most, mass_at, most_at)
        most = tl.maximum(most, mass)
        b_sure += tl.where(m_chance, 0.0, b_weight)
        # N^2 (1 - f) / n E[w^2], and where cells are taken by chance as much again as their rarity.
        b_seen = tl.maximum(tl.where(m_taken, b_take, tl.minimum(b_n, QUANTUM)), 1.0) * b_chance
        b_missed = tl.where(b_n > 0, b_n * tl.maximum(b_n / tl.maximum(b_seen, 1e-30) - 1, 0.0), 0.0)
        b_bits = 4 * (b_score - 0.5 * b_expected) - 2 * top  # of E[w^2]; the score is its geometric mean with E[w]
        b_square = b_missed * tl.exp2(tl.minimum(tl.maximum(b_bits, BELOW), 60.0))
        m_c = (c + tl.arange(0, BC)) < cells
        b_moments = tl.load(moments + b_cell[:, None] * NM + o_m[None, :], mask=m_c[:, None], other=0.0)  # [BC, NM]
        b_far += tl.sum(tl.where(m_chance, b_weight, 0.0)[:, None] * b_moments, 0)
        b_unseen += tl.sum(b_square[:, None] * b_moments, 0)
        at += tl.sum(m_taken.to(tl.int32))
    tl.store(promising + query, most_at.to(tl.int64))
    tl.store(sure + query, tl.sum(b_sure))
    tl.store(far + query * NM + o_m, b_far)
    tl.store(unseen + query * NM + o_m, b_unseen)


@triton.jit
def _products(b_qa, b_qb, p, b_o, KA: tl.constexpr, KB: tl.constexpr):
    """[BQ, BP] query rows times window rows; the columns come in two blocks, as sizes of blocks are powers of two."""
    b_pa = tl.load(p + b_o[None, :] * (KA + KB) + tl.arange(0, KA)[:, None])  # [KA, BP]
    b_l = tl.dot(b_qa, b_pa)  # [BQ, BP]
    if KB:
        b_pb = tl.load(p + b_o[None, :] * (KA + KB) + (KA + tl.arange(0, KB))[:, None])  # [KB, BP]
        b_l = tl.dot(b_qb, b_pb, b_l)
    return b_l


@triton.jit
def _windows(i, count, size, turn, first, order, BP: tl.constexpr, ORDERED: tl.constexpr):
    """[BP] rows of the windows i .. i + BP of a prefix of `count`, which begins at `turn` and wraps around its cell."""
    o_p = turn + tl.minimum(i + tl.arange(0, BP), count - 1)
    b_o = first + tl.where(o_p >= size, o_p - size, o_p)
    if ORDERED:
        b_o = tl.load(order + b_o)
    return b_o.to(tl.int64)


@triton.jit(do_not_specialize=["first_cell", "end_cell"])
def scan_kernel(
    q,  # [Q, K] fp16, features, then ones where p has its bias
    p,  # [windows, K] fp16, features, then -|p|^2 / 2 in three parts
    log_count,  # [windows] fp32, bits of how many windows one stands for; only where COUNTED
    v,  # [windows, NV] fp16: 1, COUNT_UNIT / count, values, their low halves, their squares, zeros
    order,  # int32, the competing windows cell by cell; only where ORDERED
    cell_first,  # [cells] int64, where a cell's windows begin (in order, where ORDERED)
    cell_size,  # [cells] int32, competing windows
    cell_turn,  # [cells] int32, where prefixes begin
    block_key,  # [blocks] int32, cells; blocks past the end have one past the last
    block_first,  # [blocks] int64, of the sorted items
    block_end,  # [blocks] int64, where the items of the cell end
    item,  # [items] int64, items sorted by cell, and inside by falling take
    query,  # [items] int32
    take,  # [items] int32
    first_tile,  # [items] int64
    reference,  # [Q] fp32, log-weights to begin with
    sums,  # [items, NV] fp32, out: sums of weights times v
    squares,  # [items, NV] fp32, out: sums of squared weights times v, in units of SQUARES^-2
    top,  # [items] fp32, out: the log-weight that both are relative to
    tile_sums,  # [tiles] fp32, out: bits of the weights of each tile of windows
    first_cell,  # the cells whose windows p and v hold
    end_cell,
    bits,  # log2(e) / sigma^2, bits a unit of product
    floor,  # bits above the reference under which a weight cannot be seen
    KA: tl.constexpr,
    KB: tl.constexpr,
    NV: tl.constexpr,
    BQ: tl.constexpr,
    BP: tl.constexpr,
    COUNTED: tl.constexpr,
    ORDERED: tl.constexpr,
    PILOT: tl.constexpr,  # only `top` is wanted
):
    """Sums of a block of a cell's items over the prefixes of the cell's windows that they take."""
    block = tl.program_id(0)
    cell = tl.load(block_key + block)
    if (cell < first_cell) | (cell >= end_cell):
        return
    # Items past the last repeat it, and are not stored.
    start = tl.load(block_first + block)
    end = tl.load(block_end + block)
    o_i = start + tl.arange(0, BQ)  # [BQ]
    m_i = o_i < end
    b_item = tl.load(item + tl.minimum(o_i, end - 1))  # [BQ]
    b_take = tl.load(take + b_item)
    most = tl.max(b_take)
    least = tl.min(b_take)
    b_query = tl.load(query + b_item).to(tl.int64)
    b_tile = tl.load(first_tile + b_item)
    p_q = q + b_query[:, None] * (KA + KB)
    b_qa = tl.load(p_q + tl.arange(0, KA)[None, :])  # [BQ, KA]
    b_qb = tl.load(p_q + KA + tl.arange(0, KB)[None, :]) if KB else b_qa  # [BQ, KB]
    size = tl.load(cell_size + cell)
    turn = tl.load(cell_turn + cell)
    first = tl.load(cell_first + cell)
    o_v = tl.arange(0, NV)
    unit = 1.0 / bits
    b_m = tl.load(reference + b_query)  # [BQ]
    b_sums = tl.zeros([BQ, NV], tl.float32)
    b_squares = tl.zeros([BQ, NV], tl.float32)
    for i in range(0, most, BP):
        b_o = _windows(i, most, size, turn, first, order, BP, ORDERED)  # [BP]
        b_l = _products(b_qa, b_qb, p, b_o, KA, KB)  # [BQ, BP], in units of sigma^2
        if COUNTED:
            b_l += (tl.load(log_count + b_o) * unit)[None, :]
        if i + BP > least:
            b_l = tl.where((i + tl.arange(0, BP))[None, :] < b_take[:, None], b_l, float("-inf"))
        b_top = tl.max(b_l, 1) * bits  # [BQ]
        if PILOT:
            b_m = tl.maximum(b_m, b_top - HEADROOM)
        else:
            b_weight = tl.full([BQ], float("-inf"), tl.float32)
            # One answer for the whole tile: can any of its weights still be seen beside the largest so far?
            if tl.max(b_top - b_m) > floor:
                b_new = tl.maximum(b_m, b_top - HEADROOM)
                b_fade = tl.exp2(b_m - b_new)
                b_m = b_new
                b_w = tl.exp2(b_l * bits - b_m[:, None]).to(tl.float16)  # [BQ, BP]
                b_v = tl.load(v + b_o[:, None] * NV + o_v[None, :])  # [BP, NV]
                # Matrix units truncate what they accumulate: a tile's sum starts at zero and is added in float32.
                b_part = tl.dot(b_w, b_v)  # [BQ, NV]
                b_sums = b_sums * b_fade[:, None] + b_part
                b_w = b_w * SQUARES  # stays in half floats
                b_squares = b_squares * (b_fade * b_fade)[:, None] + tl.dot(b_w * b_w, b_v)
                b_weight = b_m + tl.log2(tl.sum(tl.where(o_v[None, :] == 0, b_part, 0.0), 1))
            tl.store(tile_sums + b_tile + i // BP, b_weight, mask=m_i & (i < b_take))
    if not PILOT:
        tl.store(sums + b_item[:, None] * NV + o_v[None, :], b_sums, mask=m_i[:, None])
        tl.store(squares + b_item[:, None] * NV + o_v[None, :], b_squares, mask=m_i[:, None])
    tl.store(top + b_item, b_m, mask=m_i)


@triton.jit(do_not_specialize=["n_queries"])
def sum_kernel(
    sums,  # [items, NV] fp32
    squares,  # [items, NV] fp32
    top,  # [items] fp32
    cell,  # [items] int32
    take,  # [items] int32
    factor,  # [items] fp32
    chance,  # [items] fp32
    share,  # [items] fp32, as in list_kernel
    moments,  # [cells, NM] fp32, as in list_kernel
    sure,  # [Q] fp32
    far,  # [Q, NM] fp32, of all that is not sure
    first_item,  # [Q + 1] int64
    reference,  # [3, Q] fp32, out: the log-weight that the totals are relative to; what a unit of foreseen weight is
    # worth by what sure cells held; the sum of weights without foresight
    total,  # [Q, 1 + C, 3] fp64, out: s, s2, variance of s; then by channel v, its covariance with s, its variance
    n_queries,
    value_unit,  # of v, in units of the moments
    C: tl.constexpr,
    NV: tl.constexpr,
    NM: tl.constexpr,
    BI: tl.constexpr,
):
    """Adds up a query's items: Horvitz & Thompson's estimate, and its variance; a program a query and part.

    Of n of a cell's N windows, drawn with chance c, a sum Y stands for Y N / (n c). Of a cell taken by chance only what
    that differs by from F / c is added, F being foreseen of it in units that sure cells calibrate, and the F of all
    such cells, drawn or not, once (a control variate). The variance is estimated within cells by the scatter S^2 of
    the n windows, N^2 (1 - n/N) S^2 / n / c, and between by (1 - c) ((Y N / n - F) / c)^2.
    """
    query = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = tl.load(first_item + query)
    end = tl.load(first_item + query + 1)
    o_i = tl.arange(0, BI)
    b_m = tl.full([BI], LEAST, tl.float32)
    for i in range(start, end, BI):
        # Items without a weight that counts carry the reference they began with.
        b_m = tl.maximum(b_m, tl.load(top + i + o_i, mask=i + o_i < end, other=LEAST))
    m = tl.max(b_m)
    b_found = tl.zeros([BI], tl.float64)
    b_raw = tl.zeros([BI], tl.float64)
    b_drawn = tl.zeros([BI], tl.float64)
    for i in range(start, end, BI):
        m_i = i + o_i < end
        b_fade = tl.exp2(tl.load(top + i + o_i, mask=m_i, other=LEAST) - m)
        b_one = tl.load(sums + (i + o_i) * NV, mask=m_i, other=0.0) * b_fade
        b_all = b_one.to(tl.float64) * tl.load(factor + i + o_i, mask=m_i, other=0.0)
        b_chance = tl.load(chance + i + o_i, mask=m_i, other=1.0).to(tl.float64)
        b_raw += b_all
        b_found += tl.where(b_chance < 1, 0.0, b_all)
        b_drawn += tl.load(share + i + o_i, mask=m_i, other=0.0) / b_chance
    found, raw = tl.sum(b_found), tl.sum(b_raw)
    p_far = far + query * NM
    others = tl.load(p_far).to(tl.float64)
    unit = found / tl.maximum(tl.maximum(tl.load(sure + query).to(tl.float64), others / MOST_FORESEEN), 1e-300)
    # Where foresight would take most of what was found away, it is no guide either.
    guide = tl.where(raw + unit * (others - tl.sum(b_drawn)) > 0.25 * raw, unit, 0.0)

    b_a = tl.zeros([BI], tl.float64)
    b_b = tl.zeros([BI], tl.float64)
    b_c = tl.zeros([BI], tl.float64)
    for i in range(start, end, BI):
        m_i = i + o_i < end
        b_fade = tl.exp2(tl.load(top + i + o_i, mask=m_i, other=LEAST) - m).to(tl.float64)
        b_square = b_fade * b_fade / (SQUARES * SQUARES)
        b_factor = tl.load(factor + i + o_i, mask=m_i, other=0.0).to(tl.float64)
        b_chance = tl.load(chance + i + o_i, mask=m_i, other=1.0).to(tl.float64)
        b_take = tl.load(take + i + o_i, mask=m_i, other=1).to(tl.float64)
        b_foreseen = guide * tl.load(share + i + o_i, mask=m_i, other=0.0) / b_chance
        # A cell taken whole has factor 1 and leaves no error.
        b_within = tl.maximum(b_factor * b_chance - 1, 0.0) * b_factor * b_take / tl.maximum(b_take - 1, 1.0)
        p_s, p_q = sums + (i + o_i) * NV, squares + (i + o_i) * NV
        b_one = tl.load(p_s, mask=m_i, other=0.0).to(tl.float64) * b_fade
        b_beside = b_factor * b_one - b_foreseen
        if part == 0:
            b_ones = tl.load(p_q, mask=m_i, other=0.0).to(tl.float64) * b_square
            b_a += b_beside
            b_b += b_factor * tl.load(p_q + 1, mask=m_i, other=0.0).to(tl.float64) * b_square / COUNT_UNIT
            b_c += b_within * tl.maximum(b_ones - b_one * b_one / b_take, 0.0) + (1 - b_chance) * b_beside * b_beside
        else:
            p_v, p_qv = p_s + 1 + part, p_q + 1 + part
            b_v = tl.load(p_v, mask=m_i, other=0.0) + tl.load(p_v + C, mask=m_i, other=0.0)
            b_qv = tl.load(p_qv, mask=m_i, other=0.0) + tl.load(p_qv + C, mask=m_i, other=0.0)
            b_qvv = tl.load(p_qv + 2 * C, mask=m_i, other=0.0).to(tl.float64) * b_square
            b_v = b_v.to(tl.float64) * b_fade
            b_qv = b_qv.to(tl.float64) * b_square
            b_cell = tl.load(cell + i + o_i, mask=m_i, other=0).to(tl.int64)
            b_mean = tl.load(moments + b_cell * NM + part, mask=m_i, other=0.0) * value_unit
            b_beside_v = b_factor * b_v - b_foreseen * b_mean
            b_a += b_beside_v
            b_b += b_within * (b_qv - b_one * b_v / b_take) + (1 - b_chance) * b_beside * b_beside_v
            b_c += b_within * tl.maximum(b_qvv - b_v * b_v / b_take, 0.0) + (1 - b_chance) * b_beside_v * b_beside_v
    p_total = total + (query * (1 + C) + part) * 3
    whole = tl.where(part == 0, 1.0, value_unit)
    tl.store(p_total, tl.sum(b_a) + guide * tl.load(p_far + part) * whole)
    tl.store(p_total + 1, tl.sum(b_b))
    tl.store(p_total + 2, tl.sum(b_c))
    if part == 0:
        tl.store(reference + query, m)
        tl.store(reference + n_queries + query, unit.to(tl.float32))
        tl.store(reference + 2 * n_queries + query, raw.to(tl.float32))


@triton.jit(do_not_specialize=["first_cell", "end_cell"])
def pick_kernel(
    q,
    p,
    log_count,
    order,
    cell_first,
    cell_size,
    cell_turn,  # all as in scan_kernel
    picked,  # [P] int64, items that hold a pick
    inside,  # [P] fp32 in [0, 1), where in the sum of the item's weights
    query,  # [items] int32
    cell,  # [items] int32
    take,  # [items] int32
    first_tile,  # [items] int64
    tile_sums,  # [tiles] fp32, bits
    ids,  # [windows] int64, image * windows of the region in an image + place in the region
    window,  # [P] int64, out: the window's id
    weight,  # [P] fp32, out: its log-weight
    repeats,  # [P] fp32, out: bits of how many windows it stands for; only where COUNTED
    first_cell,
    end_cell,
    bits,
    KA: tl.constexpr,
    KB: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
    COUNTED: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Finds the window at a place of an item's running sum of weights: windows drawn in proportion to their weights."""
    pick = tl.program_id(0).to(tl.int64)
    at = tl.load(picked + pick)
    of = tl.load(cell + at)
    if (of < first_cell) | (of >= end_cell):
        return
    count = tl.load(take + at)
    o_q = tl.load(query + at).to(tl.int64) * (KA + KB)
    target = tl.load(inside + pick)

    # The tile: of those whose running sum stays below the target, the next.
    tiles = (count + BP - 1) // BP
    p_t = tile_sums + tl.load(first_tile + at)
    o_t = tl.arange(0, BT)
    b_top = tl.full([BT], LEAST, tl.float32)
    for t in range(0, tiles, BT):
        b_top = tl.maximum(b_top, tl.load(p_t + t + o_t, mask=t + o_t < tiles, other=LEAST))
    top = tl.max(b_top)
    b_all = tl.zeros([BT], tl.float32)
    for t in range(0, tiles, BT):
        b_all += tl.exp2(tl.load(p_t + t + o_t, mask=t + o_t < tiles, other=LEAST) - top)
    target *= tl.sum(b_all)
    tile = count * 0
    before, own = top * 0.0, top * 0.0
    running = top * 0.0
    for t in range(0, tiles, BT):
        b_t = tl.exp2(tl.load(p_t + t + o_t, mask=t + o_t < tiles, other=LEAST) - top)
        b_sum = running + tl.cumsum(b_t, 0)
        m_before = (b_sum <= target) & (t + o_t < tiles)
        tile += tl.sum(m_before.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(m_before, b_sum, 0.0)))
        running += tl.sum(b_t)
    tile = tl.minimum(tile, tiles - 1)
    own = tl.exp2(tl.load(p_t + tile) - top)
    inside = tl.minimum((target - before) / tl.maximum(own, 1e-30), 1.0)

    # The window, likewise, by weights computed again.
    o_p = tl.arange(0, BP)
    b_o = _windows(
        tile * BP, count, tl.load(cell_size + of), tl.load(cell_turn + of), tl.load(cell_first + of), order, BP, ORDERED
    )
    m_p = tile * BP + o_p < count
    p_q = q + o_q
    b_qa = tl.load(p_q + tl.arange(0, KA)).to(tl.float32)  # [KA]
    b_pa = tl.load(p + b_o[:, None] * (KA + KB) + tl.arange(0, KA)[None, :]).to(tl.float32)  # [BP, KA]
    b_l = tl.sum(b_pa * b_qa[None, :], 1)  # [BP]
    if KB:
        b_qb = tl.load(p_q + KA + tl.arange(0, KB)).to(tl.float32)
        b_pb = tl.load(p + b_o[:, None] * (KA + KB) + KA + tl.arange(0, KB)[None, :]).to(tl.float32)
        b_l += tl.sum(b_pb * b_qb[None, :], 1)
    b_l *= bits
    if COUNTED:
        b_l += tl.load(log_count + b_o)
    b_l = tl.where(m_p, b_l, LEAST)
    b_w = tl.exp2(b_l - tl.max(b_l))
    b_sum = tl.cumsum(b_w, 0)
    valid = tl.minimum(count - tile * BP, BP)
    found = tl.minimum(tl.sum((b_sum <= inside * tl.sum(b_w)).to(tl.int32)), valid - 1)
    m_found = o_p == found
    row = tl.sum(tl.where(m_found, b_o, 0))
    tl.store(window + pick, tl.load(ids + row))
    tl.store(weight + pick, tl.sum(tl.where(m_found, b_l, 0.0)))
    if COUNTED:
        tl.store(repeats + pick, tl.load(log_count + row))


@triton.jit
def _places(b_place, H: tl.constexpr, W: tl.constexpr):
    """Image, row and column of windows' centres."""
    b_pixel = (b_place % (H * W)).to(tl.int32)
    return b_place // (H * W), b_pixel // W, b_pixel % W


@triton.jit
def _pixels(
    images,
    b_image,
    b_row,
    b_col,
    o_d,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """[BR, BD] pixels o_d of windows as they are in the images, zeros beyond the border."""
    b_c, b_in = o_d // (SIZE * SIZE), o_d % (SIZE * SIZE)
    b_i, b_j = b_in // SIZE - SIZE // 2, b_in % SIZE - SIZE // 2  # [BD]
    b_y, b_x = b_row[:, None] + b_i[None, :], b_col[:, None] + b_j[None, :]  # [BR, BD]
    m_in = (b_y >= 0) & (b_y < H) & (b_x >= 0) & (b_x < W) & (o_d < C * SIZE * SIZE)[None, :]
    p_p = images + b_image[:, None] * (C * H * W) + b_c[None, :] * (H * W) + b_y * W + b_x
    b_p = tl.load(p_p, mask=m_in, other=0).to(tl.float32)
    if BYTES:
        b_p = tl.where(m_in, b_p / 127.5 - 1.0, 0.0)
    return b_p


@triton.jit
def _store_centres(
    values,
    images,
    b_image,
    b_row,
    b_col,
    o_v,
    m_r,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BYTES: tl.constexpr,
):
    for c in range(C):
        b_v = tl.load(images + ((b_image * C + c) * H + b_row) * W + b_col, mask=m_r, other=0).to(tl.float32)
        if BYTES:
            b_v = b_v / 127.5 - 1.0
        tl.store(values + o_v * C + c, b_v, mask=m_r)


@triton.jit
def distance_kernel(
    z,  # [Q, D] fp32, noisy windows, D = C k^2
    images,  # [N, C, H, W] uint8 or fp32
    place,  # [Q, R] int64, where windows' centres lie: pixels of all images in a row
    distance,  # [Q, R] fp64, out: |z - window|^2, zeros beyond the border
    values,  # [Q, R, C] fp32, out: the centre pixel
    R: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """The second look: windows as they are in the images, pixel by pixel."""
    query = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)  # [BR]
    b_image, b_row, b_col = _places(tl.load(place + query * R + o_r, mask=o_r < R, other=0), H, W)
    D: tl.constexpr = C * SIZE * SIZE
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BR, BD], tl.float32)
    for d in range(0, D, BD):
        b_p = _pixels(images, b_image, b_row, b_col, d + o_d, C, H, W, SIZE, BYTES)
        b_p = tl.load(z + query * D + d + o_d, mask=d + o_d < D, other=0.0)[None, :] - b_p
        b_sum += b_p * b_p
    tl.store(distance + query * R + o_r, tl.sum(b_sum.to(tl.float64), 1), mask=o_r < R)
    _store_centres(values, images, b_image, b_row, b_col, query * R + o_r, o_r < R, C, H, W, BYTES)


@triton.jit
def propose_kernel(
    z,
    images,  # as in distance_kernel
    offered,  # [Q + 1, P] int64, places that queries propose, negative where there is none
    beside,  # [Q, 4] int64, the queries to the right of one, to its left, below and above; Q where there is none
    geometry,  # [Q, 5] int32: first row and column of the query's region, its rows and columns, and which it is
    q,  # [Q, A] fp16, the scan's features of the noisy windows
    centre,  # [regions, D] fp32
    axes,  # [regions, D, RANK] fp32, features are (window - centre) axes
    place,  # [Q, R] int64, out, R = 4 P
    distance,
    values,  # out as in distance_kernel; infinite distance where nothing is proposed, or beyond the region
    weight,  # [Q, R] fp32, out: the log-weight that the scan would give the window
    bits,
    R: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    A: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
):
    """Windows that neighbours propose, which the scan may not have met: pixel by pixel, and as it would weigh them."""
    query = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)  # [BR]
    row0, col0 = tl.load(geometry + 5 * query), tl.load(geometry + 5 * query + 1)
    rows, cols = tl.load(geometry + 5 * query + 2), tl.load(geometry + 5 * query + 3)
    region = tl.load(geometry + 5 * query + 4).to(tl.int64)
    # What is heavy at the query beside this one is likely heavy here, moved back by as much.
    P: tl.constexpr = R // 4
    b_side = o_r // P
    b_beside = tl.load(beside + query * 4 + b_side, mask=o_r < R, other=0)
    b_place = tl.load(offered + b_beside * P + o_r % P, mask=o_r < R, other=-1)
    b_image, b_row, b_col = _places(tl.maximum(b_place, 0), H, W)
    b_col += tl.where(b_side == 0, -1, tl.where(b_side == 1, 1, 0))
    b_row += tl.where(b_side == 2, -1, tl.where(b_side == 3, 1, 0))
    m_there = (b_place >= 0) & (b_row >= row0) & (b_row < row0 + rows) & (b_col >= col0) & (b_col < col0 + cols)
    b_row, b_col = tl.where(m_there, b_row, row0), tl.where(m_there, b_col, col0)
    tl.store(place + query * R + o_r, (b_image * H + b_row) * W + b_col, mask=o_r < R)
    D: tl.constexpr = C * SIZE * SIZE
    o_d, o_a = tl.arange(0, BD), tl.arange(0, BA)
    b_sum = tl.zeros([BR, BD], tl.float32)
    b_f = tl.zeros([BR, BA], tl.float32)
    for d in range(0, D, BD):
        m_d = d + o_d < D
        b_p = _pixels(images, b_image, b_row, b_col, d + o_d, C, H, W, SIZE, BYTES)
        p_a = axes + (region * D + d + o_d[:, None]) * RANK + o_a[None, :]
        b_a = tl.load(p_a, mask=m_d[:, None] & (o_a < A)[None, :], other=0.0)  # [BD, BA]
        b_centre = tl.load(centre + region * D + d + o_d, mask=m_d, other=0.0)
        b_f = tl.dot(b_p - b_centre[None, :], b_a, b_f, input_precision="ieee")
        b_p = tl.load(z + query * D + d + o_d, mask=m_d, other=0.0)[None, :] - b_p
        b_sum += b_p * b_p
    b_distance = tl.where(m_there, tl.sum(b_sum.to(tl.float64), 1), float("inf"))
    tl.store(distance + query * R + o_r, b_distance, mask=o_r < R)
    _store_centres(values, images, b_image, b_row, b_col, query * R + o_r, o_r < R, C, H, W, BYTES)
    b_f = b_f.to(tl.float16).to(tl.float32)  # as the index has it
    b_q = tl.load(q + query * A + o_a, mask=o_a < A, other=0.0).to(tl.float32)
    b_l = tl.sum(b_f * (b_q[None, :] - 0.5 * b_f), 1)
    tl.store(weight + query * R + o_r, b_l * bits, mask=o_r < R)


FEW_DRAWN = tl.constexpr(4.0)
"""So many drawn windows of the rest count as much as all sure ones together."""

DISORDER = tl.constexpr(3.0)
"""Bits by which weights may be off before their order is doubted."""

STANDS_OUT = tl.constexpr(9.0)
"""A change of more than three standard deviations is taken for one. This and the next two are fitted on the CPU, whose
correction is the same (csrc/pruned/lists_recheck.h): with them the standard error covers what it should."""

CHANGE_DOUBT = tl.constexpr(4.0)
"""Variance that a change adds, in units of the measured one."""

NOISE_DOUBT = tl.constexpr(2.0)
"""Variance of the rest's windows, in units of what their excesses let expect."""


@triton.jit
def _over(a, b):
    """a / b, or 0 where b is none."""
    return tl.where(b > 0, a / tl.where(b > 0, b, 1.0), 0.0)


@triton.jit
def correct_kernel(
    weight,  # [Q, R] fp32, log-weights of a query's sample by the scan, in bits, with all equal windows
    repeats,  # [Q, R] fp32, bits of how many equal windows there are
    stands_for,  # [Q, R] fp64, bits of how many scanned windows it stands for
    met,  # [Q, R] fp64, one over the chance to be in the sample, 0 of what is not in it
    own,  # [Q, R] fp64, log-weights by all pixels and the noise that counts, without equal windows
    values,  # [Q, R, C] fp32
    sums,  # [Q, 4 + C] fp64: m, s, s2 of the scan, what is heavier than is in the sample for certain, and v
    result,  # [Q, 2 + 2 C] fp64, out: by how much m moves, in bits; s2; by how much the means move; variances that adds
    blur,  # the scan's noise over the noise that counts, squared
    R: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    GUIDED: tl.constexpr,
):
    """Puts right what features leave out, on a sample of windows that were compared pixel by pixel.

    Windows that are sure to be in the sample have their exact weights. The rest keeps the scan's sums, times what its
    drawn windows weigh more by pixels, and its mean moves by what their exact weights change, in proportion to how well
    the sample knows that (Wiener's filter). Where the scan weighed by more noise than there is (not GUIDED), its sums
    are no guide, and the sample alone decides.
    """
    query = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    p_r = query * R + o_r
    b_met = tl.load(met + p_r, mask=m_r, other=0.0)
    m_in, m_drawn = b_met > 0, b_met > 1
    m_sure = m_in & (b_met <= 1)
    b_chance = 1 / tl.where(m_in, b_met, 1.0)
    b_weight = tl.load(weight + p_r, mask=m_r, other=0.0).to(tl.float64)
    b_repeats = tl.load(repeats + p_r, mask=m_r, other=0.0).to(tl.float64)
    b_stands = tl.load(stands_for + p_r, mask=m_r, other=0.0)
    b_own = tl.load(own + p_r, mask=m_r, other=0.0)
    p_sums, p_result = sums + query * (4 + C), result + query * (2 + 2 * C)
    m, s, s2 = tl.load(p_sums), tl.load(p_sums + 1), tl.load(p_sums + 2)
    size, n_drawn = tl.sum(m_in.to(tl.float64)), tl.sum(m_drawn.to(tl.float64))

    # With all that a window stands for; relative to 2^m by the scan, to 2^top by pixels.
    b_rough = tl.where(m_in, tl.exp2(tl.where(m_in, b_weight + b_stands - m, 0.0)), 0.0)
    b_exact = tl.where(m_in, b_own + b_repeats + b_stands, float("-inf"))
    top = tl.max(b_exact - tl.log2(b_chance))
    top = tl.where(top > float("-inf"), top, 0.0)
    b_exact = tl.exp2(b_exact - top)
    squares = tl.sum(tl.where(m_in, b_exact * b_met * tl.exp2(tl.where(m_in, b_own - top, 0.0)), 0.0))
    sure_rough, sure_exact = tl.sum(tl.where(m_sure, b_rough, 0.0)), tl.sum(tl.where(m_sure, b_exact, 0.0))
    b_rough_drawn, b_exact_drawn = tl.where(m_drawn, b_rough * b_met, 0.0), tl.where(m_drawn, b_exact * b_met, 0.0)
    drawn_rough, drawn_exact = tl.sum(b_rough_drawn), tl.sum(b_exact_drawn)
    found = sure_exact + drawn_exact
    whole, rough = found, sure_rough + drawn_rough

    rest = tl.maximum(s - sure_rough, 0.0)
    known = _over(sure_exact, sure_rough)
    count = tl.where(known > 0, FEW_DRAWN, 0.0)
    each = tl.where(n_drawn > 0, drawn_rough / tl.maximum(n_drawn, 1.0), 1.0)
    ratio = _over(_over(drawn_exact, each) + count * known, n_drawn + count)
    if GUIDED:
        whole, rough = sure_exact + ratio * rest, s
    share = _over(ratio * rest, whole)
    b_off = tl.where(m_in, _over(b_exact, ratio * b_rough) - 1, 0.0)
    spread = tl.minimum(1.0, _over(tl.sum(b_off * b_off), size)) / (n_drawn + FEW_DRAWN)
    b_excess = tl.where(m_drawn, _over(b_exact - ratio * b_rough, whole), 0.0)

    # Where features put windows in quite another order than pixels do, one that is not in the sample may be the
    # heaviest: how far the lead over those falls short, of 1.
    b_apart = tl.where(m_in, b_own / blur - (b_weight - b_repeats), 0.0)
    offset = _over(tl.sum(b_apart), size)
    deviation = tl.sqrt(tl.maximum(_over(tl.sum(b_apart * b_apart), size) - offset * offset, 0.0))
    lead = tl.max(tl.where(m_in, b_own / blur, float("-inf"))) - offset - tl.load(p_sums + 3)
    doubt = tl.minimum(tl.maximum(1 - _over(lead, 4 * deviation), 0.0), 1.0)
    doubt = tl.where((deviation * blur >= DISORDER) & (size >= 2), doubt, 0.0)

    some = (found > 0) & (whole > 0) & (s > 0)
    for c in range(C):
        b_v = tl.load(values + p_r * C + c, mask=m_r, other=0.0).to(tl.float64)
        before = tl.load(p_sums + 4 + c)
        if GUIDED:
            mean = tl.where(rest > 1e-6 * s, _over(before - tl.sum(tl.where(m_sure, b_rough * b_v, 0.0)), rest), 0.0)
            mean = tl.minimum(tl.maximum(mean, -1.0), 1.0)
            b_excess_v = b_excess * (b_v - mean)
            noise = tl.sum(b_excess_v * b_excess_v * b_met)
            rough_mean = _over(tl.sum(b_rough_drawn * b_v), drawn_rough)
            exact_mean = _over(tl.sum(b_exact_drawn * b_v), drawn_exact)
            change = tl.where((drawn_exact > 0) & (rest > 0), exact_mean - rough_mean, 0.0)
            b_change = _over(b_exact_drawn, drawn_exact) * (b_v - exact_mean)
            b_change -= _over(b_rough_drawn, drawn_rough) * (b_v - rough_mean)
            # The change is measured with `measured` variance; before that, independent excesses of the rest's windows
            # let expect `noise`, and what stands out from both tells that they were not independent.
            measured = share * share * tl.sum((1 - b_chance) * b_change * b_change)
            expected = tl.maximum(noise, share * share * change * change - STANDS_OUT * measured)
            kept = _over(expected, expected + measured)
            mean += kept * change
            sure_mean = tl.where(sure_exact > 0, _over(tl.sum(tl.where(m_sure, b_exact * b_v, 0.0)), sure_exact), mean)
            apart = share * (1 - share) * (mean - sure_mean)
            error = CHANGE_DOUBT * kept * measured + NOISE_DOUBT * noise + apart * apart * spread
            mean = (1 - share) * sure_mean + share * mean
        else:
            b_share = _over(tl.where(m_in, b_exact * b_met, 0.0), found)
            mean = tl.sum(b_share * b_v)
            b_change = b_share * (b_v - mean)
            error = tl.sum((1 - b_chance) * b_change * b_change)
        middle = _over(tl.sum(tl.where(m_in, b_v, 0.0)), size)
        b_apart = tl.where(m_in, b_v - middle, 0.0)
        error += doubt * _over(tl.sum(b_apart * b_apart), size)
        tl.store(p_result + 2 + c, tl.where(some, mean - _over(before, s), 0.0))
        tl.store(p_result + 2 + C + c, tl.where(some, error, 0.0))
    if not GUIDED:
        s2 = tl.where(some, s * s * _over(squares, found * found), s2)
    shift = top + tl.log2(tl.where(some, whole, 1.0)) - m - tl.log2(tl.where(some, rough, 1.0))
    tl.store(p_result, tl.where(some, shift, 0.0))
    tl.store(p_result + 1, s2)
