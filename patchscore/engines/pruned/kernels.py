"""The Triton kernels of `pruned`: a query's plan, the sums of its visits to cells, and scores of listed windows.

They do what csrc/pruned does, with two simplifications: every cell is planned by itself, as in naive.py, and a visit's
weights are relative to its own heaviest window, so no reference can turn out wrong. Names: b_ blocks, o_ offsets, m_
masks; a comment gives each block's shape, BV visits, BW windows, BH cells, D values of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(8)
"""Windows of a tile, the sampling unit; TILE of naive.py."""
NONE = tl.constexpr(-(2**30))
"""A score below all others (request.Encoded keeps them above)."""
NONE_FLOAT = tl.constexpr(-3e38)
LOWEST = tl.constexpr(-60.0)
HIGHEST = tl.constexpr(90.0)
"""Bits within which the scale of a query's sampling fractions is looked for. Size measures are at most N^1.5 and
float32 ends at 2^128, so cells may hold 2^25 windows."""
SCALES = tl.constexpr(16)
"""Scales that are tried at once: four passes over the cells make 150 bits 0.002."""


@triton.jit
def _measures(p_first, p_second, size, competing, o_h, n_cells, ref):
    """Of cells o_h [BH]: log2 E[w] and log2 E[w^2], N, and relative to 2^ref E[w], N sd(w) and N sqrt(var(w) + TILE
    E[w]^2); naive.size_measures."""
    m_h = o_h < n_cells
    b_first = tl.load(p_first + o_h, mask=m_h, other=-1e30)
    b_second = tl.load(p_second + o_h, mask=m_h, other=-1e30)
    b_size = tl.load(size + o_h, mask=m_h, other=0.0)
    b_share = tl.load(competing + o_h, mask=m_h, other=0.0) / tl.maximum(b_size, 1.0)
    b_e = tl.exp2(tl.minimum(b_first - ref, 60.0)) * b_share  # cells of which nothing competes may lie above
    b_e2 = tl.minimum(tl.exp2(tl.minimum(b_second - 2 * ref, 120.0)) * b_share, b_size * b_e * b_e)
    b_variance = tl.maximum(b_e2 - b_e * b_e, 1e-6 * b_e2)
    b_sure, b_chance = tl.sqrt(b_variance), tl.sqrt(b_variance + TILE * b_e * b_e)
    return b_first, b_second, b_size, b_e, b_size * b_sure, b_size * b_chance


# Sizes differ from call to call: none is worth a kernel of its own.
@triton.jit(do_not_specialize=["n_cells", "n_facts", "most"])
def plan_kernel(
    logs,  # [n_queries, 2, n_cells] fp32, log2 E[w] and log2 E[w^2]
    size,  # [n_cells] fp32, windows stored
    competing,  # [n_cells] fp32
    facts,  # [n_cells, NF] fp32: 1, means of the values and of their powers, then zeros
    climb,  # [n_queries] fp64, uniform: where systematic sampling begins
    budget,  # [n_queries] fp32, windows to draw
    cells,  # [n_queries, most] int32, out: the cells visited
    taken,  # [n_queries, most] int32, out: tiles that each visit reads
    units,  # [n_queries, most] fp32, out: 0 of a visit that is sure, else tiles over expected hits
    found,  # [n_queries, 6] fp32, out: visits; the reference in bits; expected sums, of all cells and of those sampled;
    # expected variance times log-weights in nats, and times their squares
    model,  # [n_queries, NF] fp32, out: expected variance times the facts
    n_cells,
    n_facts,
    most,
    certain_from,
    NF: tl.constexpr,
    BH: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    o_h, o_f = tl.arange(0, BH), tl.arange(0, NF)
    p_first = logs + 2 * query * n_cells
    p_second = p_first + n_cells
    ref = -1e30
    for h in range(0, n_cells, BH):
        m_h = h + o_h < n_cells
        b_first = tl.load(p_first + h + o_h, mask=m_h, other=-1e30)  # [BH]
        b_competing = tl.load(competing + h + o_h, mask=m_h, other=0.0)
        ref = tl.maximum(ref, tl.max(tl.where(b_competing > 0, b_first, -1e30)))

    # The scale at which the expected number of windows is the budget.
    wanted = tl.load(budget + query)
    o_s = tl.arange(0, SCALES)
    low = tl.full([], LOWEST, tl.float32)
    step = tl.full([], (HIGHEST - LOWEST) / (SCALES + 1), tl.float32)
    for pass_ in range(4):  # noqa: B007 (a loop carries `_`, too, in Triton)
        b_scale = tl.exp2(low + step * (1 + o_s).to(tl.float32))  # [SCALES]
        b_total = tl.zeros([SCALES], tl.float32)
        for h in range(0, n_cells, BH):
            _f, _s, b_size, _e, b_sure, b_chance = _measures(p_first, p_second, size, competing, h + o_h, n_cells, ref)
            b_windows = tl.minimum(b_scale[:, None] * b_chance[None, :], TILE)
            b_windows = tl.maximum(b_scale[:, None] * b_sure[None, :], b_windows)  # [SCALES, BH]
            b_total += tl.sum(tl.minimum(b_windows, b_size[None, :]), 1)
        low += step * tl.sum((b_total <= wanted).to(tl.float32))
        step = step / (SCALES + 1)
    scale = tl.exp2(low)

    # Visits in the order of cells, so that systematic sampling spreads over it; and the variance to expect.
    position = tl.load(climb + query)
    count = 0
    total = 0.0
    rest = 0.0
    b_model = tl.zeros([NF], tl.float32)
    log_mean = 0.0
    log_square = 0.0
    for h in range(0, n_cells, BH):
        b_first, b_second, b_size, b_e, b_sure, b_chance = _measures(
            p_first, p_second, size, competing, h + o_h, n_cells, ref
        )
        b_windows = tl.minimum(b_size, tl.maximum(scale * b_sure, tl.minimum(scale * b_chance, TILE)))
        b_tiles = tl.ceil(b_size / TILE)
        m_any = b_chance > 0
        m_sure = m_any & (b_windows > 0.999 * TILE)
        m_whole = (b_windows >= certain_from * b_size) | (b_tiles <= 2)
        b_taken = tl.minimum(b_tiles, tl.maximum(2.0, tl.ceil(b_windows / TILE)))
        b_taken = tl.where(m_whole, b_tiles, b_taken)
        b_hits = tl.where(m_any & (m_sure == 0), b_windows / TILE, 0.0)
        b_up = position + tl.cumsum(b_hits.to(tl.float64))
        m_hit = tl.floor(b_up) > tl.floor(b_up - b_hits.to(tl.float64))
        position += tl.sum(b_hits.to(tl.float64))
        m_visit = m_sure | m_hit
        o_visit = query * most + count + tl.cumsum(m_visit.to(tl.int32)) - 1
        m_stored = m_visit & (count + tl.cumsum(m_visit.to(tl.int32)) <= most)
        b_safe = tl.maximum(b_hits, 1e-30)
        tl.store(cells + o_visit, h + o_h, mask=m_stored)
        tl.store(taken + o_visit, tl.where(m_sure, b_taken, 1.0).to(tl.int32), mask=m_stored)
        tl.store(units + o_visit, tl.where(m_sure, 0.0, b_tiles / b_safe), mask=m_stored)
        count += tl.sum(m_visit.to(tl.int32))

        b_part = b_size * b_e
        total += tl.sum(b_part)
        rest += tl.sum(tl.where(m_sure & (b_taken == b_tiles), 0.0, b_part))
        b_left = tl.maximum(1 - b_hits, 0.0)
        b_between = (b_part * b_part + b_sure * b_sure / TILE) * b_left / b_safe
        b_within = b_sure * (b_sure / tl.maximum(b_windows, 1e-30))
        b_within *= 1 - tl.minimum(b_windows / tl.maximum(b_size, 1.0), 1.0)
        b_variance = b_sure * b_sure * (1 - b_taken / tl.maximum(b_tiles, 1.0)) / (tl.maximum(b_taken, 1.0) * TILE)
        b_variance = tl.where(m_sure, b_variance, tl.maximum(b_between, b_within))
        b_variance = tl.where(m_any, b_variance, 0.0)  # [BH]
        m_facts = (h + o_h < n_cells)[:, None] & (o_f < n_facts)[None, :]
        b_facts = tl.load(facts + (h + o_h)[:, None] * NF + o_f[None, :], mask=m_facts, other=0.0)  # [BH, NF]
        b_model += tl.sum(b_variance[:, None] * b_facts, 0)
        # Log-weights, each as likely as its squared weight: naive.expected_variances.
        b_first = tl.where(m_any, b_first, ref)
        b_twice = tl.where(m_any, tl.minimum(b_second, 2 * b_first + tl.log2(tl.maximum(b_size, 1.0))), 2 * ref)
        b_log = 0.6931471805599453 * (1.5 * b_twice - 2 * b_first)
        log_mean += tl.sum(b_variance * b_log)
        b_spread = 0.6931471805599453 * tl.maximum(b_twice - 2 * b_first, 0.0)
        log_square += tl.sum(b_variance * (b_log * b_log + b_spread))
    o_x = tl.arange(0, 8)
    b_found = tl.where(o_x == 0, tl.minimum(count, most).to(tl.float32), ref)
    b_found = tl.where(o_x == 2, total, tl.where(o_x == 3, rest, b_found))
    b_found = tl.where(o_x == 4, log_mean, tl.where(o_x == 5, log_square, b_found))
    tl.store(found + query * 6 + o_x, b_found, mask=o_x < 6)
    tl.store(model + query * NF + o_f, b_model, mask=o_f < n_facts)


@triton.jit
def _first_pixels(b_ids, per_image, cols, width, image_values):
    """Where the first pixel of each window lies among the images' values, and its image."""
    b_image = b_ids // per_image
    b_place = b_ids % per_image
    return b_image * image_values + b_place // cols * width + b_place % cols, b_image


