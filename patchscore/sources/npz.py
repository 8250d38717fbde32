"""Images in .npz files: the package's own, samples of ADM and EDM, ImageNet 32 x 32 and 64 x 64, MedMNIST, Keras."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from .arrays import labelled_array, unflattened
from .rows import Rows
from .source import IMAGE_KEYS, Source, Wanted, joined, named

_NAMES = re.compile(r"(train|val)_data(?:_batch_(\d+))?(\.npz)?")
"""The files of the ImageNet sets that were made smaller: train_data_batch_1.npz to 10, val_data.npz."""

_IMAGE_KEYS = tuple(sorted(IMAGE_KEYS, key="image".__eq__))
"""`image` last: samples of this package's first release call their numbers so, beside `images`."""

_CLASSES = "map_clsloc.txt"
"""The classes of those sets, a line each: WordNet id, label from 1, name."""


class Npz:
    """The arrays of a .npz file, none of which is read before it is asked for."""

    def __init__(self, path: Path, wanted: Wanted):
        self.path, self.wanted = path, wanted
        with zipfile.ZipFile(path) as archive:
            self.members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.keys = [key for key, info in self.members.items() if info.filename.endswith(".npy")]

    def rows(self, key: str) -> np.ndarray | Rows:
        """An array as it lies in the file, or read whole where it lies in Fortran order."""
        with self._open(key) as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
        needed = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{key} holds Python objects; takes arrays of numbers")
        if needed > self.members[key].file_size - start:
            raise ValueError(f"the header of {key} declares {needed} bytes of values, more than the file holds")
        rows = Rows(lambda: self._open(key), start, shape or (1,), dtype)
        if not fortran or len(shape) < 2:
            return rows if shape else rows.whole().reshape(())
        self.wanted.check_memory(str(self.path), needed)
        return Rows(lambda: self._open(key), start, shape[::-1], dtype).whole().transpose()

    def whole(self, key: str) -> np.ndarray:
        """An array, read whole."""
        array = self.rows(key)
        if isinstance(array, np.ndarray):
            return array
        self.wanted.check_memory(str(self.path), math.prod(array.shape) * array.dtype.itemsize)
        return array.whole() if 0 not in array.shape else np.empty(array.shape, array.dtype)

    def _open(self, key: str) -> Any:
        archive = zipfile.ZipFile(self.path)
        file = archive.open(self.members[key])
        # The archive stays open as long as the member does.
        close = file.close

        def close_both() -> None:
            close()
            archive.close()

        file.close = close_both  # type: ignore[method-assign]
        return file


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(cast(Any, file))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(cast(Any, file))
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(cast(Any, file))
    raise ValueError(f".npy format {version[0]}.{version[1]}, takes 1.0 or 2.0")


def npz_file(path: Path, wanted: Wanted) -> Source:
    """The images of a .npz file, with labels and class names where it has them."""
    with named(path):
        held = Npz(path, wanted)
        image_key, label_key = _keys(held, wanted)
        images = held.rows(image_key)
        labels = None if label_key is None else held.whole(label_key)
        names = held.whole("class_names") if labels is not None and "class_names" in held.keys else None
        if image_key == "arr_0" and labels is None and wanted.labels and "arr_1" in held.keys:
            # Samples of ADM and of EDM's tools: numpy.savez(images, labels).
            second = held.rows("arr_1")
            if second.dtype.kind in "iu" and second.shape in ((images.shape[0],), (images.shape[0], 1)):
                labels = held.whole("arr_1")
        if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
            raise ValueError(f"class_names of dtype {names.dtype}, shape {list(names.shape)}, takes a text a class")
        if image_key == "data":
            images = unflattened(images, str(path))
            if labels is not None and names is None and _NAMES.fullmatch(path.name):
                names = _imagenet_names(path.parent, labels)
        return labelled_array(str(path), images, labels, None if names is None else names.tolist())


def _keys(held: Npz, wanted: Wanted) -> tuple[str, str | None]:
    """The names of images and labels: those that were asked for, of the split, or by custom."""
    if wanted.image_key is None:
        # MedMNIST, and Keras's mnist.npz: the training images where nothing else is asked for.
        for image, label in (("{}_images", "{}_labels"), ("x_{}", "y_{}")):
            splits = [split for split in ("train", "val", "test") if image.format(split) in held.keys]
            if splits and not (len(splits) == 1 and any(key in held.keys for key in IMAGE_KEYS[:5])):
                split = wanted.choose_split(str(held.path), splits, "train")
                asked = wanted.label_key or label.format(split)
                wanted.unused.discard("label_key")
                if asked not in held.keys and wanted.label_key is not None:
                    wanted.choose_keys(str(held.path), held.keys)
                return image.format(split), asked if wanted.labels and asked in held.keys else None
    return wanted.choose_keys(str(held.path), held.keys, images=_IMAGE_KEYS)


def imagenet_folder(folder: Path, wanted: Wanted) -> Source | None:
    """ImageNet 32 x 32 or 64 x 64 as downloaded, a folder of .npz batches; None if it is not one."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for name in os.listdir(folder):
        match = _NAMES.fullmatch(name)
        if match and match[3] and os.path.isfile(folder / name):
            found.setdefault(match[1], []).append((int(match[2] or 0), folder / name))
    if not found:
        return None
    split = wanted.choose_split(str(folder), sorted(found), "train")
    return joined(str(folder), [npz_file(path, wanted) for _, path in sorted(found[split])])


def npz_shards(folder: Path, wanted: Wanted) -> Source | None:
    """A folder of .npz files and nothing else, such as samples in shards, read in the order of their names."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names or not all(name.endswith(".npz") and os.path.isfile(folder / name) for name in names):
        return None
    return joined(str(folder), [npz_file(folder / name, wanted) for name in names])


def _imagenet_names(folder: Path, labels: np.ndarray) -> np.ndarray | None:
    """Names for labels from 1, where the list that comes with them lies beside; label 0 has none."""
    try:
        lines = (folder / _CLASSES).read_text(encoding="utf-8").splitlines()
        names = {int(line.split()[1]): line.split()[2] for line in lines if line.strip()}
    except (OSError, ValueError, IndexError):
        return None
    top = int(labels.max(initial=0))
    if set(range(1, top + 1)) - set(names) or labels.min(initial=1) < 1:
        return None
    # Two classes of ImageNet are both called crane, and two maillot.
    texts = [names[i] for i in range(1, top + 1)]
    return np.array(
        ["(none)", *(f"{text} ({i})" if texts.count(text) > 1 else text for i, text in enumerate(texts, 1))]
    )


def is_npz(names: Sequence[str]) -> bool:
    """Whether the names in a zip file are those of a .npz file."""
    return any(name.endswith(".npy") and "/" not in name for name in names)
