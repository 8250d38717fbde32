"""Writes any source as a .npy file that can be mapped, image by image, so that neither side need fit in memory.

Images go to `bank.npy.partial` and what is known of them, a block at a time, to `bank.npy.progress`. An interrupted
call leaves both, and the same call goes on from there; `bank.npy` appears once it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import time
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import errors_name, hold, parse_json, remove_temporaries, write_atomically
from .image import Prepared, Span, prepared
from .mapped import beside
from .reading import (
    Reading,
    check_same_size,
    fair_share,
    merged_span,
    numbered,
    printable_errors,
    read_range,
    warn_left_out,
)
from .source import Source, UnreadableImage

AHEAD = 8
"""Images a thread that may be decoded before it is their turn to be written."""

NOTED_SECONDS = 5.0
"""After which images are flushed to the disk and noted: the most work that an interruption loses."""

HEADER_BYTES = 128
"""Of a .npy file; the format pads its header to a multiple of 64."""


class _Otherwise(Exception):
    """An image that needs the others to be written otherwise: in colour, or in floating point."""

    def __init__(self, **options: Any):
        self.options = options


@printable_errors
def write(source: Any, path: Path, overwrite: bool = False, **asked: Any) -> None:
    """Writes what `read` reads to a .npy file, with labels and class names beside it.

    Raises:
        ValueError: as of `read`; files that are there already, without `overwrite`; another process that writes them.
        OSError: the disk is full, or not writable. What is written stays, and the same call goes on.
    """
    if path.suffix != ".npy":
        raise ValueError(f"out: got {str(path)!r}, takes a name that ends in .npy")
    reading = Reading(**asked)
    there = [str(p) for p in (path, *_about(path)) if p.exists()]
    if there and not overwrite:
        raise ValueError(f"out: {there[0]} exists already; pass overwrite (on the command line --overwrite)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = reading.opened(source)
        state = {**asdict(reading), "source": _identity(source, found)}
        state["size"] = reading.size and list(reading.size)
        del state["memory_limit"]
        partial = path.with_name(path.name + ".partial")
        with errors_name(partial), open(partial, "a+b") as file:
            if hold(file.fileno(), partial, f"out: {path} is being written by another process"):
                remove_temporaries(path.parent, [about.name for about in _about(path)])
            writer = _Writer(found, path, file, state, reading.limit, reading.channels)
            writer.resume()
            while True:
                try:
                    writer.run(reading.size, reading.skip_bad)
                    break
                except _Otherwise as otherwise:
                    options = {"channels": writer.channels, "floats": writer.floats, **otherwise.options}
                    writer = _Writer(found, path, file, state, reading.limit, **options)
                except BaseException as error:
                    writer.leave(interrupted=isinstance(error, KeyboardInterrupt))
                    raise
            ready = writer.finish()
        writer.publish(ready, reading.labels)
    if writer.bad:
        warn_left_out(found, writer.bad)


def _about(path: Path) -> list[Path]:
    """The files that tell of the images."""
    return [beside(path, ending) for ending in (".labels.npy", ".classes.json", ".remembered.json")]


def _identity(source: Any, found: Source) -> str:
    """Tells whether the images of an interrupted call are those of this one: their names, and the file they are in."""
    digest = hashlib.sha256(f"{found.name} {found.count}".encode(errors="surrogatepass"))
    for i in range(found.count):
        digest.update(found.item_name(i).encode(errors="surrogatepass") + b"\0")
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        state = os.stat(source)
        digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


@dataclass
class _Writer:
    """Images on their way into a file, and what is known of them."""

    source: Source
    path: Path
    file: BinaryIO
    state: dict[str, Any]  # the arguments, by which an interrupted call is known again
    limit: int | None
    channels: int | None
    floats: bool = False
    shape: tuple[int, ...] = ()
    dtype: str = ""
    first_name: str = ""
    span: Span | None = None
    taken: list[int] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    bad_items: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    noted: tuple[int, int] = (0, 0)  # images and bad ones that the progress file knows of

    @property
    def progress(self) -> Path:
        return self.path.with_name(self.path.name + ".progress")

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    # From item to file.

    def run(self, size: tuple[int, int] | None, skip_bad: bool) -> None:
        """Writes all images that are wanted and not yet there."""
        bar = tqdm(desc=f"writing {self.path.name}", unit="image", delay=2, disable=None, leave=False)
        noted_at = time.monotonic()
        with bar:
            while wanted := self.wanted():
                bar.total = len(self.taken) + len(wanted)
                bar.update(len(self.taken) - bar.n)
                with closing(_decoded(self.source, wanted, size, self.channels)) as images:
                    for i, image in zip(wanted, images, strict=True):
                        if isinstance(image, Prepared):
                            self.add(i, image)
                            bar.update()
                        elif skip_bad:
                            self.bad_items.append(i)
                            self.bad.append(str(image))
                        else:
                            raise ValueError(str(image)) from image.__cause__
                        if time.monotonic() - noted_at > NOTED_SECONDS:
                            self.note()
                            noted_at = time.monotonic()
                self.note()
        if not self.taken:
            raise ValueError(
                f"{self.source.name}: none of its {self.source.count} images can be read; the first: {self.bad[0]}"
            )

    def wanted(self) -> list[int]:
        """Items to take that are neither written nor bad: others take the place of bad ones, as far as there are."""
        bad, known = set(self.bad_items), set(self.taken)
        good = np.array([i for i in range(self.source.count) if i not in bad], dtype=np.int64)
        return [i for i in fair_share(good, self.source.labels, self.limit).tolist() if i not in known]

    def add(self, i: int, image: Prepared) -> None:
        name, pixels = self.source.item_name(i), image.pixels
        if not self.shape:
            self.shape, self.first_name, self.span = pixels.shape, name, image.span
            if self.floats and pixels.dtype == np.uint8:
                pixels = pixels.astype(np.float32) / 255
            self.dtype = pixels.dtype.str
            self.begin()
        check_same_size(pixels.shape, name, self.shape, self.first_name)
        if pixels.shape[0] != self.shape[0]:
            if self.shape[0] == 1:
                raise _Otherwise(channels=3)  # gray among RGB is RGB
            pixels = np.repeat(pixels, 3, axis=0)
        self.span = merged_span(self.span, image.span, name)
        if pixels.dtype == np.uint8 and self.dtype != "|u1":
            pixels = pixels.astype(np.float32) / 255  # multiples of 1/255 among other floats are floats
        elif pixels.dtype != np.uint8 and self.dtype == "|u1":
            raise _Otherwise(floats=True)
        self.file.write(np.ascontiguousarray(pixels).tobytes())
        self.taken.append(i)
        self.labels.append(image.label)

    def begin(self) -> None:
        """Room for the header; OSError where the disk has no room for the images."""
        count = min(self.source.count, self.limit or self.source.count)
        needed, free = count * self.image_bytes, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                f"{self.path}: {count} images of {' x '.join(map(str, self.shape))} take {needed / 1e9:.3g} GB, the "
                f"disk has {free / 1e9:.3g} GB"
            )
        self.file.seek(0)
        self.file.truncate()
        self.file.write(bytes(HEADER_BYTES))
        begun = {"shape": self.shape, "dtype": self.dtype, "first_name": self.first_name, "as_channels": self.channels}
        described = {**self.state, **begun, "as_floats": self.floats}
        self.progress.write_bytes(json.dumps(described).encode() + b"\n")

    # What is known after an interruption.

    def note(self) -> None:
        """Notes images whose pixels are on the disk."""
        if self.noted == (len(self.taken), len(self.bad)):
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        images, bad = self.noted
        record = {
            "items": self.taken[images:],
            "labels": [_plain(label, self.source.item_name(i)) for i, label in
                       zip(self.taken[images:], self.labels[images:], strict=True)],
            "bad_items": self.bad_items[bad:],
            "bad": self.bad[bad:],
            "span": self.span,
        }  # fmt: skip
        with errors_name(self.progress), open(self.progress, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.noted = len(self.taken), len(self.bad)

    def resume(self) -> None:
        """Takes up what an interrupted call with the same arguments left; anything else is begun again."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            first, *records = self.progress.read_bytes().split(b"\n")[:-1]  # the last line may be cut short
            described = parse_json(first)
            if {name: described[name] for name in self.state} != self.state:
                return
            shape, dtype = tuple(described["shape"]), described["dtype"]
            known: dict[str, list[Any]] = {"items": [], "labels": [], "bad_items": [], "bad": []}
            span = None
            for line in records:
                record = parse_json(line)
                for name, values in known.items():
                    values += record[name]
                span = record["span"]
            end = HEADER_BYTES + len(known["items"]) * math.prod(shape) * np.dtype(dtype).itemsize
            if os.fstat(self.file.fileno()).st_size < end:
                return
            self.file.seek(end)
            self.file.truncate()
            self.shape, self.dtype, self.first_name = shape, dtype, described["first_name"]
            self.channels, self.floats = described["as_channels"], described["as_floats"]
            self.span = None if span is None else Span(*span)
            self.taken, self.labels = known["items"], known["labels"]
            self.bad_items, self.bad = known["bad_items"], known["bad"]
            self.noted = len(self.taken), len(self.bad)

    def leave(self, interrupted: bool) -> None:
        """What a call that ends early leaves: what is whole, or nothing."""
        with suppress(OSError):
            if interrupted:
                self.note()
        if not self.noted[0]:
            self.progress.unlink(missing_ok=True)
            Path(self.file.name).unlink(missing_ok=True)

    # The end.

    def finish(self) -> Path:
        """The file of all images in the order of their items, with its header."""
        read_range(self.source.name, self.span, np.dtype(self.dtype))
        self.file.flush()
        ready = Path(self.file.name)
        if (np.diff(self.taken) < 0).any():  # others have taken the place of bad ones
            ready = self.in_order(ready)
        with errors_name(ready), open(ready, "r+b") as file:  # "a+b" would write at the end
            file.write(_header((len(self.taken), *self.shape), self.dtype))
            file.flush()
            os.fsync(file.fileno())
        return ready

    def in_order(self, partial: Path) -> Path:
        """A second file; the first stays, and is what an interrupted call goes on from."""
        order, path = np.argsort(self.taken), self.path.with_name(self.path.name + ".sorted")
        with errors_name(path), open(path, "wb") as target, open(partial, "rb") as file:
            target.write(bytes(HEADER_BYTES))
            for i in order.tolist():
                file.seek(HEADER_BYTES + i * self.image_bytes)
                target.write(file.read(self.image_bytes))
        self.taken = [self.taken[i] for i in order]
        self.labels = [self.labels[i] for i in order]
        return path

    def publish(self, ready: Path, with_labels: bool) -> None:
        """Puts labels and class names beside the file, and gives it its name last."""
        numbers, names = numbered(self.source, self.labels, self.taken) if with_labels else (None, None)
        for old in (self.path, *_about(self.path)):
            old.unlink(missing_ok=True)
        if numbers is not None:
            written = io.BytesIO()
            np.save(written, numbers)
            write_atomically(beside(self.path, ".labels.npy"), written.getvalue())
            if names is not None:
                write_atomically(beside(self.path, ".classes.json"), (json.dumps(names) + "\n").encode())
        os.replace(ready, self.path)
        self.progress.unlink(missing_ok=True)
        Path(self.file.name).unlink(missing_ok=True)


