"""An array in a file or a stream that is read forwards, row by row, as rows are asked for.

Compressed files can hold a thousand times their size; read like this they take the memory of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

BLOCK = 1 << 20
"""Bytes that are read at a time where rows are smaller."""


class Rows:
    """An array of `shape` and `dtype` whose values begin at `start` of what `reopen` opens, in C order.

    Rows may be asked for in any order; going back begins the stream again.
    """

    def __init__(self, reopen: Callable[[], BinaryIO], start: int, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._reopen, self._start = reopen, start
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._per_block = max(1, BLOCK // max(1, self._row_bytes))
        self._file: BinaryIO | None = None
        self._next = 0
        self._block: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        first = i - i % self._per_block
        if self._block is None or not self._block[0] <= i < self._block[0] + len(self._block[1]):
            self._block = (first, self._read(first, min(first + self._per_block, len(self)), needed=i))
        return self._block[1][i - first]

    def reshaped(self, shape: tuple[int, ...]) -> Rows:
        """The same rows in another form."""
        return Rows(self._reopen, self._start, shape, self.dtype)

    def whole(self) -> np.ndarray:
        """All rows in one array."""
        return self._read(0, len(self), needed=len(self) - 1)

    def _read(self, first: int, stop: int, needed: int) -> np.ndarray:
        """Rows first..stop, or as many as there are, row `needed` among them."""
        if self._file is None or first < self._next:
            self.close()
            self._file = self._reopen()
            self._skip(self._start)
            self._next = 0
        self._skip((first - self._next) * self._row_bytes)
        values = memoryview(bytearray((stop - first) * self._row_bytes))
        position = 0
        while position < len(values):
            part = self._file.read(min(len(values) - position, 1 << 24))
            if not part:
                stop = first + position // self._row_bytes
                if stop <= needed:
                    there, total = first * self._row_bytes + position, len(self) * self._row_bytes
                    raise ValueError(f"cut short: {there} of {total} bytes of values {list(self.shape)}")
                self.close()
                return self._formed(values[: (stop - first) * self._row_bytes], stop - first)
            values[position : position + len(part)] = part
            position += len(part)
        self._next = stop
        if stop == len(self):
            if self._file.read(1):
                total = len(self) * self._row_bytes
                raise ValueError(f"goes on after the {total} bytes of values {list(self.shape)} that it declares")
            self.close()
        return self._formed(values, stop - first)

    def _formed(self, values: memoryview, count: int) -> np.ndarray:
        return np.frombuffer(values, dtype=self.dtype).reshape(count, *self.shape[1:])

    def _skip(self, count: int) -> None:
        assert self._file is not None
        while count:
            part = self._file.read(min(count, 1 << 20))
            if not part:
                raise ValueError(f"cut short before its values {list(self.shape)}")
            count -= len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
