"""Theory against network: both sample from the same seeds, and their images are correlated.

The published comparison (Kamb & Ganguli 2024, section 5): both start from the same noise and follow the same schedule,
and the final images are correlated over their pixels. In addition, both denoise the noisy images along the network's
own trajectory, which separates the error of a single step from errors that accumulate.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Labels
from .files import write_record
from .gaussian import GaussianScore
from .machines import EquivariantLocalScore, IdealScore, LocalScore
from .noise import Schedule, get_schedule
from .sampling import DEFAULT_BATCH, Step, labels_in_turn, sample
from .scales import ScaleTable

FORMAT = "patchscore-comparison"
VERSION = 1
RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of one machine with the network.

    Attributes:
        images: [n, C, H, W] the machine's images, from the network's seeds.
        correlation: [n] Pearson correlation with the network's image over all pixels; r^2 is its square.
        mse: [n] mean squared difference of pixels in [-1, 1].
        step_r2: [steps, n] r^2 of the two denoised images at each step of the network's trajectory; NaN unless asked
            for.
        step_mse: [steps, n] their mean squared difference, likewise.
    """

    images: Tensor
    correlation: Tensor
    mse: Tensor
    step_r2: Tensor
    step_mse: Tensor

    @property
    def r2(self) -> Tensor:
        """[n] squared correlation: the fraction of the variance explained by a linear fit to the other image."""
        return self.correlation**2


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        images: [n, C, H, W] the network's images.
        machines: agreement of each machine, by name; the first is the machine under test, the others baselines.
        sigmas: [steps] noise levels of the trajectory, most noise first.
        labels: the class of each image, or None.
        settings: the arguments of the comparison.
    """

    images: Tensor
    machines: dict[str, Agreement]
    sigmas: list[float]
    labels: list[int | str | None] | None
    settings: dict[str, Any]

    def __repr__(self) -> str:
        """The median r^2 of each machine, in a line."""
        medians = ", ".join(f"{name} {np.median(of.r2.numpy()):.3f}" for name, of in self.machines.items())
        return f"Comparison({len(self.images)} images, median r^2: {medians})"

    def rows(self) -> list[dict[str, Any]]:
        """One row per machine: medians over the images, with 95% bootstrap intervals."""
        rows = []
        for name, of in self.machines.items():
            row: dict[str, Any] = {"machine": name, "n": len(self.images)}
            for figure in ("r2", "correlation", "mse"):
                values = getattr(of, figure)
                row[f"{figure}_median"] = float(np.median(values.numpy()))
                row[f"{figure}_interval"] = bootstrap_interval(values)
            if not of.step_r2.isnan().any():
                row["step_r2_median"] = np.median(of.step_r2.numpy(), axis=1).tolist()
            rows.append(row)
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON: settings, the rows, and every image's figures."""
        each = {
            name: {
                "r2": of.r2.tolist(),
                "correlation": of.correlation.tolist(),
                "mse": of.mse.tolist(),
                "step_r2": of.step_r2.tolist(),
                "step_mse": of.step_mse.tolist(),
            }
            for name, of in self.machines.items()
        }
        report = {
            "settings": self.settings,
            "sigmas": self.sigmas,
            "labels": self.labels,
            "rows": self.rows(),
            "images": each,
        }
        write_record(Path(path), FORMAT, VERSION, finite(report))


