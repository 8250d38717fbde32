"""`patchscore sample`: new images into a folder."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch

from .. import checks, distributed, engines
from ..adapters.latents import decode as decoded
from ..bank import PatchBank
from ..denoiser import ScoreMachine
from ..distributed import Sharded, Team, first_to_say
from ..files import check_writable
from ..heldout import HeldOutErrors
from ..index import OPTIONS, PatchIndex
from ..machines import EquivariantLocalScore, IdealScore, LocalScore
from ..mixed import MixedBank
from ..noise import get_schedule
from ..pooled import Pooled
from ..runs import BLOCK_IMAGES, FORMATS, MOST_IMAGES, Run, Shown
from ..scales import PUBLISHED, ScaleTable
from .fitted import keep, patch_sizes
from .networks import named_function
from .options import (
    VALUE_RANGE,
    Computing,
    Sampling,
    Source,
    computing_options,
    described,
    labels_named,
    one_line_errors,
    range_named,
    sampling_options,
    say,
    size_named,
    source_options,
    taking,
)


@dataclasses.dataclass(frozen=True)
class Which:
    """Which machine, with which patch sizes, and how many of its windows it evaluates."""

    machine: str
    padding_mode: str
    table: str
    index_path: Path | None
    budget: float | None
    tolerance: float | None

    def check(self, computing: Computing) -> None:
        """ValueError for combinations that mean nothing."""
        if self.machine == "ideal" and self.budget is not None:
            raise ValueError("--budget: got one, the ideal machine sums over all images")
        best = engines.chosen(engines.EXACT, "auto", torch.device(computing.where), torch.float32)
        rounds = self.machine == "els" and best.name == "fused"
        if self.index_path is None and self.tolerance is not None and not rounds:
            raise ValueError("--tolerance: takes an --index (`patchscore index` makes one), or els on CUDA with Triton")
        if self.index_path is not None and (self.budget is None) == (self.tolerance is None):
            raise ValueError("--index: takes one of --budget and --tolerance")
        if self.machine != "els" and self.index_path is not None:
            raise ValueError(f"--index: got one, the {self.machine} machine takes none")
        if self.machine != "els" and self.padding_mode != "zeros":
            raise ValueError(f"--padding-mode: got {self.padding_mode}, the {self.machine} machine pads with zeros")
        if self.machine == "ideal" and self.table != "auto":
            raise ValueError(f"--table: got {self.table}, the ideal machine has no patch size")

    def sizes(
        self,
        source: Source,
        bank: PatchBank | MixedBank,
        index: PatchIndex | None,
        labels: str,
        computing: Computing,
        out: Path,
        made: tuple[int, int] | None = None,
    ) -> tuple[ScaleTable | None, HeldOutErrors | None]:
        """The patch sizes, for images of size `made`, and what they were fitted to; None where the machine has none."""
        if self.machine == "ideal":
            return None, None
        machine = "local" if self.machine == "ls" else "els"
        indexed = None if index is None else index.patch_sizes
        conditional = labels != "none"
        which = (self.padding_mode, machine, conditional, indexed)
        return patch_sizes(self.table, source, bank, *which, computing, out, made)

    def build(
        self, bank: Any, sizes: ScaleTable | None, index: PatchIndex | None, seed: int, computing: Computing
    ) -> ScoreMachine:
        """The machine, over a PatchBank or, as els alone takes it, a MixedBank."""
        pruned: dict[str, Any] = {}
        if index or self.tolerance:
            pruned = {"index": index, "tolerance": self.tolerance}
        if self.budget or pruned:
            pruned |= {"budget": self.budget, "seed": seed}
        engine, memory = computing.engine, computing.bytes
        if sizes is None:
            return IdealScore(bank, engine, memory)
        if self.machine == "ls":
            return LocalScore(bank, sizes, engine, memory, **pruned)
        return EquivariantLocalScore(bank, sizes, self.padding_mode, engine, memory, **pruned)


PADDING_MODE = click.option(
    "--padding-mode",
    type=click.Choice(["zeros", "circular"]),
    default="zeros",
    show_default=True,
    help="Borders of els: equivariance broken by zero padding, or none (z wraps around).",
)
TABLE = click.option(
    "--table",
    default="auto",
    show_default=True,
    metavar="NAME|FILE|K",
    help="Patch size by noise level: a published table (listed below), a file that ScaleTable.save wrote, or one "
    "size. auto is the published table if SOURCE is named after its data set and its images are 32 x 32; else"
    " sizes are fitted to SOURCE, in seconds, and kept in the folder of the run.",
)

which_options = taking(
    Which,
    click.option(
        "--machine",
        type=click.Choice(["els", "ls", "ideal"]),
        default="els",
        show_default=True,
        help="Which windows compete: from every position (equivariant local), from the same one (local), or whole "
        "images.",
    ),
    PADDING_MODE,
    TABLE,
    click.option(
        "--index",
        "index_path",
        type=click.Path(path_type=Path),
        help="An index of SOURCE from `patchscore index`: a sample of the windows is evaluated, not all.",
    ),
    click.option(
        "--budget",
        type=float,
        help="Fraction of (pixel, window) pairs to evaluate, say 0.01; without --index, of training images to sum "
        "over.",
    ),
    click.option(
        "--tolerance",
        type=float,
        help="Instead of --budget: the rms standard error that a pixel may have. Without --index, on CUDA: its largest"
        " error.",
    ),
)

SAMPLE_LABELS = click.option(
    "--labels",
    default="none",
    show_default=True,
    metavar="none|all|A,B,...",
    help="Classes of the samples, in turn, by number or name; all of them; or none: images of every class compete.",
)


@click.command(
    epilog="""
