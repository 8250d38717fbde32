"""Arrays of numbers in MATLAB files of version 5 (save -v6, -v7), read forwards, as SVHN comes in.

The layout is that of MathWorks' "MAT-File Format": after 128 bytes a sequence of elements, each a type, a number of
bytes and those bytes; a variable is an element of elements (flags, axes, name, values), or that compressed by zlib.
Values are in Fortran order, so that an array [H, W, C, N] holds one image after the other.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from .arrays import labelled_array
from .rows import Rows
from .source import Source, Wanted, named

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {4: "text", 1: "a cell array", 2: "a structure", 3: "an object", 5: "a sparse array"}
_MOST_NAME_BYTES, _MOST_AXES, _MOST_VARIABLES = 1024, 32, 10_000
_DEFLATE_RATIO = 1032
"""What deflate can shrink at most."""


@dataclass(frozen=True)
class _Variable:
    """An array, or what else there is under a name; `start` counts bytes of the element, inflated."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    bytes: int
    offset: int
    packed: int


def mat_file(path: Path, wanted: Wanted, zero: int | None = None) -> Source:
    """Images X [H, W, C, N] and labels y of a MATLAB file.

    Args:
        zero: a label that stands for 0, such as SVHN's 10.
    """
    with named(path):
        held = {variable.name: variable for variable in _variables(path)}
        image_key, label_key = wanted.choose_keys(str(path), list(held), ("X", "images"), ("y", "labels"))
        shape = held[image_key].shape
        if held[image_key].kind != "numbers":
            raise ValueError(f"{image_key} is {held[image_key].kind}, takes an array of numbers")
        if len(shape) != 4 or shape[2] not in (1, 3):
            raise ValueError(f"{image_key} has shape {list(shape)}, takes [H, W, C, N]")
        images = _rows(path, held[image_key], shape[::-1])
        labels = None
        if label_key is not None:
            count = math.prod(held[label_key].shape)
            wanted.check_memory(str(path), 8 * count)
            labels = _rows(path, held[label_key], (count,)).whole()
            if labels.dtype.kind == "f" and (labels == labels.round()).all():
                labels = labels.astype(np.int64)  # doubles are MATLAB's usual numbers
            labels = labels if zero is None else np.where(labels == zero, 0, labels)
        source = labelled_array(str(path), images, labels)

    def item(i: int) -> tuple[Any, Any]:
        image, label = source.item(i)
        return image.transpose(0, 2, 1), label

    return replace(source, item=item)


def _rows(path: Path, of: _Variable, shape: tuple[int, ...]) -> Rows:
    if of.kind != "numbers":
        raise ValueError(f"{of.name} is {of.kind}, takes an array of numbers")
    if math.prod(shape) * of.dtype.itemsize != of.bytes:
        raise ValueError(f"{of.name} of shape {list(of.shape)} declares {of.bytes} bytes of {of.dtype}")
    if of.bytes > _DEFLATE_RATIO * max(1, os.path.getsize(path)):
        raise ValueError(f"{of.name} declares {of.bytes} bytes, more than the file can hold")

    def reopen() -> BinaryIO:
        stream = _Stream(path, of.offset, of.packed)
        stream.skip(of.start)
        stream.left = of.bytes
        return cast(BinaryIO, stream)

    return Rows(reopen, 0, shape, of.dtype)


