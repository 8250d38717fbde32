"""What moments, gradients and likelihoods cost on the CPU, bits per dimension by machine, and what samplers gain.

Costs are CPU time of one thread beside that of the plain mean, interleaved, medians. Writes
benchmarks/results/moments.json; parts named on the command line are measured anew, the others kept.

    python benchmarks/moments.py cifar10 [costs] [autograd] [bits] [samplers] [restoration]
"""

import argparse
import json
import statistics
import sys
import time

import torch
from record import PICTURES, RESULTS, ROOT, opened, shuffled, write

import patchscore as ps

PARTS = ("costs", "autograd", "bits", "samplers", "restoration")
REPEATS = 7
FINE = 1000
"""Steps of ddim that stand for the flow itself, and of ddpm for ancestral sampling."""
SIGMAS = {3: 0.16, 7: 1.0, 17: 4.0}
"""Noise levels at which these patch sizes are calibrated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", help="CIFAR-10's training images")
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="|".join(PARTS))
    options = parser.parse_args()
    cifar = shuffled(opened(options.cifar10))
    path = RESULTS / "moments.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    found = {part: there.get(part, []) for part in PARTS}
    threads = torch.get_num_threads()
    for part in options.parts:
        torch.set_num_threads(1 if part in ("costs", "autograd") else threads)
        found[part] = MEASURES[part](cifar)
        write("moments", "Moments, gradients and likelihoods: costs, bits per dimension, samplers", **found)


def times(calls: dict, repeats: int = REPEATS) -> dict[str, float]:
    """Median CPU seconds of each call, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def costs(cifar: torch.Tensor) -> list[dict]:
    bank, rows = ps.PatchBank(cifar[:64]), []
    u = torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(2))
    for padding_mode in ("circular", "zeros"):
        for k, sigma in SIGMAS.items():
            machine = ps.EquivariantLocalScore(bank, k, padding_mode, engine="sliding")
            z = noisy(cifar[64:65], sigma)
            seconds = times(
                {
                    "mean": lambda m=machine, z=z, s=sigma: m.denoise(z, s),
                    "moments": lambda m=machine, z=z, s=sigma: m.estimate(z, s, moments=True),
                    "vjp": lambda m=machine, z=z, s=sigma: m.vjp(z, s, u),
                    "jvp": lambda m=machine, z=z, s=sigma: m.jvp(z, s, u),
                }
            )
            ratios = {name: value / seconds["mean"] for name, value in seconds.items() if name != "mean"}
            rows.append({"padding_mode": padding_mode, "k": k, "sigma": sigma, **ratios})
    return rows


def autograd(cifar: torch.Tensor) -> list[dict]:
    """VJP beside torch's autograd through materialised patches."""
    k, sigma, bank = 7, 1.0, ps.PatchBank(cifar[:40])
    machine = ps.EquivariantLocalScore(bank, k, "circular", engine="sliding")
    z, u = noisy(cifar[64:65], sigma), torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(2))
    train, r = bank.chunk(0, len(bank)), k // 2
    windows = torch.nn.functional.unfold(train, k).transpose(1, 2).flatten(0, 1)
    values = train[:, :, r:-r, r:-r].flatten(2).transpose(1, 2).flatten(0, 1)
    halves = windows.square().sum(1) / 2

    def materialised() -> torch.Tensor:
        x = z.detach().requires_grad_()
        padded = torch.nn.functional.pad(x, (r,) * 4, mode="circular")
        query = torch.nn.functional.unfold(padded, k)[0].T
        weights = ((query @ windows.T - halves) / sigma**2).softmax(1)
        denoised = (weights @ values).T.reshape(x.shape)
        return torch.autograd.grad(denoised, x, u)[0]

    error = (materialised() - machine.vjp(z, sigma, u)).abs().max() / machine.vjp(z, sigma, u).abs().max()
    seconds = times({"vjp": lambda: machine.vjp(z, sigma, u), "autograd": materialised}, 3)
    ratio = seconds["autograd"] / seconds["vjp"]
    return [{"k": k, "sigma": sigma, "images": len(bank), "times": ratio, "difference": error.item()}]


