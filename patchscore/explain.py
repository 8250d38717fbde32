"""Where a pixel comes from: the training windows that a score machine weighs most, at any pixel and noise level.

A machine's answer is a weighted mean over known windows, so it can be decomposed. The heaviest windows are the nearest
ones, whatever the noise level: those that the search in nearest.py finds are weighed in float64 against the exact total
of all, also where the machine itself has an index and evaluates only part of the windows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import canvas, checks
from .bank import PatchBank
from .denoiser import Labels, ScoreMachine, alike, check_noisy, check_sigma
from .distributed import Sharded
from .machines import EquivariantLocalScore
from .mixed import MixedBank
from .nearest import SPARE, images_of, nearest_windows
from .noise import get_schedule
from .posterior import PosteriorSum
from .receptive import ReceptiveFields, receptive_fields
from .sampling import Step, labels_in_turn, sample
from .windows import Axis, Competition, Group, span


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

    def __repr__(self) -> str:
        """What was explained and how much of it, in a line."""
        batch, top, height, width = self.image.shape
        windows = f"{top} windows for each of {height} x {width} pixels of {batch}"
        size = "whole images" if self.patch_size is None else f"patch size {self.patch_size}"
        return f"Explanation({windows}, sigma {self.sigma:.3g}, {size}, {self.share.mean().item():.1%} of the weight)"

    @property
    def share(self) -> Tensor:
        """[B, H, W], the fraction of the posterior mass that the windows listed here carry."""
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
class ExplainedSample:
    """One sample, explained along its trajectory.

    number: of the sample in its run;  label: its class, or None.
    levels: which steps of the trajectory are explained, counted from 0;  of: how many steps it has.
    steps: the explanation (B = 1) at each of those, most noise first.
    image: [C, H, W] the sample.
    apart: at each of those, the rms difference between the machine's denoised image and the `mean` of all windows:
        rounding error, or the sampling error of `pruned`.
    fields: at each of those, the input pixels that output pixels depend on; none where they were not asked for.
    """

    number: int
    label: int | str | None
    levels: tuple[int, ...]
    of: int
    steps: tuple[Explanation, ...]
    image: Tensor
    apart: tuple[float, ...]
    fields: tuple[ReceptiveFields, ...] = ()


def explain_samples(
    machine: ScoreMachine,
    images: Sequence[int],
    levels: Sequence[int] | None = None,
    top: int = 8,
    *,
    fields: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
    **settings: Any,
) -> list[ExplainedSample]:
    """Repeats samples of a machine from their seed, and explains the steps of their trajectories.

    A trajectory is the machine's own, with its index if it has one; every step is explained by all windows.

    Args:
        machine: the machine that made them.
        images: their numbers.
        levels: which steps to explain, 0 being the noisiest; None explains all.
        top: as in `explain`.
        fields: whether to find the `receptive_fields` of every step too, which takes several denoisings more.
        device: where to compute.
        settings: what `sample` was given: steps, schedule, sampler, labels, seed.

    Raises:
        ValueError: a step that the schedule does not have.
    """
    schedule = get_schedule(settings.get("schedule", "cosine"), settings.get("steps", 20))
    wanted = range(len(schedule)) if levels is None else sorted(set(levels))
    chosen = tuple(checks.integer("levels", level, at_least=0, at_most=len(schedule) - 1) for level in wanted)
    samples = []
    with tqdm(total=len(images) * len(chosen), unit="step", desc="explaining", delay=2, disable=not progress) as bar:
        for number in images:
            label = (labels_in_turn(settings.get("labels"), range(number, number + 1)) or [None])[0]
            explained: list[Explanation] = []
            apart: list[float] = []
            receptive: list[ReceptiveFields] = []

            def on_step(
                step: Step,
                label: Any = label,
                explained: list[Explanation] = explained,
                apart: list[float] = apart,
                receptive: list[ReceptiveFields] = receptive,
            ) -> None:
                if step.index in chosen:
                    found = explain(machine, step.x / step.alpha, step.sigma / step.alpha, label, top)
                    if fields:
                        receptive.append(receptive_fields(machine.exactly(), found.z, found.sigma, label))
                    explained.append(found)
                    apart.append(float((step.x0 - found.mean).double().square().mean().sqrt()))
                    bar.update()

            final = sample(machine, n=1, first=number, device=device, callback=on_step, progress=False, **settings)
            steps = tuple(explained)
            samples.append(
                ExplainedSample(
                    number, label, chosen, len(schedule), steps, final[0], tuple(apart), fields=tuple(receptive)
                )
            )
    return samples


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
        machine: IdealScore, LocalScore or EquivariantLocalScore. Over a MixedBank images have the numbers they have
            there.
        z: [B, C, H, W] noisy images z = x_0 + sigma eps, of every size that the machine takes.
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
    z = check_noisy(z, machine.shape, any_size=machine.any_size, who=type(machine).__name__)
    level = checks.number("sigma", sigma)
    check_sigma(level, len(z))
    top = checks.integer("top", top, at_least=1)
    place = None if pixel is None else _place(pixel, (z.shape[2], z.shape[3]))
    k, bank = machine.patch_size_at(level), machine.bank
    classes = machine.label_ids(labels, len(z))
    if isinstance(bank, MixedBank):
        found = _of_several(machine, bank, z, level, classes, top, k, place)
    else:
        found = _of_all(machine, z, level, classes, top, k, place)
    if place is not None:
        found = found.at(*place)
    image, row, col = found.windows
    return Explanation(image, row, col, found.weight, found.effective, found.mean, z, level, k)


@dataclass(frozen=True)
class _Found:
    """The windows [3, B, T, H, W] with their weights, and the sums that normalise these.

    weight: [B, T, H, W]; effective: [B, H, W]; mean: [B, C, H, W]; evidence: [B, H, W] ln of the sum of all weights.
    """

    windows: Tensor
    weight: Tensor
    effective: Tensor
    mean: Tensor
    evidence: Tensor

    @classmethod
    def nothing(cls, z: Tensor, top: int) -> _Found:
        batch, _, height, width = z.shape
        windows = torch.full((3, batch, top, height, width), -1, device=z.device)
        weight = z.new_zeros((batch, top, height, width), dtype=torch.float64)
        effective = z.new_zeros((batch, height, width), dtype=torch.float64)
        return cls(windows, weight, effective, torch.zeros_like(z), torch.full_like(effective, -torch.inf))

    def at(self, row: int, col: int) -> _Found:
        """Of one pixel alone."""
        place = (..., slice(row, row + 1), slice(col, col + 1))
        return _Found(*(getattr(self, field.name)[place] for field in fields(self)))

    def of(self, items: Any) -> _Found:
        """Of some items, as views where `items` is a slice."""
        rest = (self.weight, self.effective, self.mean, self.evidence)
        return _Found(self.windows[:, items], *(part[items] for part in rest))


def _of_all(
    machine: ScoreMachine,
    z: Tensor,
    level: float,
    classes: Sequence[int | None],
    top: int,
    k: int | None,
    place: tuple[int, int] | None,
) -> _Found:
    """The heaviest windows of images of one size."""
    found = _Found.nothing(z, top)
    for label, items in alike(list(classes)):
        some = z[items]
        n, own = len(some), _Found.nothing(some, top)
        for part in _parts(machine, some, k, place):
            near, weights, total = _heaviest(machine, part.z, level, label, part.competition, top)
            ess, evidence = (
                x[:, 0].double().expand(-1, *part.z.shape[2:]) for x in (total.ess, total.m + total.s.log())
            )
            listed = slice(0, near.shape[2])
            for at, ((rows, cols), (to_rows, to_cols)) in enumerate(part.blocks):
                batch = slice(at * n, (at + 1) * n)
                own.windows[:, :, listed, to_rows, to_cols] = near[:, batch, :, rows, cols]
                own.weight[:, listed, to_rows, to_cols] = weights[batch, :, rows, cols]
                own.mean[:, :, to_rows, to_cols] = total.mean[batch, :, rows, cols].to(z.dtype)
                own.effective[:, to_rows, to_cols] = ess[batch, rows, cols]
                own.evidence[:, to_rows, to_cols] = evidence[batch, rows, cols]
        found.windows[:, items] = own.windows
        for name in ("weight", "effective", "mean", "evidence"):
            getattr(found, name)[items] = getattr(own, name)
    return found


def _of_several(
    machine: ScoreMachine,
    bank: MixedBank,
    z: Tensor,
    level: float,
    classes: Sequence[int | None],
    top: int,
    k: int | None,
    place: tuple[int, int] | None,
) -> _Found:
    """The heaviest windows of images of several sizes: those of each size, by their fraction of the total weight."""
    found = _Found.nothing(z, top)
    for part, numbers in zip(bank.banks, bank.numbers, strict=True):
        items = [i for i, label in enumerate(classes) if label is None or label in part.classes]
        if not items:
            continue
        one = copy.copy(machine)
        one.bank, one.shape = part, part.shape
        new, old = _of_all(one, z[items], level, [classes[i] for i in items], top, k, place), found.of(items)
        image = torch.where(new.windows[0] < 0, new.windows[0], numbers.to(z.device)[new.windows[0].clamp(min=0)])
        evidence = torch.logaddexp(old.evidence, new.evidence)
        # Pixels that nobody asked for have no weight.
        a, b = (torch.where(each.evidence > -torch.inf, (each.evidence - evidence).exp(), 0.0) for each in (old, new))
        squares = a.square() / old.effective.clamp(min=1) + b.square() / new.effective.clamp(min=1)
        mean = a[:, None] * old.mean.double() + b[:, None] * new.mean.double()
        weight = torch.cat([a[:, None] * old.weight, b[:, None] * new.weight], 1)
        windows = torch.cat([old.windows, torch.stack([image, *new.windows[1:]])], 2)
        # Entries without a window come last.
        order = torch.where(windows[0] < 0, -1.0, weight).argsort(dim=1, descending=True, stable=True)[:, :top]
        found.windows[:, items] = windows.gather(2, order.expand(3, *order.shape))
        found.weight[items] = weight.gather(1, order)
        found.mean[items], found.evidence[items] = mean.to(z.dtype), evidence
        found.effective[items] = torch.where(squares > 0, 1 / squares, 0.0)
    return found


Block = tuple[slice, slice]


@dataclass(frozen=True)
class _Part:
    """Pixels that are explained together: images of the bank's size, the competition, and blocks (here, in the result).

    z has the items for the first block, then those for the second, and so on: crops, where the image is a canvas.
    """

    z: Tensor
    competition: Competition
    blocks: list[tuple[Block, Block]]


def _parts(machine: ScoreMachine, z: Tensor, k: int | None, place: tuple[int, int] | None) -> Iterator[_Part]:
    """All pixels of z, or one alone, in parts that engines take."""
    if tuple(z.shape[1:]) == tuple(machine.shape):
        whole = (slice(0, z.shape[2]), slice(0, z.shape[3]))
        yield _Part(z, _narrowed(machine.competition(k), place), [(whole, whole)])
        return
    assert k is not None
    own = machine.leaf if isinstance(machine, Sharded) else machine
    assert isinstance(own, EquivariantLocalScore)
    length, mode = machine.shape[1:], own.padding_mode
    canvas.check_canvas((z.shape[2], z.shape[3]), length, k, mode)
    for competition, some in canvas.calls(z, machine.bank, k, mode, machine.memory_limit):
        if place is not None:
            some = [(row, col) for row, col in some if place[0] in row.queries and place[1] in col.queries]
            if not some:
                continue
            ((row, col),) = some
            competition = _narrowed(competition, (place[0] - row.start, place[1] - col.start))
        crops = torch.cat([canvas.crop(z, row.start, col.start, length, mode) for row, col in some])
        blocks = [
            ((span(row.axis.queries), span(col.axis.queries)), (span(row.queries), span(col.queries)))
            for row, col in some
        ]
        yield _Part(crops, competition, blocks)


def _heaviest(
    machine: ScoreMachine, z: Tensor, level: float, label: int | None, competition: Competition, top: int
) -> tuple[Tensor, Tensor, PosteriorSum]:
    """The heaviest windows [3, B, T, H, W], their weights w = e^(l - m) / s [B, T, H, W], and the exact sums."""
    levels = torch.full((len(z),), level, dtype=torch.float64)
    (total,) = machine.exact_sums_of(label, z, levels, [competition])
    if isinstance(machine, Sharded):
        with machine.ranks.failing_together():
            found = _nearest(machine, z, label, competition, top + SPARE)
        near, distance2 = machine.heaviest(*found)
    else:
        near, distance2 = _nearest(machine, z, label, competition, top + SPARE)
    log_total = (total.m + total.s.log()).double()  # [B, 1, H, W]
    weights = (-distance2 / (2 * level**2) - log_total).exp().clamp(max=1)
    return near[:, :, :top], weights[:, :top], total


def _nearest(
    machine: ScoreMachine, z: Tensor, label: int | None, competition: Competition, count: int
) -> tuple[Tensor, Tensor]:
    """The windows nearest to each pixel's own [3, B, T, H, W], nearest first, and their distances in float64.

    They are of the images that this process holds, and numbered in the machine's bank.
    """
    bank = machine.held(label)
    if bank is None:
        none = torch.full((3, len(z), count, *z.shape[2:]), -1, device=z.device)
        return none, torch.full(none.shape[1:], torch.inf, dtype=torch.float64, device=z.device)
    near = nearest_windows(z, bank, competition, count, machine.memory_limit)
    distance2 = torch.stack([_distance2(z, bank, competition, near[:, :, t]) for t in range(near.shape[2])], 1)
    distance2, order = distance2.sort(dim=1, stable=True)
    near = near.gather(2, order.expand(3, *order.shape))
    if isinstance(machine, Sharded) or label is not None:
        # A part or a class counts its own images; the reader knows the bank's.
        numbers = machine.numbers(label) if isinstance(machine, Sharded) else _numbers(machine.bank, label)  # type: ignore[arg-type]
        near[0] = torch.where(near[0] < 0, near[0], numbers.to(z.device)[near[0].clamp(min=0)])
    return near, distance2


def _distance2(z: Tensor, bank: PatchBank, competition: Competition, near: Tensor) -> Tensor:
    """[B, H, W] squared distance between each pixel's window and one training window [3, B, H, W]; inf where none."""
    k, (image, row, col) = competition.patch_size, near
    known = image >= 0
    used, position = image.clamp(min=0).unique(return_inverse=True)
    train = images_of(bank, used, z.device)
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


def _numbers(bank: PatchBank, label: int) -> Tensor:
    """The number in `bank` of every image of a class, in the order of `bank.of_class`; `take` allows any order."""
    assert bank.labels is not None
    return (bank.labels == label).nonzero().flatten()


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


def _place(pixel: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    try:
        row, col = pixel
    except (TypeError, ValueError):
        raise TypeError(f"pixel: got {pixel!r}, takes (row, column)") from None
    return (
        checks.integer("pixel row", row, at_least=0, at_most=size[0] - 1),
        checks.integer("pixel column", col, at_least=0, at_most=size[1] - 1),
    )
