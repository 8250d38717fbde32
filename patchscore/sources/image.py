"""One image as it goes into the bank: decoded within a limit, upright, of the wanted channels and size."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..checks import RANGE_TOLERANCE
from ..pixels import known_channel_axis
from .source import UnreadableImage, unreadable

MOST_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded, and of all that are being decoded at one time (up to 2 GB of memory).
Larger than any camera's photograph of today; a file of a few kilobytes can declare far more."""

MOST_FILE_BYTES = 1 << 28
"""Bytes of the largest image file in an archive or a table."""


class Encoded(NamedTuple):
    """An image file that is not decoded yet: its path, or what is in it."""

    file: Path | BinaryIO


class Prepared(NamedTuple):
    """One image as it goes into the bank; `span` says of float images what their values were before any resizing."""

    pixels: np.ndarray  # [C, H, W], uint8 or float32
    label: Any
    span: Span | None


class Span(NamedTuple):
    """The range of an image of floats that are all multiples of 1/255, or of others."""

    low: float
    high: float
    has_even: bool  # whether some value is an even multiple of 1/255, as no 8-bit image in [-1, 1] has


def prepared(image: Any, name: str, label: Any, size: tuple[int, int] | None, channels: int | None) -> Prepared:
    """A PIL image or an array [C, H, W] with the wanted channels and size."""
    if isinstance(image, Encoded):
        with opened_image(image.file, name) as opened, decoding(opened, name):
            pixels, span = _pil_pixels(opened, name), None
    elif isinstance(image, Image.Image):
        with decoding(image, name):
            pixels, span = _pil_pixels(image, name), None
    elif isinstance(image, np.ndarray):
        pixels, span = _array_pixels(image, name)
    else:
        raise TypeError(f"{name}: got {type(image).__name__}, takes a PIL image, numpy array or torch tensor")
    if channels is not None:
        pixels = _with_channels(pixels, channels, name)
    if size is not None:
        pixels = _resized(pixels, size)
    return Prepared(pixels, label, span)


# Decoding.

# Formats that Pillow lists but does not decode itself: EPS and WMF call other programs, the rest are stubs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

HEIF_SUFFIXES = (".heic", ".heif")


@lru_cache
def image_formats() -> tuple[dict[str, str], tuple[str, ...]]:
    """The suffixes of image files with their formats, and all formats to try on a file."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    suffixes = Image.registered_extensions()
    formats = tuple(sorted(set(Image.OPEN) - _NOT_DECODED))
    # MPO, a JPEG of several frames, is opened by the JPEG plugin.
    return {suffix: name for suffix, name in suffixes.items() if name in (*formats, "MPO")}, formats


class _InFlight:
    """Pixels that are being decoded now, by all threads; one more image waits until it fits."""

    def __init__(self) -> None:
        self.pixels = 0
        self.changed = threading.Condition()

    @contextmanager
    def room_for(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.pixels == 0 or self.pixels + pixels <= MOST_PIXELS)
            self.pixels += pixels
        try:
            yield
        finally:
            with self.changed:
                self.pixels -= pixels
                self.changed.notify_all()


_in_flight = _InFlight()


@contextmanager
def decoding(image: Image.Image, name: str) -> Iterator[None]:
    """While an image is decoded and converted: within the limit, and counted."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UnreadableImage(f"{name}: {width} x {height} pixels, takes images of at most {MOST_PIXELS:,}")
    with _in_flight.room_for(width * height):
        yield


def opened_image(file: BinaryIO | Path, name: str) -> Image.Image:
    """The image in a file, not decoded yet; UnreadableImage if it is none."""
    formats = image_formats()[1]
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name}: not an image that Pillow can read") from None
    except Exception as error:
        raise unreadable(name, error) from error


def _pil_pixels(image: Image.Image, name: str) -> np.ndarray:
    """[1 or 3, H, W] uint8 of a PIL image of any mode."""
    try:
        image.load()
        image = _upright(image)
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
        raise unreadable(name, error) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says. A block that cannot be read says nothing: the pixels are whole."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return image
    return image.transpose(_TURNED[orientation]) if orientation in _TURNED else image


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values from {values.min()} to {values.max()}, gray images of over 8 bits take 0 to 65535")
    return ((values + 128) // 257).astype(np.uint8)[None]


# Arrays.


def as_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    """An array on the CPU, in a type that numpy has."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype.is_floating_point else array).numpy()


def laid_out(image: np.ndarray, name: str) -> np.ndarray:
    """[C, H, W] of one image that is an array."""
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"{name}: got shape {list(image.shape)}, takes an image [C, H, W], [H, W, C] or [H, W]")
    return image[None] if image.ndim == 2 else np.moveaxis(image, known_channel_axis(image.shape, name), 0)


def _array_pixels(array: np.ndarray, name: str) -> tuple[np.ndarray, Span | None]:
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
        raise ValueError(
            f"{name}: values from {low:.4g} to {high:.4g}, floating point images take [-1, 1], "
            "and latents a value_range (patchscore sample --value-range data)"
        )
    steps = np.rint(values * 255)
    if low >= 0 and high <= 1 and (np.abs(values * 255 - steps) < 1e-3).all():
        return steps.astype(np.uint8), Span(low, high, bool((steps % 2 == 0).any()))
    return values, Span(low, high, False)


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


# Values of tables.


def file_or_array(value: Any, name: str) -> Any:
    """The image in a value of a table: bytes of a file, bare or as {bytes, path}, or nested lists of numbers."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            held = f"only the path {value['path']}" if value.get("path") else "no bytes"
            raise unreadable(name, ValueError(f"holds {held}, takes the bytes of an image file"))
        value = value["bytes"]
    if isinstance(value, bytes):
        return Encoded(io.BytesIO(value))
    if isinstance(value, list):
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0, dtype=object)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name}: a nested list that is no image [C, H, W], [H, W, C] or [H, W]")
        return laid_out(array, name)
    raise ValueError(f"{name}: holds {type(value).__name__}, takes the bytes of an image file or a nested list")
