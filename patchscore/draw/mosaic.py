"""The mosaic: where the pixels of one sample come from, a row a noise level, as one picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..bank import PatchBank
from ..explain import Explanation, Walk
from ..nearest import images_of
from .images import INK, PAPER, to_pil


def mosaic_rows(walk: Walk, bank: PatchBank, levels: int = 4, contributors: int = 10) -> list[MosaicRow]:
    """What `mosaic` draws of a walk, at so many of its explained steps, evenly spaced up to the last.

    The first, where the noise hides everything, is shown only if all are.
    """
    last, count = len(walk.steps) - 1, min(levels, len(walk.steps))
    shown = range(last + 1) if count > last else [round((i + 1) * last / count) for i in range(count)]
    return [_mosaic_row(walk.steps[i], bank, contributors) for i in shown]


def _mosaic_row(step: Explanation, bank: PatchBank, contributors: int) -> MosaicRow:
    owners, shares = (part[0].cpu() for part in step.owners())
    numbers, position = owners.unique(return_inverse=True)
    mass = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, position.flatten(), shares.flatten())
    ranked = mass.argsort(descending=True, stable=True)
    rank = ranked.argsort()[position]

    # The map: a source's colour, paler where it carries less of the mass.
    colours = np.array([source_colour(r) for r in range(len(numbers))])
    strength = shares.numpy()[..., None] ** 0.7
    painted = strength * colours[rank.numpy()] + (1 - strength) * 226
    sources = Image.fromarray(painted.round().astype(np.uint8))

    # The collage: the centre of every pixel's heaviest window.
    image, row, col = (part[0, 0].cpu() for part in (step.image, step.row, step.col))
    used = image.unique()
    train = images_of(bank, used, torch.device("cpu"))
    collage = train[torch.searchsorted(used, image), :, row, col].movedim(-1, 0)

    # The sources, with the places marked whose windows own a pixel.
    listed = []
    for r, number in enumerate(numbers[ranked[:contributors]].tolist()):
        places = torch.zeros(image.shape, dtype=torch.bool)
        own = (owners == number) & (image == number)
        places[row[own], col[own]] = True
        pixels = np.asarray(to_pil(images_of(bank, torch.tensor([number]), torch.device("cpu"))[0]).convert("RGB"))
        marked = np.where(places.numpy()[..., None], 0.35 * pixels + 0.65 * colours[r], pixels)
        listed.append((Image.fromarray(marked.round().astype(np.uint8)), source_colour(r)))
    windows = f"{step.patch_size} x {step.patch_size} windows" if step.patch_size else "whole images"
    title = f"noise {step.sigma:.2g}, {windows}: {len(numbers)} training images own a pixel"
    spread = max(1.0, 2 * step.z.std().item())
    return MosaicRow(title, (step.z / spread)[0], step.mean[0], sources, collage, listed)


def source_colour(rank: int) -> tuple[int, int, int]:
    """The colour of the source with this rank: hues a golden angle apart, so that neighbours in rank differ most."""
    hue, light = (rank * 137.508 + 18) % 360 / 360, (0.52, 0.66, 0.40)[rank // 12 % 3]
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.62))  # type: ignore[return-value]


@dataclass(frozen=True)
class MosaicRow:
    """One noise level of a mosaic.

    noisy, denoised, collage: [C, H, W] in [-1, 1].
    sources: the map of sources, H x W.
    contributors: training images, H x W, each with its colour in the map.
    """

    title: str
    noisy: Tensor
    denoised: Tensor
    sources: Image.Image
    collage: Tensor
    contributors: Sequence[tuple[Image.Image, tuple[int, int, int]]]


def mosaic(rows: Sequence[MosaicRow], zoom: int | None = None) -> Image.Image:
    """Where an image comes from, a row a noise level, most noise first.

    In each row: the noisy image; what was denoised from it; the map of sources, every pixel in the colour of the
    training image whose windows weigh most there, paler where they weigh less; the collage of every pixel's heaviest
    window; then the training images that own most pixels, framed in their colour, which marks the places used.
    """
    height, width = rows[0].noisy.shape[-2:]
    zoom = zoom or max(1, round(168 / width))
    small = max(1, zoom // 2)
    gap, frame, header, top = 14, 4, 24, 24
    big, thumb = (width * zoom, height * zoom), (width * small, height * small)
    across = max(-(-len(row.contributors) // 2) for row in rows)
    cell = (thumb[0] + 2 * frame + 6, thumb[1] + 2 * frame + 6)
    row_height = header + max(big[1], 2 * cell[1]) + gap
    page = Image.new("RGB", (gap + 4 * (big[0] + gap) + across * cell[0], top + row_height * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)

    columns = [gap + i * (big[0] + gap) for i in range(5)]
    titles = ("noisy", "denoised", "by source", "heaviest windows", "the training images that own most pixels")
    for left, title in zip(columns, titles, strict=True):
        draw.text((left, 6), title, fill=INK, font=font)
    for r, row in enumerate(rows):
        y = top + r * row_height
        draw.text((gap, y + 3), row.title, fill=INK, font=font)
        y += header
        for left, image in zip(columns, _of_row(row), strict=False):
            page.paste(image.convert("RGB").resize(big, Image.Resampling.NEAREST), (left, y))
        for i, (image, colour) in enumerate(row.contributors):
            left, above = columns[4] + i % across * cell[0], y + i // across * cell[1]
            framed = Image.new("RGB", (thumb[0] + 2 * frame, thumb[1] + 2 * frame), colour)
            framed.paste(image.resize(thumb, Image.Resampling.NEAREST), (frame, frame))
            page.paste(framed, (left, above))
    return page


def _of_row(row: MosaicRow) -> list[Image.Image]:
    return [to_pil(row.noisy), to_pil(row.denoised), row.sources, to_pil(row.collage)]
