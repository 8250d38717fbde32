"""A tree of image files, in a folder or in an archive: which files are images, and what their paths say of labels.

Labels come from dataset.json where there is one (EDM, StyleGAN), else from the first level of folders. A level of
splits (train, val, test) above the classes is no level of classes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import parse_json
from .image import HEIF_SUFFIXES, Encoded, image_formats
from .source import Source, Wanted, listed, named, printable

Parts = tuple[str, ...]

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
"""Names of folders, in lower case, that are taken for splits and not for classes."""

MOST_CLASSES = 100_000
"""Folders named by larger numbers (dates, say) are numbered in order; their numbers are no labels."""

MOST_JSON_BYTES = 1 << 28


@dataclass(frozen=True)
class Tree:
    """Visible files by their paths below the root, in order; `folders` are all visible folders, empty ones too."""

    name: str
    files: Sequence[Parts]
    folders: Sequence[Parts]
    encoded: Callable[[Parts], Path | BinaryIO]
    threads: int = 1

    def path(self, parts: Parts) -> str:
        return str(Path(self.name, *parts))

    def below(self, *top: str) -> Tree:
        """The tree under one of its folders."""
        n = len(top)
        return Tree(
            self.path(top),
            [parts[n:] for parts in self.files if parts[:n] == top],
            [parts[n:] for parts in self.folders if parts[:n] == top and len(parts) > n],
            lambda parts: self.encoded(top + parts),
            self.threads,
        )


def tree_source(tree: Tree, wanted: Wanted) -> Source:
    """The images of a tree, with labels by its dataset.json or its folders."""
    images = [parts for parts in tree.files if is_image(parts)]
    top = _only_top(tree, images)
    if top is not None:
        return tree_source(tree.below(top), wanted)
    if ("dataset.json",) not in tree.files:
        splits = sorted({parts[0] for parts in images if len(parts) > 1})
        if images and all(name.lower() in SPLITS for name in splits) and all(len(parts) > 1 for parts in images):
            return tree_source(tree.below(wanted.choose_split(tree.name, splits)), wanted)
    _warn_of_others(tree, images)
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    if wanted.labels and images:
        if ("dataset.json",) in tree.files:
            labels = _labels_of_json(tree, images)
        else:
            labels, class_names = _labels_of_folders(tree, images)

    def item(i: int) -> tuple[Encoded, int | None]:
        return Encoded(tree.encoded(images[i])), None if labels is None else int(labels[i])

    return Source(tree.name, len(images), item, lambda i: tree.path(images[i]), labels, class_names, tree.threads)


def is_image(parts: Parts) -> bool:
    """Whether a file has the suffix of a format that is decoded here."""
    return Path(parts[-1]).suffix.lower() in image_formats()[0]


def _only_top(tree: Tree, images: Sequence[Parts]) -> str | None:
    """The one folder that holds everything, as archives often have, where the classes are below it."""
    tops = {parts[0] for parts in images if len(parts) > 1}
    if len(tops) != 1 or any(len(parts) == 1 for parts in images):
        return None
    top = next(iter(tops))
    if top.lower() in SPLITS or ("dataset.json",) in tree.files:
        return None
    second = {parts[1] for parts in images if len(parts) > 2}
    whole = all(len(parts) > 2 for parts in images) and len(second) > 1
    return top if whole or (top, "dataset.json") in tree.files else None


def _warn_of_others(tree: Tree, images: Sequence[Parts]) -> None:
    taken = set(images) | {("dataset.json",)}
    counts = Counter(Path(parts[-1]).suffix.lower() or parts[-1] for parts in tree.files if parts not in taken)
    if not counts:
        return
    shown = listed((f"{number} {suffix}" for suffix, number in counts.most_common()), "and")
    hint = ""
    if any(suffix in counts for suffix in HEIF_SUFFIXES):
        hint = "; pip install 'patchscore[heif]' reads HEIC"
    _warn(f"{tree.name}: left out: {shown}{hint}")


def _warn(text: str) -> None:
    # At the line that calls PatchBank.open with a folder or an archive.
    warnings.warn(printable(text), stacklevel=12)


# Labels.


def _labels_of_folders(tree: Tree, images: Sequence[Parts]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    loose = [parts for parts in images if len(parts) == 1]
    if loose:
        if len(loose) < len(images):
            _warn(f"{tree.name}: no labels, as {loose[0][0]} and others lie directly in it")
        return None, None
    folders = {parts[0] for parts in tree.folders} | {parts[0] for parts in images}
    empty = sorted(folders - {parts[0] for parts in images})
    if empty:
        _warn(f"{tree.name}: no images of class {listed(empty, 'and')}")
    numbers = {name: int(name) for name in folders if name.isascii() and name.isdecimal()}
    ordered = sorted(folders, key=lambda name: (numbers.get(name, 0), name) if len(numbers) == len(folders) else name)
    number = {name: i for i, name in enumerate(ordered)}
    class_names: list[str] = list(ordered)
    # A folder named by a number has that label, so that the number means one thing.
    if len(numbers) == len(folders) == len(set(numbers.values())) and max(numbers.values()) < MOST_CLASSES:
        number = numbers
        class_names = [str(i) for i in range(max(numbers.values()) + 1)]
        for name, i in numbers.items():
            class_names[i] = name
    return np.array([number[parts[0]] for parts in images], dtype=np.int64), tuple(class_names)


def _labels_of_json(tree: Tree, images: Sequence[Parts]) -> np.ndarray | None:
    """{"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}; a label may be one-hot."""
    path = tree.path(("dataset.json",))
    with named(path):
        content = read_json(tree.encoded(("dataset.json",)))
        if not isinstance(content, dict):
            raise ValueError("takes an object with labels")
        entries = content.get("labels")
        if entries is None:
            return None
        pairs = list(entries.items()) if isinstance(entries, dict) else entries
        if not isinstance(pairs, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            raise ValueError("labels: takes [file name, label] for each image")
        known = {name.replace("\\", "/"): label for name, label in pairs}
        missing = next((parts for parts in images if "/".join(parts) not in known), None)
        if missing is not None:
            raise ValueError(f"no label for {'/'.join(missing)}; or pass labels=False")
        return integers([known["/".join(parts)] for parts in images], len(images))


def read_json(file: Path | BinaryIO) -> Any:
    """What is in a JSON file of reasonable size; ValueError if it is none."""
    return parse_json(file.read_bytes() if isinstance(file, Path) else file.read(MOST_JSON_BYTES))


def integers(labels: Any, count: int) -> np.ndarray:
    """[N] int64 of labels [N], [N, 1] or one-hot [N, K]; ValueError for any others."""
    try:
        array = np.asarray(labels)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "iuf" and array.ndim == 2 and len(array) == count and array.shape[1] > 1:
        if ((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all():
            array = array.argmax(1)
        else:
            raise ValueError(
                f"labels of shape {list(array.shape)} that are not one-hot, takes one label for each image; or pass "
                f"labels=False"
            )
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,):
        raise ValueError(f"labels of shape {list(array.shape)}, takes one for each of {count} images")
    if array.dtype.kind not in "iu" or (count and array.max() > np.iinfo(np.int64).max):
        raise ValueError(f"labels of dtype {array.dtype}, takes integers; or pass labels=False")
    return array.astype(np.int64)
