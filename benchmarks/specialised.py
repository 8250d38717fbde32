"""A prototype of `fused`'s loop with specialised warps, in Gluon: one warp copies tiles (TMA), eight take softmax sums.

Each program has two tiles of 128 queries, a group of four warps each, which share the copies: while one waits for its
products, the other takes exponentials. The reference log-weight is given, as by a pilot. For sm_90, and for rows of 32,
64 or 128 columns. It has never run: gpu.py holds it against float64 before it times it. It is no part of the package.

    python benchmarks/specialised.py          (what the compiler makes of it; no GPU is needed)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from patchscore.engines.fused.kernel import MEAN_BITS
from patchscore.engines.fused.plan import Plan, spectrum_of
from patchscore.engines.fused.rows import patch_rows, query_rows
from patchscore.windows import rows_as_pixels

# Triton 3.9 has another name for it than 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

BQ, BP, STAGES = 128, 128, 3
VALUES = 16
REGISTERS = (232, 24)  # of a thread that computes, and of one that copies
PROGRAMS = 8  # a multiprocessor, one at a time
SAMPLE = 4096
"""Patches whose mean weight sets the reference."""


@gluon.jit
def copy(p, v, p_tiles, v_tiles, full, empty, first, count, BP: gl.constexpr, STAGES: gl.constexpr):
    stage = 0
    phase = 1  # a wait for the phase before the first returns at once
    for at in range(0, count, BP):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), p.block_type.nbytes + v.block_type.nbytes)
        load_tile(p, [first + at, 0], full.index(stage), p_tiles.index(stage))
        load_tile(v, [first + at, 0], full.index(stage), v_tiles.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def compute(
    queries, p_tiles, v_tiles, full, empty, scale, reference, sums, o_first, o_out, count,
    BQ: gl.constexpr, BP: gl.constexpr, NV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BP, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    o_q = o_first + gl.arange(0, BQ, gl.SliceLayout(1, LOGITS))
    b_scale = gl.expand_dims(gl.load(scale + o_q), 1)  # [BQ, 1]
    b_m = gl.expand_dims(gl.load(reference + o_q), 1)
    b_sums = gl.zeros([BQ, NV], gl.float32, SUMS)
    b_none = gl.zeros([BQ, BP], gl.float32, LOGITS)
    b_zero = gl.zeros([BQ, NV], gl.float32, SUMS)
    stage = 0
    phase = 0
    for _ in range(0, count, BP):
        mbarrier.wait(full.index(stage), phase)
        product = warpgroup_mma(queries, p_tiles.index(stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_l = warpgroup_mma_wait(0, [product])  # [BQ, BP]
        b_w = gl.convert_layout(gl.exp2(b_l * b_scale - b_m).to(gl.float16), WEIGHTS)
        product = warpgroup_mma(b_w, v_tiles.index(stage), b_zero, use_acc=False, is_async=True)
        b_sums += warpgroup_mma_wait(0, [product])  # [BQ, NV]
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    o_row = o_out + gl.arange(0, BQ, gl.SliceLayout(1, SUMS))
    o_v = gl.arange(0, NV, gl.SliceLayout(0, SUMS))
    gl.store(sums + gl.expand_dims(o_row, 1) * NV + gl.expand_dims(o_v, 0), b_sums)


@gluon.jit
def specialised_kernel(
    q,  # [n_queries, K] fp16, n_queries a multiple of 2 BQ
    p,  # [n_patches, K] fp16, n_patches a multiple of BP
    v,  # [n_patches, NV] fp16
    scale,  # [n_queries] bits a unit of product
    reference,  # [n_queries] bits
    sums,  # [splits, n_queries, NV] fp32, out
    n_queries,
    n_patches,
    patches_per_split,
    K: gl.constexpr,
    NV: gl.constexpr,
    BQ: gl.constexpr,
    BP: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING: gl.constexpr,
    COPYING: gl.constexpr,
):
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BQ, K], gl.float16)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BP, K], gl.float16)
    V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BP, NV], gl.float16)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    p_all = tma.make_tensor_descriptor(p, [n_patches, K], [K, 1], [BP, K], P)
    v_all = tma.make_tensor_descriptor(v, [n_patches, NV], [NV, 1], [BP, NV], V)
    p_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, BP, K], P)
    v_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, BP, NV], V)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups are done with it
    o_first = gl.program_id(0) * 2 * BQ
    o_row = (o_first + gl.arange(0, BQ, gl.SliceLayout(1, ROWS))).to(gl.int64)
    o_k = gl.arange(0, K, gl.SliceLayout(0, ROWS))
    p_q = q + gl.expand_dims(o_row, 1) * K + gl.expand_dims(o_k, 0)
    one = gl.allocate_shared_memory(gl.float16, [BQ, K], Q)
    two = gl.allocate_shared_memory(gl.float16, [BQ, K], Q)
    one.store(gl.load(p_q))
    two.store(gl.load(p_q + BQ * K))
    fence_async_shared()
    first = gl.program_id(1) * patches_per_split
    count = gl.minimum(patches_per_split, n_patches - first)
    o_out = gl.program_id(1).to(gl.int64) * n_queries + o_first
    gl.warp_specialize(
        [
            (compute, (one, p_tiles, v_tiles, full, empty, scale, reference, sums, o_first, o_out, count,
                       BQ, BP, NV, STAGES)),
            (compute, (two, p_tiles, v_tiles, full, empty, scale, reference, sums, o_first + BQ, o_out + BQ, count,
                       BQ, BP, NV, STAGES)),
            (copy, (p_all, v_all, p_tiles, v_tiles, full, empty, first, count, BP, STAGES)),
        ],
        [4, 1],
        [COMPUTING, COPYING],
    )  # fmt: skip


def constants(columns: int) -> dict[str, int]:
    computing, copying = REGISTERS
    return {"K": columns, "NV": VALUES, "BQ": BQ, "BP": BP, "STAGES": STAGES, "COMPUTING": computing,
            "COPYING": copying}  # fmt: skip


def compiled(columns: int):
    """The kernel for sm_90, ahead of time."""
    names, of = specialised_kernel.arg_names, constants(columns)
    types = {**dict.fromkeys(("q", "p", "v"), "*fp16"), **dict.fromkeys(("scale", "reference", "sums"), "*fp32")}
    signature = {name: "constexpr" if name in of else types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    source = GluonASTSource(specialised_kernel, signature, {(names.index(n),): x for n, x in of.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def prepare(bank, k: int, sigma: float, z: torch.Tensor, competition) -> Callable[[], torch.Tensor]:
    """The denoised batch [B, C, H, W], circular padding, from the 61 leading principal axes; rows and the reference are
    made once. For high noise, where no tile is skipped."""
    channels, device, unit = z.shape[1], z.device, 127.5 / 128
    spectrum = spectrum_of(bank, k, device)
    plan = Plan(61, axes=True, pilot=True)
    (group,) = competition.groups
    levels = torch.full((len(z),), sigma, dtype=torch.float64, device=device)
    queries = query_rows(z, levels, competition, group, plan, spectrum, unit)
    patches = patch_rows(bank, 0, len(bank), k, group, plan, spectrum, unit, device)
    q, p, v, scale = queries.rows[0], patches.rows[0], patches.values[0], queries.scale[0, 0]
    sample = p[: patches.filled][torch.randperm(patches.filled, device=device)[:SAMPLE]]
    bits = (q.float() @ sample.float().T) * scale[:, None]
    reference = torch.logsumexp(bits * 0.6931472, 1) / 0.6931472 - torch.tensor(float(len(sample))).log2().item()
    reference = (reference - MEAN_BITS.value).float().contiguous()
    programs = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    splits = max(1, min(programs // (len(q) // (2 * BQ)), len(p) // (8 * BP)))
    each = -(-len(p) // splits // BP) * BP
    splits = -(-len(p) // each)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))

    def work() -> torch.Tensor:
        sums = torch.empty(splits, len(q), VALUES, device=device)
        specialised_kernel[(len(q) // (2 * BQ), splits)](
            q, p, v, scale, reference, sums, len(q), len(p), each, **constants(plan.columns), num_warps=4
        )
        total = sums.sum(0, dtype=torch.float64)[None]
        numerator = (total[..., :channels] + total[..., channels + 1 : 2 * channels + 1]) / unit
        return rows_as_pixels(numerator / total[..., channels : channels + 1], len(z), group)

    return work


def main() -> None:
    import compile_report

    from patchscore.engines.autotune import Configuration

    for columns in (32, 64, 128):
        used, sass = compile_report.resources(compiled(columns))
        counted = compile_report.per_pair(sass, Configuration(BQ, BP, 4, STAGES), 1)
        print(f"sm_90 K={columns} {BQ} x {BP} {STAGES}st {used} instr/pair={counted['per_pair']:.2f} "
              f"changes of registers={sass.count('USETMAXREG')} bulk copies={sass.count('UTMALDG')}")  # fmt: skip


if __name__ == "__main__":
    main()
