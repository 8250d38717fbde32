"""How well class-conditional denoising errors tell classes apart: held-out Fashion-MNIST, by machine and noise level.

The first 500 images of the test set against the built-in training images; more expensive machines get fewer of them.
Writes benchmarks/results/classification.json.

    python benchmarks/classification.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz
"""

import argparse
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
from record import write

import patchscore as ps
from patchscore.pixels import to_values

SIGMAS = (0.25, 0.5, 1.0, 2.0)
K = 9


def idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="IDX file of the test images, gzipped")
    parser.add_argument("labels", type=Path, help="IDX file of their labels, gzipped")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--els-bank", type=int, default=200, help="training images for EquivariantLocalScore")
    options = parser.parse_args()
    for path in (options.images, options.labels):
        if not path.exists():
            sys.exit(f"skipped: held-out Fashion-MNIST is not at {path}")
    held_out = to_values(torch.from_numpy(idx(options.images)[: options.count, None]))
    truth = torch.from_numpy(idx(options.labels)[: options.count].astype(np.int64))

    bank = ps.PatchBank.open("fashion-mnist")
    small = ps.PatchBank.open("fashion-mnist", limit=options.els_bank)
    machines = {
        "GaussianScore": (ps.GaussianScore(bank), SIGMAS),
        "IdealScore": (ps.IdealScore(bank), SIGMAS),
        f"LocalScore, k = {K}": (ps.LocalScore(bank, K), SIGMAS),
        f"EquivariantLocalScore, k = {K}": (ps.EquivariantLocalScore(small, K), SIGMAS[:2]),
    }
    rows = []
    for name, (machine, sigmas) in machines.items():
        errors = []
        for sigma in sigmas:
            seen = Counted(machine)
            start = time.process_time()
            found = ps.classify(seen, held_out, sigma, seed=0, progress=False)
            seconds = time.process_time() - start
            errors.append(found.errors)
            accuracy = (found.labels == truth).double().mean().item()
            rows.append(
                {
                    "machine": name,
                    "bank": len(machine.bank),
                    "sigmas": [sigma],
                    "accuracy": accuracy,
                    "pairs": seen.pairs / len(truth),
                    "cpu_milliseconds": 1000 * seconds / len(truth),
                }
            )
            print(rows[-1], flush=True)
        # All levels together: the mean of the errors, as classify takes it, over the draws above.
        chosen = torch.stack(errors).mean(0).argmin(1)
        of_machine = rows[-len(sigmas) :]
        rows.append(
            {
                "machine": name,
                "bank": len(machine.bank),
                "sigmas": list(sigmas),
                "accuracy": (chosen == truth).double().mean().item(),
                "pairs": sum(row["pairs"] for row in of_machine),
                "cpu_milliseconds": sum(row["cpu_milliseconds"] for row in of_machine),
            }
        )
        print(rows[-1], flush=True)
    nearest = torch.cdist(held_out.flatten(1), bank.chunk(0, len(bank)).flatten(1)).argmin(1)
    what = " ".join((__doc__ or "").split("\n")[0].split())
    assert bank.labels is not None
    write(
        "classification",
        what,
        images=len(truth),
        draws=1,
        nearest_neighbour=(bank.labels[nearest] == truth).double().mean().item(),
        rows=rows,
    )


class Counted(ps.Denoiser):
    """A denoiser that adds up the pairs it evaluates."""

    def __init__(self, denoiser: ps.Denoiser):
        self.denoiser, self.shape, self.bank, self.pairs = denoiser, denoiser.shape, denoiser.bank, 0

    def estimate(self, z: torch.Tensor, sigma: float | torch.Tensor, labels: ps.denoiser.Labels = None) -> ps.Estimate:
        estimate = self.denoiser.estimate(z, sigma, labels)
        self.pairs += estimate.pairs
        return estimate


if __name__ == "__main__":
    main()
