"""Recognises the kind of a source by its type, its path and its first bytes."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .archives import shards, tar_images, zip_images
from .arrays import array_source, npy_file
from .cifar import FOLDERS, cifar_file, cifar_folder, is_binary_name
from .dataset import dataset, mapping
from .folder import folder
from .idx import has_idx, idx_file, idx_folder, is_idx
from .image import HEIF_SUFFIXES, Encoded, as_numpy, image_formats, opened_image
from .lmdb import is_lmdb, lmdb_file, lmdb_folder
from .npz import imagenet_folder, is_npz, npz_file, npz_shards
from .source import Source, UnreadableImage, Wanted, listed, named
from .tables import parquet_file, parquet_folder, saved_dataset
from .tensors import safetensors_file, torch_file
from .torchvision import FOLDERS as TORCHVISION_FOLDERS
from .torchvision import celeba_folder, has_svhn, stl10_folder, svhn_file, svhn_folder

BUILT_IN = ("fashion-mnist",)
"""Names that `read` takes in place of a path. A folder of the same name is opened as "./fashion-mnist"."""

ROOTS = (*FOLDERS, *TORCHVISION_FOLDERS, "raw", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "EMNIST")
"""Folders that torchvision makes in its root, or in the folder of a data set."""


def opened(source: Any, wanted: Wanted) -> Source:
    """The source as a `Source`; ValueError where it holds no images, TypeError where its type is not supported."""
    found = _opened(source, wanted)
    wanted.check_used(found.name)
    return found


def _opened(source: Any, wanted: Wanted) -> Source:
    if isinstance(source, str) and source in BUILT_IN:
        with resources.as_file(resources.files("patchscore") / "data" / f"{source}.npz") as path:
            return npz_file(path, wanted)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise ValueError("source: got an empty path")
        if "://" in os.fspath(source):
            raise ValueError(f"{source}: an address, takes a file or a folder on this machine; download it first")
        return _path(Path(source), wanted)
    if isinstance(source, (np.ndarray, Tensor)):
        return array_source("source", as_numpy(source))
    if isinstance(source, Image.Image):
        return Source("source", 1, lambda i: (source, None), lambda i: "source")
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
        return _folder(path, wanted)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder; the built-in source is {' or '.join(map(repr, BUILT_IN))}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: neither a file nor a folder")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    return _file(path, start, wanted)


def _folder(path: Path, wanted: Wanted) -> Source:
    """A data set that is recognised by its files, in the folder or alone in one below it, or a tree of images."""
    try:
        below = [child for child in sorted(path.iterdir()) if child.name in ROOTS and _is_data_set(child)]
        if below and has_svhn(path):  # which torchvision unpacks into the root itself
            raise ValueError(
                f"{path}: holds {listed((child.name for child in below), 'and')} and SVHN; open one of them"
            )
        found = _data_set(path, wanted)
        if found is not None:
            return found
        if os.path.isfile(path / "run.json"):
            # A run of `patchscore sample`, with pictures beside its samples.
            if os.path.isfile(path / "samples.zip"):
                return zip_images(path / "samples.zip", wanted)
            if os.path.isdir(path / "samples"):
                return npz_shards(path / "samples", wanted) or folder(path / "samples", wanted)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from error
    if len(below) > 1:
        raise ValueError(f"{path}: holds {listed((child.name for child in below), 'and')}; open one of them")
    return _folder(below[0], wanted) if below else folder(path, wanted)


def _data_set(path: Path, wanted: Wanted) -> Source | None:
    kinds = (
        *(idx_folder, cifar_folder, imagenet_folder, svhn_folder, stl10_folder, celeba_folder),
        *(saved_dataset, lmdb_folder, shards, npz_shards, parquet_folder),
    )
    return next((found for kind in kinds if (found := kind(path, wanted)) is not None), None)


def _is_data_set(path: Path) -> bool:
    """Whether a folder of a known name is one of torchvision's; what is in it is not read."""
    if not path.is_dir():
        return False
    if path.name in (*FOLDERS, *TORCHVISION_FOLDERS):
        return True
    return has_idx(path) or has_idx(path / "raw")


def _file(path: Path, start: bytes, wanted: Wanted) -> Source:
    suffix = path.suffix.lower()
    if start[:6] == b"\x93NUMPY":
        return npy_file(path, wanted)
    if start[:2] == b"PK":
        with named(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.rsplit("/", 1)[-1] == "data.pkl" for name in names):
            return torch_file(path, wanted)
        return npz_file(path, wanted) if is_npz(names) else zip_images(path, wanted)
    if start[:2] == b"\x1f\x8b":
        with named(path), gzip.open(path) as file:
            inside = file.read(4)
        return idx_file(path, wanted) if is_idx(inside) or inside[:2] == b"\0\0" else tar_images(path, wanted)
    if start[257:262] == b"ustar" or start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\0" or suffix == ".tar":
        return tar_images(path, wanted)
    if start[:7] == b"MATLAB ":
        return svhn_file(path, wanted)
    if start[:4] == b"PAR1":
        return parquet_file(path, wanted)
    if suffix == ".safetensors":
        return safetensors_file(path, wanted)
    if suffix in (".pt", ".pth"):
        return torch_file(path, wanted)
    if is_lmdb(start):
        return lmdb_file(path, wanted)
    if start[:1] == b"\x80" or is_binary_name(path.name):
        return cifar_file(path, wanted)
    if suffix not in image_formats()[0] and start[:2] == b"\0\0" and start[4:8] != b"ftyp":
        return idx_file(path, wanted)
    return _one_image(path, wanted)


def _one_image(path: Path, wanted: Wanted) -> Source:
    """An image file on its own."""
    try:
        opened_image(path, str(path)).close()
    except UnreadableImage as error:
        if path.suffix.lower() in image_formats()[0]:
            raise ValueError(str(error)) from error
        if path.suffix.lower() in HEIF_SUFFIXES:
            raise ImportError(f"{path}: HEIC needs pillow-heif: pip install 'patchscore[heif]'") from error
        raise ValueError(
            f"{path}: takes an image, a folder or an archive of images, or a file of arrays, tensors or a table; this "
            f"is none that is known"
        ) from error
    return Source(str(path), 1, lambda i: (Encoded(path), None), lambda i: str(path))
