"""Images of any size from one or a few exemplars, coarse to fine.

Patches of one size know little of what is larger than themselves. An image pyramid gives them all sizes: an image is
sampled at the coarsest scale, where a patch spans large structures, enlarged, noised again and denoised with the
windows of the next scale, down to the finest. Every level is the equivariant machine on a canvas of its own size.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import checks, files
from .bank import PatchBank
from .denoiser import DEFAULT_MEMORY_LIMIT, ScoreMachine
from .draw.images import png, to_pil
from .explain import explain
from .index import PatchIndex
from .machines import EquivariantLocalScore
from .mixed import MixedBank, open_bank
from .noise import karras
from .pooled import SYMMETRIES, Symmetric
from .sampling import SAMPLERS, image_generator

FORMAT, VERSION = "patchscore-synthesis", 1
COARSEST = 2
"""By default the shorter side of the coarsest exemplar is from this many patch sizes to twice as many."""


@dataclass(frozen=True)
class SynthesisLevel:
    """One scale of a synthesis.

    Attributes:
        index: number of the level, 0 being the coarsest.
        of: number of levels.
        patch_size: k at this level.
        sigmas: the noise levels that were denoised, most noise first.
        image: [C, h, w] what the level made.
        stderr: rms standard error of a denoised pixel, the largest over the steps; 0 where all sums were exact.
        engine: the engines that served, joined by "and".
        seconds: how long it took.
    """

    index: int
    of: int
    patch_size: int
    sigmas: tuple[float, ...]
    image: Tensor
    stderr: float
    engine: str
    seconds: float

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image.shape))
        return f"SynthesisLevel({self.index + 1} of {self.of}, {size}, k {self.patch_size}, {self.engine})"


@dataclass(frozen=True)
class Synthesis:
    """An image and the levels that led to it, coarsest first.

    Attributes:
        image: [C, H, W].
        levels: coarsest first.
        source: [3, H, W] int64, with `source_map`: the exemplar, row and column of the window that is nearest to each
            pixel's own, at the finest level; its centre made the pixel.
    """

    image: Tensor
    levels: tuple[SynthesisLevel, ...]
    source: Tensor | None = None

    def __repr__(self) -> str:
        return f"Synthesis({' x '.join(map(str, self.image.shape))}, {len(self.levels)} levels)"


@torch.no_grad()
def synthesize(
    source: Any,
    size: tuple[int, int],
    *,
    levels: int | None = None,
    patch_size: int | Sequence[int] = 9,
    steps: int | Sequence[int] = 10,
    strength: float | Sequence[float] = 0.3,
    sigma_max: float = 5.0,
    sigma_min: float = 0.02,
    sampler: str = "ddpm",
    tile: bool = False,
    start: Any = None,
    keep: Any = None,
    labels: Any = None,
    symmetry: str | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    engine: str = "auto",
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    device: torch.device | str = "cpu",
    source_map: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    callback: Callable[[SynthesisLevel], None] | None = None,
    progress: bool = True,
) -> Synthesis:
    """An image of any size whose patches, at every scale, are those of the exemplars.

    Args:
        source: a PatchBank or MixedBank of exemplars, one exemplar [C, h, w] (uint8, or floats in [-1, 1]), or whatever
            `PatchBank.open` takes, such as the path of a photograph, or of a folder of some in several sizes.
        size: (height, width) of the image.
        levels: scales of the pyramid, each half as large as the one below; by default as many as leave the smallest of
            the coarsest exemplars, and the canvas there, two patch sizes high and wide.
        patch_size: k, odd; or one for each level, coarsest first.
        steps: denoising steps of a level; or one number for each.
        strength: noise level at which a level begins, in units of pixels: the lower, the more of the coarser level's
            structure remains. The coarsest begins at `sigma_max` instead, unless there is a `start`. Or one for each
            level, the coarsest too.
        sigma_max: noise level at which the coarsest level begins.
        sigma_min: the last noise level of every level.
        sampler: "ddpm" (ancestral), "ddim" or "heun".
        tile: whether the image wraps around, so that it can be tiled; else its borders are made of the exemplars'.
        start: an image [C, h, w] that is resized to begin with, such as a layout, or "source", the (first) exemplar
            itself: retargeting. None begins with noise.
        keep: [h, w] of bool, resized as the image; where it is true, the pixels of `start` stay.
        labels: a label whose exemplars serve, or a map [h, w] of label numbers, resized as the image: which exemplars
            serve where.
        symmetry: as of `Symmetric`: whether mirrored or turned exemplars serve too.
        seed: any integer.
        tolerance: None sums over all windows exactly. A number has every level make a `PatchIndex`, sum over a sample
            of the windows, and state its error: the rms standard error of a pixel that the sample may have.
        engine: "auto" or an engine's name.
        memory_limit: bytes of working memory.
        device: where the denoising happens.
        source_map: whether to search for the exemplar pixel that made each pixel, as `explain` does.
        out: a folder for the picture and the arrays of every level, from which the same call continues.
        overwrite: start afresh where `out` holds a synthesis with other settings.
        callback: called with every level once it is done.
        progress: show a bar on stderr once it has taken two seconds.

    Returns:
        Synthesis; on the CPU, in the range of the exemplars.

    Raises:
        ValueError: an argument out of its range; a canvas or an exemplar smaller than the patch at some
            level; with `tile`, a size that is not a multiple of 2^(levels - 1); another synthesis in `out`.
        TypeError: an argument of the wrong type.
    """
    bank = _bank(source)
    plan = _plan(bank, size, levels, patch_size, steps, strength, sigma_max, sigma_min, tile, start is not None)
    checks.one_of("sampler", sampler, SAMPLERS)
    seed = checks.integer("seed", seed)
    if symmetry is not None:
        checks.one_of("symmetry", symmetry, SYMMETRIES)
        if source_map:
            raise ValueError("symmetry, source_map: got both, and a map cannot tell which windows are mirrored")
    if tolerance is not None and isinstance(bank, MixedBank):
        raise ValueError("tolerance: takes exemplars of one size, as an index does")
    device = checks.device(device)
    if tolerance is not None and not 0 < checks.number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, takes a positive rms error or None")
    layout = _layout(start, bank)
    kept = _map("keep", keep, torch.bool)
    if kept is not None and layout is None:
        raise ValueError("keep: takes a start whose pixels are kept")
    serving = _labels(labels, bank)
    settings = {
        "bank": bank.fingerprint,
        "size": list(size),
        "levels": [[list(level.canvas), level.patch_size, list(level.sigmas)] for level in plan],
        "sampler": sampler,
        "tile": tile,
        "seed": seed,
        "symmetry": symmetry,
        "tolerance": tolerance,
        **{name: _digest(x) for name, x in (("start", layout), ("keep", kept), ("labels", serving))},
    }
    scaled = _Pyramid(bank)
    done: list[SynthesisLevel] = []
    with _folder(out, settings, overwrite) as folder:
        if folder is not None:
            done = folder.levels(plan)
        remaining = plan[len(done) :]
        total = sum(len(level.sigmas) for level in remaining)
        with tqdm(total=total, unit="step", desc="synthesizing", delay=2, disable=not progress) as bar:
            for level in remaining:
                before = done[-1].image if done else layout
                made = _level(
                    level, scaled, before, layout, kept, serving, sampler, tile, symmetry, seed, tolerance, engine,
                    memory_limit, device, bar,
                )  # fmt: skip
                done.append(made)
                if folder is not None:
                    folder.save(made)
                if callback is not None:
                    callback(made)
        origin = _origin(done[-1], bank, serving, tile, memory_limit, device) if source_map else None
        if folder is not None:
            folder.finish(done, origin, _sides(bank, max))
    return Synthesis(done[-1].image, tuple(done), origin)


# The plan.


@dataclass(frozen=True)
class _Planned:
    """What a level is to do. sigmas: without the clean end. part: of a side of the exemplars; canvas: its sides."""

    index: int
    of: int
    part: int
    canvas: tuple[int, int]
    patch_size: int
    sigmas: tuple[float, ...]


def _plan(
    bank: Bank,
    size: tuple[int, int],
    levels: int | None,
    patch_size: int | Sequence[int],
    steps: int | Sequence[int],
    strength: float | Sequence[float],
    sigma_max: float,
    sigma_min: float,
    tile: bool,
    started: bool,
) -> list[_Planned]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"size: got {size!r}, takes (height, width)") from None
    canvas = checks.integer("size", height, at_least=1), checks.integer("size", width, at_least=1)
    own = _sides(bank, min)
    listed = [patch_size] if isinstance(patch_size, int) else list(patch_size)
    largest = max(checks.odd("patch_size", k) for k in listed)
    if levels is None:
        smallest = min(*own, *canvas)
        levels = max(1, int(math.log2(max(1.0, smallest / (COARSEST * largest)))) + 1)
        if tile:
            while levels > 1 and any(side % 2 ** (levels - 1) for side in canvas):
                levels -= 1
    levels = checks.integer("levels", levels, at_least=1, at_most=16)
    factor = 2 ** (levels - 1)
    if tile and any(side % factor for side in canvas):
        raise ValueError(f"size: got {height} x {width}, with tile and {levels} levels takes multiples of {factor}")
    sizes = _each("patch_size", patch_size, levels)
    counts = [checks.integer("steps", count, at_least=1) for count in _each("steps", steps, levels)]
    begins = [checks.number("strength", value) for value in _each("strength", strength, levels)]
    if not isinstance(strength, Sequence) and not started:
        begins[0] = checks.number("sigma_max", sigma_max)
    sigma_min = checks.number("sigma_min", sigma_min)
    plan = []
    for index, (k, count, begin) in enumerate(zip(sizes, counts, begins, strict=True)):
        part = 2 ** (levels - 1 - index)
        there, here = _scaled(own, part), _scaled(canvas, part)
        for name, sides in (("the exemplar", there), ("the canvas", here)):
            if k > min(sides):
                raise ValueError(
                    f"levels: at level {index + 1} of {levels} {name} of {sides[0]} x {sides[1]} is smaller than the "
                    f"patch size {k}"
                )
        if not 0 < sigma_min < begin < math.inf:
            raise ValueError(f"strength, sigma_max: got {begin}, takes numbers above sigma_min = {sigma_min}")
        # One step denoises at the level where it begins.
        sigmas = karras(count, sigma_min, begin).sigmas[:-1].tolist() if count > 1 else [begin]
        plan.append(_Planned(index, levels, part, here, k, tuple(sigmas)))
    return plan


def _each(name: str, value: Any, levels: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name}: got {len(value)}, takes one or {levels}, one for each level")
    return list(value)


# What is given.

Bank = PatchBank | MixedBank


def _bank(source: Any, value_range: str | tuple[float, float] | None = None) -> Bank:
    if isinstance(source, (PatchBank, MixedBank)):
        return source
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim == 3:
        return PatchBank(source[None], value_range=value_range)
    return open_bank(source, value_range=value_range)


def _sides(bank: Bank, extreme: Callable[[Iterable[int]], int]) -> tuple[int, int]:
    """The least or largest height and width of the exemplars."""
    sizes = bank.sizes if isinstance(bank, MixedBank) else [bank.shape[1:]]
    return extreme(size[0] for size in sizes), extreme(size[1] for size in sizes)


def _scaled(size: tuple[int, int], part: int) -> tuple[int, int]:
    """(height, width) where each is so many times smaller."""
    return max(1, round(size[0] / part)), max(1, round(size[1] / part))


def _exemplars(bank: Bank) -> list[Tensor]:
    """[C, h, w] float32 each."""
    if isinstance(bank, MixedBank):
        return [bank.image(number).cpu() for number in range(len(bank))]
    return list(bank.chunk(0, len(bank)).cpu())


def _layout(start: Any, bank: Bank) -> Tensor | None:
    """[C, h, w] float32 to begin with."""
    if start is None:
        return None
    if isinstance(start, str) and start == "source":
        return _exemplars(bank)[0]
    opened = _bank(start, bank.value_range)
    if opened.shape[0] != bank.shape[0]:
        raise ValueError(f"start: has {opened.shape[0]} channels, the exemplars have {bank.shape[0]}")
    return _exemplars(opened)[0]


def _map(name: str, value: Any, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    found = torch.as_tensor(value)
    if found.ndim != 2 or not found.numel() or found.is_floating_point():
        raise ValueError(f"{name}: got {found.dtype} {list(found.shape)}, takes whole numbers [height, width]")
    return found.to("cpu", dtype)


def _labels(labels: Any, bank: Bank) -> int | Tensor | None:
    """A label of the bank, a map of them, or None."""
    if labels is None:
        return None
    if isinstance(labels, (int, str)):
        return bank.label_ids([labels])[0]
    found = _map("labels", labels, torch.int64)
    assert found is not None
    bank.label_ids(found.unique().tolist())
    return found


def _digest(value: Any) -> Any:
    """What a setting is told by in a record."""
    return files.sha256(value.numpy().tobytes() + str(list(value.shape)).encode()) if torch.is_tensor(value) else value


class _Pyramid:
    """The exemplars at every scale, in their own range."""

    def __init__(self, bank: Bank):
        self.bank = bank
        self.images = _exemplars(bank)
        self.low, self.high = (
            extreme(getattr(image, extreme.__name__)().item() for image in self.images) for extreme in (min, max)
        )

    def at(self, part: int) -> Bank:
        """The exemplars, each so many times smaller."""
        if part == 1:
            return self.bank
        images = [self.shrunk(image[None], _scaled((image.shape[1], image.shape[2]), part))[0] for image in self.images]
        with_names = self.bank.class_names if self.bank.labels is not None else None
        options = (self.bank.labels, with_names, self.bank.value_range)
        return (
            MixedBank(images, *options)
            if isinstance(self.bank, MixedBank)
            else PatchBank(torch.stack(images), *options)
        )

    def shrunk(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, C, *size] by a bicubic filter as wide as the scale asks for, without its overshoot."""
        small = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        return small.clamp(self.low, self.high)