\b
Examples:
  patchscore sample fashion-mnist --labels all
  patchscore sample photos/ --size 32 -n 64 --out faces
  patchscore sample cifar.npz --machine els --padding-mode circular --sampler heun
  patchscore sample photos/ --size 48 --table 7 --labels cats,dogs --seed 3
  patchscore sample cifar.npz --index cifar.index --budget 0.01
  patchscore sample photos/ --table 5 --size-out 48x80
  patchscore sample latents.safetensors --value-range data --schedule flow

The same command again continues an interrupted run, and a larger -n adds to a finished one.

Published tables, made for 32 x 32 images: """
    + ", ".join(PUBLISHED)
)
@source_options
@click.option("-n", "count", type=int, default=16, show_default=True, help="How many images.")
@which_options
@sampling_options(
    SAMPLE_LABELS,
    "Image i depends on the seed and on i alone.",
    "Images denoised together.",
    "Levels of the noise schedule; the last level of the cosine schedule is the clean image.",
)
@computing_options("pruned")
@click.option(
    "--size-out",
    metavar="HEIGHTxWIDTH",
    help="Size of the images to make, say 48x80, if not that of the training images; els only.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Format of samples/: PNG files (in subfolders of 1,000 where -n is larger), .npz shards of 1,000 images, one "
    "zip in EDM's layout, or .safetensors shards of 1,000 images in float32. [default: png; safetensors with "
    "--value-range and no --decode]",
)
@click.option(
    "--decode",
    metavar="MODULE:FUNCTION",
    help="With --value-range: a function, or an AutoencoderKL of diffusers, that decodes samples [B, C, H, W] to "
    "pictures [B, 1 or 3, H, W] in [-1, 1], which are written as PNGs.",
)
@VALUE_RANGE
@click.option(
    "--shard",
    default="images",
    show_default=True,
    metavar="images|bank|N",
    help="Under torchrun, what ranks divide. images: ranks make different images, each from all training images; "
    "bank: each rank sums over a part of the training images; N: each group of N ranks divides the training images, "
    "and groups make different images.",
)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a run with other settings in the same folder.")
@one_line_errors
def sample(
    source: Source,
    count: int,
    which: Which,
    sampling: Sampling,
    computing: Computing,
    size_out: str | None,
    form: str | None,
    decode: str | None,
    shard: str,
    out: Path,
    overwrite: bool,
) -> None:
    """Make new images from the training images in SOURCE.

    SOURCE is a folder of images (class subfolders become labels), a .npy, .npz or IDX file, or fashion-mnist (built
    in). With els, images of several sizes keep their sizes unless --size is given. The output folder gets samples/ with
    one PNG an image (or what --format says), samples.npy with the same as float32, grid.png of the first hundred,
    trajectory.png, batches.jsonl (labels, hashes, nearest training images) and run.json (all settings). Latents
    (--value-range) get pictures only with --decode.
    """
    form, shown = _written(source, form, decode)
    checks.integer("-n", count, at_least=1, at_most=MOST_IMAGES)
    sampling.check()
    get_schedule(sampling.schedule, sampling.steps)
    size = None if size_out is None else size_named("--size-out", size_out)
    device, _ = computing.where, computing.bytes
    source.check_not_around(out)
    which.check(computing)
    check_writable(out)

    team = _team(shard)
    bank: Any = source.open_any()
    if isinstance(bank, MixedBank):
        _check_mixed(which, bank, team)
    shards = _index_of(which, bank, team)
    index = shards[0] if shards else None
    labels = labels_named(sampling.labels, bank)
    fitted, errors = _shared_sizes(team, which, source, bank, index, sampling.labels, computing, out, size)
    if index is not None and index.bank is not bank:
        parts = [which.build(shard.bank, fitted, shard, sampling.seed, computing) for shard in shards]
        machine: ScoreMachine = Sharded(Pooled(parts), team.bank)  # type: ignore[arg-type]
    elif team.bank.size > 1:
        over_part = which.build(distributed.shard(bank, team.bank), fitted, None, sampling.seed, computing)
        machine = Sharded(over_part, team.bank)
    else:
        machine = which.build(bank, fitted, index, sampling.seed, computing)
    levels = get_schedule(sampling.schedule, sampling.steps).ratios[:-1].tolist()
    machine.check_size(size or bank.shape[1:], levels, "--table" if size is None else "--size-out")
    sizes = machine.patch_size if isinstance(machine.patch_size, ScaleTable) else None
    settings = {
        "steps": sampling.steps,
        "schedule": sampling.schedule,
        "sampler": sampling.sampler,
        "labels": labels,
        "seed": sampling.seed,
        "size": None if size in (None, bank.shape[1:]) else list(size),
    }
    say(f"{bank!r} from {source.source}", described(machine, device))
    lacking = sorted(set(sizes.sizes) - set(index.patch_sizes)) if sizes and index else []
    if lacking:
        say(f"not in the index, so summed exactly: patch sizes {', '.join(map(str, lacking))}")
        warnings.filterwarnings("ignore", message=".*the index has patch sizes")

    of_machine = {**_of_machine(which, machine, sizes, index), "decode": decode}
    noted = {**_noted(source, which, sampling, computing, device), "ranks": team.ranks.size, "shard": shard}
    with Run(out, machine, settings, of_machine, noted, overwrite, form, count > BLOCK_IMAGES, team, shown) as run:
        if team.first and fitted is not None and errors is not None:
            keep(out, fitted, errors)
        start = time.perf_counter()
        try:
            kept = run.sample(count, sampling.batch_size, device)
        except KeyboardInterrupt as stop:
            there = f"{sum(image < count for image in run.made)} of {count} images are in {out}"
            if team.ranks.size > 1:
                there = f"finished images are in {out}"
            line = f"patchscore: stopped{f' ({stop})' if str(stop) else ''}; {there}, the same command continues"
            if first_to_say(line):
                say("", line, err=True)
            sys.exit(130)
        seconds = time.perf_counter() - start
    added = f"made {_images(count - kept)} in {seconds:.1f} s" if kept < count else "nothing left to make"
    there = f", {kept} were there" if kept else ""
    drawn = f" and {out / 'grid.png'}" if source.value_range is None or decode else ""
    say(f"{added}{there}: see {run.folder.samples.place}{drawn}")


def _written(source: Source, form: str | None, decode: str | None) -> tuple[str, Shown | None]:
    """The format of the samples, and what makes pictures of latents."""
    if source.value_range is None:
        if decode is not None:
            raise ValueError(f"--decode: got {decode}, takes latents, --value-range")
        return form or "png", None
    takes = ("png", "safetensors") if decode is not None else ("safetensors",)
    form = form or takes[0]
    if form not in takes:
        also = "" if decode is not None else "; with --decode also png"
        raise ValueError(f"--format: got {form}, with --value-range takes {' or '.join(takes)}{also}")
    if decode is None:
        return form, None
    autoencoder = named_function("--decode", decode, "module:function")

    def shown(latents: torch.Tensor) -> torch.Tensor:
        images = decoded(autoencoder, latents)
        if images.ndim != 4 or len(images) != len(latents) or images.shape[1] not in (1, 3):
            raise ValueError(f"--decode: {decode} gives {list(images.shape)}, takes [{len(latents)}, 1 or 3, H, W]")
        return images

    return form, shown


def _check_mixed(which: Which, bank: MixedBank, team: Team) -> None:
    """ValueError for what takes images of one size alone."""
    sizes, asks = f"{source_sizes(bank)}", "takes images of one size, which --size makes of them"
    for option, given in (("--machine", which.machine != "els"), ("--index", which.index_path is not None)):
        if given:
            raise ValueError(f"{option}: the images have {sizes}; it {asks}")
    if team.bank.size > 1:
        raise ValueError(f"--shard: the images have {sizes}; the bank {asks}")


def source_sizes(bank: MixedBank) -> str:
    """How many sizes the images of a bank have, with two of them."""
    shown = " and ".join(f"{height} x {width}" for height, width in bank.sizes[:2])
    return f"{len(bank.sizes)} sizes, such as {shown}"


def _index_of(which: Which, bank: PatchBank, team: Team) -> list[PatchIndex]:
    """The index that --index names, or this rank's shards of it; none without."""
    path = which.index_path
    if path is None:
        return []
    if distributed.shards_in(path):
        return distributed.open_shards(path, bank, team.bank)
    if team.bank.size > 1:
        raise ValueError(f"--index: {path} is in one piece, --shard takes one that `patchscore index --shards` made")
    return [PatchIndex.open(path, bank)]


