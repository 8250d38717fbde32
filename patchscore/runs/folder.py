"""The folder of a run: what lies in it, what counts as made, and what may be removed.

    run.json        settings, bank, format and versions; written before the first image
    batches.jsonl   a line a batch, appended once its images are there: their labels, hashes and nearest training images
    samples.npy     the images as float32 [n, C, H, W]; row i is image i
    samples/        the same in 8 bits for other tools: PNGs, 000000.png and so on, in subfolders of a thousand where
                    there are more; or shards, 000000.npz; or, instead of the folder, samples.zip. In float32, as
                    latents take it: shards, 000000.safetensors
    trajectory.npz  the noisy and the denoised images of the first few, at every step
    held-out.json, table.json   where the patch sizes were fitted to the training images: the errors, and the table
    grid.png, trajectory.png; and what `explain` writes: explain.html, mosaic.png (mosaic-000000.png), memorisation.png;
    and `evaluate`: evaluation.json
    parts/001/      samples.npy and batches.jsonl of what another process made, until `merge_parts` takes them over

An image counts as made once a line lists it, as long as its row and its PNG have the hashes in that line. Everything is
written once and nothing is rewritten as a run grows, so saving takes time in proportion to the number of images.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import checks
from ..draw.images import png
from ..files import TEMPORARY, check_header, header, locked, read_record, sealed, unsealed, write_atomically
from .batches import Batches
from .formats import FORMATS, Labels, Shown, remove_empty, sample_files, samples_as

FORMAT = "patchscore-run"
VERSION = 2
FLAT_VERSION = 1
"""Of release 0.1.0, whose samples lie beside everything else, as 0000.png, and whose arrays are one samples.npz."""

PICTURES = ("grid.png", "trajectory.png")
ERRORS, TABLE = "held-out.json", "table.json"
EXPLANATIONS = ("explain.html", "mosaic.png", "memorisation.png", "evaluation.json")
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
FLAT_SAMPLE = re.compile(r"\d{4,}\.png")
MOSAIC = re.compile(r"mosaic-\d{4,6}\.png")
PART = re.compile(r"\d{3}")
PART_FILES = ("batches.jsonl", "samples.npy")

SINGLE_PNGS = {"format": "png", "subfolders": False}
"""What run.json says under "samples" of single PNGs in one folder, as all runs were that say nothing there."""

BLOCK = 4096
"""Bytes that the smallest file takes on a disk, as file systems are usually set up."""


class RunFolder:
    """The files of a run in the folder `path`, which need not exist.

    Args:
        path: the folder.
        shape: (C, H, W) of its images.
        form: the format of the files of samples: "png", "npz", "zip" or "safetensors".
        subfolders: whether PNGs are in subfolders of a thousand.
        shown: what makes PNGs of samples that are no pictures.
    """

    def __init__(
        self,
        path: Path,
        shape: Sequence[int],
        form: str = "png",
        subfolders: bool = False,
        shown: Shown | None = None,
    ):
        self.path = path
        self.shape = tuple(shape)
        self.batches = Batches(path, shape)
        self.rows = self.batches.rows
        self.samples = samples_as(form, path, subfolders, shown)

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
        place = self.path / "samples"
        inside = place.iterdir() if place.is_dir() else ()
        found = [self.path / name for name in ("samples.zip", "parts") if os.path.lexists(self.path / name)]
        return min([*self._written(flat=False), *inside, *found], default=None)

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
        for place in self._parts():
            self._remove_part(place)
        remove_empty(self.path)

    def _written(self, flat: bool) -> list[Path]:
        found = [self.path / name for name in FILES if os.path.lexists(self.path / name)]
        found += [path for path in self.path.iterdir() if MOSAIC.fullmatch(path.name)]
        if flat:
            found += [path for path in self.path.iterdir() if FLAT_SAMPLE.fullmatch(path.name)]
        place = self.path / "samples"
        if place.exists() and not place.is_dir():
            found.append(place)
        return found + sample_files(self.path)

    def begin(self, record: Mapping[str, Any]) -> set[int]:
        """Writes run.json, from where on the folder is a run's, and takes up what is there: the images made."""
        self.write_record(record)
        self.batches.mend()
        self.merge_parts()
        made = self.batches.made()
        self.samples.begin(made)
        return {image for image, listed in made.items() if self.samples.holds(image, listed)}

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_run(self.path / "run.json", record)

    def check_space(self, images: int, steps: int, drawn: int) -> None:
        """ValueError where the disk has no room for so many more images, of which `drawn` with their trajectories."""
        pixels = int(np.prod(self.shape))
        file = self.samples.bytes_per_image(self.shape, BLOCK)
        needed = images * (file + 4 * pixels + 500) + drawn * steps * 4 * pixels
        free = shutil.disk_usage(self.path).free
        if needed > free:
            megabytes, left = (f"{count / 1e6:.3g} MB" for count in (needed, free))
            raise ValueError(f"{self.path}: {images:,} images take up to {megabytes} and {left} are free")

    def save_batch(
        self, images: range, rows: np.ndarray, entries: Sequence[dict], batch: Mapping[str, Any], part: int = 0
    ) -> None:
        """Writes the images of a batch, float32 [B, C, H, W], and then the line that lists them.

        Args:
            entries: what else the line tells of each image.
            batch: what it tells of the batch.
            part: 0 in the process that holds the folder's lock; another number in every other process that makes
                images of the same run, whose files lie apart until `merge_parts`. PNGs are in their place at once.
        """
        place = self.path / "parts" / f"{part:03d}"
        if part:
            place.mkdir(parents=True, exist_ok=True)
        batches = Batches(place, self.shape) if part else self.batches
        files = self.samples.save(images, rows, part == 0)
        batches.append(images, rows, [{**file, **own} for file, own in zip(files, entries, strict=True)], batch)

    def merge_parts(self) -> set[int]:
        """Takes over what other processes made, and returns those images; none of them may be writing any more."""
        merged: set[int] = set()
        for place in self._parts():
            part = Batches(place, self.shape)
            part.mend()
            made = part.made()
            for batch in part:
                entries = batch.pop("images")
                numbers = [entry["image"] for entry in entries]
                images = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
                if list(images) == numbers and all(i in made and self.samples.holds(i, made[i]) for i in images):
                    own = [{k: v for k, v in entry.items() if k not in ("image", "row_sha256")} for entry in entries]
                    self.batches.append(images, part.rows.read_range(images), own, batch)
                    merged.update(images)
            self._remove_part(place)
        return merged

    def _parts(self) -> list[Path]:
        place = self.path / "parts"
        return sorted(path for path in place.iterdir() if PART.fullmatch(path.name)) if place.is_dir() else []

    def _remove_part(self, place: Path) -> None:
        for path in place.iterdir():
            if path.name in PART_FILES or TEMPORARY.fullmatch(path.name):
                path.unlink()
        for folder in (place, place.parent):
            if not any(folder.iterdir()):
                folder.rmdir()

    def has_images(self) -> bool:
        """Whether anything is listed as made."""
        return any(True for place in (self.path, *self._parts()) for _ in Batches(place, self.shape))

    def pack(self, labels: Labels, count: int, last: bool) -> None:
        """Brings what holds several images up to date with images 0 to count - 1, all of which are made.

        Args:
            labels: of the run, taken in turn; None without.
            last: whether the command ends here, so that what is begun is completed.
        """
        self.samples.pack(self.rows, labels, count, last)

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


def files_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The format of the files of samples that a run.json tells, as `RunFolder` takes it."""
    told = record.get("samples", SINGLE_PNGS)
    return {"form": checks.one_of("samples", told["format"], FORMATS), "subfolders": bool(told["subfolders"])}


def new_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """A run.json of this release before it is written."""
    return json.loads(json.dumps({**header(FORMAT, VERSION), **content}))  # as it will be read back
