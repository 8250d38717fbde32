"""SVHN, STL-10 and CelebA as downloaded, which is as torchvision leaves them in its root.

SVHN is MATLAB files with a label of 10 for the digit 0; STL-10 is binary, its images column by column, its labels from
1; CelebA is a folder of JPEG files beside text files, with a line an image, of splits, identities and attributes.
Labels are those that torchvision gives.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import labelled_array
from .image import Encoded
from .matlab import mat_file
from .source import Source, Wanted, listed, named

FOLDERS = ("stl10_binary", "celeba")
"""Those that torchvision makes in its root; SVHN's files lie in the root itself."""

MOST_TEXT_BYTES = 1 << 28

# SVHN.

_SVHN = re.compile(r"(train|test|extra)_32x32\.mat")


def has_svhn(folder: Path) -> bool:
    """Whether a folder holds SVHN's files of cropped digits."""
    return any(_SVHN.fullmatch(name) for name in os.listdir(folder))


def svhn_folder(folder: Path, wanted: Wanted) -> Source | None:
    """A folder with SVHN's files of cropped digits; None if it is not one."""
    names = {match[1]: name for name in sorted(os.listdir(folder)) if (match := _SVHN.fullmatch(name))}
    if not names:
        return None
    return svhn_file(folder / names[wanted.choose_split(str(folder), names, "train")], wanted)


def svhn_file(path: Path, wanted: Wanted) -> Source:
    """A MATLAB file; in those of SVHN the label 10 stands for 0."""
    return mat_file(path, wanted, zero=10 if _SVHN.fullmatch(path.name) else None)


# STL-10.

_STL_SPLITS = {"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin")}
_STL_SHAPE = (3, 96, 96)


def stl10_folder(folder: Path, wanted: Wanted) -> Source | None:
    """A folder with STL-10's binary files; None if it is not one."""
    files: dict[str, tuple[str, str | None]] = {**_STL_SPLITS, "unlabeled": ("unlabeled_X.bin", None)}
    held = [split for split, (images, _) in files.items() if os.path.isfile(folder / images)]
    if not held:
        return None
    images_name, labels_name = files[wanted.choose_split(str(folder), held, "train")]
    path = folder / images_name
    with named(path):
        size, each = os.path.getsize(path), math.prod(_STL_SHAPE)
        if not size or size % each:
            raise ValueError(f"{size} bytes, takes whole images of {each}")
        # A colour is stored column by column.
        images = np.memmap(path, np.uint8, "r").reshape(-1, *_STL_SHAPE).transpose(0, 1, 3, 2)
    labels = names = None
    if wanted.labels and labels_name is not None and os.path.isfile(folder / labels_name):
        with named(folder / labels_name):
            labels = np.fromfile(folder / labels_name, np.uint8).astype(np.int64) - 1
            if len(labels) != len(images):
                raise ValueError(f"{len(labels)} labels for {len(images)} images")
        if os.path.isfile(folder / "class_names.txt"):
            names = _text(folder / "class_names.txt").split()
    return labelled_array(str(path), images, labels, names)


# CelebA.

_CELEBA_IMAGES = "img_align_celeba"
_CELEBA_SPLITS = {"0": "train", "1": "valid", "2": "test"}


def celeba_folder(folder: Path, wanted: Wanted) -> Source | None:
    """The aligned faces of CelebA, of the split of list_eval_partition.txt; None if it is not its folder.

    `label_key` names the labels: "identity", or an attribute such as "Smiling", 0 or 1; without there are none.
    """
    pictures = folder / _CELEBA_IMAGES
    if not (os.path.isdir(pictures) and os.path.isfile(folder / "list_attr_celeba.txt")):
        return None
    names = sorted(name for name in os.listdir(pictures) if name.lower().endswith((".jpg", ".png")))
    if os.path.isfile(folder / "list_eval_partition.txt"):
        split_of = {name: _CELEBA_SPLITS.get(of) for name, of in _lines(folder / "list_eval_partition.txt", 2)}
        held = [split for split in _CELEBA_SPLITS.values() if split in split_of.values()]
        if not held:
            raise ValueError(f"{folder / 'list_eval_partition.txt'}: has no line of an image and 0, 1 or 2")
        split = wanted.choose_split(str(folder), held, "train")
        names = [name for name in names if split_of.get(name) == split]
    labels, class_names = _celeba_labels(folder, names, wanted) if names else (None, None)

    def item(i: int) -> tuple[Any, Any]:
        return Encoded(pictures / names[i]), None if labels is None else int(labels[i])

    threads = min(8, os.cpu_count() or 1)
    return Source(str(folder), len(names), item, lambda i: str(pictures / names[i]), labels, class_names, threads)


def _celeba_labels(folder: Path, names: list[str], wanted: Wanted) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    wanted.unused.discard("label_key")
    key = wanted.label_key
    if key is None or not wanted.labels:
        return None, None
    if key == "identity":
        path = folder / "identity_CelebA.txt"
        with named(path):
            known = {name: int(of) for name, of in _lines(path, 2)}
        classes = None
    else:
        path = folder / "list_attr_celeba.txt"
        with named(path):
            _, head, *rows = _text(path).splitlines() or ["", ""]
            attributes = head.split()
            if key not in attributes:
                raise ValueError(f"label_key: got {key!r}, takes {listed(['identity', *attributes])}")
            column = 1 + attributes.index(key)
            known = {parts[0]: int(int(parts[column]) > 0) for row in rows if (parts := row.split())}
        classes = (f"not {key}", key)
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"{path}: has no line for {missing}")
    return np.array([known[name] for name in names], dtype=np.int64), classes


def _lines(path: Path, columns: int) -> list[list[str]]:
    """Words of the lines that have as many."""
    with named(path):
        found = [line.split() for line in _text(path).splitlines()]
        return [words for words in found if len(words) == columns]


def _text(path: Path) -> str:
    with named(path):
        if os.path.getsize(path) > MOST_TEXT_BYTES:
            raise ValueError(f"takes at most {MOST_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8", errors="replace")
