"""What each constant of the engine `pruned` does: error, coverage and time at other values than policy.py's.

For three patch sizes at a noise level of each, interiors of held-out images: the rms error, how many values lie within
two standard errors and the processor seconds, with one constant changed at a time, over several seeds. And what a
pixel, a cell and a window take, fitted to the times (least squares of relative errors). Writes
results/pruned_policy.json and prints what policy.py has beside what is found. The constants are chosen from it by hand:
an error near the least, 95% of the values within two standard errors, and no more time than a tenth of the error is
worth.

    python benchmarks/pruned_policy.py --images cifar10/train [--count 4000]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import record
import torch
from pruned_cpu import inside, interior, shuffled

import patchscore as ps
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.pruned.policy import POLICY, Policy
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.pixels import to_values
from patchscore.windows import Competition

LEVELS = {3: 0.16, 7: 0.84, 11: 1.9}
"""Patch sizes and a noise level at which the published table of CIFAR-10 uses each."""

BUDGETS = (0.003, 0.01)

VALUES = {
    "certain_from": (0.5, 1.0),
    "prior_degrees": (2.0, 50.0),
    "pooled": (0.0, 0.3),
    "trimming": (0.0, 0.35, 0.7),
    "misfit": (3.0, 20.0),
    "unknown": (0.03, 0.3),
    "further": (4.0, 8.0),
    "further_most": (0.03, 0.2),
    "pilot": (0.06, 0.5),
    "pilot_cells": (16, 256),
    "sweeps": (0, 8),
    "known": (0, 4, 8),
    "opened_from": (0.25, 8.0),
}
"""Of each constant, besides the one it has."""

MEMORY = 2**31


def measured(
    index: ps.PatchIndex, policy: Policy, budget: float, seeds: int, z: torch.Tensor, level: float, only: Competition,
    truth: torch.Tensor,
) -> dict[str, float]:  # fmt: skip
    """Mean squared error, share within two standard errors and seconds an image, over all seeds."""
    squares, hits, seconds, k = [], [], [], only.patch_size or 1
    sigma = torch.full((len(z),), level, dtype=torch.float64)
    for seed in range(seeds):
        engine = Pruned(index, budget, None, seed, policy)
        start = time.process_time()
        found = engine.posterior_sum(z, sigma, index.bank, only, MEMORY)
        seconds.append((time.process_time() - start) / len(z))
        error, stderr = inside(found.mean - truth, k), inside(found.stderr, k)
        squares.append(error.square().mean().item())
        hits.append((error.abs() <= 2 * stderr + 1e-5).double().mean().item())
    return {
        "rms": float(np.mean(squares)) ** 0.5,
        "within_2": float(np.mean(hits)),
        "seconds": float(np.median(seconds)),
    }


def fitted(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of a pixel, of a cell for it, and of a window for it, stored or gathered: none below zero."""
    names = ["pixel_seconds", "cell_seconds", "window_seconds", "gathered_seconds"]
    seconds = np.array([row["seconds"] / row["pixels"] for row in rows])
    design = np.array([
        [1, row["cells"], row["windows"] * row["stored"], row["windows"] * (1 - row["stored"])] for row in rows
    ]) / seconds[:, None]  # fmt: skip
    kept = list(range(len(names)))
    while True:
        found, *_ = np.linalg.lstsq(design[:, kept], np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            return dict.fromkeys(names, 0.0) | {names[i]: float(x) for i, x in zip(kept, found, strict=True)}
        kept.pop(int(found.argmin()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of CIFAR-10 images")
    parser.add_argument("--count", type=int, default=4000, help="images in the bank (default 4000)")
    parser.add_argument("--seeds", type=int, default=4, help="draws of each setting (default 4)")
    given = parser.parse_args()
    images = shuffled(record.opened(given.images, size=32).images)
    bank, held_out = ps.PatchBank(images[: given.count].clone()), to_values(images[given.count : given.count + 2])
    rows, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        index = ps.PatchIndex.build(bank, list(LEVELS), Path(folder) / "index")
        for k, level in LEVELS.items():
            only = interior(ps.EquivariantLocalScore(bank, k).competition(k))
            z = held_out + level * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(k))
            sigma = torch.full((len(z),), level, dtype=torch.float64)
            truth = SlidingCpu().posterior_sum(z, sigma, bank, only, MEMORY).mean
            part, (group,) = index.at(k), only.groups
            for budget in BUDGETS:
                setting = index, budget, given.seeds, z, level, only, truth
                usual = measured(setting[0], POLICY, *setting[1:])
                for name, values in VALUES.items():
                    for value in values:
                        policy = dataclasses.replace(POLICY, **{name: value})
                        found = measured(index, policy, *setting[1:])
                        row = {"k": k, "sigma": level, "budget": budget, "constant": name, "value": value, **found}
                        rows.append(row | {f"usual_{key}": x for key, x in usual.items()})
                        print(
                            f"k {k:2} budget {budget:<6} {name:14} {getattr(POLICY, name):6g} -> {value:<6g} "
                            f"rms {usual['rms']:.4f} -> {found['rms']:.4f}  within 2 {usual['within_2']:.3f} -> "
                            f"{found['within_2']:.3f}  {usual['seconds']:.2f} -> {found['seconds']:.2f} s",
                            flush=True,
                        )
            for budget in (3e-4, 1e-3, 3e-3, 0.01, 0.03):
                found = measured(index, POLICY, budget, given.seeds, z, level, only, truth)
                windows = budget * len(bank) * group.windows_per_image
                times.append({"k": k, "budget": budget, "pixels": group.pixels, "cells": len(part.cells.size),
                              "windows": windows, "stored": float(part.tiles is not None), **found})  # fmt: skip
    costs = fitted(times)
    for row in times:
        names = ("pixel_seconds", "cell_seconds", "window_seconds" if row["stored"] else "gathered_seconds")
        pixel, cell, window = (getattr(POLICY, name) for name in names)
        expected = row["pixels"] * (pixel + cell * row["cells"] + window * row["windows"])
        row["expected_over_measured"] = expected / row["seconds"]
        print(f"k {row['k']:2} budget {row['budget']:<6} {row['seconds']:.3f} s, expected {expected:.3f}")
    for name, value in costs.items():
        print(f"{name}: {getattr(POLICY, name):.2g} in policy.py, {value:.2g} fitted")
    record.write("pruned_policy", "constants of pruned, one changed at a time", images=given.count, rows=rows,
                 times=times, fitted=costs)  # fmt: skip


if __name__ == "__main__":
    main()
