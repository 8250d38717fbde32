"""Time and memory of the CPU engines against bank size, image size, batch, patch size and threads, with exponents.

One quantity at a time around one base (32 x 32 in colour, k = 7, sigma = 0.99, zeros padding), engines in turns at
every point, for at most --seconds. Writes benchmarks/results/scaling.json and docs/images/scaling.png; larger banks are
in paper.py.

    python benchmarks/scaling.py --images cifar10/train           (under 10 minutes)
    python benchmarks/scaling.py --short                          (under 2, on smooth random images)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import record
import torch
from torch.nn import functional

import patchscore as ps
from patchscore import native
from patchscore.engines import EXACT
from patchscore.engines.base import serve
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.reference import Reference
from patchscore.engines.sliding.cpu import SlidingCpu

MEMORY = 2**31
BUDGET = 0.01
SIDE, K, SIGMA, WINDOWS, BATCH = 32, 7, 0.99, 100_000, 1
CALIBRATED = {3: 0.157, 5: 0.411, 7: 0.988, 9: 1.35, 11: 1.92, 13: 2.35, 15: 2.98, 17: 3.98}
"""The noise that the published CIFAR-10 table gives each patch size, roughly."""

SERIES = {
    "windows": (30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000),
    "side": (16, 24, 32, 48, 64, 96, 128),
    "batch": (1, 2, 4, 8, 16),
    "k": tuple(CALIBRATED),
    "threads": (1, 2, 4, 8, 16, 32, 64),
}
SHORT = {
    "windows": (30_000, 100_000, 300_000),
    "side": (16, 32, 64),
    "batch": (1, 4),
    "k": (3, 7, 17),
    "threads": (1, 2),
}
MOST_PAIRS = {"reference": 3e8, "pruned": math.inf, "sliding": math.inf}
"""A call with more is left out: it would take most of the time there is."""
MOST_INDEXED = 3_100_000
INDEXING = 8e-5
"""Windows that are indexed for a measurement (pruned_cpu.py has larger ones), and the seconds to allow for each."""
FEWER = {"reference": 0.1}
"""The share of the bank that a slow engine gets where the bank is not what varies. Its row says so, in windows."""
LEAST_IMAGES = {"reference": 1}
"""16 for the others, whose vectors hold as many."""


def pixels_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 images at another size."""
    if images.shape[-1] == side:
        return images
    resized = functional.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def bank_of(images: torch.Tensor, windows: float, side: int, k: int, least: int) -> ps.PatchBank:
    """As many images as hold so many windows of k, the same again where there are too few."""
    count = max(least, round(windows / (side - k + 1) ** 2))
    some = images[torch.arange(count) % len(images)] if count > len(images) else images[:count]
    return ps.PatchBank(pixels_of(some, side))


