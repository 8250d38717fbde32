"""A run: a folder of samples that says how each was made, and that can be continued.

`run.json` is written last after every batch, so an image counts as made once it is listed there and its file still has
the listed hash. Whatever else lies in the folder is made again or left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import PIL
import torch

from . import engines, plots
from .bank import PatchBank
from .denoiser import ScoreMachine
from .explain import Walk, count_sources, nearest_images, usual_nearness
from .files import write_atomically
from .index import OPTIONS, PatchIndex
from .machines import EquivariantLocalScore, IdealScore, LocalScore
from .noise import get_schedule
from .sampling import Step, labels_in_turn, sample
from .scales import ScaleTable
from .version import __version__

FORMAT = "patchscore-run"
VERSION = 1
SHOWN = 6
"""Images whose trajectories are kept and drawn."""


class Run:
    """Samples of one machine under one set of settings, in the folder `out`.

    Args:
        out: the folder; made if absent.
        machine: the denoiser.
        settings: what `sample` takes and what decides the images: steps, schedule, sampler, labels (a list taken in
            turn, or None), seed.
        described: the machine's settings, which decide the images too; both are in `run.json` and must match.
        noted: what else `run.json` should tell, such as where the images came from.
        overwrite: start afresh where the folder holds another run, or files of the names that a run writes.

    Raises:
        ValueError: the folder holds another run, a run.json that is not one, or somebody else's files by our names.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        out: Path,
        machine: ScoreMachine,
        settings: dict[str, Any],
        described: dict[str, Any],
        noted: dict[str, Any],
        overwrite: bool,
    ):
        self.out = out
        self.machine = machine
        self.settings = settings
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": {**described, **settings},
            "noted": noted,
            "bank": {
                "fingerprint": machine.bank.fingerprint,
                "images": len(machine.bank),
                "shape": machine.shape,
                "class_names": machine.bank.class_names,
            },
            "versions": _versions(),
            "images": [],
            "batches": [],
        }
        self.record = json.loads(json.dumps(self.record))  # as it will be read back: tuples become lists
        self.images: dict[int, np.ndarray] = {}
        self.x: dict[int, np.ndarray] = {}
        self.x0: dict[int, np.ndarray] = {}
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out}: not a folder")
        try:
            self._take_up()
        except ValueError:
            if not overwrite:
                raise
            self._clear()
        out.mkdir(parents=True, exist_ok=True)

    def sample(self, n: int, batch_size: int, device: str) -> int:
        """Makes images 0..n-1 as far as they are not there yet, then the pictures; returns how many were there."""
        missing = [image for image in range(n) if image not in self.images]
        for first, count in _stretches(missing):
            self._clock = time.perf_counter()
            sample(
                self.machine,
                n=count,
                first=first,
                batch_size=batch_size,
                device=device,
                callback=lambda step: self._on_step(step, device),
                **self.settings,
            )
        self._draw()
        return n - len(missing)

    def _on_step(self, step: Step, device: str) -> None:
        now = time.perf_counter()
        if step.index == 0:
            self._seconds: list[float] = []
            self._pending: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {i: [] for i in step.images if i < SHOWN}
        self._seconds.append(now - self._clock)
        self._clock = now
        for image, kept in self._pending.items():
            at = step.images.index(image)
            kept.append((step.x[at].cpu().numpy().astype(np.float16), step.x0[at].cpu().numpy().astype(np.float16)))
        if step.index == step.of - 1:
            # Every sampler ends on sigma = 0, where the image is what was denoised last.
            self._save_batch(step, device)
            self._clock = time.perf_counter()

    def _save_batch(self, step: Step, device: str) -> None:
        final = step.x0.clamp(-1, 1).to("cpu", torch.float32)
        labels = labels_in_turn(self.settings["labels"], step.images) or [None] * len(step.images)
        listed = {entry["image"]: entry for entry in self.record["images"]}
        near = nearest_images(final, self.machine.bank)
        for at, image in enumerate(step.images):
            self.images[image] = final[at].numpy()
            name, content = f"{image:04d}.png", png(plots.to_pil(final[at]))
            write_atomically(self.out / name, content)
            listed[image] = {
                "image": image,
                "file": name,
                "label": labels[at],
                "sha256": _sha256(content),
                "nearest": {"image": int(near.image[at]), "rms": round(float(near.rms[at]), 4)},
            }
        for image, kept in self._pending.items():
            self.x[image], self.x0[image] = (np.stack(part) for part in zip(*kept, strict=True))
        self.record["images"] = [listed[image] for image in sorted(listed)]
        self.record["batches"].append(
            {
                "first": step.images.start,
                "images": len(step.images),
                "engine": self.machine.engine_on(device),
                "device": device,
                "seconds_per_step": [round(seconds, 4) for seconds in self._seconds],
            }
        )
        self._write()

    def _write(self) -> None:
        made, drawn = sorted(self.images), sorted(self.x)
        schedule = get_schedule(self.settings["schedule"], self.settings["steps"])
        labels = {entry["image"]: entry["label"] for entry in self.record["images"]}
        arrays = {
            "image": np.array(made),
            "images": np.stack([self.images[i] for i in made]),
            "label": np.array([-1 if labels[i] is None else labels[i] for i in made]),
            "alphas": schedule.alphas[:-1].numpy(),
            "sigmas": schedule.sigmas[:-1].numpy(),
        }
        if drawn:
            arrays["trajectory_image"] = np.array(drawn)
            arrays["trajectory_x"] = np.stack([self.x[i] for i in drawn])
            arrays["trajectory_x0"] = np.stack([self.x0[i] for i in drawn])
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        write_atomically(self.out / "samples.npz", content.getvalue())
        write_atomically(self.out / "run.json", (json.dumps(self.record, indent=1) + "\n").encode())

    def _draw(self) -> None:
        images = torch.from_numpy(np.stack([self.images[i] for i in sorted(self.images)]))
        write_atomically(self.out / "grid.png", png(plots.grid(images)))
        drawn = sorted(self.x)
        if drawn:
            ratios = get_schedule(self.settings["schedule"], self.settings["steps"]).ratios[:-1].tolist()
            picture = plots.trajectories(
                torch.from_numpy(np.stack([self.x[i] for i in drawn])).float(),
                torch.from_numpy(np.stack([self.x0[i] for i in drawn])).float(),
                ratios,
                [self.machine.patch_size_at(sigma) for sigma in ratios],
                zoom=max(1, round(84 / self.machine.shape[-1])),
            )
            write_atomically(self.out / "trajectory.png", png(picture))

    def _take_up(self) -> None:
        """Takes over what an earlier call left in the folder, if it was made with the same settings."""
        path = self.out / "run.json"
        if not path.exists():
            foreign = self._by_our_names()
            if foreign:
                raise ValueError(f"{foreign[0]}: exists and is of no run; choose another --out, or --overwrite")
            return
        try:
            earlier = json.loads(path.read_bytes())
            if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
                raise ValueError("not a patchscore run")
            if earlier.get("version") != VERSION:
                raise ValueError(f"format version {earlier.get('version')!r}, this release reads {VERSION}")
            self._check_same(earlier)
            entries = {entry["image"]: entry for entry in earlier["images"]}
            batches = list(earlier["batches"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}; choose another --out, or --overwrite") from None
        try:
            with np.load(self.out / "samples.npz", allow_pickle=False) as arrays:
                saved = dict(zip(arrays["image"].tolist(), arrays["images"], strict=True))
                if "trajectory_image" in arrays:
                    drawn = arrays["trajectory_image"].tolist()
                    x = dict(zip(drawn, arrays["trajectory_x"], strict=True))
                    x0 = dict(zip(drawn, arrays["trajectory_x0"], strict=True))
                else:
                    x, x0 = {}, {}
            same_shape = all(image.shape == self.machine.shape for image in saved.values())
        except (OSError, ValueError, KeyError, BadZipFile):
            saved, same_shape = {}, False
        if not same_shape:
            warnings.warn(f"{self.out / 'samples.npz'}: not usable, its images are made again", stacklevel=4)
            self._clear()
            return
        kept = {i for i, entry in entries.items() if i in saved and self._unchanged(entry) and (i in x or i >= SHOWN)}
        self.images = {i: saved[i] for i in kept}
        self.x, self.x0 = ({i: part[i] for i in kept if i in part} for part in (x, x0))
        self.record["images"] = [entries[i] for i in sorted(kept)]
        self.record["batches"] = batches
        if "memorisation" in earlier:
            self.record["memorisation"] = earlier["memorisation"]

    def _check_same(self, earlier: dict[str, Any]) -> None:
        if earlier["bank"]["fingerprint"] != self.record["bank"]["fingerprint"]:
            raise ValueError("holds a run over other training images")
        before, now = earlier["settings"], self.record["settings"]
        for name in now:
            if before.get(name) != now[name]:
                if isinstance(now[name], dict):
                    raise ValueError(f"holds a run with other {name}")
                raise ValueError(f"holds a run with {name} {before.get(name)}, asked for {now[name]}")

    def _by_our_names(self) -> list[Path]:
        """The files in the folder that this run could write."""
        names = ("run.json", "samples.npz", "grid.png", "trajectory.png")
        return sorted([*self.out.glob("[0-9][0-9][0-9][0-9].png"), *(p for n in names if (p := self.out / n).exists())])

    def _clear(self) -> None:
        """Removes them, so that the folder never mixes two runs."""
        for path in self._by_our_names():
            path.unlink()

    def _unchanged(self, entry: dict[str, Any]) -> bool:
        path = self.out / f"{entry['image']:04d}.png"
        return path.is_file() and _sha256(path.read_bytes()) == entry["sha256"]


def _stretches(images: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, count)."""
    stretches: list[tuple[int, int]] = []
    for image in images:
        if stretches and sum(stretches[-1]) == image:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((image, 1))
    return stretches


def png(image: PIL.Image.Image) -> bytes:
    """An image as a PNG file."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions() -> dict[str, str]:
    return {
        "patchscore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def reopen(
    out: Path, source: str | None = None, index: str | os.PathLike[str] | None = None
) -> tuple[ScoreMachine, dict[str, Any], dict[str, Any]]:
    """The machine that made a run, what `sample` was given, and its record, from the run's own run.json.

    A run that was made with an index gets a machine with that index, budget or tolerance, and seed. Where the index is
    no longer where it was, the machine is exact, and a warning says so.

    Args:
        out: the run's folder.
        source: where its training images are; None looks where they were.
        index: where its index is; None looks where it was.

    Raises:
        ValueError: no run, other training images or another index than the run's, an index that it had not.
        OSError: a file cannot be read.
    """
    path = out / "run.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; takes the folder of a run of patchscore sample")
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError("not a patchscore run")
        if record.get("version") != VERSION:
            raise ValueError(f"format version {record.get('version')!r}, this release reads {VERSION}")
        settings, noted, made = record["settings"], record["noted"], record["bank"]
        reading = {"size": noted["size"], "limit": noted["limit"], "skip_bad": noted["skip_bad"]}
        reading["channels"] = None if noted["channels"] is None else int(noted["channels"])
        walked = {name: settings[name] for name in ("steps", "schedule", "sampler", "labels", "seed")}
        where, fingerprint, sizes = source or noted["source"], made["fingerprint"], settings["patch_sizes"]
        table = sizes and ScaleTable([float(sigma) for sigma in sizes], list(sizes.values()), str(settings["table"]))
        kind, padding_mode, engine = settings["machine"], settings["padding_mode"], noted["engine"]
        built, shares = settings.get("index"), {name: settings.get(name) for name in ("budget", "tolerance")}
        indexed = index or noted.get("index")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a usable run: {error}") from None
    bank = PatchBank.open(where, **reading)
    if bank.fingerprint != fingerprint:
        raise ValueError(f"{where}: not the training images of the run in {out}; give their place with --source")
    if index is not None and built is None:
        raise ValueError(f"--index: got {index}, the run in {out} was made without one")
    machine: ScoreMachine
    if kind == "ideal":
        machine = IdealScore(bank)
    elif kind == "ls":
        machine = LocalScore(bank, table)
    elif built is None or engine in engines.NAMES:  # one that was named comes before the index
        machine = EquivariantLocalScore(
            bank, table, padding_mode, tolerance=shares["tolerance"] if built is None else None
        )
    elif index is None and not Path(indexed).exists():
        warnings.warn(
            f"{indexed}: the index that the run in {out} was made with is not there (--index tells where it is now): "
            "its images are made again from all windows, and may come out otherwise",
            stacklevel=3,
        )
        machine = EquivariantLocalScore(bank, table, padding_mode)
    else:
        found = _index_of_run(Path(indexed), bank, built, out)
        machine = EquivariantLocalScore(bank, table, padding_mode, index=found, **shares, seed=walked["seed"])
    return machine, walked, record


