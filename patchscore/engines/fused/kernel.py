"""The kernel of `fused`: softmax sums of query rows over patch rows, never a matrix of logits in memory.

A program keeps a tile of queries and reads its share of the patches, a split. One matrix product gives a tile of
logits, exponentials base 2 turn them into weights, a second product with [values, 1] adds numerator and denominator.
Weights are half floats relative to a reference log-weight, in one of two ways:

- PILOT: the reference is fixed before the loop, by the mean weight of every PILOT-th tile. The loop has no maximum, no
  rescaling and no reduction, and instructions to spare: multiply-adds take the place of some exponentials (CUBIC).
  Where the pilot was too low by so much that a weight overflows, its infinity stays in the denominator, and the tile is
  done again the other way.
- A running maximum, which rises by the tile; tiles without a visible weight are passed over (SKIP).

naive.py states the same sums in float64. Names: o_ offsets, p_ pointers, b_ blocks; a comment gives each block's shape,
BQ queries, BP patches, K columns. Log-weights are in bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADROOM = tl.constexpr(14.0)
"""Bits of the largest weight of a running maximum's tile: half floats then hold weights down to 2^-38 of it."""
MEAN_BITS = tl.constexpr(-10.0)
"""Bits of the pilot's mean weight. Weights under 2^-25 are rounded to zero: of the sum at most 2^-15 times what the
pilot overestimates the mean by, PILOT at most. Weights overflow from 2^16 on: a window 2^26 times as heavy as the
pilot's mean, so the pilot has underestimated the mean of a split of 2^20 windows by 2^6."""
LEAST = tl.constexpr(-1e30)
"""A log-weight below all others, and finite: rows that fill the last tile have -inf, and -inf - (-inf) is NaN."""
POWER_0, POWER_1 = tl.constexpr(0.99992807), tl.constexpr(0.69326099)
POWER_2, POWER_3 = tl.constexpr(0.24261112), tl.constexpr(0.05517167)
"""2^x for |x| <= 1/2 within 7.5e-5 of it: the cubic whose largest relative error is least (Remez exchange)."""
INTEGERS = tl.constexpr(1.5 * 2.0**23)
"""Where float32 numbers are whole: adding it rounds, and leaves the whole number in the low bits."""


@triton.jit
def _logits(
    p_q,
    b_qa,
    b_qb,
    p_p,
    o_p,
    n_columns,
    K: tl.constexpr,
    KA: tl.constexpr,
    KB: tl.constexpr,
    KC: tl.constexpr,
    BQ: tl.constexpr,
    BP: tl.constexpr,
):
    """[BQ, BP] query rows times patch rows: one or two blocks of columns, as sizes are powers of two, or many of KC."""
    if KC == 0:
        b_pa = tl.load(p_p + o_p[None, :] * K + tl.arange(0, KA)[:, None])  # [KA, BP]
        b_l = tl.dot(b_qa, b_pa)  # [BQ, BP]
        if KB:
            b_pb = tl.load(p_p + o_p[None, :] * K + (KA + tl.arange(0, KB))[:, None])  # [KB, BP]
            b_l = tl.dot(b_qb, b_pb, b_l)
    else:
        b_l = tl.zeros([BQ, BP], tl.float32)
        for c in range(0, n_columns, KC):
            b_qc = tl.load(p_q + c + tl.arange(0, KC)[None, :])  # [BQ, KC]
            b_pc = tl.load(p_p + o_p[None, :] * K + c + tl.arange(0, KC)[:, None])  # [KC, BP]
            b_l = tl.dot(b_qc, b_pc, b_l)
    return b_l


