"""Random cases of the definition (tests/naive.py, float64) against every exact engine on the CPU.

Shapes, banks (smooth, constant, duplicated, halftone, one image, one outlier; bytes or float), machines, sigma from
1e-5 to 1e3 and z near the bank or far from it are drawn from a seed; every other case is one image of a batch whose
images have labels and noise levels of their own. Judged by the promises of the documentation: 1e-4
for sigma >= 0.05, 1e-3 for sigma >= 0.005; below, the nearest window where it is alone; never NaN, an effective sample
size in [1, windows], a mean inside the bank's range.

    python tests/attack/exact_engines.py --cases 10000 --seed 0
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import naive
from conftest import MACHINES, machine_named, smooth_images

import patchscore as ps

OFFSETS = (0.0, 0.0, 0.3, 10.0, 1000.0)
"""How far all of z is moved away from the bank."""
ROUNDING = 1e-6
"""Of an effective sample size relative to itself."""


@dataclass
class Case:
    """A call, of which one image is judged: z [B, C, H, W], sigma and label [B], its place in the batch."""

    bank: ps.PatchBank
    z: torch.Tensor
    sigmas: torch.Tensor
    machine: str
    k: int
    words: str
    labels: torch.Tensor | None = None
    place: int = 0

    @property
    def sigma(self) -> float:
        return float(self.sigmas[self.place])

    def competing(self) -> np.ndarray:
        """[N, C, H, W] float64, the training images of its label."""
        train = self.bank.chunk(0, len(self.bank), torch.float64)
        return (train if self.labels is None else train[self.bank.labels == self.labels[self.place]]).numpy()

    def expected(self, pixels: int) -> list[tuple[int, int, np.ndarray, float, int]]:
        """(row, column, mean, ess, windows) of `pixels` random pixels, by the definition."""
        z, train = self.z[self.place].double().numpy(), self.competing()
        rng = np.random.default_rng(0)
        at = [(int(rng.integers(z.shape[1])), int(rng.integers(z.shape[2]))) for _ in range(pixels)]
        return [(i, j, *naive.denoise_pixel(z, self.sigma, train, self.machine, self.k, i, j)) for i, j in at]


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    channels = int(rng.choice([1, 1, 2, 3, 3, 4]))
    height, width = (int(x) for x in rng.integers(3, 9, 2))
    machine = str(rng.choice(MACHINES))
    largest = min(height, width) if machine == "els-circular" else max(height, width) + 2
    k = int(rng.choice(range(1, largest + 1, 2)))
    kind = str(rng.choice(["smooth", "constant", "duplicate", "halftone", "one", "outlier"]))
    count = 1 if kind == "one" else int(rng.integers(2, 18))
    images = smooth_images(count, channels, height, width, seed=seed)
    if kind == "constant":
        levels = rng.integers(0, 256, int(rng.integers(1, 4)), dtype=np.uint8)
        images = torch.from_numpy(rng.choice(levels, (count, 1, 1, 1))).expand_as(images)
    elif kind == "duplicate":
        images = images[:1].expand_as(images)
    elif kind == "halftone":
        images = torch.from_numpy(rng.choice(np.array([64, 191], np.uint8), images.shape))
    elif kind == "outlier":
        images = images // 16 + 120
        images[-1] = torch.from_numpy(rng.choice(np.array([0, 255], np.uint8), images[-1].shape))
    images = images.contiguous()
    if rng.random() < 0.3:
        images = images.float() / 127.5 - 1
        if kind == "smooth":
            images = images * 0.7 + 0.01 * torch.from_numpy(rng.standard_normal(images.shape)).float().clamp(-3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that might mean [0, 1]
        bank = ps.PatchBank(images)
    sigma = float(10 ** rng.uniform(-5, 3))
    offset = float(rng.choice(OFFSETS))
    kind_of_z = str(rng.choice(["noisy", "grey", "random"]))
    noise = torch.from_numpy(rng.standard_normal((1, channels, height, width))).float()
    start = {"noisy": bank.chunk(0, 1), "grey": torch.zeros_like(noise), "random": noise}[kind_of_z]
    z = (start + sigma * noise if kind_of_z == "noisy" else start) + offset
    words = f"seed {seed}: {machine} k {k}, {count} {kind} {images.dtype} images {channels} x {height} x {width}, "
    sigmas = torch.tensor([sigma], dtype=torch.float64)
    return Case(bank, z.float(), sigmas, machine, k, words + f"sigma {sigma:.3g}, z {kind_of_z} + {offset}")


def in_a_batch(case: Case, seed: int) -> Case:
    """The same z among others, with labels: each image has its own training images and noise level."""
    rng = np.random.default_rng((seed, 1))
    classes, batch = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    held = torch.from_numpy(rng.integers(0, classes, len(case.bank)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = ps.PatchBank(case.bank.images, held)
    place = int(rng.integers(batch))
    labels = held[torch.from_numpy(rng.integers(0, len(bank), batch))]
    sigmas = torch.from_numpy(10 ** rng.uniform(-5, 3, batch))
    sigmas[place] = case.sigma
    z = torch.from_numpy(rng.standard_normal((batch, *case.z.shape[1:]))).float()
    z[place] = case.z[0]
    words = f"{case.words}, image {place} of {batch}, {int((held == labels[place]).sum())} images of its label"
    return replace(case, bank=bank, z=z, sigmas=sigmas, labels=labels, place=place, words=words)


def drawn(seed: int) -> Case:
    case = random_case(seed)
    return in_a_batch(case, seed) if seed % 2 else case


def faults(case: Case, engine: str, expected: list[tuple[int, int, np.ndarray, float, int]]) -> list[str]:
    """What one engine gets wrong of a case: against the known results, and in what must hold everywhere."""
    machine = machine_named(case.machine, case.bank, case.k, engine=engine)
    estimate = machine.estimate(case.z, case.sigmas, case.labels)
    mean, ess = (part[case.place].double().numpy() for part in (estimate.mean, estimate.ess))
    if not np.isfinite(mean).all() or not np.isfinite(ess).all():
        return [f"{int((~np.isfinite(mean)).sum())} means and {int((~np.isfinite(ess)).sum())} ess are not finite"]
    train = case.competing()
    found = []
    # A mean is a quotient of two sums of n terms in float32, each up to n / 2^24 of the sum of magnitudes off.
    rounding = 2 * len(train) * train[0, 0].size * 2**-24
    if mean.min() < train.min() - rounding or mean.max() > train.max() + rounding:
        found.append(f"mean in [{mean.min()}, {mean.max()}], bank in [{train.min()}, {train.max()}]")
    for i, j, expected_mean, expected_ess, windows in expected:
        at = ess[0] if ess.shape[1:] == (1, 1) else ess[..., i, j]
        got_ess = float(np.ravel(at)[0])
        if not 1 - ROUNDING <= got_ess <= windows * (1 + ROUNDING):
            found.append(f"ess {got_ess} of {windows} windows at ({i}, {j})")
        error = float(np.abs(mean[:, i, j] - expected_mean).max())
        if error > promised(case, expected_ess):
            found.append(f"error {error:.2g} at ({i}, {j}), ess {expected_ess:.3g}")
    return found


def promised(case: Case, ess: float) -> float:
    """Largest error that the documentation allows."""
    if case.sigma >= 0.05:
        return 1e-4
    if case.sigma >= 0.005:
        return 1e-3
    # Float64 distances themselves are a few 1e-16 of z^2 off, the reference engine's, which are expanded, most.
    pixels = case.z[0].numel() if case.machine == "ideal" else case.z.shape[1] * case.k**2
    nats = 4e-16 * pixels * (1 + float(case.z[case.place].abs().max())) ** 2 / (2 * case.sigma**2)
    return 1e-3 if ess < 1 + 1e-9 and nats < 1e-3 else 2.0


def engines() -> list[tuple[str, str]]:
    """(engine, instruction set) of all that can serve here."""
    import patchscore._native as native

    return [("reference", ""), *(("sliding", level) for level in native.simd_levels())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong, judged = dict.fromkeys(engines(), 0), 0
    for seed in range(options.seed, options.seed + options.cases):
        case = drawn(seed)
        judged += case.sigma >= 0.005
        expected = case.expected(pixels=1)
        for engine, level in wrong:
            os.environ["PATCHSCORE_SIMD"] = level
            for fault in faults(case, engine, expected):
                wrong[engine, level] += 1
                print(f"{engine} {level}: {case.words}: {fault}", flush=True)
    print(f"{options.cases} cases, {judged} of them at sigma >= 0.005; beyond the promises: {wrong}")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
