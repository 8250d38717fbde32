"""The command line: `patchscore sample`, `index`, `info`, `calibrate`, `compare`, `explain` and `bench`.

A thin skin: it turns words into the library's objects, prints what happened, and turns every error a user can cause
into one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from . import checks, engines, plots
from .adapters.network import from_network
from .bank import PatchBank
from .calibrate import METRICS, PATCH_SIZES, SUMMARIES
from .calibrate import calibrate as run_calibration
from .denoiser import DEFAULT_MEMORY_LIMIT, Denoiser, ScoreMachine
from .evaluate import baselines as known_machines
from .evaluate import compare as run_comparison
from .explain import Walk, explain_samples, mosaic_rows
from .files import check_writable, locked, write_atomically
from .index import OPTIONS, PatchIndex
from .machines import EquivariantLocalScore, IdealScore, LocalScore
from .networks import load_network
from .noise import SCHEDULES, get_schedule
from .pages import explanation_page
from .runs import MOST_IMAGES, Run, reopen, report_memorisation, warn_of_others
from .sampling import DEFAULT_BATCH, SAMPLERS
from .scales import PUBLISHED, ScaleTable
from .version import __version__

INFO_PATCH_SIZES = (1, 3, 5, 7, 9, 11, 13, 15, 17)


class OneLine(click.ClickException):
    """An error the user can mend: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"patchscore: error: {self.message}", err=True, file=file)


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
            click.echo(f"patchscore: warning: {message}", err=True)

        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            try:
                command(*args, **kwargs)
            except (ValueError, TypeError, OSError, ImportError, OverflowError) as error:
                raise OneLine(" ".join(str(error).split())) from None

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="patchscore")
def main() -> None:
    """New images from nothing but training patches: the exact score of a diffusion model that has no network."""


def _source_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both commands take: where the images are and how to read them."""
    for decorate in (
        click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read, and say how many."),
        click.option(
            "--limit", type=int, help="Use at most so many images, as equal a share of each class as there is."
        ),
        click.option("--channels", type=click.Choice(["1", "3"]), help="Convert to gray (1) or RGB (3)."),
        click.option("--size", type=int, help="Resize to SIZE x SIZE; what is wider or taller is cropped."),
        click.argument("source"),
    ):
        command = decorate(command)
    return command


def _open(source: str, size: int | None, channels: str | None, limit: int | None, skip_bad: bool) -> PatchBank:
    return PatchBank.open(
        source, size=size, channels=None if channels is None else int(channels), limit=limit, skip_bad=skip_bad
    )


@main.command(
    epilog="""
\b
Examples:
  patchscore sample fashion-mnist --labels all
  patchscore sample photos/ --size 32 -n 64 --out faces
  patchscore sample cifar.npz --machine els --padding-mode circular --sampler heun
  patchscore sample photos/ --size 48 --table 7 --labels cats,dogs --seed 3
  patchscore sample cifar.npz --index cifar.index --budget 0.01

The same command again continues an interrupted run, and a larger -n adds to a finished one.