def compare(
    network: Denoiser,
    machines: Denoiser | Mapping[str, Denoiser],
    n: int = 64,
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    sampler: str = "ddim",
    labels: Labels = None,
    seed: int = 0,
    *,
    first: int = 0,
    batch_size: int = DEFAULT_BATCH,
    device: torch.device | str = "cpu",
    along: bool = True,
    progress: bool = True,
) -> Comparison:
    """Samples from the network and from the machines with the same seeds, and compares the images.

    Args:
        network: a denoiser; `patchscore.adapters.network` makes one of any network.
        machines: a denoiser, or several by name (`baselines` gives the usual ones).
        n: number of images, as in `sample`; so are `steps`, `schedule`, `sampler`, `labels`, `seed`, `first`,
            `batch_size`, `device` and `progress`.
        along: also compare the denoised images at every step of the network's trajectory; doubles the work.

    Raises:
        ValueError: an argument outside what is listed, or machines for images of another shape.
        TypeError: not denoisers.
    """
    named = dict(machines) if isinstance(machines, Mapping) else {type(machines).__name__: machines}
    if not named:
        raise ValueError("machines: got none, takes one or more")
    for name, machine in {"network": network, **named}.items():
        if not isinstance(machine, Denoiser):
            raise TypeError(f"{name}: got {type(machine).__name__}, takes a denoiser (see adapters.network)")
        if tuple(machine.shape) != tuple(network.shape):
            of, takes = (" x ".join(map(str, shape)) for shape in (machine.shape, network.shape))
            raise ValueError(f"{name}: of {of} images, the network's are {takes}")
    n = checks.integer("n", n, at_least=1)
    levels = get_schedule(schedule, steps)
    listed = labels_in_turn(labels, range(first, first + n))
    options: dict[str, Any] = {
        "n": n,
        "steps": steps,
        "schedule": levels,
        "sampler": sampler,
        "labels": labels,
        "seed": seed,
        "first": first,
        "batch_size": batch_size,
        "device": device,
        "progress": False,
    }

    trajectory: list[Step] = []
    images = sample(network, callback=trajectory.append, **options).cpu()
    found: dict[str, Agreement] = {}
    work = len(named) * (len(trajectory) * along + len(levels) * -(-n // batch_size))
    with tqdm(total=work, unit="step", desc="comparing", delay=2, disable=not progress) as bar:
        for name, machine in named.items():
            made = sample(machine, callback=lambda step: bar.update(), **options).cpu()
            step_r2, step_mse = torch.full((2, len(levels), n), torch.nan, dtype=torch.float64)
            for step in trajectory if along else ():
                own = slice(step.images.start - first, step.images.stop - first)
                x0 = machine.denoise(step.x / step.alpha, step.sigma / step.alpha, listed[own] if listed else None)
                step_r2[step.index, own] = correlation(x0, step.x0).square().cpu()
                step_mse[step.index, own] = (x0 - step.x0).double().square().mean((1, 2, 3)).cpu()
                bar.update()
            mse = (made - images).double().square().mean((1, 2, 3))
            found[name] = Agreement(made, correlation(made, images), mse, step_r2, step_mse)
    settings = {
        "network": repr(network),
        "machines": {name: repr(machine) for name, machine in named.items()},
        "n": n,
        "first": first,
        "steps": steps,
        "schedule": levels.name,
        "sampler": sampler,
        "seed": seed,
    }
    return Comparison(images, found, levels.ratios[:-1].tolist(), listed, settings)


def baselines(
    bank: PatchBank,
    zeros: ScaleTable,
    circular: ScaleTable | None = None,
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> dict[str, Denoiser]:
    """The machines and baselines that a network is usually compared with, by name.

    Args:
        bank: the network's training images.
        zeros: patch sizes of the boundary-broken and of the local machine.
        circular: patch sizes of the circular machine, at most the image size; None clips those of `zeros`.
    """
    if circular is None:
        largest = min(bank.shape[1:])
        largest -= 1 - largest % 2
        circular = ScaleTable(zeros.sigmas, [min(k, largest) for k in zeros.sizes], zeros.name)
    return {
        "els-zeros": EquivariantLocalScore(bank, zeros, "zeros", engine, memory_limit),
        "els-circular": EquivariantLocalScore(bank, circular, "circular", engine, memory_limit),
        "local": LocalScore(bank, zeros, engine, memory_limit),
        "ideal": IdealScore(bank, engine, memory_limit),
        "gaussian": GaussianScore(bank, memory_limit=memory_limit),
    }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[B] Pearson correlation over all pixels of each pair of images; 0 where one of them is constant."""
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms, torch.zeros_like(norms)).clamp(-1, 1)


def bootstrap_interval(values: Tensor | Sequence[float], level: float = 0.95) -> list[float]:
    """Percentile bootstrap interval of the median; deterministic."""
    known = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(known, (RESAMPLES, len(known)))
    return np.quantile(np.median(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2]).tolist()


def finite(value: Any) -> Any:
    """The same value with None (null) for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
