"""Where images come from: folders, NumPy and IDX files, dataset objects, and the built-in set.

Every kind of source is opened as one thing, a `Source`: a number of images, item i on demand, and what is known of the
labels beforehand. `read` then chooses which items to take, loads them, brings them to one size and number of channels,
and collects them in one array; no source is held at full size beside its resized copy unless it came as one array.
"""

from __future__ import annotations

import gzip
import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from . import checks
from .checks import RANGE_TOLERANCE

BUILT_IN = ("fashion-mnist",)
"""Names that `read` takes in place of a path. A folder of the same name is opened as "./fashion-mnist"."""

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label")
NPZ_IMAGE_KEYS = ("images", "x", "x_train", "data", "arr_0")
NPZ_LABEL_KEYS = ("labels", "y", "y_train")
MOST_CHANNELS = 4
"""An axis this short or shorter can be the channels of an array."""

Images = tuple[np.ndarray, "np.ndarray | None", "tuple[str, ...] | None"]


def read(
    source: Any,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Images:
    """Reads images [N, C, H, W] (uint8, or float32 in [-1, 1]), labels [N] int64 or None, and class names or None.

    Sources:
        A folder: every image file below it, in the order of their paths, upright (EXIF), first frame, transparency over
            black, 16-bit gray scaled to 8 bits. Hidden files and files without an image suffix are ignored. Where all
            images lie in subfolders, the first-level subfolders are the classes, numbered in the order of their names.
            A folder that holds train-images-idx3-ubyte(.gz) is opened as that file.
        .npy, .npz: [N, H, W], [N, C, H, W] or [N, H, W, C]. The channels are whichever of the second and the last axis
            is at most 4 long, or if both are, whichever is 1 or 3; where that leaves a doubt the file is refused. In an
            .npz the images are called images, x, x_train, data or arr_0, the labels labels, y or y_train, and there may
            be class_names. Numpy arrays and torch tensors are taken by the same rule.
        IDX, plain or gzipped; labels from the file beside it by the MNIST naming (images-idx3 -> labels-idx1).
        "fashion-mnist": 4,000 training images, 400 a class, inside the package.
        A dataset, any object with `__len__` and `__getitem__`: items are images, (image, label), or dicts with image,
            img or pixel_values and label, labels or fine_label. Images are PIL images, or arrays or tensors with the
            channels first or last (by the rule for .npy).

    Integers are pixels from 0 to 255. Floats are pixels in [-1, 1], with one exception: where all values of a source
    are multiples of 1/255 from 0 to 1, even ones among them, they are 8-bit images as torchvision's ToTensor leaves
    them, and go back to uint8 unchanged. (In [-1, 1] an 8-bit pixel u / 127.5 - 1 is an odd multiple of 1/255.) Any
    other source without a negative value could be either, and is refused.

    Args:
        source: one of the above.
        size: size x size or (height, width). Images of another aspect ratio are cropped about their centre to the
            target's, then resized with PIL's bilinear filter; None keeps the size, which must then be the same for all.
        channels: 1 or 3 converts to gray (ITU-R 601 luma) or RGB. None keeps them, RGB where gray and RGB are mixed.
        labels: whether to read labels where the source has them.
        limit: at most so many images: the first ones, and with labels the first ones of every class, as equal a share
            of each as there is. The order is kept.
        skip_bad: leave out images that cannot be read (not whole files of another kind), with one warning.

    Raises:
        ValueError: nothing to read, something unreadable (named by its path), or mixed image sizes without `size`.
        TypeError: a source or an argument of a type that is not taken.
    """
    target = _checked_size(size)
    if channels is not None and (isinstance(channels, bool) or channels not in (1, 3)):
        raise ValueError(f"channels: got {channels!r}, takes 1, 3 or None")
    limit = None if limit is None else checks.integer("limit", limit, at_least=1)
    opened = _opened(source, labels, limit)
    if opened.count == 0:
        raise ValueError(f"{opened.name}: no images found")

    def load(i: int) -> _Prepared | _Unreadable:
        try:
            image, label = opened.item(i)
            return _prepared(image, opened.item_name(i), label, target, channels)
        except _Unreadable as error:
            return error

    # Which items to take: without the bad ones, of which some only show when their turn comes.
    pixels = _Pixels(opened.name, opened.count if limit is None else min(limit, opened.count))
    item_labels: list[int | None] = []
    taken: list[int] = []
    bad: dict[int, _Unreadable] = {}
    while True:
        good = np.array([i for i in range(opened.count) if i not in bad], dtype=np.int64)
        known = set(taken)
        wanted = [i for i in _fair_share(good, opened.labels, limit).tolist() if i not in known]
        if not wanted:
            break
        with closing(_map(load, wanted, opened)) as loaded:
            for i, result in zip(wanted, loaded, strict=True):
                if isinstance(result, _Unreadable):
                    if not skip_bad:
                        raise result
                    bad[i] = result
                else:
                    pixels.add(result, opened.item_name(i))
                    item_labels.append(result.label)
                    taken.append(i)
    if not taken:
        raise ValueError(f"{opened.name}: none of its {opened.count} images can be read; the first: {bad[min(bad)]}")
    if bad:
        shown = "; ".join(str(bad[i]) for i in sorted(bad)[:3]) + ("; ..." if len(bad) > 3 else "")
        warnings.warn(f"{opened.name}: left out {len(bad)} images that cannot be read: {shown}", stacklevel=3)

    order = np.argsort(taken)
    images = pixels.finish()
    if (np.diff(order) < 0).any():
        images = images[order]
    if not labels or all(label is None for label in item_labels):
        return images, None, None
    if None in item_labels:
        missing = taken[item_labels.index(None)]
        raise ValueError(f"{opened.item_name(missing)}: no label, where other images have one; or pass labels=False")
    numbers = np.array(item_labels, dtype=np.int64)[order]
    names = opened.class_names
    return images, numbers, names if names is not None and numbers.max() < len(names) else None


# The arguments.


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"size: got {size!r}, takes a number or (height, width)")
        return checks.integer("size", size[0], at_least=1), checks.integer("size", size[1], at_least=1)
    side = checks.integer("size", size, at_least=1)
    return side, side


