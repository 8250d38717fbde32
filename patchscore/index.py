"""PatchIndex: every training window of a bank, in cells of similar windows, on disk.

A window is centred, rotated to the principal axes of its patch size and cut to the leading ones; cells are the inverted
lists of a FAISS index. What a cell holds is summed up by its moments, so that an engine can tell from those alone how
much of its weight lies where. Files are mapped, not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from . import checks
from .bank import PatchBank
from .files import LOCK, TEMPORARY, errors_name, locked, parse_json, sealed, unsealed, write_atomically
from .pixels import to_values

FORMAT = 3
"""Since 3 each patch size names its bank and options, and both meta.json carry a hash."""

OPTIONS = ("padding_mode", "rank", "cells", "max_windows", "seed")
MOST_AXES = 40
"""Axes kept at most up to k = 5: a window then takes 80 bytes of features, 8 of place, 2 of count and C of value.
Larger windows have more axes that matter and are fewer; they get 0.32 (k - 5)^2 more."""

TAIL = 1e-5
"""Share of the variance that the dropped axes may hold, where MOST_AXES allows it."""

SIBLINGS = 16
"""Cells that divide one parent: weights are foreseen for parents first, then for the cells of those that matter."""

MOST_CELLS = 1 << 17
HNSW_FROM = 4096
TRAINING_PER_CELL = 24
CHUNK_BYTES = 256 << 20
CELLS_AT_ONCE = 1 << 16  # windows whose cells are written together
VERIFIED_AT_OPEN = 64 << 20


class Hits(NamedTuple):
    """The heaviest windows of some pixels, heaviest first.

    weight:   [P, k] relative to the heaviest.
    distance: [P, k] squared distance of the two windows; infinite where the cells looked into held fewer than k.
    image, row, col: [P, k] where the window is centred; image -1 where there was none. Equal windows of one label are
              stored, and found, once.
    proven:   [P] whether no other window can be among them.
    """

    weight: Tensor
    distance: Tensor
    image: Tensor
    row: Tensor
    col: Tensor
    proven: Tensor


@dataclass(frozen=True)
class Region:
    """Windows centred at rows x cols of every image that share axes and cells: the interior, or one row of an edge."""

    rows: range
    cols: range
    first_cell: int
    cells: int

    def key(self) -> tuple[int, int, int, int]:
        return self.rows.start, self.rows.stop, self.cols.start, self.cols.stop


class PatchIndex:
    """The windows of a bank in cells, for the engine `pruned` and for search. Make one with `build` or `open`."""

    def __init__(self, path: Path, bank: PatchBank, meta: dict[str, Any]):
        self.path = path
        self.bank = bank
        self.meta = meta
        self._sizes: dict[int, IndexedSize] = {}

    @property
    def patch_sizes(self) -> list[int]:
        """The patch sizes it holds, ascending."""
        return list(self.meta["patch_sizes"])

    @cached_property
    def images(self) -> Tensor:
        """[N, C, H, W] the bank's images as stored, in its order."""
        return self.bank.images if self.bank.indices is None else self.bank.images[self.bank.indices]

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
    ) -> PatchIndex:
        """Indexes every window of `bank` at each patch size; sizes that `path` already holds are kept.

        Args:
            bank: the training images.
            patch_sizes: odd sizes up to the shorter side of the images.
            path: a folder to make, or one that an interrupted build left.
            padding_mode: "zeros" also indexes the windows along the edges, which that mode of
                `EquivariantLocalScore` locks to their row or column; "circular" leaves them out.
            rank: principal axes kept; by default those that hold all but 1e-5 of the variance, at most 40 up to k = 5
                and 0.32 (k - 5)^2 more beyond.
            cells: inverted lists of the interior, in whole families of 16 siblings; by default 16 sqrt(windows), at
                most 131,072.
            max_windows: index only so many windows a size, from images taken at random; `meta` records it.
            seed: of the samples that axes and cells are trained on and of the order inside cells.
            progress: show a progress bar.

        Raises:
            ImportError: faiss is missing.
            ValueError: a size that is even or does not fit, a folder that holds something else, or another bank's
                index, or one that another process is building.
            OSError: the disk is full or not writable; nothing half-built is left.
        """
        _faiss()
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
            _read_meta(path, bank)
        checks.integer("seed", seed, at_least=0, at_most=2**31 - 2)
        options = dict(zip(OPTIONS, (padding_mode, rank, cells, max_windows, seed), strict=True))
        meta: dict[str, Any] = {
            "format": FORMAT,
            "bank": bank.fingerprint,
            "images": len(bank),
            "shape": list(bank.shape),
            "patch_sizes": [],
            **options,
        }
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, f"path: {path} is being built by another process"):
            if (path / "meta.json").exists():
                kept = _read_meta(path, bank)
                other = [name for name in options if kept[name] != options[name]]
                if other:
                    raise ValueError(
                        f"path: {path} was built with {other[0]}={kept[other[0]]!r}, now {options[other[0]]!r}; "
                        "take another folder"
                    )
                meta = kept
            _write_json(path / "meta.json", meta)
            for k in sizes:
                if k in meta["patch_sizes"]:
                    continue
                target, partial = path / f"k{k:02d}", path / f"k{k:02d}.partial"
                for left in (target, partial):
                    shutil.rmtree(left, ignore_errors=True)
                partial.mkdir()
                try:
                    with errors_name(partial):
                        _Builder(bank, k, partial, meta, progress).run()
                    os.replace(partial, target)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                meta["patch_sizes"] = sorted([*meta["patch_sizes"], k])
                _write_json(path / "meta.json", meta)
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
        meta = _read_meta(path, bank)
        if not meta["patch_sizes"]:
            raise ValueError(f"{path}: this index holds no patch size yet; build it again")
        index = cls(path, bank, meta)
        for k in meta["patch_sizes"]:
            _check_part(path / f"k{k:02d}", k, meta, verify)
        return index

    def at(self, k: int) -> IndexedSize:
        """The part for patch size k; ValueError names the sizes there are."""
        if k not in self.meta["patch_sizes"]:
            raise ValueError(f"patch_size: this index has {self.patch_sizes}, not {k}")
        if k not in self._sizes:
            self._sizes[k] = IndexedSize(self, k)
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
        """The k heaviest interior windows for pixels of one noisy image, found through FAISS and compared exactly.

        Args:
            z: [C, H, W] a noisy image z = x_0 + sigma eps.
            sigma: noise level, in units of pixel values.
            k: how many windows a pixel.
            patch_size: may be left out where the index has one size.
            pixels: (row, column) pairs; all pixels whose window lies inside the image by default.
            nprobe: cells that are looked into, nearest first; all by default.

        Returns:
            Hits. `proven` says for which pixels the distance along the kept axes alone rules out every other window;
            elsewhere a window whose dropped axes fit unusually well might be missing.

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
        interior = part.regions[0]
        if pixels is None:
            pixels = [(i, j) for i in interior.rows for j in interior.cols]
        for i, j in pixels:
            if i not in interior.rows or j not in interior.cols:
                raise ValueError(f"pixels: the window of ({i}, {j}) reaches over the border at patch size {part.k}")
        r = part.k // 2
        windows = torch.stack([z[:, i - r : i + r + 1, j - r : j + r + 1].float() for i, j in pixels])
        return part.search(windows, sigma, k, nprobe)


class IndexedSize:
    """One patch size of an index: its regions, cells and mapped files."""

    def __init__(self, index: PatchIndex, k: int):
        self.index = index
        self.k = k
        self.folder = index.path / f"k{k:02d}"
        self.meta = unsealed(parse_json((self.folder / "meta.json").read_bytes()))
        arrays = safetensors.torch.load_file(self.folder / "cells.safetensors")
        self.rank: int = self.meta["axes"]
        self.regions = [
            Region(range(*entry["rows"]), range(*entry["cols"]), entry["first_cell"], entry["cells"])
            for entry in self.meta["regions"]
        ]
        self.region_at = {region.key(): i for i, region in enumerate(self.regions)}
        self.axes, self.centre, self.tail = arrays["axes"], arrays["centre"], arrays["tail"]
        self.sizes, self.offsets, self.starts = arrays["sizes"], arrays["offsets"], arrays["starts"]
        # [rank, cells], [rank, cells], [cells, 2 C]
        self.mean, self.variance, self.moments = arrays["mean"].float(), arrays["variance"].float(), arrays["moments"]
        self.log_repeats = arrays["stand_for"].log()
        self.competing = self.sizes.float()
        # A parent's moments are those of its cells together: [rank, cells / SIBLINGS].
        family = self.mean.unflatten(1, (-1, SIBLINGS))
        weight = (self.sizes * arrays["stand_for"]).view(-1, SIBLINGS)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        self.parent_mean = (weight * family).sum(2)
        squares = self.variance.unflatten(1, (-1, SIBLINGS)) + (family - self.parent_mean[..., None]).square()
        self.parent_variance = (weight * squares).sum(2)
        self.data = np.memmap(self.folder / "lists.bin", np.uint8, "r")
        channels = index.bank.shape[0]
        kind = np.uint8 if index.bank.images.dtype == torch.uint8 else np.float32
        self.values = np.memmap(self.folder / "values.bin", kind, "r").reshape(-1, channels)
        counts = self.folder / "counts.bin"
        self.counts = np.memmap(counts, np.uint16, "r") if counts.exists() else None
        # As long as any code, so that a damaged one reads no further.
        repeats = arrays.get("repeats")
        self.repeats = None if repeats is None else functional.pad(repeats, (0, (1 << 16) - len(repeats)))

    def rank_at(self, region: int, sigma: float, dropped: float) -> int:
        """The fewest leading axes that leave out at most `dropped` sigma^2 of variance."""
        enough = (self.tail[region] <= dropped * sigma**2).nonzero()
        return max(1, min(self.rank, int(enough[0]) if len(enough) else self.rank))

    def project(self, windows: Tensor, region: int) -> Tensor:
        """[Q, C, k, k] windows as [Q, rank] features of a region."""
        return (windows.flatten(1) - self.centre[region]) @ self.axes[region]

    def ids(self, cell: int) -> np.ndarray:
        """[windows of the cell] image * rows * cols + place in the region."""
        size = int(self.sizes[cell])
        start = int(self.offsets[cell]) + size * self.rank * 2
        return self.data[start : start + 8 * size].view(np.int64)

    @cached_property
    def faiss_index(self) -> Any:
        """The interior as a FAISS inverted file: its coarse quantizer from cells.faiss, its lists mapped."""
        faiss = _faiss()
        cells, file = self.regions[0].cells, self.folder / "lists.bin"
        index = faiss.read_index(str(self.folder / "cells.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR)
        lists = faiss.OnDiskInvertedLists(cells, self.rank * 2, str(file))
        sizes = self.sizes[:cells].numpy().astype(np.uint64)  # named, for a pointer does not keep it alive
        lists.set_all_lists_sizes(faiss.swig_ptr(sizes))
        lists.totsize = file.stat().st_size
        lists.read_only = True
        lists.do_mmap()
        index.replace_invlists(lists, True)
        lists.this.disown()
        return index

    def search(self, windows: Tensor, sigma: float, k: int, nprobe: int | None) -> Hits:
        interior = self.regions[0]
        features = self.project(windows, 0)
        found = self.faiss_index
        probed = interior.cells if nprobe is None else min(interior.cells, nprobe)
        stored = int(self.sizes[: interior.cells].sum())
        wanted = min(stored, max(256, 16 * k))
        near, ids = (torch.from_numpy(x) for x in _search(found, features.numpy(), wanted, probed))
        # Compared exactly, pixel by pixel.
        absent = ids < 0
        ids = ids.clamp(min=0)
        per_image = len(interior.rows) * len(interior.cols)
        image = ids // per_image
        row = ids % per_image // len(interior.cols) + interior.rows.start
        col = ids % len(interior.cols) + interior.cols.start
        r = self.k // 2
        distance = torch.empty(ids.shape, dtype=torch.float64)
        offsets = torch.arange(-r, r + 1)
        for p in range(len(ids)):
            members, place = torch.unique(image[p], return_inverse=True)
            chosen = to_values(self.index.images[members], torch.float64)
            i = (row[p][:, None] + offsets)[:, None, :, None]
            j = (col[p][:, None] + offsets)[:, None, None, :]
            c = torch.arange(chosen.shape[1])[None, :, None, None]
            pixels = chosen[place[:, None, None, None], c, i, j]
            distance[p] = (pixels - windows[p].double()).square().flatten(1).sum(1)
        distance[absent] = torch.inf
        best, order = distance.topk(min(k, wanted), largest=False)
        proven = torch.full((len(ids),), probed == interior.cells)
        if wanted < stored:
            # What was not fetched is, along the kept axes, no nearer than the last that was; its features were rounded
            # to half floats, by at most 2^-11 of their own length, which |q| + |q - p| bounds.
            last = near[:, -1].double().clamp(min=0).sqrt()
            rounding = 6e-4 * (features.double().norm(dim=1) + last) + 1e-4
            proven &= best[:, -1] <= (last - rounding).clamp(min=0).square()
        image[absent] = -1
        return Hits(
            weight=torch.exp(-(best - best[:, :1]) / (2 * sigma**2)),
            distance=best,
            image=image.gather(1, order),
            row=row.gather(1, order),
            col=col.gather(1, order),
            proven=proven,
        )


class _Builder:
    """Builds one patch size into a folder: regions one after the other into the same files."""

    def __init__(self, bank: PatchBank, k: int, folder: Path, meta: dict[str, Any], progress: bool):
        self.bank, self.k, self.folder, self.meta, self.progress = bank, k, folder, meta, progress
        self.generator = torch.Generator().manual_seed(meta["seed"] * 1000 + k)
        self.channels, self.height, self.width = bank.shape
        self.arrays: dict[str, list[Tensor]] = {}
        self.regions: list[dict[str, Any]] = []
        self.cells = self.stored = self.seen = 0
        self.rank = 0

    def run(self) -> None:
        start = time.monotonic()
        r = self.k // 2
        inner_rows, inner_cols = range(r, self.height - r), range(r, self.width - r)
        places = [(inner_rows, inner_cols)]
        if self.meta["padding_mode"] == "zeros" and len(inner_rows) > 1 and len(inner_cols) > 1:
            edge = [i for i in range(self.height) if i not in inner_rows]
            places += [(range(i, i + 1), inner_cols) for i in edge]
            edge = [j for j in range(self.width) if j not in inner_cols]
            places += [(inner_rows, range(j, j + 1)) for j in edge]
        per_image = sum(len(rows) * len(cols) for rows, cols in places)
        self.members = torch.arange(len(self.bank))
        if self.meta["max_windows"] is not None and per_image * len(self.bank) > self.meta["max_windows"]:
            count = max(1, self.meta["max_windows"] // per_image)
            self.members = torch.randperm(len(self.bank), generator=self.generator)[:count].sort().values
        total = per_image * len(self.members)
        with (
            open(self.folder / "lists.bin", "wb") as self.lists,
            open(self.folder / "values.bin", "wb") as self.values,
            open(self.folder / "counts.tmp", "wb") as self.counts,
            tqdm(total=total, desc=f"indexing k = {self.k}", unit="windows", unit_scale=True, leave=False,
                 disable=None if self.progress else True, delay=2) as self.bar,
        ):  # fmt: skip
            for rows, cols in places:
                self.region(rows, cols)
            self.lists.write(bytes(32))  # read, never used, by vectors that start at the last axes
            for file in (self.lists, self.values, self.counts):
                file.flush()
                os.fsync(file.fileno())
        arrays = {
            name: torch.cat(parts, dim=1 if name in ("mean", "variance") else 0) for name, parts in self.arrays.items()
        }
        (self.folder / "counts.tmp").rename(self.folder / "counts.bin")
        if self.seen == self.stored:
            (self.folder / "counts.bin").unlink()
        else:
            arrays["repeats"] = _encode(self.folder / "counts.bin")
        safetensors.torch.save_file(arrays, self.folder / "cells.safetensors")
        self.write_faiss(arrays)
        files = sorted(p for p in self.folder.iterdir() if p.is_file())
        record = {
            "format": FORMAT,
            "patch_size": self.k,
            **{name: self.meta[name] for name in ("bank", *OPTIONS)},
            "axes": self.rank,
            "windows": self.seen,
            "stored": self.stored,
            "subsampled_images": len(self.members) if len(self.members) < len(self.bank) else None,
            "regions": self.regions,
            "build_seconds": round(time.monotonic() - start, 1),
            "files": {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files},
        }
        _write_json(self.folder / "meta.json", record)

    def region(self, rows: range, cols: range) -> None:
        per_image = len(rows) * len(cols)
        windows = per_image * len(self.members)
        # Principal axes, of a sample.
        axes, centre, variances = self.principal_axes(rows, cols)
        if not self.regions:
            tails = variances.flip(0).cumsum(0).flip(0)
            enough = int((tails > TAIL * tails[0]).sum())
            self.rank = min(
                len(variances), self.meta["rank"] or min(enough, MOST_AXES + round(0.32 * max(0, self.k - 5) ** 2))
            )
            # Rows of whole eight bytes keep the ids behind them aligned.
            self.rank = min(-(-self.rank // 4) * 4, -(-len(variances) // 4) * 4)
        spare = self.rank - len(variances)
        if spare > 0:
            axes, variances = functional.pad(axes, (0, spare)), functional.pad(variances, (0, spare))
        tails = functional.pad(variances.flip(0).cumsum(0).flip(0), (0, 1))[: self.rank + 1]
        axes = axes[:, : self.rank].contiguous()

        # Features, to a file that is gone afterwards; equal windows of one label by their hash.
        scratch = self.folder / "features.tmp"
        hashes = np.empty(windows, np.int64)
        with open(scratch, "wb") as file:
            at = 0
            for images, members in self.chunks(per_image):
                file.write(self.project(images, rows, cols, axes, centre).half().numpy().tobytes())
                part = self.hash(images, rows, cols, members)
                hashes[at : at + len(part)] = part
                at += len(part)
                self.bar.update(len(part))
        features = np.memmap(scratch, np.float16, "r", shape=(windows, self.rank))
        first, counts = _distinct(hashes)
        del hashes

        # Cells.
        distinct = windows if first is None else len(first)
        wanted = 16 * math.sqrt(distinct) if not self.regions else 4 * math.sqrt(distinct)
        if self.meta["cells"] is not None and not self.regions:
            wanted = self.meta["cells"]
        parents = max(1, round(min(MOST_CELLS, wanted, distinct) / SIBLINGS))
        cells = parents * SIBLINGS
        chosen = np.arange(windows) if first is None else first
        cell = self.assign(features, chosen, parents)

        # In cells, and in random order inside.
        key = torch.from_numpy(cell).long() << 32
        key += torch.randint(1 << 32, key.shape, generator=self.generator)
        order = torch.argsort(key).numpy()
        del key
        sizes = np.bincount(cell, minlength=cells)
        region_values = self.centre_values(rows, cols)
        member = self.members.numpy()
        repeats = np.ones(distinct, np.int64) if counts is None else counts
        mean, variance = torch.zeros(self.rank, cells), torch.zeros(self.rank, cells)
        moments, stand_for = torch.zeros(cells, 2 * self.channels), torch.ones(cells)
        offsets = np.zeros(cells, np.int64)
        ends = np.cumsum(sizes)
        for some in _runs(sizes, CELLS_AT_ONCE):
            begin = ends[some[0]] - sizes[some[0]]
            places = order[begin : ends[some[-1]]]
            rows_of = chosen[places]
            block, value, repeat = features[rows_of], region_values[rows_of], repeats[places]
            ids = (member[rows_of // per_image] * per_image + rows_of % per_image).astype(np.int64)
            for c in some:
                inside = slice(ends[c] - sizes[c] - begin, ends[c] - begin)
                offsets[c] = self.lists.tell()
                self.lists.write(block[inside].tobytes())
                self.lists.write(ids[inside].tobytes())
            self.values.write(value.tobytes())
            self.counts.write(repeat.astype(np.int32).tobytes())
            # Moments of the cells that hold something, as sums over runs of rows.
            full = some[sizes[some] > 0]
            if len(full) == 0:
                continue
            at = ends[full] - sizes[full] - begin
            weight = repeat.astype(np.float32)[:, None]
            f, v = block.astype(np.float32), to_values(torch.from_numpy(value)).numpy()
            columns = np.concatenate([weight, f * weight, f * f * weight, v * weight, v * v * weight], 1)
            sums = torch.from_numpy(np.add.reduceat(columns, at, axis=0))
            of = torch.from_numpy(full)
            total, sums = sums[:, :1], sums[:, 1:] / sums[:, :1]
            mean[:, of] = sums[:, : self.rank].T
            variance[:, of] = (sums[:, self.rank : 2 * self.rank].T - mean[:, of].square()).clamp(min=0)
            moments[of] = sums[:, 2 * self.rank :]
            stand_for[of] = total[:, 0] / torch.from_numpy(sizes[full])
        starts = self.stored + np.concatenate([[0], np.cumsum(sizes)[:-1]])
        for name, array in {
            "sizes": torch.from_numpy(sizes.astype(np.int64)),
            "offsets": torch.from_numpy(offsets),
            "starts": torch.from_numpy(starts.astype(np.int64)),
            "mean": mean.half(),
            "variance": variance.half(),
            "moments": moments,
            "stand_for": stand_for,
            "axes": axes[None],
            "centre": centre[None],
            "tail": tails[None].contiguous(),
        }.items():
            self.arrays.setdefault(name, []).append(array)
        self.regions.append(
            {"rows": [rows.start, rows.stop], "cols": [cols.start, cols.stop], "first_cell": self.cells, "cells": cells}
        )
        self.cells += cells
        self.stored += distinct
        self.seen += windows
        del features
        scratch.unlink()

    def chunks(self, per_image: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as they are stored, some at a time, with their numbers."""
        cost = per_image * (4 * max(self.rank, 16) + 32) + 16 * self.channels * self.height * self.width
        step = max(1, CHUNK_BYTES // cost)
        for start in range(0, len(self.members), step):
            members = self.members[start : start + step]
            raw = self.bank.images[members if self.bank.indices is None else self.bank.indices[members]]
            yield raw, members

    def patches(self, raw: Tensor, rows: range, cols: range) -> Tensor:
        """The part of some images that windows at rows x cols reach, zeros beyond the border: [n, C, h, w]."""
        r = self.k // 2
        images = to_values(raw)
        padded = functional.pad(images, (r, r, r, r))
        return padded[:, :, rows.start : rows.stop + 2 * r, cols.start : cols.stop + 2 * r].contiguous()

    def principal_axes(self, rows: range, cols: range) -> tuple[Tensor, Tensor, Tensor]:
        per_image = len(rows) * len(cols)
        want = 100_000 if not self.regions else 25_000
        count = min(len(self.members), max(1, 4 * want // per_image))
        some = torch.randperm(len(self.members), generator=self.generator)[:count]
        members = self.members[some.sort().values]
        raw = self.bank.images[members if self.bank.indices is None else self.bank.indices[members]]
        samples = []
        for start in range(0, count, 64):
            unfolded = functional.unfold(self.patches(raw[start : start + 64], rows, cols), self.k)
            flat = unfolded.permute(0, 2, 1).flatten(0, 1)
            samples.append(flat[torch.randperm(len(flat), generator=self.generator)[: -(-want * 64 // count)]])
        sample = torch.cat(samples)
        centre = sample.mean(0)
        centred = sample - centre
        variances, axes = torch.linalg.eigh((centred.T @ centred / max(1, len(sample) - 1)).double())
        return axes.flip(1).float(), centre, variances.flip(0).clamp(min=0).float()

    def project(self, raw: Tensor, rows: range, cols: range, axes: Tensor, centre: Tensor) -> Tensor:
        filters = axes.T.reshape(self.rank, self.channels, self.k, self.k)
        features = functional.conv2d(self.patches(raw, rows, cols), filters, bias=-(centre @ axes))
        return features.permute(0, 2, 3, 1).flatten(0, 2)

    def hash(self, raw: Tensor, rows: range, cols: range, members: Tensor) -> np.ndarray:
        """A 64-bit polynomial of every window's pixels and its image's label: equal for equal windows."""
        r = self.k // 2
        pixels = raw.numpy() if raw.dtype == torch.uint8 else raw.numpy().view(np.int32)
        padded = np.pad(pixels.astype(np.uint64), ((0, 0), (0, 0), (r, r), (r, r)), constant_values=256)
        padded = padded[:, :, rows.start : rows.stop + 2 * r, cols.start : cols.stop + 2 * r]
        across, down, between = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
        line = np.zeros((*padded.shape[:3], len(cols)), np.uint64)
        for j in range(self.k):
            line = line * across + padded[:, :, :, j : j + len(cols)]
        block = np.zeros((*padded.shape[:2], len(rows), len(cols)), np.uint64)
        for i in range(self.k):
            block = block * down + line[:, :, i : i + len(rows)]
        total = np.zeros((len(raw), len(rows), len(cols)), np.uint64)
        for c in range(self.channels):
            total = total * between + block[:, c]
        total ^= total >> np.uint64(29)
        if self.bank.labels is not None:
            total = total * across + self.bank.labels[members].numpy().astype(np.uint64)[:, None, None]
        return total.ravel().view(np.int64)

    def centre_values(self, rows: range, cols: range) -> np.ndarray:
        raw = self.bank.images if self.bank.indices is None else self.bank.images[self.bank.indices]
        part = raw[self.members][:, :, rows.start : rows.stop, cols.start : cols.stop]
        return np.ascontiguousarray(part.permute(0, 2, 3, 1).reshape(-1, self.channels).numpy())

    def assign(self, features: np.ndarray, chosen: np.ndarray, parents: int) -> np.ndarray:
        """The cell of every chosen window, by k-means in three levels: groups of parents, parents, their cells."""
        rng = np.random.default_rng(self.meta["seed"])
        count = min(len(chosen), TRAINING_PER_CELL * SIBLINGS * parents)
        sample = features[np.sort(chosen[rng.choice(len(chosen), count, replace=False)])].astype(np.float32)
        tree = _Tree(sample, parents, self.meta["seed"])
        cell = np.empty(len(chosen), np.int32)
        step = 1 << 20
        for start in range(0, len(chosen), step):
            block = features[chosen[start : start + step]].astype(np.float32)
            cell[start : start + step] = tree.cells(block)
        return cell

    def write_faiss(self, arrays: dict[str, Tensor]) -> None:
        """The coarse quantizer of the interior's cells, as a FAISS inverted file whose lists lie in lists.bin."""
        faiss = _faiss()
        cells = self.regions[0]["cells"]
        quantizer = faiss.IndexHNSWFlat(self.rank, 16) if cells > HNSW_FROM else faiss.IndexFlatL2(self.rank)
        quantizer.add(arrays["mean"][:, :cells].T.float().contiguous().numpy())
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, self.rank, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2, False
        )
        index.is_trained = True
        index.ntotal = int(arrays["sizes"][:cells].sum())
        try:
            faiss.write_index(index, str(self.folder / "cells.faiss"))
        except RuntimeError as error:
            raise OSError(f"{self.folder / 'cells.faiss'}: {' '.join(str(error).split())}") from None


class _Tree:
    """Centroids of parents, reached through groups of them, and of the SIBLINGS cells of each parent."""

    def __init__(self, sample: np.ndarray, parents: int, seed: int):
        self.rank = sample.shape[1]
        groups = max(1, round(math.sqrt(parents))) if parents > 64 else 1
        self.top = _kmeans(sample, groups, seed)
        groups = len(self.top)
        members = _split(_nearest(self.top, sample), groups)
        # Parents in proportion to a group's windows.
        share = np.maximum(1, [parents * len(rows) // len(sample) for rows in members])
        while share.sum() > parents:
            share[np.argmax(share)] -= 1
        share[np.argmax([len(rows) for rows in members])] += parents - share.sum()

        def parents_of(g: int) -> np.ndarray:
            inside = sample[members[g]]
            return _kmeans(inside, share[g], seed) if len(inside) else self.top[g : g + 1]

        found = _in_threads(parents_of, range(groups))
        owners = np.concatenate([np.full(len(part), g) for g, part in enumerate(found)])
        self.parents = np.concatenate(found)
        # A window looks among the parents of its own group and of the nearest neighbouring groups.
        near = _flat(self.top).search(self.top, min(groups, 4))[1]
        self.candidates = [np.flatnonzero(np.isin(owners, near[g])) for g in range(groups)]
        self.searchers = [_flat(self.parents[candidates]) for candidates in self.candidates]
        of_parent = _split(self.parent(sample), len(self.parents))

        def children_of(p: int) -> np.ndarray:
            inside = sample[of_parent[p]]
            return _kmeans(inside, SIBLINGS, seed) if len(inside) else self.parents[p : p + 1]

        self.children = _in_threads(children_of, range(len(self.parents)))

    def parent(self, block: np.ndarray) -> np.ndarray:
        parent = np.empty(len(block), np.int32)
        of_group = _split(_nearest(self.top, block), len(self.top))

        def place(g: int) -> None:
            rows = of_group[g]
            if len(rows):
                parent[rows] = self.candidates[g][self.searchers[g].search(block[rows], 1)[1][:, 0]]

        _in_threads(place, range(len(self.top)))
        return parent

    def cells(self, block: np.ndarray) -> np.ndarray:
        cell = np.empty(len(block), np.int32)
        of_parent = _split(self.parent(block), len(self.parents))

        def place(p: int) -> None:
            rows, centres = of_parent[p], self.children[p]
            if len(rows):
                nearest = (block[rows] @ centres.T - 0.5 * np.square(centres).sum(1)).argmax(1)
                cell[rows] = p * SIBLINGS + nearest

        _in_threads(place, range(len(self.parents)))
        return cell


def _runs(sizes: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Runs of neighbouring cells with at most so many windows, or one cell."""
    start = 0
    while start < len(sizes):
        fits = int(np.searchsorted(np.cumsum(sizes[start : start + most]), most, side="right"))
        yield np.arange(start, start + max(1, fits))
        start += max(1, fits)


def _split(number: np.ndarray, count: int) -> list[np.ndarray]:
    """Where each of 0 .. count - 1 stands in `number`."""
    order = np.argsort(number, kind="stable")
    return np.split(order, np.searchsorted(number[order], np.arange(1, count)))


def _distinct(hashes: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Where each distinct window first occurs and how often, or None where hardly any repeats."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.empty(len(ordered), bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    if len(starts) == len(hashes):
        return None, None
    counts = np.diff(np.append(starts, len(hashes)))
    first = order[starts]
    by_place = np.argsort(first)
    return first[by_place], counts[by_place]


def _encode(path: Path) -> Tensor:
    """Turns a file of counts into 16-bit numbers of a table: n windows have fewer than sqrt(2 n) different counts."""
    counts = np.fromfile(path, np.int32)
    table, codes = np.unique(counts, return_inverse=True)
    if len(table) > 1 << 16:
        raise ValueError(f"bank: {len(table):,} different numbers of repeats, an index takes 65,536")
    with open(path, "wb") as file:
        file.write(codes.astype(np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return torch.from_numpy(table.astype(np.float32))


def _in_threads(work: Callable[[int], Any], items: Iterable[int]) -> list[Any]:
    """`work` of each item, side by side; FAISS itself then keeps to one thread, for its own do badly on small tasks."""

    def single(item: int) -> Any:
        _faiss().omp_set_num_threads(1)
        return work(item)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(single, items))


def _kmeans(points: np.ndarray, cells: int, seed: int) -> np.ndarray:
    if cells >= len(points):
        return points.copy()
    if cells == 1:
        return points.mean(0, keepdims=True)
    means = _faiss().Kmeans(
        points.shape[1], cells, niter=8, seed=seed + 1, min_points_per_centroid=1, max_points_per_centroid=10**9
    )
    means.train(np.ascontiguousarray(points))
    return means.centroids


def _flat(points: np.ndarray) -> Any:
    index = _faiss().IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(points))
    return index


def _nearest(centroids: np.ndarray, points: np.ndarray) -> np.ndarray:
    return _flat(centroids).search(np.ascontiguousarray(points), 1)[1][:, 0]


def _search(index: Any, queries: np.ndarray, count: int, probed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest of each query in the `probed` nearest cells: [Q, count] squared distances and ids."""
    index.nprobe = probed
    if probed < index.nlist:
        return index.search(queries, count)
    # Every cell, and truly so: a graph of centroids may leave some unreached.
    step = max(1, CHUNK_BYTES // (16 * probed))
    parts = []
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        cells = np.broadcast_to(np.arange(probed), (len(block), probed))
        parts.append(index.search_preassigned(block, count, np.ascontiguousarray(cells), np.zeros(cells.shape, "f4")))
    distances, ids = zip(*parts, strict=True)
    return np.concatenate(distances), np.concatenate(ids)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise ImportError('PatchIndex needs FAISS: pip install "patchscore[cpu]", or "patchscore[gpu]"') from None
    except ImportError as error:
        raise ImportError(f"PatchIndex needs FAISS, which is installed but cannot be loaded: {error}") from None
    return faiss


def _read_meta(path: Path, bank: PatchBank) -> dict[str, Any]:
    try:
        meta = _read_json(path / "meta.json")
    except FileNotFoundError:
        raise ValueError(f"{path}: no index here; PatchIndex.build or `patchscore index` makes one") from None
    if meta.get("format") != FORMAT:
        sizes = ",".join(map(str, meta.get("patch_sizes") or ["3"]))
        raise ValueError(
            f"{path}: index format {meta.get('format')!r}, this version reads {FORMAT}; build it again elsewhere: "
            f"patchscore index SOURCE --patch-sizes {sizes} --out {path}-{FORMAT}"
        )
    if meta["bank"] != bank.fingerprint:
        raise ValueError(f"{path}: the index of another bank: {_difference(meta, bank)}")
    return meta


def _read_json(path: Path) -> dict[str, Any]:
    """A meta.json, its hash checked; one of another format as it is."""
    try:
        record = parse_json(path.read_bytes())
        return unsealed(record) if record["format"] == FORMAT else record
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged, not the description of an index") from None


def _difference(meta: dict[str, Any], bank: PatchBank) -> str:
    """How the bank of an index differs from this one, and what usually makes them differ."""
    (n, shape), (images, own) = (meta.get("images"), meta.get("shape")), (len(bank), list(bank.shape))
    if shape != own:
        then, now = (" x ".join(map(str, part)) for part in (shape or ["?"], own))
        return f"it has images of {then}, this bank of {now}; --size and --channels must be as they were"
    if n != images:
        return f"it has {n} images, this bank {images}; --limit and --skip-bad must be as they were"
    return f"as many images of the same shape, {n}, but other pixels or labels"


def _check_part(folder: Path, k: int, meta: dict[str, Any], verify: bool) -> None:
    """ValueError unless the folder of a patch size is this index's own and its files are as they were written."""
    try:
        part = _read_json(folder / "meta.json")
    except OSError:
        raise ValueError(f"{folder / 'meta.json'}: missing; build the index again") from None
    for name, expected in {"format": FORMAT, "patch_size": k, **{n: meta[n] for n in ("bank", *OPTIONS)}}.items():
        if part.get(name) != expected:
            what = "bank" if name == "bank" else f"{name} {part.get(name)!r} instead of {expected!r}"
            raise ValueError(f"{folder}: part of an index of another {what}; build the index again")
    files = part["files"]
    for name, expected in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else -1
        if size != expected["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {expected['bytes']}"
            raise ValueError(f"{file}: {found}; build the index again")
        if (verify or size <= VERIFIED_AT_OPEN) and _sha256(file) != expected["sha256"]:
            raise ValueError(f"{file}: was changed since it was written; build the index again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a meta.json with its hash."""
    write_atomically(path, (json.dumps(sealed(content), indent=1) + "\n").encode())