def _index_of_run(path: Path, bank: PatchBank, built: dict[str, Any], out: Path) -> PatchIndex:
    """The index at `path`, if it was built as the run's was; of its patch sizes only those that it had then."""
    index = PatchIndex.open(path, bank)
    same = all(index.meta[name] == built.get(name) for name in OPTIONS)
    if not same or not set(built["patch_sizes"]) <= set(index.patch_sizes):
        raise ValueError(f"{path}: not the index that the run in {out} was made with; give its place with --index")
    return PatchIndex(path, bank, {**index.meta, "patch_sizes": built["patch_sizes"]})


MEMORY_LEVEL = 0.5
"""The noise level at which sources are counted: the layout is settled, and details are being put in place."""


def report_memorisation(out: Path, record: dict[str, Any], walks: list[Walk], bank: PatchBank) -> dict[str, Any]:
    """Adds to run.json how many training images each explained sample is made of, beside how near the nearest is.

    Returns:
        The report, `run.json`'s entry "memorisation": for the samples explained so far their nearest training image and
        rms distance, the distinct and effective number of training images that own their pixels at the noise level
        given; and the same distance between training images and their nearest others, for scale.
    """
    known = {entry["image"]: entry for entry in record.get("memorisation", {}).get("samples", [])}
    near = nearest_images(torch.stack([walk.image for walk in walks]).cpu(), bank)
    for i, walk in enumerate(walks):
        step = min(walk.steps, key=lambda step: abs(math.log(step.sigma / MEMORY_LEVEL)))
        distinct, effective = count_sources(step)
        known[walk.number] = {
            "image": walk.number,
            "nearest": int(near.image[i]),
            "rms": round(float(near.rms[i]), 4),
            "sigma": step.sigma,
            "sources": int(distinct[0]),
            "effective_sources": round(float(effective[0]), 2),
        }
    usual = usual_nearness(bank).rms.tolist() if len(bank) > 1 else []
    record["memorisation"] = {
        "samples": [known[image] for image in sorted(known)],
        "training_images_to_nearest_other": [round(rms, 4) for rms in usual],
    }
    write_atomically(out / "run.json", (json.dumps(record, indent=1) + "\n").encode())
    return record["memorisation"]


def warn_of_others(out: Path, walks: list[Walk]) -> None:
    """A warning for every sample that came out unlike the one in the run's folder."""
    try:
        with np.load(out / "samples.npz", allow_pickle=False) as arrays:
            saved = dict(zip(arrays["image"].tolist(), arrays["images"], strict=True))
    except (OSError, ValueError, KeyError, BadZipFile):
        return
    for walk in walks:
        if walk.number in saved:
            apart = float(np.abs(saved[walk.number] - walk.image.cpu().numpy()).max())
            if apart > SAME:
                message = (
                    f"image {walk.number} came out otherwise than in {out}, by up to {apart:.2g}: explained as here"
                )
                warnings.warn(message, stacklevel=2)


SAME = 0.02
"""Rounding may grow over a walk to this much of a pixel that lies in [-1, 1]."""
