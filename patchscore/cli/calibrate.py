"""`patchscore calibrate`: patch sizes by noise level, against a network or by held-out denoising error."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import click

from ..bank import PatchBank
from ..calibrate import MACHINES, METRICS, PATCH_SIZES, SUMMARIES
from ..calibrate import calibrate as run_calibration
from ..denoiser import Labels
from ..draw import charts
from ..files import check_writable, locked
from ..heldout import BLOCK, HeldOutErrors, held_out_errors
from ..heldout import MACHINES as MACHINES_FITTED
from ..noise import get_schedule
from ..runs.folder import ERRORS, TABLE
from ..scales import ScaleTable
from .networks import NO_CALLING, Calling, labels_of_network, network_options, opened_network
from .options import (
    Computing,
    Sampling,
    Source,
    numbers,
    one_line_errors,
    say,
    seconds_since,
    write_chart,
)


@click.command(
    epilog="""
\b
Examples:
  patchscore calibrate photos/ --size 32 --monotone --out sizes
  patchscore calibrate fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --out calibrated
  patchscore calibrate photos/ mymodels:denoiser --size 32 --patch-sizes 3,5,7,9 --metric l2
  patchscore sample fashion-mnist --table calibrated/table.json

The same command again continues an interrupted calibration, and a larger -n adds trajectories, or images, to a finished
one.
"""
)
@network_options(required=False, steps="Levels of the noise schedule; the table has an entry for each.")
@click.option(
    "-n", "count", type=int, default=20, show_default=True, help="Trajectories of the network, or held-out images."
)
@click.option(
    "--first",
    type=int,
    default=10_000,
    show_default=True,
    help="Number of the first trajectory; compare starts at 0, so the two do not overlap.",
)
@click.option(
    "--patch-sizes",
    default="auto",
    show_default=True,
    metavar="auto|K,K,...",
    help=f"Candidate sizes, odd; auto is {PATCH_SIZES[0]} to {PATCH_SIZES[-1]}, as far as they fit, and without a "
    "network up to the image's side.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="cosine",
    show_default=True,
    help="Measure of agreement between two scores.",
)
@click.option(
    "--summary", type=click.Choice(SUMMARIES), default="median", show_default=True, help="Summary over trajectories."
)
@click.option(
    "--machine",
    type=click.Choice(MACHINES),
    default="els",
    show_default=True,
    help="Machine to fit sizes for: windows from every position, from the same one or, for circular networks, from "
    "every position of images that wrap.",
)
@click.option(
    "--held-out",
    metavar="SOURCE",
    help="Without a network: images to denoise that are not in SOURCE.  [default: images of SOURCE, denoised by "
    "the others]",
)
@click.option(
    "--block",
    type=int,
    default=BLOCK,
    show_default=True,
    help="Without a network: side of the block of pixels that is denoised in each image; 0 takes the whole image.",
)
@click.option("--monotone", is_flag=True, help="Without a network: let no size fall as the noise grows.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="calibrated", show_default=True, help="Folder to write."
)
@one_line_errors
def calibrate(
    source: Source,
    network: str | None,
    padding_mode: str,
    calling: Calling,
    sampling: Sampling,
    computing: Computing,
    count: int,
    first: int,
    patch_sizes: str,
    metric: str,
    machine: str,
    summary: str,
    held_out: str | None,
    block: int,
    monotone: bool,
    out: Path,
) -> None:
    """Find the patch size for each noise level, from a trained network or from the images alone.

    SOURCE is the training images, as for sample. NETWORK is what was trained on them: a file that
    examples/train_cnn.py wrote; diffusers:PATH, a folder or hub id of a UNet2DModel and its scheduler; a TorchScript
    file, which is a program that is run; or module:function, a function that is called with the PatchBank and returns a
    denoiser (patchscore.adapters.network makes one of any network). The size chosen for a level is the one whose score
    agrees best with the network's. Without NETWORK it is the one that denoises held-out images of SOURCE best; --labels
    all denoises each by its own class. Writes table.json, for --table; calibration.json or held-out.json; and
    calibration.png.
    """
    sampling.check()
    check_writable(out)
    if network is not None and (held_out is not None or monotone or block != BLOCK):
        raise ValueError("--held-out, --block, --monotone: take no NETWORK")
    bank = source.open()
    if network is None:
        if calling != Calling():
            raise ValueError(NO_CALLING)
        _fit(
            source, bank, padding_mode, sampling, computing, count, patch_sizes, machine, held_out, block, monotone, out
        )
        return
    denoiser, padding_mode = opened_network(network, bank, padding_mode, calling)
    sizes = _patch_sizes(patch_sizes) or [k for k in PATCH_SIZES if k <= min(bank.shape[1:])] or [1]
    say(f"{bank!r} from {source.source}", f"{denoiser!r}, padding {padding_mode}")
    labels: Labels = labels_of_network(sampling.labels, bank, denoiser)
    with _writing(out):
        start = time.perf_counter()
        found = run_calibration(
            denoiser,
            bank,
            sizes,
            sampling.schedule,
            sampling.steps,
            count,
            padding_mode,
            metric=metric,
            machine=machine,
            sampler=sampling.sampler,
            labels=labels,
            seed=sampling.seed,
            first=first,
            batch_size=sampling.batch_size,
            device=computing.where,
            engine=computing.engine,
            memory_limit=computing.bytes,
            resume=out / "calibration.json",
        )
        table = found.table(summary, f"{Path(network).stem}, {summary} of {count}")
        _tell(out, table, sizes)
        write_chart(out / "calibration.png", lambda: charts.calibration_curves({"calibrated": found}, {}))
    say(f"{seconds_since(start)}: see {out / TABLE} and {out / 'calibration.png'}")


def _fit(
    source: Source,
    bank: PatchBank,
    padding_mode: str,
    sampling: Sampling,
    computing: Computing,
    count: int,
    patch_sizes: str,
    machine: str,
    held_out: str | None,
    block: int,
    monotone: bool,
    out: Path,
) -> None:
    """The sizes with the least held-out error."""
    if machine not in MACHINES_FITTED:
        raise ValueError(f"--machine: got {machine}, without NETWORK takes {' or '.join(MACHINES_FITTED)}")
    if sampling.labels not in ("auto", "none", "all"):
        raise ValueError(f"--labels: got {sampling.labels}, without NETWORK takes none or all")
    if held_out is not None:
        others = source.at(held_out).open()
        say(f"{bank!r} from {source.source}", f"held out: {others!r} from {held_out}")
    else:
        others = None
        say(f"{bank!r} from {source.source}")
    with _writing(out):
        start = time.perf_counter()
        found = held_out_errors(
            bank,
            _patch_sizes(patch_sizes),
            get_schedule(sampling.schedule, sampling.steps).ratios[:-1].tolist(),
            images=count,
            block=block or None,
            padding_mode="zeros" if padding_mode == "auto" else padding_mode,
            machine=machine,
            conditional=sampling.labels == "all",
            held_out=others,
            seed=sampling.seed,
            engine=computing.engine,
            memory_limit=computing.bytes,
            device=computing.where,
            resume=out / ERRORS,
        )
        table = ScaleTable.of_errors(found, monotone, f"fitted, {found.errors.shape[1]} images held out")
        _tell(out, table, found.patch_sizes, found)
        write_chart(out / "calibration.png", lambda: charts.held_out_sizes({"fitted": (found, table)}, {}))
    say(f"{seconds_since(start)}: see {out / TABLE} and {out / 'calibration.png'}")


def _writing(out: Path) -> AbstractContextManager[None]:
    """The folder, made where it is absent, and its lock."""
    out.mkdir(parents=True, exist_ok=True)
    return locked(out, f"{out}: another process is writing this folder; wait for it, or take another")


def _tell(out: Path, table: ScaleTable, sizes: Sequence[int], errors: HeldOutErrors | None = None) -> None:
    """Writes the table and prints it; a warning where the largest size won, as a larger one might be better still."""
    table.save(out / TABLE)
    say("noise " + " ".join(f"{sigma:5.2g}" for sigma in table.sigmas))
    say("size  " + " ".join(f"{k:5}" for k in table.sizes))
    if errors is not None:
        intervals = errors.intervals()
        say("from  " + " ".join(f"{low:5}" for low, _ in intervals))
        say("to    " + " ".join(f"{high:5}" for _, high in intervals) + "  95% interval over images")
        say("next  " + " ".join(f"{k or '-':>5}" for k in errors.runner_up) + "  second least error")
    if max(sizes) in table.sizes and len(sizes) > 1:
        warnings.warn(f"--patch-sizes: {max(sizes)}, the largest, won somewhere; offer larger ones", stacklevel=2)


def _patch_sizes(patch_sizes: str) -> list[int] | None:
    if patch_sizes == "auto":
        return None
    return numbers("--patch-sizes", patch_sizes, "odd numbers with commas between them")
