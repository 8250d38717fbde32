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
from ..explain import ExplainedSample, Explanation
from ..nearest import images_of
from ..receptive import ReceptiveFields
from .images import INK, PAPER, to_pil

SENSITIVE = (180, 69, 31)
"""The input pixel that an output pixel depends on most; paler, by the square root, to white where it does not."""
UNSHOWN = (226, 226, 226)
"""Outside the windows that are shown."""
OUTPUT = (31, 98, 180)
"""The frame of that output pixel."""


def mosaic_rows(sample: ExplainedSample, bank: PatchBank, levels: int = 4, contributors: int = 10) -> list[MosaicRow]:
    """What `mosaic` draws of a sample, at so many of its explained steps, evenly spaced up to the last.

    The first, where the noise hides everything, is shown only if all are.
    """
    last, count = len(sample.steps) - 1, min(levels, len(sample.steps))
    shown = range(last + 1) if count > last else [round((i + 1) * last / count) for i in range(count)]
    fields = sample.fields or [None] * len(sample.steps)
    return [_mosaic_row(sample.steps[i], bank, contributors, fields[i]) for i in shown]


def _mosaic_row(
    step: Explanation, bank: PatchBank, contributors: int, fields: ReceptiveFields | None = None
) -> MosaicRow:
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
    sensitivity, outputs = (None, []) if fields is None else _sensitivity_maps(fields, step.z.shape[-2:])
    return MosaicRow(title, (step.z / spread)[0], step.mean[0], sources, collage, listed, sensitivity, outputs)


def _sensitivity_maps(fields: ReceptiveFields, size: torch.Size) -> tuple[Image.Image, list[tuple[int, int]]]:
    """The maps of output pixels whose windows do not meet, side by side, and where those pixels are."""
    height, width = size
    shares, r = fields.relative[0].cpu(), fields.maps.shape[-1] // 2
    painted = np.full((height, width, 3), UNSHOWN, np.uint8)
    rows, cols = fields.apart
    for a in rows:
        for b in cols:
            weight = shares[a, b].sqrt().numpy()[..., None]
            colours = ((1 - weight) * np.array(PAPER) + weight * np.array(SENSITIVE)).round().astype(np.uint8)
            for y, line in enumerate(colours, fields.rows[a] - r):
                for x, colour in enumerate(line, fields.cols[b] - r):
                    if fields.circular or (0 <= y < height and 0 <= x < width):
                        painted[y % height, x % width] = colour
    outputs = [(fields.rows[a], fields.cols[b]) for a in rows for b in cols]
    return Image.fromarray(painted), outputs


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
    sensitivity: the maps of what output pixels depend on, H x W, if they were found.
    outputs: row and column of those output pixels.
    """

    title: str
    noisy: Tensor
    denoised: Tensor
    sources: Image.Image
    collage: Tensor
    contributors: Sequence[tuple[Image.Image, tuple[int, int, int]]]
    sensitivity: Image.Image | None = None
    outputs: Sequence[tuple[int, int]] = ()


def mosaic(rows: Sequence[MosaicRow], zoom: int | None = None) -> Image.Image:
    """Where an image comes from, a row a noise level, most noise first.

    In each row: the noisy image; what was denoised from it; the map of sources, every pixel in the colour of the
    training image whose windows weigh most there, paler where they weigh less; the collage of every pixel's heaviest
    window; if it was found, what the framed pixels depend on, darker where more; then the training images that own
    most pixels, framed in their colour, which marks the pixels used.
    """
    height, width = rows[0].noisy.shape[-2:]
    zoom = zoom or max(1, round(168 / width))
    small = max(1, zoom // 2)
    gap, frame, header, top = 14, 4, 24, 24
    big, thumb = (width * zoom, height * zoom), (width * small, height * small)
    across = max(-(-len(row.contributors) // 2) for row in rows)
    cell = (thumb[0] + 2 * frame + 6, thumb[1] + 2 * frame + 6)
    row_height = header + max(big[1], 2 * cell[1]) + gap
    titles = ["noisy", "denoised", "by source", "heaviest windows"]
    if any(row.sensitivity for row in rows):
        titles.append("what pixels depend on")
    columns = [gap + i * (big[0] + gap) for i in range(len(titles) + 1)]
    page = Image.new("RGB", (columns[-1] + across * cell[0], top + row_height * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)

    titles.append("the training images that own most pixels")
    for left, title in zip(columns, titles, strict=True):
        draw.text((left, 6), title, fill=INK, font=font)
    for r, row in enumerate(rows):
        y = top + r * row_height
        draw.text((gap, y + 3), row.title, fill=INK, font=font)
        y += header
        for left, image in zip(columns, _of_row(row), strict=False):
            page.paste(image.convert("RGB").resize(big, Image.Resampling.NEAREST), (left, y))
        for i, j in row.outputs:
            corner = (columns[4] + j * zoom, y + i * zoom)
            draw.rectangle((*corner, corner[0] + zoom - 1, corner[1] + zoom - 1), outline=OUTPUT)
        for i, (image, colour) in enumerate(row.contributors):
            left, above = columns[-1] + i % across * cell[0], y + i // across * cell[1]
            framed = Image.new("RGB", (thumb[0] + 2 * frame, thumb[1] + 2 * frame), colour)
            framed.paste(image.resize(thumb, Image.Resampling.NEAREST), (frame, frame))
            page.paste(framed, (left, above))
    return page


def _of_row(row: MosaicRow) -> list[Image.Image]:
    images = [to_pil(row.noisy), to_pil(row.denoised), row.sources, to_pil(row.collage)]
    return images if row.sensitivity is None else [*images, row.sensitivity]
