"""One patch size of an index: its cells and their moments, its mapped files, and the search through them.

A cell is a run of windows in random order. `ids` says where each lies: image * rows * cols + row * cols + col, counted
from the first interior window. Small windows also lie in `tiles`, as bytes or floats; wider ones are read from the
images.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..native import tile_type
from ..pixels import to_values
from .kmeans import SIBLINGS


class Hits(NamedTuple):
    """The heaviest windows of some pixels, heaviest first.

    weight:   [P, k] relative to the heaviest.
    distance: [P, k] squared distance of the two windows; infinite where the cells looked into held fewer than k.
    image, row, col: [P, k] where the window is centred; image -1 where there was none.
    proven:   [P] whether no other window can be among them.
    """

    weight: Tensor
    distance: Tensor
    image: Tensor
    row: Tensor
    col: Tensor
    proven: Tensor


class Strata(NamedTuple):
    """Moments of strata: means over their windows.

    size: [H] windows; mean, variance: [H, rank] of the features; rest: [H] squared norm beyond the axes;
    value, value_square: [H, C] of the centre pixels.
    """

    size: Tensor
    mean: Tensor
    variance: Tensor
    rest: Tensor
    value: Tensor
    value_square: Tensor


class IndexedSize:
    """One patch size of an index: the windows of `images` [N, C, H, W], as stored, at patch size k."""

    def __init__(self, folder: Path, images: Tensor, k: int, meta: dict[str, Any]):
        self.folder, self.images, self.k, self.meta = folder, images, k, meta
        channels, height, width = images.shape[1:]
        self.rows, self.cols = (range(k // 2, size - k // 2) for size in (height, width))
        arrays = _arrays(self.folder / "cells.safetensors", channels * k * k, channels)
        self.rank: int = arrays["axes"].shape[1]
        self.axes, self.centre = arrays["axes"], arrays["centre"]
        names = ("mean", "variance", "rest", "value", "value_square")
        self.cells = Strata(arrays["sizes"], *(arrays[name] for name in names))
        self.radius = arrays["radius"].double()
        self.starts = first_windows(self.cells.size)
        # Large files are not checked when an index is opened, and what lies here addresses pixels.
        most = len(images) * self.windows_per_image
        try:
            self.ids = np.memmap(self.folder / "ids.bin", np.int64, "r")
            whole = 0 <= int(self.ids.min()) <= int(self.ids.max()) < most
        except ValueError:  # no whole numbers
            whole = False
        # Sizes are added up one by one: those of a damaged file may exceed what a tensor's sum holds.
        if not whole or sum(self.cells.size.tolist()) != len(self.ids):
            raise ValueError(f"{self.folder / 'ids.bin'}: damaged; build the index again")
        rows = self.folder / "rows.bin"
        self.tiles = np.memmap(rows, tile_type(images), "r") if rows.stat().st_size else None

    @property
    def windows_per_image(self) -> int:
        return len(self.rows) * len(self.cols)

    @cached_property
    def spread(self) -> float:
        """Variance of one value of a window about its cell's centre, in the mean of all windows."""
        of_windows = self.cells.variance.double().sum(1) + self.cells.rest.double()
        return (of_windows @ self.cells.size.double()).item() / max(1, len(self.ids)) / len(self.centre)

    @cached_property
    def parents(self) -> Strata:
        """Moments of the SIBLINGS cells of each parent together."""
        cells = self.cells
        size = cells.size.view(-1, SIBLINGS)
        share = (size / size.sum(1, keepdim=True).clamp(min=1)).double()

        def mean(x: Tensor) -> Tensor:
            return (share[..., None] * x.double().reshape(*size.shape, -1)).sum(1)

        centre = mean(cells.mean)
        square = mean(cells.variance.double() + cells.mean.double().square())
        return Strata(
            size.sum(1),
            centre.float(),
            (square - centre.square()).clamp(min=0).float(),
            mean(cells.rest)[:, 0].float(),
            mean(cells.value).float(),
            mean(cells.value_square).float(),
        )

    def project(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """[Q, C, k, k] windows as [Q, rank] features and [Q] squared norms beyond the axes."""
        centred = windows.flatten(1).double() - self.centre.double()
        features = centred @ self.axes.double()
        return features.float(), (centred.square().sum(1) - features.square().sum(1)).clamp(min=0).float()

    def windows_of(self, ids: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column at which windows are centred."""
        at = torch.from_numpy(np.array(ids))
        place = at % self.windows_per_image
        cols = len(self.cols)
        return at // self.windows_per_image, place // cols + self.rows.start, place % cols + self.cols.start

    def search(self, windows: Tensor, sigma: float, k: int, nprobe: int | None) -> Hits:
        """Branch and bound: cells by the distance along the axes that none of their windows can undercut."""
        features, _ = self.project(windows)
        found: list[tuple[Tensor, ...]] = []
        for window, feature in zip(windows.double(), features, strict=True):
            away = (self.cells.mean.double() - feature.double()).square().sum(1).sqrt()
            least = (away - self.radius).clamp(min=0).square()
            away[self.cells.size == 0] = torch.inf
            least[self.cells.size == 0] = torch.inf
            order = (least if nprobe is None else away).argsort()
            best, ids = torch.full((0,), torch.inf, dtype=torch.float64), np.empty(0, np.int64)
            proven = True
            for cell in order.tolist()[: nprobe or len(order)]:
                enough = len(best) == k
                if least[cell].isinf() or (enough and nprobe is None and least[cell] > best[-1]):
                    break
                members = np.asarray(self.ids[self.starts[cell] : self.starts[cell] + int(self.cells.size[cell])])
                distance = torch.cat([best, self.distances(window, members)])
                ids = np.concatenate([ids, members])
                best, at = distance.topk(min(k, len(distance)), largest=False)
                ids = ids[at.numpy()]
            if nprobe is not None and nprobe < int((self.cells.size > 0).sum()):
                proven = False
            short = k - len(best)
            image, row, col = self.windows_of(ids)
            pad = torch.full((short,), -1)
            found.append((
                torch.cat([best, torch.full((short,), torch.inf, dtype=torch.float64)]), torch.cat([image, pad]),
                torch.cat([row, pad]), torch.cat([col, pad]), torch.tensor(proven),
            ))  # fmt: skip
        distance, image, row, col, proved = (torch.stack(x) for x in zip(*found, strict=True))
        return Hits(torch.exp(-(distance - distance[:, :1]) / (2 * sigma**2)), distance, image, row, col, proved)

    def pixels(self, ids: np.ndarray) -> Tensor:
        """[n, C, k, k] values of windows."""
        image, row, col = self.windows_of(ids)
        offsets = torch.arange(self.k) - self.k // 2
        i = (row[:, None] + offsets)[:, None, :, None]
        j = (col[:, None] + offsets)[:, None, None, :]
        c = torch.arange(self.images.shape[1])[None, :, None, None]
        return to_values(self.images[image[:, None, None, None], c, i, j])

    def distances(self, window: Tensor, ids: np.ndarray) -> Tensor:
        return (self.pixels(ids).double() - window).square().flatten(1).sum(1)


def _arrays(path: Path, values: int, channels: int) -> dict[str, Tensor]:
    """The arrays of an index, of the shapes, types and finite values that its users rely on.

    Large files are not checked against their checksums when an index is opened, so this is what keeps damage out.

    Raises:
        ValueError: damaged, by its path.
    """
    try:
        arrays = safetensors.torch.load_file(path)
        cells, rank = arrays["mean"].shape
        shapes = {"axes": (values, rank), "centre": (values,), "sizes": (cells,), "radius": (cells,), "rest": (cells,),
                  "mean": (cells, rank), "variance": (cells, rank), "value": (cells, channels),
                  "value_square": (cells, channels)}  # fmt: skip
        sizes, moments = arrays["sizes"], [arrays[name] for name in shapes if name != "sizes"]
        whole = all(arrays[name].shape == shape for name, shape in shapes.items()) and cells % SIBLINGS == 0 < rank
        whole = whole and sizes.dtype == torch.int64 and bool((sizes >= 0).all())
        whole = whole and all(part.dtype == torch.float32 and bool(part.isfinite().all()) for part in moments)
    except (SafetensorError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged; build the index again")
    return arrays


def first_windows(sizes: Tensor) -> list[int]:
    """[cells] where each cell starts."""
    return (sizes.cumsum(0) - sizes).tolist()