# One level.


def _level(
    level: _Planned,
    scaled: _Pyramid,
    before: Tensor | None,
    layout: Tensor | None,
    kept: Tensor | None,
    serving: int | Tensor | None,
    sampler: str,
    tile: bool,
    symmetry: str | None,
    seed: int,
    tolerance: float | None,
    engine: str,
    memory_limit: int,
    device: torch.device,
    bar: tqdm,
) -> SynthesisLevel:
    began, bank = time.perf_counter(), scaled.at(level.part)
    padding_mode = "circular" if tile else "zeros"
    generator = image_generator(seed, level.index)
    shape = (1, bank.shape[0], *level.canvas)

    def noise() -> Tensor:
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, torch.float32)

    z = level.sigmas[0] * noise()
    if before is not None:
        z = z + _resized(before, level.canvas, tile).to(device)
    still = None if kept is None or layout is None else scaled.shrunk(layout[None], level.canvas).to(device)
    where = None if kept is None else _nearest(kept, level.canvas).to(device)
    place = _nearest(serving, level.canvas).to(device) if torch.is_tensor(serving) else None
    errors, names = [0.0], set()

    with TemporaryDirectory() if tolerance is not None else nullcontext() as folder:
        index = None
        if tolerance is not None:
            assert isinstance(bank, PatchBank)
            path = Path(str(folder)) / "index"
            index = PatchIndex.build(bank, level.patch_size, path, padding_mode, progress=False)
        machine: ScoreMachine = EquivariantLocalScore(
            bank, level.patch_size, padding_mode, engine, memory_limit, index, tolerance=tolerance, seed=seed
        )

        if symmetry is not None:
            machine = Symmetric(machine, symmetry)

        def of_label(z: Tensor, sigma: float, label: int | None) -> Tensor:
            found = machine.estimate(z, sigma, label, ess=False)
            errors.append(found.stderr.square().mean().sqrt().item())
            names.update(found.engine.split(" and "))
            return found.mean

        def denoise(z: Tensor, sigma: float) -> Tensor:
            if place is None:
                x0 = of_label(z, sigma, serving if isinstance(serving, int) else None)
            else:
                x0 = torch.zeros_like(z)
                for label in place.unique().tolist():
                    x0 = torch.where(place == label, of_label(z, sigma, label), x0)
            return x0 if where is None or still is None else torch.where(where, still, x0)

        def on_step(index: int, z: Tensor, x0: Tensor) -> None:
            bar.update()

        image = SAMPLERS[sampler](denoise, z, [*level.sigmas, 0.0], noise, on_step)[0].cpu()
    seconds, served = time.perf_counter() - began, " and ".join(sorted(names))
    return SynthesisLevel(
        level.index, level.of, level.patch_size, level.sigmas, image, max(errors), served, seconds
    )  # fmt: skip