Published tables, made for 32 x 32 images: """
    + ", ".join(PUBLISHED)
)
@_source_options
@click.option("-n", "count", type=int, default=16, show_default=True, help="How many images.")
@click.option(
    "--machine",
    type=click.Choice(["els", "ls", "ideal"]),
    default="els",
    show_default=True,
    help="Which windows compete: from everywhere (equivariant local), at the same place (local), or whole images.",
)
@click.option(
    "--padding-mode",
    type=click.Choice(["zeros", "circular"]),
    default="zeros",
    show_default=True,
    help="How els treats borders.",
)
@click.option(
    "--table",
    default="auto",
    show_default=True,
    metavar="NAME|FILE|K",
    help="Patch size by noise level: a published table (the list is below), a file that ScaleTable.save wrote, or one "
    "size. auto is the published ResNet table for gray or colour images.",
)
@click.option(
    "--steps",
    type=int,
    default=20,
    show_default=True,
    help="Levels of the noise schedule; the last of the cosine schedule's is the clean image.",
)
@click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="cosine", show_default=True)
@click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="ddim", show_default=True)
@click.option(
    "--labels",
    default="none",
    show_default=True,
    metavar="none|all|A,B,...",
    help="Classes, by number or name, that the images take in turn; all of them; or none: every image competes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on the seed and on i alone.")
@click.option("--batch-size", type=int, default=DEFAULT_BATCH, show_default=True, help="Images denoised together.")
@click.option("--engine", default="auto", show_default=True, metavar="|".join(["auto", *engines.NAMES, "pruned"]))
@click.option(
    "--index",
    "index_path",
    type=click.Path(path_type=Path),
    help="An index that `patchscore index` made of SOURCE: a share of the windows is looked at, not all.",
)
@click.option("--budget", type=float, help="With --index: the share of (pixel, window) pairs to evaluate, say 0.01.")
@click.option(
    "--tolerance",
    type=float,
    help="With --index, instead: the rms error that a denoised pixel may have. On CUDA also without: the largest.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto takes cuda if there is."
)
@click.option(
    "--memory-limit", type=float, default=DEFAULT_MEMORY_LIMIT / 2**30, show_default=True, help="Working memory in GiB."
)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a run with other settings in the same folder.")
@_one_line_errors
def sample(
    source: str,
    size: int | None,
    channels: str | None,
    limit: int | None,
    skip_bad: bool,
    count: int,
    machine: str,
    padding_mode: str,
    table: str,
    steps: int,
    schedule: str,
    sampler: str,
    labels: str,
    seed: int,
    batch_size: int,
    engine: str,
    index_path: Path | None,
    budget: float | None,
    tolerance: float | None,
    device: str,
    memory_limit: float,
    out: Path,
    overwrite: bool,
) -> None:
    """Make new images from the training images in SOURCE.

    SOURCE is a folder of images (class subfolders become labels), a .npy, .npz or IDX file, or fashion-mnist (built
    in). The output folder gets samples/ with one PNG an image, samples.npy with the same as float32, grid.png of the
    first hundred, trajectory.png, batches.jsonl (labels, hashes, nearest training images) and run.json (all settings).
    """
    checks.integer("-n", count, at_least=1, at_most=MOST_IMAGES)
    check_writable(out)
    checks.integer("--batch-size", batch_size, at_least=1)
    get_schedule(schedule, steps)
    if not 0 < memory_limit < 2**30:
        raise ValueError(f"--memory-limit: got {memory_limit:g}, takes a positive number of GiB")
    device = _device(device)
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out: {out} lies in the folder of training images")
    if index_path is None and budget is not None:
        raise ValueError("--budget: takes an --index; `patchscore index` makes one")
    rounds = (
        machine == "els" and engines.chosen(engines.EXACT, "auto", torch.device(device), torch.float32).name == "fused"
    )
    if index_path is None and tolerance is not None and not rounds:
        raise ValueError("--tolerance: takes an --index (`patchscore index` makes one), or els on CUDA with Triton")
    if index_path is not None and (budget is None) == (tolerance is None):
        raise ValueError("--index: takes one of --budget and --tolerance")
    bank = _open(source, size, channels, limit, skip_bad)
    index = None if index_path is None else PatchIndex.open(index_path, bank)
    pruned = {"index": index, "budget": budget, "tolerance": tolerance, "seed": seed} if index or tolerance else {}
    denoiser = _machine(machine, bank, table, padding_mode, engine, int(memory_limit * 2**30), pruned)
    sizes = denoiser.patch_size if isinstance(denoiser.patch_size, ScaleTable) else None
    described = {
        "machine": machine,
        "padding_mode": getattr(denoiser, "padding_mode", None),
        "table": sizes and sizes.name,
        "patch_sizes": sizes and dict(zip(map(str, sizes.sigmas), sizes.sizes, strict=True)),
        "index": index and {**{name: index.meta[name] for name in OPTIONS}, "patch_sizes": index.patch_sizes},
        "budget": budget,
        "tolerance": tolerance,
    }
    noted = {
        "source": source,
        "size": size,
        "channels": channels,
        "limit": limit,
        "skip_bad": skip_bad,
        "batch_size": batch_size,
        "engine": engine,
        "index": index_path and str(index_path),
        "device": device,
        "memory_limit_gib": memory_limit,
    }
    settings = {
        "steps": steps,
        "schedule": schedule,
        "sampler": sampler,
        "labels": _labels(labels, bank),
        "seed": seed,
    }
    click.echo(f"{bank!r} from {source}")
    click.echo(_describe(denoiser, device))
    lacking = sorted(set(sizes.sizes) - set(index.patch_sizes)) if sizes and index else []
    if lacking:
        click.echo(f"not in the index, so summed exactly: patch sizes {', '.join(map(str, lacking))}")
        warnings.filterwarnings("ignore", message=".*the index has patch sizes")

    with Run(out, denoiser, settings, described, noted, overwrite) as run:
        start = time.perf_counter()
        try:
            kept = run.sample(count, batch_size, device)
        except KeyboardInterrupt:
            there = f"{sum(image < count for image in run.made)} of {count} images are in {out}"
            click.echo(f"\npatchscore: stopped; {there}, the same command continues", err=True)
            sys.exit(130)
        seconds = time.perf_counter() - start
    added = f"made {_images(count - kept)} in {seconds:.1f} s" if kept < count else "nothing left to make"
    there = f", {kept} were there" if kept else ""
    click.echo(f"{added}{there}: see {run.folder.samples} and {out / 'grid.png'}")


@main.command(
    epilog="""
