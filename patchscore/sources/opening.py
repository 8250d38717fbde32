"""Which kind of source something is, by its type, its place and its first bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .arrays import array_source, numpy_file
from .dataset import dataset, mapping
from .folder import folder
from .idx import idx_file, idx_folder
from .image import as_numpy
from .source import Source, Wanted

BUILT_IN = ("fashion-mnist",)
"""Names that `read` takes in place of a path. A folder of the same name is opened as "./fashion-mnist"."""


def opened(source: Any, wanted: Wanted) -> Source:
    """The source as a `Source`; ValueError where it holds no images, TypeError where it is of a kind not taken."""
    found = _opened(source, wanted)
    wanted.check_used(found.name)
    return found


def _opened(source: Any, wanted: Wanted) -> Source:
    if isinstance(source, str) and source in BUILT_IN:
        with resources.as_file(resources.files("patchscore") / "data" / f"{source}.npz") as path:
            return numpy_file(path, wanted)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise ValueError("source: got an empty path")
        if "://" in os.fspath(source):
            raise ValueError(f"{source}: an address, takes a file or a folder on this machine; download it first")
        return _path(Path(source), wanted)
    if isinstance(source, (np.ndarray, Tensor)):
        return array_source("source", as_numpy(source))
    if isinstance(source, Mapping):
        return mapping(source, wanted)
    if isinstance(source, (bytes, bytearray, set, frozenset)) or not (
        isinstance(source, Iterable) or hasattr(source, "__getitem__")
    ):
        raise TypeError(
            f"source: got {type(source).__name__}, takes a path, an array, a dict of arrays or columns, a dataset, "
            f"an iterable, or {' or '.join(map(repr, BUILT_IN))}"
        )
    return dataset(source, wanted)


def _path(path: Path, wanted: Wanted) -> Source:
    if os.path.isdir(path):
        return idx_folder(path, wanted) or folder(path, wanted)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder; the built-in source is {' or '.join(map(repr, BUILT_IN))}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: neither a file nor a folder")
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if start[:2] == b"\x1f\x8b" or start[:2] == b"\x00\x00":
        return idx_file(path, wanted)
    if start == b"\x93NUMPY" or start[:2] == b"PK":
        return numpy_file(path, wanted)
    raise ValueError(f"{path}: takes a folder of images, or a .npy, .npz or IDX file, and this is none of them")
