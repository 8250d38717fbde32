"""The error of `pruned` at several budgets, estimated and true: python examples/pruned.py"""

import tempfile

import torch

import patchscore as ps

bank = ps.PatchBank.open("fashion-mnist", limit=200)
z = bank.chunk(0, 4) + 0.7 * torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
exact = ps.EquivariantLocalScore(bank, patch_size=5).estimate(z, sigma=0.7)
with tempfile.TemporaryDirectory() as folder:
    index = ps.PatchIndex.build(bank, patch_sizes=5, path=folder)
    for budget in (0.003, 0.01, 0.03, 0.1):
        sampling = ps.EquivariantLocalScore(bank, patch_size=5, engine="pruned", index=index, budget=budget)
        est = sampling.estimate(z, sigma=0.7)
        error = est.mean - exact.mean
        rms, stated = error.square().mean().sqrt(), est.stderr.square().mean().sqrt()
        inside = (error.abs() <= 2 * est.stderr + 1e-6).float().mean()
        print(f"{est.pairs / exact.pairs:.1%} of pairs: rms {rms:.4f}, stated {stated:.4f}, {inside:.0%} within two")
