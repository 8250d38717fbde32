"""Builds one patch size of an index: axes, cells and their moments, then the windows of each cell.

Two passes over the images. The first finds the cell of every window and adds up the cells' moments; the second, over
windows sorted by cell, writes where each window lies and, for small windows, its bytes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..bank import PatchBank
from ..files import errors_name, write_atomically
from ..native import native, pack
from ..pixels import MOST_CHANNELS
from . import storage
from .kmeans import SIBLINGS, Tree, in_threads

AXES = 32
"""Principal axes by which cells are told apart and weights expected. 27, all of them, at k = 3 in colour; the variance
beyond is kept as one number a cell."""

CELLS_PER_ROOT = 16
"""Cells for each square root of the number of windows. More cells foresee weights better and take longer to plan."""

MOST_CELLS = 1 << 17
TRAINING_PER_CELL = 24
TRAINING_SHARE = 4
"""Training windows are every so many of those of some images, so that few images are projected for them."""

PCA_WINDOWS = 100_000

ROW_BYTES = 147
"""Windows of at most so many bytes (k = 7 in colour) are stored in the cells; wider ones are read from the images."""

CHUNK_WINDOWS = 1 << 18
"""Windows whose cells are found together; fixed, for sums are added up by chunk."""

BLOCK_WINDOWS = 1 << 15
"""Windows that are projected and added up together: few enough that the allocator of the C library reuses their memory
(blocks under 32 MB), which halves the time of a build."""

STRIPES = 8
"""Chunks whose sums are added up side by side; fixed, so that the result does not depend on the number of threads."""


class Builder:
    """Builds patch size k of `bank` into `folder`."""

    def __init__(self, bank: PatchBank, k: int, folder: Path, meta: dict[str, Any], progress: bool):
        self.bank, self.k, self.folder, self.meta = bank, k, folder, meta
        self.generator = torch.Generator().manual_seed(meta["seed"] * 1000 + k)
        channels, height, width = bank.shape
        self.rows, self.cols = height - k + 1, width - k + 1
        self.per_image = self.rows * self.cols
        self.members = torch.arange(len(bank))
        if meta["max_windows"] is not None and self.per_image * len(bank) > meta["max_windows"]:
            count = max(1, meta["max_windows"] // self.per_image)
            self.members = torch.randperm(len(bank), generator=self.generator)[:count].sort().values
        self.windows = self.per_image * len(self.members)
        self.values = channels * k * k
        self.threads = torch.get_num_threads()
        self.bar = tqdm(total=2 * self.windows, desc=f"indexing k = {k}", unit="windows", unit_scale=True, leave=False,
                        disable=None if progress else True, delay=2)  # fmt: skip

    def run(self) -> None:
        start = time.monotonic()
        torch.set_num_threads(1)  # tasks run side by side, and sums must not depend on how many
        try:
            with self.bar:
                arrays, cell = self.cells()
                self.write(arrays, cell)
        finally:
            torch.set_num_threads(self.threads)
        write_atomically(self.folder / "cells.safetensors", safetensors.torch.save(arrays))
        storage.write_part_meta(
            self.folder,
            self.meta,
            {
                "patch_size": self.k,
                "axes": arrays["axes"].shape[1],
                "cell_count": len(arrays["sizes"]),
                "windows": self.windows,
                "rows": [self.k // 2, self.k // 2 + self.rows],
                "cols": [self.k // 2, self.k // 2 + self.cols],
                "subsampled_images": len(self.members) if len(self.members) < len(self.bank) else None,
                "build_seconds": round(time.monotonic() - start, 1),
            },
        )

    def cells(self) -> tuple[dict[str, Tensor], np.ndarray]:
        """Axes, cells and their moments; and the cell of every window, image by image."""
        axes, centre = self.principal_axes()
        rank = axes.shape[1]
        wanted = self.meta["cells"] or min(MOST_CELLS, CELLS_PER_ROOT * math.sqrt(self.windows))
        parents = max(1, round(min(wanted, self.windows) / SIBLINGS))
        chunks = list(self.chunks())

        # Centroids, of a sample of the windows of some images.
        count = min(self.windows, TRAINING_PER_CELL * SIBLINGS * parents)
        needed = min(len(self.members), -(-TRAINING_SHARE * count // self.per_image))
        some = self.members[torch.randperm(len(self.members), generator=self.generator)[:needed].sort().values]
        picked = torch.randperm(needed * self.per_image, generator=self.generator)[:count]
        step = self.images_in(BLOCK_WINDOWS)
        starts = torch.arange(0, needed, step)
        picked = picked.sort().values
        by_block = picked.tensor_split(torch.searchsorted(picked, starts[1:] * self.per_image))

        def sampled(i: int) -> np.ndarray:
            own = by_block[i] - starts[i] * self.per_image
            return self.described(*self.features(some[starts[i] : starts[i] + step], axes, centre)[:2])[own.numpy()]

        sample = np.concatenate(in_threads(sampled, range(len(starts)), self.threads))
        shuffled = torch.randperm(len(sample), generator=self.generator).numpy()
        tree = Tree(sample[shuffled], parents, self.meta["seed"], self.threads)

        # The cell of every window, and sums by cell.
        total = parents * SIBLINGS
        cell = np.empty(self.windows, np.int32)
        channels = self.bank.shape[0]

        def placed(stripe: int) -> tuple[Tensor, Tensor]:  # sums by cell, largest distance from the centroid
            sums = torch.zeros(total, 2 * rank + 2 + 2 * channels, dtype=torch.float64)
            radius = torch.zeros(total)
            for first, members in chunks[stripe::STRIPES]:
                parts = [self.features(part, axes, centre) for part in members.split(self.images_in(BLOCK_WINDOWS))]
                found = tree.cells(np.concatenate([self.described(*part[:2]) for part in parts]))
                cell[first : first + len(found)] = found
                start = 0
                for features, rest, value in parts:
                    own = found[start : start + len(rest)]
                    start += len(rest)
                    columns = [np.ones_like(rest), features, np.square(features), rest, value, np.square(value)]
                    cells = torch.from_numpy(own).long()
                    sums.index_add_(0, cells, torch.from_numpy(np.concatenate(columns, 1, dtype=np.float64)))
                    away = np.sqrt(np.square(features - tree.centroids[own, :rank]).sum(1))
                    radius.scatter_reduce_(0, cells, torch.from_numpy(away), "amax")
                self.bar.update(len(found))
            return sums, radius

        found = in_threads(placed, range(min(STRIPES, len(chunks))), self.threads)
        sums = sum(part for part, _ in found).numpy()
        radius = torch.stack([part for _, part in found]).amax(0).double().numpy()
        sizes = sums[:, 0]
        means = sums[:, 1:] / np.maximum(sizes, 1)[:, None]
        mean = means[:, :rank]
        # No window of a cell is farther from its mean, along the axes; rounding of features included.
        reach = (radius + np.sqrt(np.square(mean - tree.centroids[:, :rank]).sum(1))) * (1 + 1e-4) + 1e-4
        return {
            "axes": torch.from_numpy(axes),
            "centre": torch.from_numpy(centre),
            "sizes": torch.from_numpy(sizes.astype(np.int64)),
            "radius": torch.from_numpy(reach.astype(np.float32)),
            "mean": torch.from_numpy(mean.astype(np.float32)),
            "variance": torch.from_numpy((means[:, rank : 2 * rank] - np.square(mean)).clip(0).astype(np.float32)),
            "rest": torch.from_numpy(means[:, 2 * rank].clip(0).astype(np.float32)),
            "value": torch.from_numpy(means[:, 2 * rank + 1 : 2 * rank + 1 + channels].astype(np.float32)),
            "value_square": torch.from_numpy(means[:, 2 * rank + 1 + channels :].astype(np.float32)),
        }, cell

    def write(self, arrays: dict[str, Tensor], cell: np.ndarray) -> None:
        """Where the windows of each cell lie, in random order, and their bytes."""
        key = torch.from_numpy(cell).long() << 32
        key += torch.randint(1 << 32, key.shape, generator=self.generator)
        order = torch.argsort(key).numpy()
        del key
        member = self.members.numpy()
        # Tiles are for the scan of `pruned`, which takes bytes of at most four channels.
        bytes_ = self.bank.images.dtype == torch.uint8 and self.bank.shape[0] <= MOST_CHANNELS
        stored = native is not None and bytes_ and self.values <= ROW_BYTES
        images = self.bank.images if self.bank.indices is None else self.bank.images[self.bank.indices]
        sizes = arrays["sizes"].numpy()
        ends = np.cumsum(sizes)
        first = 0
        with (
            errors_name(self.folder / "ids.bin"),
            open(self.folder / "ids.bin", "wb") as ids_file,
            open(self.folder / "rows.bin", "wb") as rows_file,
        ):
            while first < len(sizes):
                begin = ends[first] - sizes[first]
                last = max(first + 1, int(np.searchsorted(ends, begin + CHUNK_WINDOWS, side="right")))
                windows = order[begin : ends[last - 1]]
                ids = (member[windows // self.per_image] * self.per_image + windows % self.per_image).astype(np.int64)
                ids_file.write(ids.tobytes())
                if stored:
                    rows_file.write(pack(images, ids, sizes[first:last], self.k, self.threads).tobytes())
                self.bar.update(len(windows))
                first = last
            for file in (ids_file, rows_file):
                file.flush()
                os.fsync(file.fileno())

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Some images at a time: the number of their first window, and their places in the bank."""
        step = self.images_in(CHUNK_WINDOWS)
        for start in range(0, len(self.members), step):
            yield start * self.per_image, self.members[start : start + step]

    def images_in(self, windows: int) -> int:
        return max(1, windows // self.per_image)

    def images(self, members: Tensor) -> Tensor:
        raw = self.bank.images[members if self.bank.indices is None else self.bank.indices[members]]
        return raw.float() / 127.5 - 1 if raw.dtype == torch.uint8 else raw.float()

    def features(
        self, members: Tensor, axes: np.ndarray, centre: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n, rank] features of the windows of some images, [n, 1] squared norm beyond them, [n, C] centre pixels."""
        images, k = self.images(members), self.k
        channels, r = images.shape[1], self.k // 2
        kernels = torch.from_numpy(np.concatenate([axes.T, centre[None]])).view(-1, channels, k, k)
        found = functional.conv2d(images, kernels).permute(0, 2, 3, 1).flatten(0, 2)
        features = found[:, :-1] - torch.from_numpy(centre @ axes)
        squares = functional.avg_pool2d(images.square().sum(1, keepdim=True).double(), k, 1).flatten() * k**2
        norm = squares - 2 * found[:, -1].double() + float(np.square(centre, dtype=np.float64).sum())
        rest = (norm - features.double().square().sum(1)).clamp(min=0).float()[:, None]
        value = images[:, :, r : r + self.rows, r : r + self.cols].permute(0, 2, 3, 1).flatten(0, 2)
        return features.numpy(), rest.numpy(), value.numpy()

    def described(self, features: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """[n, rank + 1] by what windows are sorted into cells: their features, and how far they lie beyond the axes."""
        return np.concatenate([features, np.sqrt(rest)], 1)

    def principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """[values, rank] leading axes and [values] centre, of a sample of windows."""
        count = min(len(self.members), max(1, 4 * PCA_WINDOWS // self.per_image))
        some = torch.randperm(len(self.members), generator=self.generator)[:count]
        images = self.images(self.members[some.sort().values])
        samples = []
        for start in range(0, count, 64):
            flat = functional.unfold(images[start : start + 64], self.k).permute(0, 2, 1).flatten(0, 1)
            samples.append(flat[torch.randperm(len(flat), generator=self.generator)[: -(-PCA_WINDOWS * 64 // count)]])
        sample = torch.cat(samples).double()
        centre = sample.mean(0)
        covariance = (sample - centre).T @ (sample - centre) / max(1, len(sample) - 1)
        _, axes = torch.linalg.eigh(covariance)
        rank = min(self.values, self.meta["rank"] or AXES)
        return axes.flip(1)[:, :rank].contiguous().float().numpy(), centre.float().numpy()
