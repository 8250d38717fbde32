"""The folder of a run: what lies in it, what counts as made, and what may be removed.

    run.json        settings, bank and versions; written before the first image
    batches.jsonl   a line a batch, appended once its images are there: their labels, hashes and nearest training images
    samples/        one PNG an image, 000000.png and so on: a folder as FID tools take it
    samples.npy     the images as float32 [n, C, H, W]; row i is image i
    trajectory.npz  the noisy and the denoised images of the first few, at every step
    held-out.json, table.json   where the patch sizes were fitted to the training images: the errors, and the table
    grid.png, trajectory.png; and what `explain` writes: explain.html, mosaic.png (mosaic-000000.png), memorisation.png

An image counts as made once a line lists it, as long as its PNG and its row have the hashes in that line. Everything is
written once and nothing is rewritten as a run grows, so saving takes time in proportion to the number of images.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..draw.images import png
from ..files import (
    TEMPORARY,
    check_header,
    errors_name,
    header,
    locked,
    parse_json,
    read_record,
    remove_temporaries,
    sealed,
    sha256,
    unsealed,
    write_atomically,
)

FORMAT = "patchscore-run"
VERSION = 2
FLAT_VERSION = 1
"""Of release 0.1.0, whose samples lie beside everything else, as 0000.png, and whose arrays are one samples.npz."""

MOST_IMAGES = 10**6
"""So that names of six digits sort as numbers."""

PICTURES = ("grid.png", "trajectory.png")
ERRORS, TABLE = "held-out.json", "table.json"
EXPLANATIONS = ("explain.html", "mosaic.png", "memorisation.png")
FILES = (
    "run.json",
    "batches.jsonl",
    "samples.npy",
    "trajectory.npz",
    "samples.npz",
    ERRORS,
    TABLE,
    *PICTURES,
    *EXPLANATIONS,
)
SAMPLE = re.compile(r"\d{6}\.png")
FLAT_SAMPLE = re.compile(r"\d{4,}\.png")
MOSAIC = re.compile(r"mosaic-\d{4,6}\.png")

BLOCK = 4096
"""Bytes that the smallest file takes on a disk, as file systems are usually set up."""


class RunFolder:
    """The files of a run in the folder `path`, which need not exist.

    Args:
        path: the folder.
        shape: (C, H, W) of its images.
    """

    def __init__(self, path: Path, shape: Sequence[int]):
        self.path = path
        self.samples = path / "samples"
        self.rows = Rows(path / "samples.npy", shape)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the folder and holds its lock, so that no two runs mix.

        Raises:
            ValueError: another process holds it, or `path` is not a folder.
            OSError: the folder cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: not a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, f"{self.path}: another process is writing this folder; wait for it, or take another"):
            yield

    def record(self) -> dict[str, Any] | None:
        """What run.json says, or None where there is none; ValueError, without the path, where it is no run's."""
        path = self.path / "run.json"
        return read_run(path) if path.exists() else None

    def foreign(self) -> Path | None:
        """Something in the place of what a run would write, in a folder without a run.json."""
        inside = self.samples.iterdir() if self.samples.is_dir() else ()
        return min([*self._written(flat=False), *inside], default=None)

    def clear(self) -> None:
        """Removes everything that a run and its explanations wrote, and nothing else; run.json goes last.

        In the folder itself numbered images are a run's only where run.json is of release 0.1.0, which put them there.
        """
        try:
            flat = read_run(self.path / "run.json")["version"] == FLAT_VERSION
        except (OSError, ValueError):
            flat = False
        for path in sorted(self._written(flat), key=lambda path: path.name == "run.json"):
            path.unlink()
        if self.samples.is_dir() and not self.samples.is_symlink() and not any(self.samples.iterdir()):
            self.samples.rmdir()

    def _written(self, flat: bool) -> list[Path]:
        found = [self.path / name for name in FILES if os.path.lexists(self.path / name)]
        found += [path for path in self.path.iterdir() if MOSAIC.fullmatch(path.name)]
        if flat:
            found += [path for path in self.path.iterdir() if FLAT_SAMPLE.fullmatch(path.name)]
        if self.samples.is_dir():
            ours = (SAMPLE, TEMPORARY)
            found += [path for path in self.samples.iterdir() if any(name.fullmatch(path.name) for name in ours)]
        elif self.samples.exists():
            found.append(self.samples)
        return found

    def begin(self, record: Mapping[str, Any]) -> None:
        """Writes run.json and makes the folder of samples: from here on the folder is a run's."""
        self.write_record(record)
        self.samples.mkdir(exist_ok=True)
        remove_temporaries(self.samples)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_run(self.path / "run.json", record)

    def check_space(self, images: int, steps: int, drawn: int) -> None:
        """ValueError where the disk has no room for so many more images, of which `drawn` with their trajectories."""
        pixels = int(np.prod(self.rows.shape))
        png = -(-(pixels + 200) // BLOCK) * BLOCK
        needed = images * (png + 4 * pixels + 500) + drawn * steps * 4 * pixels
        free = shutil.disk_usage(self.path).free
        if needed > free:
            megabytes, left = (f"{count / 1e6:.3g} MB" for count in (needed, free))
            raise ValueError(f"{self.path}: {images:,} images take up to {megabytes} and {left} are free")

    def batches(self) -> list[dict[str, Any]]:
        """The lines of batches.jsonl, as far as they are whole."""
        return [batch for _, batch in self._lines() if batch is not None]

    def mend_lines(self) -> None:
        """Drops damaged lines of batches.jsonl; a warning counts them."""
        lines, path = self._lines(), self.path / "batches.jsonl"
        whole = [line for line, batch in lines if batch is not None]
        if len(whole) < len(lines):
            warnings.warn(
                f"{path}: {len(lines) - len(whole)} of {len(lines)} lines are damaged, their images are made again",
                stacklevel=2,
            )
        content = b"".join(line + b"\n" for line in whole)
        if path.exists() and path.stat().st_size != len(content):  # the last may lack its end
            write_atomically(path, content)

    def _lines(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        """The lines, each with the batch that it describes, or None where it is damaged."""
        path = self.path / "batches.jsonl"
        found: list[tuple[bytes, dict[str, Any] | None]] = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            if line:
                try:
                    found.append((line, _checked(unsealed(parse_json(line)))))
                except (ValueError, KeyError, TypeError):
                    found.append((line, None))
        return found

    def made(self) -> dict[int, dict[str, Any]]:
        """By number, what is listed of the images that are there with the hashes that were listed."""
        listed = {entry["image"]: entry for batch in self.batches() for entry in batch["images"]}
        return {image: listed[image] for image in sorted(listed) if self._unchanged(listed[image])}

    def _unchanged(self, entry: Mapping[str, Any]) -> bool:
        path, row = self.png_path(entry["image"]), self.rows.read(entry["image"])
        return (
            row is not None
            and sha256(row.tobytes()) == entry["row_sha256"]
            and path.is_file()
            and sha256(path.read_bytes()) == entry["sha256"]
        )

    def png_path(self, image: int) -> Path:
        """Where that image's PNG is."""
        return self.samples / f"{image:06d}.png"

    def save_batch(
        self, images: range, rows: np.ndarray, pngs: Sequence[bytes], entries: Sequence[dict], batch: dict
    ) -> None:
        """Writes the images of a batch (float32 [B, C, H, W] and as PNG files), then the line that lists them."""
        for image, content in zip(images, pngs, strict=True):
            write_atomically(self.png_path(image), content, sync=False)  # its hash is in the line
        self.rows.write(images.start, rows)
        listed = [
            {
                "image": image,
                "file": f"{self.samples.name}/{self.png_path(image).name}",
                "sha256": sha256(content),
                "row_sha256": sha256(np.ascontiguousarray(row, "<f4").tobytes()),
                **entry,
            }
            for image, content, row, entry in zip(images, pngs, rows, entries, strict=True)
        ]
        line = json.dumps(sealed({"images": listed, **batch})) + "\n"
        path = self.path / "batches.jsonl"
        with errors_name(path), open(path, "ab") as file:
            file.write(line.encode())

    def save_picture(self, name: str, picture: Image.Image) -> None:
        """Writes one of PICTURES."""
        write_atomically(self.path / name, png(picture))

    def save_trajectories(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes trajectory.npz."""
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        write_atomically(self.path / "trajectory.npz", content.getvalue())

    def trajectories(self) -> dict[str, np.ndarray]:
        """The arrays of trajectory.npz; none where it is missing or damaged."""
        return read_arrays(self.path / "trajectory.npz")


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
        if image >= len(self):
            return None
        content = np.fromfile(self.path, "<f4", self.bytes // 4, offset=self.HEADER + image * self.bytes)
        return content.reshape(self.shape) if content.nbytes == self.bytes else None


def _checked(batch: dict[str, Any]) -> dict[str, Any]:
    """A line of batches.jsonl, if it has what is read of it."""
    for entry in batch["images"]:
        if not (isinstance(entry["image"], int) and 0 <= entry["image"] < MOST_IMAGES):
            raise ValueError(f"image {entry['image']!r}")
        if not all(isinstance(entry[name], str) for name in ("sha256", "row_sha256")):
            raise TypeError("hashes are not text")
    return batch


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; none where it is missing or damaged, and no pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # zip, zlib, EOF, syntax, memory: whatever a changed byte leads to, the file is damaged
        return {}


def read_run(path: Path) -> dict[str, Any]:
    """A run.json of this release or of 0.1.0; ValueError, without the path, for anything else."""
    record = read_record(path, FORMAT, FLAT_VERSION, VERSION)
    return record if record["version"] == FLAT_VERSION else unsealed(record)


def write_run(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a run.json, of the version that the record has."""
    check_header(record, FORMAT, FLAT_VERSION, VERSION)
    content = dict(record) if record["version"] == FLAT_VERSION else sealed(record)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def new_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """A run.json of this release before it is written."""
    return json.loads(json.dumps({**header(FORMAT, VERSION), **content}))  # as it will be read back
