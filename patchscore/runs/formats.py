"""The files that a run's samples are given out as: single PNGs, shards of arrays, or one zip.

All are written while images finish, one block of a thousand images in memory at most, and all follow from the rows of
samples.npy and the labels alone: what a killed process left unfinished is written from there, with the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from ..draw.images import png, to_pils, to_uint8
from ..files import TEMPORARY, errors_name, remove_temporaries, sha256, write_atomically
from ..sampling import labels_in_turn
from .batches import Rows

BLOCK_IMAGES = 1000
"""Images in a subfolder or a shard."""

SAMPLE = re.compile(r"\d{6}\.png")
SHARD = re.compile(r"\d{6}\.(npz|safetensors)")
SUBFOLDER = re.compile(r"\d{3}000")
LABELS = "dataset.json"

Labels = Sequence[int | str | None] | None

Shown = Callable[[torch.Tensor], torch.Tensor]
"""Samples [B, C, H, W] as pictures in [-1, 1], such as decoded latents."""


def place_of(image: int) -> str:
    """The name of an image below its subfolder, as EDM names them: 001000/001234.png."""
    return f"{image - image % BLOCK_IMAGES:06d}/{image:06d}.png"


def labels_json(count: int, labels: Labels) -> bytes:
    """dataset.json of EDM and StyleGAN for images 0 to count - 1: [name, label] for each, or null without labels."""
    listed = labels_in_turn(labels, range(count))
    pairs = None if listed is None else [[place_of(image), label] for image, label in enumerate(listed)]
    return json.dumps({"labels": pairs}).encode()


def _pngs(rows: np.ndarray, shown: Shown | None = None, **options: int) -> list[bytes]:
    images = torch.from_numpy(np.array(rows))
    return [png(image, **options) for image in to_pils(images if shown is None else shown(images))]


class PngFiles:
    """One PNG an image in samples/, or in subfolders of a thousand, samples/001000/001234.png, with dataset.json.

    Args:
        out: the run's folder.
        subfolders: whether there are any: a folder of many thousand files is slow.
        shown: what makes pictures of the samples, where they are none themselves.
    """

    name = "png"

    def __init__(self, out: Path, subfolders: bool = False, shown: Shown | None = None):
        self.place = out / "samples"
        self.subfolders = subfolders
        self.shown = shown

    def path(self, image: int) -> Path:
        return self.place / (place_of(image) if self.subfolders else f"{image:06d}.png")

    def begin(self, made: Mapping[int, str | None]) -> None:
        """Takes up what is there: `made` are the images whose rows are whole, with the hash of each one's file."""
        for folder in (self.place, *_subfolders(self.place)):
            folder.mkdir(exist_ok=True)
            remove_temporaries(folder)

    def holds(self, image: int, listed: str | None) -> bool:
        """Whether the file of an image is there, with the hash that was listed of it."""
        path = self.path(image)
        return path.is_file() and sha256(path.read_bytes()) == listed

    def save(self, images: range, rows: np.ndarray, alone: bool) -> list[dict[str, str]]:
        """Writes the files of a batch, float32 [B, C, H, W], and returns what a line should list of each.

        `alone` says whether this process holds the folder's lock; only it writes what holds several images.
        """
        entries = []
        for image, content in zip(images, _pngs(rows, self.shown), strict=True):
            path = self.path(image)
            if self.subfolders:
                path.parent.mkdir(exist_ok=True)
            write_atomically(path, content, sync=False)  # its hash is in the line
            entries.append({"file": str(path.relative_to(self.place.parent).as_posix()), "sha256": sha256(content)})
        return entries

    def pack(self, rows: Rows, labels: Labels, count: int, last: bool) -> None:
        """Writes what concerns images 0 to count - 1 together, all of which are made; `last` if no more are to come."""
        if self.subfolders and last:
            # Of every image that may be there; names without a file harm nobody.
            write_atomically(self.place / LABELS, labels_json(len(rows), labels))

    def bytes_per_image(self, shape: Sequence[int], block: int) -> int:
        """Most bytes on the disk for an image, where a file takes whole blocks."""
        return -(-(int(np.prod(shape)) + 200) // block) * block


class Shards:
    """A thousand images a file."""

    name: str
    value_bytes: int

    def __init__(self, out: Path):
        self.place = out / "samples"
        self.packed = 0

    def begin(self, made: Mapping[int, str | None]) -> None:
        self.place.mkdir(exist_ok=True)
        remove_temporaries(self.place)
        self.packed = 0

    def holds(self, image: int, listed: str | None) -> bool:
        return True  # `pack` compares with the rows

    def save(self, images: range, rows: np.ndarray, alone: bool) -> list[dict[str, str]]:
        return [{"file": f"{self.place.name}/{image - image % BLOCK_IMAGES:06d}.{self.name}"} for image in images]

    def pack(self, rows: Rows, labels: Labels, count: int, last: bool) -> None:
        while count - self.packed >= (1 if last else BLOCK_IMAGES):
            images = range(self.packed, min(self.packed + BLOCK_IMAGES, count))
            listed = labels_in_turn(labels, images)
            content = self.packed_as(rows.read_range(images), None if listed is None else np.array(listed, np.int64))
            path = self.place / f"{images.start:06d}.{self.name}"
            if not (path.is_file() and path.read_bytes() == content):
                write_atomically(path, content)
            if len(images) < BLOCK_IMAGES:
                break
            self.packed = images.stop

    def packed_as(self, rows: np.ndarray, labels: np.ndarray | None) -> bytes:
        """The file of some images, float32 [n, C, H, W], and their labels, int64 [n]."""
        raise NotImplementedError

    def bytes_per_image(self, shape: Sequence[int], block: int) -> int:
        return self.value_bytes * int(np.prod(shape)) + 16


class NpzShards(Shards):
    """samples/001000.npz: arr_0 uint8 [n, H, W, C] and, with labels, arr_1 int64 [n]."""

    name = "npz"
    value_bytes = 1

    def packed_as(self, rows: np.ndarray, labels: np.ndarray | None) -> bytes:
        arrays = [to_uint8(torch.from_numpy(rows.copy())), *([] if labels is None else [labels])]
        content = io.BytesIO()
        np.savez(content, *arrays)
        return content.getvalue()


class SafetensorsShards(Shards):
    """samples/001000.safetensors: images float32 [n, C, H, W], as they are, and, with labels, labels int64 [n]."""

    name = "safetensors"
    value_bytes = 4

    def packed_as(self, rows: np.ndarray, labels: np.ndarray | None) -> bytes:
        arrays = {"images": np.array(rows, np.float32), **({} if labels is None else {"labels": labels})}
        return safetensors.numpy.save(arrays)


class ZipArchive:
    """samples.zip as EDM's tools take it: PNGs that are not compressed, by subfolders, and dataset.json.

    PNGs are appended in the order of their numbers; dataset.json and the archive's directory follow when a command
    ends. Between, or after a kill, the file is no whole zip: the same command completes it.
    """

    name = "zip"

    def __init__(self, out: Path):
        self.place = out / "samples.zip"
        self.images, self.end = 0, 0
        self.directory = bytearray()

    def begin(self, made: Mapping[int, str | None]) -> None:
        self.images, self.end = 0, 0
        self.directory = bytearray()
        if not self.place.exists():
            return
        with open(self.place, "rb") as file:
            while (listed := made.get(self.images)) is not None:
                name = place_of(self.images).encode()
                header = file.read(_LOCAL.size + len(name))
                if len(header) < _LOCAL.size + len(name) or header[:4] != b"PK\3\4":
                    break
                content = file.read(_LOCAL.unpack(header[: _LOCAL.size])[8])
                if header != _local(name, content) or sha256(content) != listed:
                    break
                self._count(name, content)

    def holds(self, image: int, listed: str | None) -> bool:
        return True  # `pack` writes what `begin` did not find

    def save(self, images: range, rows: np.ndarray, alone: bool) -> list[dict[str, str]]:
        pngs = _pngs(rows, compress_level=0)
        if alone and images.start == self.images:
            self._append(pngs)
        return [
            {"file": f"{self.place.name}/{place_of(image)}", "sha256": sha256(content)}
            for image, content in zip(images, pngs, strict=True)
        ]

    def pack(self, rows: Rows, labels: Labels, count: int, last: bool) -> None:
        while self.images < count:
            images = range(self.images, min(self.images + BLOCK_IMAGES, count))
            self._append(_pngs(rows.read_range(images), compress_level=0))
        if last:
            name, content = LABELS.encode(), labels_json(self.images, labels)
            tail = _local(name, content) + content
            start = self.end + len(tail)
            directory = bytes(self.directory) + _central(name, content, self.end)
            tail += directory + _ending(self.images + 1, len(directory), start)
            if not (self.place.is_file() and self._tail() == tail):
                self._write(tail)

    def bytes_per_image(self, shape: Sequence[int], block: int) -> int:
        return int(np.prod(shape)) + 400

    def _append(self, pngs: Iterable[bytes]) -> None:
        content = io.BytesIO()
        start, images, entries = self.end, self.images, len(self.directory)
        for image in pngs:
            name = place_of(self.images).encode()
            content.write(_local(name, image) + image)
            self._count(name, image)
        try:
            self._write(content.getvalue(), start)
        except BaseException:
            self.images, self.end = images, start
            del self.directory[entries:]
            raise

    def _count(self, name: bytes, content: bytes) -> None:
        self.directory += _central(name, content, self.end)
        self.end += _LOCAL.size + len(name) + len(content)
        self.images += 1

    def _write(self, content: bytes, start: int | None = None) -> None:
        """Puts the bytes at `start`, or at the end of the images, and nothing after them."""
        with errors_name(self.place), open(self.place, "r+b" if self.place.exists() else "x+b") as file:
            file.seek(self.end if start is None else start)
            file.truncate()
            file.write(content)

    def _tail(self) -> bytes:
        with open(self.place, "rb") as file:
            file.seek(self.end)
            return file.read()


# The zip format, PKWARE's APPNOTE 6.3.9, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16 and 4.5.3. Nothing is compressed,
# names are ASCII, and every time is the earliest there is, so that the same images make the same bytes.

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_MIDNIGHT_1980 = (0, 0x21)
_FULL = 0xFFFFFFFF


def _local(name: bytes, content: bytes) -> bytes:
    """The header before a file."""
    sizes = (zlib.crc32(content), len(content), len(content))
    return _LOCAL.pack(b"PK\3\4", 20, 0, 0, *_MIDNIGHT_1980, *sizes, len(name), 0) + name


def _central(name: bytes, content: bytes, offset: int) -> bytes:
    """The entry of a file in the directory."""
    extra = struct.pack("<2HQ", 1, 8, offset) if offset >= _FULL else b""
    needed = 45 if extra else 20
    sizes = (zlib.crc32(content), len(content), len(content))
    return (
        _CENTRAL.pack(
            *(b"PK\1\2", 3 << 8 | needed, needed, 0, 0, *_MIDNIGHT_1980, *sizes, len(name), len(extra)),
            *(0, 0, 0, 0o100644 << 16, min(offset, _FULL)),
        )
        + name
        + extra
    )


def _ending(entries: int, size: int, start: int) -> bytes:
    """The records after the directory, which has that many entries and bytes and begins at `start`."""
    large = b""
    if entries >= 0xFFFF or size >= _FULL or start >= _FULL:
        large = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, start)
        large += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    counts = (min(entries, 0xFFFF),) * 2
    return large + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *counts, min(size, _FULL), min(start, _FULL), 0)


