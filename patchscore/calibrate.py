"""Calibration: at each noise level, the patch size whose score agrees best with a network's.

The network samples images; at every step of a trajectory, machines of all candidate patch sizes denoise the same noisy
image, and the size whose score has the largest cosine similarity with the network's is chosen. The median over
trajectories is the ScaleTable (Kamb & Ganguli 2024, section 5). The size found at a noise level belongs to that level;
the published tables are read the same way, although the released script wrote the size found at step j + 1 into entry
j.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Labels, ScoreMachine, alike, check_labels
from .distributed import Sharded
from .files import Additions, read_record, unsealed, write_record
from .machines import EquivariantLocalScore, LocalScore
from .noise import Schedule, get_schedule
from .sampling import DEFAULT_BATCH, Step, labels_in_turn, sample
from .scales import ScaleTable
from .theories import WrappedScore

FORMAT = "patchscore-calibration"
VERSION = 2
UNSEALED = 1
"""Of release 0.1.0, which wrote no hash."""

METRICS = ("cosine", "l2")
MACHINES = ("els", "local", "wrapped")
SUMMARIES = ("median", "mode")
PATCH_SIZES = (3, 5, 7, 9, 11, 13, 15, 17, 19, 21)


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        sigmas: [steps] noise levels, most noise first.
        patch_sizes: the candidate sizes, ascending.
        agreement: [steps, n, sizes] cosine similarity of the two scores, or minus their L2 distance, at each step of
            each trajectory.
        settings: everything that determines the numbers.
    """

    sigmas: list[float]
    patch_sizes: tuple[int, ...]
    agreement: np.ndarray
    settings: dict[str, Any]

    @property
    def choices(self) -> np.ndarray:
        """[steps, n] the best size for each trajectory at each step; the smaller of two equal ones."""
        return np.asarray(self.patch_sizes)[self.agreement.argmax(-1)]

    @property
    def median(self) -> list[int]:
        """[steps] the median size over trajectories; the smaller of two middle ones, so that it is a candidate."""
        return [int(k) for k in np.sort(self.choices, axis=1)[:, (self.choices.shape[1] - 1) // 2]]

    @property
    def mode(self) -> list[int]:
        """[steps] the most frequent size over trajectories; the smaller of two equally frequent ones."""
        sizes = np.asarray(self.patch_sizes)
        counts = (self.choices[:, :, None] == sizes).sum(1)
        return [int(k) for k in sizes[counts.argmax(-1)]]

    def table(self, summary: str = "median", name: str = "calibrated") -> ScaleTable:
        """The ScaleTable of the median, or of the mode, over trajectories."""
        sizes = self.median if checks.one_of("summary", summary, SUMMARIES) == "median" else self.mode
        return ScaleTable(self.sigmas[::-1], sizes[::-1], name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON; `calibrate(resume=path)` continues from it."""
        content = {
            "settings": self.settings,
            "sigmas": self.sigmas,
            "patch_sizes": list(self.patch_sizes),
            "median": self.median,
            "mode": self.mode,
            "choices": self.choices.tolist(),
            "agreement": self.agreement.tolist(),
        }
        write_record(Path(path), FORMAT, VERSION, content, seal=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads what `save` wrote; ValueError names the path of a file that is not that."""
        try:
            content = read_record(Path(path), FORMAT, UNSEALED, VERSION)
            content = content if content["version"] == UNSEALED else unsealed(content)
            sizes = tuple(checks.odd("patch_sizes", size) for size in content["patch_sizes"])
            agreement = np.asarray(content["agreement"], dtype=float)
            if agreement.ndim != 3 or agreement.shape[::2] != (len(content["sigmas"]), len(sizes)):
                raise ValueError(f"agreement of shape {list(agreement.shape)}")
            return cls([float(s) for s in content["sigmas"]], sizes, agreement, dict(content["settings"]))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: not a usable calibration: {error}") from None


def calibrate(
    network: Denoiser,
    bank: PatchBank,
    patch_sizes: Sequence[int] = PATCH_SIZES,
    schedule: str | Schedule = "cosine",
    steps: int = 20,
    n: int = 20,
    padding_mode: str = "zeros",
    *,
    metric: str = "cosine",
    machine: str = "els",
    sampler: str = "ddim",
    labels: Labels = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int = DEFAULT_BATCH,
    device: torch.device | str = "cpu",
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """The patch size at each noise level whose score is closest to the network's, along the network's own trajectories.

    Args:
        network: a denoiser; `patchscore.adapters.network` makes one of any network.
        bank: its training images; under torchrun, the part that `shard` gave this rank, and the sums are over all.
        patch_sizes: the candidate sizes, odd.
        n: number of trajectories.
        padding_mode: "zeros" or "circular", as in the network.
        metric: "cosine" similarity of the two scores, as published, or "l2", their distance.
        machine: "els"; "local" for windows at the same position only; or "wrapped" for `theories.WrappedScore`.
        sampler: as in `sample`, and so are `schedule`, `steps`, `labels`, `seed`, `first`, `batch_size`, `device` and
            `progress`.
        engine: of the machines, and so is `memory_limit`.
        resume: a file that the calibration is written to, and continues from where it exists. Between its first batch
            and its end, batches are appended to a file beside it, whose name ends in .added.

    Raises:
        ValueError: an argument out of its range; a file of another calibration, named by its path.
        TypeError: an argument of the wrong type.
    """
    if not isinstance(network, Denoiser):
        raise TypeError(f"network: got {type(network).__name__}, takes a denoiser (see adapters.network)")
    if not isinstance(bank, PatchBank):
        raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
    if tuple(network.shape) != bank.shape:
        raise ValueError(f"network: of {list(network.shape)} images, the bank's are {list(bank.shape)}")
    sizes = tuple(sorted({checks.odd("patch_sizes", size) for size in patch_sizes}))
    if not sizes:
        raise ValueError("patch_sizes: got none, takes one or more")
    n = checks.integer("n", n, at_least=1)
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    checks.one_of("metric", metric, METRICS)
    checks.one_of("machine", machine, MACHINES)
    machines: list[Denoiser] = [_machine(machine, bank, k, padding_mode, engine, memory_limit) for k in sizes]
    if bank.part is not None:
        machines = [Sharded(cast(ScoreMachine, one)) for one in machines]
        bank = bank.part.whole
    levels = get_schedule(schedule, steps)
    listed = labels_in_turn(labels, range(first, first + n))
    settings = {
        "bank": bank.fingerprint,
        "machine": machine,
        "padding_mode": padding_mode,
        "metric": metric,
        "schedule": levels.name,
        "sampler": sampler,
        "seed": seed,
        "first": first,
        "labels": listed,
        "probe": probe(network, levels.ratios[0].item(), seed, listed),
    }

    done, added = _resumed(resume, settings, levels, sizes)
    rows = [] if done is None else [done[:, :n]]
    start = written = 0 if done is None else min(n, done.shape[1])
    found = Calibration(levels.ratios[:-1].tolist(), sizes, np.empty((len(levels), 0, len(sizes))), settings)
    total = n * len(levels)
    with tqdm(
        total=total, initial=start * len(levels), unit="step", desc="calibrating", delay=2, disable=not progress
    ) as bar:
        while start < n:
            count = min(batch_size, n - start)
            trajectory: list[Step] = []
            sample(
                network,
                n=count,
                schedule=levels,
                sampler=sampler,
                labels=labels,
                seed=seed,
                first=first + start,
                batch_size=count,
                device=device,
                callback=trajectory.append,
                progress=False,
            )
            agreement = np.empty((len(levels), count, len(sizes)))
            for step in trajectory:
                z, sigma = step.x / step.alpha, step.sigma / step.alpha
                own = listed[start : start + count] if listed else None
                for i, x0 in enumerate(denoised_by_each(machines, z, sigma, own)):
                    agreement[step.index, :, i] = _agreement(metric, x0 - z, step.x0 - z).cpu().numpy()
                bar.update(count)
            rows.append(agreement)
            if resume is not None and start == 0:
                Calibration(found.sigmas, sizes, agreement, settings).save(resume)
            elif added is not None:
                own = listed[start : start + count] if listed else None
                added.append({"start": start, "labels": own, "agreement": agreement.tolist()})
            start += count
    found = Calibration(found.sigmas, sizes, np.concatenate(rows, 1), settings)
    if resume is not None and added is not None and start > written:
        found.save(resume)
        added.remove()
    return found


def denoised_by_each(machines: Sequence[Denoiser], z: Tensor, sigma: float, labels: Labels) -> list[Tensor]:
    """z denoised by each of several machines over one bank, in a single pass over the bank where the engine has one."""
    summing = [machine for machine in machines if isinstance(machine, ScoreMachine)]
    if len(summing) < len(machines):
        return [machine.denoise(z, sigma, labels) for machine in machines]
    bank = summing[0].bank
    means = [torch.empty_like(z) for _ in machines]
    sigmas = torch.full((len(z),), sigma, dtype=torch.float64)
    competitions = [machine.competition(machine.patch_size_at(sigma)) for machine in summing]
    for label, items in alike(check_labels(labels, bank, len(z))):
        totals = summing[0].exact_sums_of(label, z[items], sigmas[items], competitions)
        for mean, total in zip(means, totals, strict=True):
            mean[items] = total.mean.to(z.dtype)
    return means


def _agreement(metric: str, a: Tensor, b: Tensor) -> Tensor:
    """[B] agreement of two displacements D - z, which are the scores up to a common factor."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    if metric == "l2":
        return -(a - b).norm(dim=1)
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def _machine(
    machine: str, bank: PatchBank, k: int, padding_mode: str, engine: str, memory_limit: int
) -> LocalScore | EquivariantLocalScore | WrappedScore:
    if machine == "els":
        return EquivariantLocalScore(bank, k, padding_mode, engine, memory_limit)
    if machine == "wrapped":
        if padding_mode != "circular":
            raise ValueError(f"padding_mode: got {padding_mode!r}, the wrapped machine takes circular")
        return WrappedScore(bank, k, engine, memory_limit)
    if padding_mode != "zeros":
        raise ValueError(f"padding_mode: got {padding_mode!r}, the local machine pads with zeros")
    return LocalScore(bank, k, engine, memory_limit)


def probe(network: Denoiser, sigma: float, seed: int, labels: Sequence[int | str | None] | None = None) -> list[float]:
    """A few pixels of the network's output for fixed noise: a fingerprint of the network.

    The network is called without labels or, if it needs one, with the first of `labels`.
    """
    noise = sigma * torch.randn(1, *network.shape, generator=torch.Generator().manual_seed(seed % 2**63))
    try:
        x0 = network.denoise(noise, sigma).flatten()
    except ValueError:
        if not labels:
            raise
        x0 = network.denoise(noise, sigma, labels[0]).flatten()
    return [round(value, 6) for value in x0[:: max(1, len(x0) // 8)][:8].tolist()]


def _resumed(
    path: str | os.PathLike[str] | None, settings: dict[str, Any], levels: Schedule, sizes: tuple[int, ...]
) -> tuple[np.ndarray | None, Additions | None]:
    """The agreement that an earlier call of the same settings left, if it did, and where batches are to be added."""
    if path is None:
        return None, None
    # There is a label for each trajectory that was asked for.
    added = Additions(path, {name: value for name, value in settings.items() if name not in ("labels", "probe")})
    if not Path(path).exists():
        added.remove()
        return None, added
    earlier = Calibration.load(path)
    same_levels = np.allclose(earlier.sigmas, levels.ratios[:-1]) if len(earlier.sigmas) == len(levels) else False
    if not same_levels or earlier.patch_sizes != sizes:
        raise ValueError(f"{path}: holds a calibration with other steps or patch sizes; choose another file")
    for name, value in settings.items():
        before = earlier.settings.get(name)
        if name == "probe":
            same = isinstance(before, list) and len(before) == len(value) and np.allclose(before, value, atol=1e-3)
        elif name == "labels":
            common = min(len(before or []), len(value or []))
            same = (before is None) == (value is None) and (before or [])[:common] == (value or [])[:common]
        else:
            same = before == value
        if not same:
            what = "another network" if name == "probe" else f"{name} {before!r}, asked for {value!r}"
            raise ValueError(f"{path}: holds a calibration of {what}; choose another file")
    rows, count = [earlier.agreement], earlier.agreement.shape[1]
    for record, _ in added.read():
        stop = count + len(record["agreement"][0])
        own = settings["labels"][count:stop] if settings["labels"] else None
        if record["start"] == count and own == (record["labels"] and record["labels"][: len(own or [])]):
            rows.append(np.asarray(record["agreement"], dtype=float))
            count += rows[-1].shape[1]
    if len(rows) > 1:
        earlier = Calibration(earlier.sigmas, sizes, np.concatenate(rows, 1), earlier.settings)
        earlier.save(path)
    added.remove()
    return earlier.agreement, added
