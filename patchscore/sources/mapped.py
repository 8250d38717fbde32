"""Images in a .npy file as a read-only memory map: pages are read as they are touched, and never copied.

A map stands for its file, so it is held to it. A file that changes while it is mapped is an error that names it; a map
is pickled as its path; and what takes a pass over the file (hash, range) is remembered beside it, in a file of its own
that can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import load_npy, parse_json, read_record, unsealed, write_record

SAMPLES = 64
"""Blocks of a file, evenly spread, that are hashed to tell whether its content is what was remembered."""

SAMPLE_BYTES = 4096
"""A page: what one block costs to read."""

REMEMBERED = "patchscore-remembered"


def beside(path: Path, ending: str) -> Path:
    """bank.npy -> bank.labels.npy: where something about a file of images lies."""
    return path.with_name(path.name.removesuffix(".npy") + ending)


def labels_beside(path: Path) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels in `bank.labels.npy` and class names in `bank.classes.json`, where they lie beside `bank.npy`."""
    labels, classes = beside(path, ".labels.npy"), beside(path, ".classes.json")
    if path.name.endswith(".labels.npy") or not labels.is_file():
        return None, None
    try:
        found = load_npy(labels)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ValueError("takes one integer for each image")
    except (OSError, ValueError) as error:
        raise ValueError(f"{labels}: {error}") from error
    if not classes.is_file():
        return found, None
    try:
        names = parse_json(classes.read_bytes())
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("takes a list of texts")
    except (OSError, ValueError) as error:
        raise ValueError(f"{classes}: {error}") from error
    return found, names


class Mapped:
    """Images [N, C, H, W] in a file, uint8 or float32, mapped read-only.

    Attributes:
        path: the file, absolute.
        images: the map as a tensor. Writing to it ends the process: there is no memory behind it but the file.

    Raises:
        ValueError: the file is shorter than the images.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, shape: tuple[int, ...], dtype: str):
        self.path, self.offset, self.shape, self.dtype = Path(os.path.abspath(path)), offset, tuple(shape), dtype
        # Held open, so that whatever takes the place of this file is told from a change of it.
        self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._stamp()
        needed = offset + math.prod(self.shape) * np.dtype(dtype).itemsize
        if self._state[0] < needed:
            raise ValueError(f"{self.path}: cut short: {self._state[0]} bytes, its images take {needed}")
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            array = np.memmap(file, np.dtype(dtype), "r", offset, self.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            self.images: Tensor = torch.from_numpy(array)

    @classmethod
    def of(cls, array: Any) -> Mapped | None:
        """The map that a read-only `numpy.memmap` is, or a contiguous part of one; None for any other array."""
        if not isinstance(array, np.memmap) or array.mode != "r" or array.filename is None:
            return None
        if array.ndim != 4 or 0 in array.shape or not array.flags.c_contiguous:
            return None
        if array.dtype not in (np.uint8, np.float32) or not array.dtype.isnative:
            return None
        # `offset` is the one of the memmap that this is a part of; addresses tell where the part begins.
        if (held := getattr(array, "_mmap", None)) is None:
            return None
        whole = np.frombuffer(held, np.uint8)
        page = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        offset = page + array.ctypes.data - whole.ctypes.data
        if not page <= offset <= page + len(whole) - array.nbytes:
            return None  # of another array of this class, such as a copy
        return cls(array.filename, offset, array.shape, array.dtype.str)

    def _stamp(self) -> tuple[int, int]:
        """Size and time of the last change."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """ValueError where the file has changed since it was mapped."""
        if self._stamp() != self._state:
            raise ValueError(f"{self.path}: was changed while it was mapped; open the bank again")

    @property
    def nbytes(self) -> int:
        """Of the images."""
        return self.images.nbytes

    # What a pass over the file finds, remembered.

    def sample(self) -> str:
        """sha256 of SAMPLES blocks of the images, the first and the last among them."""
        flat = self.images.numpy().reshape(-1).view(np.uint8)
        last = max(0, len(flat) - SAMPLE_BYTES)
        digest = hashlib.sha256(f"{self.dtype} {self.shape}".encode())
        for i in range(SAMPLES):
            start = last * i // (SAMPLES - 1)
            digest.update(flat[start : start + SAMPLE_BYTES].tobytes())
        return digest.hexdigest()

    def extremes(self) -> tuple[float, float]:
        """The least and the largest value, NaN where some is; from a pass over the file that is remembered."""

        def find() -> list[float]:
            step = max(1, (1 << 24) // self.images[0].nbytes)
            parts = [torch.aminmax(self.images[at : at + step]) for at in range(0, len(self.images), step)]
            least, largest = (torch.stack(ends) for ends in zip(*parts, strict=True))
            return [least.amin().item(), largest.amax().item()]

        low, high = self.remembered("range", find)
        return float(low), float(high)

    def remembered(self, what: str, find: Callable[[], Any]) -> Any:
        """`find()`, or what it found the last time this file, by size, time and a sample, was the same.

        It is kept in `bank.remembered.json` beside `bank.npy`; where that cannot be written, it is found each time.
        """
        path = beside(self.path, ".remembered.json")
        about = {"bytes": self._state[0], "modified": self._state[1], "offset": self.offset, "sample": self.sample()}
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            record = unsealed(read_record(path, REMEMBERED, 1))
            if {name: record.get(name) for name in about} == about and isinstance(record.get("found"), dict):
                known = record["found"]
        if what not in known:
            known[what] = find()
            self.check()
            with suppress(OSError):
                write_record(path, REMEMBERED, 1, {**about, "found": known}, seal=True)
        return known[what]

    # Pickles hold the path.

    def __reduce__(self) -> tuple[Any, ...]:
        self.check()
        return _reopened, (str(self.path), self.offset, self.shape, self.dtype, self._state, self.sample())


def _reopened(
    path: str, offset: int, shape: tuple[int, ...], dtype: str, state: tuple[int, int], sample: str
) -> Mapped:
    """The map of a pickle; ValueError where the file at its path is another one by now."""
    try:
        found = Mapped(path, offset, shape, dtype)
    except OSError as error:
        raise ValueError(f"{path}: the mapped file of a pickled bank: {error.strerror or error}") from error
    if found._state[0] != state[0] or (found._state[1] != state[1] and found.sample() != sample):
        raise ValueError(f"{path}: was changed since the bank that maps it was pickled; open the bank again")
    return found
