"""Dataset objects: anything indexed, iterated or keyed by column whose items are images, pairs or dicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from .arrays import labelled_array
from .image import as_numpy, file_or_array, laid_out
from .source import IMAGE_KEYS, LABEL_KEYS, Source, UnreadableImage, Wanted, listed, unreadable
from .tree import integers


def dataset(source: Any, wanted: Wanted) -> Source:
    """A dataset with `__len__` and `__getitem__`, or any other iterable, of which the first `limit` items are read."""
    if isinstance(source, DataLoader):
        raise TypeError("source: got a DataLoader, takes its dataset: pass loader.dataset")
    indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)
    if not indexed:
        if wanted.limit is None:
            raise ValueError(
                f"limit: got None, takes a number of images, as a {type(source).__name__} is read from its start and "
                f"may have no end"
            )
        return _items(_Stream(source, wanted.limit), source, wanted)
    return _items(source, source, wanted)


def mapping(source: Mapping[Any, Any], wanted: Wanted) -> Source:
    """A dict of arrays {"images": ..., "labels": ...}, of columns, or of splits."""
    name = f"source ({type(source).__name__})"
    splits = [key for key, value in source.items() if hasattr(value, "column_names")]
    if splits:
        return dataset(source[wanted.choose_split(name, map(str, splits))], wanted)
    image_key, label_key = wanted.choose_keys(name, list(map(str, source)))
    images, labels = source[image_key], None if label_key is None else source[label_key]
    names = source.get("class_names") if labels is not None else None
    if isinstance(images, (np.ndarray, Tensor)):
        labels = as_numpy(labels) if isinstance(labels, (np.ndarray, Tensor)) else labels
        return labelled_array(name, as_numpy(images), labels, names)
    if labels is None:
        return dataset(images, wanted)
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images and {len(labels)} labels")
    return dataset(list(zip(images, labels, strict=True)), wanted)


class _Stream:
    """The first `limit` items of an iterable, each asked for once and in turn."""

    def __init__(self, source: Iterable[Any], limit: int):
        self.items: list[Any] = []
        self.rest = itertools.islice(iter(source), limit)
        self.limit = limit
        # Nothing says how many there are before they have been read.
        for item in tqdm(self.rest, desc="reading items", unit="image", delay=2, disable=None, leave=False):
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def _items(items: Any, source: Any, wanted: Wanted) -> Source:
    count = len(items)
    wanted.unused -= {"image_key", "label_key"}

    def item(i: int) -> tuple[Any, Any]:
        try:
            entry = items[i]
        except Exception as error:
            raise unreadable(f"source[{i}]", error) from error
        image, label = _image_and_label(entry, i, wanted)
        if isinstance(image, bytes) or (isinstance(image, Mapping) and "bytes" in image):
            image = file_or_array(image, f"source[{i}]")  # Hugging Face's Image(decode=False)
        elif isinstance(image, (np.ndarray, Tensor)):
            image = laid_out(as_numpy(image), f"source[{i}]")
        return image, _one_label(label) if wanted.labels and label is not None else None

    known: np.ndarray | None = None
    class_names = _class_names(source, wanted) if wanted.labels else None
    if wanted.labels and wanted.limit is not None and wanted.limit < count:
        found = _labels_without_images(items, count, wanted)
        if found is None:
            found = _labels_of_items(item, count)
        if found is not None and found.dtype.kind == "U":
            names, known = np.unique(found, return_inverse=True)
            class_names = tuple(names.tolist())
        else:
            known = found
    return Source(f"source ({type(source).__name__})", count, item, lambda i: f"source[{i}]", known, class_names)


def _image_and_label(entry: Any, i: int, wanted: Wanted) -> tuple[Any, Any]:
    if isinstance(entry, Mapping):
        image_key = wanted.image_key or next((key for key in IMAGE_KEYS if key in entry), None)
        label_key = wanted.label_key or next((key for key in LABEL_KEYS if key in entry), None)
        if image_key is None or image_key not in entry:
            takes = f"one with {image_key or listed(IMAGE_KEYS[:4])}"
            raise TypeError(f"source[{i}]: got a dict of {list(entry)[:8]}, takes {takes}; or pass image_key=")
        if wanted.label_key is not None and label_key not in entry:
            raise TypeError(f"source[{i}]: label_key: got {label_key!r}, the dict has {listed(entry)}")
        return entry[image_key], None if label_key is None else entry[label_key]
    if isinstance(entry, (tuple, list)):
        if len(entry) not in (1, 2):
            raise TypeError(f"source[{i}]: got {len(entry)} things, takes an image or (image, label)")
        return entry[0], entry[1] if len(entry) == 2 else None
    return entry, None


def _one_label(label: Any) -> Any:
    """A label as it came, or the class of a one-hot one."""
    if isinstance(label, (list, tuple, np.ndarray, Tensor)) and np.ndim(label) == 1 and len(label) > 1:
        return int(integers(np.asarray(label)[None], 1)[0])
    return label


def _labels_without_images(source: Any, count: int, wanted: Wanted) -> np.ndarray | None:
    """Labels that torchvision and Hugging Face datasets have at hand, None where every item must be asked."""
    try:
        held = getattr(source, "column_names", ())
        column = wanted.label_key or next((key for key in LABEL_KEYS if key in held), None)
        if column is not None:
            found = np.asarray(list(source[column]))
        elif getattr(source, "target_transform", None) is None:
            found = np.asarray(source.targets)
        else:
            return None
    except Exception:
        return None
    if found.shape != (count,) or found.dtype.kind not in "iuU":
        return None
    return found if found.dtype.kind == "U" else found.astype(np.int64)


def _labels_of_items(item: Callable[[int], tuple[Any, Any]], count: int) -> np.ndarray | None:
    found: list[Any] = [None] * count
    for i in tqdm(range(count), desc="reading labels", unit="image", delay=2, disable=None, leave=False):
        try:
            found[i] = item(i)[1]
        except UnreadableImage:
            continue  # It is met again, and reported, if its turn comes to be taken.
        if found[i] is None:
            return None
    good = next((label for label in found if label is not None), None)
    try:
        labels = np.asarray([good if label is None else label for label in found])
    except (ValueError, OverflowError):
        return None
    return labels if labels.shape == (count,) and labels.dtype.kind in "iuU" else None


def _class_names(source: Any, wanted: Wanted) -> tuple[str, ...] | None:
    """From torchvision's `classes`, Hugging Face's features, or, for a subset, from the dataset that it is part of."""
    keys = LABEL_KEYS if wanted.label_key is None else (wanted.label_key,)
    for _ in range(8):
        names = getattr(source, "classes", None)
        features = getattr(source, "features", None)
        if isinstance(features, Mapping):
            column = next((features[key] for key in keys if key in features), None)
            names = getattr(column, "names", names)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        source = getattr(source, "dataset", None)
    return None
