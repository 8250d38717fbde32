"""`patchscore index`: the windows of a bank in cells, on disk."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

from ..distributed import Team, build_shards, join
from ..files import check_writable
from ..index import PatchIndex
from .options import VALUE_RANGE, Computing, Source, named_table, numbers, one_line_errors, say, source_options


@click.command(
    epilog="""
\b
Examples:
  patchscore index fashion-mnist --patch-sizes 3,5,7 --out fashion.index
  patchscore index cifar.npz --table cifar10-resnet-zeros --out cifar.index
  patchscore sample cifar.npz --index cifar.index --budget 0.01
  patchscore index latents.safetensors --value-range data --patch-sizes 3,5 --out latents.index

The same command again continues an interrupted build and keeps the sizes that are there.
"""
)
@source_options
@click.option("--patch-sizes", metavar="K,K,...", help="The odd patch sizes to index.")
@click.option("--table", metavar="NAME|FILE", help="Instead: every size of a table that `sample` takes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--padding-mode",
    type=click.Choice(["zeros", "circular"]),
    default="zeros",
    show_default=True,
    help="Noted in the index; one serves both.",
)
@click.option("--rank", type=int, help="Principal axes to keep of a window.  [default: 32, or all]")
@click.option("--cells", type=int, help="Cells of similar windows.  [default: 16 sqrt(windows)]")
@click.option("--max-windows", type=int, help="Index at most this many windows per size, from randomly chosen images.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of training samples and of the order in cells."
)
@click.option(
    "--store",
    type=click.Choice(["small", "all", "none"]),
    default="small",
    show_default=True,
    help="Windows whose bytes the index holds, too: up to 147 bytes (k = 7 in colour), all, or none. Estimates are the "
    "same; stored windows are read two to three times as fast and take 20 times the disk.",
)
@click.option("--memory-limit", type=float, default=2.0, show_default=True, help="Working memory in GiB.")
@click.option(
    "--shards",
    type=int,
    help="Divide SOURCE into this many parts and index each in its own folder below --out; `sample` opens them on as "
    "many ranks or fewer.  [default: under torchrun one per rank, else no division]",
)
@VALUE_RANGE
@click.option("--verify", is_flag=True, help="Verify the checksum of every file after the build.")
@one_line_errors
def index(
    source: Source,
    patch_sizes: str | None,
    table: str | None,
    out: Path,
    padding_mode: str,
    rank: int | None,
    cells: int | None,
    max_windows: int | None,
    seed: int,
    store: str,
    memory_limit: float,
    shards: int | None,
    verify: bool,
) -> None:
    """Index the windows of SOURCE, so that `sample --index` evaluates only a small fraction of them."""
    if (patch_sizes is None) == (table is None):
        raise ValueError("--patch-sizes, --table: takes one of the two")
    source.check_not_around(out)
    limit = Computing("auto", "auto", memory_limit).bytes
    wanted = [] if patch_sizes is None else numbers("--patch-sizes", patch_sizes, "odd numbers separated by commas")
    check_writable(out)
    bank = source.open()
    if table is not None:
        wanted = sorted(set(named_table(table).sizes))
        fit = [k for k in wanted if k <= min(bank.shape[1:])]
        if fit and fit != wanted:
            listed = ", ".join(str(k) for k in wanted if k not in fit)
            warnings.warn(f"patch sizes {listed} are wider than the images: served exactly, not indexed", stacklevel=2)
            wanted = fit
    say(f"{bank!r} from {source.source}")
    start, team = time.perf_counter(), Team(join())
    options: dict[str, Any] = {"padding_mode": padding_mode, "rank": rank, "cells": cells, "max_windows": max_windows}
    options |= {"seed": seed, "memory_limit": limit, "store": store}
    try:
        if shards is None and team.ranks.size == 1:
            parts = [PatchIndex.build(bank, wanted, out, **options)]
        else:
            with team.working():
                parts = build_shards(bank, wanted, out, shards, team.ranks, **options)
                team.end(lambda steps: None)
    except KeyboardInterrupt:
        say("", f"patchscore: stopped; the same command keeps what is whole in {out} and goes on", err=True)
        sys.exit(130)
    seconds = time.perf_counter() - start
    if verify:
        for part_index in parts:
            PatchIndex.open(part_index.path, part_index.bank, verify=True)
    if not parts:
        return
    built = parts[0]
    if built.bank.part is not None:
        say(f"{built.bank.part.of} shards of equal shares of every class, such as {built.path.name}:")
    say("", f"{'patch size':<12}{'windows':<16}{'axes':<8}{'cells':<10}bytes a window")
    for k in built.patch_sizes:
        part = built.at(k)
        total = sum(file["bytes"] for file in part.meta["files"].values())
        counted = f"{k:<12}{part.meta['windows']:<16,}{part.rank:<8}{part.meta['cell_count']:<10,}"
        say(f"{counted}{total / part.meta['windows']:.0f}")
        if part.meta["subsampled_images"]:
            say(f"            of {part.meta['subsampled_images']:,} images taken at random, for --max-windows")
    say("", f"indexed in {seconds:.1f} s: {out}{', every file checked' if verify else ''}")