def _origin(
    level: SynthesisLevel,
    bank: Bank,
    serving: int | Tensor | None,
    tile: bool,
    memory_limit: int,
    device: torch.device,
) -> Tensor:
    """[3, H, W] int64: the window nearest to each pixel's own, among those that serve there."""
    machine = EquivariantLocalScore(bank, level.patch_size, "circular" if tile else "zeros", memory_limit=memory_limit)
    z = level.image[None].to(device)

    def of_label(label: int | None) -> Tensor:
        found = explain(machine, z, level.sigmas[-1], label, top=1)
        return torch.stack([found.image[0, 0], found.row[0, 0], found.col[0, 0]]).cpu()

    if not torch.is_tensor(serving):
        return of_label(serving)
    place = _nearest(serving, (level.image.shape[1], level.image.shape[2]))[0]
    origin = torch.zeros(3, *level.image.shape[1:], dtype=torch.int64)
    for label in place.unique().tolist():
        origin = torch.where(place == label, of_label(label), origin)
    return origin


def _resized(image: Tensor, size: tuple[int, int], tile: bool) -> Tensor:
    """[1, C, *size] of [C, h, w], bicubic; an image that wraps around is enlarged as such."""
    x = image[None]
    if tile and (size[0], size[1]) == (2 * image.shape[1], 2 * image.shape[2]):
        margin = min(4, *image.shape[1:])
        wide = F.interpolate(F.pad(x, (margin,) * 4, mode="circular"), scale_factor=2, mode="bicubic")
        return wide[:, :, 2 * margin : -2 * margin, 2 * margin : -2 * margin]
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)


