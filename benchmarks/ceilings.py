"""What a GPU does of each unit of work alone: bytes from memory and from L2, products of half floats, exponentials.

Each through the simplest code that keeps the unit busy; benchmarks/gpu.py writes them beside its rates, in the units of
patchscore/engines/cost.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

MIB = 2**20


@triton.jit
def exponentials_kernel(out, rounds, BLOCK: tl.constexpr):
    """Exponentials of numbers in registers: neither memory nor L2 takes part."""
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = o_out.to(tl.float32) / 2.0**30  # [BLOCK]
    for _ in range(rounds):
        x = tl.exp2(-x)
    tl.store(out + o_out, x)


def exponentials(device: torch.device, programs: int, rounds: int, block: int = 1024) -> Callable[[], object]:
    out = torch.empty(programs * block, device=device)
    return lambda: exponentials_kernel[(programs,)](out, rounds, BLOCK=block)


def works(device: torch.device, dry: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """name -> (what to time, how many operations or bytes that is)."""
    n = 256 if dry else 8192
    a = torch.randn(n, n, device=device).half()
    source = torch.empty((1 if dry else 1024) * MIB // 4, device=device)
    target = torch.empty_like(source)
    # 16 MiB stay in an L2 of 40 or more; read 64 times from there.
    small, times = torch.zeros((1 if dry else 16) * MIB // 4, device=device), 64
    programs, rounds, block = (2, 3, 1024) if dry else (132 * 16, 4096, 1024)
    return {
        "memory_bytes_per_second": (lambda: target.copy_(source), 2 * source.nbytes),
        "l2_bytes_per_second": (lambda: small.expand(times, -1).sum(1), times * small.nbytes),
        "fp16_multiply_adds_per_second": (lambda: a @ a, n**3),
        "exponentials_per_second": (exponentials(device, programs, rounds, block), programs * rounds * block),
    }
