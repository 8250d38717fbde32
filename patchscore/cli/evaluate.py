"""`patchscore evaluate`: how a run's samples relate to the training images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..fidelity import (
    DENSITY_K,
    MEMORY_LIMIT,
    PATCH_SIZES,
    PRECISION_K,
    Fidelity,
    evaluate_samples,
    inception_features,
)
from ..files import check_writable, load_npy
from ..runs import is_run, samples_have_range, samples_of
from .networks import named_function
from .options import Source, device_named, device_option, numbers, one_line_errors, say, seconds_since, source_options


@click.command(
    epilog="""
\b
Examples:
  patchscore evaluate out/ fashion-mnist
  patchscore evaluate photos/ more/ --size 32 --patch-sizes 3,5,11 --out photos.json
  patchscore evaluate out/ fashion-mnist --features inception
  patchscore evaluate out/ fashion-mnist --features mymodels:features
"""
)
@click.argument("run")
@source_options
@click.option(
    "--features",
    default="pixels",
    show_default=True,
    metavar="pixels|inception|MODULE:FUNCTION",
    help="What distances compare: pixels; features of the Inception network, which also give FID (torch-fidelity "
    "and its weights must be installed); or those of a function of images [B, C, H, W] in [-1, 1].",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File of Inception's weights, if not where torch-fidelity keeps it.",
)
@click.option(
    "--sample-features", type=click.Path(path_type=Path), help="Instead of --features: a .npy file [n, d] for RUN ..."
)
@click.option("--reference-features", type=click.Path(path_type=Path), help="... and one [N, d] for SOURCE.")
@click.option(
    "--precision-k",
    type=int,
    default=PRECISION_K,
    show_default=True,
    help="Neighbour that sets the radii of precision and recall.",
)
@click.option(
    "--density-k",
    type=int,
    default=DENSITY_K,
    show_default=True,
    help="Neighbour that sets the radii of density and coverage.",
)
@click.option(
    "--patch-sizes",
    default=",".join(map(str, PATCH_SIZES)),
    show_default=True,
    metavar="K,K,...",
    help="Sides of the patches whose distributions are compared.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the patches drawn.")
@click.option(
    "--memory-limit",
    type=float,
    default=MEMORY_LIMIT / 2**30,
    show_default=True,
    help="Memory for blocks of distances, in GiB.",
)
@device_option()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="JSON file to write.  [default: evaluation.json in RUN's folder, or in the current one where RUN is no run]",
)
@one_line_errors
def evaluate(
    run: str,
    source: Source,
    features: str,
    weights: Path | None,
    sample_features: Path | None,
    reference_features: Path | None,
    precision_k: int,
    density_k: int,
    patch_sizes: str,
    seed: int,
    memory_limit: float,
    device: str,
    out: Path | None,
) -> None:
    """Compare the samples of RUN with the training images in SOURCE: fidelity, diversity, memorisation.

    RUN is the folder of a run, or any source of images, read as SOURCE is. Prints precision, recall, density, coverage,
    the sliced Wasserstein distance between patches (in pixel values) and the fraction of memorised samples, and writes
    them as JSON with the nearest training image of every sample.
    """
    where = device_named(device)
    if not 0 < memory_limit < 2**20:
        raise ValueError(f"--memory-limit: got {memory_limit:g}, takes a positive number of GiB")
    if (sample_features is None) != (reference_features is None):
        given, missing = "--sample-features", "--reference-features"
        if sample_features is None:
            given, missing = missing, given
        raise ValueError(f"{given}: takes {missing} beside it")
    sizes = numbers("--patch-sizes", patch_sizes, "numbers with commas between them") if patch_sizes else []
    of_run = is_run(Path(run))
    out = out or (Path(run) if of_run else Path()) / "evaluation.json"
    check_writable(out.parent)
    chosen = _features(features, weights, sample_features, reference_features, where)
    bank = source.open()
    made: Any = samples_of(Path(run)) if of_run else source.at(run).open()
    if of_run and samples_have_range(Path(run)):
        raise ValueError(f"{run}: a run of latents; takes pictures of them, {Path(run) / 'samples'} of --decode")
    say(f"{len(made)} samples from {run}", f"{bank!r} from {source.source}")
    start = time.perf_counter()
    found = evaluate_samples(
        made,
        bank,
        chosen,
        precision_k=precision_k,
        density_k=density_k,
        patch_sizes=tuple(sizes),
        seed=seed,
        memory_limit=int(memory_limit * 2**30),
        device=where,
    )
    _tell(found)
    found.save(out, run=run, source=source.source, fingerprint=bank.fingerprint)
    say(f"{seconds_since(start)}: see {out}")


def _features(
    features: str, weights: Path | None, of_samples: Path | None, of_reference: Path | None, device: str
) -> Any:
    """What `evaluate_samples` takes."""
    if weights is not None and features != "inception":
        raise ValueError("--weights: takes --features inception")
    if of_samples is not None and of_reference is not None:
        if features != "pixels":
            raise ValueError(f"--features: got {features}, but the features are given")
        return _array("--sample-features", of_samples), _array("--reference-features", of_reference)
    if features == "pixels":
        return None
    if features == "inception":
        return inception_features(weights, device)
    return named_function("--features", features, "pixels, inception or module:function")


def _array(option: str, path: Path) -> np.ndarray:
    try:
        found = load_npy(path, mapped=True)
        if found.dtype.kind not in "fiu":
            raise ValueError("holds no numbers")
    except ValueError as error:
        raise ValueError(f"{option}: {path}: {error}") from None
    return found


def _tell(found: Fidelity) -> None:
    """The table: a figure in a line, with what to hold it against."""
    rows = [
        ("precision", found.precision, "fraction of samples among the training images; 1 is best"),
        ("recall", found.recall, "fraction of training images among the samples; 1 is best"),
        ("density", found.density, "1 for samples of the same distribution"),
        ("coverage", found.coverage, "fraction of training images with a sample near; 1 is best"),
    ]
    if found.frechet is not None:
        rows.append(("frechet distance", found.frechet, "of the features; FID, if they are Inception's"))
    for k, value in found.patch_wasserstein.items():
        between = found.patch_wasserstein_reference[k]
        rows.append((f"patches {k} x {k}", value, f"sliced Wasserstein; {between:.4f} between halves of SOURCE"))
    rows += [
        ("memorised", found.memorised, "fraction of samples a third as far from one training image as from any other"),
        ("nearer than usual", found.nearer_than_usual, "0.5 for new images of the same distribution"),
    ]
    for name, value, words in rows:
        say(f"{name:<18} {value:9.4f}  {words}")
