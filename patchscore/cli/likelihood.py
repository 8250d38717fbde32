"""`patchscore likelihood`: bits per dimension of images under a machine of the training images."""

from __future__ import annotations

import time
from pathlib import Path

import click

from .. import checks
from ..bank import PatchBank
from ..denoiser import Denoiser
from ..files import check_writable, write_record
from ..gaussian import GaussianScore
from ..likelihood import LogLikelihood, log_likelihood
from ..sampling import DEFAULT_BATCH
from ..scales import PUBLISHED
from .options import (
    Computing,
    Source,
    computing_options,
    described,
    one_line_errors,
    say,
    seconds_since,
    source_options,
)
from .sample import PADDING_MODE, TABLE, Which


@click.command(
    epilog="""
\b
Examples:
  patchscore likelihood fashion-mnist held-out/ -n 16 --sigma-min 0.1
  patchscore likelihood cifar.npz test.npz --machine ideal --labels own --out bits.json
  patchscore likelihood photos/ more/ --size 32 --machine gaussian --tolerance 0.001

Published tables, made for 32 x 32 images: """
    + ", ".join(PUBLISHED)
)
@source_options
@click.argument("images")
@click.option("-n", "count", type=int, default=16, show_default=True, help="Use the first N of IMAGES.")
@click.option(
    "--machine",
    type=click.Choice(["els", "ls", "ideal", "gaussian"]),
    default="els",
    show_default=True,
    help="Equivariant local, local, ideal, or the Gaussian with the mean and covariance of the training images.",
)
@PADDING_MODE
@TABLE
@click.option(
    "--labels",
    type=click.Choice(["none", "own"]),
    default="none",
    show_default=True,
    help="own: each image under the training images of its class, which has the same name or number in both sources.",
)
@click.option(
    "--sigma-min", type=float, default=0.002, show_default=True, help="Noise level at which the density is taken."
)
@click.option(
    "--sigma-max", type=float, default=80.0, show_default=True, help="Noise level at which images are white noise."
)
@click.option(
    "--steps", type=int, default=50, show_default=True, help="Heun steps; half as many again estimate the error."
)
@click.option("--tolerance", type=float, help="Double the steps until the error is below this, in nats a dimension.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise that spreads 8-bit values.")
@click.option("--batch-size", type=int, default=DEFAULT_BATCH, show_default=True, help="Images evaluated together.")
@computing_options()
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file with the figures of every image.")
@one_line_errors
def likelihood(
    source: Source,
    images: str,
    count: int,
    machine: str,
    padding_mode: str,
    table: str,
    labels: str,
    sigma_min: float,
    sigma_max: float,
    steps: int,
    tolerance: float | None,
    seed: int,
    batch_size: int,
    computing: Computing,
    out: Path | None,
) -> None:
    """Compute the bits per dimension of IMAGES under the probability flow of a machine over SOURCE.

    IMAGES is a source as SOURCE is, read at the same size and with the same channels. 8-bit values are spread
    uniformly over their width. Densities of a bank of images depend on --sigma-min: at 0.002 an image that is not in
    the bank is far from all spikes of that width.
    """
    count = checks.integer("-n", count, at_least=1)
    device, memory = computing.where, computing.bytes
    if out is not None:
        check_writable(out.parent)

    bank = source.open()
    held_out = PatchBank.open(images, size=source.size, channels=bank.shape[0])
    if held_out.shape != bank.shape:
        got, takes = (" x ".join(map(str, shape)) for shape in (held_out.shape, bank.shape))
        raise ValueError(f"IMAGES: got {got} images, SOURCE has {takes}; --size resizes both")
    count = min(count, len(held_out))
    x = held_out.images if held_out.indices is None else held_out.images[held_out.indices]
    conditions = own_labels(held_out, bank, count) if labels == "own" else None

    denoiser: Denoiser
    if machine == "gaussian":
        denoiser, words = GaussianScore(bank, memory_limit=memory), f"GaussianScore on {device}"
    else:
        which = Which(machine, padding_mode, table, None, None, None)
        which.check(computing)
        sizes, _ = which.sizes(source, bank, None, labels, computing, Path("out") if out is None else out.parent)
        built = which.build(bank, sizes, None, seed, computing)
        denoiser, words = built, described(built, device)
    say(f"{bank!r} from {source.source}", words)
    start = time.perf_counter()
    found = log_likelihood(
        denoiser,
        x[:count].to(device),
        conditions,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        steps=steps,
        tolerance=tolerance,
        seed=seed,
        batch_size=batch_size,
    )
    bits = found.bits_per_dim
    spread = f" +- {(bits.std() / len(bits) ** 0.5).item():.2g} (standard error)" if len(bits) > 1 else ""
    say(
        f"{bits.mean().item():.4g} bits a dimension{spread}, {found.nats.mean().item():.6g} nats an image, over "
        f"{len(bits)} images from {images}",
        f"integration error to {found.bits_per_dim_error.max().item():.2g} bits a dimension, {found.steps} steps, "
        f"sigma {sigma_min:g} to {sigma_max:g}, {seconds_since(start)}",
    )
    if out is not None:
        write_record(out, "likelihood", 1, figures(found, machine))


def own_labels(images: PatchBank, bank: PatchBank, count: int) -> list[int | str]:
    """The class of each image as the bank knows it: by name where both have names, else by number."""
    if images.labels is None:
        raise ValueError("--labels: got own, but IMAGES have no labels")
    numbers = [int(label) for label in images.labels[:count]]
    names = images.class_names
    return [names[number] for number in numbers] if names and bank.class_names else list(numbers)


def figures(found: LogLikelihood, machine: str) -> dict[str, object]:
    """What --out holds."""
    return {
        "machine": machine,
        "sigma_min": found.sigma_min,
        "sigma_max": found.sigma_max,
        "steps": found.steps,
        "nats": found.nats.tolist(),
        "nats_error": found.error.tolist(),
        "bits_per_dim": found.bits_per_dim.tolist(),
        "bits_per_dim_error": found.bits_per_dim_error.tolist(),
    }