# What a source is, and which of its items are taken.


class _Unreadable(ValueError):
    """One image that cannot be read; what skip_bad leaves out."""


@dataclass(frozen=True)
class Source:
    """`item(i)` is image i, a PIL image or an array [C, H, W] of any numbers, and its label or None.

    `labels` are those that are known without loading items, or None.
    """

    name: str
    count: int
    item: Callable[[int], tuple[Any, int | None]]
    item_name: Callable[[int], str]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    threads: int = 1


def _opened(source: Any, labels: bool, limit: int | None) -> Source:
    if isinstance(source, str) and source in BUILT_IN:
        with resources.as_file(resources.files(__package__) / "data" / f"{source}.npz") as path:
            return _numpy_file(path, labels)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise ValueError("source: got an empty path")
        return _path(Path(source), labels)
    if isinstance(source, (np.ndarray, Tensor)):
        return _array("source", _as_numpy(source))
    if isinstance(source, Mapping):
        raise TypeError(f"source: got a {type(source).__name__} of {list(source)[:5]}; pass one of its values")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (bytes, bytearray)):
        return _dataset(source, labels, limit)
    raise TypeError(
        f"source: got {type(source).__name__}, takes a folder, a .npy, .npz or IDX file, an object with __len__ and "
        f"__getitem__, or {' or '.join(map(repr, BUILT_IN))}"
    )


def _path(path: Path, labels: bool) -> Source:
    if os.path.isdir(path):
        idx = _idx_in_folder(path)
        return _folder(path, labels) if idx is None else _idx_file(idx, labels)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder; the built-in source is {' or '.join(map(repr, BUILT_IN))}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: neither a file nor a folder")
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if start[:2] == b"\x1f\x8b" or start[:2] == b"\x00\x00":
        return _idx_file(path, labels)
    if start == b"\x93NUMPY" or start[:2] == b"PK":
        return _numpy_file(path, labels)
    raise ValueError(f"{path}: takes a folder of images, or a .npy, .npz or IDX file, and this is none of them")


