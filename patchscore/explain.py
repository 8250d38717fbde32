"""Where a pixel comes from: the training windows that a score machine weighs most, at any pixel and noise level.

A machine's answer is a weighted mean over known windows, so it can be taken apart. The heaviest windows are the nearest
ones, whatever the noise level: they are searched for in float32, a chunk of the bank at a time, with some to spare, and
those found are weighed again in float64 against the exact total of all, also where the machine itself has an index and
looks at a share of the windows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import checks, plots
from .bank import PatchBank
from .denoiser import Labels, ScoreMachine, alike, check_labels, check_noisy, check_sigma
from .noise import get_schedule
from .pixels import to_values
from .posterior import PosteriorSum
from .sampling import Step, labels_in_turn, sample
from .windows import Axis, Competition, Group, rows_as_pixels, windows_as_rows

SPARE = 8
"""Windows found beyond those asked for, so that rounding in the search does not decide who is among them."""

BLOCK = 32
TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Explanation:
    """The T heaviest windows behind every pixel of B images, heaviest first.

    Where fewer than T windows compete, the remaining entries have image -1 and weight 0.

    Attributes:
        image: [B, T, H, W] int64, the training image of each window, by its number in the machine's bank.
        row: [B, T, H, W] int64, the row of the window's centre.
        col: [B, T, H, W] int64, its column.
        weight: [B, T, H, W] the posterior weight w_a; the weights of all windows of a pixel sum to 1.
        effective: [B, H, W] the effective sample size, (sum w)^2 / sum w^2.
        mean: [B, C, H, W] the denoised image D(z), the mean over all windows.
        z: [B, C, H, W] the noisy images.
        sigma: their noise level.
        patch_size: k at that level; None where whole images compete.
    """

    image: Tensor
    row: Tensor
    col: Tensor
    weight: Tensor
    effective: Tensor
    mean: Tensor
    z: Tensor
    sigma: float
    patch_size: int | None

    @property
    def share(self) -> Tensor:
        """[B, H, W], the share of the mass that the windows listed here carry together."""
        return self.weight.sum(1)

    def of(self, item: int) -> Explanation:
        """That of one image of the batch alone."""
        parts = ("image", "row", "col", "weight", "effective", "mean", "z")
        return replace(self, **{name: getattr(self, name)[item : item + 1] for name in parts})

    def owners(self) -> tuple[Tensor, Tensor]:
        """[B, H, W] each: the training image whose listed windows carry most of a pixel's mass, and how much."""
        same = self.image[:, :, None] == self.image[:, None]  # [B, T, T, H, W]
        mass = (self.weight[:, None] * same).sum(2)
        mass = torch.where(self.image < 0, -1.0, mass)
        share, heaviest = mass.max(1)
        return self.image.gather(1, heaviest[:, None])[:, 0], share


@dataclass(frozen=True)
class Walk:
    """One sample, explained on its way out of the noise.

    number: of the sample in its run;  label: its class, or None.
    levels: which steps of the walk are explained, counted from 0;  of: how many steps it has.
    steps: the explanation (B = 1) at each of those, most noise first.
    image: [C, H, W] the sample.
    apart: at each of those, the rms difference between what the machine made of the noise and the `mean` of all
        windows: rounding, or with an index the error of having looked at a share of them.
    """

    number: int
    label: int | str | None
    levels: tuple[int, ...]
    of: int
    steps: tuple[Explanation, ...]
    image: Tensor
    apart: tuple[float, ...]


def explain_samples(
    machine: ScoreMachine,
    images: Sequence[int],
    levels: Sequence[int] | None = None,
    top: int = 8,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    **settings: Any,
) -> list[Walk]:
    """Makes samples of a machine again, from their seed, and explains them on the way.

    The walk is the machine's own, with its index if it has one; every step is explained by all windows.

    Args:
        machine: the machine that made them.
        images: their numbers.
        levels: which steps to explain, 0 being the noisiest; None explains all.
        top: as in `explain`.
        device: where to compute.
        settings: what `sample` was given: steps, schedule, sampler, labels, seed.

    Raises:
        ValueError: a step that the schedule has not.
    """
    schedule = get_schedule(settings.get("schedule", "cosine"), settings.get("steps", 20))
    wanted = range(len(schedule)) if levels is None else sorted(set(levels))
    chosen = tuple(checks.integer("levels", level, at_least=0, at_most=len(schedule) - 1) for level in wanted)
    walks = []
    with tqdm(total=len(images) * len(chosen), unit="step", desc="explaining", delay=2, disable=not progress) as bar:
        for number in images:
            label = (labels_in_turn(settings.get("labels"), range(number, number + 1)) or [None])[0]
            explained: list[Explanation] = []
            apart: list[float] = []

            def on_step(
                step: Step,
                label: Any = label,
                explained: list[Explanation] = explained,
                apart: list[float] = apart,
            ) -> None:
                if step.index in chosen:
                    found = explain(machine, step.x / step.alpha, step.sigma / step.alpha, label, top)
                    explained.append(found)
                    apart.append(float((step.x0 - found.mean).double().square().mean().sqrt()))
                    bar.update()

            final = sample(machine, n=1, first=number, device=device, callback=on_step, progress=False, **settings)
            walks.append(Walk(number, label, chosen, len(schedule), tuple(explained), final[0], tuple(apart)))
    return walks


