"""What an array of pixels means: 8-bit pixels as values in [-1, 1], and which axis holds the channels.

An 8-bit pixel u is the value u / 127.5 - 1. An axis of at most four entries can hold channels; `channel_axis` tells
from the shape alone whether it is the third from last or the last, and everything that takes arrays asks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CHANNELS = 4
"""An axis this short or shorter can be the channels of an array: gray, gray and alpha, RGB, RGBA."""


def to_values(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images as values in [-1, 1]: u / 127.5 - 1 for uint8; floating point images are values already."""
    return pixels.to(dtype) / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.to(dtype)


def to_bytes(values: Tensor) -> Tensor:
    """Values in [-1, 1] as the nearest uint8 pixels, the inverse of `to_values`; values outside are clipped."""
    return ((values.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """-3 or -1, the axis of `shape` that holds an image's channels, or None where its length does not tell.

    The one that can be channels is the one. Where both can, as in images of four pixels, 1 or 3 at one end and not at
    the other decides.
    """
    first, last = shape[-3] <= MOST_CHANNELS, shape[-1] <= MOST_CHANNELS
    if first and last:
        first, last = shape[-3] in (1, 3), shape[-1] in (1, 3)
    if first == last:
        return None
    return -3 if first else -1


def surely_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether [..., a, b, c] has room for channels at its end alone."""
    return shape[-1] <= MOST_CHANNELS < shape[-3]


def is_one_image(shape: tuple[int, ...]) -> bool:
    """Whether three axes are one image [H, W, C] and not a stack of gray ones, whose last axis would be its width."""
    return len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) > MOST_CHANNELS


def known_channel_axis(shape: tuple[int, ...], name: str) -> int:
    """-3 or -1; ValueError where the shape does not tell."""
    axis = channel_axis(shape)
    if axis is None:
        raise ValueError(
            f"{name}: in shape {list(shape)} either the channels come first or last, and which cannot be told by their "
            f"number; PatchBank(array) takes [N, C, H, W] only"
        )
    return axis
