"""PatchIndex: every interior window of a bank, in cells of similar windows, on disk.

Windows are sorted into cells by their principal axes. Moments summarise a cell, so that an engine can predict its
weight from them alone; the windows themselves are compared exactly. Files are mapped, not read.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..bank import PatchBank
from ..files import LOCK, TEMPORARY, errors_name, locked
from . import storage
from .build import Builder
from .kmeans import SIBLINGS, faiss
from .layout import Hits, IndexedSize, Strata
from .storage import OPTIONS

__all__ = ["OPTIONS", "SIBLINGS", "Hits", "IndexedSize", "PatchIndex", "Strata"]


class PatchIndex:
    """The windows of a bank in cells, for the engine `pruned` and for search. Make one with `build` or `open`."""

    def __init__(self, path: Path, bank: PatchBank, meta: dict[str, Any]):
        self.path = path
        self.bank = bank
        self.meta = meta
        self._sizes: dict[int, IndexedSize] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles hold the path, and the bank, which may be a path itself."""
        return PatchIndex.open, (os.path.abspath(self.path), self.bank)

    @property
    def patch_sizes(self) -> list[int]:
        """The patch sizes it holds, ascending."""
        return list(self.meta["patch_sizes"])

    @cached_property
    def images(self) -> Tensor:
        """[N, C, H, W] the bank's images as stored, in its order."""
        return self.bank.block

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.patch_sizes))
        return f"PatchIndex({str(self.path)!r}, patch sizes {sizes}, {self.bank!r})"

    @classmethod
    def build(
        cls,
        bank: PatchBank,
        patch_sizes: int | Sequence[int],
        path: str | os.PathLike[str],
        padding_mode: str = "zeros",
        rank: int | None = None,
        cells: int | None = None,
        max_windows: int | None = None,
        seed: int = 0,
        progress: bool = True,
        memory_limit: int = 2 * 2**30,
        store: str = "small",
    ) -> PatchIndex:
        """Indexes every window of `bank` at each patch size; sizes that `path` already holds are kept.

        Args:
            bank: the training images.
            patch_sizes: odd sizes up to the shorter side of the images.
            path: a folder to make, or one that an interrupted build left.
            padding_mode: recorded only. Windows along the edges compete with few others and are summed exactly, so one
                index serves both modes.
            rank: principal axes by which windows are sorted into cells and weights expected; by default 32, or all.
            cells: how many, in whole parents of 16; by default 16 sqrt(windows), at most 131,072.
            max_windows: index only so many windows a size, from images taken at random; `meta` records it.
            seed: of the samples that axes and cells are trained on and of the order inside cells.
            progress: show a progress bar.
            memory_limit: bytes of working memory beyond the bank. Less of it takes more passes over the bank and fewer
                threads, and gives the same index.
            store: which windows the cells hold themselves, in bytes and not by number alone: "small" ones, of up to
                147 bytes (k = 7 in colour), "all" or "none". Estimates are the same; on a CPU they take half the time
                or less where windows are stored, and a window of k = 7 takes 156 bytes on disk instead of 8.

        Raises:
            ImportError: faiss is missing.
            TypeError: not a PatchBank.
            ValueError: a size that is even or does not fit, a folder that holds something else, or another bank's
                index, or one that another process is building; a `memory_limit` that cannot hold the cells.
            OSError: the disk is full or not writable; nothing half-built is left.
        """
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank: got {type(bank).__name__}, takes a PatchBank")
        faiss()
        _, height, width = bank.shape
        given = [patch_sizes] if isinstance(patch_sizes, int) else list(patch_sizes)
        sizes = sorted({checks.odd("patch_sizes", k) for k in given})
        if not sizes:
            raise ValueError("patch_sizes: got none, takes one or more odd sizes")
        if sizes[-1] > min(height, width):
            raise ValueError(f"patch_sizes: {sizes[-1]} does not fit in {height} x {width} images")
        checks.one_of("padding_mode", padding_mode, ("zeros", "circular"))
        if rank is not None:
            checks.integer("rank", rank, at_least=1)
        if cells is not None:
            checks.integer("cells", cells, at_least=1)
        if max_windows is not None:
            checks.integer("max_windows", max_windows, at_least=1)
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"path: {path} is a file, takes a folder")
        if path.is_dir() and not (path / "meta.json").exists():
            # meta.json is the first file of a build, so nothing beside it but an empty lock can be ours.
            others = [p.name for p in path.iterdir() if p.name != LOCK and not TEMPORARY.fullmatch(p.name)]
            if others:
                raise ValueError(
                    f"path: {path} holds something other than an index ({min(others)!r}, but no meta.json); "
                    "take another folder"
                )
        elif path.is_dir():
            storage.read_meta(path, bank)
        checks.integer("seed", seed, at_least=0, at_most=2**31 - 2)
        checks.integer("memory_limit", memory_limit, at_least=1)
        checks.one_of("store", store, ("small", "all", "none"))
        options = dict(zip(OPTIONS, (padding_mode, rank, cells, max_windows, seed), strict=True))
        meta: dict[str, Any] = {
            "format": storage.FORMAT,
            "bank": bank.fingerprint,
            "images": len(bank),
            "shape": list(bank.shape),
            "patch_sizes": [],
            **options,
        }
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, f"path: {path} is being built by another process"):
            if (path / "meta.json").exists():
                kept = storage.read_meta(path, bank)
                other = [name for name in options if kept[name] != options[name]]
                if other:
                    raise ValueError(
                        f"path: {path} was built with {other[0]}={kept[other[0]]!r}, now {options[other[0]]!r}; "
                        "take another folder"
                    )
                meta = kept
            storage.write_meta(path, meta)
            for k in sizes:
                if k in meta["patch_sizes"]:
                    continue
                target, partial = path / f"k{k:02d}", path / f"k{k:02d}.partial"
                for left in (target, partial):
                    shutil.rmtree(left, ignore_errors=True)
                partial.mkdir()
                try:
                    with errors_name(partial):
                        Builder(bank, k, partial, meta, progress, memory_limit, store).run()
                    os.replace(partial, target)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                meta["patch_sizes"] = sorted([*meta["patch_sizes"], k])
                storage.write_meta(path, meta)
        return cls.open(path, bank)

    @classmethod
    def open(cls, path: str | os.PathLike[str], bank: PatchBank, verify: bool = False) -> PatchIndex:
        """Maps an index that `build` made.

        Sizes of all files are checked, and checksums of those up to 64 MiB; `verify` checks every file whole.

        Raises:
            ValueError: no index, another bank's (both fingerprints are named), another format version, a missing,
                truncated or changed file (by its path).
        """
        path = Path(path)
        meta = storage.read_meta(path, bank)
        if not meta["patch_sizes"]:
            raise ValueError(f"{path}: this index holds no patch size yet; build it again")
        index = cls(path, bank, meta)
        for k in meta["patch_sizes"]:
            storage.read_part_meta(path / f"k{k:02d}", meta, k, verify)
        return index

    def at(self, k: int) -> IndexedSize:
        """The part for patch size k; ValueError names the sizes there are."""
        if k not in self.meta["patch_sizes"]:
            raise ValueError(f"patch_size: this index has {self.patch_sizes}, not {k}")
        if k not in self._sizes:
            folder = self.path / f"k{k:02d}"
            self._sizes[k] = IndexedSize(
                folder, self.images, k, storage.read_part_meta(folder, self.meta, k, verify=False)
            )
        return self._sizes[k]

    def search(
        self,
        z: Tensor,
        sigma: float,
        k: int = 10,
        patch_size: int | None = None,
        pixels: Sequence[tuple[int, int]] | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """The k heaviest interior windows for pixels of one noisy image, found by branch and bound over the cells.

        Args:
            z: [C, H, W] a noisy image z = x_0 + sigma eps.
            sigma: noise level, in units of pixel values.
            k: how many windows a pixel.
            patch_size: may be left out where the index has one size.
            pixels: (row, column) pairs; all pixels whose window lies inside the image by default.
            nprobe: cells that are looked into, nearest first; all by default.

        Returns:
            Hits, compared exactly. Without `nprobe` every hit is proven: cells are looked into until the distance that
            no window of the next can undercut exceeds the k-th found.

        Raises:
            ValueError: sigma not positive, a patch size the index lacks, pixels too close to the border.
        """
        sizes = self.patch_sizes
        if patch_size is None and len(sizes) > 1:
            raise ValueError(f"patch_size: this index has {sizes}, takes one of them")
        part = self.at(sizes[0] if patch_size is None else patch_size)
        if z.ndim != 3 or tuple(z.shape) != self.bank.shape:
            raise ValueError(f"z: got shape {list(z.shape)}, takes {list(self.bank.shape)}")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma: got {sigma}, takes a positive finite number")
        checks.integer("k", k, at_least=1)
        if pixels is None:
            pixels = [(i, j) for i in part.rows for j in part.cols]
        for i, j in pixels:
            if i not in part.rows or j not in part.cols:
                raise ValueError(f"pixels: the window of ({i}, {j}) reaches over the border at patch size {part.k}")
        r = part.k // 2
        scale = self.bank.scale  # what is stored is divided by it
        windows = torch.stack([z[:, i - r : i + r + 1, j - r : j + r + 1].float() for i, j in pixels]) / scale
        hits = part.search(windows, sigma / scale, k, nprobe)
        return hits._replace(distance=hits.distance * scale**2)