@dataclass(frozen=True)
class Nearness:
    """How near samples come to single training images.

    image: [n] the nearest training image of each, by its number in the bank.
    rms: [n] root mean squared difference of their pixels, which lie in [-1, 1].
    """

    image: Tensor
    rms: Tensor


def mosaic_rows(walk: Walk, bank: PatchBank, levels: int = 4, contributors: int = 10) -> list[plots.MosaicRow]:
    """What `plots.mosaic` draws of a walk, at so many of its explained steps, evenly spaced up to the last.

    The first, where the noise hides everything, is shown only if all are.
    """
    last, count = len(walk.steps) - 1, min(levels, len(walk.steps))
    shown = range(last + 1) if count > last else [round((i + 1) * last / count) for i in range(count)]
    return [_mosaic_row(walk.steps[i], bank, contributors) for i in shown]


def _mosaic_row(step: Explanation, bank: PatchBank, contributors: int) -> plots.MosaicRow:
    owners, shares = (part[0].cpu() for part in step.owners())
    numbers, position = owners.unique(return_inverse=True)
    mass = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, position.flatten(), shares.flatten())
    ranked = mass.argsort(descending=True, stable=True)
    rank = ranked.argsort()[position]

    # The map: a source's colour, paler where it carries less of the mass.
    colours = np.array([plots.source_colour(r) for r in range(len(numbers))])
    strength = shares.numpy()[..., None] ** 0.7
    painted = strength * colours[rank.numpy()] + (1 - strength) * 226
    sources = Image.fromarray(painted.round().astype(np.uint8))

    # The collage: the centre of every pixel's heaviest window.
    image, row, col = (part[0, 0].cpu() for part in (step.image, step.row, step.col))
    used = image.unique()
    train = _images(bank, used, torch.device("cpu"))
    collage = train[torch.searchsorted(used, image), :, row, col].movedim(-1, 0)

    # The sources, with the places marked whose windows own a pixel.
    listed = []
    for r, number in enumerate(numbers[ranked[:contributors]].tolist()):
        places = torch.zeros(image.shape, dtype=torch.bool)
        own = (owners == number) & (image == number)
        places[row[own], col[own]] = True
        pixels = np.asarray(plots.to_pil(_images(bank, torch.tensor([number]), torch.device("cpu"))[0]).convert("RGB"))
        marked = np.where(places.numpy()[..., None], 0.35 * pixels + 0.65 * colours[r], pixels)
        listed.append((Image.fromarray(marked.round().astype(np.uint8)), plots.source_colour(r)))
    windows = f"{step.patch_size} x {step.patch_size} windows" if step.patch_size else "whole images"
    title = f"noise {step.sigma:.2g}, {windows}: {len(numbers)} training images own a pixel"
    spread = max(1.0, 2 * step.z.std().item())
    return plots.MosaicRow(title, (step.z / spread)[0], step.mean[0], sources, collage, listed)


@torch.no_grad()
def nearest_images(images: Tensor, bank: PatchBank, other_than: Sequence[int] | None = None) -> Nearness:
    """The training image nearest to each of some images [n, C, H, W]: a copy has rms 0.

    Args:
        images: in [-1, 1].
        bank: the training images.
        other_than: for each image, a training image that does not count, such as itself.
    """
    images = check_noisy(images, bank.shape, "images")
    scores = torch.cat([_whole_image_scores(images, train) for _, train in _chunks(bank, images, 1)], 1)
    if other_than is not None:
        scores[torch.arange(len(images)), torch.as_tensor(other_than)] = -torch.inf
    # Some to spare, as scores are float32; the distances themselves are taken in float64.
    spare = min(1 + SPARE, len(bank) - (other_than is not None))
    near = scores.topk(spare, 1).indices
    train = torch.stack([_images(bank, row, images.device) for row in near])
    least, at = (train - images.double()[:, None]).square().mean((2, 3, 4)).sqrt().min(1)
    return Nearness(near.gather(1, at[:, None])[:, 0], least)