def _team(shard: str) -> Team:
    """The ranks that work on the run, as --shard divides them."""
    ranks = distributed.join()
    if shard not in ("images", "bank") and not shard.isdecimal():
        raise ValueError(f"--shard: got {shard!r}, takes images, bank or a number of ranks")
    shards = 1 if shard == "images" else ranks.size if shard == "bank" else int(shard)
    if not shards or ranks.size % shards:
        raise ValueError(f"--shard: got {shard}, takes a divisor of the {ranks.size} ranks")
    return Team(ranks, shards)


def _shared_sizes(
    team: Team,
    which: Which,
    source: Source,
    bank: PatchBank | MixedBank,
    index: PatchIndex | None,
    labels: str,
    computing: Computing,
    out: Path,
    made: tuple[int, int] | None,
) -> tuple[ScaleTable | None, HeldOutErrors | None]:
    """`Which.sizes`, found on the first rank and taken over by the others."""
    found: tuple[ScaleTable | None, HeldOutErrors | None] = (None, None)
    with team.ranks.failing_together():
        if team.first:
            found = which.sizes(source, bank, index, labels, computing, out, made)
    team.ranks.agree({}, "")
    table, errors = found
    told = team.share(table and [table.sigmas, table.sizes, table.name])
    return (table if team.first else told and ScaleTable(*told)), errors