\b
Examples:
  patchscore index fashion-mnist --patch-sizes 3,5,7 --out fashion.index
  patchscore index cifar.npz --table cifar10-resnet-zeros --out cifar.index
  patchscore sample cifar.npz --index cifar.index --budget 0.01

The same command again continues an interrupted build and keeps the sizes that are there.
"""
)
@_source_options
@click.option("--patch-sizes", metavar="K,K,...", help="The odd patch sizes to index.")
@click.option("--table", metavar="NAME|FILE", help="Instead: every size of a table that `sample` takes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--padding-mode",
    type=click.Choice(["zeros", "circular"]),
    default="zeros",
    show_default=True,
    help="zeros indexes the windows along edges too; circular has no use for them.",
)
@click.option("--rank", type=int, help="Principal axes to keep of a window.  [default: by the spectrum]")
@click.option("--cells", type=int, help="Cells of similar windows.  [default: 16 sqrt(windows)]")
@click.option("--max-windows", type=int, help="Index at most so many windows a size, of images taken at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of training samples and the order in cells.")
@click.option("--verify", is_flag=True, help="Check every file whole, once built.")
@_one_line_errors
def index(
    source: str,
    size: int | None,
    channels: str | None,
    limit: int | None,
    skip_bad: bool,
    patch_sizes: str | None,
    table: str | None,
    out: Path,
    padding_mode: str,
    rank: int | None,
    cells: int | None,
    max_windows: int | None,
    seed: int,
    verify: bool,
) -> None:
    """Index the windows of SOURCE, so that `sample --index` need look at a small share of them only."""
    if (patch_sizes is None) == (table is None):
        raise ValueError("--patch-sizes, --table: takes one of the two")
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out: {out} lies in the folder of training images")
    if patch_sizes is not None and not all(part.strip().isdigit() for part in patch_sizes.split(",")):
        raise ValueError(f"--patch-sizes: got {patch_sizes!r}, takes odd numbers separated by commas")
    bank = _open(source, size, channels, limit, skip_bad)
    if patch_sizes is not None:
        wanted = [int(part) for part in patch_sizes.split(",")]
    else:
        assert table is not None
        wanted = sorted(set(_scale_table(table, bank, padding_mode).sizes))
        fit = [k for k in wanted if k <= min(bank.shape[1:])]
        if fit and fit != wanted:
            listed = ", ".join(str(k) for k in wanted if k not in fit)
            warnings.warn(f"patch sizes {listed} are wider than the images: served exactly, not indexed", stacklevel=2)
            wanted = fit
    click.echo(f"{bank!r} from {source}")
    start = time.perf_counter()
    try:
        built = PatchIndex.build(bank, wanted, out, padding_mode, rank, cells, max_windows, seed)
    except KeyboardInterrupt:
        click.echo(f"\npatchscore: stopped; the same command keeps what is whole in {out} and goes on", err=True)
        sys.exit(130)
    seconds = time.perf_counter() - start
    if verify:
        PatchIndex.open(out, bank, verify=True)
    click.echo(f"\n{'patch size':<12}{'windows':<16}{'stored':<16}{'axes':<8}{'cells':<10}bytes a window")
    for k in built.patch_sizes:
        part = built.at(k)
        total = sum(file["bytes"] for file in part.meta["files"].values())
        counted = f"{k:<12}{part.meta['windows']:<16,}{part.meta['stored']:<16,}{part.rank:<8}{len(part.sizes):<10,}"
        click.echo(f"{counted}{total / part.meta['windows']:.0f}")
        if part.meta["subsampled_images"]:
            click.echo(f"            of {part.meta['subsampled_images']:,} images taken at random, for --max-windows")
    click.echo(f"\nindexed in {seconds:.1f} s: {out}{', every file checked' if verify else ''}")


@main.command(
    epilog="""