def _variables(path: Path) -> Iterator[_Variable]:
    """The variables of a file, of which only the descriptions are read."""
    with open(path, "rb") as file:
        header = file.read(_HEADER)
    if header[:10] == b"MATLAB 7.3":
        raise ValueError("is an HDF5 file of MATLAB 7.3; save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    if len(header) < _HEADER or order is None:
        raise ValueError("not a MATLAB file of version 5")
    offset, size = _HEADER, os.path.getsize(path)
    for _ in range(_MOST_VARIABLES):
        if offset + 8 > size:
            return
        with open(path, "rb") as file:
            file.seek(offset)
            kind, count = struct.unpack(f"{order}2I", file.read(8))
        offset += 8
        if count > size - offset:
            raise ValueError(f"cut short: an element of {count} bytes, {size - offset} are left")
        if kind in (_MATRIX, _COMPRESSED):
            found = _described(path, order, offset, count if kind == _COMPRESSED else 0)
            if found is not None:
                yield found
        offset += count
    raise ValueError(f"holds more than {_MOST_VARIABLES} variables")


def _described(path: Path, order: str, offset: int, packed: int) -> _Variable | None:
    stream = _Stream(path, offset, packed)
    try:
        if packed and _tag(stream, order)[0] != _MATRIX:
            return None
        flags = _element(stream, order, 8)
        kind = flags[0 if order == "<" else 3] if len(flags) == 8 else 0
        axes = _element(stream, order, 4 * _MOST_AXES)
        shape = tuple(np.frombuffer(axes, f"{order}i4").tolist()) if len(axes) % 4 == 0 else ()
        name = _element(stream, order, _MOST_NAME_BYTES).decode("ascii", "replace")
        if not shape or min(shape) < 0:
            raise ValueError(f"{name} has axes {list(shape)}")
        if kind in _CLASSES or not 6 <= kind <= 15 or flags[1 if order == "<" else 2] & 8:
            return _Variable(name, _CLASSES.get(kind, "complex"), shape, np.dtype("u1"), 0, 0, offset, packed)
        of_values, count, _ = _tag(stream, order)
        if of_values not in _NUMBERS:
            raise ValueError(f"{name} has values of type {of_values}")
        dtype = np.dtype(order + _NUMBERS[of_values])
        return _Variable(name, "numbers", shape, dtype, stream.position, count, offset, packed)
    finally:
        stream.close()


def _tag(stream: _Stream, order: str) -> tuple[int, int, bool]:
    """Type and number of bytes of an element, and whether these follow within eight bytes of its beginning."""
    (word,) = struct.unpack(f"{order}I", stream.exactly(4))
    if word >> 16:
        if word >> 16 > 4:
            raise ValueError(f"a small element of {word >> 16} bytes")
        return word & 0xFFFF, word >> 16, True
    (count,) = struct.unpack(f"{order}I", stream.exactly(4))
    return word, count, False


def _element(stream: _Stream, order: str, most: int) -> bytes:
    _, count, small = _tag(stream, order)
    if count > most:
        raise ValueError(f"an element of {count} bytes, takes at most {most}")
    content = stream.exactly(count)
    stream.skip((4 if small else -(-count // 8) * 8) - count)
    return content


class _Stream:
    """Bytes of a file from an offset on, inflated where `packed` says how many are compressed."""

    def __init__(self, path: Path, offset: int, packed: int):
        self._file = open(path, "rb")  # noqa: SIM115  # closed by whoever has the stream
        self._file.seek(offset)
        self._packed = packed
        self._inflate = zlib.decompressobj() if packed else None
        self.position = 0
        self.left: int | None = None

    def read(self, count: int) -> bytes:
        """At most so many bytes; none at the end."""
        count = count if self.left is None else min(count, self.left)
        if count <= 0:
            return b""
        content = self._file.read(count) if self._inflate is None else self._inflated(count)
        self.position += len(content)
        self.left = None if self.left is None else self.left - len(content)
        return content

    def _inflated(self, count: int) -> bytes:
        assert self._inflate is not None
        while not self._inflate.eof:
            source = self._inflate.unconsumed_tail
            if not source:
                source = self._file.read(min(self._packed, 1 << 16))
                self._packed -= len(source)
                if not source:
                    return b""
            if found := self._inflate.decompress(source, count):
                return found
        return b""

    def exactly(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            part = self.read(count - len(content))
            if not part:
                raise ValueError("an element is cut short")
            content += part
        return content

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self.exactly(min(count, 1 << 16)))

    def close(self) -> None:
        self._file.close()
