"""Runs taken up again: the machine that made one, and what `explain` adds to its record and compares with it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks, engines
from ..bank import PatchBank
from ..denoiser import ScoreMachine
from ..distributed import Ranks, Sharded, open_shards
from ..explain import ExplainedSample
from ..files import load_npy, parse_json
from ..index import OPTIONS, PatchIndex
from ..machines import EquivariantLocalScore, IdealScore, LocalScore
from ..memorisation import memorisation_report
from ..mixed import open_bank
from ..pooled import Pooled
from ..scales import ScaleTable
from .batches import Batches
from .folder import FLAT_VERSION, FORMAT, RunFolder, files_of, read_arrays, read_run, write_run

SAME = 0.02
"""Rounding may grow over a sample to this much of a pixel that lies in [-1, 1]."""


def reopen(
    out: Path, source: str | None = None, index: str | os.PathLike[str] | None = None
) -> tuple[ScoreMachine, dict[str, Any], dict[str, Any], list[int]]:
    """The machine that made a run, what `sample` was given, its record and the numbers of its images.

    A run that was made with an index gets a machine with that index, budget or tolerance, and seed. Where the index is
    no longer where it was, the machine is exact, and a warning says so.

    Args:
        out: the run's folder.
        source: where its training images are; None looks where they were.
        index: where its index is; None looks where it was.

    Raises:
        ValueError: no run, other training images or another index than the run's, an index where the run had none.
        OSError: a file cannot be read.
    """
    path = out / "run.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; takes the folder of a run of patchscore sample")
    try:
        record = read_run(path)
        settings, noted, made = record["settings"], record["noted"], record["bank"]
        reading = {"size": noted["size"], "limit": noted["limit"], "skip_bad": noted["skip_bad"]}
        reading |= {name: noted.get(name) for name in ("split", "image_key", "label_key")}  # 0.1.0 had none
        ranged = noted.get("value_range")
        reading["value_range"] = tuple(ranged) if isinstance(ranged, list) else ranged
        reading["channels"] = None if noted["channels"] is None else int(noted["channels"])
        sampled = {name: settings[name] for name in ("steps", "schedule", "sampler", "labels", "seed")}
        sampled["size"] = settings.get("size")  # not in runs of before, whose images are as large as the bank's
        where, fingerprint, sizes = source or noted["source"], made["fingerprint"], settings["patch_sizes"]
        table = sizes and ScaleTable([float(sigma) for sigma in sizes], list(sizes.values()), str(settings["table"]))
        kind, padding_mode, engine = settings["machine"], settings["padding_mode"], noted["engine"]
        built, effort = settings.get("index"), {name: settings.get(name) for name in ("budget", "tolerance")}
        indexed = index or noted.get("index")
        shape = [checks.integer("shape", extent, at_least=1) for extent in made["shape"]]
        if record["version"] == FLAT_VERSION:
            listed = [entry["image"] for entry in record["images"]]
        else:
            listed = [entry["image"] for batch in RunFolder(out, shape).batches for entry in batch["images"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not a usable run: {error}") from None
    bank: Any = open_bank(where, **reading)
    if bank.fingerprint != fingerprint:
        raise ValueError(f"{where}: not the training images of the run in {out}; give their place with --source")
    if index is not None and built is None:
        raise ValueError(f"--index: got {index}, the run in {out} was made without one")
    machine: ScoreMachine
    if kind == "ideal":
        machine = IdealScore(bank)
    elif kind == "ls":
        drawn = None if engine in engines.NAMES else effort["budget"]
        machine = LocalScore(bank, table, budget=drawn, seed=sampled["seed"])
    elif built is None or engine in engines.NAMES:  # one that was named comes before the index
        own: dict[str, Any] = {} if built else {"tolerance": effort["tolerance"]}
        if built is None and engine not in engines.NAMES:
            own |= {"budget": effort["budget"], "seed": sampled["seed"]}
        machine = EquivariantLocalScore(bank, table, padding_mode, **own)
    elif index is None and not Path(indexed).exists():
        warnings.warn(
            f"{indexed}: the index that the run in {out} was made with is not there (--index tells where it is now): "
            "its images are made again from all windows, and may come out otherwise",
            stacklevel=3,
        )
        machine = EquivariantLocalScore(bank, table, padding_mode)
    else:
        indexes = _indexes_of_run(Path(indexed), bank, built, out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # sizes that the index lacks were told of when it ran
            parts = [
                EquivariantLocalScore(
                    found.bank, table, padding_mode, engine, index=found, **effort, seed=sampled["seed"]
                )
                for found in indexes
            ]
            machine = Sharded(Pooled(parts), Ranks()) if "shards" in built else parts[0]
    return machine, sampled, record, sorted(set(listed))


def _indexes_of_run(path: Path, bank: PatchBank, built: dict[str, Any], out: Path) -> list[PatchIndex]:
    """The index at `path`, or its shards, if it was built as the run's was; of its patch sizes those it had then."""
    found = open_shards(path, bank, Ranks()) if "shards" in built else [PatchIndex.open(path, bank)]
    for index in found:
        same = all(index.meta[name] == built.get(name) for name in OPTIONS)
        same = same and len(found) == built.get("shards", 1)
        if not same or not set(built["patch_sizes"]) <= set(index.patch_sizes):
            raise ValueError(f"{path}: not the index that the run in {out} was made with; give its place with --index")
    return [PatchIndex(index.path, index.bank, {**index.meta, "patch_sizes": built["patch_sizes"]}) for index in found]