\b
Examples:
  patchscore info fashion-mnist
  patchscore info photos/ --size 32
"""
)
@_source_options
@click.option("--device", default="auto", show_default=True, help="The device that engines are looked up for.")
@_one_line_errors
def info(source: str, size: int | None, channels: str | None, limit: int | None, skip_bad: bool, device: str) -> None:
    """Say what SOURCE holds, and which engines this machine has."""
    device = _device(device)
    bank = _open(source, size, channels, limit, skip_bad)
    image_channels, height, width = bank.shape
    click.echo(f"{bank!r} from {source}")
    click.echo(f"memory       {_bytes(bank.images.nbytes)}")
    click.echo(f"fingerprint  {bank.fingerprint}")
    if bank.labels is not None:
        names = bank.class_names or ()
        counts = [(c, len(bank.select(c))) for c in bank.classes]
        listed = ", ".join(f"{c} {names[c]} ({n})" if c < len(names) else f"{c} ({n})" for c, n in counts[:50])
        click.echo(f"labels       {listed}{' ...' if len(counts) > 50 else ''}")

    click.echo("\n             windows that    (pixel, window) pairs     their size as patches")
    click.echo("patch size   lie inside      an image and step         in float32 (never stored)")
    for k in INFO_PATCH_SIZES:
        if k <= min(height, width):
            interior = (height - k + 1) * (width - k + 1) * len(bank)
            pairs = EquivariantLocalScore(bank, k).competition(k).pairs_per_image * len(bank)
            click.echo(f"{k:<12} {interior:<15,} {pairs:<25.3g} {_bytes(4 * image_channels * k * k * interior)}")

    click.echo(f"\nengines on {device}")
    for engine, reason, _ in engines.candidates(engines.EXACT, "auto", torch.device(device), torch.float32):
        click.echo(f"  {engine.name:<10} {reason or 'ready'}")
    faiss = "" if importlib.util.find_spec("faiss") else "; FAISS is missing, pip install faiss-cpu"
    click.echo(f"  {'pruned':<10} with an index, which `patchscore index` makes{faiss}")


def _machine(
    machine: str,
    bank: PatchBank,
    table: str,
    padding_mode: str,
    engine: str,
    memory_limit: int,
    pruned: dict[str, Any],
) -> ScoreMachine:
    if machine != "els" and pruned:
        raise ValueError(f"--index: got one, the {machine} machine takes none")
    if machine != "els" and padding_mode != "zeros":
        raise ValueError(f"--padding-mode: got {padding_mode}, the {machine} machine pads with zeros")
    if machine == "ideal":
        if table != "auto":
            raise ValueError(f"--table: got {table}, the ideal machine has no patch size")
        return IdealScore(bank, engine, memory_limit)
    sizes = _scale_table(table, bank, padding_mode)
    if machine == "ls":
        return LocalScore(bank, sizes, engine, memory_limit)
    return EquivariantLocalScore(bank, sizes, padding_mode, engine, memory_limit, **pruned)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _describe(machine: ScoreMachine, device: str) -> str:
    parts = [type(machine).__name__]
    if isinstance(machine, EquivariantLocalScore):
        parts.append(f"padding {machine.padding_mode}")
    if isinstance(machine.patch_size, ScaleTable):
        parts.append(f"patch sizes {machine.patch_size.name}")
    return ", ".join([*parts, f"engine {machine.engine_on(device)} on {device}"])


def _scale_table(table: str, bank: PatchBank, padding_mode: str) -> ScaleTable:
    """A table by name, file or constant; "auto" is the published ResNet table for gray or for colour images."""
    if table == "auto":
        if not 24 <= min(bank.shape[1:]) <= 48:
            size = " x ".join(map(str, bank.shape[1:]))
            warnings.warn(f"the published patch sizes were made for 32 x 32 images, these are {size}", stacklevel=2)
        gray = "fashionmnist-resnet-zeros" if padding_mode == "zeros" else "mnist-resnet-circular"
        return ScaleTable.published(gray if bank.shape[0] == 1 else f"cifar10-resnet-{padding_mode}")
    if table in PUBLISHED:
        return ScaleTable.published(table)
    if table.isdigit():
        return ScaleTable.constant(int(table))
    if Path(table).is_file():
        return ScaleTable.load(table)
    raise ValueError(f"--table: got {table!r}, takes a patch size, a file, or one of {', '.join(PUBLISHED)}")


def _labels(labels: str, bank: PatchBank) -> list[int] | None:
    if labels == "none":
        return None
    if labels == "all":
        if not bank.classes:
            raise ValueError("--labels: got all, but this source has no labels")
        return list(bank.classes)
    return bank.label_ids([label.strip() for label in labels.split(",")])


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(checks.device(device))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.3g} TiB"


# ---- Theory and network, and where pixels come from.


def _network_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `calibrate` and `compare` share."""
    for decorate in (
        click.option(
            "--memory-limit",
            type=float,
            default=DEFAULT_MEMORY_LIMIT / 2**30,
            show_default=True,
            help="Working memory in GiB.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto takes cuda if there is."),
        click.option("--engine", default="auto", show_default=True, metavar="|".join(["auto", *engines.NAMES])),
        click.option("--batch-size", type=int, default=DEFAULT_BATCH, show_default=True, help="Images at a time."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--labels",
            default="auto",
            show_default=True,
            metavar="auto|none|all|A,B,...",
            help="Classes that the images take in turn; auto is all that there are.",
        ),
        click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="ddim", show_default=True),
        click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="cosine", show_default=True),
        click.option("--steps", type=int, default=20, show_default=True, help="Levels of the noise schedule."),
        click.option(
            "--padding-mode",
            type=click.Choice(["auto", "zeros", "circular"]),
            default="auto",
            show_default=True,
            help="Of the machine; auto is the network's own, zeros where it does not say.",
        ),
        click.argument("network"),
    ):
        command = decorate(command)
    return _source_options(command)


