"""One web page that shows where each pixel of some samples comes from: a single file, no server, no network.

The page is `data/explain.html` with two things put in: a JSON object, and for each sample its numbers as planes of
bytes, compressed with zlib, which every browser can undo. What would make the page larger than it may be is left out
lightest first: windows of little weight, then training images of little mass.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bank import PatchBank
from ..explain import ExplainedSample
from ..receptive import ReceptiveFields
from . import images

ABSENT = 0xFFFF
LEAST_WEIGHTS = (0.002, 0.01, 0.03, 0.1)
LISTED = (12, 8, 5, 3)
"""Windows a pixel, and the least weight of one: tried in turn until the page is small enough."""


def explanation_page(
    samples: Sequence[ExplainedSample], bank: PatchBank, about: dict[str, Any], max_bytes: int = 5_000_000
) -> str:
    """The page as text.

    Args:
        samples: explained samples of images up to 256 x 256.
        bank: the training images.
        about: what to say at the top: title, and lines of text.
        max_bytes: how large the page may become.

    Raises:
        ValueError: nothing to show, images that are too large, or samples that do not fit even with the fewest windows.
    """
    if not samples:
        raise ValueError("samples: got none, takes one or more")
    if max(bank.shape[1:]) > 256:
        raise ValueError(f"samples: of {bank.shape[1]} x {bank.shape[2]} images, a page takes up to 256 x 256")
    template = resources.files("patchscore").joinpath("data/explain.html").read_text(encoding="utf-8")
    for least, listed in zip(LEAST_WEIGHTS, LISTED, strict=True):
        sources = _sources(samples, least, listed)
        position = np.full(len(bank) + 1, ABSENT)  # the last is for the number -1
        position[sources] = np.arange(len(sources))
        planes = [_planes(sample, position, least, listed) for sample in samples]
        used = sum(map(len, planes)) * 4 // 3 + len(template)
        kept = _that_fit(bank, sources, max_bytes - used - 20_000)
        # Rather fewer windows than windows that cannot be shown.
        if len(kept) == len(sources) or (least == LEAST_WEIGHTS[-1] and kept):
            break
    else:
        raise ValueError(f"max_bytes: {len(samples)} samples do not fit into {max_bytes} bytes; explain fewer steps")
    data = _data(samples, bank, about, kept, len(sources), planes, listed)
    return template.replace("/*DATA*/null", script_safe(data))


def script_safe(data: dict[str, Any]) -> str:
    """JSON that an HTML parser reads as nothing but text: without "<" no tag or comment begins in it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _data(
    samples: Sequence[ExplainedSample],
    bank: PatchBank,
    about: dict[str, Any],
    kept: list[int],
    sources: int,
    planes: list[bytes],
    listed: int,
) -> dict[str, Any]:
    channels, height, width = bank.shape
    names = bank.class_names or ()

    def name(label: Any) -> str:
        return (
            names[label] if isinstance(label, int) and 0 <= label < len(names) else "" if label is None else f"{label}"
        )

    return {
        "about": about,
        "height": height,
        "width": width,
        "channels": 3 if channels >= 3 else 1,
        "listed": listed,
        "sources": {
            "numbers": kept,
            "labels": [] if bank.labels is None else [name(label) for label in bank.labels[kept].tolist()],
            "columns": _columns(len(kept)),
            "atlas": base64.b64encode(_atlas(bank, kept)).decode(),
            "all": sources,
        },
        "samples": [
            {
                "number": sample.number,
                "label": name(sample.label),
                "steps": [
                    {"index": level, "of": sample.of, "sigma": float(f"{step.sigma:.4g}"), "k": step.patch_size}
                    | ({"rows": fields.rows, "cols": fields.cols, "reach": fields.maps.shape[-1]} if fields else {})
                    for level, step, fields in zip(sample.levels, sample.steps, _fields(sample), strict=True)
                ],
                "planes": base64.b64encode(content).decode(),
            }
            for sample, content in zip(samples, planes, strict=True)
        ],
    }


def _fields(sample: ExplainedSample) -> Sequence[ReceptiveFields | None]:
    return sample.fields or [None] * len(sample.steps)


