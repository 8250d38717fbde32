"""`patchscore synthesize`: an image of any size from one or a few exemplars."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from ..bank import PatchBank
from ..files import check_writable
from ..mixed import MixedBank, open_bank
from ..pooled import SYMMETRIES
from ..sampling import SAMPLERS
from ..synthesis import SynthesisLevel, synthesize
from .options import Computing, computing_options, one_line_errors, say, size_named


@click.command(
    name="synthesize",
    epilog="""
\b
Examples:
  patchscore synthesize photo.jpg --size 128x192
  patchscore synthesize photo.jpg --size 128x128 --tile --out tile
  patchscore synthesize photo.jpg --size 96x192 --start source --out wide

The same command again continues an interrupted synthesis with the next level.""",
)
@click.argument("source")
@click.option("--size", required=True, metavar="HEIGHTxWIDTH", help="Size of the image, say 1024x1024.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Convert the exemplars to gray (1) or RGB (3).")
@click.option(
    "--levels", type=int, help="Scales of the pyramid.  [default: as many as leave room for two patches a side]"
)
@click.option(
    "--patch-size",
    "patch_sizes",
    default="9",
    show_default=True,
    metavar="K|K,K,...",
    help="Odd patch size; or one for each level, coarsest first.",
)
@click.option("--steps", default="10", show_default=True, metavar="N|N,N,...", help="Denoising steps of a level.")
@click.option(
    "--strength",
    default="0.3",
    show_default=True,
    metavar="S|S,S,...",
    help="Noise added where a level begins: the lower, the more of the coarser level's structure remains.",
)
@click.option(
    "--sigma-max", type=float, default=5.0, show_default=True, help="Noise that the coarsest level begins with."
)
@click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="ddpm", show_default=True)
@click.option("--tile", is_flag=True, help="Make an image that wraps around, to be tiled.")
@click.option(
    "--start", metavar="FILE|source", help="Begin with this image, resized; source: with the exemplar itself."
)
@click.option("--keep", type=click.Path(path_type=Path), help="A picture, white where the pixels of --start stay.")
@click.option(
    "--labels",
    metavar="LABEL|FILE",
    help="Class of the exemplars to use, or a picture whose gray value is the class number to use at each pixel.",
)
@click.option("--symmetry", type=click.Choice(list(SYMMETRIES)), help="Use mirrored or rotated exemplars as well.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--tolerance", type=float, help="Sum over a sample of the windows, with at most this rms error of a pixel."
)
@click.option(
    "--source-map", is_flag=True, help="Also write which exemplar pixel made each pixel: source.npy, source.png."
)
@computing_options()
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a synthesis with other settings in the same folder.")
@one_line_errors
def synthesize_command(
    source: str,
    size: str,
    channels: str | None,
    levels: int | None,
    patch_sizes: str,
    steps: str,
    strength: str,
    start: str | None,
    keep: Path | None,
    labels: str | None,
    computing: Computing,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Make an image of any size whose patches, at every scale, are those of SOURCE.

    SOURCE is an image file, or whatever else holds exemplars (class subfolders become labels). The output
    folder gets image.png, image.npy (float32), a picture and an array of every level, and synthesis.json.
    """
    wanted = size_named("--size", size)
    check_writable(out)
    bank = open_bank(source, channels=None if channels is None else int(channels))
    say(f"{bank!r} from {source}")

    def done(level: SynthesisLevel) -> None:
        height, width = level.image.shape[1:]
        error = f", rms error up to {level.stderr:.2g}" if level.stderr else ""
        say(f"level {level.index + 1} of {level.of}: {height} x {width}, {level.engine}, {level.seconds:.1f} s{error}")

    try:
        synthesize(
            bank,
            wanted,
            levels=levels,
            patch_size=_listed("--patch-size", patch_sizes, int),
            steps=_listed("--steps", steps, int),
            strength=_listed("--strength", strength, float),
            start=start if start in (None, "source") else PatchBank.open(start, channels=bank.shape[0]),
            keep=None if keep is None else torch.from_numpy(_gray(keep)) > 127,
            labels=_labels(labels, bank),
            engine=computing.engine,
            memory_limit=computing.bytes,
            device=computing.where,
            out=out,
            overwrite=overwrite,
            callback=done,
            **options,
        )
    except KeyboardInterrupt:
        say("", f"patchscore: stopped; the levels that are done are in {out}, the same command continues", err=True)
        sys.exit(130)
    say(f"see {out / 'image.png'}")


def _listed(option: str, text: str, kind: type) -> Any:
    """One number, or one for each level between commas."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}, takes a number or one for each level, with commas") from None
    return values[0] if len(values) == 1 else values


def _gray(path: Path) -> np.ndarray:
    """[height, width] of a picture's gray values, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image if image.mode in ("L", "P") else image.convert("L")).copy()


def _labels(labels: str | None, bank: PatchBank | MixedBank) -> Any:
    """A label, or the map in a file of that name."""
    if labels is None or not Path(labels).is_file():
        return labels
    return torch.from_numpy(_gray(Path(labels)).astype(np.int64))
