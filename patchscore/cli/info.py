"""`patchscore info`: what a source holds and which engines there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click
import torch

from .. import engines
from ..machines import EquivariantLocalScore
from ..runs import described_run, is_run
from .options import Source, bytes_in_words, device_named, device_option, one_line_errors, say, source_options

PATCH_SIZES = (1, 3, 5, 7, 9, 11, 13, 15, 17)


@click.command(
    epilog="""
\b
Examples:
  patchscore info fashion-mnist
  patchscore info photos/ --size 32
"""
)
@source_options
@device_option("The device that engines are looked up for.")
@one_line_errors
def info(source: Source, device: str) -> None:
    """Show what SOURCE holds, and which engines this machine has.

    For the folder of a run, it also shows how the images were made; they are described as training images too.
    """
    device = device_named(device)
    folder = Path(source.source)
    if is_run(folder):
        say(*(f"{name:<13}{words}" for name, words in described_run(folder)))
        if not any(path.exists() for path in (folder / "samples", folder / "samples.zip")):
            return  # nothing yet, or of release 0.1.0, whose samples lie among pictures
        if any((folder / "samples").glob("*.safetensors")):
            return  # samples.npy has the same, and latents are no pictures
        say("")
    bank = source.open()
    image_channels, height, width = bank.shape
    say(f"{bank!r} from {source.source}")
    say(f"{'mapped file' if bank.mapped else 'memory':<13}{bytes_in_words(bank.images.nbytes)}")
    say(f"fingerprint  {bank.fingerprint}")
    if bank.labels is not None:
        names = bank.class_names or ()
        counts = [(c, len(bank.select(c))) for c in bank.classes]
        listed = ", ".join(f"{c} {names[c]} ({n})" if 0 <= c < len(names) else f"{c} ({n})" for c, n in counts[:50])
        say(f"labels       {listed}{' ...' if len(counts) > 50 else ''}")

    say("", "             windows that    (pixel, window) pairs     their size as patches")
    say("patch size   lie inside      an image and step         in float32 (never stored)")
    for k in PATCH_SIZES:
        if k <= min(height, width):
            interior = (height - k + 1) * (width - k + 1) * len(bank)
            pairs = EquivariantLocalScore(bank, k).competition(k).pairs_per_image * len(bank)
            say(f"{k:<12} {interior:<15,} {pairs:<25.3g} {bytes_in_words(4 * image_channels * k * k * interior)}")

    say("", f"engines on {device}")
    for engine, reason, _ in engines.candidates(engines.EXACT, "auto", torch.device(device), torch.float32):
        say(f"  {engine.name:<10} {reason or 'ready'}")
    faiss = "" if importlib.util.find_spec("faiss") else "; FAISS is missing, pip install faiss-cpu"
    say(f"  {'pruned':<10} with an index, which `patchscore index` makes{faiss}")
