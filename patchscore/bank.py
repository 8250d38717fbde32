"""PatchBank: the training images that a score machine sums over.

Images keep their type, uint8 or float32, in one block of memory or in a mapped file. A selection (the images of some
classes) is a list of indices into the same block, so class-conditional scores copy nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checks, sources
from .checks import RANGE_TOLERANCE
from .pixels import surely_channels_last, to_values

PIECE_BYTES = 1 << 26
"""Images that an exact step on the CPU is done with before it looks at the next. It goes over them two to four times,
and nine times for a canvas; of a mapped file larger than the memory it would read them as often, where 64 MiB stay in
the page cache. Fewer take longer: a piece of 1 MiB a few percent."""


@dataclass(frozen=True)
class Part:
    """The whole bank that one rank holds a part of, and the number of ranks."""

    whole: PatchBank
    rank: int
    of: int


class PatchBank:
    """N training images with optional class labels. Shares the memory of `images`; do not change them afterwards.

    Args:
        images: array or tensor [N, C, H, W]; uint8 (read as v = u / 127.5 - 1) or floating point in [-1, 1]. A
            read-only numpy.memmap of uint8 or float32 stays in its file.
        labels: N integers, or None.
        class_names: the name of label 0, 1, ...; lets `select` take names.
        value_range: None for images in [-1, 1]. "data" takes floating point of any finite values, such as latents of
            any number of channels; (low, high) takes those between the two. Noise levels, denoised images and scores
            are then in the data's own units, and samples are not clamped.

    Attributes:
        scale: `images` holds the values divided by it, so that they lie in [-1, 1]; 1 without a `value_range`.
        part: where `shard` made it, of which bank and for which rank; else None.

    Raises:
        TypeError: images or labels of the wrong type or dtype.
        ValueError: an empty bank, a wrong shape, NaN or infinite pixels, pixels outside [-1, 1] or `value_range`, or a
            number of labels other than N.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        value_range: str | tuple[float, float] | None = None,
    ):
        self.value_range = _check_range(value_range)
        self._file: sources.Mapped | None = None
        if self.value_range is None:
            self._file = images if isinstance(images, sources.Mapped) else sources.Mapped.of(images)
            self.images, self.scale = _as_images(images) if self._file is None else _mapped_images(self._file), 1.0
        else:
            self.images, self.scale = _scaled(images, self.value_range)
        self.labels = None if labels is None else _as_labels(labels, len(self.images))
        self.class_names = None if class_names is None else tuple(str(name) for name in class_names)
        self.indices: Tensor | None = None
        self._forget_derived()
        self._check_class_names()

    def _forget_derived(self) -> None:
        self._classes: tuple[int, ...] | None = None
        self._fingerprint: str | None = None
        self._selections: dict[tuple[int, ...], PatchBank] = {}
        self._wrapped: tuple[int, PatchBank] | None = None
        self._unit: PatchBank | None = None
        self.part: Part | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A mapped bank as its path; what is derived is derived again."""
        derived = ("_classes", "_selections", "_wrapped", "_unit", *(["images", "_fingerprint"] if self._file else []))
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_derived()
        self.__dict__.update(state)
        if self._file is not None:
            self.images = self._file.images

    def _check_class_names(self) -> None:
        if self.class_names is None or self.labels is None:
            return
        doubled = {name for name in self.class_names if self.class_names.count(name) > 1}
        if doubled:
            raise ValueError(f"class_names: {sorted(doubled)[0]!r} names two classes")
        smallest, largest = int(self.labels.min()), int(self.labels.max())
        if smallest < 0:
            raise ValueError(f"class_names: takes labels from 0, got {smallest}")
        if largest >= len(self.class_names):
            raise ValueError(f"class_names: {len(self.class_names)} names for labels up to {largest}")

    @classmethod
    def open(
        cls,
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
        value_range: str | tuple[float, float] | None = None,
        mapped: bool | None = None,
    ) -> PatchBank:
        """Reads images from wherever they are; docs/data.md says how labels and axes are found.

        Args:
            source: one of
                a folder of images, whose subfolders of the first level are the classes;
                a .zip or .tar of one, EDM's with dataset.json, WebDataset shards;
                CIFAR, MNIST, SVHN, STL-10, CelebA and ImageNet 32 x 32 as downloaded, torchvision's root, MedMNIST,
                    an LMDB of LSUN;
                a .npy, .npz, IDX, .pt, .safetensors or .parquet file, a folder of save_to_disk, one image file;
                an array, a dict of arrays or columns, a dataset whose items are images, pairs or dicts, an iterable
                of such items (with `limit`);
                "fashion-mnist", which is built in.
            size: resize to size x size or (height, width), cropped about the centre to that aspect ratio, with PIL's
                bilinear filter; None keeps the images' own size.
            channels: 1 or 3 converts to gray or RGB; None keeps the source's own (RGB for folders with any colour).
            labels: whether to read labels where the source has them.
            limit: the largest number of images; with labels, as equally from all classes as possible.
            skip_bad: skip images that cannot be read; one warning counts them.
            split: which part of a source that comes in parts, such as "train"; a folder with train/ and val/ above its
                classes needs it.
            image_key: the name of the images in a source that holds several things.
            label_key: likewise of the labels.
            memory_limit: the largest size of the images in bytes, once read; None: the memory of this machine.
            value_range: as of `PatchBank`, for an array or a .npy, .pt or .safetensors file [N, C, H, W]: values
                and axes stay what they are, and of the other arguments `image_key` and `limit` are taken.
            mapped: True leaves the images in their .npy file (uint8 or float32 [N, C, H, W], not converted), which is
                mapped: pages are read on demand, shared with other processes, and never copied. None does so by itself
                where they would take more than a quarter of the memory; False reads them.

        Raises:
            ValueError: nothing to read, an unreadable file (named by its path), mixed image sizes without `size`, parts
                without `split`, more than `memory_limit`, or with `mapped` a source that cannot be mapped.
            TypeError: a source of an unsupported type.
            ImportError: parquet, Arrow or HEIC without the package that reads it; names the extra to install.
        """
        if not (mapped is None or isinstance(mapped, bool)):
            raise TypeError(f"mapped: got {mapped!r}, takes True, False or None")
        if value_range is not None:
            if mapped:
                raise ValueError("mapped: images of a value_range are held in memory, divided by their scale")
            given = {"size": size, "channels": channels, "split": split, "label_key": label_key}
            if named := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{named[0]}: got {given[named[0]]!r}, with a value_range images stay as they are")
            values = sources.read_values(source, image_key)
            most = len(values) if limit is None else checks.integer("limit", limit, at_least=1)
            return cls(values[:most], value_range=value_range)
        asked: dict[str, Any] = {"size": size, "channels": channels, "labels": labels, "limit": limit, "split": split}
        asked |= {"image_key": image_key, "label_key": label_key, "memory_limit": memory_limit, "skip_bad": skip_bad}
        if mapped is not False:
            found = sources.read_mapped(source, mapped, **asked)
            if found is not None:
                file, image_labels, class_names, members = found
                bank = cls(file, image_labels, class_names)
                return bank if members is None else bank.take(torch.from_numpy(members))
        return cls(*sources.read(source, **asked))

    @classmethod
    def convert(
        cls,
        source: Any,
        out: str | os.PathLike[str],
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        labels: bool = True,
        limit: int | None = None,
        skip_bad: bool = False,
        split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        overwrite: bool = False,
    ) -> PatchBank:
        """Writes the images of any source to a .npy file and maps it; neither has to fit in memory.

        Arguments besides `out` and `overwrite` are those of `open`; the bank equals that of `open` and has the same
        fingerprint. Labels and class names lie beside it, in `bank.labels.npy` and `bank.classes.json`. Images are
        decoded by several threads. An interrupted call leaves `bank.npy.partial` and `bank.npy.progress`, and the same
        call resumes from them.

        Args:
            out: the file, `bank.npy`.
            overwrite: take the place of files that are there.

        Raises:
            ValueError, TypeError, ImportError: as of `open`; a file that is there, or that another process writes.
            OSError: the disk is full or not writable; what is written stays.
        """
        path = Path(out)
        asked: dict[str, Any] = {"size": size, "channels": channels, "labels": labels, "limit": limit, "split": split}
        asked |= {"image_key": image_key, "label_key": label_key, "skip_bad": skip_bad}
        sources.write(source, path, overwrite, **asked)
        return cls.open(path, labels=labels, mapped=True)

    def __len__(self) -> int:
        return len(self.images) if self.indices is None else len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, in ascending order; empty without labels."""
        if self._classes is None:
            self._classes = () if self.labels is None else tuple(torch.unique(self.labels).tolist())
        return self._classes

    @property
    def fingerprint(self) -> str:
        """sha256 over dtype, shape, pixels and labels, as hex: equal for equal content, whatever its source.

        For a mapped file it is cached in a file beside it (docs/data.md).
        """
        if self._fingerprint is None:
            if self._file is None or self.indices is not None:
                self._fingerprint = self._hashed()
            else:
                labels = "none" if self.labels is None else hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
                self._fingerprint = str(self._file.remembered(f"fingerprint, labels {labels}", self._hashed))
        return self._fingerprint

    def _hashed(self) -> str:
        scale = "" if self.scale == 1 else f" {self.scale!r}"
        digest = hashlib.sha256(f"{self.images.dtype} {len(self)} {self.shape}{scale}".encode())
        step = max(1, (1 << 24) // self.images[0].nbytes)
        with _pass_over(self, "fingerprint") as bar:
            for start in range(0, len(self), step):
                digest.update(self.stored(start, start + step).cpu().numpy().tobytes())
                bar.update(min(step, len(self) - start))
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    @property
    def mapped(self) -> bool:
        """Whether the images are in a mapped file and not in memory."""
        return self._file is not None

    def check_unchanged(self) -> None:
        """ValueError where the images are in a mapped file that has changed since it was opened."""
        if self._file is not None:
            self._file.check()

    def select(self, labels: int | str | Iterable[int | str]) -> PatchBank:
        """The images of one class or of several, by label number or class name, sharing this bank's memory.

        Raises:
            TypeError: neither a label nor several.
            ValueError: a label that no image has, no label at all, or a bank without labels.
        """
        single = isinstance(labels, str) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0
        key = tuple(sorted(set(self.label_ids([labels] if single else labels))))  # type: ignore[list-item, arg-type]
        if not key:
            raise ValueError("labels: got none, takes one or more")
        if key not in self._selections:
            assert self.labels is not None
            self._selections[key] = self.take(torch.isin(self.labels, torch.tensor(key)).nonzero().flatten())
        return self._selections[key]

    def take(self, images: Sequence[int] | Tensor) -> PatchBank:
        """The images of these numbers, 0 to N - 1, in this order, sharing this bank's memory.

        Raises:
            TypeError: numbers that are no integers.
            ValueError: none, or one outside the bank.
        """
        members = torch.as_tensor(images)
        if members.ndim != 1 or not len(members) or members.is_floating_point() or members.dtype == torch.bool:
            error = ValueError if members.ndim == 1 and not len(members) else TypeError
            raise error(f"images: got {images!r}, takes one or more numbers of images")
        members = members.to("cpu", torch.int64)
        low, high = members.min().item(), members.max().item()
        if low < 0 or high >= len(self):
            raise ValueError(f"images: got {low if low < 0 else high}, takes numbers from 0 to {len(self) - 1}")
        selection = copy.copy(self)
        selection.labels = None if self.labels is None else self.labels[members]
        selection.indices = members if self.indices is None else self.indices[members]
        selection._forget_derived()
        return selection

    def wrapped(self, margin: int) -> PatchBank:
        """The same images [N, C, H + 2 margin, W + 2 margin], continued beyond every border from the opposite one.

        A copy in memory; the last one made is kept.

        Raises:
            TypeError: a margin that is no integer.
            ValueError: one that is negative or larger than an image.
        """
        checks.integer("margin", margin, at_least=0)
        if margin > min(self.shape[1:]):
            raise ValueError(f"margin: got {margin}, takes at most the smaller side of images, {min(self.shape[1:])}")
        if self._wrapped is None or self._wrapped[0] != margin:
            self.check_unchanged()
            block, rows, cols = self.block, *(torch.arange(-margin, n + margin) % n for n in self.shape[1:])
            wrapped = copy.copy(self)
            wrapped.images, wrapped.indices, wrapped._file = block[:, :, rows][..., cols].contiguous(), None, None
            wrapped._forget_derived()
            self._wrapped = margin, wrapped
        return self._wrapped[1]

    def pieces(self) -> Iterator[PatchBank]:
        """All images, PIECE_BYTES of them at a time, sharing this bank's memory."""
        count = max(1, PIECE_BYTES // self.images[0].nbytes)
        if len(self) <= count:
            yield self
            return
        for start in range(0, len(self), count):
            yield self.take(torch.arange(start, min(start + count, len(self))))

    def of_class(self, label: int | None) -> PatchBank:
        """The images of one class by its number, or all of them for None."""
        return self if label is None else self.select(label)

    def label_ids(self, labels: Iterable[int | str]) -> list[int]:
        """Labels or class names as label numbers that occur in this bank; ValueError for any other."""
        wanted = [label.item() if isinstance(label, (Tensor, np.generic)) else label for label in labels]
        if self.labels is None:
            raise ValueError(f"labels: got {wanted}, but this bank has no labels")
        return [label_number(label, self.classes, self.class_names) for label in wanted]

    def chunk(self, start: int, stop: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """Images start..stop as values, in [-1, 1] or the bank's own range: [n, C, H, W] in `dtype` on `device`."""
        values = to_values(self.stored(start, stop).to(device), dtype)
        return values if self.scale == 1 else values * self.scale

    @property
    def unit(self) -> PatchBank:
        """The same images divided by `scale`, sharing this bank's memory: what engines sum over."""
        if self.scale == 1:
            return self
        if self._unit is None:
            unit = copy.copy(self)
            unit.scale, unit.value_range = 1.0, None
            unit._forget_derived()
            self._unit = unit
        return self._unit

    def stored(self, start: int, stop: int) -> Tensor:
        """Images start..stop as they are stored, uint8 or float: [n, C, H, W]."""
        self.check_unchanged()
        return self.images[start:stop] if self.indices is None else self.images[self.indices[start:stop]]

    @property
    def block(self) -> Tensor:
        """[N, C, H, W] all images as they are stored; a view of them where they lie together, a copy elsewhere."""
        if self.indices is None:
            return self.images
        first, last = self.indices[0].item(), self.indices[-1].item()
        if last - first + 1 == len(self) and bool((self.indices.diff() == 1).all()):
            return self.images[first : last + 1]
        return self.images[self.indices]

    def stored_at(self, numbers: Tensor) -> Tensor:
        """The images of these numbers, likewise."""
        self.check_unchanged()
        return self.images[numbers if self.indices is None else self.indices[numbers]]

    def __repr__(self) -> str:
        channels, height, width = self.shape
        kind = str(self.images.dtype).removeprefix("torch.")
        classes = f", {len(self.classes)} classes" if self.labels is not None else ""
        scale = f", values up to {self.scale:.4g}" if self.value_range is not None else ""
        mapped = ", mapped" if self.mapped else ""
        return f"PatchBank({len(self)} images, {channels} x {height} x {width}, {kind}{classes}{scale}{mapped})"


def label_number(label: int | str, known: Sequence[int], class_names: Sequence[str] | None) -> int:
    """A label or class name as a label number that is among the known ones; ValueError for any other."""
    names = tuple(class_names or ())
    if isinstance(label, str):
        number = names.index(label) if label in names else _number(label)
        meant = _number(label)
        if meant != number and meant in known and number in known:
            raise ValueError(
                f"labels: {label!r} is the name of class {number} and the number of another; give the number as an "
                f"int, or the bank other class_names"
            )
    elif isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"labels: got {label!r} of type {type(label).__name__}, takes integers or class names")
    else:
        number = label
    if number not in known:
        shown = ", ".join(f"{c} ({names[c]})" if 0 <= c < len(names) else str(c) for c in known[:20])
        raise ValueError(f"labels: unknown label {label!r}; this bank has {shown}{' ...' if known[20:] else ''}")
    assert number is not None
    return number


def _pass_over(bank: PatchBank, what: str) -> tqdm:
    """A progress bar that shows itself where a pass takes longer than two seconds."""
    return tqdm(total=len(bank), desc=what, unit="image", unit_scale=True, delay=2, disable=None, leave=False)


def _check_range(value_range: Any) -> str | tuple[float, float] | None:
    if value_range is None or (isinstance(value_range, str) and value_range == "data"):
        return value_range
    try:
        low, high = value_range
        low, high = checks.number("value_range", low), checks.number("value_range", high)
    except (TypeError, ValueError):
        raise ValueError(f'value_range: got {value_range!r}, takes None, "data" or (low, high)') from None
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"value_range: got {value_range!r}, takes finite numbers, the first below the second")
    return low, high


def _scaled(images: Any, value_range: str | tuple[float, float]) -> tuple[Tensor, float]:
    """Images of any range as float32 in [-1, 1], and what they were divided by.

    Zero stays zero, as zero padding asks.
    """
    if not isinstance(images, (np.ndarray, Tensor)):
        raise TypeError(f"images: got {type(images).__name__}, takes a numpy array or torch tensor [N, C, H, W]")
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(_native(images))
    if not images.dtype.is_floating_point:
        raise TypeError(f"images: got dtype {images.dtype}, with a value_range takes floating point")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: got shape {list(images.shape)}, takes [N, C, H, W] with nothing empty")
    images = images.detach().to(torch.float32)
    low, high = (extreme.item() for extreme in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images: NaN or infinite values")
    if isinstance(value_range, str):
        scale = max(abs(low), abs(high)) or 1.0
    else:
        if low < value_range[0] or high > value_range[1]:
            raise ValueError(f"images: values from {low:.4g} to {high:.4g}, outside value_range {value_range}")
        scale = max(map(abs, value_range))
    return (images / scale).contiguous(), scale


def _as_images(images: Any) -> Tensor:
    if not isinstance(images, (np.ndarray, Tensor)):
        raise TypeError(f"images: got {type(images).__name__}, takes a numpy array or torch tensor [N, C, H, W]")
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise TypeError(f"images: got dtype {images.dtype}, takes uint8 or floating point in [-1, 1]")
        images = torch.from_numpy(_native(images))
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise TypeError(f"images: got dtype {images.dtype}, takes uint8 or floating point in [-1, 1]")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: got shape {list(images.shape)}, takes [N, C, H, W] with nothing empty")
    if surely_channels_last(tuple(images.shape)):
        raise ValueError(
            f"images: shape {list(images.shape)} has its channels last, takes [N, C, H, W]; PatchBank.open takes both"
        )
    images = images.detach()
    if images.dtype == torch.uint8:
        return images.contiguous()
    images = images.to(torch.float32).contiguous()
    # NaN propagates through aminmax, so one pass finds it too.
    low, high = torch.aminmax(images)
    _check_span(low.item(), high.item())
    return images


def _mapped_images(file: sources.Mapped) -> Tensor:
    """The images of a mapped file; those in floating point within their range."""
    images = file.images
    if surely_channels_last(tuple(images.shape)):
        raise ValueError(f"{file.path}: shape {list(images.shape)} has its channels last, takes [N, C, H, W]")
    if images.dtype != torch.uint8:
        _check_span(*file.extremes(), source=f"{file.path}: ")
    return images


def _check_span(low: float, high: float, source: str = "images: ") -> None:
    """Refuses floating point pixels outside [-1, 1], and warns of those that are probably meant for [0, 1]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{source}NaN or infinite pixels")
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{source}values from {low:.4g} to {high:.4g}, floating point images take [-1, 1], "
            "and latents a value_range (patchscore sample --value-range data)"
        )
    if low >= 0 and low < high:
        message = f"{source}values from {low:.4g} to {high:.4g} are read as [-1, 1]; if they mean [0, 1], give 2 x - 1"
        warnings.warn(message, stacklevel=5)


def _as_labels(labels: Any, count: int) -> Tensor:
    try:
        labels = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    except ValueError as error:
        raise ValueError(f"labels: takes one integer for each of {count} images") from error
    if labels.shape != (count,):
        raise ValueError(f"labels: got shape {list(labels.shape)}, takes one for each of {count} images")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels: got dtype {labels.dtype}, takes integers")
    if labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"labels: got {labels.max()}, takes integers of at most 64 bits")
    # A copy, as the caller may go on with its own.
    return torch.from_numpy(labels.astype(np.int64))


def _native(images: np.ndarray) -> np.ndarray:
    """The same values as torch can hold them: native byte order, no negative strides, writeable, at most 64 bits."""
    if images.dtype.kind == "f" and (not images.dtype.isnative or images.dtype.itemsize > 8):
        images = images.astype(np.float32)
    images = np.ascontiguousarray(images)
    return images if images.flags.writeable else images.copy()


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