def usual_nearness(bank: PatchBank, n: int = 200) -> Nearness:
    """The same for up to n training images and their nearest others: the scale that a sample's distance is read on."""
    numbers = sorted({round(i * (len(bank) - 1) / max(1, n - 1)) for i in range(n)})
    return nearest_images(_images(bank, torch.tensor(numbers), torch.device("cpu")), bank, numbers)


def count_sources(explanation: Explanation) -> tuple[Tensor, Tensor]:
    """[B] each: how many training images own a pixel, and their effective number 1 / sum (share of pixels)^2."""
    owners, _ = explanation.owners()
    counts = [row.unique(return_counts=True)[1].double() for row in owners.flatten(1)]
    distinct = torch.tensor([len(count) for count in counts])
    effective = torch.stack([1 / (count / count.sum()).square().sum() for count in counts])
    return distinct, effective


def explain(
    machine: ScoreMachine,
    z: Tensor,
    sigma: float,
    labels: Labels = None,
    top: int = 8,
    pixel: tuple[int, int] | None = None,
) -> Explanation:
    """The `top` heaviest training windows of every pixel, with their exact weights.

    Every window that competes is visited, also where the machine has an index to look at fewer. Where windows are
    equally near, which of them are listed is arbitrary; their weights are the same.

    Args:
        machine: IdealScore, LocalScore or EquivariantLocalScore.
        z: [B, C, H, W] noisy images z = x_0 + sigma eps.
        sigma: noise level.
        labels: as in `denoise`.
        top: how many windows a pixel.
        pixel: (row, column) of one pixel to explain, which is much quicker; None explains all. All of the result but
            `z` then has H = W = 1.

    Raises:
        ValueError, TypeError: as of `denoise`; a pixel outside the image, a machine without windows.
    """
    if not isinstance(machine, ScoreMachine):
        raise TypeError(f"machine: got {type(machine).__name__}, takes one that sums over training windows")
    z = check_noisy(z, machine.shape)
    level = checks.number("sigma", sigma)
    check_sigma(level, len(z))
    top = checks.integer("top", top, at_least=1)
    place = None if pixel is None else _place(pixel, machine.shape)
    k = machine.patch_size_at(level)
    competition = _narrowed(machine.competition(k), place)

    height, width = z.shape[2:]
    found = torch.full((3, len(z), top, height, width), -1, device=z.device)
    weight = z.new_zeros((len(z), top, height, width), dtype=torch.float64)
    effective, mean = z.new_empty((len(z), height, width), dtype=torch.float64), torch.empty_like(z)
    levels = torch.full((len(z),), level, dtype=torch.float64)
    for label, items in alike(check_labels(labels, machine.bank, len(z))):
        bank = machine.bank.of_class(label)
        (total,) = machine.exact_sums(z[items], levels[items], bank, [competition])
        mean[items] = total.mean.to(z.dtype)
        effective[items] = total.ess[:, 0].double().expand(-1, height, width)
        near = nearest_windows(z[items], bank, competition, top + SPARE, machine.memory_limit)
        near, weights = _weighed(z[items], level, bank, competition, near, total)
        near, weights = near[:, :, :top], weights[:, :top]
        if bank.indices is not None:
            # A selection counts its own images; the reader knows the bank's.
            original = _within(machine.bank, bank).to(z.device)
            near[0] = torch.where(near[0] < 0, near[0], original[near[0].clamp(min=0)])
        found[:, items, : near.shape[2]] = near
        weight[items, : near.shape[2]] = weights
    if place is not None:
        rows, cols = slice(place[0], place[0] + 1), slice(place[1], place[1] + 1)
        found, weight, effective, mean = (part[..., rows, cols] for part in (found, weight, effective, mean))
    image, row, col = found
    return Explanation(image, row, col, weight, effective, mean, z, level, k)


