"""ScaleTable: the patch size at each noise level, the theory's one hyperparameter.

The more noise, the larger the part of an image that a network uses; a table holds its size. Tables are calibrated
against a network (`calibrate`), fitted to a bank by held-out denoising error, or taken from the published ones. A
lookup takes the nearest noise level, so a table serves any schedule.
"""

from __future__ import annotations

import bisect
import io
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import checks, noise
from .bank import PatchBank
from .files import read_record, write_record
from .heldout import HeldOutErrors, held_out_errors

FORMAT = "patchscore-scale-table"
VERSION = 1


class ScaleTable:
    """Patch sizes k at noise levels sigma = sigma_t / alpha_t.

    `table(sigma)` is the size of the entry nearest to sigma, on a logarithmic axis.

    Args:
        sigmas: noise levels, positive and strictly ascending.
        sizes: an odd patch size for each.
        name: the origin of the table.

    Raises:
        ValueError: unequal lengths, an empty table, sigmas not positive and ascending, sizes not odd and positive.
    """

    def __init__(self, sigmas: Sequence[float], sizes: Sequence[int], name: str = "custom"):
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.sizes = tuple(checks.odd("sizes", size) for size in sizes)
        self.name = name
        if not self.sigmas or len(self.sigmas) != len(self.sizes):
            raise ValueError(f"sigmas, sizes: got {len(self.sigmas)} and {len(self.sizes)}, takes as many of each")
        if not all(0 < sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"sigmas: got {list(self.sigmas)}, takes positive finite numbers")
        if any(a >= b for a, b in pairwise(self.sigmas)):
            raise ValueError(f"sigmas: got {list(self.sigmas)}, takes strictly ascending numbers")
        # Between two entries the size changes at their geometric mean.
        self._switches = [math.sqrt(a * b) for a, b in pairwise(self.sigmas)]

    def __call__(self, sigma: float) -> int:
        return self.sizes[bisect.bisect_right(self._switches, sigma)]

    @classmethod
    def published(cls, name: str) -> ScaleTable:
        """A table of Kamb & Ganguli 2024, by name (`ScaleTable.names()` lists them); made for 32 x 32 images.

        The published sampler reads entry j at step j of 20 cosine steps and stops at step 1, so entry 0 is never used
        and is omitted here.

        Raises:
            ValueError: an unknown name.
        """
        checks.one_of("name", name, PUBLISHED)
        return cls._of_steps(PUBLISHED[name], name)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The published tables: data set, network and padding mode they were calibrated on."""
        return tuple(PUBLISHED)

    @classmethod
    def constant(cls, size: int) -> ScaleTable:
        """The same patch size at every noise level."""
        return cls([1.0], [size], f"constant-{size}")

    @classmethod
    def fit(
        cls, bank: PatchBank, patch_sizes: Sequence[int] | None = None, monotone: bool = False, **options: Any
    ) -> ScaleTable:
        """The patch sizes with the least held-out denoising error over a bank; no network is needed.

        At each noise level some training images are denoised by all the others, with every candidate size, and the size
        with the least mean squared error is taken. `held_out_errors` gives the errors themselves, with intervals and
        runners-up, and `of_errors` the table of them.

        Args:
            bank: the training images.
            patch_sizes: the candidates, odd; None takes 3 to the image's smaller side in steps of about 1.25.
            monotone: whether sizes may not fall as the noise grows.
            options: as of `held_out_errors`: sigmas, images, block, padding_mode, machine, conditional, held_out, ...

        Raises:
            TypeError, ValueError: as of `held_out_errors`.
        """
        return cls.of_errors(held_out_errors(bank, patch_sizes, **options), monotone)

    @classmethod
    def of_errors(cls, errors: HeldOutErrors, monotone: bool = False, name: str = "fitted") -> ScaleTable:
        """The sizes with the least of these held-out errors; with `monotone`, the best that do not fall with noise."""
        return cls(errors.sigmas, errors.monotone if monotone else errors.best, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        content = {"name": self.name, "sigmas": self.sigmas, "sizes": self.sizes}
        write_record(Path(path), FORMAT, VERSION, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScaleTable:
        """Reads a table that `save` wrote, or a scales_*.pt file of Kamb & Ganguli's release.

        The latter are lists or tensors of a size for each of n cosine steps, and are read as `published` reads its own.

        Raises:
            ValueError: not such a file, another version, or an inconsistent table; the message names the path.
            OSError: the file cannot be read.
        """
        path = Path(path)
        data = path.read_bytes()
        try:
            if data[:2] in (b"PK", b"\x80\x02"):
                return cls._of_steps(_sizes_of_steps(data), path.stem)
            content = read_record(path, FORMAT, VERSION)
            return cls(content["sigmas"], content["sizes"], str(content["name"]))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: not a usable scale table: {error}") from None

    @classmethod
    def _of_steps(cls, sizes: Sequence[int], name: str) -> ScaleTable:
        """Sizes for steps 0, 1, ... of a cosine schedule of as many steps, of which a sampler never uses step 0."""
        return cls(noise.cosine(len(sizes)).ratios.flip(0)[1:].tolist(), sizes[1:], name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScaleTable) and (self.sigmas, self.sizes) == (other.sigmas, other.sizes)

    def __hash__(self) -> int:
        return hash((self.sigmas, self.sizes))

    def __repr__(self) -> str:
        return f"ScaleTable({self.name!r}, sizes {' '.join(map(str, self.sizes))})"


def _sizes_of_steps(data: bytes) -> list[int]:
    """The list or tensor of whole numbers in a file of torch.save; loaded without running what else might be in it."""
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError("neither JSON nor a list or tensor that torch.save wrote") from error
    sizes = content.tolist() if isinstance(content, torch.Tensor) else content
    if not isinstance(sizes, list) or len(sizes) < 2 or any(isinstance(k, bool) or k != int(k) for k in sizes):
        raise ValueError("takes a patch size for each of two or more steps")
    return [int(k) for k in sizes]


# Kamb & Ganguli's code release: sizes for steps 0..19 of the 20-step cosine schedule, least noise first.
PUBLISHED: dict[str, tuple[int, ...]] = {
    "cifar10-resnet-circular": (3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15, 15),
    "cifar10-resnet-zeros": (3, 3, 3, 3, 5, 5, 5, 7, 7, 7, 7, 9, 9, 11, 11, 13, 15, 17, 17, 17),
    "cifar10-unet-zeros": (3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 9, 9, 11, 13, 13, 15, 17, 25),
    "celeba-resnet-zeros": (3, 3, 3, 5, 5, 5, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 15, 19, 19),
    "celeba-unet-zeros": (3, 3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5, 7, 7, 9, 9, 9, 13, 19, 27),
    "fashionmnist-resnet-zeros": (3, 3, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 13, 13, 15, 15, 15, 17, 17),
    "fashionmnist-unet-zeros": (3, 3, 5, 5, 7, 7, 7, 9, 11, 11, 11, 13, 15, 15, 21, 23, 25, 25, 25, 25),
    "mnist-resnet-circular": (3, 3, 5, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 11, 9, 9, 7, 7, 3, 3),
    "mnist-resnet-zeros": (3, 3, 5, 5, 5, 7, 7, 7, 9, 9, 11, 11, 11, 11, 13, 15, 15, 15, 15, 15),
    "mnist-unet-zeros": (3, 3, 3, 5, 5, 7, 7, 7, 9, 9, 9, 11, 13, 15, 17, 21, 23, 23, 25, 27),
}
