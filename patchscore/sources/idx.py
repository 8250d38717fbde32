"""IDX files, as MNIST and Fashion-MNIST are distributed, plain or gzipped.

An IDX file is two zero bytes, a type, the number of axes, each axis as a big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import os
import re
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .arrays import array_source
from .rows import Rows
from .source import Source, Wanted, listed, named
from .tree import integers

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DEFLATE_RATIO = 1032
"""What deflate can shrink at most; a gzipped header that declares more than this is wrong before reading on."""


_SPLITS = {"train": "train", "test": "t10k"}


def has_idx(folder: Path) -> bool:
    """Whether a folder holds IDX files of images."""
    return os.path.isdir(folder) and any(
        re.search(r"images[-.]idx3-ubyte(\.gz)?$", name) for name in os.listdir(folder)
    )


def idx_folder(folder: Path, wanted: Wanted) -> Source | None:
    """The images of a folder that holds MNIST's files; None if it does not."""
    found = _images_in(folder)
    if found:
        return idx_file(found[wanted.choose_split(str(folder), found, "train")], wanted)
    emnist = {
        f"{match[1]}-{match[2]}": folder / name
        for name in sorted(os.listdir(folder), reverse=True)
        if (match := re.fullmatch(r"emnist-(\w+)-(train|test)-images-idx3-ubyte(?:\.gz)?", name))
    }
    if emnist:
        # Six divisions of the same characters, each with its own labels: none is the usual one.
        kinds = {split.rpartition("-")[0] for split in emnist}
        usual = f"{kinds.pop()}-train" if len(kinds) == 1 else None
        return idx_file(emnist[wanted.choose_split(str(folder), sorted(emnist), usual)], wanted)
    others = sorted(name for name in os.listdir(folder) if re.search(r"images[-.]idx3-ubyte(\.gz)?$", name))
    if others:
        raise ValueError(f"{folder}: holds {listed(others, 'and')}; open one of them")
    return None


def _images_in(folder: Path) -> dict[str, Path]:
    """The files of images of each split."""
    found = {}
    for split, prefix in _SPLITS.items():
        names = (f"{prefix}-images{mark}idx3-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz"))
        path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
        if path is not None:
            found[split] = path
    return found


def idx_file(path: Path, wanted: Wanted) -> Source:
    """The images of one file, with the labels of the file beside it by the MNIST naming (images-idx3, labels-idx1)."""
    images = _values(path)
    if images.ndim not in (3, 4):
        raise ValueError(f"{path}: IDX of {images.ndim} axes, images take 3 or 4")
    label_path = _labels_beside(path) if wanted.labels else None
    if label_path is None:
        return array_source(str(path), images, gray=True)
    with named(label_path):
        held = _values(label_path)
        wanted.check_memory(str(label_path), math.prod(held.shape) * held.dtype.itemsize)
        labels = integers(held.whole(), len(images))
    return array_source(str(path), images, labels, gray=True)


def _labels_beside(path: Path) -> Path | None:
    name, found = re.subn(r"images([-.])idx\d", r"labels\1idx1", path.name.removesuffix(".gz"))
    candidates = [path.with_name(name + suffix) for suffix in ("", ".gz")] if found else []
    if path.suffix == ".gz":
        candidates.reverse()
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _values(path: Path) -> Rows:
    with named(path):
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"

        def reopen() -> BinaryIO:
            return cast(BinaryIO, gzip.open(path, "rb") if zipped else open(path, "rb"))

        with reopen() as file:
            shape, dtype = _header(file)
            start = 4 + 4 * len(shape)
        declared = math.prod(shape) * dtype.itemsize
        held = os.path.getsize(path)
        if declared > held * (_DEFLATE_RATIO if zipped else 1):
            raise ValueError(
                f"IDX header declares {declared} bytes of values {list(shape)}, more than the file can hold"
            )
        if not zipped and held != start + declared:
            how = "is cut short" if held < start + declared else "goes on after its values"
            raise ValueError(f"IDX file {how}: {held - start} of {declared} bytes of values {list(shape)}")
    return Rows(reopen, start, shape, dtype)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\x00\x00" or magic[2] not in _TYPES or not magic[3]:
        raise ValueError(f"not an IDX file (it starts with {magic.hex(' ') or 'nothing'})")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError("IDX header is cut short")
    return tuple(int(n) for n in np.frombuffer(header, dtype=">u4")), np.dtype(_TYPES[magic[2]])


def is_idx(start: bytes) -> bool:
    """Whether bytes begin as an IDX file does."""
    return len(start) >= 4 and start[:2] == b"\0\0" and start[2] in _TYPES and 1 <= start[3] <= 8