@triton.jit
def _pixel_offset(d, plane, width, K: tl.constexpr):
    """Of value d of a window from its first pixel: channel, row, column."""
    return d // (K * K) * plane + d // K % K * width + d % K


@triton.jit(do_not_specialize=["most", "n_values", "per_image", "cols", "width", "plane"])
def scan_kernel(
    images,  # [n_images, C, height, width] uint8 or fp32
    ids,  # int64, windows cell by cell
    first,  # [n_cells] int64, where each cell's windows begin
    size,  # [n_cells] fp32
    start,  # [n_cells] int32, the tile at which visits begin
    centre,  # [n_cells, C] fp32, about which values are taken
    allowed,  # [n_images] uint8, which compete; read where ALLOWED
    windows,  # [n_queries, n_values] int16 or fp32, the queries as request.Encoded has them
    shift,  # [n_queries] int32
    bits,  # [n_queries] fp32
    known,  # [n_queries, KNOWN] int64 windows that are counted surely, or -1
    least,  # [n_queries] the smallest score that one of them can have
    about,  # [n_queries] the score that log-weights are taken about
    taken,  # [n_queries, most] int32
    order,  # int64, places of the visits in `taken`, cell by cell
    block_cell,  # [blocks] int32
    block_first,  # [blocks] int64, in `order`
    block_visits,  # [blocks] int32
    sums,  # [n_queries, most, 2, NV] fp32, out: sums of w and of w^2, times powers of values
    logs,  # [n_queries, most, 3] fp32, out: sums of w x, w^2 x, w^2 x^2, x the log2 of w about `about`
    top,  # [n_queries, most] int32 or fp32, out: the highest score, about which weights are
    top_id,  # [n_queries, most] int64, out: its window
    most,
    n_values,  # of a row of `windows`
    per_image,  # windows of an image
    cols,  # windows of a row
    width,
    plane,  # pixels of a channel
    C: tl.constexpr,
    K: tl.constexpr,
    POWERS: tl.constexpr,
    NV: tl.constexpr,
    BYTES: tl.constexpr,
    ALLOWED: tl.constexpr,
    MOMENTS: tl.constexpr,
    KNOWN: tl.constexpr,
    BV: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = C * K * K
    block = tl.program_id(0).to(tl.int64)
    cell = tl.load(block_cell + block).to(tl.int64)
    o_v, o_w, o_c = tl.arange(0, BV), tl.arange(0, BW), tl.arange(0, NV)
    m_v = o_v < tl.load(block_visits + block)
    o_visit = tl.load(order + tl.load(block_first + block) + o_v, mask=m_v, other=0)  # [BV]
    o_q = o_visit // most
    b_taken = tl.load(taken + o_visit, mask=m_v, other=0)
    b_bits = tl.load(bits + o_q)
    b_least = tl.load(least + o_q)
    b_shift = tl.load(shift + o_q)
    b_about = tl.load(about + o_q)
    p_ids = ids + tl.load(first + cell)
    n_windows = tl.load(size + cell).to(tl.int32)
    n_tiles = tl.cdiv(n_windows, TILE)
    begin = tl.load(start + cell)
    # Column 0 of the values is 1, then come the channels, their squares, ...
    o_channel = (o_c + C - 1) % C
    m_column = (o_c > 0) & (o_c <= POWERS * C)
    b_centre = tl.load(centre + cell * C + o_channel)  # [NV]
    b_sums = tl.zeros([BV, NV], tl.float32)
    b_squares = tl.zeros([BV, NV], tl.float32)
    b_wx = tl.zeros([BV], tl.float32)
    b_w2x = tl.zeros([BV], tl.float32)
    b_w2x2 = tl.zeros([BV], tl.float32)
    b_top = tl.full([BV], NONE, tl.int32) if BYTES else tl.full([BV], NONE_FLOAT, tl.float32)
    b_top_id = tl.full([BV], -1, tl.int64)
    tiles = tl.max(b_taken)
    for t in range(0, tiles, BW // TILE):
        o_t = t + o_w // TILE  # [BW]
        o_at = (begin + o_t) % n_tiles * TILE + o_w % TILE
        m_w = (o_t < tiles) & (o_at < n_windows)
        b_ids = tl.load(p_ids + o_at, mask=m_w, other=0)  # [BW]
        o_p, b_image = _first_pixels(b_ids, per_image, cols, width, C * plane)
        if ALLOWED:
            m_w = m_w & (tl.load(allowed + b_image, mask=m_w, other=0) != 0)
        m_pair = m_w[None, :] & (o_t[None, :] < b_taken[:, None])  # [BV, BW]
        if BYTES:
            b_high = tl.zeros([BV, BW], tl.int32)
            b_low = tl.zeros([BV, BW], tl.int32)
            b_norm = tl.zeros([BW], tl.int32)
            b_sum = tl.zeros([BW], tl.int32)
            for d in range(0, D, BD):
                o_d = d + tl.arange(0, BD)
                m_d = o_d < D
                o_pixel = _pixel_offset(o_d, plane, width, K)
                b_p = tl.load(images + o_p[None, :] + o_pixel[:, None], mask=m_d[:, None] & m_w[None, :], other=128)
                b_p = b_p.to(tl.int32) - 128  # [BD, BW]
                b_q = tl.load(windows + o_q[:, None] * n_values + o_d[None, :], mask=m_d[None, :], other=0)
                b_q = b_q.to(tl.int32)  # [BV, BD]
                # A query's two digits: 256 times the high one, and the low one less 128.
                b_high = tl.dot((b_q >> 8).to(tl.int8), b_p.to(tl.int8), b_high, out_dtype=tl.int32)
                b_low = tl.dot(((b_q & 255) - 128).to(tl.int8), b_p.to(tl.int8), b_low, out_dtype=tl.int32)
                b_norm += tl.sum(b_p * b_p, 0)
                b_sum += tl.sum(b_p, 0)
            b_score = b_high * 256 + b_low + (128 * b_sum)[None, :] - (b_norm[None, :] << b_shift[:, None])
        else:
            b_score = tl.zeros([BV, BW], tl.float32)
            for d in range(D):
                b_q = tl.load(windows + o_q * n_values + d)  # [BV]
                b_p = tl.load(images + o_p + _pixel_offset(d, plane, width, K), mask=m_w, other=0.0)  # [BW]
                b_away = b_q[:, None] - b_p[None, :]
                b_score -= b_away * b_away
            m_pair = m_pair & (b_score > NONE_FLOAT)
        if tl.max((m_pair & (b_score >= b_least[:, None])).to(tl.int32)) > 0:
            for i in range(KNOWN):
                b_known = tl.load(known + o_q * KNOWN + i)
                m_pair = m_pair & (b_ids[None, :] != b_known[:, None])

        b_seen = tl.where(m_pair, b_score, NONE if BYTES else NONE_FLOAT)  # [BV, BW]
        b_best = tl.max(b_seen, 1)
        b_best_id = tl.max(tl.where(m_pair & (b_seen == b_best[:, None]), b_ids[None, :], -1), 1)
        b_top_id = tl.where(b_best > b_top, b_best_id, b_top_id)
        b_new = tl.maximum(b_top, b_best)
        b_fade = tl.exp2(tl.maximum((b_top - b_new).to(tl.float32), -1e30) * b_bits)
        b_top = b_new
        b_x = tl.where(m_pair, b_score - b_top[:, None], 0).to(tl.float32) * b_bits[:, None]
        b_w = tl.where(m_pair, tl.exp2(b_x), 0.0)
        # Values of the windows about the cell's mean, and their powers.
        o_value = o_channel * plane + (K // 2) * width + K // 2
        m_value = m_w[:, None] & m_column[None, :]
        b_value = tl.load(images + o_p[:, None] + o_value[None, :], mask=m_value, other=0).to(tl.float32)  # [BW, NV]
        if BYTES:
            b_value = b_value / 127.5 - 1
        b_value = tl.where(m_value, b_value - b_centre[None, :], 0.0)
        b_values = tl.where((o_c > 0)[None, :], b_value, 1.0)
        for power in tl.static_range(1, POWERS):
            b_values = tl.where((o_c > power * C)[None, :], b_values * b_value, b_values)
        b_sums = b_sums * b_fade[:, None] + tl.dot(b_w, b_values, input_precision="ieee")
        b_squares *= (b_fade * b_fade)[:, None]
        b_squares += tl.dot(b_w * b_w, b_values, input_precision="ieee")
        if MOMENTS:
            b_x = tl.where(m_pair, b_score - b_about[:, None], 0).to(tl.float32) * b_bits[:, None]
            b_x = tl.maximum(b_x, -1e30)  # what has no weight shall not be infinite
            b_wx = b_wx * b_fade + tl.sum(b_w * b_x, 1)
            b_w2x = b_w2x * b_fade * b_fade + tl.sum(b_w * b_w * b_x, 1)
            b_w2x2 = b_w2x2 * b_fade * b_fade + tl.sum(b_w * b_x * b_w * b_x, 1)
    o_sums = (2 * o_visit)[:, None] * NV + o_c[None, :]
    tl.store(sums + o_sums, b_sums, mask=m_v[:, None])
    tl.store(sums + o_sums + NV, b_squares, mask=m_v[:, None])
    tl.store(top + o_visit, b_top, mask=m_v)
    tl.store(top_id + o_visit, b_top_id, mask=m_v)
    if MOMENTS:
        tl.store(logs + 3 * o_visit, b_wx, mask=m_v)
        tl.store(logs + 3 * o_visit + 1, b_w2x, mask=m_v)
        tl.store(logs + 3 * o_visit + 2, b_w2x2, mask=m_v)


@triton.jit(do_not_specialize=["n_listed", "n_values", "per_image", "cols", "width", "plane"])
def score_kernel(
    images,  # as of scan_kernel
    listed,  # [n_queries, n_listed] int64 windows, or -1
    allowed,
    windows,
    shift,
    scores,  # [n_queries, n_listed] int32 or fp32, out
    n_listed,
    n_values,
    per_image,
    cols,
    width,
    plane,
    C: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    ALLOWED: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = C * K * K
    query = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1).to(tl.int64) * BW + tl.arange(0, BW)
    b_ids = tl.load(listed + query * n_listed + o_w, mask=o_w < n_listed, other=-1)  # [BW]
    m_w = b_ids >= 0
    o_p, b_image = _first_pixels(tl.maximum(b_ids, 0), per_image, cols, width, C * plane)
    if ALLOWED:
        m_w = m_w & (tl.load(allowed + b_image, mask=m_w, other=0) != 0)
    p_q = windows + query * n_values
    if BYTES:
        b_score = tl.zeros([BW], tl.int32)
        b_norm = tl.zeros([BW], tl.int32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)
            m_d = o_d < D
            o_pixel = _pixel_offset(o_d, plane, width, K)
            b_p = tl.load(images + o_p[:, None] + o_pixel[None, :], mask=m_w[:, None] & m_d[None, :], other=128)
            b_p = b_p.to(tl.int32) - 128  # [BW, BD]
            b_q = tl.load(p_q + o_d, mask=m_d, other=0).to(tl.int32)
            b_score += tl.sum(b_p * b_q[None, :], 1)
            b_norm += tl.sum(b_p * b_p, 1)
        b_score -= b_norm << tl.load(shift + query)
        b_score = tl.where(m_w, b_score, NONE)
    else:
        b_score = tl.zeros([BW], tl.float32)
        for d in range(D):
            b_p = tl.load(images + o_p + _pixel_offset(d, plane, width, K), mask=m_w, other=0.0)
            b_away = tl.load(p_q + d) - b_p
            b_score -= b_away * b_away
        b_score = tl.where(m_w & (b_score > NONE_FLOAT), b_score, NONE_FLOAT)
    tl.store(scores + query * n_listed + o_w, b_score, mask=o_w < n_listed)
