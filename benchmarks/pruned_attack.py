"""Whether the error bars of `pruned` hold for any z: random cases against exact sums.

A case draws a bank (photographs, some with outliers among them), a patch size, a noise level, a budget, a padding mode,
a class or none, and a z: noisy images of the bank or foreign ones, pure noise, a constant, a checkerboard, or what
guidance makes. Writes counts by kind of z and by budget to benchmarks/results/pruned_attack.json.

    python benchmarks/pruned_attack.py --images cifar10/train [--cases 1000]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import record
import torch

import patchscore as ps

SIZES = (3, 5, 7, 11)
BUDGETS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
KINDS = ("bank", "held out", "noise", "wide noise", "constant", "checkerboard", "guidance")


def noisy(kind: str, bank: ps.PatchBank, held_out: torch.Tensor, sigma: float, draw: random.Random) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    eps = torch.randn(1, *bank.shape, generator=generator)
    image = held_out[draw.randrange(len(held_out))][None]
    at = draw.randrange(len(bank))
    if kind == "bank":
        return bank.chunk(at, at + 1) + sigma * eps
    if kind == "held out":
        return image + sigma * eps
    if kind == "noise":
        return eps
    if kind == "wide noise":
        return 5 * eps
    if kind == "constant":
        return torch.full_like(image, draw.uniform(-1.5, 1.5)) + sigma * eps
    if kind == "checkerboard":
        i, j = torch.meshgrid(torch.arange(image.shape[2]), torch.arange(image.shape[3]), indexing="ij")
        return ((i + j) % 2 * 2.0 - 1).expand_as(image) + sigma * eps
    other = held_out[draw.randrange(len(held_out))][None]
    return image + 8 * (other - image) * 0.3 + sigma * eps  # guidance at scale 8 leaves the range of pixels


def case(number: int, banks, held_out: torch.Tensor) -> dict[str, object]:
    draw = random.Random(number)
    name = draw.choice(list(banks))
    bank, index = banks[name]
    k, kind, budget = draw.choice(SIZES), draw.choice(KINDS), draw.choice(BUDGETS)
    sigma = 10 ** draw.uniform(-2.3, 2)
    mode = draw.choice(("zeros", "circular"))
    label = draw.choice((None, None, *bank.classes))
    z = noisy(kind, bank, held_out, sigma, draw)
    exact = ps.EquivariantLocalScore(bank, k, mode, engine="sliding").denoise(z, sigma, label)
    machine = ps.EquivariantLocalScore(bank, k, mode, engine="pruned", index=index, budget=budget, seed=number)
    found = machine.estimate(z, sigma, label)
    error, stderr = (found.mean - exact).abs(), found.stderr
    return {
        "case": number, "bank": name, "k": k, "kind": kind, "budget": budget, "sigma": sigma, "mode": mode,
        "label": label,
        "pixels": error.numel(),
        **{f"within_{n}": int((error <= n * stderr + 1e-3).sum()) for n in (1, 2, 3)},
        "beyond_5": int((error > 5 * stderr + 1e-3).sum()),
        "silent": int(((error > 0.1) & (stderr < 0.02)).sum()),
        "sampled": int((stderr > 0).sum()),
        "largest": found.mean.abs().max().item(), "least_ess": found.ess.min().item(),
        "nan": int(found.mean.isnan().sum() + stderr.isnan().sum() + found.ess.isnan().sum()),
        "rms": error.square().mean().sqrt().item(),
    }  # fmt: skip


def failed(row: dict) -> bool:
    """Whether a case is worth a look: an error that is not stated, or many that are stated far too small."""
    return bool(row["silent"] or row["nan"] or row["beyond_5"] > 10)


def summary(rows) -> dict[str, object]:
    total = sum(row["pixels"] for row in rows)
    share = {
        name: sum(row[name] for row in rows) / total
        for name in ("within_1", "within_2", "within_3", "beyond_5", "sampled")
    }
    return {
        "cases": len(rows), "pixels": total, **share, "silent": sum(row["silent"] for row in rows),
        "nan": sum(row["nan"] for row in rows), "largest": max(row["largest"] for row in rows),
        "least_ess": min(row["least_ess"] for row in rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the CIFAR-10 training images")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    everything = record.opened(given.images, size=32)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    images, labels = everything.images[order], everything.labels[order]
    held_out = images[-200:].float() / 127.5 - 1
    outlying = images[:1500].clone()
    outlying[7] = torch.randint(256, outlying[7].shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    outlying[8] = 255 * (torch.arange(32)[:, None] + torch.arange(32) & 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        banks = {}
        for name, content in (("photographs", images[:1500]), ("outliers", outlying), ("few", images[:40])):
            bank = ps.PatchBank(content, labels[: len(content)])
            banks[name] = bank, ps.PatchIndex.build(bank, SIZES, Path(folder) / name)
        for number in range(given.first, given.first + given.cases):
            rows.append(case(number, banks, held_out))
            if failed(rows[-1]):
                print(rows[-1], flush=True)
    groups = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        for name in ("kind", "budget", "bank"):
            groups[f"{name} {row[name]}"].append(row)
    content = {name: summary(part) for name, part in groups.items()}
    for name, part in content.items():
        print(name, {key: round(value, 5) if isinstance(value, float) else value for key, value in part.items()})
    by_group = [{"group": name, **part} for name, part in content.items()]
    bad = [row for row in rows if failed(row)]
    record.write("pruned_attack", "error bars of pruned in random cases", rows=by_group, failed=bad)


if __name__ == "__main__":
    main()
