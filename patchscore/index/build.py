"""Builds one patch size of an index: axes, cells and their moments, then the windows of each cell.

Two passes over the images. The first finds the cell of every window and adds up the cells' moments; the second, over
windows sorted by cell, writes where each window lies and, for small windows, its bytes. Windows are sorted by ranges of
cells, as many at a time as memory has room for, so that it limits neither the bank nor the number of windows.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..bank import PatchBank
from ..files import errors_name, write_atomically
from ..native import native, pack
from ..pixels import to_values
from . import storage
from .kmeans import SIBLINGS, Tree, each_in_threads, in_threads

AXES = 32
"""Principal axes by which cells are told apart and weights expected. 27, all of them, at k = 3 in colour; the variance
beyond is kept as one number a cell."""

CELLS_PER_ROOT = 16
"""Cells for each square root of the number of windows. More cells predict weights better and take longer to plan."""

MOST_CELLS = 1 << 17
TRAINING_PER_CELL = 24
TRAINING_SHARE = 4
"""Training windows are every so many of those of some images, so that few images are projected for them."""

PCA_WINDOWS = 100_000

ROW_BYTES = 147
"""Windows of at most so many bytes (k = 7 in colour, k = 3 of four channels of floats) are small ones: stored in the
cells unless the user says otherwise, which makes their scans two to three times as fast."""

CHUNK_WINDOWS = 1 << 18
"""Windows whose cells are found together; fixed, for sums are added up by chunk."""

EIGEN_COPIES = 5
"""Matrices as large as the covariance that its eigenvectors take, itself and them included (LAPACK's syevd)."""

BLOCK_WINDOWS = 1 << 15
"""Windows that are projected and added up together: few enough that the allocator of the C library reuses their memory
(blocks under 32 MB), which halves the time of a build."""

SORT_BYTES = 56
"""Memory that each window of a range takes while it is sorted: its number, key and position, and copies of them."""

SCANNED_WINDOWS = 1 << 20
"""Windows whose cells are looked through together for those of a range."""

CELLS_FILE = "cells.tmp"
"""The cell of every window, while a build is under way, where memory has no room for it."""

STRIPES = 8
"""Chunks whose sums are added up side by side; fixed, so that the result does not depend on the number of threads."""


class Builder:
    """Builds patch size k of `bank` into `folder`."""

    def __init__(
        self,
        bank: PatchBank,
        k: int,
        folder: Path,
        meta: dict[str, Any],
        progress: bool,
        memory_limit: int,
        store: str = "small",
    ):
        self.bank, self.k, self.folder, self.meta, self.memory_limit = bank, k, folder, meta, memory_limit
        self.store = store
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
        # Of the axes, the cells and what is summed by cell.
        self.rank = min(self.values, meta["rank"] or AXES)
        wanted = meta["cells"] or min(MOST_CELLS, CELLS_PER_ROOT * math.sqrt(self.windows))
        self.parents = max(1, round(min(wanted, self.windows) / SIBLINGS))
        self.trained_on = min(self.windows, TRAINING_PER_CELL * SIBLINGS * self.parents)
        self.sums = 2 * self.rank + 2 + 2 * channels
        self.all_threads = torch.get_num_threads()
        self.threads = self.affordable_threads(self.all_threads)
        self.bar = tqdm(total=2 * self.windows, desc=f"indexing k = {k}", unit="windows", unit_scale=True, leave=False,
                        disable=None if progress else True, delay=2)  # fmt: skip

    def run(self) -> None:
        start = time.monotonic()
        torch.set_num_threads(1)  # tasks run side by side, and sums must not depend on how many
        try:
            with self.bar:
                arrays, cell = self.cells()
                self.write(arrays, cell)
                del cell
                (self.folder / CELLS_FILE).unlink(missing_ok=True)
        finally:
            torch.set_num_threads(self.all_threads)
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

    def affordable_threads(self, threads: int) -> int:
        """Tasks that run side by side within the memory; the result does not depend on it.

        Raises:
            ValueError: there is no room for the sample that cells are trained on, the cells' sums, and one task.
        """
        row = 4 * (self.rank + 1)
        sums = 8 * self.sums * SIBLINGS * self.parents
        # The sample and the numbers of its rows by parent; what a task has of a chunk of windows, and of a block of it.
        shared = max(self.trained_on * (row + 16) + 2 * sums, EIGEN_COPIES * 8 * self.values**2)
        task = min(CHUNK_WINDOWS, self.windows) * (4 * row + 16) + min(BLOCK_WINDOWS, self.windows) * 16 * self.sums
        affordable = (self.memory_limit - shared) // (task + sums)
        if affordable < 1:
            cells = SIBLINGS * self.parents
            raise ValueError(
                f"memory_limit: got {self.memory_limit} bytes, to build {cells} cells takes {shared + task + sums}; "
                f"pass more, or fewer cells (on the command line --memory-limit, --cells)"
            )
        return min(threads, affordable)

    def cells(self) -> tuple[dict[str, Tensor], np.ndarray]:
        """Axes, cells and their moments; and the cell of every window, image by image."""
        axes, centre = self.principal_axes()
        rank, parents = self.rank, self.parents
        chunks = list(self.chunks())

        tree = Tree(self.training_sample(axes, centre), parents, self.meta["seed"], self.threads)
        give_back()

        # The cell of every window, and sums by cell.
        total = parents * SIBLINGS
        cell = self.room_for_cells()
        channels = self.bank.shape[0]

        def placed(stripe: int) -> tuple[Tensor, Tensor]:  # sums by cell, largest distance from the centroid
            sums = torch.zeros(total, self.sums, dtype=torch.float64)
            radius = torch.zeros(total)
            for first, members in chunks[stripe::STRIPES]:
                parts = [self.features(part, axes, centre) for part in members.split(self.images_in(BLOCK_WINDOWS))]
                described, at = np.empty((len(members) * self.per_image, rank + 1), np.float32), 0
                for features, rest, _ in parts:
                    described[at : at + len(rest)] = self.described(features, rest)
                    at += len(rest)
                found = tree.cells(described)
                del described
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

        sums, radius = np.zeros((total, self.sums)), np.zeros(total)
        for part, farthest in each_in_threads(placed, range(min(STRIPES, len(chunks))), self.threads):
            sums += part.numpy()
            radius = np.maximum(radius, farthest.double().numpy())
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

    def training_sample(self, axes: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """[count, rank + 1] descriptions, in random order, of some windows of some images."""
        count = self.trained_on
        needed = min(len(self.members), -(-TRAINING_SHARE * count // self.per_image))
        some = self.members[torch.randperm(len(self.members), generator=self.generator)[:needed].sort().values]
        picked = torch.randperm(needed * self.per_image, generator=self.generator)[:count]
        step = self.images_in(BLOCK_WINDOWS)
        starts = torch.arange(0, needed, step)
        picked = picked.sort().values
        by_block = picked.tensor_split(torch.searchsorted(picked, starts[1:] * self.per_image))
        sample, place = np.empty((count, self.rank + 1), np.float32), np.empty(count, np.int64)
        place[torch.randperm(count, generator=self.generator).numpy()] = np.arange(count)
        ends = np.cumsum([len(own) for own in by_block])

        def describe(i: int) -> None:
            own = (by_block[i] - starts[i] * self.per_image).numpy()
            rows = self.described(*self.features(some[starts[i] : starts[i] + step], axes, centre)[:2])[own]
            sample[place[ends[i] - len(own) : ends[i]]] = rows

        in_threads(describe, range(len(starts)), self.threads)
        return sample

    def room_for_cells(self) -> np.ndarray:
        """[windows] int32: in memory, or in a file where it would take much of the memory."""
        if 4 * self.windows <= self.memory_limit // 8:
            return np.empty(self.windows, np.int32)
        path = self.folder / CELLS_FILE
        with errors_name(path), open(path, "wb") as file:
            # All of the file, as a full disk ends a process that finds out by writing to memory.
            block = bytes(1 << 22)
            for left in range(4 * self.windows, 0, -len(block)):
                file.write(block[:left])
        return np.memmap(path, np.int32, "r+", shape=(self.windows,))

    def write(self, arrays: dict[str, Tensor], cell: np.ndarray) -> None:
        """Where the windows of each cell lie, in random order, and their bytes."""
        bytes_ = self.values * self.bank.images.itemsize
        stored = native is not None and (self.store == "all" or (self.store == "small" and bytes_ <= ROW_BYTES))
        # Of a mapped file windows are read in the order in which they lie there, and not in that of the cells.
        copied = stored and self.bank.mapped
        sizes = arrays["sizes"].numpy()
        ends = np.cumsum(sizes)
        draws = self.generator.get_state()
        give_back()
        most = max(CHUNK_WINDOWS, self.memory_limit // 2 // (SORT_BYTES + (bytes_ if copied else 0)))
        with (
            errors_name(self.folder / "ids.bin"),
            open(self.folder / "ids.bin", "wb") as ids_file,
            open(self.folder / "rows.bin", "wb") as rows_file,
        ):
            start = 0
            while start < len(sizes):
                stop = max(start + 1, int(np.searchsorted(ends, ends[start] - sizes[start] + most, side="right")))
                self.generator.set_state(draws)
                windows, copies = self.of_range(cell, start, stop, int(sizes[start:stop].sum()), copied)
                first = start
                while first < stop:
                    begin = ends[first] - sizes[first]
                    last = int(np.searchsorted(ends[:stop], begin + CHUNK_WINDOWS, side="right"))
                    last = max(first + 1, last)
                    at = slice(begin - ends[start] + sizes[start], ends[last - 1] - ends[start] + sizes[start])
                    self.write_chunk(ids_file, rows_file, windows[at], sizes[first:last], stored, copies, at)
                    self.bar.update(at.stop - at.start)
                    first = last
                start = stop
                del windows, copies
                give_back()
            for file in (ids_file, rows_file):
                file.flush()
                os.fsync(file.fileno())

    def of_range(
        self, cell: np.ndarray, start: int, stop: int, count: int, copied: bool
    ) -> tuple[np.ndarray, tuple[Tensor, np.ndarray] | None]:
        """The windows of cells start .. stop by their numbers, sorted by cell and in random order inside.

        And where they are copied: their bytes [count, C, k, k] in the order of their numbers, and where each stands.
        """
        number, key = np.empty(count, np.int64), np.empty(count, np.int64)
        shape = (count, self.bank.shape[0], self.k, self.k)
        rows = torch.empty(shape, dtype=self.bank.images.dtype) if copied else None
        filled, step = 0, self.images_in(SCANNED_WINDOWS)
        for image in range(0, len(self.members), step):
            first = image * self.per_image
            some = np.asarray(cell[first : first + step * self.per_image])
            draw = torch.randint(1 << 32, (len(some),), generator=self.generator)
            own = np.flatnonzero((some >= start) & (some < stop))
            to = slice(filled, filled + len(own))
            number[to] = first + own
            key[to] = some[own]
            key[to] <<= 32
            key[to] += draw.numpy()[own]
            if rows is not None:
                self.copy_windows(first, own, rows[to])
            filled = to.stop
        order = np.argsort(key, kind="stable")
        return number[order], None if rows is None else (rows, order)

    def copy_windows(self, first: int, own: np.ndarray, rows: Tensor) -> None:
        """The bytes of windows first + own, in ascending order, a few images at a time."""
        if not len(own):
            return
        step = self.images_in(BLOCK_WINDOWS) * self.per_image
        for begin, end in itertools.pairwise([*np.searchsorted(own, np.arange(0, own[-1] + 1, step)), len(own)]):
            if begin == end:
                continue
            inside = own[begin:end] + first
            low, high = inside[0] // self.per_image, inside[-1] // self.per_image + 1
            images = self.bank.stored_at(self.members[low:high])
            windows = images.unfold(2, self.k, 1).unfold(3, self.k, 1)  # [n, C, rows, cols, k, k]
            image, place = np.divmod(inside - low * self.per_image, self.per_image)
            row, col = np.divmod(place, self.cols)
            rows[begin:end] = windows[torch.from_numpy(image), :, torch.from_numpy(row), torch.from_numpy(col)]

    def write_chunk(
        self,
        ids_file: BinaryIO,
        rows_file: BinaryIO,
        windows: np.ndarray,
        sizes: np.ndarray,
        stored: bool,
        copies: tuple[Tensor, np.ndarray] | None,
        at: slice,
    ) -> None:
        """Some cells: where their windows lie in the bank, and their bytes in tiles."""
        image, place = np.divmod(windows, self.per_image)
        member = self.members.numpy()[image]
        ids_file.write((member * self.per_image + place).astype(np.int64).tobytes())
        if not stored:
            return
        if copies is not None:
            rows, order = copies  # images of one window each
            tiles = pack(rows, order[at], sizes, self.k, self.threads)
        else:
            among = member if self.bank.indices is None else self.bank.indices.numpy()[member]
            tiles = pack(self.bank.images, among * self.per_image + place, sizes, self.k, self.threads)
        rows_file.write(tiles.tobytes())

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Some images at a time: the number of their first window, and their positions in the bank."""
        step = self.images_in(CHUNK_WINDOWS)
        for start in range(0, len(self.members), step):
            yield start * self.per_image, self.members[start : start + step]

    def images_in(self, windows: int) -> int:
        return max(1, windows // self.per_image)

    def images(self, members: Tensor) -> Tensor:
        return to_values(self.bank.stored_at(members))

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
        some = self.members[torch.randperm(len(self.members), generator=self.generator)[:count].sort().values]
        # Their covariance, summed up a few images at a time.
        drawn, total, products = 0, torch.zeros(self.values).double(), torch.zeros(self.values, self.values).double()
        for start in range(0, count, 64):
            images = self.images(some[start : start + 64])
            flat = functional.unfold(images, self.k).permute(0, 2, 1).flatten(0, 1)
            order = torch.randperm(len(flat), generator=self.generator)[: -(-PCA_WINDOWS * 64 // count)]
            sample = flat[order].double()
            drawn += len(sample)
            total += sample.sum(0)
            products.addmm_(sample.T, sample)
        centre = total / drawn
        covariance = products.addr_(centre, centre, alpha=-drawn).div_(max(1, drawn - 1))
        _, axes = torch.linalg.eigh(covariance)
        return axes.flip(1)[:, : self.rank].contiguous().float().numpy(), centre.float().numpy()


def give_back() -> None:
    """Has glibc give freed memory back to the system: it keeps what threads have freed, not needed again."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