def samples_of(out: Path) -> np.ndarray:
    """The images of a run, float32 [n, C, H, W] in the order of their numbers, from the mapped file.

    Raises:
        ValueError: no run, or one without images.
    """
    path = out / "run.json"
    try:
        record = read_run(path)
        if record["version"] == FLAT_VERSION:
            images = read_arrays(out / "samples.npz").get("images", np.empty(0))
        else:
            shape = record["bank"]["shape"][:1] + list(record["settings"].get("size") or record["bank"]["shape"][1:])
            batches = Batches(out, shape)
            made = sorted(batches.made())
            images = load_npy(batches.rows.path, mapped=True) if made else np.empty(0)
            images = images[: len(made)] if made == list(range(len(made))) else images[made]
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(f"{path}: not a usable run: {error}") from None
    if not len(images):
        raise ValueError(f"{out}: the run has no images yet")
    return images


def samples_have_range(out: Path) -> bool:
    """Whether the samples of a run are no pixels in [-1, 1] but of a bank with a value_range, such as latents."""
    path = out / "run.json"
    try:
        return read_run(path).get("noted", {}).get("value_range") is not None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a usable run: {error}") from None


def is_run(out: Path) -> bool:
    """Whether a folder says of itself that it is a run's; its run.json may be damaged all the same."""
    try:
        found = parse_json((out / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def described_run(out: Path) -> list[tuple[str, str]]:
    """What a run is, as (name, words) a line: its images, where they are from, and how they were made.

    Raises:
        ValueError: no run of patchscore sample.
    """
    path = out / "run.json"
    try:
        record = read_run(path)
        settings, noted, bank = record["settings"], record["noted"], record["bank"]
        if record["version"] == FLAT_VERSION:
            count, place = len(record["images"]), out
        else:
            folder = RunFolder(out, bank["shape"], **files_of(record))
            count, place = (
                len({entry["image"] for batch in folder.batches for entry in batch["images"]}),
                folder.samples.place,
            )
        shape = " x ".join(map(str, bank["shape"]))
        size, sizes = settings.get("size"), settings["patch_sizes"]
        labels = "none" if settings["labels"] is None else ", ".join(map(str, settings["labels"]))
        patches = f", patch sizes {settings['table']}" if sizes else ""
        padding = f", padding {settings['padding_mode']}" if settings["machine"] == "els" else ""
        index = ""
        if settings.get("index"):
            least = "budget" if settings.get("budget") else "tolerance"
            index = f", through an index, {least} {settings[least]:g}"
        elif settings.get("budget"):
            index = f", over a random fraction of the images, budget {settings['budget']:g}"
        return [
            ("run", f"{count:,} images in {place}, made by patchscore {record['versions']['patchscore']}"),
            ("from", f"{bank['images']:,} images, {shape}, of {noted['source']}; fingerprint {bank['fingerprint']}"),
            ("machine", f"{settings['machine']}{padding}{patches}{index}"),
            ("sampling", f"{settings['steps']} levels, {settings['schedule']}, {settings['sampler']}"),
            ("seed", f"{settings['seed']}, labels {labels}{f', size {size[0]} x {size[1]}' if size else ''}"),
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a usable run: {error}") from None


def report_memorisation(
    out: Path, record: dict[str, Any], samples: list[ExplainedSample], bank: PatchBank
) -> dict[str, Any]:
    """Puts a `memorisation_report` into run.json under "memorisation", and returns it."""
    record["memorisation"] = memorisation_report(record.get("memorisation", {}), samples, bank)
    write_run(out / "run.json", record)
    return record["memorisation"]


def warn_of_others(out: Path, record: dict[str, Any], samples: list[ExplainedSample]) -> None:
    """A warning for every sample that came out unlike the one in the run's folder."""
    if record["version"] == FLAT_VERSION:
        arrays = read_arrays(out / "samples.npz")
        saved = dict(zip(arrays.get("image", np.empty(0)).tolist(), arrays.get("images", ()), strict=False))
    else:
        rows = RunFolder(out, samples[0].image.shape).rows
        saved = {sample.number: row for sample in samples if (row := rows.read(sample.number)) is not None}
    for sample in samples:
        image = sample.image.cpu().numpy()
        if sample.number in saved and saved[sample.number].shape == image.shape:
            apart = float(np.abs(saved[sample.number] - image).max())
            if not apart <= SAME:
                message = (
                    f"image {sample.number} came out otherwise than in {out}, by up to {apart:.2g}: explained as here"
                )
                warnings.warn(message, stacklevel=2)
