"""Errors of the `fused` engine's number formats on real images, against float64, from noise 0.005 to 100.

No GPU is needed: the rows are the engine's own (the plan it chooses, its half floats, its bias), their product is taken
in float32, decisive weights from differences where the plan says so, and weights are rounded to half floats as in the
kernel. What is not in it is the order in which matrix units add. Writes benchmarks/results/fused_precision.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import record
import torch
import torch.nn.functional as F

import patchscore as ps
from patchscore.engines import cost
from patchscore.engines.fused import kernel
from patchscore.engines.fused.launch import TOLERANCE
from patchscore.engines.fused.plan import choose_plan, spectrum_of
from patchscore.engines.fused.rows import patch_rows, query_rows
from patchscore.windows import Axis, Competition, Group, windows_as_rows

SIGMAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 10.0, 30.0, 100.0)
IMAGES = {3: 500, 5: 400, 7: 400, 11: 250, 17: 250}
UNIT = 127.5 / 128
LOG2E = 1.4426950408889634
CPU = torch.device("cpu")
POWERS = [factor.value for factor in (kernel.POWER_3, kernel.POWER_2, kernel.POWER_1, kernel.POWER_0)]


def mean_of(
    logits: torch.Tensor, values: torch.Tensor, half: bool = False, cubic: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax mean (base 2) and effective sample size; weights of half floats, one in `cubic` blocks a polynomial's."""
    bits = logits - logits.amax(1, keepdim=True) + 14
    w = torch.exp2(bits)
    if cubic:
        whole = bits.round()
        polynomial = torch.full_like(bits, POWERS[0])
        for factor in POWERS[1:]:
            polynomial = polynomial * (bits - whole) + factor
        some = torch.arange(bits.shape[1]) // 8 % cubic == 0
        w[:, some] = (polynomial * torch.exp2(whole))[:, some]
    w = w.half().double() if half else w
    s = w.sum(1, keepdim=True)
    return w @ values / s, (s.square() / w.square().sum(1, keepdim=True))[:, 0]


def variance_of(logits: torch.Tensor, values: torch.Tensor, half: bool) -> torch.Tensor:
    """Posterior variance about the mean, float64 sums; of weights as `mean_of` has them."""
    w = torch.exp2(logits - logits.amax(1, keepdim=True) + 14)
    w = w.half().double() if half else w.double()
    w /= w.sum(1, keepdim=True)
    return w @ values.square() - (w @ values).square()


def measure(bank: ps.PatchBank, unseen: torch.Tensor, k: int, queries: int) -> list[dict]:
    """Rows of errors at every noise; queries are pixels of a noisy image of the bank and of two that are not in it."""
    generator = torch.Generator().manual_seed(k)
    axis = Axis(range(32), range(k // 2, 32 - k // 2))
    group = Group(axis, axis)
    competition = Competition(k, "circular", (group,))
    d = 3 * k * k
    spectrum = spectrum_of(bank, k, CPU)
    x = torch.cat([bank.chunk(5, 6, torch.float64), unseen])
    pick = torch.randperm(len(x) * 1024, generator=generator)[:queries]

    def windows(images: torch.Tensor, size: int, coordinates: range, mode: str = "constant") -> torch.Tensor:
        return windows_as_rows(F.pad(images, (size // 2,) * 4, mode=mode), size, coordinates, coordinates, group)[0]

    each = [bank.chunk(i, i + 1, torch.float64) for i in range(len(bank))]
    p = torch.cat([windows(image, k, axis.centres) for image in each])
    v = torch.cat([windows(image, 1, axis.centres) for image in each])
    half_square = p.square().sum(1) / 2
    rows = []
    for sigma in SIGMAS:
        z = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        q = windows(z, k, axis.queries, "circular")[pick]
        exact_bits = (q @ p.T - half_square) * (LOG2E / sigma**2)
        exact, ess = mean_of(exact_bits, v)

        plan = choose_plan(spectrum, d, sigma, TOLERANCE, uint8=True, axes=True)
        sigmas = torch.full((len(x),), sigma, dtype=torch.float64)
        ours = query_rows(z, sigmas, competition, group, plan, spectrum, UNIT)
        logits = []
        for start in range(0, len(bank), 25):
            stop = min(start + 25, len(bank))
            patches = patch_rows(bank, start, stop, k, group, plan, spectrum, UNIT, CPU).rows[0]
            patches = patches[: (stop - start) * len(axis.centres) ** 2]
            logits.append((ours.rows[0, pick].float() @ patches.float().T) * ours.scale[0, 0, pick][:, None])
        bits = torch.cat(logits, 1)
        if plan.exact:
            bits -= ours.scale[1, 0, pick][:, None]
            top = bits.amax(1, keepdim=True)
            share = bits - top - torch.log2(torch.exp2(bits - top).sum(1, keepdim=True))
            i, j = (share > -6).nonzero().T
            bits[i, j] = (q[i].float() - p[j].float()).square().sum(1) * (-0.5 * LOG2E / sigma**2)
        share = cost.cubic(plan.columns) if plan.pilot else 0
        error = (mean_of(bits, v, half=True, cubic=share)[0] - exact).abs()
        # What a divergence adds up.
        variance = variance_of(exact_bits, v, half=False)
        apart = [variance_of(bits, v, half) - variance for half in (False, True)]
        off = [(x.abs() / variance.clamp(min=1e-4 * sigma**2)).flatten() for x in apart]
        rows.append(
            {
                "k": k,
                "sigma": sigma,
                "images": len(bank),
                "windows": len(v),
                "columns": plan.columns,
                "numbers": plan.size,
                "axes": plan.axes,
                "q_lo": plan.q_lo,
                "exact": plan.exact,
                "ess_median": ess.median().item(),
                "rms": error.square().mean().sqrt().item(),
                "worst": error.max().item(),
                # Relative; by the errors of log-weights alone, and by rounded weights too.
                "variance_median": [x.median().item() for x in off],
                "variance_worst": [x.max().item() for x in off],
                "divergence": [(x.sum().abs() / variance.sum().clamp(min=1e-30)).item() for x in apart],
            }
        )
        print(rows[-1], flush=True)
    return [row | plan_of_all(bank, k, row["sigma"]) for row in rows]


def plan_of_all(bank: ps.PatchBank, k: int, sigma: float) -> dict:
    """What the whole of CIFAR-10 would get."""
    spectrum = replace(spectrum_of(bank, k, CPU), windows=50_000 * (32 - 2 * (k // 2)) ** 2)
    plan = choose_plan(spectrum, 3 * k * k, sigma, TOLERANCE, uint8=True, axes=True)
    return {"columns_50000": plan.columns, "numbers_50000": plan.size, "pilot_50000": plan.pilot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder or tar of CIFAR-10's training images")
    parser.add_argument("--queries", type=int, default=192)
    parser.add_argument("--plans", action="store_true", help="only the plans of all of CIFAR-10; errors stay")
    options = parser.parse_args()
    images = record.shuffled(record.opened(options.images, limit=1000))
    unseen = ps.PatchBank(images[-2:]).chunk(0, 2, torch.float64)
    known = record.read("fused_precision") if options.plans else {"queries": options.queries}
    rows = []
    for k, count in IMAGES.items():
        bank = ps.PatchBank(images[:count])
        if options.plans:
            rows += [row | plan_of_all(bank, k, row["sigma"]) for row in known["rows"] if row["k"] == k]
        else:
            rows += measure(bank, unseen, k, options.queries)
    record.write("fused_precision", __doc__.splitlines()[0], queries=known["queries"], tolerance=TOLERANCE, rows=rows)


if __name__ == "__main__":
    main()
