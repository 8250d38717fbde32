"""How far each exact engine is from the definition: worst pixel over machines, patch sizes, noise levels and channels.

The oracle is tests/naive.py, plain loops in float64 that share no code with the package, asked for pixels at corners,
edges and inside. Writes benchmarks/results/accuracy.json and prints its worst rows. Takes about three minutes.
"""

import sys
from pathlib import Path

import numpy as np
import record
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import MACHINES, machine_named, noisy, smooth_images
from naive import denoise_pixel
from test_machines import few_pixels

import patchscore as ps
from patchscore import engines

PATCH_SIZES = (3, 5, 9, 13, 17)
SIGMAS = (1e-6, 0.005, 0.05, 0.3, 1.0, 4.0, 100.0, 1e6)


def rows_for(machine: str, k: int, channels: int) -> list[dict]:
    bank = ps.PatchBank(smooth_images(3, channels, 19, 18))
    train = bank.chunk(0, len(bank), torch.float64).numpy()
    rows = []
    for sigma in SIGMAS:
        # Below the smallest noise the question is which window is nearest; the oracle answers it at sigma = 0.001.
        z = noisy(bank, min(sigma, 100.0)).float().double()
        oracle_sigma = max(sigma, 1e-3)
        pixels = few_pixels(*bank.shape[1:], k)
        expected = [denoise_pixel(z[0].numpy(), oracle_sigma, train, machine, k, i, j)[0] for i, j in pixels]
        for engine in engines.NAMES:
            for dtype in (torch.float64, torch.float32) if engine == "reference" else (torch.float32,):
                if engines.chosen(engines.EXACT, engine, torch.device("cpu"), torch.float32).name != engine:
                    continue
                denoised = machine_named(machine, bank, k, engine=engine).denoise(z.to(dtype), sigma)
                got = [denoised[0, :, i, j].double().numpy() for i, j in pixels]
                worst = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
                rows.append(
                    {
                        "engine": engine,
                        "dtype": str(dtype).removeprefix("torch."),
                        "machine": machine,
                        "k": k or None,
                        "channels": channels,
                        "sigma": sigma,
                        "pixels": len(pixels),
                        "worst": worst,
                    }
                )
    return rows


def main() -> None:
    rows = []
    for machine in MACHINES:
        for k in (0,) if machine == "ideal" else PATCH_SIZES:
            for channels in (1, 3):
                rows += rows_for(machine, k, channels)
    print(f"{'engine':<10} {'dtype':<8} {'machine':<13}" + "".join(f"{sigma:>10g}" for sigma in SIGMAS))
    for engine, dtype in dict.fromkeys((row["engine"], row["dtype"]) for row in rows):
        for machine in MACHINES:
            same = [row for row in rows if (row["engine"], row["dtype"], row["machine"]) == (engine, dtype, machine)]
            worst = [max(row["worst"] for row in same if row["sigma"] == sigma) for sigma in SIGMAS]
            print(f"{engine:<10} {dtype:<8} {machine:<13}" + "".join(f"{value:>10.1e}" for value in worst))
    record.write("accuracy", __doc__.split("\n")[0], rows=rows)


if __name__ == "__main__":
    main()
