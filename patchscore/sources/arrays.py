"""Images in arrays: numpy and torch, .npy files, dicts of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pixels import MOST_CHANNELS, is_one_image, known_channel_axis
from .mapped import labels_beside
from .rows import Rows
from .source import Source, Wanted, named
from .tree import integers


def array_source(
    name: str,
    array: np.ndarray | Rows,
    labels: np.ndarray | None = None,
    class_names: tuple[str, ...] | None = None,
    gray: bool = False,
) -> Source:
    """Images in one array: [N, H, W], four axes by the rule of `channel_axis`, or one image [H, W, C].

    gray: whether three axes are surely [N, H, W].
    """
    shape = array.shape
    if array.ndim not in (3, 4) or 0 in shape:
        raise ValueError(
            f"{name}: got shape {list(shape)}, takes [N, C, H, W], [N, H, W, C] or [N, H, W]"
            + ("; one gray image is [1, H, W]" if array.ndim == 2 else "")
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: got dtype {array.dtype}, takes integers from 0 to 255 or floating point in [-1, 1]")
    if not gray and is_one_image(shape):
        array = (array.whole() if isinstance(array, Rows) else array)[None]
        shape = array.shape
    elif not gray and array.ndim == 3 and shape[0] == 3 and min(shape[1:]) > MOST_CHANNELS:
        raise ValueError(
            f"{name}: shape {list(shape)} is one colour image or three gray ones; give [1, 3, {shape[1]}, {shape[2]}] "
            f"or [3, 1, {shape[1]}, {shape[2]}]"
        )
    axis = None if array.ndim == 3 else known_channel_axis(shape, name)

    def item(i: int) -> tuple[np.ndarray, int | None]:
        try:
            row = array[i]
        except Exception:
            with named(name):  # Only here: it takes longer than to read a small image.
                raise
        image = row[None] if axis is None else row.transpose(2, 0, 1) if axis == -1 else row
        return image, None if labels is None else int(labels[i])

    return Source(name, shape[0], item, lambda i: f"{name}, image {i}", labels, class_names)


def labelled_array(
    name: str, images: np.ndarray | Rows, labels: Any, class_names: Sequence[str] | None = None
) -> Source:
    """Images with their labels, which are integers, one-hot, or texts."""
    if labels is None:
        return array_source(name, images)
    with named(name):
        numbers = np.asarray(labels)
        # Labels tell one colour image from several gray ones.
        count = 1 if is_one_image(images.shape) and len(numbers) == 1 else images.shape[0]
        if numbers.dtype.kind == "U" and numbers.shape == (count,):
            found, numbers = np.unique(numbers, return_inverse=True)
            class_names = found.tolist()
        numbers = integers(numbers, count)
        if (numbers == -1).all():
            return array_source(name, images, gray=count == images.shape[0])
        if class_names is not None and len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(class_names):
            raise ValueError(f"{len(class_names)} class_names for labels from {numbers.min()} to {numbers.max()}")
    texts = None if class_names is None else tuple(map(str, class_names))
    return array_source(name, images, numbers, texts, gray=count == images.shape[0])


def unflattened(images: np.ndarray | Rows, name: str) -> np.ndarray | Rows:
    """[N, C, H, W] of flat images [N, C H W], all of one channel before the next; square, gray or RGB."""
    if images.ndim != 2:
        return images
    count, length = images.shape
    for channels in (3, 1):
        side = math.isqrt(length // channels)
        if length and channels * side * side == length:
            shape = (count, channels, side, side)
            if isinstance(images, Rows):
                return images.reshaped(shape)
            return images.reshape(shape)
    raise ValueError(f"{name}: rows of {length} numbers are no square images, gray or RGB")


def npy_file(path: Path, wanted: Wanted) -> Source:
    """A .npy file, mapped: it is read image by image, and its header cannot ask for more than the file holds.

    Labels and class names lie beside it, in files of their own.
    """
    with named(path):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            raise ValueError("not a .npy file")
        labels, names = labels_beside(path) if wanted.labels else (None, None)
        return labelled_array(str(path), loaded, labels, names)