def _fair_share(items: np.ndarray, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
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


# One image: pixels, channels, size.


class _Prepared(NamedTuple):
    """One image as it goes into the bank; `span` says of float images what their values were before any resizing."""

    pixels: np.ndarray  # [C, H, W], uint8 or float32
    label: int | None
    span: _Span | None


class _Span(NamedTuple):
    low: float
    high: float
    has_even: bool  # whether some value is an even multiple of 1/255, as no 8-bit image in [-1, 1] has


def _prepared(
    image: Any, name: str, label: int | None, size: tuple[int, int] | None, channels: int | None
) -> _Prepared:
    if isinstance(image, Image.Image):
        pixels, span = _pil_pixels(image, name), None
    elif isinstance(image, np.ndarray):
        pixels, span = _array_pixels(image, name)
    else:
        raise TypeError(f"{name}: got {type(image).__name__}, takes a PIL image, numpy array or torch tensor")
    if channels is not None:
        pixels = _with_channels(pixels, channels, name)
    if size is not None:
        pixels = _resized(pixels, size)
    return _Prepared(pixels, label, span)


def _pil_pixels(image: Image.Image, name: str) -> np.ndarray:
    """[1 or 3, H, W] uint8 of a PIL image of any mode."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _from_16_bits(np.asarray(image).astype(np.int64))
        if image.mode == "F":
            raise ValueError("floating point image files have no known range; save it with 8 or 16 bits")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        pixels = np.asarray(image.convert(mode))
    # Pillow's decoders meet foreign bytes and raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise _unreadable(name, error) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values from {values.min()} to {values.max()}, gray images of over 8 bits take 0 to 65535")
    return ((values + 128) // 257).astype(np.uint8)[None]


def _array_pixels(array: np.ndarray, name: str) -> tuple[np.ndarray, _Span | None]:
    """The pixels of an array [C, H, W] as uint8 or float32; floats in [0, 1] that came from 8 bits go back there."""
    if array.dtype == np.uint8:
        return array, None
    if array.dtype.kind in "iu":
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise ValueError(f"{name}: integers from {low} to {high}, takes 0 to 255")
        return array.astype(np.uint8), None
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: got dtype {array.dtype}, takes integers from 0 to 255 or floating point in [-1, 1]")
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: NaN or infinite pixels")
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"{name}: values from {low:.4g} to {high:.4g}, floating point images take [-1, 1]")
    steps = np.rint(values * 255)
    if low >= 0 and high <= 1 and (np.abs(values * 255 - steps) < 1e-3).all():
        return steps.astype(np.uint8), _Span(low, high, bool((steps % 2 == 0).any()))
    return values, _Span(low, high, False)


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """A view [..., C, H, W] of an array whose channels are third from last or last, told by their number."""
    first, last = array.shape[-3] <= MOST_CHANNELS, array.shape[-1] <= MOST_CHANNELS
    # Where an image is itself so small that both could be channels, 1 or 3 at one end and not at the other decides.
    if first and last:
        first, last = array.shape[-3] in (1, 3), array.shape[-1] in (1, 3)
    if first == last:
        raise ValueError(
            f"{name}: in shape {list(array.shape)} either the channels come first or last, and which cannot be told by "
            f"their number; PatchBank(array) takes [N, C, H, W] only"
        )
    return array if first else np.moveaxis(array, -1, -3)


def _with_channels(pixels: np.ndarray, channels: int, name: str) -> np.ndarray:
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1:
        return np.repeat(pixels, channels, axis=0)
    if len(pixels) != 3:
        raise ValueError(f"{name}: has {len(pixels)} channels; channels={channels} converts from 1 or 3")
    if pixels.dtype == np.uint8:
        # PIL's convert("L"), in its own fixed-point arithmetic.
        red, green, blue = pixels.astype(np.uint32)
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[None]
    red, green, blue = pixels
    return (0.299 * red + 0.587 * green + 0.114 * blue).astype(np.float32)[None]


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre-cropped to the target's aspect ratio, then PIL's bilinear, channel by channel."""
    height, width = pixels.shape[1:]
    if (height, width) == size:
        return pixels
    # The largest box of the target's shape that fits; all of the image where the shapes agree.
    scale = min(height / size[0], width / size[1])
    cropped_height, cropped_width = min(scale * size[0], height), min(scale * size[1], width)
    top, left = (height - cropped_height) / 2, (width - cropped_width) / 2
    box = (left, top, left + cropped_width, top + cropped_height)
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels)
    return np.stack([np.asarray(p.resize(size[::-1], Image.Resampling.BILINEAR, box=box)) for p in planes])


def _as_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype.is_floating_point else array).numpy()


# All images: one array.