Samples = PngFiles | Shards | ZipArchive

FORMATS = ("png", "npz", "zip", "safetensors")


def samples_as(form: str, out: Path, subfolders: bool, shown: Shown | None = None) -> Samples:
    """The writer of a format."""
    if form == "png":
        return PngFiles(out, subfolders, shown)
    if form == "zip":
        return ZipArchive(out)
    return NpzShards(out) if form == "npz" else SafetensorsShards(out)


def sample_files(out: Path) -> list[Path]:
    """Every file that a writer may have put into a run's folder, of any format, unfinished ones too."""
    archive, place = out / "samples.zip", out / "samples"
    found = [archive] if archive.is_file() and not archive.is_symlink() else []
    if place.is_dir():
        ours = (SAMPLE, SHARD, TEMPORARY)
        below = _subfolders(place)
        for folder in (place, *below):
            found += [path for path in folder.iterdir() if any(name.fullmatch(path.name) for name in ours)]
        # Only beside subfolders is it a run's.
        found += [place / LABELS] if below and (place / LABELS).is_file() else []
    return found


def remove_empty(out: Path) -> None:
    """Removes the folders of samples that are empty."""
    place = out / "samples"
    for folder in [*_subfolders(place), place]:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def _subfolders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if SUBFOLDER.fullmatch(path.name) and path.is_dir()]
