"""Reads a source into one array: chooses which items to take, loads them, and brings them to one size and type.

No source is held at full size beside its resized copy unless it came as one array.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import checks
from ..pixels import is_one_image, known_channel_axis
from .arrays import npy_file
from .image import MOST_PIXELS, Prepared, Span, prepared
from .mapped import Mapped
from .opening import opened
from .source import Source, UnreadableImage, Wanted, one_line, printable

Read = TypeVar("Read", bound=Callable[..., Any])
Images = tuple[np.ndarray, "np.ndarray | None", "tuple[str, ...] | None"]


def printable_errors(function: Read) -> Read:
    """Errors with the control characters of names written out."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (ValueError, TypeError) as error:
            text = printable(str(error))
            if text == str(error):
                raise
            raise type(error)(text) from error

    return wrapped  # type: ignore[return-value]


@printable_errors
def read(source: Any, **asked: Any) -> Images:
    """Reads images [N, C, H, W] (uint8, or float32 in [-1, 1]), labels [N] int64 or None, and class names or None.

    docs/data.md lists the sources and how their labels and axes are read.

    Integers are pixels from 0 to 255. Floats are pixels in [-1, 1], with one exception: where all values of a source
    are multiples of 1/255 from 0 to 1, even ones among them, they are 8-bit images as torchvision's ToTensor leaves
    them, and go back to uint8 unchanged. (In [-1, 1] an 8-bit pixel u / 127.5 - 1 is an odd multiple of 1/255.) Any
    other source without a negative value could be either, and is refused.

    Args:
        source: a path, an array, a dict of arrays or columns, a dataset, an iterable, or the name of a built-in set.
        asked: the fields of `Reading`.

    Raises:
        ValueError: nothing to read, something unreadable (named by its path), mixed image sizes without `size`, a
            source of several parts without `split`, or more than `memory_limit`.
        TypeError: a source or an argument of the wrong type.
        ImportError: a source that an optional package reads, which is not installed; names the extra to install.
    """
    reading = Reading(**asked)
    with warnings.catch_warnings():
        # Pillow warns of images beyond 89 million pixels; ours are refused by name beyond MOST_PIXELS.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = reading.opened(source)
        count = found.count if reading.limit is None else min(reading.limit, found.count)
        collected = _Collected(found.name, count, reading.most)
        item_labels, taken, bad = _load(found, collected, reading)
    if bad:
        warn_left_out(found, [str(bad[i]) for i in sorted(bad)])

    order = np.argsort(taken)
    images = collected.finish()
    if (np.diff(order) < 0).any():
        images = images[order]
    numbers, names = numbered(found, item_labels, taken) if reading.labels else (None, None)
    return images, None if numbers is None else numbers[order], names


def warn_left_out(source: Source, bad: list[str]) -> None:
    """Counts the images that cannot be read, of which the first are shown; the line of the caller's caller is named."""
    shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    text = f"{source.name}: left out {len(bad)} images that cannot be read: {shown}"
    warnings.warn(printable(text), stacklevel=5)


