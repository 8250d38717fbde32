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
from typing import Any, NamedTuple, TypeVar

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
def read(
    source: Any,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    skip_bad: bool = False,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    memory_limit: int | None = None,
) -> Images:
    """Reads images [N, C, H, W] (uint8, or float32 in [-1, 1]), labels [N] int64 or None, and class names or None.

    docs/data.md lists the sources and how their labels and axes are read.

    Integers are pixels from 0 to 255. Floats are pixels in [-1, 1], with one exception: where all values of a source
    are multiples of 1/255 from 0 to 1, even ones among them, they are 8-bit images as torchvision's ToTensor leaves
    them, and go back to uint8 unchanged. (In [-1, 1] an 8-bit pixel u / 127.5 - 1 is an odd multiple of 1/255.) Any
    other source without a negative value could be either, and is refused.

    Args:
        source: a path, an array, a dict of arrays or columns, a dataset, an iterable, or the name of a built-in set.
        size: size x size or (height, width). Images of another aspect ratio are cropped about their centre to the
            target's, then resized with PIL's bilinear filter; None keeps the size, which must then be the same for all.
        channels: 1 or 3 converts to gray (ITU-R 601 luma) or RGB. None keeps them, RGB where gray and RGB are mixed.
        labels: whether to read labels where the source has them.
        limit: at most so many images: the first ones, and with labels the first ones of every class, as equal a share
            of each as there is. The order is kept.
        skip_bad: leave out images that cannot be read (not whole files of another kind), with one warning.
        split: which part of a source that comes in parts: "train", "test", "val" or as the source names them.
        image_key, label_key: the names of images and labels in a source that holds several things.
        memory_limit: the largest size of the images in bytes, once read; None: the memory of this machine.

    Raises:
        ValueError: nothing to read, something unreadable (named by its path), mixed image sizes without `size`, a
            source of several parts without `split`, or more than `memory_limit`.
        TypeError: a source or an argument of the wrong type.
        ImportError: a source that an optional package reads, which is not installed; names the extra to install.
    """
    asked = checked_reading(size, channels, limit, memory_limit, split, image_key, label_key)
    target, limit, most = asked.size, asked.limit, asked.most
    with warnings.catch_warnings():
        # Pillow warns of images beyond 89 million pixels; ours are refused by name beyond MOST_PIXELS.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = opened(source, Wanted(labels, limit, split, image_key, label_key, most))
        if found.count == 0:
            raise ValueError(f"{found.name}: no images found")
        collected = _Collected(found.name, found.count if limit is None else min(limit, found.count), most)
        item_labels, taken, bad = _load(found, collected, target, channels, limit, skip_bad)
    if not taken:
        raise ValueError(f"{found.name}: none of its {found.count} images can be read; the first: {bad[min(bad)]}")
    if bad:
        shown = "; ".join(str(bad[i]) for i in sorted(bad)[:3]) + ("; ..." if len(bad) > 3 else "")
        text = f"{found.name}: left out {len(bad)} images that cannot be read: {shown}"
        warnings.warn(printable(text), stacklevel=4)

    order = np.argsort(taken)
    images = collected.finish()
    if (np.diff(order) < 0).any():
        images = images[order]
    numbers, names = numbered(found, item_labels, taken) if labels else (None, None)
    return images, None if numbers is None else numbers[order], names


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
    source: Source,
    collected: _Collected,
    size: tuple[int, int] | None,
    channels: int | None,
    limit: int | None,
    skip_bad: bool,
) -> tuple[list[Any], list[int], dict[int, UnreadableImage]]:
    """Puts the images to take into `collected`; returns their labels, their item numbers, and the bad ones."""

    def load(i: int) -> Prepared | UnreadableImage:
        try:
            image, label = source.item(i)
            return prepared(image, source.item_name(i), label, size, channels)
        except UnreadableImage as error:
            return error

    # Which items to take: without the bad ones, of which some only show when their turn comes.
    item_labels: list[Any] = []
    taken: list[int] = []
    bad: dict[int, UnreadableImage] = {}
    while True:
        good = np.array([i for i in range(source.count) if i not in bad], dtype=np.int64)
        known = set(taken)
        wanted = [i for i in fair_share(good, source.labels, limit).tolist() if i not in known]
        if not wanted:
            return item_labels, taken, bad
        with closing(_map(load, wanted, source)) as loaded:
            for i, result in zip(wanted, loaded, strict=True):
                if isinstance(result, UnreadableImage):
                    if not skip_bad:
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