@triton.jit
def _power(b_x):
    """2^x by multiply-adds: a cubic of the fraction, whose exponent the whole part is added to."""
    b_x = tl.minimum(tl.maximum(b_x, -126.0), 126.0)  # 2^126 overflows in half floats as more does
    b_t = b_x + INTEGERS
    b_f = b_x - (b_t - INTEGERS)
    b_y = ((POWER_3 * b_f + POWER_2) * b_f + POWER_1) * b_f + POWER_0
    return (b_y.to(tl.int32, bitcast=True) + (b_t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


# Sizes differ from call to call: none is worth a kernel of its own.
@triton.jit(do_not_specialize=["n_coordinates", "n_queries", "n_patches", "n_filled", "patches_per_split", "n_columns"])
def posterior_kernel(
    q,  # [L, n_queries, K] fp16, queries
    scale,  # [3, L, n_queries] fp32: bits a unit of product; bits of |q|^2 / 2; unit of q over unit of p
    p,  # [L, n_patches, K] fp16, patches; n_patches is a multiple of BP
    v,  # [L, n_patches, NV] fp16, values, then a column of ones
    sums,  # [splits, L, n_queries, NV] fp32, out: sums of weighted values
    other,  # [splits, L, n_queries, 2] fp32, out: reference in bits, sum of squared weights, 0 unless ESS
    n_coordinates,  # L, locked coordinates with patches of their own
    n_queries,
    n_patches,
    n_filled,  # patches that are not filler, of each coordinate
    patches_per_split,  # a multiple of BP
    n_columns,  # K again, as a number to loop to
    floor,  # bits above the reference under which a weight cannot be seen
    K: tl.constexpr,
    KA: tl.constexpr,
    KB: tl.constexpr,
    KC: tl.constexpr,
    NV: tl.constexpr,
    ONES: tl.constexpr,  # the column of ones
    BQ: tl.constexpr,
    BP: tl.constexpr,
    PILOT: tl.constexpr,  # 0: a running maximum
    CUBIC: tl.constexpr,  # after a pilot, weights of one in so many blocks of 8 patches are a polynomial's; 0: none
    ESS: tl.constexpr,
    SKIP: tl.constexpr,
    EXACT: tl.constexpr,
    Q_LO: tl.constexpr,
    P_LO: tl.constexpr,
    BIAS: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(n_queries, BQ)
    coordinate = (tl.program_id(0) // tiles).to(tl.int64)
    # Rows past the end repeat the last one, and are not stored.
    o_row = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)  # [BQ]
    o_q = coordinate * n_queries + tl.minimum(o_row, n_queries - 1)
    o_p, o_v = tl.arange(0, BP), tl.arange(0, NV)
    first = split * patches_per_split
    count = tl.minimum(patches_per_split, n_filled - first)
    p_p = p + (coordinate * n_patches + first) * K
    p_v = v + (coordinate * n_patches + first) * NV

    p_q = q + o_q[:, None] * K
    b_qa = tl.load(p_q + tl.arange(0, KA)[None, :])  # [BQ, KA]
    b_qb = b_qa
    if KB:
        b_qb = tl.load(p_q + KA + tl.arange(0, KB)[None, :])  # [BQ, KB]
    b_scale = tl.load(scale + o_q)  # [BQ]
    b_m = tl.full([BQ], LEAST, tl.float32)
    b_s2 = tl.zeros([BQ], tl.float32)
    b_sums = tl.zeros([BQ, NV], tl.float32)
    missed = True
    if PILOT:
        # The mean weight of every PILOT-th tile, by a running maximum.
        b_s = tl.zeros([BQ], tl.float32)
        p_t = p_p
        for _ in range(0, count, PILOT * BP):
            b_l = _logits(p_q, b_qa, b_qb, p_t, o_p, n_columns, K, KA, KB, KC, BQ, BP) * b_scale[:, None]
            b_new = tl.maximum(b_m, tl.max(b_l, 1))
            b_s = b_s * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_l - b_new[:, None]), 1)
            b_m = b_new
            p_t += PILOT * BP * K
        n_pilot = (tl.cdiv(count, PILOT * BP) * BP).to(tl.float32)
        b_m = tl.maximum(b_m + tl.log2(b_s / n_pilot), LEAST) - MEAN_BITS

        # The sums, relative to it.
        p_t = p_p
        p_u = p_v
        for _ in range(0, count, BP):
            b_l = _logits(p_q, b_qa, b_qb, p_t, o_p, n_columns, K, KA, KB, KC, BQ, BP)
            b_x = b_l * b_scale[:, None] - b_m[:, None]  # [BQ, BP]
            b_w = tl.exp2(b_x)
            if CUBIC:
                # A thread holds two of each 8 columns: which are the polynomial's is known when this is compiled.
                b_w = tl.where((o_p // 8 % CUBIC == 0)[None, :], _power(b_x), b_w)
            if ESS:
                b_s2 += tl.sum(b_w * b_w, 1)
            b_v = tl.load(p_u + o_p[:, None] * NV + o_v[None, :])  # [BP, NV]
            # Matrix units truncate what they accumulate: a tile's sum starts at zero and is added in float32.
            b_sums += tl.dot(b_w.to(tl.float16), b_v)
            p_t += BP * K
            p_u += BP * NV
        missed = tl.max(tl.where(o_v[None, :] == ONES, b_sums, 0.0)) == float("inf")

    if missed:
        b_m = tl.full([BQ], LEAST, tl.float32)
        b_s2 = tl.zeros([BQ], tl.float32)
        b_sums = tl.zeros([BQ, NV], tl.float32)
        if EXACT:
            n_rows = (n_coordinates * n_queries).to(tl.int64)
            b_shift = tl.load(scale + n_rows + o_q)  # [BQ]
            b_unit = tl.load(scale + 2 * n_rows + o_q)  # [BQ]
            b_s = tl.zeros([BQ], tl.float32)
        for _ in range(0, count, BP):
            b_l = _logits(p_q, b_qa, b_qb, p_p, o_p, n_columns, K, KA, KB, KC, BQ, BP)
            b_top = tl.max(b_l, 1) * b_scale  # [BQ]
            if EXACT:
                b_top -= b_shift
            # One answer for the whole tile: can any of its weights still be seen beside the largest so far?
            seen = True
            if SKIP:
                seen = tl.max(b_top - b_m) > floor
            if seen:
                if EXACT:
                    # Products of float32 accuracy are good enough but for weights that decide the result.
                    if tl.max(b_top - b_m - tl.log2(tl.maximum(b_s, 1e-30))) > -6.0:
                        b_d = tl.zeros([BQ, BP], tl.float32)
                        for i in range(EXACT):
                            b_qi = tl.load(q + o_q * K + i).to(tl.float32)
                            b_qi += tl.load(q + o_q * K + Q_LO + i).to(tl.float32)
                            b_pi = tl.load(p_p + o_p * K + i).to(tl.float32)
                            if P_LO:
                                b_pi += tl.load(p_p + o_p * K + P_LO + i).to(tl.float32)
                            b_i = b_qi[:, None] - b_unit[:, None] * b_pi[None, :]
                            b_d += b_i * b_i
                        # Rows that fill the last tile have a bias of -inf; adding it keeps them out here too.
                        b_bias = tl.load(p_p + o_p * K + BIAS).to(tl.float32)  # [BP]
                        b_bias = tl.where(b_bias == float("-inf"), b_bias, 0.0)
                        b_l = b_d * (-0.5 * b_scale / b_unit)[:, None] + b_bias[None, :]
                    else:
                        b_l = b_l * b_scale[:, None] - b_shift[:, None]
                    b_top = tl.max(b_l, 1)
                b_new = tl.maximum(b_m, b_top - HEADROOM)
                b_fade = tl.exp2(b_m - b_new)
                b_m = b_new
                # Where logits are so large that the headroom is rounded away, the minimum keeps weights finite.
                b_ref = b_m[:, None]
                b_x = tl.minimum(b_l - b_ref, HEADROOM) if EXACT else b_l * b_scale[:, None] - b_ref
                b_w = tl.exp2(b_x)  # [BQ, BP]
                if ESS:
                    b_s2 = b_s2 * b_fade * b_fade + tl.sum(b_w * b_w, 1)
                if EXACT:
                    b_s = b_s * b_fade + tl.sum(b_w, 1)
                b_v = tl.load(p_v + o_p[:, None] * NV + o_v[None, :])  # [BP, NV]
                b_sums = b_sums * b_fade[:, None] + tl.dot(b_w.to(tl.float16), b_v)
            p_p += BP * K
            p_v += BP * NV

    o_out = (split * n_coordinates + coordinate) * n_queries + o_row
    m_row = o_row < n_queries
    tl.store(sums + o_out[:, None] * NV + o_v[None, :], b_sums, mask=m_row[:, None])
    tl.store(other + 2 * o_out, b_m, mask=m_row)
    tl.store(other + 2 * o_out + 1, b_s2, mask=m_row)
