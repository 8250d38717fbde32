"""What is finished of a run: the images as rows of samples.npy, and a line for each batch in batches.jsonl.

An image counts as made once a line lists it, as long as its row has the hash in that line. Rows are written in place
and lines appended, so saving takes time in proportion to the number of images.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import errors_name, parse_json, sealed, sha256, unsealed, write_atomically

MOST_IMAGES = 10**6
"""So that names of six digits sort as numbers."""


class Batches:
    """The finished images in the folder `path`, of shape (C, H, W)."""

    def __init__(self, path: Path, shape: Sequence[int]):
        self.path = path / "batches.jsonl"
        self.rows = Rows(path / "samples.npy", shape)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines, as far as they are whole: {"images": [entries], and what else is known of the batch}."""
        return (batch for _, batch in self._lines() if batch is not None)

    def append(self, images: range, rows: np.ndarray, entries: Sequence[dict], batch: Mapping[str, Any]) -> None:
        """Writes the rows of a batch, float32 [B, C, H, W], then the line that lists them with their hashes."""
        self.rows.write(images.start, rows)
        listed = [
            {"image": image, **entry, "row_sha256": sha256(np.ascontiguousarray(row, "<f4").tobytes())}
            for image, row, entry in zip(images, rows, entries, strict=True)
        ]
        line = json.dumps(sealed({"images": listed, **batch})) + "\n"
        with errors_name(self.path), open(self.path, "ab") as file:
            file.write(line.encode())

    def mend(self) -> None:
        """Drops damaged lines, with a warning that counts them, and writes the header of the rows anew if needed."""
        self.rows.mend_header()
        if not self.path.exists():
            return
        count = damaged = size = 0
        for line, batch in self._lines():
            count, damaged = count + 1, damaged + (batch is None)
            size += len(line) + 1
        if damaged:
            warnings.warn(
                f"{self.path}: {damaged} of {count} lines are damaged, their images are made again", stacklevel=2
            )
        if damaged or self.path.stat().st_size != size:  # the last may lack its end
            whole = (line for line, batch in self._lines() if batch is not None)
            write_atomically(self.path, b"".join(line + b"\n" for line in whole))

    def made(self) -> dict[int, str | None]:
        """The images that are there, each with the hash of its file, if one was listed."""
        listed = {
            entry["image"]: (entry["row_sha256"], entry.get("sha256")) for batch in self for entry in batch["images"]
        }
        found: dict[int, str | None] = {}
        for image in sorted(listed):
            row, (of_row, of_file) = self.rows.read(image), listed[image]
            if row is not None and sha256(row.tobytes()) == of_row:
                found[image] = of_file
        return found

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """The lines, each with the batch that it describes, or None where it is damaged."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for ended in file:
                line = ended.rstrip(b"\n")
                if line:
                    try:
                        yield line, _checked(unsealed(parse_json(line)))
                    except (ValueError, KeyError, TypeError):
                        yield line, None


def _checked(batch: dict[str, Any]) -> dict[str, Any]:
    """A line of batches.jsonl, if it has what is read of it."""
    for entry in batch["images"]:
        if not (isinstance(entry["image"], int) and 0 <= entry["image"] < MOST_IMAGES):
            raise ValueError(f"image {entry['image']!r}")
        if not isinstance(entry["row_sha256"], str) or not isinstance(entry.get("sha256"), (str, type(None))):
            raise TypeError("hashes are not text")
    return batch


class Rows:
    """float32 images in one .npy file that grows: row i is image i.

    The header has a fixed length, so that the number of rows can be rewritten in place.
    """

    HEADER = 128

    def __init__(self, path: Path, shape: Sequence[int]):
        self.path = path
        self.shape = tuple(shape)
        self.bytes = 4 * int(np.prod(self.shape))

    def _header(self, rows: int) -> bytes:
        """As numpy.lib.format lays down in version 1.0: magic, length, a dictionary padded with spaces."""
        length = self.HEADER - 10
        described = repr({"descr": "<f4", "fortran_order": False, "shape": (rows, *self.shape)})
        return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + described.ljust(length - 1).encode() + b"\n"

    def __len__(self) -> int:
        """Whole rows in the file."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return max(0, size - self.HEADER) // self.bytes

    def write(self, first: int, rows: np.ndarray) -> None:
        """Puts rows [B, C, H, W] at first, first + 1, ..."""
        count = max(len(self), first + len(rows))
        with errors_name(self.path), open(self.path, "r+b" if self.path.exists() else "x+b") as file:
            file.seek(self.HEADER + first * self.bytes)
            file.write(np.ascontiguousarray(rows, "<f4").tobytes())
            file.seek(0)
            file.write(self._header(count))

    def mend_header(self) -> None:
        """Writes the header anew where it is not as it should be."""
        rows = len(self)
        if rows:
            with errors_name(self.path), open(self.path, "r+b") as file:
                if file.read(self.HEADER) != self._header(rows):
                    file.seek(0)
                    file.write(self._header(rows))

    def read(self, image: int) -> np.ndarray | None:
        """[C, H, W] that row, or None where the file is shorter."""
        found = self.read_range(range(image, image + 1))
        return found[0] if len(found) else None

    def read_range(self, images: range) -> np.ndarray:
        """[n, C, H, W] those rows, as far as the file has them."""
        if not self.path.is_file():
            return np.empty((0, *self.shape), "<f4")
        with open(self.path, "rb") as file:
            file.seek(self.HEADER + images.start * self.bytes)
            content = file.read(len(images) * self.bytes)
        whole = len(content) // self.bytes
        return np.frombuffer(content[: whole * self.bytes], "<f4").reshape(whole, *self.shape)