def _plain(label: Any, name: str) -> Any:
    """A label as JSON has it."""
    if label is None or isinstance(label, str):
        return label
    try:
        return label.__index__()
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name}: got a label of type {type(label).__name__}, takes an integer or a text; or pass labels=False"
        ) from None


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": dtype, "fortran_order": False, "shape": shape})
    assert written.tell() == HEADER_BYTES
    return written.getvalue()


def _decoded(
    source: Source, items: Sequence[int], size: tuple[int, int] | None, channels: int | None
) -> Generator[Prepared | UnreadableImage, None, None]:
    """Images in order, decoded by several threads at a time; read by one where the source has to be read in order."""

    def decode(i: int, read: tuple[Any, Any] | None) -> Prepared | UnreadableImage:
        try:
            image, label = source.item(i) if read is None else read
            return prepared(image, source.item_name(i), label, size, channels)
        except UnreadableImage as error:
            return error

    threads = max(source.threads, min(8, os.cpu_count() or 1))
    pending: deque[Future[Prepared | UnreadableImage] | UnreadableImage] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for i in items:
            try:
                read = source.item(i) if source.threads == 1 else None
                pending.append(pool.submit(decode, i, read))
            except UnreadableImage as error:
                pending.append(error)
            while len(pending) >= AHEAD * threads:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(of: Future[Prepared | UnreadableImage] | UnreadableImage) -> Prepared | UnreadableImage:
    return of.result() if isinstance(of, Future) else of