def _of_machine(
    which: Which, machine: ScoreMachine, sizes: ScaleTable | None, index: PatchIndex | None
) -> dict[str, Any]:
    """The machine's settings as run.json has them: they decide the images."""
    return {
        "machine": which.machine,
        "padding_mode": getattr(machine.leaf if isinstance(machine, Sharded) else machine, "padding_mode", None),
        "table": sizes and sizes.name,
        "patch_sizes": sizes and dict(zip(map(str, sizes.sigmas), sizes.sizes, strict=True)),
        "index": index and _of_index(index),
        "budget": which.budget,
        "tolerance": which.tolerance,
    }


def _of_index(index: PatchIndex) -> dict[str, Any]:
    found = {**{name: index.meta[name] for name in OPTIONS}, "patch_sizes": index.patch_sizes}
    return found if index.bank.part is None else {**found, "shards": index.bank.part.of}


def _noted(source: Source, which: Which, sampling: Sampling, computing: Computing, device: str) -> dict[str, Any]:
    """What run.json tells beside that: where things were, which may change without changing an image."""
    return {
        **dataclasses.asdict(source),
        "value_range": range_named(source.value_range),
        "batch_size": sampling.batch_size,
        "engine": computing.engine,
        "index": which.index_path and str(which.index_path),
        "device": device,
        "memory_limit_gib": computing.memory_limit,
    }


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