def numbered(source: Source, labels: list[Any], taken: list[int]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """The labels of items as numbers, and the names of classes where all have one; None where there are no labels."""
    # -1 is how datasets without labels fill a column of them.
    if all(label is None or (label == -1) is True for label in labels):
        return None, None
    if None in labels:
        missing = taken[labels.index(None)]
        raise ValueError(f"{source.item_name(missing)}: no label, where other images have one; or pass labels=False")
    numbers, names = _numbers_of(labels, taken, source)
    return numbers, names if names and 0 <= numbers.min() <= numbers.max() < len(names) else None


def _load(
    source: Source, collected: _Collected | _OfAnySize, reading: Reading
) -> tuple[list[Any], list[int], dict[int, UnreadableImage]]:
    """Puts the images to take into `collected`; returns their labels, their item numbers, and the bad ones."""

    def load(i: int) -> Prepared | UnreadableImage:
        try:
            image, label = source.item(i)
            return prepared(image, source.item_name(i), label, reading.size, reading.channels)
        except UnreadableImage as error:
            return error

    # Which items to take: without the bad ones, of which some only show when their turn comes.
    item_labels: list[Any] = []
    taken: list[int] = []
    bad: dict[int, UnreadableImage] = {}
    while True:
        good = np.array([i for i in range(source.count) if i not in bad], dtype=np.int64)
        known = set(taken)
        wanted = [i for i in fair_share(good, source.labels, reading.limit).tolist() if i not in known]
        if not wanted:
            if not taken:
                first = bad[min(bad)]
                raise ValueError(f"{source.name}: none of its {source.count} images can be read; the first: {first}")
            return item_labels, taken, bad
        with closing(_map(load, wanted, source)) as loaded:
            for i, result in zip(wanted, loaded, strict=True):
                if isinstance(result, UnreadableImage):
                    if not reading.skip_bad:
                        raise ValueError(str(result)) from result.__cause__
                    bad[i] = result
                else:
                    collected.add(result, source.item_name(i))
                    item_labels.append(result.label)
                    taken.append(i)


def _numbers_of(labels: list[Any], taken: list[int], source: Source) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as numbers, and the names of the classes. Texts are numbered in their order, numbers stay."""
    texts = {label for label in labels if isinstance(label, str)}
    if not texts:
        return np.array([_label_number(n, source.item_name(i)) for n, i in zip(labels, taken, strict=True)]), (
            source.class_names
        )
    odd = next((i for label, i in zip(labels, taken, strict=True) if not isinstance(label, str)), None)
    if odd is not None:
        raise ValueError(f"{source.item_name(odd)}: a label that is a number, where others are texts")
    names = source.class_names
    if names is None or not texts <= set(names):
        names = tuple(sorted(texts))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[label] for label in labels], dtype=np.int64), names


def _label_number(label: Any, name: str) -> int:
    try:
        return int(np.int64(operator.index(label)))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(
            f"{name}: got a label of type {type(label).__name__}, takes an integer or a text; or pass labels=False"
        ) from None


# The arguments.


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size: got {size!r}, takes a number or (height, width)")
    height, width = (checks.integer("size", side, at_least=1) for side in sides)
    if height * width > MOST_PIXELS:
        raise ValueError(f"size: got {height} x {width}, takes images of at most {MOST_PIXELS:,} pixels")
    return height, width


@dataclass
class Reading:
    """How a source is read: the arguments of all that read one, checked.

    Args:
        size: size x size or (height, width). Images of another aspect ratio are cropped about their centre to the
            target's, then resized with PIL's bilinear filter; None keeps the size, which must then be the same for all.
        channels: 1 or 3 converts to gray (ITU-R 601 luma) or RGB. None keeps them, RGB where gray and RGB are mixed.
        labels: whether to read labels where the source has them.
        limit: at most so many images: the first ones, and with labels the first ones of every class, as equally from
            all classes as possible. The order is kept.
        skip_bad: leave out images that cannot be read (not whole files of another kind), with one warning.
        split: which part of a source that comes in parts: "train", "test", "val" or as the source names them.
        image_key, label_key: the names of images and labels in a source that holds several things.
        memory_limit: the largest size of the images in bytes, once read; None: the memory of this machine.

    Raises:
        ValueError, TypeError: an argument out of its range, or of the wrong type.
    """

    size: Any = None
    channels: int | None = None
    labels: bool = True
    limit: int | None = None
    skip_bad: bool = False
    split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        self.size = _checked_size(self.size)
        if self.channels is not None and (isinstance(self.channels, bool) or self.channels not in (1, 3)):
            raise ValueError(f"channels: got {self.channels!r}, takes 1, 3 or None")
        if self.limit is not None:
            self.limit = checks.integer("limit", self.limit, at_least=1)
        if self.memory_limit is not None:
            self.memory_limit = checks.integer("memory_limit", self.memory_limit, at_least=1)
        for name in ("split", "image_key", "label_key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: got {value!r}, takes a text")

    @property
    def most(self) -> int:
        """Bytes that the images may take."""
        return memory_of_machine() if self.memory_limit is None else self.memory_limit

    @property
    def wanted(self) -> Wanted:
        """What kinds of sources are asked for."""
        return Wanted(self.labels, self.limit, self.split, self.image_key, self.label_key, self.most)

    def opened(self, source: Any) -> Source:
        """The source, which holds images; ValueError where it holds none."""
        found = opened(source, self.wanted)
        if found.count == 0:
            raise ValueError(f"{found.name}: no images found")
        return found


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container has, versions 2 and 1."""


def memory_of_machine() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        most = 1 << 40
    for path in _CGROUP_LIMITS:
        try:
            with open(path, encoding="ascii") as file:
                most = min(most, int(file.read()))
        except (OSError, ValueError):  # not Linux, or "max"
            pass
    return most


# Which items are taken, and how they are loaded.


def fair_share(items: np.ndarray, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
    """The items to take, at most `limit`, in order: the first of every class before the second of any, and so on."""
    if limit is None or len(items) <= limit:
        return items
    if labels is None:
        return items[:limit]
    classes = labels[items]
    by_class = np.argsort(classes, kind="stable")
    rank = np.empty(len(items), dtype=np.int64)
    rank[by_class] = np.arange(len(items)) - np.searchsorted(classes[by_class], classes[by_class])
    return items[np.sort(np.lexsort((classes, rank))[:limit])]


def _map(load: Callable[[int], Any], items: Sequence[int], source: Source) -> Generator[Any, None, None]:
    """load(i) for all items, in order, on the source's threads, under a progress bar."""
    bar = tqdm(total=len(items), desc="reading images", unit="image", delay=2, disable=None, leave=False)
    pool = ThreadPoolExecutor(source.threads) if source.threads > 1 else None
    try:
        for result in map(load, items) if pool is None else pool.map(load, items):
            bar.update()
            yield result
    finally:
        bar.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


# Images that stay in their file.


MAPPED_SHARE = 0.25
"""Of the memory (or of `memory_limit`): a .npy file with more images is mapped, where it can be, and not read."""


@printable_errors
def read_mapped(
    source: Any, mapped: bool | None = None, **asked: Any
) -> tuple[Mapped, np.ndarray | None, tuple[str, ...] | None, np.ndarray | None] | None:
    """The images of a .npy file where they lie, their labels and class names, and which images to take (None: all).

    None where they are to be read instead: with mapped=None what cannot be mapped, and what takes less than
    MAPPED_SHARE of the memory.

    Raises:
        ValueError: with mapped=True, a source that cannot be mapped; says why.
    """
    reading = Reading(**asked)
    found, reason = _mappable(source, reading.size, reading.channels)
    if found is not None and not mapped and found.nbytes <= MAPPED_SHARE * reading.most:
        return None
    if found is not None and found.images.is_floating_point() and found.extremes()[0] >= 0:
        found, reason = None, f"{source} has no value below 0, which could mean [0, 1] or [-1, 1]"
    if found is None:
        if mapped:
            raise ValueError(
                f"mapped: {reason}; `patchscore bank SOURCE --out bank.npy` writes a file that can be mapped"
            )
        return None
    wanted = reading.wanted
    listed = npy_file(found.path, wanted)
    wanted.check_used(listed.name)
    members = None
    if reading.limit is not None and reading.limit < listed.count:
        members = fair_share(np.arange(listed.count), listed.labels, reading.limit)
    return found, listed.labels, listed.class_names, members


def _mappable(source: Any, size: tuple[int, int] | None, channels: int | None) -> tuple[Mapped | None, str]:
    """The map of a source, or why there is none."""
    if not isinstance(source, (str, os.PathLike)):
        return None, f"got {type(source).__name__}, takes the path of a .npy file"
    try:
        with open(source, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        array = np.load(source, mmap_mode="r", allow_pickle=False) if is_npy else None
    except Exception as error:  # numpy parses the header of a damaged file with whatever it stumbles over
        return None, f"{source} cannot be mapped ({one_line(error)})"
    if array is None:
        return None, f"{source} is no .npy file"
    if array.dtype not in (np.uint8, np.float32) or not array.dtype.isnative:
        return None, f"{source} holds {array.dtype}, takes uint8 or float32"
    if array.ndim == 3 and array.shape[0] != 3 and not is_one_image(array.shape):
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape or known_channel_axis(array.shape, str(source)) != -3:
        return None, f"{source} has shape {list(array.shape)}, takes [N, C, H, W]"
    if size not in (None, array.shape[2:]) or channels not in (None, array.shape[1]):
        return None, f"{source} has images of {' x '.join(map(str, array.shape[1:]))}, which would be converted"
    found = Mapped.of(array)
    return found, f"{source} lies in Fortran order"


# All images: one array.


class MixedSizes(ValueError):
    """Images of several sizes, where one size is asked for."""


class _Collected:
    """Images of one shape, collected in one array as they come."""

    def __init__(self, source: str, capacity: int, most_bytes: int):
        self.source = source
        self.capacity = capacity
        self.most_bytes = most_bytes
        self.filled = 0
        self.array: np.ndarray = np.empty((0, 0, 0, 0), dtype=np.uint8)
        self.span: Span | None = None
        self.first_name = ""

    def add(self, image: Prepared, name: str) -> None:
        pixels = image.pixels
        if self.filled == 0:
            self._check_memory(pixels.shape, pixels.dtype)
            self.array = np.empty((self.capacity, *pixels.shape), dtype=pixels.dtype)
            self.first_name, self.span = name, image.span
        check_same_size(pixels.shape, name, self.array.shape[1:], self.first_name)
        self.span = merged_span(self.span, image.span, name)
        # Gray among RGB is RGB.
        if (pixels.shape[0], self.array.shape[1]) == (1, 3):
            pixels = np.repeat(pixels, 3, axis=0)
        elif (pixels.shape[0], self.array.shape[1]) == (3, 1):
            self._check_memory(pixels.shape, self.array.dtype)
            self.array = np.repeat(self.array, 3, axis=1)
        # Multiples of 1/255 among other floats are floats.
        if pixels.dtype == np.uint8 and self.array.dtype != np.uint8:
            pixels = pixels.astype(np.float32) / 255
        elif pixels.dtype != np.uint8 and self.array.dtype == np.uint8:
            self._check_memory(self.array.shape[1:], np.dtype(np.float32))
            self.array = self.array.astype(np.float32) / 255
        self.array[self.filled] = pixels
        self.filled += 1

    def _check_memory(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        needed = self.capacity * math.prod(shape) * dtype.itemsize
        if needed > self.most_bytes:
            raise ValueError(
                f"{self.source}: {self.capacity} images of {' x '.join(map(str, shape))} take {needed / 1e9:.3g} GB, "
                f"more than the memory limit of {self.most_bytes / 1e9:.3g} GB; pass size or limit (on the command "
                f"line --size, --limit)"
            )

    def finish(self) -> np.ndarray:
        images = self.array[: self.filled]
        read_range(self.source, self.span, images.dtype)
        return images


def check_same_size(here: tuple[int, ...], name: str, there: tuple[int, ...], first_name: str) -> None:
    """ValueError where an image [C, H, W] does not go with the first one: gray and RGB do."""
    if here[1:] != there[1:]:
        raise MixedSizes(
            f"mixed image sizes: {first_name} is {there[1]} x {there[2]} (height x width), {name} is {here[1]} x "
            f"{here[2]}; pass size (on the command line --size) to bring all to one, or take them as a MixedBank"
        )
    if here[0] != there[0] and {here[0], there[0]} != {1, 3}:
        raise ValueError(f"mixed channels: {first_name} has {there[0]}, {name} has {here[0]}")


def merged_span(ours: Span | None, span: Span | None, name: str) -> Span | None:
    """What is known of the values of images and one more; ValueError where 8-bit images and others meet."""
    if (span is None) != (ours is None):
        kinds = ("8-bit", "floating point") if span is None else ("floating point", "8-bit")
        raise ValueError(f"{name}: {kinds[0]} image among {kinds[1]} ones")
    if span is None or ours is None:
        return None
    return Span(min(span.low, ours.low), max(span.high, ours.high), span.has_even or ours.has_even)


def read_range(source: str, span: Span | None, dtype: np.dtype) -> None:
    """ValueError where values could be from either of two ranges."""
    if span is None or span.low < 0 or (dtype == np.uint8 and span.has_even and span.low < span.high):
        return
    raise ValueError(
        f"{source}: floating point values from {span.low:.4g} to {span.high:.4g} could mean [0, 1] or [-1, 1]; scale "
        f"them to [-1, 1] (2 x - 1, in torchvision Normalize(0.5, 0.5)), or where they are that already, pass the "
        f"array to PatchBank itself"
    )


# Images of several sizes: an array for each.


class _OfAnySize(list[Prepared]):
    """Images of any shape, collected as they come."""

    def add(self, image: Prepared, name: str) -> None:
        self.append(image)


@printable_errors
def read_sizes(source: Any, **asked: Any) -> list[tuple[Images, np.ndarray]]:
    """As `read`, for images of several sizes as they are: for each size its images, and their positions among all.

    The size of most images comes first. Channels and class numbers are the same for all.
    """
    reading, images = Reading(**asked), _OfAnySize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = reading.opened(source)
        given, taken, bad = _load(found, images, reading)
    if bad:
        warn_left_out(found, [str(bad[i]) for i in sorted(bad)])
    order = np.argsort(taken).tolist()
    most_channels = max(image.pixels.shape[0] for image in images)
    numbers, names = numbered(found, given, taken) if reading.labels else (None, None)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for at, i in enumerate(order):
        by_size.setdefault(images[i].pixels.shape[1:], []).append(at)
    read_ones: list[tuple[Images, np.ndarray]] = []
    for members in sorted(by_size.values(), key=len, reverse=True):
        collected = _Collected(found.name, len(members), reading.most)
        for i in (order[at] for at in members):
            collected.add(images[i], found.item_name(taken[i]))
        array = collected.finish()
        if array.shape[1] == 1 and most_channels == 3:
            array = np.repeat(array, 3, axis=1)
        labels = None if numbers is None else numbers[[order[at] for at in members]]
        read_ones.append(((array, labels, names), np.array(members)))
    return read_ones
