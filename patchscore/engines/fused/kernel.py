"""The dense kernel: softmax sums of query rows over patch rows, never a matrix of logits in memory.

A program keeps a tile of queries and walks over its share of the patches: one matrix product gives a tile of logits, an
online softmax (base 2) turns them into weights, a second product with [values, 1] adds value and denominator. Names:
o_ offsets, p_ pointers, b_ blocks; a comment gives each block's shape, BQ queries, BP patches, K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADROOM = tl.constexpr(14.0)
"""The largest weight of a tile is 2^14: half floats then hold weights down to 2^-38 of it."""


@triton.jit
def _logits(b_qa, b_qb, p_p, o_p, K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr):
    """[BQ, BP] query rows times patch rows; the columns come in two blocks, as sizes of blocks are powers of two."""
    b_pa = tl.load(p_p + o_p[None, :] * K + tl.arange(0, KA)[:, None])  # [KA, BP]
    b_l = tl.dot(b_qa, b_pa)  # [BQ, BP]
    if KB:
        b_pb = tl.load(p_p + o_p[None, :] * K + (KA + tl.arange(0, KB))[:, None])  # [KB, BP]
        b_l = tl.dot(b_qb, b_pb, b_l)
    return b_l


# Sizes differ from call to call: none is worth a kernel of its own.
@triton.jit(do_not_specialize=["n_coordinates", "n_queries", "n_patches", "patches_per_split", "n_columns"])
def dense_kernel(
    q,  # [L, n_queries, K] fp16, queries
    scale,  # [3, L, n_queries] fp32: bits a unit of product; bits of |q|^2 / 2; unit of q over unit of p
    p,  # [L, n_patches, K] fp16, patches; n_patches is a multiple of BP
    v,  # [L, n_patches, NV] fp16, values, then a column of ones
    sums,  # [splits, L, n_queries, NV] fp32, out: sums of weighted values
    other,  # [splits, L, n_queries, 2] fp32, out: reference in bits, sum of squared weights
    n_coordinates,  # L, locked coordinates with patches of their own
    n_queries,
    n_patches,
    patches_per_split,
    n_columns,  # K again, as a number to loop to
    floor,  # bits above the reference under which a weight cannot be seen
    K: tl.constexpr,
    KA: tl.constexpr,
    KB: tl.constexpr,
    KC: tl.constexpr,
    NV: tl.constexpr,
    BQ: tl.constexpr,
    BP: tl.constexpr,
    SKIP: tl.constexpr,
    EXACT: tl.constexpr,
    Q_LO: tl.constexpr,
    P_LO: tl.constexpr,
    BIAS: tl.constexpr,
):
    split = tl.program_id(1)
    tiles = tl.cdiv(n_queries, BQ)
    coordinate = (tl.program_id(0) // tiles).to(tl.int64)
    # Rows past the end repeat the last one, and are not stored.
    o_row = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)  # [BQ]
    o_q = coordinate * n_queries + tl.minimum(o_row, n_queries - 1)
    o_p, o_v = tl.arange(0, BP), tl.arange(0, NV)
    first = split.to(tl.int64) * patches_per_split
    count = tl.minimum(patches_per_split, n_patches - first)
    p_p = p + (coordinate * n_patches + first) * K
    p_v = v + (coordinate * n_patches + first) * NV

    p_q = q + o_q[:, None] * K
    if KC == 0:
        b_qa = tl.load(p_q + tl.arange(0, KA)[None, :])  # [BQ, KA]
        b_qb = tl.load(p_q + KA + tl.arange(0, KB)[None, :]) if KB else b_qa  # [BQ, KB]
    b_scale = tl.load(scale + o_q)  # [BQ]
    b_m = tl.full([BQ], float("-inf"), tl.float32)
    b_s2 = tl.zeros([BQ], tl.float32)
    b_sums = tl.zeros([BQ, NV], tl.float32)
    if EXACT:
        n_rows = n_coordinates * n_queries
        b_shift = tl.load(scale + n_rows + o_q)  # [BQ]
        b_unit = tl.load(scale + 2 * n_rows + o_q)  # [BQ]
        b_s = tl.zeros([BQ], tl.float32)

    for _ in range(0, count, BP):
        if KC == 0:
            b_l = _logits(b_qa, b_qb, p_p, o_p, K, KA, KB)  # [BQ, BP]
        else:
            b_l = tl.zeros([BQ, BP], tl.float32)
            for c in range(0, n_columns, KC):
                b_qc = tl.load(p_q + c + tl.arange(0, KC)[None, :])  # [BQ, KC]
                b_pc = tl.load(p_p + o_p[None, :] * K + c + tl.arange(0, KC)[:, None])  # [KC, BP]
                b_l = tl.dot(b_qc, b_pc, b_l)
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
                if tl.max(b_top - b_m - tl.log2(b_s)) > -6.0:
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
            b_s2 = b_s2 * b_fade * b_fade + tl.sum(b_w * b_w, 1)
            if EXACT:
                b_s = b_s * b_fade + tl.sum(b_w, 1)
            b_v = tl.load(p_v + o_p[:, None] * NV + o_v[None, :])  # [BP, NV]
            # Matrix units truncate what they accumulate: a tile's sum starts at zero and is added in float32.
            b_sums = b_sums * b_fade[:, None] + tl.dot(b_w.to(tl.float16), b_v)
        p_p += BP * K
        p_v += BP * NV

    o_out = (split.to(tl.int64) * n_coordinates + coordinate) * n_queries + o_row
    m_row = o_row < n_queries
    tl.store(sums + o_out[:, None] * NV + o_v[None, :], b_sums, mask=m_row[:, None])
    tl.store(other + 2 * o_out, b_m, mask=m_row)
    tl.store(other + 2 * o_out + 1, b_s2, mask=m_row)
