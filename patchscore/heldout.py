"""Held-out denoising error by patch size and noise level: which patch sizes suit a bank, without a network.

An image x that is left out of the bank gets noise, z = x + sigma eps, and machines of all patch sizes denoise it with
the other images. The error |D(z) - x|^2 says how well each size serves at that noise level: small windows see too
little of the image, large ones are too rare in the bank. Of several denoisers the one with the least such error is the
nearest to the true posterior mean (Vincent 2011, equation 8), which is what a network is trained for as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks, engines
from .bank import PatchBank
from .files import Additions, read_record, unsealed, write_record
from .posterior import PosteriorSum, merge
from .windows import Competition, equivariant_competition, local_competition

FORMAT = "patchscore-held-out-errors"
VERSION = 1

MACHINES = ("els", "local")
SIGMAS = tuple(0.05 * 2**j for j in range(10))
"""Noise levels of a fit, 0.05 to 25.6 in pixel values (images are two wide); the levels of the usual schedules lie in
between, at most a factor sqrt(2) from the nearest. More levels take proportionally more time."""
IMAGES, BLOCK = 16, 4
"""Held-out images of a fit, and the side of the block of pixels that is denoised in each. docs/theory.md has measured
what more of them change."""
RESAMPLES = 1000
"""Bootstrap resamples of the images behind an interval."""
DEFAULT_MEMORY = 2 * 2**30


@dataclass(frozen=True)
class HeldOutErrors:
    """Squared denoising errors of held-out images, by noise level and patch size; `held_out_errors` measures them.

    Attributes:
        sigmas: [levels] noise levels, ascending.
        patch_sizes: [sizes] the candidates, ascending.
        errors: [levels, images, sizes] mean squared error of pixels in [-1, 1].
        settings: everything that determines the numbers.
    """

    sigmas: tuple[float, ...]
    patch_sizes: tuple[int, ...]
    errors: np.ndarray
    settings: dict[str, Any]

    @cached_property
    def means(self) -> np.ndarray:
        """[levels, sizes] error, averaged over the images."""
        return self.errors.mean(1)

    @property
    def best(self) -> list[int]:
        """[levels] the size with the least error; the smaller of two equal ones."""
        return [self.patch_sizes[i] for i in self.means.argmin(1)]

    @property
    def runner_up(self) -> list[int | None]:
        """[levels] the size with the second least error; None where there is one candidate."""
        if len(self.patch_sizes) == 1:
            return [None] * len(self.sigmas)
        return [self.patch_sizes[i] for i in self.means.argsort(1, kind="stable")[:, 1]]

    @property
    def monotone(self) -> list[int]:
        """[levels] sizes that do not fall as the noise grows, with the least sum of relative errors over the levels."""
        relative = self.means / np.maximum(self.means.min(1, keepdims=True), np.finfo(float).tiny)
        # total[k]: the least sum up to this level over paths that end at size k; dynamic programming over the levels.
        total, back = relative[0], []
        for row in relative[1:]:
            least = np.minimum.accumulate(total)
            back.append([int(total[: k + 1].argmin()) for k in range(len(total))])
            total = row + least
        at = [int(total.argmin())]
        for came in reversed(back):
            at.append(came[at[-1]])
        return [self.patch_sizes[i] for i in reversed(at)]

    @cached_property
    def _resampled(self) -> np.ndarray:
        """[levels, RESAMPLES] the position of the best size for each bootstrap resample of the images."""
        images = self.errors.shape[1]
        counts = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), RESAMPLES)
        return np.einsum("ri,lik->lrk", counts / images, self.errors).argmin(2)

    def intervals(self, level: float = 0.95) -> list[tuple[int, int]]:
        """[levels] percentile bootstrap interval of the best size, over images."""
        ends = np.quantile(self._resampled, [(1 - level) / 2, (1 + level) / 2], axis=1, method="nearest")
        return [(self.patch_sizes[low], self.patch_sizes[high]) for low, high in ends.T.tolist()]

    @property
    def regret(self) -> list[float]:
        """[levels] mean relative increase of the error when the sizes are chosen on resampled images."""
        least = np.maximum(self.means.min(1), np.finfo(float).tiny)
        return (np.take_along_axis(self.means, self._resampled, 1).mean(1) / least - 1).tolist()

    def rows(self) -> list[dict[str, Any]]:
        """One row a noise level: best size, its interval and error, the runner-up and by how much that is worse."""
        rows = []
        ordered = np.sort(self.means, axis=1)
        for i, (sigma, best, other, ends, regret) in enumerate(
            zip(self.sigmas, self.best, self.runner_up, self.intervals(), self.regret, strict=True)
        ):
            worse = None if other is None or ordered[i, 0] == 0 else float(ordered[i, 1] / ordered[i, 0] - 1)
            row = {"sigma": sigma, "best": best, "interval": list(ends), "rms": float(ordered[i, 0]) ** 0.5}
            rows.append({**row, "runner_up": other, "runner_up_excess": worse, "regret": regret})
        return rows

    def __repr__(self) -> str:
        return f"HeldOutErrors({self.errors.shape[1]} images, best sizes {' '.join(map(str, self.best))})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON."""
        content = {
            "settings": self.settings,
            "sigmas": list(self.sigmas),
            "patch_sizes": list(self.patch_sizes),
            "rows": self.rows(),
            "errors": self.errors.tolist(),
        }
        write_record(Path(path), FORMAT, VERSION, content, seal=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeldOutErrors:
        """Reads what `save` wrote; ValueError names the path of a file that is not that."""
        try:
            content = unsealed(read_record(Path(path), FORMAT, VERSION))
            sigmas = tuple(float(sigma) for sigma in content["sigmas"])
            sizes = tuple(checks.odd("patch_sizes", size) for size in content["patch_sizes"])
            errors = np.asarray(content["errors"], dtype=float)
            if errors.ndim != 3 or errors.shape[::2] != (len(sigmas), len(sizes)) or 0 in errors.shape:
                raise ValueError(f"errors of shape {list(errors.shape)}")
            return cls(sigmas, sizes, errors, dict(content["settings"]))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: not usable held-out errors: {error}") from None


def candidate_sizes(height: int, width: int) -> tuple[int, ...]:
    """The patch sizes that a fit tries unless told otherwise: 3 to the image's smaller side, in steps of about 1.25."""
    sizes, k = [], 3
    while k <= min(height, width):
        sizes.append(k)
        k = max(k + 2, int(1.25 * k / 2) * 2 + 1)
    return tuple(sizes) or (1,)


def held_out_settings(
    bank: PatchBank,
    patch_sizes: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    *,
    images: int = IMAGES,
    block: int | None = BLOCK,
    padding_mode: str = "zeros",
    machine: str = "els",
    conditional: bool = False,
    held_out: PatchBank | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What determines the numbers of `held_out_errors`, checked; two calls of the same settings measure the same.

    Raises:
        TypeError, ValueError: as of `held_out_errors`.
    """
    for name, value in (("bank", bank), ("held_out", held_out)):
        if not isinstance(value, PatchBank) and (value is not None or name == "bank"):
            raise TypeError(f"{name}: got {type(value).__name__}, takes a PatchBank")
    _, height, width = bank.shape
    sizes = candidate_sizes(height, width) if patch_sizes is None else patch_sizes
    sizes = tuple(sorted({checks.odd("patch_sizes", size) for size in sizes}))
    if not sizes:
        raise ValueError("patch_sizes: got none, takes one or more")
    checks.one_of("machine", machine, MACHINES)
    checks.one_of("padding_mode", padding_mode, ("zeros", "circular"))
    if machine == "local" and padding_mode != "zeros":
        raise ValueError(f"padding_mode: got {padding_mode!r}, the local machine pads with zeros")
    if padding_mode == "circular" and sizes[-1] > min(height, width):
        raise ValueError(f"patch_sizes: got {sizes[-1]}, images of {height} x {width} take up to {min(height, width)}")
    usual = [sigma * bank.scale for sigma in SIGMAS]
    levels = sorted({checks.number("sigmas", sigma) for sigma in (usual if sigmas is None else sigmas)})
    if not levels or not all(0 < sigma < np.inf for sigma in levels):
        raise ValueError(f"sigmas: got {levels}, takes positive finite numbers")
    if conditional and not bank.classes:
        raise ValueError("conditional: got True, this bank has no labels")
    if held_out is not None and held_out.shape != bank.shape:
        raise ValueError(f"held_out: of {list(held_out.shape)} images, the bank's are {list(bank.shape)}")
    return {
        "bank": bank.fingerprint,
        "held_out": None if held_out is None else held_out.fingerprint,
        "machine": machine,
        "padding_mode": padding_mode,
        "conditional": bool(conditional),
        "patch_sizes": list(sizes),
        "sigmas": levels,
        "images": checks.integer("images", images, at_least=1),
        "block": None if block is None else checks.integer("block", block, at_least=1),
        "seed": checks.integer("seed", seed),
    }


def held_out_errors(
    bank: PatchBank,
    patch_sizes: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    *,
    images: int = IMAGES,
    block: int | None = BLOCK,
    padding_mode: str = "zeros",
    machine: str = "els",
    conditional: bool = False,
    held_out: PatchBank | None = None,
    seed: int = 0,
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY,
    device: torch.device | str = "cpu",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeldOutErrors:
    """The denoising error of every patch size at every noise level, on images that are left out of the bank.

    Each image is denoised by all others of the bank (exact leave-one-out), or by the whole bank where `held_out` gives
    other images. All sizes and levels of an image are summed in one pass over the bank where the engine has one. A
    block of pixels at a random position represents the image: every pixel is equally likely to be in it, because blocks
    wrap around the border.

    Args:
        bank: the training images.
        patch_sizes: the candidates, odd; None takes 3 to the image's smaller side in steps of about 1.25.
        sigmas: noise levels; None takes ten from 0.05 to 25.6, each twice the one before, times the bank's scale.
        images: how many images are held out, drawn from the seed; all of them where there are fewer.
        block: side of the block of pixels that is denoised; None, or more than the image, denoises every pixel.
        padding_mode: "zeros" or "circular", as of the machine that takes the sizes.
        machine: "els", or "local" for windows at the same position only.
        conditional: whether each image is denoised by its own class alone, as it is sampled with labels.
        held_out: other images than the bank's, such as a validation set.
        seed: of the choice of images and blocks, and of the noise.
        engine: of the sums, and so is `memory_limit` in bytes.
        device: where they are taken.
        resume: a file that the fit is written to; where it exists, the fit continues from it, and more images add to
            it. Between its first image and its end, images are appended to a file beside it, whose name ends in .added.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, a bank of one image (or of one in every class), labels of
            `held_out` that the bank lacks, or a file of another fit, named by its path.
    """
    settings = held_out_settings(
        bank,
        patch_sizes,
        sigmas,
        images=images,
        block=block,
        padding_mode=padding_mode,
        machine=machine,
        conditional=conditional,
        held_out=held_out,
        seed=seed,
    )
    engine = checks.one_of("engine", engine, ["auto", *engines.NAMES])
    memory_limit = checks.integer("memory_limit", memory_limit, at_least=1)
    where = checks.device(device)
    sizes, levels = settings["patch_sizes"], settings["sigmas"]
    source = bank if held_out is None else held_out
    drawn = _draw(source, settings["images"], settings["seed"], conditional, leave_out=held_out is None)
    competitions = [_competition(machine, bank.shape, k, padding_mode) for k in sizes]
    ratios = torch.tensor(levels, dtype=torch.float64)

    errors = np.empty((len(levels), len(drawn), len(sizes)))
    earlier, added = _resumed(resume, settings)
    done = earlier[:, : len(drawn)]
    errors[:, : done.shape[1]] = done
    todo = range(done.shape[1], len(drawn))
    for i in tqdm(todo, desc="fitting patch sizes", unit="image", delay=2, disable=not progress):
        image = drawn[i]
        generator = torch.Generator().manual_seed(_seed(settings["seed"], i))
        pixels = _block(bank.shape, settings["block"], generator)
        x = source.chunk(image, image + 1, torch.float64)
        z = x + ratios[:, None, None, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        z = z.to(where, torch.float32)
        label = int(source.labels[image]) if conditional and source.labels is not None else None
        at_pixels = [_at(competition, pixels) for competition in competitions]
        totals: list[PosteriorSum] | None = None
        for part in _others(bank, drawn, image, label) if held_out is None else [bank.of_class(label)]:
            sums = engines.serve_each(engines.EXACT, engine, z, ratios, part, at_pixels, memory_limit)
            totals = sums if totals is None else [merge(a, b) for a, b in zip(totals, sums, strict=True)]
        assert totals is not None
        for k, total in enumerate(totals):
            gap = (total.mean.to("cpu", torch.float64) - x)[:, :, pixels[0]][..., pixels[1]]
            errors[:, i, k] = gap.square().mean((1, 2, 3)).numpy()
        if resume is not None and i == 0:
            HeldOutErrors(tuple(levels), tuple(sizes), errors[:, :1], settings).save(resume)
        elif added is not None:
            added.append({"image": i, "errors": errors[:, i].tolist()})
    found = HeldOutErrors(tuple(levels), tuple(sizes), errors, settings)
    if resume is not None and added is not None and todo:
        found.save(resume)
        added.remove()
    return found


def _resumed(path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> tuple[np.ndarray, Additions | None]:
    """[levels, images, sizes] the errors that an earlier call left, however many, and where images are to be added."""
    none = np.empty((len(settings["sigmas"]), 0, len(settings["patch_sizes"])))
    if path is None:
        return none, None
    added = Additions(path, {name: value for name, value in settings.items() if name != "images"})
    if not Path(path).exists():
        added.remove()
        return none, added
    earlier = HeldOutErrors.load(path)
    for name, value in settings.items():
        before = earlier.settings.get(name)
        if name != "images" and before != value:
            raise ValueError(f"{path}: holds a fit with {name} {before!r}, asked for {value!r}; choose another file")
    columns = [earlier.errors]
    for record, _ in added.read():
        if record["image"] == earlier.errors.shape[1] + len(columns) - 1:
            columns.append(np.asarray(record["errors"], dtype=float)[:, None])
    if len(columns) > 1:
        earlier = replace(earlier, errors=np.concatenate(columns, 1))
        earlier.save(path)
    added.remove()
    return earlier.errors, added


def _draw(source: PatchBank, images: int, seed: int, conditional: bool, leave_out: bool) -> list[int]:
    """Numbers of the images that are held out; the first of a longer draw are those of a shorter one."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(_seed(seed, -1)))
    if leave_out:
        if len(source) < 2:
            raise ValueError("bank: got one image, leaving it out leaves none; takes two or more, or held_out")
        if conditional:
            assert source.labels is not None
            classes, counts = source.labels.unique(return_counts=True)
            order = order[torch.isin(source.labels[order], classes[counts > 1])]
            if not len(order):
                raise ValueError("bank: got one image in every class, leaving it out leaves none")
    return order[:images].tolist()


def _others(bank: PatchBank, drawn: Sequence[int], image: int, label: int | None) -> list[PatchBank]:
    """All images of a class but one, in parts: what is never held out, which all share, and the other held-out ones.

    The first part is the same object for every image of a class, so that a device copies it once.
    """
    kept = torch.ones(len(bank), dtype=torch.bool)
    kept[list(drawn)] = False
    others = torch.tensor([number for number in drawn if number != image], dtype=torch.int64)
    never = kept.nonzero().flatten()
    if label is not None:
        assert bank.labels is not None
        others, never = (numbers[bank.labels[numbers] == label] for numbers in (others, never))
    return [bank.take(numbers) for numbers in (never, others) if len(numbers)]


def _competition(machine: str, shape: tuple[int, int, int], k: int, padding_mode: str) -> Competition:
    _, height, width = shape
    if machine == "local":
        return local_competition(height, width, k)
    return equivariant_competition(height, width, k, padding_mode)


def _block(shape: tuple[int, int, int], side: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns of a block at a random position; it wraps, so every pixel is in it with equal probability."""
    found = []
    for length in shape[1:]:
        start = int(torch.randint(length, (), generator=generator))
        count = length if side is None else min(side, length)
        found.append((start + torch.arange(count)) % length)
    return found[0], found[1]


def _at(competition: Competition, pixels: tuple[Tensor, Tensor]) -> Competition:
    """The competition at the pixels of a block, which wraps: two ranges an axis."""
    groups = [
        group
        for rows in _ranges(pixels[0])
        for cols in _ranges(pixels[1])
        for group in competition.at(rows, cols).groups
    ]
    return competition.only(groups)


def _ranges(coordinates: Tensor) -> list[range]:
    """Coordinates that rise by one, but where they begin again at 0, as ranges."""
    listed = sorted(coordinates.tolist())
    breaks = [i for i in range(1, len(listed)) if listed[i] != listed[i - 1] + 1]
    ends = [0, *breaks, len(listed)]
    return [range(listed[a], listed[b - 1] + 1) for a, b in pairwise(ends)]


def _seed(seed: int, number: int) -> int:
    """A stream for each held-out image (number from 0), and one (-1) for their choice."""
    return int(np.random.SeedSequence([seed % 2**64, number + 1]).generate_state(1, np.uint64)[0])
