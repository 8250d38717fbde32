"""Where a machine's score differs from the Gaussian one, and what a sampler gains and loses by starting with it.

Class-conditional, as the published networks were, DDIM from the same noise throughout. r^2 is the squared correlation
of final images with those of every step from white noise, or with the machine's own flow in small steps; times are CPU
times. Writes benchmarks/results/gaussian-<data>.json and docs/images/gaussian-start-<data>.png; `report.py` puts the
tables into docs/adapters.md. Two minutes each; --rounds 5 for steadier times, --per-class for a larger bank.

    python benchmarks/gaussian.py fashion-mnist
    python benchmarks/gaussian.py cifar10 cifar10/train
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from record import PICTURES, opened, r_squared, write

import patchscore as ps
from patchscore import noise
from patchscore.draw import images as pictures

SKIPS = (0, 1, 2, 3, 4, 5, 6, 8, 10)
STARTS = (80.0, 40.0, 20.0, 10.0, 5.0, 2.5, 1.25)
MACHINES = ("els", "local", "ideal")
FINE = 40
SHOWN = (0, 2, 4, 6, 8, 10)


def departure(machine: ps.Denoiser, gaussian: ps.GaussianScore, labels: list[int]) -> list[dict]:
    """Along the machine's own trajectories: how far apart the two denoised images are, step by step."""
    rows = []

    def compare(step: ps.Step) -> None:
        sigma = step.sigma / step.alpha
        z = step.x / step.alpha
        other = gaussian.denoise(z, sigma, labels)
        apart = (step.x0 - other).flatten(1)
        rows.append(
            {
                "sigma": sigma,
                "k": machine.patch_size_at(sigma),
                "rms": apart.square().mean().sqrt().item(),
                # score = (D - z) / sigma^2, so the relative distance of scores is that of D - z.
                "score": (apart.norm(dim=1) / (step.x0 - z).flatten(1).norm(dim=1)).median().item(),
                "r2": r_squared(step.x0, other).median().item(),
            }
        )

    ps.sample(machine, len(labels), labels=labels, batch_size=len(labels), callback=compare, progress=False)
    return rows


def skipping(machine: ps.Denoiser, gaussian: ps.GaussianScore, labels: list[int], rounds: int) -> tuple[list, list]:
    """Final images and CPU time of jumping over the first steps, each against walking them all, interleaved."""
    ratios = noise.cosine(20).ratios.tolist()
    images: dict[int, torch.Tensor] = {}
    seconds: dict[int, list[float]] = {skip: [] for skip in SKIPS}
    for _ in range(rounds):
        for skip in SKIPS:
            start = time.process_time()
            options = {"gaussian_until": ratios[skip], "gaussian": gaussian} if skip else {}
            images[skip] = ps.sample(
                machine, len(labels), labels=labels, batch_size=len(labels), progress=False, **options
            )
            seconds[skip].append(time.process_time() - start)
    # What all of them approximate: the machine's own flow from that noise, by Heun's method in small steps.
    levels = noise.cosine(20)
    fine = torch.logspace(math.log10(ratios[0]), math.log10(ratios[-2]), FINE, dtype=torch.float64)
    fine = torch.cat([fine, torch.zeros(1, dtype=torch.float64)])
    schedule = ps.Schedule("fine", torch.ones_like(fine), fine, levels.start_std / levels.alphas[0].item())
    flow = ps.sample(
        machine, len(labels), schedule=schedule, sampler="heun", labels=labels, batch_size=len(labels), progress=False
    )
    rows = []
    for skip in SKIPS:
        r2 = r_squared(images[skip], images[0])
        time_ratio = statistics.median(a / b for a, b in zip(seconds[skip], seconds[0], strict=True))
        share = skip / (len(ratios) - 1)
        rows.append(
            {
                "skipped": skip,
                "share": share,
                "until": ratios[skip],
                "r2": r2.median().item(),
                "r2_worst": r2.min().item(),
                "r2_flow": r_squared(images[skip], flow).median().item(),
                "time": time_ratio,
            }
        )
    return rows, [images[skip] for skip in SHOWN]


def starting(machine: ps.Denoiser, gaussian: ps.GaussianScore, labels: list[int], rounds: int) -> list[dict]:
    """Karras levels from 80 down, entered at s: from white noise of that size, and from the Gaussian's marginal."""
    levels = noise.karras(20, sigma_max=80.0)
    options = dict(n=len(labels), labels=labels, batch_size=len(labels), progress=False)
    exact, times, rows = None, [], []
    for s in STARTS:
        first = next(i for i, ratio in enumerate(levels.ratios.tolist()) if ratio <= s)
        at = levels.ratios[first].item()
        entered = ps.Schedule("entered", levels.alphas[first:], levels.sigmas[first:], at)
        white = ps.sample(machine, schedule=entered, **options)
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            coloured = ps.sample(machine, schedule=levels, sigma_max=s, gaussian=gaussian, **options)
            seconds.append(time.process_time() - start)
        times.append(statistics.median(seconds))
        exact = white if exact is None else exact
        rows.append(
            {
                "s": s,
                "level": at,
                "steps": len(levels) - first,
                "white": r_squared(white, exact).median().item(),
                "gaussian": r_squared(coloured, exact).median().item(),
                "time": times[-1] / times[0],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["fashion-mnist", "cifar10"])
    parser.add_argument("images", type=Path, nargs="?", help="folder or tar of CIFAR-10, a folder a class")
    parser.add_argument("--per-class", type=int, default=50, help="training images of each class")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repetitions of every timing")
    parser.add_argument("--machines", nargs="+", default=MACHINES, choices=MACHINES)
    options = parser.parse_args()
    if options.data == "cifar10":
        if options.images is None or not options.images.exists():
            sys.exit(f"skipped: CIFAR-10 is not at {options.images}")
        bank, table = opened(options.images, limit=10 * options.per_class), "cifar10-resnet-zeros"
    else:
        bank = ps.PatchBank.open("fashion-mnist", size=32, limit=10 * options.per_class)
        table = "fashionmnist-resnet-zeros"
    machines = {
        "els": lambda: ps.EquivariantLocalScore(bank, ps.ScaleTable.published(table), padding_mode="zeros"),
        "local": lambda: ps.LocalScore(bank, ps.ScaleTable.published(table)),
        "ideal": lambda: ps.IdealScore(bank),
    }
    labels = list(bank.classes)
    gaussian = ps.GaussianScore(bank)
    start = time.process_time()
    gaussian.denoise(torch.zeros(len(labels), *bank.shape), 1.0, labels)
    decomposition = time.process_time() - start

    measured = {}
    for name in options.machines:
        machine = machines[name]()
        measured[name] = {"departure": departure(machine, gaussian, labels)}
        measured[name]["skipping"], shown = skipping(machine, gaussian, labels, options.rounds)
        measured[name]["starting"] = starting(machine, gaussian, labels, options.rounds)
        if name == "els":
            picture = pictures.grid(torch.cat(shown), columns=len(labels), zoom=2)
            picture.save(PICTURES / f"gaussian-start-{options.data}.png")
    what = " ".join((__doc__ or "").split("\n")[0].split())
    write(
        f"gaussian-{options.data}",
        what,
        data=options.data,
        bank=f"{len(bank)} images of {' x '.join(map(str, bank.shape))}, {len(labels)} classes",
        table=table,
        images=len(labels),
        rounds=options.rounds,
        decomposition_seconds=decomposition,
        shown=SHOWN,
        machines=measured,
    )


if __name__ == "__main__":
    main()
