"""`patchscore bank`: any source as a file that is mapped instead of read."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..bank import PatchBank
from ..files import check_writable
from .options import Source, bytes_in_words, one_line_errors, say, seconds_since, source_options


@click.command(
    epilog="""
\b
Examples:
  patchscore bank photos/ --size 32 --out photos.npy
  patchscore bank fashion-mnist --limit 1000 --out fashion.npy
  patchscore info fashion.npy

Repeat the command to resume after an interruption.
"""
)
@source_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, such as bank.npy.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@one_line_errors
def bank(source: Source, out: Path, overwrite: bool) -> None:
    """Write the images of SOURCE to a .npy file that is memory-mapped, not loaded, with their labels beside it."""
    source.check_not_around(out)
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    options = {name: value for name, value in source.reading.items() if name != "value_range"}
    try:
        written = PatchBank.convert(**options, out=out, overwrite=overwrite)
    except KeyboardInterrupt:
        say("", f"patchscore: stopped; the same command goes on from what is in {out}.partial", err=True)
        sys.exit(130)
    say(f"{written!r} from {source.source}")
    say(f"written in {seconds_since(start)}: {out}, {bytes_in_words(written.images.nbytes)}")
