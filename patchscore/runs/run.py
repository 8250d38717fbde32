"""A run: samples of one machine under one set of settings, made batch by batch into a folder that can be continued."""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import torch
from tqdm import tqdm

from .. import checks
from ..denoiser import ScoreMachine
from ..distributed import Sharded, Team
from ..draw import images as pictures
from ..mixed import MixedBank
from ..nearest import Nearness, nearest_images
from ..noise import get_schedule
from ..sampling import Step, labels_in_turn, sample
from ..version import __version__
from .batches import MOST_IMAGES
from .folder import FLAT_VERSION, SINGLE_PNGS, RunFolder, files_of, new_record
from .formats import Shown

SHOWN = 6
"""Images whose trajectories are kept and drawn."""

GRID = 100
"""Images in grid.png, the first: more are too small to see, and one picture of 50,000 does not fit in memory."""


class Run:
    """Samples of one machine under one set of settings, in the folder `out`. Use as a context: it holds a lock.

    Args:
        out: the folder; made if absent.
        machine: the denoiser.
        settings: what `sample` takes and what decides the images: steps, schedule, sampler, labels (a list taken in
            turn, or None), seed, and size, (height, width) or None for the machine's own.
        described: the machine's settings, which decide the images too; both are in `run.json` and must match.
        noted: what else `run.json` should tell, such as where the images came from.
        overwrite: start afresh where the folder holds another run.
        form: the format of the files of samples: "png", "npz", "zip" or "safetensors".
        subfolders: whether a run that begins puts PNGs into subfolders of a thousand.
        team: the ranks that make the images together, in one folder that all of them see; None: this process alone.
            Every rank makes a Run of the same arguments, and calls the same methods.
        shown: what makes pictures in [-1, 1] of samples [B, C, H, W] that are none, such as latents. Without it a bank
            with a value_range gets no pictures, and its `form` is "safetensors".

    Raises (on entering):
        ValueError: the folder holds another run, a run.json that is not one, or somebody else's files by our names;
            or another process is writing it.
        OSError: the folder cannot be written.
        Disagreement: ranks with other settings, banks or versions; names both.
        RankError: another rank failed, or cannot be reached any more; also while sampling.
    """

    def __init__(
        self,
        out: Path,
        machine: ScoreMachine,
        settings: dict[str, Any],
        described: dict[str, Any],
        noted: dict[str, Any],
        overwrite: bool,
        form: str = "png",
        subfolders: bool = False,
        team: Team | None = None,
        shown: Shown | None = None,
    ):
        self.team = team or Team()
        self.ranged = machine.bank.value_range is not None
        self.shown = shown
        channels, *own = machine.shape
        self.shape = (channels, *(settings.get("size") or own))
        self.folder = RunFolder(out, self.shape, form, subfolders and form == "png", shown)
        self.machine = machine
        self.settings = settings
        self.overwrite = overwrite
        self.record = new_record(
            {
                "settings": {**described, **settings},
                "noted": noted,
                "bank": {
                    "fingerprint": machine.bank.fingerprint,
                    "images": len(machine.bank),
                    "shape": machine.shape,
                    "class_names": machine.bank.class_names,
                },
                "samples": {"format": form, "subfolders": subfolders and form == "png"},
                "versions": _versions(),
            }
        )
        self.made: set[int] = set()
        self._whole = 0

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            with self.team.ranks.failing_together():
                if self.team.first:
                    opened.enter_context(self.folder.open())
                    self._take_up()
            told = {name: self.record[name] for name in ("settings", "bank", "versions")}
            self.team.ranks.agree({**told["settings"], **told}, "all ranks of a run take the same")
            made, self.record["samples"] = self.team.share([sorted(self.made), self.record["samples"]])
            if not self.team.first:
                self.made = set(made)
                self.folder = RunFolder(self.folder.path, self.shape, **files_of(self.record), shown=self.shown)
                self.trajectories = _Trajectories({}, self.shape)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def _take_up(self) -> None:
        """Takes over what an earlier call left in the folder, if it was made with the same settings."""
        try:
            earlier = self.folder.record()
            if earlier is None and (path := self.folder.foreign()):
                raise _Foreign(f"{path}: exists and is of no run; choose another --out")
            if earlier is not None and (difference := self._difference(earlier)):
                if earlier["version"] == FLAT_VERSION or self.folder.has_images():
                    raise ValueError(difference)
                self.folder.clear()  # begun, but nothing is made that could mix
                earlier = None
        except _Foreign:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not self.overwrite:
                path = self.folder.path / "run.json"
                raise ValueError(f"{path}: {error}; choose another --out, or --overwrite") from None
            self.folder.clear()
            earlier = None
        if earlier is not None:
            if "memorisation" in earlier:
                self.record["memorisation"] = earlier["memorisation"]
            # Runs that began small, or before there were subfolders, stay as they are.
            self.record["samples"] = earlier.get("samples", SINGLE_PNGS)
            self.folder = RunFolder(self.folder.path, self.shape, **files_of(self.record), shown=self.shown)
        made = self.folder.begin(self.record)
        self.trajectories = _Trajectories(self.folder.trajectories(), self.shape)
        self.made = {image for image in made if image >= SHOWN or image in self.trajectories.x}

    def _difference(self, earlier: dict[str, Any]) -> str | None:
        """Why the run in the folder cannot be continued by this one."""
        if earlier["version"] == FLAT_VERSION:
            return "holds a run of patchscore 0.1.0, which `explain` takes but which is not continued"
        if earlier["bank"]["fingerprint"] != self.record["bank"]["fingerprint"]:
            return "holds a run over other training images"
        kept, asked = (files_of(record)["form"] for record in (earlier, self.record))
        if kept != asked:
            return f"holds a run whose samples are {kept}, asked for {asked}"
        before, now = earlier["settings"], self.record["settings"]
        for name in now:
            if before.get(name) != now[name]:
                if isinstance(now[name], dict):
                    return f"holds a run with other {name}"
                return f"holds a run with {name} {before.get(name)}, asked for {now[name]}"
        return None

    def sample(self, n: int, batch_size: int, device: str, progress: bool = True) -> int:
        """Makes images 0..n-1 as far as they are not there yet, then the pictures; returns how many were there.

        Raises:
            ValueError: n beyond what a folder takes, or no room for them on the disk.
        """
        n = checks.integer("-n", n, at_least=1, at_most=MOST_IMAGES)
        missing = [image for image in range(n) if image not in self.made]
        levels = get_schedule(self.settings["schedule"], self.settings["steps"])
        with self.team.ranks.failing_together():
            if self.team.first:
                self.folder.check_space(len(missing), len(levels), sum(image < SHOWN for image in missing))
        self.team.ranks.agree({}, "")
        stretches = [range(first, first + count) for first, count in _stretches(missing, batch_size)]
        # Trajectories are one file, of the first rank's group.
        own = [images for images in stretches if images.start < SHOWN]
        others = stretches[len(own) :]
        hidden = not (progress and self.team.first)
        try:
            with (
                self.team.working(),
                tqdm(total=len(missing) * len(levels), unit="step", desc="sampling", delay=2, disable=hidden) as bar,
            ):
                for images in own if self.team.part == 0 else ():
                    self._sample_batch(images, device, bar)
                for number in self.team.batches(len(others)):
                    self._sample_batch(others[number], device, bar)
                self.team.end(lambda made: bar.update(made - bar.n))
        except KeyboardInterrupt:
            if self.team.first:
                self._pack(last=True)
            raise
        if self.team.first:
            self.made |= self.folder.merge_parts()
            self._pack(last=True)
            self._draw()
        return n - len(missing)

    def _sample_batch(self, images: range, device: str, bar: tqdm) -> None:
        start, seconds, kept = time.perf_counter(), [], [image for image in images if image < SHOWN]
        x: dict[int, list[np.ndarray]] = {image: [] for image in kept}
        x0: dict[int, list[np.ndarray]] = {image: [] for image in kept}
        final = None
        # Of pixels three digits; of other values as many as they have.
        kept_as = np.float32 if self.ranged else np.float16

        def on_step(step: Step) -> None:
            nonlocal start, final
            now = time.perf_counter()
            seconds.append(round(now - start, 4))
            start = now
            for image in kept:
                at = image - images.start
                x[image].append(step.x[at].cpu().numpy().astype(kept_as))
                x0[image].append(step.x0[at].cpu().numpy().astype(kept_as))
            # Every sampler ends on sigma = 0, where the image is what was denoised last.
            final = step.x0
            made = self.team.made(len(images))
            bar.update(made if self.team.ranks.size == 1 else made - bar.n)

        sample(
            self.machine,
            n=len(images),
            first=images.start,
            batch_size=len(images),
            device=device,
            callback=on_step,
            progress=False,
            **self.settings,
        )
        assert final is not None
        final = (final if self.ranged else final.clamp(-1, 1)).to("cpu", torch.float32)
        nearest = self._nearest(final)
        if not self.team.leads:
            return
        if kept:
            self.trajectories.add(x, x0)
            schedule = get_schedule(self.settings["schedule"], self.settings["steps"])
            self.folder.save_trajectories(
                {
                    **self.trajectories.arrays(),
                    "alphas": schedule.alphas[:-1].numpy(),
                    "sigmas": schedule.sigmas[:-1].numpy(),
                }
            )
        self._save_batch(images, final, nearest, device, seconds)
        self.made.update(images)
        if self.team.first:
            self._pack(last=False)

    def _pack(self, last: bool) -> None:
        """Brings files of several images up to date with the images before the first that is missing."""
        while self._whole in self.made:
            self._whole += 1
        self.folder.pack(self.settings["labels"], self._whole, last)

    def _nearest(self, final: torch.Tensor) -> Nearness | None:
        """The training images nearest to some samples; those of another size have none, nor where sizes are mixed."""
        if self.shape != self.machine.shape or isinstance(self.machine.bank, MixedBank):
            return None
        part = self.machine.held(None)
        assert part is not None
        near = nearest_images(final, part)
        if not isinstance(self.machine, Sharded):
            return near
        ranks, numbers = self.machine.ranks, self.machine.numbers(None)[near.image]
        rms, rank = ranks.stack(near.rms).min(0)
        return Nearness(ranks.stack(numbers).gather(0, rank[None])[0], rms)

    def _save_batch(
        self, images: range, final: torch.Tensor, near: Nearness | None, device: str, seconds: list[float]
    ) -> None:
        labels = labels_in_turn(self.settings["labels"], images) or [None] * len(images)
        entries: list[dict[str, Any]] = [{"label": label} for label in labels]
        if near is not None:
            for entry, image, rms in zip(entries, near.image, near.rms, strict=True):
                entry["nearest"] = {"image": int(image), "rms": round(float(rms), 4)}
        served = {"engine": self.machine.engine_on(device), "device": device, "seconds_per_step": seconds}
        self.folder.save_batch(images, final.numpy(), entries, served, self.team.part)

    def _draw(self) -> None:
        if self.ranged and self.shown is None:
            return
        shown = self.shown or (lambda images: images)
        rows = [row for image in sorted(self.made)[:GRID] if (row := self.folder.rows.read(image)) is not None]
        self.folder.save_picture("grid.png", pictures.grid(shown(torch.from_numpy(np.stack(rows)))))
        arrays = self.trajectories.arrays()
        if arrays:
            ratios = get_schedule(self.settings["schedule"], self.settings["steps"]).ratios[:-1].tolist()
            x, x0 = (
                torch.stack([shown(steps) for steps in torch.from_numpy(arrays[name]).float()]) for name in ("x", "x0")
            )
            sizes = [self.machine.patch_size_at(sigma) for sigma in ratios]
            picture = pictures.trajectories(x, x0, ratios, sizes, zoom=max(1, round(84 / x.shape[-1])))
            self.folder.save_picture("trajectory.png", picture)


