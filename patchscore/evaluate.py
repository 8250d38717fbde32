"""Theories against a network: all sample from the same seeds, and their images are held against the network's.

The published comparison (Kamb & Ganguli 2024, section 5): both start from the same noise and follow the same schedule,
and the final images are correlated over their pixels. In addition, both denoise the noisy images along the network's
own trajectory, which separates the error of a single step from errors that accumulate. Paired differences, image by
image, decide which of two theories is closer.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .calibrate import probe
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, Labels
from .files import Additions, check_header, header, parse_json, sealed, sha256, unsealed, write_atomically, write_record
from .gaussian import GaussianScore
from .machines import EquivariantLocalScore, IdealScore, LocalScore
from .noise import Schedule, get_schedule
from .sampling import DEFAULT_BATCH, Step, labels_in_turn, sample
from .scales import ScaleTable
from .theories import (
    FilteredMeans,
    GoldenSubset,
    NearestScore,
    PatchComposition,
    PcaLocality,
    SmoothedScore,
    WrappedScore,
    pspc_sizes,
    soft_squares,
)

FORMAT = "patchscore-comparison"
VERSION = 2
"""Version 1, of release 0.1.0, had r2 for the squared correlation and neither `determination` nor `mse_unit`."""
RESUMED = "patchscore-comparison-arrays"
RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
FEWEST_PAIRS = 6
"""Images from which a difference is told: of five, all favour the same theory by chance in one of sixteen cases."""


@dataclass(frozen=True)
class Figure:
    """A measure of agreement between two images: its name in words, and whether larger is closer."""

    title: str
    more_is_nearer: bool


FIGURES = {
    "correlation": Figure("Pearson correlation r", True),
    "correlation_squared": Figure("squared correlation r^2", True),
    "determination": Figure("coefficient of determination", True),
    "mse": Figure("mean squared error on [-1, 1]", False),
    "mse_unit": Figure("mean squared error on [0, 1]", False),
}
"""Agreement of an image x with the network's y, over all their pixels; papers print three of them as r^2.

correlation: of x and y; 0 where one is constant. Kamb & Ganguli 2024 print it as r^2.
correlation_squared: its square, the part of the variance that a linear fit explains.
determination: 1 - sum (x - y)^2 / sum (y - mean y)^2, without a fit; negative where the mean of y is nearer than x, and
    -infinity for another image than a constant y. Lukoianov et al. 2025 (with n - 1 in the variance) print it as r^2.