def nearest_windows(z: Tensor, bank: PatchBank, competition: Competition, count: int, memory_limit: int) -> Tensor:
    """The `count` competing windows nearest to each pixel's own: [3 (image, row, col), B, T, H, W] int64.

    T is at most `count`; pixels with fewer competitors, or in no group, are filled up with -1. The smallest |q - p|^2
    is the largest q.p - |p|^2 / 2. In float32, so windows whose distances differ by rounding may change places.
    """
    batch, _, height, width = z.shape
    if competition.patch_size is None:
        score = torch.cat([_whole_image_scores(z, train) for _, train in _chunks(bank, z, 1)], 1)
        image = score.topk(min(count, len(bank)), 1).indices[:, :, None, None].expand(-1, -1, height, width)
        row = torch.arange(height, device=z.device)[:, None].expand_as(image)
        col = torch.arange(width, device=z.device).expand_as(image)
        return torch.stack([image, row, col])
    found = torch.full((3, batch, count, height, width), -1, device=z.device)
    for group in competition.groups:
        for rows in _row_bands(group, z, competition.patch_size, memory_limit):
            band = Group(rows, group.cols)
            best = _nearest_in_group(z, bank, band, competition, count)
            spot = (..., slice(rows.queries.start, rows.queries.stop), _span(group.cols.queries))
            found[spot] = torch.stack([rows_as_pixels(part, batch, band) for part in best])
    return found