def _check_channels(channels: Any) -> None:
    if channels is not None and (isinstance(channels, bool) or channels not in (1, 3)):
        raise ValueError(f"channels: got {channels!r}, takes 1, 3 or None")


class Reading(NamedTuple):
    """How a source is read: (height, width) of the images, how many at most, most bytes."""

    size: tuple[int, int] | None
    limit: int | None
    most: int


def checked_reading(
    size: Any, channels: Any, limit: Any, memory_limit: Any, split: Any, image_key: Any, label_key: Any
) -> Reading:
    """The arguments that all ways to read a source have; ValueError or TypeError for others."""
    target = _checked_size(size)
    _check_channels(channels)
    limit = None if limit is None else checks.integer("limit", limit, at_least=1)
    most = memory_of_machine() if memory_limit is None else checks.integer("memory_limit", memory_limit, at_least=1)
    for name, value in (("split", split), ("image_key", image_key), ("label_key", label_key)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: got {value!r}, takes a text")
    return Reading(target, limit, most)


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
    source: Any,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    memory_limit: int | None = None,
    mapped: bool | None = None,
) -> tuple[Mapped, np.ndarray | None, tuple[str, ...] | None, np.ndarray | None] | None:
    """The images of a .npy file where they lie, their labels and class names, and which images to take (None: all).

    None where they are to be read instead: with mapped=None what cannot be mapped, and what takes less than
    MAPPED_SHARE of the memory.

    Raises:
        ValueError: with mapped=True, a source that cannot be mapped; says why.
    """
    asked = checked_reading(size, channels, limit, memory_limit, split, image_key, label_key)
    limit = asked.limit
    found, reason = _mappable(source, asked.size, channels)
    if found is not None and not mapped and found.nbytes <= MAPPED_SHARE * asked.most:
        return None
    if found is not None and found.images.is_floating_point() and found.extremes()[0] >= 0:
        found, reason = None, f"{source} has no value below 0, which could mean [0, 1] or [-1, 1]"
    if found is None:
        if mapped:
            raise ValueError(
                f"mapped: {reason}; `patchscore bank SOURCE --out bank.npy` writes a file that can be mapped"
            )
        return None
    wanted = Wanted(labels, limit, split, image_key, label_key)
    listed = npy_file(found.path, wanted)
    wanted.check_used(listed.name)
    members = None
    if limit is not None and limit < listed.count:
        members = fair_share(np.arange(listed.count), listed.labels, limit)
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


@printable_errors
def read_sizes(
    source: Any,
    channels: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    skip_bad: bool = False,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> list[tuple[Images, np.ndarray]]:
    """As `read`, for images of several sizes as they are: for each size its images, and their places among all.

    The size of most images comes first. Channels and class numbers are the same for all.
    """
    asked = checked_reading(None, channels, limit, None, split, image_key, label_key)
    most, bad = asked.most, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = opened(source, Wanted(labels, asked.limit, split, image_key, label_key, most))
        images: list[tuple[int, Prepared]] = []
        for i in fair_share(np.arange(found.count), found.labels, asked.limit).tolist():
            try:
                image, label = found.item(i)
                images.append((i, prepared(image, found.item_name(i), label, None, channels)))
            except UnreadableImage as error:
                if not skip_bad:
                    raise ValueError(str(error)) from error.__cause__
                bad += 1
    if not images:
        raise ValueError(f"{found.name}: no images found")
    if bad:
        warnings.warn(printable(f"{found.name}: left out {bad} images that cannot be read"), stacklevel=4)
    most_channels = max(image.pixels.shape[0] for _, image in images)
    given = [image.label for _, image in images]
    numbers, names = numbered(found, given, [i for i, _ in images]) if labels else (None, None)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for at, (_, image) in enumerate(images):
        by_size.setdefault(image.pixels.shape[1:], []).append(at)
    read_ones: list[tuple[Images, np.ndarray]] = []
    for members in sorted(by_size.values(), key=len, reverse=True):
        collected = _Collected(found.name, len(members), most)
        for at in members:
            i, image = images[at]
            collected.add(image, found.item_name(i))
        array = collected.finish()
        if array.shape[1] == 1 and most_channels == 3:
            array = np.repeat(array, 3, axis=1)
        read_ones.append(((array, None if numbers is None else numbers[members], names), np.array(members)))
    return read_ones
