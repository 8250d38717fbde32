"""`patchscore calibrate` and `compare`: a network and the theory side by side."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from pathlib import Path

import click
import torch

from ..adapters.network import from_network
from ..bank import PatchBank
from ..calibrate import METRICS, PATCH_SIZES, SUMMARIES
from ..calibrate import calibrate as run_calibration
from ..denoiser import Denoiser
from ..draw import charts
from ..draw.images import pairs, png
from ..evaluate import baselines as known_machines
from ..evaluate import compare as run_comparison
from ..files import check_writable, locked, write_atomically
from ..machines import EquivariantLocalScore
from ..networks import load_network
from .options import (
    Command,
    Computing,
    Source,
    Walk,
    computing_options,
    labels_named,
    numbers,
    one_line_errors,
    say,
    scale_table,
    seconds_since,
    source_options,
    walk_options,
    write_chart,
)

THEORY_LABELS = click.option(
    "--labels",
    default="auto",
    show_default=True,
    metavar="auto|none|all|A,B,...",
    help="Classes that the images take in turn; auto is all that there are, if the network takes labels.",
)


def _network_options(command: Command) -> Command:
    """What `calibrate` and `compare` share."""
    for decorate in (
        computing_options(),
        walk_options(THEORY_LABELS, None, "Images at a time.", "Levels of the noise schedule."),
        click.option(
            "--padding-mode",
            type=click.Choice(["auto", "zeros", "circular"]),
            default="auto",
            show_default=True,
            help="Of the machine; auto is the network's own, zeros where it does not say.",
        ),
        click.argument("network"),
        source_options,
    ):
        command = decorate(command)
    return command


@click.command(
    epilog="""
\b
Examples:
  patchscore calibrate fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --out calibrated
  patchscore calibrate photos/ mymodels:denoiser --size 32 --patch-sizes 3,5,7,9 --metric l2
  patchscore sample fashion-mnist --table calibrated/table.json

The same command again continues an interrupted calibration, and a larger -n adds walks to a finished one.
"""
)
@_network_options
@click.option("-n", "count", type=int, default=20, show_default=True, help="How many walks of the network.")
@click.option("--first", type=int, default=10_000, show_default=True, help="Number of the first; compare starts at 0.")
@click.option(
    "--patch-sizes",
    default="auto",
    show_default=True,
    metavar="auto|K,K,...",
    help=f"The sizes that compete, odd; auto is {PATCH_SIZES[0]} to {PATCH_SIZES[-1]}, as far as they fit.",
)
@click.option("--metric", type=click.Choice(METRICS), default="cosine", show_default=True, help="How scores agree.")
@click.option("--summary", type=click.Choice(SUMMARIES), default="median", show_default=True, help="Of the choices.")
@click.option("--out", type=click.Path(path_type=Path), default="calibrated", show_default=True, help="Folder.")
@one_line_errors
def calibrate(
    source: Source,
    network: str,
    padding_mode: str,
    walk: Walk,
    computing: Computing,
    count: int,
    first: int,
    patch_sizes: str,
    metric: str,
    summary: str,
    out: Path,
) -> None:
    """Find the patch size at each noise level whose score agrees best with a network's.

    SOURCE is the network's training images, as for sample. NETWORK is a file that examples/train_cnn.py wrote, or
    module:function, a function that is called with the PatchBank and returns a denoiser (patchscore.adapters.network
    makes one of any network). Writes table.json, for --table, calibration.json and calibration.png.
    """
    walk.check()
    check_writable(out)
    bank = source.open()
    denoiser, padding_mode = _network(network, bank, padding_mode)
    sizes = _patch_sizes(patch_sizes, bank)
    say(f"{bank!r} from {source.source}", f"{denoiser!r}, padding {padding_mode}")
    labels = _labels_of_network(walk.labels, bank, denoiser)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"{out}: another process is writing this folder; wait for it, or take another"):
        start = time.perf_counter()
        found = run_calibration(
            denoiser,
            bank,
            sizes,
            walk.schedule,
            walk.steps,
            count,
            padding_mode,
            metric=metric,
            sampler=walk.sampler,
            labels=labels,
            seed=walk.seed,
            first=first,
            batch_size=walk.batch_size,
            device=computing.where,
            engine=computing.engine,
            memory_limit=computing.bytes,
            resume=out / "calibration.json",
        )
        table = found.table(summary, f"{Path(network).stem}, {summary} of {count}")
        table.save(out / "table.json")
        say("noise " + " ".join(f"{sigma:5.2g}" for sigma in table.sigmas))
        say("size  " + " ".join(f"{k:5}" for k in table.sizes))
        if max(sizes) in table.sizes and len(sizes) > 1:
            warnings.warn(f"--patch-sizes: {max(sizes)}, the largest, won somewhere; offer larger ones", stacklevel=2)
        write_chart(out / "calibration.png", lambda: charts.calibration_curves({"calibrated": found}, {}))
    say(f"{seconds_since(start)}: see {out / 'table.json'} and {out / 'calibration.png'}")


@click.command(
    epilog="""