def _nearest_in_group(z: Tensor, bank: PatchBank, group: Group, competition: Competition, count: int) -> list[Tensor]:
    """Image, row and column [L, Q, count] of the nearest windows of a group's pixels, by a running selection."""
    k = competition.patch_size or 0
    padding = (k // 2,) * 4
    noisy = F.pad(z.float(), padding, mode="circular" if competition.padding_mode == "circular" else "constant")
    q = windows_as_rows(noisy, k, group.rows.queries, group.cols.queries, group)  # [L, Q, d]
    best = q.new_full((*q.shape[:2], count), -torch.inf)
    which = torch.full(best.shape, -1, device=z.device)
    windows = group.windows_per_image

    per_image = q.shape[0] * windows * (q.shape[2] + q.shape[1]) * 4
    for start, train in _chunks(bank, z, per_image):
        p = windows_as_rows(F.pad(train, padding), k, group.rows.centres, group.cols.centres, group)  # [L, M, d]
        score = torch.baddbmm(p.square().sum(-1)[:, None] * -0.5, q, p.mT)  # [L, Q, M]
        values, places = _largest(score, count)
        best, order = torch.cat([best, values], -1).topk(count, -1)
        which = torch.cat([which, places + start * windows], -1).gather(-1, order)

    # A window's number counts images, then the free coordinates; a locked coordinate is the query's own.
    missing = which < 0
    image, inside = which.div(windows, rounding_mode="floor"), which.remainder(windows)
    row, col = _coordinates(inside, group, z)
    return [torch.where(missing, -1, part) for part in (image, row, col)]


def _largest(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk along the last axis. The winners lie in the `count` blocks with the largest maxima: most is never sorted."""
    length = score.shape[-1]
    count = min(count, length)
    if length <= 4 * BLOCK * count:
        return score.topk(count, -1)
    padded = F.pad(score, (0, -length % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK))
    blocks = padded.amax(-1).topk(count, -1).indices  # [L, Q, count]
    kept = padded.gather(-2, blocks[..., None].expand(*blocks.shape, BLOCK))  # [L, Q, count, BLOCK]
    values, places = kept.flatten(-2).topk(count, -1)
    block = blocks.gather(-1, places.div(BLOCK, rounding_mode="floor"))
    return values, block * BLOCK + places.remainder(BLOCK)


def _coordinates(inside: Tensor, group: Group, z: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of windows [L, Q, T] by their number within an image."""
    rows, cols = group.rows, group.cols
    across = 1 if cols.locked else len(cols.centres)
    locked_rows = torch.arange(rows.queries.start, rows.queries.stop, device=z.device)
    locked_cols = torch.arange(cols.queries.start, cols.queries.stop, device=z.device)
    n_rows, n_cols = (len(locked_rows) if rows.locked else 1), (len(locked_cols) if cols.locked else 1)
    if rows.locked:
        row = locked_rows.repeat_interleave(n_cols)[:, None, None].expand_as(inside)
    else:
        row = rows.centres.start + inside.div(across, rounding_mode="floor")
    if cols.locked:
        col = locked_cols.repeat(n_rows)[:, None, None].expand_as(inside)
    else:
        col = cols.centres.start + inside.remainder(across)
    return row, col


def _weighed(
    z: Tensor, sigma: float, bank: PatchBank, competition: Competition, near: Tensor, total: PosteriorSum
) -> tuple[Tensor, Tensor]:
    """The windows found, heaviest first by their float64 distances, and their weights w = e^(l - m) / s."""
    log_total = (total.m + total.s.log()).double()  # [B, 1, H, W]
    distance2 = torch.stack([_distance2(z, bank, competition, near[:, :, t]) for t in range(near.shape[2])], 1)
    distance2, order = distance2.sort(dim=1, stable=True)
    near = near.gather(2, order.expand(3, *order.shape))
    weight = (-distance2 / (2 * sigma**2) - log_total).exp()
    return near, weight.clamp(max=1)


def _distance2(z: Tensor, bank: PatchBank, competition: Competition, near: Tensor) -> Tensor:
    """[B, H, W] squared distance between each pixel's window and one training window [3, B, H, W]; inf where none."""
    k, (image, row, col) = competition.patch_size, near
    known = image >= 0
    used, position = image.clamp(min=0).unique(return_inverse=True)
    train = _images(bank, used, z.device)
    if k is None:
        whole = (z.double() - train[position[:, 0, 0]]).square().sum((1, 2, 3))
        return whole[:, None, None].expand(image.shape)
    mode = "circular" if competition.padding_mode == "circular" else "constant"
    padding = (k // 2,) * 4
    noisy, train = F.pad(z.double(), padding, mode=mode), F.pad(train, padding)
    distance2 = torch.zeros(image.shape, dtype=torch.float64, device=z.device)
    height, width = z.shape[2:]
    row, col = row.clamp(min=0), col.clamp(min=0)
    for i in range(k):
        for j in range(k):
            theirs = train[position, :, row + i, col + j].movedim(-1, 1)  # [B, C, H, W]
            distance2 += (noisy[:, :, i : i + height, j : j + width] - theirs).square().sum(1)
    return torch.where(known, distance2, torch.inf)


def _images(bank: PatchBank, numbers: Tensor, device: torch.device) -> Tensor:
    """[n, C, H, W] float64: those images of a bank or a selection, by their number in it."""
    numbers = numbers.cpu()
    raw = bank.images[numbers if bank.indices is None else bank.indices[numbers]].to(device)
    return to_values(raw, torch.float64)


def _within(bank: PatchBank, selection: PatchBank) -> Tensor:
    """The number in `bank` of every image of a selection from it."""
    assert selection.indices is not None
    return selection.indices if bank.indices is None else torch.searchsorted(bank.indices, selection.indices)


def _whole_image_scores(z: Tensor, train: Tensor) -> Tensor:
    p = train.flatten(1)
    return z.float().flatten(1) @ p.T - 0.5 * p.square().sum(1)


def _chunks(bank: PatchBank, z: Tensor, bytes_per_image: int) -> Iterator[tuple[int, Tensor]]:
    """The bank as float32 on z's device, so many images at a time that their tile stays small."""
    step = max(1, min(TILE_BYTES // max(bytes_per_image, 1), (64 << 20) // (4 * z[0].numel())))
    for start in range(0, len(bank), step):
        yield start, bank.chunk(start, start + step, torch.float32, z.device)


def _row_bands(group: Group, z: Tensor, k: int, memory_limit: int) -> Iterator[Axis]:
    """The group's query rows in bands, so that the windows of one band and its tile with one training image fit."""
    row_bytes = 4 * len(z) * len(group.cols.queries) * (group.windows_per_image + z.shape[1] * k * k)
    step = max(1, min(4 * TILE_BYTES, memory_limit) // row_bytes)
    for start in range(0, len(group.rows.queries), step):
        yield Axis(group.rows.queries[start : start + step], group.rows.windows)


def _narrowed(competition: Competition, place: tuple[int, int] | None) -> Competition:
    """The same competition for one pixel alone."""
    if place is None or competition.patch_size is None:
        return competition
    row, col = place
    groups = tuple(
        Group(Axis(range(row, row + 1), group.rows.windows), Axis(range(col, col + 1), group.cols.windows))
        for group in competition.groups
        if row in group.rows.queries and col in group.cols.queries
    )
    return Competition(competition.patch_size, competition.padding_mode, groups)


def _place(pixel: tuple[int, int], shape: tuple[int, int, int]) -> tuple[int, int]:
    try:
        row, col = pixel
    except (TypeError, ValueError):
        raise TypeError(f"pixel: got {pixel!r}, takes (row, column)") from None
    return (
        checks.integer("pixel row", row, at_least=0, at_most=shape[1] - 1),
        checks.integer("pixel column", col, at_least=0, at_most=shape[2] - 1),
    )


def _span(coordinates: range) -> slice:
    return slice(coordinates.start, coordinates.stop)
