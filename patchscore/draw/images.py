"""Pictures of samples, made with Pillow alone: a grid of images, and how images come out of noise."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pixels import to_bytes

PAPER = (255, 255, 255)
INK = (60, 60, 60)
GAP = 2
"""White pixels between images, before magnification."""


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] as uint8 [B, H, W, C]; values outside are clipped."""
    return to_bytes(images.detach().cpu()).permute(0, 2, 3, 1).contiguous().numpy()


def to_pil(image: Tensor) -> Image.Image:
    """One image [C, H, W] in [-1, 1] as an 8-bit PIL image, gray where C = 1; beyond three channels the first three."""
    return to_pils(image[None])[0]


def to_pils(images: Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] likewise, each as `to_pil` has it."""
    pixels = to_uint8(images)
    shown = np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3])
    return [Image.fromarray(image) for image in shown]


def png(image: Image.Image, compress_level: int = 6) -> bytes:
    """An image as a PNG file, compressed as far as zlib's level says; 0 stores the pixels as they are."""
    content = io.BytesIO()
    image.save(content, "png", compress_level=compress_level)
    return content.getvalue()


def grid(images: Tensor, columns: int | None = None, zoom: int | None = None) -> Image.Image:
    """Images [B, C, H, W] in [-1, 1] side by side, as near to square as they go, each pixel drawn zoom x zoom."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return _tile_rows(rows, columns, zoom or default_zoom(images.shape[-1]))


def trajectories(
    x: Tensor, x0: Tensor, sigmas: Sequence[float], patch_sizes: Sequence[int | None], columns: int = 10, zoom: int = 2
) -> Image.Image:
    """How images come out of noise: for each image a row of noisy x_t above a row of what was denoised from them.

    Args:
        x, x0: [B, steps, C, H, W].
        sigmas: sigma_t / alpha_t of each step, written above its column.
        patch_sizes: k of each step, written beside sigma; None where whole images compete.
        columns: at most so many steps are shown, evenly spaced, the first and the last among them.
    """
    shown = np.unique(np.linspace(0, len(sigmas) - 1, min(columns, len(sigmas))).round().astype(int))
    spread = x[:, shown].flatten(2).std(-1).clamp(min=0.5)[:, :, None, None, None]
    noisy = x[:, shown] / (2 * spread).clamp(min=1)  # pure noise is wider than [-1, 1]
    rows = [row for b in range(len(x)) for row in (noisy[b], x0[b, shown])]
    picture = _tile_rows(rows, len(shown), zoom)

    header = 34
    page = Image.new("RGB", (picture.width, picture.height + header), PAPER)
    page.paste(picture.convert("RGB"), (0, header))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    cell = (x.shape[-1] + GAP) * zoom
    for column, step in enumerate(shown):
        left = GAP * zoom + column * cell
        draw.text((left, 3), f"sigma {sigmas[step]:.2g}", fill=INK, font=font)
        k = patch_sizes[step]
        draw.text((left, 18), f"k {k}" if k else "whole", fill=INK, font=font)
    return page


def pairs(rows: Mapping[str, Tensor], zoom: int | None = None) -> Image.Image:
    """Images under each other that belong together: a named row each, the first above the others.

    Args:
        rows: [B, C, H, W] by name, of one shape.
    """
    first = next(iter(rows.values()))
    zoom = zoom or max(1, round(84 / first.shape[-1]))
    picture = _tile_rows(list(rows.values()), len(first), zoom)
    font, margin = ImageFont.load_default(13), 10
    left = margin + max(round(font.getlength(name)) for name in rows) + margin
    page = Image.new("RGB", (left + picture.width, picture.height), PAPER)
    page.paste(picture.convert("RGB"), (left, 0))
    draw, cell = ImageDraw.Draw(page), (first.shape[-2] + GAP) * zoom
    for i, name in enumerate(rows):
        middle = GAP * zoom + i * cell + first.shape[-2] * zoom // 2
        draw.text((left - margin, middle), name, fill=INK, font=font, anchor="rm")
    return page


def default_zoom(width: int) -> int:
    """Magnification that brings an image to about 100 pixels."""
    return max(1, round(96 / width))


def _tile_rows(rows: Sequence[Tensor], columns: int, zoom: int) -> Image.Image:
    height, width = rows[0].shape[-2:]
    page = Image.new("RGB", (GAP + columns * (width + GAP), GAP + len(rows) * (height + GAP)), PAPER)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            page.paste(to_pil(image), (GAP + j * (width + GAP), GAP + i * (height + GAP)))
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)
