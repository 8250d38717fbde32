"""What each theory costs: CPU seconds for one step of one image on one thread, the machines of patchscore beside it.

All denoise the same image at the same noise level, one after the other, five times; the median is kept. What is made
once for a noise level (masks, decompositions) is timed apart, in the first call. Writes
benchmarks/results/theories.json.

    python benchmarks/theories.py fashion-mnist [--limit 1000] [--sigma 0.9995] [--size 32]
"""

import argparse
import statistics
import time

import torch
from record import write

import patchscore as ps
from patchscore import theories

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="training images")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=0.9995)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bank, sigma = ps.PatchBank.open(options.source, size=options.size, limit=options.limit), options.sigma
    k = theories.pspc_sizes(sigma)
    contenders: dict[str, ps.Denoiser] = {
        "IdealScore": ps.IdealScore(bank),
        "LocalScore": ps.LocalScore(bank, k),
        "EquivariantLocalScore": ps.EquivariantLocalScore(bank, k),
        "GaussianScore": ps.GaussianScore(bank, ddof=1),
        "PcaLocality": theories.PcaLocality(bank),
        "GoldenSubset": theories.GoldenSubset(bank),
        "PatchComposition": theories.PatchComposition(bank, k),
        "FilteredMeans": theories.FilteredMeans(bank, theories.soft_squares(bank.shape, k)),
        "WrappedScore": theories.WrappedScore(bank, k),
        "SmoothedScore": theories.SmoothedScore(bank, 0.1),
        "NearestScore": theories.NearestScore(bank),
    }
    generator = torch.Generator().manual_seed(0)
    z = bank.chunk(0, 1) + sigma * torch.randn(1, *bank.shape, generator=generator)
    first = {name: seconds(machine, z, sigma) for name, machine in contenders.items()}
    rounds = [{name: seconds(machine, z, sigma) for name, machine in contenders.items()} for _ in range(ROUNDS)]
    rows = []
    for name, machine in contenders.items():
        step = statistics.median(of[name] for of in rounds)
        pairs = machine.estimate(z, sigma).pairs
        rows.append(
            {"theory": name, "step_seconds": step, "once_seconds": max(0.0, first[name] - step), "pairs": pairs}
        )
    about = {"shape": bank.shape, "images": len(bank), "sigma": sigma, "patch_size": k}
    write("theories", "CPU seconds of one step of one image with every theory", **about, rows=rows)


def seconds(machine: ps.Denoiser, z: torch.Tensor, sigma: float) -> float:
    start = time.process_time()
    machine.denoise(z, sigma)
    return time.process_time() - start


if __name__ == "__main__":
    main()
