"""An index of latents: error, stated error, coverage and CPU time of `pruned` beside exact sums, 4 and 16 channels.

Latents of 32 x 32 are made of photographs by a fixed linear encoder: sixteen CIFAR-10 images make one of 128 x 128, and
each block of 4 x 4 pixels its leading principal components, as many as channels, divided by one number so that their
rms is 1. Denoised are rows of an image that is not in the bank. Beside it stand exact sums over as many images as its
CPU time allows. Errors are rms differences from exact sums, in the latents' units; coverage is over several seeds.
Building the index is in nobody's time. Writes results/latents.json.

    OMP_NUM_THREADS=1 python benchmarks/latents.py --images cifar10
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pruned_cpu import interior, rms
from record import write
from torch.nn import functional

import patchscore as ps
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.sliding.cpu import SlidingCpu

MEMORY = 2**30
LATENTS = 2000
CHANNELS = (4, 16)
PATCHES = (3, 5)
LEVELS = (0.3, 0.6, 1.2, 2.5)
BUDGET = 0.01
SEEDS = 4
BAND = range(12, 20)  # rows that are denoised: a quarter, for the benchmark's own time
BLOCK = 4


def encoded(photographs: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, channels, 32, 32] of [16 N, 3, 32, 32] values."""
    grid = photographs.unflatten(0, (-1, 4, 4)).permute(0, 3, 1, 4, 2, 5)  # [N, 3, 4, 32, 4, 32]
    tiled = grid.flatten(4, 5).flatten(2, 3)
    blocks = functional.pixel_unshuffle(tiled, BLOCK)  # [N, 48, 32, 32]
    flat = blocks.permute(1, 0, 2, 3).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    axes = torch.linalg.eigh((flat @ flat.T).double()).eigenvectors.flip(1)[:, :channels].float()
    found = (axes.T @ flat).unflatten(1, (len(blocks), 32, 32)).transpose(0, 1)
    return (found / found.square().mean().sqrt()).contiguous()


def timed(run: Callable) -> tuple:
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def measured(bank: ps.PatchBank, clean: torch.Tensor, k: int, folder: str) -> list[dict]:
    """Rows of one bank and patch size, in the units of the bank."""
    unit, scale = bank.unit, bank.scale
    (index, seconds), rows = timed(lambda: ps.PatchIndex.build(bank, k, Path(folder) / str(k), progress=False)), []
    about = index.at(k).meta
    held = sum(file["bytes"] for file in about["files"].values()) / about["windows"]
    common = {"channels": bank.shape[0], "k": k, "windows": about["windows"], "index_bytes": held, "build": seconds}
    machine = ps.EquivariantLocalScore(bank, k)
    competition = interior(machine.competition(k)).at(BAND, range(k // 2, 32 - k // 2))
    inner = (slice(None), slice(None), slice(BAND.start, BAND.stop), slice(k // 2, 32 - k // 2))
    generator = torch.Generator().manual_seed(0)
    for level in LEVELS:
        z = (clean + level * torch.randn(clean.shape, generator=generator)) / scale
        sigma = torch.full((1,), level / scale, dtype=torch.float64)

        def sums(engine, of: ps.PatchBank = unit, z=z, sigma=sigma):
            return engine.posterior_sum(z, sigma, of, competition, MEMORY)

        exact, all_seconds = timed(lambda sums=sums: sums(SlidingCpu()))
        truth, found, spent, pairs = scale * exact.mean[inner], [], [], 0
        for seed in range(SEEDS):
            one, seconds = timed(lambda sums=sums, seed=seed: sums(Pruned(index, BUDGET, None, seed)))
            found.append((scale * one.mean[inner] - truth, scale * one.stderr[inner]))
            spent.append(seconds)
            pairs = one.pairs
        error, stated = (torch.stack(x) for x in zip(*found, strict=True))
        sampled = stated > 0
        share = statistics.median(spent) / all_seconds
        some = unit.take(torch.randperm(len(unit), generator=generator)[: max(1, round(min(1, share) * len(unit)))])
        subset, _ = timed(lambda sums=sums, some=some: sums(SlidingCpu(), some))
        rows.append({
            **common, "sigma": level, "exact_seconds": all_seconds, "seconds": statistics.median(spent),
            "pairs": pairs / (truth[0, 0].numel() * about["windows"]), "rms": rms(error), "stated": rms(stated),
            "subset_rms": rms(scale * subset.mean[inner] - truth),
            "within": [float((error.abs() <= times * stated)[sampled].double().mean()) for times in (1, 2, 3)],
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of the CIFAR-10 images")
    given = parser.parse_args()
    photographs = ps.PatchBank.open(given.images, labels=False, limit=16 * (LATENTS + 1))
    values = photographs.chunk(0, len(photographs))
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    rows = []
    for channels in CHANNELS:
        latents = encoded(values, channels)
        bank = ps.PatchBank(latents[:-1], value_range="data")
        for k in PATCHES:
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(bank, latents[-1:], k, folder)
            what = " ".join((__doc__ or "").split("\n")[0].split())
            write("latents", what, latents=LATENTS, budget=BUDGET, seeds=SEEDS, band=len(BAND), rows=rows)


if __name__ == "__main__":
    main()