mse: mean (x - y)^2, pixels in [-1, 1].
mse_unit: the same of (x + 1) / 2, clamped to [0, 1]: a quarter of it, where no pixel lies outside.
"""


def figures_of(made: Tensor, images: Tensor) -> dict[str, Tensor]:
    """[B] float64 each of `FIGURES` for pairs of images [B, C, H, W]; `images` are those to explain."""
    x, y = made.double().flatten(1), images.double().flatten(1)
    r, errors = correlation(x, y), (x - y).square()
    spread = (y - y.mean(1, keepdim=True)).square().sum(1)
    unit = [((part + 1) / 2).clamp(0, 1) for part in (x, y)]
    # 0 / 0, of equal constant images, explains all there is.
    return {
        "correlation": r,
        "correlation_squared": r.square(),
        "determination": 1 - (errors.sum(1) / spread).nan_to_num(nan=0.0, posinf=torch.inf),
        "mse": errors.mean(1),
        "mse_unit": (unit[0] - unit[1]).square().mean(1),
    }


@dataclass(frozen=True)
class Agreement:
    """Agreement of one machine with the network.

    Attributes:
        images: [n, C, H, W] the machine's images, from the network's seeds.
        figures: [n] each of `FIGURES`, of the final images, by name.
        steps: [steps, n] the same of the two denoised images at each step of the network's trajectory; NaN unless asked
            for.
    """

    images: Tensor
    figures: dict[str, Tensor]
    steps: dict[str, Tensor]

    @property
    def correlation(self) -> Tensor:
        """[n] Pearson correlation with the network's image over all pixels."""
        return self.figures["correlation"]

    @property
    def r2(self) -> Tensor:
        """[n] squared correlation: the fraction of the variance explained by a linear fit to the other image."""
        return self.figures["correlation_squared"]

    @property
    def determination(self) -> Tensor:
        """[n] coefficient of determination, without a fit."""
        return self.figures["determination"]

    @property
    def mse(self) -> Tensor:
        """[n] mean squared difference of pixels in [-1, 1]."""
        return self.figures["mse"]

    @property
    def step_r2(self) -> Tensor:
        """[steps, n] squared correlation of the two denoised images at each step; NaN unless asked for."""
        return self.steps["correlation_squared"]

    @property
    def step_mse(self) -> Tensor:
        """[steps, n] their mean squared difference, likewise."""
        return self.steps["mse"]


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
        """The median squared correlation of each machine, in a line."""
        medians = ", ".join(f"{name} {np.median(of.r2.numpy()):.3f}" for name, of in self.machines.items())
        return f"Comparison({len(self.images)} images, median r^2: {medians})"

    def rows(self) -> list[dict[str, Any]]:
        """One row per machine: the median of each figure over the images, with its 95% bootstrap interval.

        `NAME_median` and `NAME_interval` are of the final images, `step_NAME_median` and `step_NAME_interval` have an
        entry for each step, if steps were compared.
        """
        rows = []
        for name, of in self.machines.items():
            row: dict[str, Any] = {"machine": name, "n": len(self.images)}
            for figure in FIGURES:
                row[f"{figure}_median"] = float(np.median(of.figures[figure].numpy()))
                row[f"{figure}_interval"] = bootstrap_interval(of.figures[figure])
            if not of.step_mse.isnan().any():
                for figure in FIGURES:
                    steps = of.steps[figure].numpy()
                    row[f"step_{figure}_median"] = np.median(steps, axis=1).tolist()
                    row[f"step_{figure}_interval"] = bootstrap_interval(steps)
            rows.append(row)
        return rows

    def league(self, figure: str = "correlation_squared") -> list[str]:
        """The machines by the median of a figure, the nearest to the network first."""
        checks.one_of("figure", figure, FIGURES)
        sign = -1 if FIGURES[figure].more_is_nearer else 1
        return sorted(self.machines, key=lambda name: sign * float(np.median(self.machines[name].figures[figure])))

    def differences(self, figure: str = "correlation_squared") -> list[dict[str, Any]]:
        """Every two machines, image by image: the median of first minus second, its 95% interval, and which is closer.

        The same images in both make the interval far narrower than those of the two medians. `nearer` is the machine
        whose figure is better as far as the interval tells, None where it holds 0 or there are fewer than six images;
        `wins` is the fraction of images for which the first is closer; a tie counts half. Names come in the order of
        `league`.
        """
        names = self.league(figure)
        rows = []
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                a, b = (self.machines[name].figures[figure].numpy() for name in (first, second))
                # Two images without any agreement, -infinity both, differ by nothing.
                gap = np.where(a == b, 0.0, a - np.where(a == b, 0.0, b))
                low, high = bootstrap_interval(gap)
                ahead = gap if FIGURES[figure].more_is_nearer else -gap
                nearer = None
                if (low > 0 or high < 0) and len(gap) >= FEWEST_PAIRS:
                    nearer = first if (low > 0) == FIGURES[figure].more_is_nearer else second
                wins = float((ahead > 0).mean() + (ahead == 0).mean() / 2)
                row = {"figure": figure, "first": first, "second": second, "median": float(np.median(gap))}
                rows.append({**row, "interval": [low, high], "wins": wins, "nearer": nearer})
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON: settings, the rows, paired differences, and every image's figures."""
        each = {
            name: {
                **{figure: of.figures[figure].tolist() for figure in FIGURES},
                **{f"step_{figure}": of.steps[figure].tolist() for figure in FIGURES},
            }
            for name, of in self.machines.items()
        }
        report = {
            "settings": self.settings,
            "figures": {name: figure.title for name, figure in FIGURES.items()},
            "sigmas": self.sigmas,
            "labels": self.labels,
            "rows": self.rows(),
            "differences": [row for figure in FIGURES for row in self.differences(figure)],
            "images": each,
        }
        write_record(Path(path), FORMAT, VERSION, finite(report))

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes medians and intervals as CSV, a line for each machine, figure and place.

        `place` is "image" for the final images, or the number of the step, whose noise level is `sigma`.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["machine", "figure", "place", "sigma", "n", "median", "low", "high"])
        for row in self.rows():
            for figure in FIGURES:
                final = (row[f"{figure}_median"], *row[f"{figure}_interval"])
                table.writerow([row["machine"], figure, "image", "", row["n"], *map(repr, final)])
                steps = zip(row.get(f"step_{figure}_median", ()), row.get(f"step_{figure}_interval", ()), strict=True)
                for i, (median, ends) in enumerate(steps):
                    of_step = map(repr, (median, *ends))
                    table.writerow([row["machine"], figure, i, repr(self.sigmas[i]), row["n"], *of_step])
        write_atomically(Path(path), text.getvalue().encode())


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
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Samples from the network and from the machines with the same seeds, and compares the images.

    Args:
        network: a denoiser; `patchscore.adapters.network` makes one of any network.
        machines: a denoiser, or several by name (`baselines` gives the usual ones, `theories_named` all).
        n: number of images, as in `sample`; so are `steps`, `schedule`, `sampler`, `labels`, `seed`, `first`,
            `batch_size`, `device` and `progress`.
        along: also compare the denoised images at every step of the network's trajectory; doubles the work.
        resume: a file that the comparison is written to, and continues from where it exists; more images and more
            machines add to it. Between its first batch and its end, batches are appended to a file beside it, whose
            name ends in .added.

    Raises:
        ValueError: an argument out of its range, machines for images of another shape, or a file of another
            comparison, named by its path.
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
    batch_size = checks.integer("batch_size", batch_size, at_least=1)
    levels = get_schedule(schedule, steps)
    listed = labels_in_turn(labels, range(first, first + n))
    options: dict[str, Any] = {
        "steps": steps,
        "schedule": levels,
        "sampler": sampler,
        "labels": labels,
        "seed": seed,
        "device": device,
        "progress": False,
    }
    described = {
        "schedule": levels.name,
        "levels": levels.ratios.tolist(),
        "sampler": sampler,
        "seed": seed,
        "first": first,
        "along": along,
    }
    parts = _Parts.taken_up(resume, described, network, named, listed)
    total = sum(n - min(n, parts.done(name)) for name in named) * len(levels) * (1 + along)
    with tqdm(total=total, unit="step", desc="comparing", delay=2, disable=not progress) as bar:
        while (start := min(parts.done(name) for name in named)) < n:
            ahead = [done for name in named if (done := parts.done(name)) > start]
            stop = min([start + batch_size, n, *ahead])
            trajectory: list[Step] = []
            batch = {**options, "n": stop - start, "first": first + start, "batch_size": stop - start}
            images = sample(network, callback=trajectory.append, **batch).cpu()
            for name, machine in named.items():
                if parts.done(name) > start:
                    continue

                def on_step(step: Step) -> None:
                    bar.update(len(step.images))

                made = sample(machine, callback=on_step, **batch).cpu()
                shape = (len(FIGURES), len(levels), stop - start)
                of_steps = torch.full(shape, torch.nan, dtype=torch.float64)
                for step in trajectory if along else ():
                    own = listed[start:stop] if listed else None
                    x0 = machine.denoise(step.x / step.alpha, step.sigma / step.alpha, own)
                    of_steps[:, step.index] = torch.stack(list(figures_of(x0, step.x0).values())).cpu()
                    bar.update(stop - start)
                parts.add(name, start, images, made, torch.stack(list(figures_of(made, images).values())), of_steps)
    parts.save()
    found = {name: parts.agreement(name, n) for name in named}
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
    return Comparison(parts.images()[:n], found, levels.ratios[:-1].tolist(), listed, settings)