def bits(cifar: torch.Tensor) -> list[dict]:
    """Held-out bits per dimension: how much of an image's density each machine explains, by noise level."""
    rows = []
    for dataset, images in (("cifar10", cifar[:1000]), ("fashion-mnist", fashion()[:1000])):
        bank, held_out = ps.PatchBank(images[:150]), images[-4:]
        table = "cifar10-resnet-zeros" if images.shape[1] == 3 else "fashionmnist-resnet-zeros"
        sizes = ps.ScaleTable.published(table)
        machines = {
            "gaussian": ps.GaussianScore(bank),
            "ideal": ps.IdealScore(bank),
            "local": ps.LocalScore(bank, sizes),
            "els-zeros": ps.EquivariantLocalScore(bank, sizes),
        }
        for sigma_min in (0.05, 0.2):
            for name, machine in machines.items():
                found = ps.log_likelihood(machine, held_out, sigma_min=sigma_min, steps=16)
                rows.append(
                    {
                        "dataset": dataset,
                        "machine": name,
                        "bank": len(bank),
                        "images": len(held_out),
                        "sigma_min": sigma_min,
                        "bits_per_dim": found.bits_per_dim.mean().item(),
                        "standard_error": (found.bits_per_dim.std() / len(held_out) ** 0.5).item(),
                        "integration_error": found.bits_per_dim_error.max().item(),
                    }
                )
    return rows


def samplers(cifar: torch.Tensor) -> list[dict]:
    """Patch statistics of samples beside held-out images', and r^2 with FINE steps of ddim from the same noise."""
    images = fashion()
    bank, held_out, n = ps.PatchBank(images[:60]), images[150:1150], 8
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable.published("fashionmnist-resnet-zeros"))
    options = {"batch_size": n, "progress": False, "schedule": "cosine"}
    fine, rows = ps.sample(machine, n, FINE, sampler="ddim", **options), []
    for steps in (5, 10, 20, 50, FINE):
        for sampler in ("ddim", "ddpm") if steps == FINE else ("ddim", "ddpm", "ddpm-optimal"):
            again = (sampler, steps) == ("ddim", FINE)
            made = fine if again else ps.sample(machine, n, steps, sampler=sampler, **options)
            r2 = torch.corrcoef(torch.stack([made.flatten(), fine.flatten()]))[0, 1].square().item()
            distance = patch_distance(made, held_out)
            row = {"sampler": sampler, "steps": steps, "distance": distance, "r2": r2}
            rows.append(row | {"bank": len(bank), "images": n})
    return rows


def restoration(cifar: torch.Tensor) -> list[dict]:
    """What examples/restoration.py prints, and its picture."""
    sys.path.insert(0, str(ROOT / "examples"))
    from restoration import restorations

    images = fashion()
    held_out = ps.PatchBank(images[:3]).chunk(0, 3)
    return restorations(ps.PatchBank(images[3:403]), held_out, 20, PICTURES / "restoration.png")


def patch_distance(samples: torch.Tensor, images: torch.Tensor, k: int = 5) -> float:
    """Frechet distance between Gaussians with the mean and covariance of both's k x k windows."""
    moments = []
    for some in (samples.double(), images.double() / 127.5 - 1):
        windows = torch.nn.functional.unfold(some, k).transpose(1, 2).flatten(0, 1)
        moments.append((windows.mean(0), windows.T.cov(correction=0)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def fashion() -> torch.Tensor:
    return shuffled(ps.PatchBank.open("fashion-mnist"))


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    x = images.float() / 127.5 - 1
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


MEASURES = {"costs": costs, "autograd": autograd, "bits": bits, "samplers": samplers, "restoration": restoration}


if __name__ == "__main__":
    main()
