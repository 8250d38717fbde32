"""Indexes in shards: a folder of indexes, each of a part of one bank, for any number of ranks up to that of shards."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import checks
from ..bank import PatchBank
from ..index import PatchIndex
from .parts import shard
from .ranks import Ranks, join

SHARD = re.compile(r"shard-(\d{3})-of-(\d{3})")


def build_shards(
    bank: PatchBank,
    patch_sizes: int | Sequence[int],
    path: str | os.PathLike[str],
    shards: int | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> list[PatchIndex]:
    """Indexes parts of a bank, each in a folder of its own below `path`; every rank builds some, and returns those.

    Args:
        bank: the training images, the same on every rank.
        patch_sizes: as of `PatchIndex.build`, and so are `options`.
        path: a folder to make, that all ranks see, or one that an interrupted build left.
        shards: how many; None: as many as ranks. No more ranks than this can hold the bank together.
        ranks: who builds; None: all of this launch.

    Raises:
        ValueError: as of `PatchIndex.build`; a folder with another number of shards.
    """
    ranks = join() if ranks is None else ranks
    count = checks.integer("shards", ranks.size if shards is None else shards, at_least=1, at_most=999)
    path = Path(path)
    if (path / "meta.json").exists():
        raise ValueError(f"{path}: holds an index in one piece; take another folder")
    if (found := shards_in(path)) not in (0, count):
        raise ValueError(f"{path}: holds an index in {found} shards, asked for {count}; take another folder")
    return [
        PatchIndex.build(shard(bank, Ranks(number, count)), patch_sizes, _folder(path, number, count), **options)
        for number in range(ranks.rank, count, ranks.size)
    ]


def open_shards(path: str | os.PathLike[str], bank: PatchBank, ranks: Ranks | None = None) -> list[PatchIndex]:
    """This rank's shards of an index that `build_shards` made; the bank of each is its part.

        machines = [ps.EquivariantLocalScore(i.bank, 5, index=i, budget=0.01) for i in open_shards("cifar.index", bank)]
        machine = ps.Sharded(ps.Pooled(machines))

    Args:
        path: the folder.
        bank: the training images that it was made of.
        ranks: among whom to divide the shards; None: all of this launch. One alone gets all.

    Raises:
        ValueError: no shards, fewer than ranks, or one that is missing or damaged, which is named.
    """
    ranks = join() if ranks is None else ranks
    path = Path(path)
    count = shards_in(path)
    if not count:
        raise ValueError(f"{path}: no index in shards here; `patchscore index --shards` makes one")
    if count < ranks.size:
        raise ValueError(f"{path}: an index in {count} shards for {ranks.size} ranks, takes one or more for each")
    return [
        PatchIndex.open(_folder(path, number, count), shard(bank, Ranks(number, count)))
        for number in range(ranks.rank, count, ranks.size)
    ]


def shards_in(path: Path) -> int:
    """The number of shards of the index in a folder; 0 if it has none."""
    names = [SHARD.fullmatch(place.name) for place in path.iterdir()] if path.is_dir() else []
    return max((int(name[2]) for name in names if name), default=0)


def _folder(path: Path, number: int, count: int) -> Path:
    return path / f"shard-{number:03d}-of-{count:03d}"