def _nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, 1, *size] of a map [h, w], its nearest entries."""
    rows, cols = (
        ((torch.arange(side) + 0.5) * length / side).long() for side, length in zip(size, values.shape, strict=True)
    )
    return values[rows][:, cols][None, None]


# The folder.


class _Folder:
    """synthesis.json with the settings and the levels that are done, and level-1.npy and .png for each of them."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.record: list[dict[str, Any]] = []

    @property
    def json(self) -> Path:
        return self.path / "synthesis.json"

    def take_up(self, overwrite: bool) -> None:
        """Reads what an earlier call left, if it had the same settings."""
        if not self.json.exists():
            self.write()
            return
        try:
            found = files.unsealed(files.read_record(self.json, FORMAT, VERSION))
            differs = [name for name in self.settings if found["settings"].get(name) != self.settings[name]]
            if differs:
                raise ValueError(f"holds a synthesis with other {', '.join(differs)}")
            self.record = list(found["levels"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not overwrite:
                raise ValueError(f"{self.json}: {error}; choose another out, or overwrite") from None
            self.record = []
            self.write()

    def write(self) -> None:
        content = {"settings": self.settings, "levels": self.record}
        files.write_record(self.json, FORMAT, VERSION, content, seal=True)

    def levels(self, plan: list[_Planned]) -> list[SynthesisLevel]:
        """The levels that are there whole, coarsest first, up to the first that is not."""
        found: list[SynthesisLevel] = []
        for level, entry in zip(plan, self.record, strict=False):
            path = self.path / f"level-{level.index + 1}.npy"
            if not path.is_file() or files.sha256(path.read_bytes()) != entry["sha256"]:
                break
            image = torch.from_numpy(np.load(path, allow_pickle=False))
            found.append(
                SynthesisLevel(
                    level.index, level.of, level.patch_size, level.sigmas, image, entry["stderr"], entry["engine"],
                    entry["seconds"],
                )
            )  # fmt: skip
        self.record = self.record[: len(found)]
        return found

    def save(self, level: SynthesisLevel) -> None:
        content, name = _npy(level.image), f"level-{level.index + 1}"
        files.write_atomically(self.path / f"{name}.npy", content)
        files.write_atomically(self.path / f"{name}.png", png(to_pil(level.image)))
        self.record.append(
            {
                "sha256": files.sha256(content),
                "stderr": level.stderr,
                "engine": level.engine,
                "seconds": round(level.seconds, 3),
            }
        )
        self.write()

    def finish(self, levels: list[SynthesisLevel], origin: Tensor | None, own: tuple[int, int]) -> None:
        """Writes the image, and the map of its sources, exemplars of at most `own` high and wide."""
        files.write_atomically(self.path / "image.npy", _npy(levels[-1].image))
        files.write_atomically(self.path / "image.png", png(to_pil(levels[-1].image)))
        if origin is not None:
            files.write_atomically(self.path / "source.npy", _npy(origin))
            # Colours that differ from pixel to pixel of the exemplars: rows in red, columns in green, images in blue.
            largest = (int(origin[0].max()), own[0] - 1, own[1] - 1)
            image, row, col = (2 * part / max(1, most) - 1 for part, most in zip(origin, largest, strict=True))
            files.write_atomically(self.path / "source.png", png(to_pil(torch.stack([row, col, image]))))


@contextmanager
def _folder(out: str | Path | None, settings: dict[str, Any], overwrite: bool) -> Iterator[_Folder | None]:
    if out is None:
        yield None
        return
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: not a folder")
    path.mkdir(parents=True, exist_ok=True)
    with files.locked(path, f"{path}: another process is writing this folder; wait for it, or take another"):
        folder = _Folder(path, settings)
        folder.take_up(overwrite)
        yield folder


def _npy(image: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, image.numpy())
    return content.getvalue()