@main.command(
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
@_one_line_errors
def calibrate(
    source: str,
    size: int | None,
    channels: str | None,
    limit: int | None,
    skip_bad: bool,
    network: str,
    padding_mode: str,
    steps: int,
    schedule: str,
    sampler: str,
    labels: str,
    seed: int,
    batch_size: int,
    engine: str,
    device: str,
    memory_limit: float,
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
    bank = _open(source, size, channels, limit, skip_bad)
    denoiser, padding_mode = _network(network, bank, padding_mode)
    sizes = _patch_sizes(patch_sizes, bank)
    click.echo(f"{bank!r} from {source}\n{denoiser!r}, padding {padding_mode}")
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = run_calibration(
        denoiser,
        bank,
        sizes,
        schedule,
        steps,
        count,
        padding_mode,
        metric=metric,
        sampler=sampler,
        labels=_all_labels(labels, bank),
        seed=seed,
        first=first,
        batch_size=batch_size,
        device=_device(device),
        engine=engine,
        memory_limit=_bytes_of(memory_limit),
        resume=out / "calibration.json",
    )
    table = found.table(summary, f"{Path(network).stem}, {summary} of {count}")
    table.save(out / "table.json")
    click.echo("noise " + " ".join(f"{sigma:5.2g}" for sigma in table.sigmas))
    click.echo("size  " + " ".join(f"{k:5}" for k in table.sizes))
    if max(sizes) in table.sizes and len(sizes) > 1:
        warnings.warn(f"--patch-sizes: {max(sizes)}, the largest, won somewhere; offer larger ones", stacklevel=2)
    _chart(out / "calibration.png", lambda charts: charts.calibration_curves({"calibrated": found}, {}))
    click.echo(f"{_seconds(start)}: see {out / 'table.json'} and {out / 'calibration.png'}")


@main.command(
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
@_one_line_errors
def compare(
    source: str,
    size: int | None,
    channels: str | None,
    limit: int | None,
    skip_bad: bool,
    network: str,
    padding_mode: str,
    steps: int,
    schedule: str,
    sampler: str,
    labels: str,
    seed: int,
    batch_size: int,
    engine: str,
    device: str,
    memory_limit: float,
    count: int,
    table: str,
    baselines: bool,
    out: Path,
) -> None:
    """Hold a network's images against what the theory makes of the same noise.

    SOURCE is the network's training images and NETWORK a file or module:function, as for calibrate. Writes
    comparison.json, pairs.png (the images under each other) and scatter.png.
    """
    bank = _open(source, size, channels, limit, skip_bad)
    denoiser, padding_mode = _network(network, bank, padding_mode)
    sizes = _scale_table(table, bank, padding_mode)
    memory = _bytes_of(memory_limit)
    own = f"els-{padding_mode}"
    machines: dict[str, Denoiser] = {own: EquivariantLocalScore(bank, sizes, padding_mode, engine, memory)}
    if baselines:
        known = known_machines(bank, sizes, engine=engine, memory_limit=memory)
        machines |= {name: machine for name, machine in known.items() if name != own}
    click.echo(f"{bank!r} from {source}\n{denoiser!r}, padding {padding_mode}, patch sizes {sizes.name}")
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = run_comparison(
        denoiser,
        machines,
        count,
        steps,
        schedule,
        sampler,
        _all_labels(labels, bank),
        seed,
        batch_size=batch_size,
        device=_device(device),
    )
    found.save(out / "comparison.json")
    click.echo(f"{'machine':<14} {'r^2':>6}  {'95% interval':<15} {'correlation':>11} {'mse':>8}")
    for row in found.rows():
        low, high = row["r2_interval"]
        interval = f"{low:.3f} to {high:.3f}"
        figures = f"{row['r2_median']:6.3f}  {interval:<15} {row['correlation_median']:11.3f} {row['mse_median']:8.4f}"
        click.echo(f"{row['machine']:<14} {figures}")
    shown = {"network": found.images[:10], **{name: of.images[:10] for name, of in found.machines.items()}}
    write_atomically(out / "pairs.png", plots.png(plots.pairs(shown)))
    if baselines:
        _chart(out / "scatter.png", lambda charts: charts.agreement(found, own, "ideal"))
    click.echo(f"{_seconds(start)}: see {out / 'comparison.json'} and {out / 'pairs.png'}")


@main.command(
    epilog="""
\b
Examples:
  patchscore explain out/ --image 3
  patchscore explain out/ --image all --levels 8
  patchscore explain out/ --source moved/cifar.npz --index moved/cifar.index
"""
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--image", "images", default="0", show_default=True, metavar="N|N,M,...|all", help="Which samples.")
@click.option("--levels", type=int, help="How many steps to explain; all, or 8 for over four images.")
@click.option("--top", type=int, default=12, show_default=True, help="How many windows a pixel to look for.")
@click.option("--source", help="Where the run's training images are now; by default where they were.")
@click.option("--index", type=click.Path(path_type=Path), help="Where the run's index is now, if it had one; likewise.")
@click.option("--device", default="auto", show_default=True, help="auto takes cuda if there is.")
@_one_line_errors
def explain(
    out: Path, images: str, levels: int | None, top: int, source: str | None, index: Path | None, device: str
) -> None:
    """Show which training patches made the samples of a run in OUT.

    Writes into that folder mosaic.png (mosaic-000000.png and so on for several images), explain.html, one page that
    needs nothing else, and memorisation.png; how near each sample is to a training image, and how many it is made of,
    goes into run.json. A run made with an index is made again with it; what explains it are all windows, not only those
    that the run looked at.
    """
    if not (out / "run.json").is_file():
        raise ValueError(f"{out / 'run.json'}: no such file; takes the folder of a run of patchscore sample")
    with locked(out, f"{out}: another process is writing this folder; wait for it"):
        _explain(out, images, levels, top, source, index, device)


def _explain(
    out: Path, images: str, levels: int | None, top: int, source: str | None, index: Path | None, device: str
) -> None:
    machine, settings, record, made = reopen(out, source, index)
    wanted = made if images == "all" else _numbers(images, made)
    schedule = get_schedule(settings["schedule"], settings["steps"])
    count = levels if levels is not None else len(schedule) if len(wanted) <= 4 else 8
    count = min(checks.integer("--levels", count, at_least=1), len(schedule))
    # The last step is always among them; the first hardly shows anything.
    chosen = [round((i + 1) * len(schedule) / count) - 1 for i in range(count)]
    click.echo(f"{machine.bank!r}\n{_describe(machine, _device(device))}")
    start = time.perf_counter()
    walks = explain_samples(machine, wanted, chosen, top, device=_device(device), **settings)
    warn_of_others(out, record, walks)
    shares = _of_all_windows(machine, record, walks)
    if shares:
        click.echo(shares)

    for walk in walks:
        name = "mosaic.png" if len(walks) == 1 else f"mosaic-{walk.number:06d}.png"
        write_atomically(out / name, plots.png(plots.mosaic(mosaic_rows(walk, machine.bank))))
    about = {
        "title": f"Which training patches made {'these images' if len(walks) > 1 else 'this image'}",
        "lines": [
            f"{type(machine).__name__} over {len(machine.bank):,} training images of {record['noted']['source']}, "
            f"seed {settings['seed']}. At each step a pixel becomes the weighted mean of the centre pixels of those "
            "training windows that look most like its own noisy window.",
            *([shares] if shares else []),
        ],
        "padding_mode": getattr(machine, "padding_mode", "zeros"),
    }
    page = explanation_page(walks, machine.bank, about)
    write_atomically(out / "explain.html", page.encode())
    report = report_memorisation(out, record, walks, machine.bank)
    samples = report["samples"]
    for entry in samples:
        if entry["image"] in wanted:
            click.echo(
                f"image {entry['image']}: nearest training image {entry['nearest']} at rms {entry['rms']:.3f}; "
                f"{entry['sources']} own pixels at noise {entry['sigma']:.2g}, as many as "
                f"{entry['effective_sources']:.1f} of equal share"
            )
    _chart(
        out / "memorisation.png",
        lambda charts: charts.memorisation(
            [entry["rms"] for entry in samples],
            [entry["effective_sources"] for entry in samples],
            report["training_images_to_nearest_other"],
        ),
    )
    each = (time.perf_counter() - start) / len(walks)
    click.echo(f"{each:.1f} s an image: see {out / 'explain.html'} ({_bytes(len(page))}) and {out / name}")


def _of_all_windows(machine: ScoreMachine, record: dict[str, Any], walks: list[Walk]) -> str:
    """What to say of a run that looked at a share of the windows, through an index; nothing of any other."""
    made = record["settings"]
    if not made.get("index") or record["noted"]["engine"] in engines.NAMES:
        return ""
    least = f"budget {made['budget']:g}" if made.get("budget") else f"tolerance {made['tolerance']:g}"
    if machine.pruned is None:
        return (
            f"The run was made with an index ({least}), but here without it: noise, weights and denoised images are "
            "those of all windows."
        )
    apart = max(step for walk in walks for step in walk.apart)
    return (
        f"The run looked at a share of the windows, through an index ({least}). Its own noise is shown; weights and "
        f"denoised images are those of all windows. What the run made of that noise is off by up to {apart:.2g} rms."
    )


@main.command(
    epilog="""
\b
Examples:
  patchscore bench
  patchscore bench --full --images cifar10 --indexes indexes
  patchscore bench --gpu --images cifar10
"""
)
@click.option("--full", is_flag=True, help="Everything that the inputs below allow; hours.")
@click.option("--gpu", is_flag=True, help="The benchmark of the GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: out-bench]")
@click.option("--images", type=click.Path(path_type=Path), help="CIFAR-10: a folder or tar, a subfolder a class.")
@click.option("--fashion-mnist", type=click.Path(path_type=Path), help="Folder of Fashion-MNIST's four IDX files.")
@click.option("--indexes", type=click.Path(path_type=Path), help="Folder where indexes are kept or built, 40 GB.")
@_one_line_errors
def bench(full: bool, gpu: bool, **paths: Path | None) -> None:
    """Measure the engines on this machine: rates beside peers, whole samples, scaling.

    In short it takes less than five minutes and prints tables; JSON and plots go to the output folder. With --full and
    without --out, the results and pages of the project itself are made again. The benchmarks come with the source
    (repository or sdist), not with the wheel.
    """
    script = Path(__file__).parent.parent / "benchmarks" / "bench.py"
    if not script.exists():
        raise ValueError("bench: not in the wheel; get the source (repository or sdist) and run `make bench` there")
    options = [f"--{name.replace('_', '-')}={path.resolve()}" for name, path in paths.items() if path is not None]
    flags = ["--full"] * full + ["--gpu"] * gpu
    sys.exit(subprocess.call([sys.executable, str(script), *flags, *options]))


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
    try:
        return [int(k) for k in patch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"--patch-sizes: got {patch_sizes!r}, takes odd numbers with commas between them") from None


def _all_labels(labels: str, bank: PatchBank) -> list[int] | None:
    if labels == "auto":
        labels = "all" if bank.classes else "none"
    return _labels(labels, bank)


def _numbers(images: str, made: list[int]) -> list[int]:
    try:
        wanted = [int(image) for image in images.split(",")]
    except ValueError:
        raise ValueError(f"--image: got {images!r}, takes numbers with commas between them, or all") from None
    for image in wanted:
        if image not in made:
            raise ValueError(f"--image: got {image}, the run has {made[0]} to {made[-1]}")
    return wanted


def _chart(path: Path, draw: Callable[[Any], Any]) -> None:
    """Draws one where matplotlib is; without it a warning says what is missing."""
    try:
        from . import charts

        write_atomically(path, charts.png(draw(charts)))
    except ImportError as error:
        warnings.warn(f"{path.name} is not drawn: {error}", stacklevel=2)


def _bytes_of(memory_limit: float) -> int:
    if not 0 < memory_limit < 2**30:
        raise ValueError(f"--memory-limit: got {memory_limit:g}, takes a positive number of GiB")
    return int(memory_limit * 2**30)


def _seconds(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


if __name__ == "__main__":
    main()