class _Foreign(ValueError):
    """Files of somebody else, which are not removed even on demand."""


class _Trajectories:
    """The noisy and denoised images of the first images at every step, by number."""

    def __init__(self, arrays: dict[str, np.ndarray], shape: tuple[int, int, int]):
        self.x: dict[int, np.ndarray] = {}
        self.x0: dict[int, np.ndarray] = {}
        if {"image", "x", "x0"} <= arrays.keys() and arrays["x"].shape[2:] == arrays["x0"].shape[2:] == shape:
            numbers = arrays["image"].tolist()
            self.x = dict(zip(numbers, arrays["x"], strict=False))
            self.x0 = dict(zip(numbers, arrays["x0"], strict=False))

    def add(self, x: dict[int, list[np.ndarray]], x0: dict[int, list[np.ndarray]]) -> None:
        self.x |= {image: np.stack(steps) for image, steps in x.items()}
        self.x0 |= {image: np.stack(steps) for image, steps in x0.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = sorted(self.x)
        if not numbers:
            return {}
        x, x0 = ([part[image] for image in numbers] for part in (self.x, self.x0))
        return {"image": np.array(numbers), "x": np.stack(x), "x0": np.stack(x0)}


def _stretches(images: list[int], most: int) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, count), at most so many at a time."""
    stretches: list[tuple[int, int]] = []
    for image in images:
        if stretches and sum(stretches[-1]) == image and stretches[-1][1] < most:
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((image, 1))
    return stretches


def _versions() -> dict[str, str]:
    return {
        "patchscore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