class _Pixels:
    """Images of one shape, collected in one array as they come."""

    def __init__(self, source: str, capacity: int):
        self.source = source
        self.capacity = capacity
        self.filled = 0
        self.array: np.ndarray = np.empty((0, 0, 0, 0), dtype=np.uint8)
        self.span: _Span | None = None
        self.first_name = ""

    def add(self, image: _Prepared, name: str) -> None:
        pixels = image.pixels
        if self.filled == 0:
            self.array = np.empty((self.capacity, *pixels.shape), dtype=pixels.dtype)
            self.first_name, self.span = name, image.span
        self._check_same_size(pixels, name)
        self._merge_span(image.span, name)
        # Gray among RGB is RGB.
        if (pixels.shape[0], self.array.shape[1]) == (1, 3):
            pixels = np.repeat(pixels, 3, axis=0)
        elif (pixels.shape[0], self.array.shape[1]) == (3, 1):
            self.array = np.repeat(self.array, 3, axis=1)
        # Multiples of 1/255 among other floats are floats.
        if pixels.dtype == np.uint8 and self.array.dtype != np.uint8:
            pixels = pixels.astype(np.float32) / 255
        elif pixels.dtype != np.uint8 and self.array.dtype == np.uint8:
            self.array = self.array.astype(np.float32) / 255
        self.array[self.filled] = pixels
        self.filled += 1

    def _check_same_size(self, pixels: np.ndarray, name: str) -> None:
        here, there = pixels.shape, self.array.shape[1:]
        if here[1:] != there[1:]:
            raise ValueError(
                f"mixed image sizes: {self.first_name} is {there[1]} x {there[2]} (height x width), {name} is "
                f"{here[1]} x {here[2]}; pass size (on the command line --size) to bring all to one"
            )
        if here[0] != there[0] and {here[0], there[0]} != {1, 3}:
            raise ValueError(f"mixed channels: {self.first_name} has {there[0]}, {name} has {here[0]}")

    def _merge_span(self, span: _Span | None, name: str) -> None:
        if (span is None) != (self.span is None):
            kinds = ("8-bit", "floating point") if span is None else ("floating point", "8-bit")
            raise ValueError(f"{name}: {kinds[0]} image among {kinds[1]} ones")
        if span is not None and self.span is not None:
            low, high = min(span.low, self.span.low), max(span.high, self.span.high)
            self.span = _Span(low, high, span.has_even or self.span.has_even)

    def finish(self) -> np.ndarray:
        images = self.array[: self.filled]
        if self.span is None or self.span.low < 0:
            return images
        if images.dtype == np.uint8 and self.span.has_even and self.span.low < self.span.high:
            return images
        raise ValueError(
            f"{self.source}: floating point values from {self.span.low:.4g} to {self.span.high:.4g} could mean [0, 1] "
            f"or [-1, 1]; scale them to [-1, 1] (2 x - 1, in torchvision Normalize(0.5, 0.5)), or where they are that "
            f"already, pass the array to PatchBank itself"
        )


# Folders.

# Formats that Pillow lists but does not decode itself: EPS and WMF call other programs, the rest are stubs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@lru_cache
def _image_formats() -> tuple[dict[str, str], tuple[str, ...]]:
    """The suffixes of image files with their formats, and all formats to try on a file."""
    suffixes = Image.registered_extensions()
    formats = tuple(sorted(set(Image.OPEN) - _NOT_DECODED))
    # MPO, a JPEG of several frames, is opened by the JPEG plugin.
    return {suffix: name for suffix, name in suffixes.items() if name in (*formats, "MPO")}, formats


def _folder(folder: Path, labels: bool) -> Source:
    files = sorted(_image_files(folder), key=lambda file: file.relative_to(folder).parts)
    parts = [file.relative_to(folder).parts for file in files]
    loose = [file for file, steps in zip(files, parts, strict=True) if len(steps) == 1]
    numbers: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    if labels and files and not loose:
        class_names = tuple(sorted({steps[0] for steps in parts}))
        number = {name: i for i, name in enumerate(class_names)}
        numbers = np.array([number[steps[0]] for steps in parts], dtype=np.int64)
    elif labels and len(loose) < len(files):
        warnings.warn(f"{folder}: no labels, as {loose[0].name} and others lie directly in it", stacklevel=6)

    def item(i: int) -> tuple[Image.Image, int | None]:
        return _decoded(files[i]), None if numbers is None else int(numbers[i])

    threads = min(8, os.cpu_count() or 1)
    return Source(str(folder), len(files), item, lambda i: str(files[i]), numbers, class_names, threads)


