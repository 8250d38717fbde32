"""One small call of one kernel, held against `reference` on the CPU: the first thing to run on a GPU, and what a
sanitizer or a profiler runs.

    python benchmarks/gpu_smoke.py sliding-circular          (exit status 0 where the numbers are right)
    ncu ... python benchmarks/gpu_smoke.py fused --large     (of the size that benchmarks time; not checked)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass

os.environ["PATCHSCORE_STRICT"] = "1"
os.environ.setdefault("PATCHSCORE_AUTOTUNE", "0")

import record

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(record.ROOT / "tests"))
    import interpreted  # noqa: F401
import torch

import patchscore as ps
from patchscore.pixels import to_values


@dataclass(frozen=True)
class Case:
    """engine, patch size (None: whole images), noise, padding, side and number of the images, their type, and whether
    the variance or products with the Jacobian are asked for."""

    engine: str
    k: int | None
    sigma: float
    padding: str = "circular"
    side: int = 16
    images: int = 40
    floats: bool = False
    local: bool = False
    moments: bool = False
    gradients: bool = False


CASES = {
    "fused": Case("fused", 3, 0.5),
    "fused-split": Case("fused", 7, 0.4),  # two halves of the query; tiles that are skipped
    "fused-exact": Case("fused", 3, 0.02),  # weights from differences
    "fused-blocks": Case("fused", 11, 0.5, images=60),  # more columns than stay in shared memory
    # No multiple of 8 windows a row: tiles with pairs that do not exist.
    "sliding-circular": Case("sliding", 5, 0.2, side=32),
    "sliding-zeros": Case("sliding", 7, 0.5, "zeros"),
    "sliding-local": Case("sliding", 3, 0.5, local=True),
    "sliding-floats": Case("sliding", 3, 0.2, floats=True),
    "sliding-moments": Case("sliding", 5, 0.5, moments=True),
    "sliding-gradients": Case("sliding", 5, 0.5, gradients=True),
    "sliding-gradients-zeros": Case("sliding", 3, 0.5, "zeros", gradients=True),
    "whole-images": Case("sliding", None, 1.0),
    "pruned": Case("pruned", 7, 0.7, "zeros", images=400),
    "pruned-moments": Case("pruned", 3, 0.3, images=400, moments=True),
    "pruned-floats": Case("pruned", 3, 0.3, images=400, floats=True),
}
LARGE = {"side": 32, "images": 10_000}


def machine_of(case: Case, bank: ps.PatchBank, engine: str, **options) -> ps.Denoiser:
    if case.k is None:
        return ps.IdealScore(bank, engine=engine, **options)
    if case.local:
        return ps.LocalScore(bank, case.k, engine=engine, **options)
    return ps.EquivariantLocalScore(bank, case.k, padding_mode=case.padding, engine=engine, **options)


def gradients(name: str, case: Case, bank: ps.PatchBank, z: torch.Tensor, device: torch.device, large: bool) -> None:
    """J^T u and J u, within a thousandth of their largest number."""
    machine, exact = machine_of(case, bank, case.engine), machine_of(case, bank, "reference")
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    for product in ("vjp", "jvp"):
        found = getattr(machine, product)(z.to(device), case.sigma, u.to(device)).cpu()
        if large:
            continue
        expected = getattr(exact, product)(z.double(), case.sigma, u.double())
        error = (found - expected).abs().max().item() / expected.abs().max().item()
        print(f"{name} on {device}: {product} off by {error:.2g} of its largest number, 1e-3 promised")
        if not error <= 1e-3:
            sys.exit(1)


def sampled(name: str, case: Case, bank: ps.PatchBank, z: torch.Tensor, device: torch.device, large: bool) -> None:
    """All pixels within six of their standard errors, 90% within two, of the posterior mean and variance."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        print(f"an index cannot be built: {error}")
        sys.exit(77)
    with tempfile.TemporaryDirectory() as folder:
        cells = 16 if len(bank) <= 40 else None
        index = ps.PatchIndex.build(bank, case.k, folder, cells=cells, progress=False)
        machine = machine_of(case, bank, "pruned", index=index, budget=0.01 if large else 0.1)
        est = machine.estimate(z.to(device), case.sigma, moments=case.moments)
    if large:
        return
    exact = machine_of(case, bank, "reference").estimate(z.double(), case.sigma, moments=case.moments)
    pairs = [(est.mean, est.stderr, exact.mean)]
    if case.moments:
        pairs.append((est.variance, est.variance_stderr, exact.variance))
    for value, stderr, truth in pairs:
        away, bound = (value.cpu() - truth).abs(), stderr.cpu() + 5e-4
        within = [(away <= times * bound).double().mean().item() for times in (2, 6)]
        print(f"{name} on {device}: {est.engine} served, worst pixel {away.max().item():.2g}, largest standard error "
              f"{stderr.max().item():.2g}, within two {within[0]:.1%}, within six {within[1]:.2%}")  # fmt: skip
        if "pruned" not in est.engine.split(" and ") or within[0] < 0.9 or within[1] < 1:
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--large", action="store_true", help="as large as what benchmarks time; not checked")
    parser.add_argument("--dry", action="store_true", help="tiny, for an interpreter")
    options = parser.parse_args()
    case = CASES[options.case]
    if options.large:
        case = Case(**{**vars(case), **LARGE})
    if options.dry and case.engine == "pruned":
        case = Case(**{**vars(case), "k": 3, "side": 8, "images": 40, "sigma": 1.5})
    elif options.dry:
        case = Case(**{**vars(case), "side": max(8, (case.k or 0) + 2), "images": 5})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = record.smooth(3, case.side, case.images)
    bank = ps.PatchBank(to_values(images) if case.floats else images)
    batch = 16 if options.large else 2
    x0 = bank.chunk(0, batch)
    z = x0 + case.sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))

    if case.gradients:
        return gradients(options.case, case, bank, z, device, options.large)
    if case.engine == "pruned":
        return sampled(options.case, case, bank, z, device, options.large)
    est = machine_of(case, bank, case.engine).estimate(z.to(device), case.sigma, moments=case.moments)
    if options.large:
        return
    exact = machine_of(case, bank, "reference").estimate(z.double(), case.sigma, moments=case.moments)
    error = (est.mean.cpu() - exact.mean).abs()
    if case.moments:
        assert est.variance is not None
        assert exact.variance is not None
        error = torch.maximum(error, (est.variance.cpu() - exact.variance).abs())
    # What the engines promise for sigma >= 0.05, or below.
    promised = 1e-3 if case.engine == "fused" or case.sigma < 0.05 else 1e-4
    wrong = ~(error <= promised)
    print(f"{options.case} on {device}: {est.engine} served, worst pixel {error.max().item():.2g}, "
          f"{int(wrong.sum())} of {wrong.numel()} beyond what is promised")  # fmt: skip
    if case.engine not in est.engine.split(" and ") or wrong.any():
        sys.exit(1)


if __name__ == "__main__":
    main()
