"""MixedBank: training images of several sizes as one bank, such as a folder of photographs as they are.

It holds a PatchBank for each size. In machines whose windows come from every position, the windows of all these banks
compete together, and their sums merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sources
from .bank import PatchBank, label_number


class MixedBank:
    """N training images of several sizes, with optional class labels.

    `EquivariantLocalScore` and `PatchAverage` take it as they take a PatchBank: every window of every image competes.
    Everything else needs images of one size.

    Args:
        images: N arrays or tensors [C, H, W] with the same C; uint8, or floating point in [-1, 1].
        labels: N integers, or None.
        class_names: the name of label 0, 1, ...
        value_range: as of `PatchBank`, for all images together.

    Attributes:
        banks: a PatchBank for each size, the one of most images first.
        numbers: for each of `banks`, the numbers of its images among all N.

    Raises:
        TypeError: images or labels of the wrong type or dtype.
        ValueError: no image, images of different channels, and as of `PatchBank`.
    """

    def __init__(
        self,
        images: Iterable[Any],
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        value_range: str | tuple[float, float] | None = None,
    ):
        if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
            raise TypeError(f"images: got {type(images).__name__}, takes a list of arrays [C, H, W]")
        listed = [_array(image) for image in images]
        if not listed:
            raise ValueError("images: got none, takes one or more")
        for number, image in enumerate(listed):
            if image.ndim != 3:
                raise ValueError(f"images: image {number} has shape {list(image.shape)}, takes [C, H, W]")
            if len(image) != len(listed[0]):
                raise ValueError(f"images: image {number} has {len(image)} channels, the first has {len(listed[0])}")
        if labels is not None and len(labels) != len(listed):
            raise ValueError(f"labels: got {len(labels)}, takes one for each of {len(listed)} images")
        given = None if labels is None else torch.as_tensor(labels)
        if value_range == "data":  # one scale for all
            largest = max((float(np.abs(image).max()) for image in listed if image.size), default=1.0) or 1.0
            if not np.isfinite([float(image.sum()) for image in listed]).all():
                raise ValueError("images: NaN or infinite values")
            value_range = (-largest, largest)
        by_size: dict[tuple[Any, ...], list[int]] = {}
        for number, image in enumerate(listed):
            by_size.setdefault((*image.shape[1:], image.dtype), []).append(number)
        self._hold(
            [
                (
                    PatchBank(
                        np.stack([listed[number] for number in members]),
                        None if given is None else given[members],
                        class_names,
                        value_range,
                    ),
                    torch.tensor(members),
                )
                for members in sorted(by_size.values(), key=len, reverse=True)
            ]
        )

    def _hold(self, parts: Sequence[tuple[PatchBank, Tensor]]) -> None:
        self.banks = tuple(bank for bank, _ in parts)
        self.numbers = tuple(numbers for _, numbers in parts)
        self._of_class: dict[int, MixedBank] = {}

    @classmethod
    def _of(cls, parts: Sequence[tuple[PatchBank, Tensor]]) -> MixedBank:
        bank = cls.__new__(cls)
        bank._hold(parts)
        return bank

    @classmethod
    def open(
        cls,
        source: Any,
        channels: int | None = None,
        labels: bool = True,
        limit: int | None = None,
        skip_bad: bool = False,
        split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> MixedBank:
        """Reads images from wherever they are, each in its own size; arguments are those of `PatchBank.open`.

        Where some images are gray and others RGB, all become RGB.

        Raises:
            ValueError, TypeError, ImportError: as of `PatchBank.open`, but for mixed sizes.
        """
        asked: dict[str, Any] = {"channels": channels, "labels": labels, "limit": limit, "skip_bad": skip_bad}
        read = sources.read_sizes(source, split=split, image_key=image_key, label_key=label_key, **asked)
        return cls._of(
            [
                (PatchBank(images, image_labels, names), torch.from_numpy(members))
                for (images, image_labels, names), members in read
            ]
        )

    def __len__(self) -> int:
        return sum(map(len, self.banks))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the most common size; other images have other H and W."""
        return self.banks[0].shape

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of `banks`."""
        return [bank.shape[1:] for bank in self.banks]

    @property
    def labels(self) -> Tensor | None:
        """[N] int64 label of every image, or None."""
        found = torch.empty(len(self), dtype=torch.int64)
        for bank, numbers in self._ranked():
            if bank.labels is None:
                return None
            found[numbers] = bank.labels
        return found

    def _ranked(self) -> list[tuple[PatchBank, Tensor]]:
        """Banks numbered from 0 to N - 1: those of `numbers` among all that this bank has."""
        held = torch.cat(self.numbers).sort().values
        return [(bank, torch.searchsorted(held, own)) for bank, own in zip(self.banks, self.numbers, strict=True)]

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, in ascending order; empty without labels."""
        return tuple(sorted({label for bank in self.banks for label in bank.classes}))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of label 0, 1, ..., or None."""
        return self.banks[0].class_names

    @property
    def value_range(self) -> str | tuple[float, float] | None:
        """As of `PatchBank`."""
        return self.banks[0].value_range

    @property
    def scale(self) -> float:
        """As of `PatchBank`; the same for all images."""
        return self.banks[0].scale

    @property
    def fingerprint(self) -> str:
        """sha256 over all images, their labels and their order, as hex."""
        digest = hashlib.sha256(b"mixed")
        for bank, numbers in self._ranked():
            digest.update(bank.fingerprint.encode() + numbers.numpy().tobytes())
        return digest.hexdigest()

    def label_ids(self, labels: Iterable[int | str]) -> list[int]:
        """As of `PatchBank`."""
        wanted = [label.item() if isinstance(label, (Tensor, np.generic)) else label for label in labels]
        if not self.classes:
            raise ValueError(f"labels: got {wanted}, but this bank has no labels")
        return [label_number(label, self.classes, self.class_names) for label in wanted]

    def of_class(self, label: int | None) -> MixedBank:
        """The images of one class by its number, or all of them for None."""
        if label is None:
            return self
        if label not in self._of_class:
            parts = []
            for bank, numbers in zip(self.banks, self.numbers, strict=True):
                if label in bank.classes:
                    assert bank.labels is not None
                    parts.append((bank.of_class(label), numbers[bank.labels == label]))
            self._of_class[label] = self._of(parts)
        return self._of_class[label]

    def image(self, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, H, W] image `number`, in [-1, 1] or the bank's own range."""
        for bank, numbers in self._ranked():
            at = (numbers == number).nonzero().flatten().tolist()
            if at:
                return bank.chunk(at[0], at[0] + 1, dtype)[0]
        raise ValueError(f"image: got {number}, takes numbers from 0 to {len(self) - 1}")

    def cropped(self, most: int) -> PatchBank:
        """The middle of every image, as large as the smallest has room for and at most `most` high and wide."""
        height, width = (min(most, *(size[axis] for size in self.sizes)) for axis in (0, 1))
        labels, crops = self.labels, torch.empty(len(self), self.shape[0], height, width)
        for bank, numbers in self._ranked():
            top, left = (bank.shape[1] - height) // 2, (bank.shape[2] - width) // 2
            for at, number in enumerate(numbers.tolist()):
                crops[number] = bank.chunk(at, at + 1)[0, :, top : top + height, left : left + width]
        return PatchBank(crops, labels, self.class_names if labels is not None else None, self.value_range)

    def check_unchanged(self) -> None:
        """As of `PatchBank`."""
        for bank in self.banks:
            bank.check_unchanged()

    def __repr__(self) -> str:
        sides = [f"{size[0]} x {size[1]}" for size in self.sizes]
        shown = ", ".join(sides[:3]) + (", ..." if len(sides) > 3 else "")
        classes = f", {len(self.classes)} classes" if self.classes else ""
        kind = str(self.banks[0].images.dtype).removeprefix("torch.")
        return f"MixedBank({len(self)} images, {self.shape[0]} channels, {len(sides)} sizes: {shown}, {kind}{classes})"


def open_bank(source: Any, size: int | tuple[int, int] | None = None, **options: Any) -> PatchBank | MixedBank:
    """`PatchBank.open`, or `MixedBank.open` where images are of several sizes and no `size` brings them to one."""
    try:
        return PatchBank.open(source, size, **options)
    except sources.MixedSizes:
        return MixedBank.open(source, **{name: value for name, value in options.items() if name != "value_range"})


def _array(image: Any) -> np.ndarray:
    """An image as PatchBank takes several."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"images: got {type(image).__name__} among them, takes arrays or tensors [C, H, W]")
    return image