\b
Examples:
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors -n 10
  patchscore compare fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors --table calibrated/table.json
  patchscore compare photos/ mymodels:denoiser --size 32 --table 7 --no-baselines
"""
)
@_network_options
@click.option("-n", "count", type=int, default=20, show_default=True, help="How many images.")
@click.option(
    "--table",
    default="auto",
    show_default=True,
    metavar="NAME|FILE|K",
    help="Patch sizes, as for sample; the table that calibrate wrote is the one to give.",
)
@click.option("--baselines/--no-baselines", default=True, help="Whether the other machines are held beside it.")
@click.option("--out", type=click.Path(path_type=Path), default="compared", show_default=True, help="Folder.")
@one_line_errors
def compare(
    source: Source,
    network: str,
    padding_mode: str,
    walk: Walk,
    computing: Computing,
    count: int,
    table: str,
    baselines: bool,
    out: Path,
) -> None:
    """Hold a network's images against what the theory makes of the same noise.

    SOURCE is the network's training images and NETWORK a file or module:function, as for calibrate. Writes
    comparison.json, pairs.png (the images under each other) and scatter.png.
    """
    walk.check()
    check_writable(out)
    bank = source.open()
    denoiser, padding_mode = _network(network, bank, padding_mode)
    sizes = scale_table(table, bank, padding_mode)
    memory = computing.bytes
    own = f"els-{padding_mode}"
    machines: dict[str, Denoiser] = {own: EquivariantLocalScore(bank, sizes, padding_mode, computing.engine, memory)}
    if baselines:
        known = known_machines(bank, sizes, engine=computing.engine, memory_limit=memory)
        machines |= {name: machine for name, machine in known.items() if name != own}
    say(f"{bank!r} from {source.source}", f"{denoiser!r}, padding {padding_mode}, patch sizes {sizes.name}")
    labels = _labels_of_network(walk.labels, bank, denoiser)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"{out}: another process is writing this folder; wait for it, or take another"):
        start = time.perf_counter()
        found = run_comparison(
            denoiser,
            machines,
            count,
            walk.steps,
            walk.schedule,
            walk.sampler,
            labels,
            walk.seed,
            batch_size=walk.batch_size,
            device=computing.where,
        )
        found.save(out / "comparison.json")
        say(f"{'machine':<14} {'r^2':>6}  {'95% interval':<15} {'correlation':>11} {'mse':>8}")
        for row in found.rows():
            low, high = row["r2_interval"]
            interval = f"{low:.3f} to {high:.3f}"
            figures = (
                f"{row['r2_median']:6.3f}  {interval:<15} {row['correlation_median']:11.3f} {row['mse_median']:8.4f}"
            )
            say(f"{row['machine']:<14} {figures}")
        shown = {"network": found.images[:10], **{name: of.images[:10] for name, of in found.machines.items()}}
        write_atomically(out / "pairs.png", png(pairs(shown)))
        if baselines:
            write_chart(out / "scatter.png", lambda: charts.agreement(found, own, "ideal"))
    say(f"{seconds_since(start)}: see {out / 'comparison.json'} and {out / 'pairs.png'}")


def _network(network: str, bank: PatchBank, padding_mode: str) -> tuple[Denoiser, str]:
    """A denoiser from a checkpoint or from module:function, and the padding of the machine to hold beside it."""
    if Path(network).is_file():
        trained, _ = load_network(network)
        own = trained.config["padding_mode"]
        return from_network(trained, bank.shape), own if padding_mode == "auto" else padding_mode
    module, colon, function = network.partition(":")
    if not (colon and module and function):
        raise ValueError(f"NETWORK: got {network!r}, takes a file that examples/train_cnn.py wrote or module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"NETWORK: {network}: {error}") from None
    denoiser = build(bank)
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"NETWORK: {network} returned {type(denoiser).__name__}, takes one that returns a denoiser")
    return denoiser, "zeros" if padding_mode == "auto" else padding_mode


def _patch_sizes(patch_sizes: str, bank: PatchBank) -> list[int]:
    if patch_sizes == "auto":
        return [k for k in PATCH_SIZES if k <= min(bank.shape[1:])] or [1]
    return numbers("--patch-sizes", patch_sizes, "odd numbers with commas between them")


def _labels_of_network(labels: str, bank: PatchBank, network: Denoiser) -> list[int] | None:
    """auto asks the network: every class of the bank if it takes one, else none."""
    if labels != "auto":
        return labels_named(labels, bank)
    if not bank.classes:
        return None
    try:
        network.denoise(torch.zeros(1, *network.shape), 1.0, [bank.classes[0]])
    except Exception as error:  # whatever a network of the user's raises when it is given a label
        say(f"labels none: the network takes none ({type(error).__name__}: {error})")
        return None
    return list(bank.classes)