def _sources(samples: Sequence[ExplainedSample], least: float, listed: int) -> list[int]:
    """The training images of all windows worth listing, most mass first."""
    mass: Counter[int] = Counter()
    for sample in samples:
        for step in sample.steps:
            image, weight = step.image[:, :listed], step.weight[:, :listed]
            worth = _worth(image, weight, least)
            numbers, position = image[worth].unique(return_inverse=True)
            total = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, position.cpu(), weight[worth].cpu())
            mass.update(dict(zip(numbers.tolist(), total.tolist(), strict=True)))
    return [number for number, _ in mass.most_common(ABSENT - 1)]


def _worth(image: Tensor, weight: Tensor, least: float) -> Tensor:
    """The windows worth listing: those of some weight, and the heaviest of every pixel."""
    worth = (weight >= least) & (image >= 0)
    worth[:, 0] = image[:, 0] >= 0
    return worth


def _planes(sample: ExplainedSample, position: np.ndarray, least: float, listed: int) -> bytes:
    """What the page reads, a plane of bytes [H, W] after another, for each step:

    noisy and denoised image, each channel; log2 of the effective number x 2,048 (low byte, high byte); then for each
    listed window its source (low, high; 65,535 is none), row, column and weight x 65,535 (low, high). After these, if
    it is known what output pixels depend on, the map of each, row by row: 255 times the square root of its values
    relative to the largest.
    """
    content = []
    for step, fields in zip(sample.steps, _fields(sample), strict=True):
        planes: list[np.ndarray] = []
        spread = step.z.flatten(1).std().clamp(min=0.5)
        for image in (step.z / (2 * spread).clamp(min=1), step.mean):
            pixels = images.to_uint8(image)[0]
            planes += [pixels[..., c] for c in range(3 if pixels.shape[-1] >= 3 else 1)]
        effective = (step.effective[0].clamp(min=1).log2() * 2048).round().clamp(max=ABSENT)
        planes += _two_bytes(effective.cpu().numpy())
        top = min(listed, step.image.shape[1])
        worth = _worth(step.image[:, :top], step.weight[:, :top], least)[0].cpu().numpy()
        numbers = step.image[0, :top].cpu().numpy()
        known = position[numbers]
        for t in range(listed):
            if t >= top:
                absent = np.full(numbers.shape[1:], ABSENT)
                planes += [*_two_bytes(absent), *(np.zeros(absent.shape, np.uint8) for _ in range(4))]
                continue
            planes += _two_bytes(np.where(worth[t], known[t], ABSENT))
            planes += [
                np.where(worth[t], part[0, t].cpu().numpy(), 0).astype(np.uint8) for part in (step.row, step.col)
            ]
            weight = (step.weight[0, t].cpu().numpy() * 65535).round()
            planes += _two_bytes(np.where(worth[t], weight, 0))
        content.append(np.stack(planes).tobytes())
        if fields is not None:
            content.append((255 * fields.relative[0].sqrt()).round().to(torch.uint8).cpu().numpy().tobytes())
    return zlib.compress(b"".join(content), 9)


def _two_bytes(values: np.ndarray) -> list[np.ndarray]:
    whole = values.astype(np.uint16)
    return [(whole & 255).astype(np.uint8), (whole >> 8).astype(np.uint8)]


def _that_fit(bank: PatchBank, sources: list[int], budget: int) -> list[int]:
    """As many of the first sources as an atlas of at most `budget` bytes (in base64) holds."""
    count = len(sources)
    while count:
        size = len(_atlas(bank, sources[:count])) * 4 // 3
        if size <= budget:
            return sources[:count]
        count = min(count - 1, max(0, int(count * budget / size * 0.98)))
    return []


def _columns(count: int) -> int:
    return max(1, min(count, 64))


def _atlas(bank: PatchBank, numbers: list[int]) -> bytes:
    """Training images side by side as a PNG."""
    _, height, width = bank.shape
    columns = _columns(len(numbers))
    pixels = [images.to_uint8(bank.chunk(number, number + 1))[0] for number in numbers]
    tiles = np.stack(pixels) if pixels else np.zeros((1, height, width, 1), np.uint8)
    tiles = tiles[..., :3] if tiles.shape[-1] >= 3 else tiles[..., :1]
    rows = -(-len(tiles) // columns)
    page = np.zeros((rows * columns, *tiles.shape[1:]), np.uint8)
    page[: len(tiles)] = tiles
    page = page.reshape(rows, columns, height, width, -1).swapaxes(1, 2).reshape(rows * height, columns * width, -1)
    content = io.BytesIO()
    Image.fromarray(page[..., 0] if page.shape[-1] == 1 else page).save(content, "png")
    return content.getvalue()
