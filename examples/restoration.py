"""Inpainting, 4x super-resolution and deblurring without a network: held-out images from a bank's patches.

python examples/restoration.py      # writes restoration.png and prints PSNRs in dB

Each row: the image, its degraded form, the nearest patches of the bank to that, and three restorations by
`ps.Conditioned`. PSNR is of pixels in [-1, 1], so of a range of 2.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import patchscore as ps
from patchscore.conditioned import blurring, downsampling, masking
from patchscore.draw.images import grid, png

NOISE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="restoration.png")
    parser.add_argument("--limit", type=int, default=400, help="training images")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    images = ps.PatchBank.open("fashion-mnist", limit=options.limit + 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    bank, held_out = ps.PatchBank(images.images[order[3:]]), ps.PatchBank(images.images[order[:3]]).chunk(0, 3)
    for row in restorations(bank, held_out, options.steps, options.out):
        print("  ".join(f"{name} {value:.1f} dB" if isinstance(value, float) else value for name, value in row.items()))


def restorations(bank: ps.PatchBank, images: torch.Tensor, steps: int, out: Path) -> list[dict]:
    """PSNR of every task: of the degraded images, of nearest patches, and of restorations; pictures into `out`."""
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable.published("fashionmnist-resnet-zeros"))
    hole = torch.ones(bank.shape[1:])
    hole[9:19, 9:19] = 0
    tasks = {
        "inpainting": (masking(hole), lambda y: y),
        "4x super-resolution": (downsampling(4), lambda y: F.interpolate(y, scale_factor=4, mode="nearest")),
        "deblurring": (blurring(1.5), lambda y: y),
    }
    pictures, rows = [], []
    for task, (operator, shown) in tasks.items():
        clean = operator(images)
        y = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        degraded = shown(y)
        nearest = ps.EquivariantLocalScore(bank, 5).denoise(degraded, NOISE)
        conditioned = ps.Conditioned(machine, operator, y, NOISE)
        restored = ps.sample(conditioned, len(images), steps, seed=2, batch_size=len(images), sampler="ddpm")
        rows.append(
            {
                "task": task,
                "degraded": psnr(degraded, images),
                "nearest": psnr(nearest, images),
                "restored": psnr(restored, images),
            }
        )
        pictures += [torch.stack(four) for four in zip(images, degraded, nearest, restored, strict=True)]
    out.write_bytes(png(grid(torch.cat(pictures), columns=12)))
    return rows


def psnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over images of 10 log10(2^2 / mean squared error)."""
    errors = (found.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return (10 * (4 / errors).log10()).mean().item()


if __name__ == "__main__":
    main()
