"""Images in arrays: numpy and torch, .npy and .npz files, dicts of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pixels import MOST_CHANNELS, channels_first, is_one_image
from .source import Source, Wanted, named
from .tree import integers


def array_source(
    name: str,
    array: np.ndarray,
    labels: np.ndarray | None = None,
    class_names: tuple[str, ...] | None = None,
    gray: bool = False,
) -> Source:
    """Images in one array: [N, H, W], four axes by the rule of `channel_axis`, or one image [H, W, C].

    gray: whether three axes are surely [N, H, W].
    """
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"{name}: got shape {list(array.shape)}, takes [N, C, H, W], [N, H, W, C] or [N, H, W]"
            + ("; one gray image is [1, H, W]" if array.ndim == 2 else "")
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: got dtype {array.dtype}, takes integers from 0 to 255 or floating point in [-1, 1]")
    if not gray and is_one_image(array.shape):
        array = array[None]
    elif not gray and array.ndim == 3 and array.shape[0] == 3 and min(array.shape[1:]) > MOST_CHANNELS:
        _, height, width = array.shape
        raise ValueError(
            f"{name}: shape {list(array.shape)} is one colour image or three gray ones; give [1, 3, {height}, {width}] "
            f"or [3, 1, {height}, {width}]"
        )
    images = array[:, None] if array.ndim == 3 else channels_first(array, name)

    def item(i: int) -> tuple[np.ndarray, int | None]:
        return images[i], None if labels is None else int(labels[i])

    return Source(name, len(images), item, lambda i: f"{name}, image {i}", labels, class_names)


def labelled_array(name: str, images: np.ndarray, labels: Any, class_names: Sequence[str] | None = None) -> Source:
    """Images with their labels, which are integers, one-hot, or texts."""
    if labels is None:
        return array_source(name, images)
    with named(name):
        numbers = np.asarray(labels)
        # Labels tell one colour image from several gray ones.
        count = 1 if is_one_image(images.shape) and len(numbers) == 1 else len(images)
        if numbers.dtype.kind == "U" and numbers.shape == (count,):
            names, numbers = np.unique(numbers, return_inverse=True)
            class_names = names.tolist()
        numbers = integers(numbers, count)
        if class_names is not None and len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(class_names):
            raise ValueError(f"{len(class_names)} class_names for labels from {numbers.min()} to {numbers.max()}")
    texts = None if class_names is None else tuple(map(str, class_names))
    return array_source(name, images, numbers, texts, gray=count == len(images))


def numpy_file(path: Path, wanted: Wanted) -> Source:
    """A .npy or .npz file."""
    with named(path):
        # A mapped .npy is read image by image, and its header cannot ask for more memory than the file holds.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return array_source(str(path), loaded)
        with loaded:
            return _npz(path, loaded, wanted)


def _npz(path: Path, loaded: Any, wanted: Wanted) -> Source:
    image_key, label_key = wanted.choose_keys(str(path), loaded.files)
    images = _array_of(loaded, image_key)
    labels = None if label_key is None else _array_of(loaded, label_key)
    names = _array_of(loaded, "class_names") if labels is not None and "class_names" in loaded.files else None
    if image_key == "arr_0" and labels is None and wanted.labels and "arr_1" in loaded.files:
        # Samples of ADM and of EDM's tools: numpy.savez(images, labels).
        second = _array_of(loaded, "arr_1")
        if second.dtype.kind in "iu" and second.shape in ((len(images),), (len(images), 1)):
            labels = second
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(f"class_names of dtype {names.dtype}, shape {list(names.shape)}, takes a text a class")
    return labelled_array(str(path), images, labels, None if names is None else names.tolist())


def _array_of(loaded: Any, key: str) -> np.ndarray:
    array = loaded[key]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key} is no array")
    return array
