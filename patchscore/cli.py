"""The command line: `patchscore sample`, `patchscore index` and `patchscore info`.

A thin skin: it turns words into the library's objects, prints what happened, and turns every error a user can cause
into one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from . import checks, engines
from .bank import PatchBank
from .index import OPTIONS, PatchIndex
from .machines import DEFAULT_MEMORY_LIMIT, EquivariantLocalScore, IdealScore, LocalScore, ScoreMachine
from .noise import SCHEDULES, get_schedule
from .runs import Run
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
@click.option("--engine", default="auto", show_default=True, metavar="|".join(["auto", *engines.ENGINES, "pruned"]))
@click.option(
    "--index",
    "index_path",
    type=click.Path(path_type=Path),
    help="An index that `patchscore index` made of SOURCE: a share of the windows is looked at, not all.",
)
@click.option("--budget", type=float, help="With --index: the share of (pixel, window) pairs to evaluate, say 0.01.")
@click.option("--tolerance", type=float, help="With --index, instead: the rms error that a denoised pixel may have.")
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
    in). The output folder gets one PNG an image, grid.png, trajectory.png, samples.npz and run.json.
    """
    checks.integer("-n", count, at_least=1)
    checks.integer("--batch-size", batch_size, at_least=1)
    get_schedule(schedule, steps)
    if not 0 < memory_limit < 2**30:
        raise ValueError(f"--memory-limit: got {memory_limit:g}, takes a positive number of GiB")
    device = _device(device)
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out: {out} lies in the folder of training images")
    if index_path is None and (budget is not None or tolerance is not None):
        raise ValueError("--budget, --tolerance: take an --index; `patchscore index` makes one")
    if index_path is not None and (budget is None) == (tolerance is None):
        raise ValueError("--index: takes one of --budget and --tolerance")
    bank = _open(source, size, channels, limit, skip_bad)
    index = None if index_path is None else PatchIndex.open(index_path, bank)
    pruned = {"index": index, "budget": budget, "tolerance": tolerance, "seed": seed} if index else {}
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

    run = Run(out, denoiser, settings, described, noted, overwrite)
    start = time.perf_counter()
    try:
        kept = run.sample(count, batch_size, device)
    except KeyboardInterrupt:
        click.echo(
            f"\npatchscore: stopped; {len(run.images)} of {count} images are in {out}, the same command continues",
            err=True,
        )
        sys.exit(130)
    seconds = time.perf_counter() - start
    added = f"made {_images(count - kept)} in {seconds:.1f} s" if kept < count else "nothing left to make"
    click.echo(f"{added}{f', {kept} were there' if kept else ''}: see {out / 'grid.png'} and {out / 'trajectory.png'}")


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
@click.option("--cells", type=int, help="Cells of similar windows.  [default: 4 sqrt(windows)]")
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
    for name, engine in engines.ENGINES.items():
        click.echo(f"  {name:<10} {engine.unavailable(torch.device(device)) or 'ready'}")


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


if __name__ == "__main__":
    main()