def trim() -> None:
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in record._lines("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def grown(work) -> float | None:
    """MiB by which the process grew at most during a call; None where the kernel does not tell."""
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    work()
    most = resident("VmHWM")
    return None if before is None or most is None else max(0, most - before) / 2**20


def measure(works: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Memory of a first call of each, then seconds, in turns; fewer turns where a call takes long."""
    found: dict[str, dict] = {}
    for name, work in works.items():
        start = time.perf_counter()
        memory = grown(work)
        took = time.perf_counter() - start
        found[name] = {"memory_mib": memory, "seconds": [], "turns": repeats if took < 2 else 3 if took < 5 else 1}
    for turn in range(repeats):
        for name, work in works.items():
            if turn < found[name]["turns"]:
                start = time.perf_counter()
                work()
                found[name]["seconds"].append(time.perf_counter() - start)
    for row in found.values():
        seconds = row.pop("seconds")
        row |= {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
    return found


class Bench:
    def __init__(self, images: torch.Tensor, options: argparse.Namespace, folder: Path):
        self.images, self.folder = images, folder
        self.repeats = 3 if options.short else 5
        self.deadline = time.monotonic() + options.seconds
        self.rows: list[dict] = []
        self.skipped: list[str] = []
        self.indexes: dict[tuple, ps.PatchIndex] = {}

    def works(self, series: str, windows: float, side: int, k: int, sigma: float, batch: int) -> dict:
        """name -> (what it works on, what to call)."""
        works = {}
        for name in ("sliding", "reference", "pruned"):
            engine = {"sliding": SlidingCpu(), "reference": Reference()}.get(name)
            if name == "sliding" and native.missing:
                continue
            share = 1 if series == "windows" else FEWER.get(name, 1)
            bank = bank_of(self.images, windows * share, side, k, LEAST_IMAGES.get(name, 16))
            machine = ps.EquivariantLocalScore(bank, k)
            pairs = batch * len(bank) * machine.competition(k).pairs_per_image
            inside = len(bank) * (side - k + 1) ** 2
            about = {"windows": inside, "images": len(bank), "pairs": pairs}
            late = name == "pruned" and time.monotonic() + INDEXING * inside > self.deadline
            if pairs > MOST_PAIRS[name] or (name == "pruned" and inside > MOST_INDEXED) or late:
                continue
            if name == "pruned":
                index = self.index(bank, k)
                if index is None:
                    continue
                engine = Pruned(index, BUDGET, None, seed=0)
                about["index_bytes"] = sum(file["bytes"] for file in index.at(k).meta["files"].values())
                about["build_seconds"] = index.at(k).meta.get("build_seconds")
            z = noisy(bank, sigma, batch)
            level, competition = torch.full((batch,), sigma, dtype=torch.float64), machine.competition(k)
            works[name] = (
                about,
                # Whole images, of which `pruned` leaves the edges to exact engines.
                lambda e=engine, z=z, s=level, b=bank, c=competition: serve((e, *EXACT), e.name, z, s, b, c, MEMORY)[0],
            )
        return works

    def index(self, bank: ps.PatchBank, k: int) -> ps.PatchIndex | None:
        key = bank.fingerprint, k
        if key not in self.indexes:
            try:
                path = self.folder / f"{key[0][:12]}-{k}"
                self.indexes[key] = ps.PatchIndex.build(bank, k, path, progress=False)
            except ImportError as reason:
                if not any(what.startswith("pruned") for what in self.skipped):
                    self.skipped.append(f"pruned: {reason}")
                return None
        return self.indexes[key]

    def point(self, series: str, at: float, windows: float, side: int, k: int, sigma: float, batch: int) -> None:
        if time.monotonic() > self.deadline:
            self.skipped.append(f"{series} at {at:g}: out of time")
            return
        works = self.works(series, windows, side, k, sigma, batch)
        timed = measure({name: work for name, (_, work) in works.items()}, self.repeats)
        for name, (about, _) in works.items():
            setting = {"side": side, "k": k, "sigma": sigma, "batch": batch, "threads": torch.get_num_threads()}
            # The bank's own size is what the point lies at.
            x = about["windows"] if series == "windows" else at
            row = {"series": series, "x": x, "engine": name, **setting, **about, **timed[name]}
            self.rows.append(row)
            memory = "" if row["memory_mib"] is None else f"  {row['memory_mib']:8.1f} MiB"
            rate = f"{row['pairs'] / row['seconds_median'] / 1e9:6.3f}e9 pairs/s"
            print(f"{series:8} {x:<12,} {name:10} {row['seconds_median']:9.4f} s  {rate}{memory}", flush=True)


def noisy(bank: ps.PatchBank, sigma: float, batch: int) -> torch.Tensor:
    """Mirrored, so that the images are not those of the bank."""
    x0 = torch.cat([bank.chunk(i % len(bank), i % len(bank) + 1) for i in range(batch)]).flip(-1)
    return x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))


def fits(rows: list[dict]) -> list[dict]:
    """seconds ~ x^exponent by least squares on logarithmic axes, for every series and engine with three points."""
    found = []
    for series, engine in dict.fromkeys((row["series"], row["engine"]) for row in rows):
        same = [row for row in rows if (row["series"], row["engine"]) == (series, engine)]
        if len(same) < 3 and not (series == "threads" and len(same) == 2):
            continue
        x = torch.tensor([math.log(row["x"]) for row in same], dtype=torch.float64)
        fit = {"series": series, "engine": engine, "points": len(same), "from": same[0]["x"], "to": same[-1]["x"]}
        for name in ("seconds_median", "memory_mib", "pairs"):
            values = [row[name] for row in same]
            if any(value is None or value <= 0 for value in values):
                continue
            y = torch.tensor([math.log(value) for value in values], dtype=torch.float64)
            fit[name.split("_")[0]] = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
        found.append(fit)
    return found


# Drawing.

LABELS = {
    "windows": "windows in the bank",
    "side": "side of the image, at as many windows",
    "batch": "noisy images at once",
    "k": "patch size, at as many images",
    "threads": "threads",
}


def draw(rows: list[dict], fitted: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    series = list(dict.fromkeys(row["series"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(series), figsize=(3.2 * len(series), 5.6), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(series):
        for line, (figure_of, label) in enumerate(
            (("seconds_median", "seconds"), ("memory_mib", "MiB beyond the bank"))
        ):
            ax = axes[line][column]
            for engine, mark in (("sliding", "o-"), ("pruned", "s-"), ("reference", "^-")):
                same = [row for row in rows if (row["series"], row["engine"]) == (name, engine) and row[figure_of]]
                if not same:
                    continue
                fit = next((f for f in fitted if (f["series"], f["engine"]) == (name, engine)), {})
                exponent = fit.get(figure_of.split("_")[0])
                shown = engine if exponent is None else f"{engine}, e = {exponent:.2f}"
                ax.loglog([row["x"] for row in same], [row[figure_of] for row in same], mark, ms=4, label=shown)
            ax.set_xlabel(LABELS[name], fontsize=8)
            ax.set_ylabel(label, fontsize=8)
            ax.tick_params(labelsize=7)
            ax.xaxis.set_minor_formatter(NullFormatter())
            if name != "windows":
                at = sorted({row["x"] for row in rows if row["series"] == name})
                ax.set_xticks(at, [f"{x:g}" for x in at])
            if ax.lines:
                ax.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images, resized to 32 x 32; else smooth random ones")
    parser.add_argument("--seconds", type=float, help="start no measurement after so many; 480, or 100 with --short")
    parser.add_argument("--short", action="store_true", help="few points")
    options = parser.parse_args()
    options.seconds = options.seconds or (100 if options.short else 480)
    if options.images:
        images = record.shuffled(record.opened(options.images, size=SIDE, channels=3))
    else:
        images = record.smooth(3, SIDE, 2000)
    data = options.images.name if options.images else "smooth random"
    series = SHORT if options.short else SERIES
    windows = 30_000 if options.short else WINDOWS
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(images, options, Path(folder))
        for count in series["windows"]:
            bench.point("windows", count, count, SIDE, K, SIGMA, BATCH)
        for side in series["side"]:
            bench.point("side", side, windows, side, K, SIGMA, BATCH)
        for k in series["k"]:
            # As many images as at the base.
            images_at_base = windows / (SIDE - K + 1) ** 2
            bench.point("k", k, images_at_base * (SIDE - k + 1) ** 2, SIDE, k, CALIBRATED[k], BATCH)
        for batch in series["batch"]:
            bench.point("batch", batch, windows, SIDE, K, SIGMA, batch)
        threads = torch.get_num_threads()
        for count in (count for count in series["threads"] if count <= (os.cpu_count() or 1)):
            torch.set_num_threads(count)
            bench.point("threads", count, windows, SIDE, K, SIGMA, BATCH)
        torch.set_num_threads(threads)
        content = {
            "data": data,
            "budget": BUDGET,
            "rows": bench.rows,
            "fits": fits(bench.rows),
            "skipped": bench.skipped,
        }
    record.write("scaling", __doc__.splitlines()[0], **content)
    draw(content["rows"], content["fits"], record.PICTURES / "scaling.png")
    for fit in content["fits"]:
        exponents = ", ".join(f"{name} ~ x^{fit[name]:.2f}" for name in ("seconds", "memory", "pairs") if name in fit)
        print(f"{fit['series']:8} {fit['engine']:10} {fit['points']} points: {exponents}")
    for what in content["skipped"]:
        print(f"skipped: {what}")


if __name__ == "__main__":
    main()