def _image_files(folder: Path) -> Iterator[Path]:
    suffixes, _ = _image_formats()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror or error}") from error

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # A link back to a folder above would go round for ever.
        above = os.path.realpath(root) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not above.startswith(os.path.realpath(os.path.join(root, name)) + os.sep)
        ]
        for name in names:
            path = Path(root, name)
            # Pipes and devices are no images; a dangling link is one that cannot be read.
            if not name.startswith(".") and path.suffix.lower() in suffixes and (path.is_file() or not path.exists()):
                yield path


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=_image_formats()[1]) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise _Unreadable(f"{path}: not an image that Pillow can read") from None
    # As in _pil_pixels.
    except Exception as error:
        raise _unreadable(str(path), error) from error


def _unreadable(name: str, error: Exception) -> _Unreadable:
    if isinstance(error, OSError) and error.strerror:
        return _Unreadable(f"{name}: cannot be read ({error.strerror})")
    return _Unreadable(f"{name}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})")


# Arrays, and the files that hold them.


def _array(
    name: str, array: np.ndarray, labels: np.ndarray | None = None, class_names: tuple[str, ...] | None = None
) -> Source:
    """Images in one array, [N, H, W] or four axes by the rule of `_channels_first`."""
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"{name}: got shape {list(array.shape)}, takes [N, C, H, W], [N, H, W, C] or [N, H, W]")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: got dtype {array.dtype}, takes integers from 0 to 255 or floating point in [-1, 1]")
    images = array[:, None] if array.ndim == 3 else _channels_first(array, name)

    def item(i: int) -> tuple[np.ndarray, int | None]:
        return images[i], None if labels is None else int(labels[i])

    return Source(name, len(images), item, lambda i: f"{name}, image {i}", labels, class_names)


def _array_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise ValueError(f"{name}: labels of shape {list(labels.shape)}, takes one for each of {count} images")
    if labels.dtype.kind not in "iu" or labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: labels of dtype {labels.dtype}, takes integers")
    return labels.astype(np.int64)


def _numpy_file(path: Path, labels: bool) -> Source:
    try:
        # A mapped .npy is read image by image, and its header cannot ask for more memory than the file holds.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _array(str(path), loaded)
        with loaded:
            wanted = {
                "images": _named(loaded, NPZ_IMAGE_KEYS),
                "labels": _named(loaded, NPZ_LABEL_KEYS) if labels else None,
                "class_names": _named(loaded, ("class_names",)) if labels else None,
            }
            if wanted["images"] is None:
                held = ", ".join(loaded.files[:8]) or "nothing"
                raise ValueError(f"holds {held}, takes images called {' or '.join(NPZ_IMAGE_KEYS)}")
    # numpy and zipfile raise many kinds on foreign bytes, MemoryError on a header that asks for too much.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    images, numbers, names = wanted["images"], wanted["labels"], wanted["class_names"]
    source = _array(str(path), images)
    if numbers is None:
        return source
    numbers = _array_labels(str(path), numbers, len(images))
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U" or numbers.max() >= len(names)):
        raise ValueError(f"{path}: class_names of dtype {names.dtype}, shape {list(names.shape)}, takes a text a class")
    return _array(str(path), images, numbers, None if names is None else tuple(names.tolist()))


def _named(loaded: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        if key in loaded.files:
            array = loaded[key]
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{key} is no array")
            return array
    return None


# IDX: two zero bytes, a type, the number of axes, each axis as a big-endian uint32, then the values.

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DEFLATE_RATIO = 1032
"""What deflate can shrink at most; a gzipped header that declares more than this is wrong before reading on."""


def _idx_in_folder(folder: Path) -> Path | None:
    names = (f"train-images{mark}idx3-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz"))
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _idx_file(path: Path, labels: bool) -> Source:
    images = _idx_values(path)
    if images.ndim not in (3, 4):
        raise ValueError(f"{path}: IDX of {images.ndim} axes, images take 3 or 4")
    label_path = _idx_labels_beside(path) if labels else None
    if label_path is None:
        return _array(str(path), images)
    return _array(str(path), images, _array_labels(str(label_path), _idx_values(label_path), len(images)))


