"""Engine `sliding` on the CPU: exact sums straight from the raw images, in C++ (csrc/sliding/).

Two windows moved one step together share all but one row or column, so distances slide along diagonals and nothing is
stored of a bank but its images. This file passes pointers; cuda.py is the engine's half on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...bank import PatchBank
from ...native import missing, native
from ...posterior import PosteriorSum, merge_all
from ...windows import Axis, Competition
from ..base import Combine, Engine
from ..whole import whole_product

PAIR_SECONDS = 0.9e-9
"""Of one thread with AVX2 on 20,000 CIFAR-10 images: 0.7 (k = 3), 1.05 (7), 0.8 (11). Others, `pruned` among them, are
faster or slower alike, so it decides well which of the two serves."""


class SlidingCpu(Engine):
    """`sliding` on the CPU, in float32 with float64 totals, on torch.get_num_threads() threads.

    The numbers do not depend on the number of threads, on `memory_limit` or on what else is in the batch.
    PATCHSCORE_SIMD (avx512, avx2 or plain) forces an instruction set.
    """

    name = "sliding"
    moments = True
    gradients = True

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        return missing

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        return PAIR_SECONDS * len(z) * len(bank) * competition.pairs_per_image

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
        moments: bool = False,
    ) -> PosteriorSum:
        """A thread takes less than 32 MiB up to 128 x 128 in colour; `memory_limit` bounds threads.

        Raises:
            ValueError: `memory_limit` cannot hold one thread, PATCHSCORE_SIMD names an instruction set that this
                machine lacks, or the arguments do not fit each other.
        """
        return self.posterior_sums(z, sigma, bank, [competition], memory_limit, moments)[0]

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigma: Tensor,
        direction: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> Tensor:
        check_float32(z)  # a second pass over the pairs, after one for weights and means
        total = self.first_pass(z, sigma, bank, competition, memory_limit, combine)
        if competition.patch_size is None:
            return whole_product(z, sigma, direction, bank, total, memory_limit)
        result = _second_pass(transposed, False, z, sigma, direction, bank, competition, total, memory_limit)
        return result.to(direction.dtype)

    def window_sums(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> tuple[PosteriorSum, Tensor]:
        check_float32(z)
        total = self.first_pass(z, sigma, bank, competition, memory_limit, combine)
        nothing = torch.zeros(z.shape, dtype=torch.float32)
        return total, _second_pass(True, True, z, sigma, nothing, bank, competition, total, memory_limit)

    def posterior_sums(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competitions: Sequence[Competition],
        memory_limit: int,
        moments: bool = False,
    ) -> list[PosteriorSum]:
        """`posterior_sum` for several competitions, as calibration asks for several patch sizes at one noise level.

        One pass over the bank serves them all, where `memory_limit` and, on the CPU, 32 MiB a thread have room for
        their sums; otherwise a few passes do. The numbers are those of separate calls.
        """
        found = [_sums_of_piece(z, sigma, piece, competitions, memory_limit, moments) for piece in bank.pieces()]
        return [merge_all(parts) for parts in zip(*found, strict=True)]


def _sums_of_piece(
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competitions: Sequence[Competition],
    memory_limit: int,
    moments: bool,
) -> list[PosteriorSum]:
    assert native is not None, "unavailable() says when this engine cannot serve"
    totals = [_empty(z, competition, moments) for competition in competitions]
    native.sliding(
        z=z.detach().to("cpu", torch.float32).contiguous().numpy(),
        sigma=sigma.detach().to("cpu", torch.float64).contiguous().numpy(),
        images=bank.images.numpy(),
        indices=None if bank.indices is None else bank.indices.to(torch.int64).contiguous().numpy(),
        competitions=[
            (
                competition.patch_size or 0,
                competition.padding_mode == "circular",
                _groups(competition).numpy(),
                *(part.numpy() for part in (total.m, total.s, total.s2, total.v)),
                *(None if part is None else part.numpy() for part in (total.v2, total.sl)),
            )
            for competition, total in zip(competitions, totals, strict=True)
        ],
        threads=torch.get_num_threads(),
        memory_limit=memory_limit,
        simd=os.environ.get("PATCHSCORE_SIMD", ""),
    )
    return totals


def check_float32(z: Tensor) -> None:
    if z.dtype == torch.float64:
        raise ValueError('z: got float64, engine "sliding" has gradients in float32; engine="reference" has both')


def _second_pass(
    transposed: bool,
    averaging: bool,
    z: Tensor,
    sigma: Tensor,
    direction: Tensor,
    bank: PatchBank,
    competition: Competition,
    total: PosteriorSum,
    memory_limit: int,
) -> Tensor:
    """[B, C, H, W] float64: what csrc/sliding/sliding.h calls a JacobianProduct."""
    assert native is not None
    # Pixels that the competition leaves out have no weights.
    evidence = torch.where(total.s > 0, total.m + total.s.log(), 0.0)
    result = torch.zeros(z.shape, dtype=torch.float64)
    native.sliding_product(
        transposed=transposed,
        averaging=averaging,
        z=z.detach().to("cpu", torch.float32).contiguous().numpy(),
        sigma=sigma.detach().to("cpu", torch.float64).contiguous().numpy(),
        images=bank.images.numpy(),
        indices=None if bank.indices is None else bank.indices.to(torch.int64).contiguous().numpy(),
        patch_size=competition.patch_size,
        circular=competition.padding_mode == "circular",
        groups=_groups(competition).numpy(),
        evidence=evidence.numpy(),
        mean=torch.where(total.s > 0, total.mean, 0.0).numpy(),
        direction=direction.detach().to("cpu", torch.float32).contiguous().numpy(),
        result=result.numpy(),
        threads=torch.get_num_threads(),
        memory_limit=memory_limit,
        simd=os.environ.get("PATCHSCORE_SIMD", ""),
    )
    return result


def _empty(z: Tensor, competition: Competition, moments: bool) -> PosteriorSum:
    pixels = z.shape[2:] if competition.patch_size else (1, 1)
    m = torch.full((len(z), 1, *pixels), -torch.inf, dtype=torch.float64)
    v = torch.zeros(z.shape, dtype=torch.float64)
    total = PosteriorSum(m=m, s=torch.zeros_like(m), v=v, s2=torch.zeros_like(m))
    return replace(total, v2=v.clone(), sl=torch.zeros_like(m)) if moments else total


def _groups(competition: Competition) -> Tensor:
    """[G, 8] rows and columns of every group."""
    groups = [[*_axis(group.rows), *_axis(group.cols)] for group in competition.groups]
    return torch.tensor(groups, dtype=torch.int64).reshape(-1, 8)


def _axis(axis: Axis) -> tuple[int, int, int, int]:
    """(first query, end, first window, end) for the native module; -1 locks."""
    for coordinates in (axis.queries, axis.windows):
        if coordinates is not None and coordinates.step != 1:
            raise ValueError(f"competition: got coordinates {coordinates}, takes steps of 1")
    windows = range(-1, -1) if axis.windows is None else axis.windows
    return axis.queries.start, axis.queries.stop, windows.start, windows.stop
