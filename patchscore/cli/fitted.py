"""The patch sizes that commands take unless told otherwise: published for known data, else fitted to the source.

A fit takes seconds, and what it found is kept in the folder that the command writes; commands that read the same
training images take it from there, or from a folder beside it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..bank import PatchBank
from ..heldout import HeldOutErrors, candidate_sizes, held_out_errors, held_out_settings
from ..mixed import MixedBank
from ..runs.folder import ERRORS, TABLE, read_run
from ..scales import PUBLISHED, ScaleTable
from .options import Computing, Source, named_table, say

WINDOWS = 10**6
"""Windows of the training images that a fit by default reads, on the mean two seconds of a core for 10^5; of a larger
bank it takes images at random, which makes the sizes a little smaller."""
FEWEST = 100
"""Images that it takes at least, however large they are."""

MIDDLE = 64
"""Height and width, at most, of the middle of images of several sizes that a fit reads; usual patches are smaller."""

DATA = {"fashionmnist": 1, "mnist": 1, "cifar10": 3, "celeba": 3}
"""Data sets that tables were published for, the longer of two names first, with their channels."""


def published_for(source: str, shape: tuple[int, int, int], padding_mode: str) -> ScaleTable | None:
    """The published ResNet table of the data set that a source's name holds, if its images are as the table's."""
    channels, height, width = shape
    if not 28 <= min(height, width) <= max(height, width) <= 32:
        return None
    name = re.sub("[-_ ]", "", Path(source).resolve().name if Path(source).exists() else source).lower()
    for data, of_channels in DATA.items():
        found = re.search(rf"{data}(?!\d)", name)
        table = f"{data}-resnet-{padding_mode}"
        if found:
            return ScaleTable.published(table) if of_channels == channels and table in PUBLISHED else None
    return None


def patch_sizes(
    table: str,
    source: Source,
    bank: PatchBank | MixedBank,
    padding_mode: str,
    machine: str,
    conditional: bool,
    candidates: Sequence[int] | None,
    computing: Computing,
    out: Path,
    made: tuple[int, int] | None = None,
) -> tuple[ScaleTable, HeldOutErrors | None]:
    """The table that `--table` names; for "auto" a published one that belongs to the source, else one fitted to it.

    Args:
        table: the word.
        source, bank: the training images.
        padding_mode: of the machine.
        machine: "els" or "local".
        conditional: whether images are sampled from their own class alone.
        candidates: sizes to choose from, such as an index has; None: the usual ones.
        computing: where a fit is computed.
        out: the folder that the command writes: an earlier fit of the same settings is taken from there, from a folder
            beside it, and, for runs of releases that did not fit, the table of the run.
        made: (height, width) of the images to make, where they are not as large as the training images: a fit takes
            patches that fit in them.

    Returns:
        The table, and the errors that it was fitted to, for `keep`; None where nothing was fitted.
    """
    if table != "auto":
        if bank.value_range is not None and table in PUBLISHED:
            raise ValueError(f"--table: {table} is for pixels in [-1, 1], --value-range takes a patch size or a file")
        return named_table(table), None
    as_published = isinstance(bank, PatchBank) and bank.value_range is None
    published = published_for(source.source, bank.shape, padding_mode) if as_published else None
    if published is not None and max(published.sizes) <= min(made or (max(published.sizes),)):
        return published, None
    before = ScaleTable.published(
        ("fashionmnist-resnet-zeros" if padding_mode == "zeros" else "mnist-resnet-circular")
        if bank.shape[0] == 1
        else f"cifar10-resnet-{padding_mode}"
    )
    if as_published and _made_with(out, before.name):
        return before, None
    if len(bank) == 1:
        if bank.scale != 1:
            before = ScaleTable([sigma * bank.scale for sigma in before.sigmas], before.sizes, before.name)
        say(f"patch sizes {before.name}: of one image none can be held out to fit them; --table takes others")
        return before, None
    # Of images of several sizes a fit reads the middle.
    some = _some(bank if isinstance(bank, PatchBank) else bank.cropped(MIDDLE))
    conditional = conditional and bool((some.labels.unique(return_counts=True)[1] > 1).any())  # type: ignore[union-attr]
    if made is not None and min(made) < min(some.shape[1:]):
        given = candidate_sizes(*some.shape[1:]) if candidates is None else candidates
        candidates = [k for k in given if k <= min(made)] or [1]
    if candidates is not None and padding_mode == "circular":
        candidates = [k for k in candidates if k <= min(bank.shape[1:])] or None
    options = {"padding_mode": padding_mode, "machine": machine, "conditional": conditional}
    settings = held_out_settings(some, candidates, **options)  # type: ignore[arg-type]
    start = time.perf_counter()
    errors, where = _kept(settings, [out, *sorted(out.parent.glob("*/"))])
    if errors is None:
        errors = held_out_errors(
            some,
            candidates,
            engine=computing.engine if computing.engine != "pruned" else "auto",
            memory_limit=computing.bytes,
            device=computing.where,
            **options,  # type: ignore[arg-type]
        )
    fitted = ScaleTable.of_errors(errors, monotone=True)
    if where is None:
        worse = sum(errors.regret) / len(errors.regret)
        origin = f"{errors.errors.shape[1]} images held out of {len(some)}, {time.perf_counter() - start:.1f} s; their "
        origin += f"error is within about {max(worse, 0.01):.0%} of the least"
    else:
        origin = f"read from {where}"
    sizes, noise = " ".join(map(str, fitted.sizes)), f"{fitted.sigmas[0]:g} to {fitted.sigmas[-1]:g}"
    say(f"patch sizes {sizes} for noise {noise}, fitted to these images ({origin}); --table takes others")
    return fitted, errors


def keep(out: Path, table: ScaleTable, errors: HeldOutErrors) -> None:
    """Writes a fit into the folder, once."""
    if not (out / ERRORS).exists() or not (out / TABLE).exists():
        errors.save(out / ERRORS)
        table.save(out / TABLE)


def _some(bank: PatchBank) -> PatchBank:
    """The images that a fit reads: all, or as many at random as have `WINDOWS` windows."""
    _, height, width = bank.shape
    most = max(FEWEST, WINDOWS // (height * width))
    if len(bank) <= most:
        return bank
    return bank.take(torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:most].sort().values)


def _kept(settings: dict[str, object], folders: Iterable[Path]) -> tuple[HeldOutErrors | None, Path | None]:
    """Errors of these settings that lie in one of the folders, and their file."""
    for folder in folders:
        path = folder / ERRORS
        try:
            found = HeldOutErrors.load(path)
        except (OSError, ValueError):  # there is none, or it is damaged: the next, or a new fit
            continue
        if found.settings == settings:
            return found, path
    return None, None


def _made_with(out: Path, table: str) -> bool:
    """Whether the folder holds a run of this table that was not fitted."""
    try:
        return read_run(out / "run.json")["settings"]["table"] == table
    except (OSError, ValueError, KeyError, TypeError):
        return False