class _Parts:
    """What a comparison has so far: the network's images, and each machine's images and figures, from image 0 on.

    Args:
        path: the file that it goes on from, written whole with the first batch and at the end; None for none.
        settings: of the comparison.
        images: [done, C, H, W] the network's.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any], images: Tensor):
        self.path = path
        self.settings = settings
        self.of_network = [images]
        self.made: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        """By machine, in parts: images [part, C, H, W], figures [figures, part], of steps [figures, steps, part]."""
        kept = {name: value for name, value in settings.items() if name not in ("labels", "probe", "probes")}
        self.added = None if path is None else Additions(path, kept)
        self.unsaved = False

    def images(self) -> Tensor:
        """[done, C, H, W] the network's."""
        self.of_network = [torch.cat(self.of_network)]
        return self.of_network[0]

    def parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a machine, joined."""
        images, figures, steps = zip(*self.made[name], strict=True)
        self.made[name] = [(torch.cat(images), torch.cat(figures, 1), torch.cat(steps, 2))]
        return self.made[name][0]

    def done(self, name: str) -> int:
        return sum(len(images) for images, _, _ in self.made.get(name, ()))

    def add(self, name: str, start: int, images: Tensor, made: Tensor, figures: Tensor, steps: Tensor) -> None:
        """A batch of a machine, from image `start` on, and the network's images of it; saved at once."""
        self._put(name, start, images, made, figures, steps)
        self.unsaved = True
        if self.path is None or self.added is None:
            return
        if not Path(self.path).exists():
            self.save()
            return
        content = io.BytesIO()
        arrays = {"images": images, "made": made, "figures": figures, "steps": steps}
        np.savez(content, **{key: of.numpy() for key, of in arrays.items()})  # type: ignore[arg-type]
        about = {"machine": name, "start": start, **self._known(name, start, start + len(made))}
        self.added.append(about, content.getvalue())

    def _known(self, name: str, start: int, stop: int) -> dict[str, Any]:
        """What must be the same of a batch of a machine for it to be of this comparison."""
        labels = self.settings["labels"]
        return {"probe": self.settings["probes"][name], "labels": labels and labels[start:stop]}

    def _put(self, name: str, start: int, images: Tensor, made: Tensor, figures: Tensor, steps: Tensor) -> None:
        have = sum(map(len, self.of_network))
        if start + len(images) > have:
            self.of_network.append(images[have - start :])
        self.made.setdefault(name, []).append((made, figures, steps))

    def agreement(self, name: str, n: int) -> Agreement:
        images, figures, steps = self.parts(name)
        of_images = {figure: figures[i, :n] for i, figure in enumerate(FIGURES)}
        return Agreement(images[:n], of_images, {figure: steps[i, :, :n] for i, figure in enumerate(FIGURES)})

    def save(self) -> None:
        """Writes the file to go on from whole, if there is one and something is new."""
        if self.path is None or self.added is None or not self.unsaved:
            return
        arrays = {"images": self.images().numpy()}
        for i, name in enumerate(self.made):
            arrays |= {f"{i}.{j}": part.numpy() for j, part in enumerate(self.parts(name))}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        packed = content.getvalue()
        about = {**header(RESUMED, VERSION), "settings": self.settings, "machines": list(self.made)}
        line = json.dumps(sealed({**about, "arrays": sha256(packed)})).encode()
        write_atomically(Path(self.path), line + b"\n" + packed)
        self.added.remove()
        self.unsaved = False

    @classmethod
    def taken_up(
        cls,
        path: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        network: Denoiser,
        machines: Mapping[str, Denoiser],
        labels: list[int | str | None] | None,
    ) -> _Parts:
        """What an earlier call left in the file, if it compared the same network and, by name, the same machines."""
        if path is None:
            return cls(None, {}, torch.empty(0, *network.shape))
        sigma, seed = settings["levels"][0], settings["seed"]
        settings = {**settings, "labels": labels, "probe": probe(network, sigma, seed, labels)}
        probes = {name: probe(machine, sigma, seed, labels) for name, machine in machines.items()}
        if not Path(path).exists():
            Additions(path, None).remove()  # of a file that is gone
            return cls(path, {**settings, "probes": probes}, torch.empty(0, *network.shape))
        try:
            line, _, packed = Path(path).read_bytes().partition(b"\n")
            about = unsealed(parse_json(line))
            check_header(about, RESUMED, VERSION)
            if about["arrays"] != sha256(packed):
                raise ValueError("was changed since it was written")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: no comparison to go on from: {error}; choose another file") from None
        before = about["settings"]
        for name, value in settings.items():
            if not _same(name, before[name], value):
                what = "another network" if name == "probe" else f"{name} {before[name]!r}, asked for {value!r}"
                raise ValueError(f"{path}: holds a comparison of {what}; choose another file")
        for name in set(probes) & set(before["probes"]):
            if not _same("probe", before["probes"][name], probes[name]):
                raise ValueError(f"{path}: holds a comparison with another {name}; choose another file")
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            longer = max(labels or [], before["labels"] or [], key=len) or None
            kept = {**settings, "labels": longer, "probes": {**before["probes"], **probes}}
            found = cls(path, kept, torch.from_numpy(arrays["images"]))
            for i, name in enumerate(about["machines"]):
                images, figures, of_steps = (torch.from_numpy(arrays[f"{i}.{j}"]) for j in range(3))
                found.made[name] = [(images, figures, of_steps)]
        found._take_up_additions()
        return found

    def _take_up_additions(self) -> None:
        """Puts what was added since the file was written into it."""
        assert self.added is not None
        for record, packed in self.added.read():
            name, start = record["machine"], record["start"]
            self.settings["probes"].setdefault(name, record["probe"])
            known = self._known(name, start, start + len(record["labels"] or []))
            if start == self.done(name) and all(_same(key, record[key], known[key]) for key in known):
                with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
                    kinds = ("images", "made", "figures", "steps")
                    self._put(name, start, *(torch.from_numpy(arrays[kind]) for kind in kinds))
                self.unsaved = True
        self.save()
        self.added.remove()


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether a setting of an earlier comparison is that of this one; labels may be more or fewer."""
    if name in ("probe", "levels"):
        return len(before) == len(now) and np.allclose(before, now, atol=1e-3)
    if name == "labels":
        common = min(len(before or []), len(now or []))
        return (before is None) == (now is None) and (before or [])[:common] == (now or [])[:common]
    return bool(before == now)


THEORIES = (
    "els-zeros",
    "els-circular",
    "local",
    "ideal",
    "gaussian",
    "pca",
    "golden",
    "composition",
    "smoothed",
    "nearest",
    "soft",
    "els-wrapped",
)
"""What `theories_named` knows: the machines of Kamb & Ganguli, and the theories of docs/theories.md."""
BASELINES = THEORIES[:5]
SMOOTHING = 0.1
"""Width of `smoothed` in pixel values that are two wide: about that of a photograph's finest texture."""