def _idx_labels_beside(path: Path) -> Path | None:
    name, found = re.subn(r"images([-.])idx\d", r"labels\1idx1", path.name.removesuffix(".gz"))
    candidates = [path.with_name(name + suffix) for suffix in ("", ".gz")] if found else []
    if path.suffix == ".gz":
        candidates.reverse()
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _idx_values(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            return _idx_parsed(file, os.path.getsize(path) * (_DEFLATE_RATIO if zipped else 1))
    # gzip raises OSError, EOFError and zlib.error on foreign bytes.
    except Exception as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _idx_parsed(file: Any, most_bytes: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\x00\x00" or magic[2] not in _IDX_TYPES or not magic[3]:
        raise ValueError(f"not an IDX file (it starts with {magic.hex(' ') or 'nothing'})")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError("IDX header is cut short")
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4"))
    dtype = np.dtype(_IDX_TYPES[magic[2]])
    declared = math.prod(shape) * dtype.itemsize
    if declared > most_bytes:
        raise ValueError(f"IDX header declares {declared} bytes of values {list(shape)}, more than the file can hold")
    values = memoryview(bytearray(declared))
    position = 0
    while position < declared:
        got = file.readinto(values[position : position + (1 << 24)])
        if not got:
            raise ValueError(f"IDX file is cut short: {position} of {declared} bytes of values {list(shape)}")
        position += got
    if file.read(1):
        raise ValueError(f"IDX file goes on after the {declared} bytes of values {list(shape)} that it declares")
    return np.frombuffer(values, dtype=dtype).reshape(shape)


# Dataset objects.


def _dataset(source: Any, labels: bool, limit: int | None) -> Source:
    count = len(source)

    def item(i: int) -> tuple[Any, int | None]:
        try:
            entry = source[i]
        except Exception as error:
            raise _unreadable(f"source[{i}]", error) from error
        image, label = _image_and_label(entry, i)
        if isinstance(image, (np.ndarray, Tensor)):
            image = _laid_out(_as_numpy(image), f"source[{i}]")
        return image, _label_number(label, i) if labels and label is not None else None

    known: np.ndarray | None = None
    if labels and limit is not None and limit < count:
        known = _labels_without_images(source, count)
        if known is None:
            known = _labels_of_items(item, count)
    class_names = _dataset_class_names(source) if labels else None
    return Source(f"source ({type(source).__name__})", count, item, lambda i: f"source[{i}]", known, class_names)


def _image_and_label(entry: Any, i: int) -> tuple[Any, Any]:
    if isinstance(entry, Mapping):
        image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
        if image is None:
            raise TypeError(f"source[{i}]: got a dict of {list(entry)[:8]}, takes one with {' or '.join(IMAGE_KEYS)}")
        return image, next((entry[key] for key in LABEL_KEYS if key in entry), None)
    if isinstance(entry, (tuple, list)):
        if len(entry) not in (1, 2):
            raise TypeError(f"source[{i}]: got {len(entry)} things, takes an image or (image, label)")
        return entry[0], entry[1] if len(entry) == 2 else None
    return entry, None


def _label_number(label: Any, i: int) -> int:
    try:
        return int(np.int64(operator.index(label)))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        kind = type(label).__name__
        raise TypeError(f"source[{i}]: got a label of type {kind}, takes an integer; or pass labels=False") from None


def _laid_out(image: np.ndarray, name: str) -> np.ndarray:
    """[C, H, W] of an item that is an array."""
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"{name}: got shape {list(image.shape)}, takes an image [C, H, W], [H, W, C] or [H, W]")
    return image[None] if image.ndim == 2 else _channels_first(image, name)


def _labels_without_images(source: Any, count: int) -> np.ndarray | None:
    """Labels that torchvision and Hugging Face datasets have at hand, None where every item must be asked."""
    try:
        column = next((key for key in LABEL_KEYS if key in getattr(source, "column_names", ())), None)
        if column is not None:
            found = np.asarray(list(source[column]))
        elif getattr(source, "target_transform", None) is None:
            found = np.asarray(source.targets)
        else:
            return None
    except Exception:
        return None
    return found.astype(np.int64) if found.dtype.kind in "iu" and found.shape == (count,) else None


def _labels_of_items(item: Callable[[int], tuple[Any, int | None]], count: int) -> np.ndarray | None:
    found = np.zeros(count, dtype=np.int64)
    for i in tqdm(range(count), desc="reading labels", unit="image", delay=2, disable=None, leave=False):
        try:
            label = item(i)[1]
        except _Unreadable:
            continue  # It is met again, and reported, if its turn comes to be taken.
        if label is None:
            return None
        found[i] = label
    return found


def _dataset_class_names(source: Any) -> tuple[str, ...] | None:
    """From torchvision's `classes`, Hugging Face's features, or, for a subset, from the dataset that it is part of."""
    for _ in range(8):
        names = getattr(source, "classes", None)
        features = getattr(source, "features", None)
        if isinstance(features, Mapping):
            column = next((features[key] for key in LABEL_KEYS if key in features), None)
            names = getattr(column, "names", names)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        source = getattr(source, "dataset", None)
    return None