def theories_named(
    names: Sequence[str],
    bank: PatchBank,
    zeros: ScaleTable,
    circular: ScaleTable | None = None,
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> dict[str, Denoiser]:
    """Theories to compare with a network, by name, as their papers have them.

    Args:
        names: of `THEORIES`, in the order of the result.
        bank: the network's training images.
        zeros: patch sizes of the boundary-broken and of the local machine, and of `soft`.
        circular: patch sizes of the circular and wrapped machines, at most the image size; None clips those of `zeros`.
        engine: of the machines.
        memory_limit: bytes of working memory of each.

    Raises:
        ValueError: an unknown name.
    """
    if circular is None:
        largest = min(bank.shape[1:])
        largest -= 1 - largest % 2
        circular = ScaleTable(zeros.sigmas, [min(k, largest) for k in zeros.sizes], zeros.name)
    of_circle = circular
    makers: dict[str, Callable[[], Denoiser]] = {
        "els-zeros": lambda: EquivariantLocalScore(bank, zeros, "zeros", engine, memory_limit),
        "els-circular": lambda: EquivariantLocalScore(bank, of_circle, "circular", engine, memory_limit),
        "local": lambda: LocalScore(bank, zeros, engine, memory_limit),
        "ideal": lambda: IdealScore(bank, engine, memory_limit),
        "gaussian": lambda: GaussianScore(bank, memory_limit=memory_limit),
        "pca": lambda: PcaLocality(bank, memory_limit=memory_limit),
        "golden": lambda: GoldenSubset(bank, memory_limit=memory_limit),
        "composition": lambda: PatchComposition(bank, pspc_sizes, flip=True, memory_limit=memory_limit),
        "smoothed": lambda: SmoothedScore(bank, SMOOTHING, memory_limit=memory_limit),
        "nearest": lambda: NearestScore(bank, memory_limit=memory_limit),
        "soft": lambda: FilteredMeans(bank, soft_squares(bank.shape, zeros), flip=True, memory_limit=memory_limit),
        "els-wrapped": lambda: WrappedScore(bank, of_circle, engine, memory_limit),
    }
    return {name: makers[checks.one_of("theories", name, THEORIES)]() for name in names}


def baselines(
    bank: PatchBank,
    zeros: ScaleTable,
    circular: ScaleTable | None = None,
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> dict[str, Denoiser]:
    """The machines and baselines that a network is usually compared with: the first five of `theories_named`."""
    return theories_named(BASELINES, bank, zeros, circular, engine, memory_limit)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[B] Pearson correlation over all pixels of each pair of images; 0 where one of them is constant."""
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms, torch.zeros_like(norms)).clamp(-1, 1)


def bootstrap_interval(values: Tensor | Sequence[float] | np.ndarray, level: float = 0.95) -> list[Any]:
    """Percentile bootstrap interval of the median over the last axis, [low, high] for each row; deterministic."""
    known = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(known.shape[-1], size=(RESAMPLES, known.shape[-1]))
    ends = [(1 - level) / 2, (1 + level) / 2]
    rows = known.reshape(-1, known.shape[-1])
    found = [np.quantile(np.median(row[drawn], axis=1), ends, method="closest_observation") for row in rows]
    return np.reshape(found, (*known.shape[:-1], 2)).tolist()


def finite(value: Any) -> Any:
    """The same value with None (null) for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
