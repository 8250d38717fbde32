"""Pairs a second of every exact engine and peer on the CPU, in one interleaved run.

A pair is a query pixel and a competing window. All queries of circular EquivariantLocalScore compete with all windows;
each contender gets as many images as fill its time slot, since a rate is what is compared. Errors are of the denoised
pixel, against `reference` in float64, all on the same few images. Writes benchmarks/results/exact_cpu.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peers
import record
import torch

import patchscore as ps
from patchscore import native
from patchscore.engines.reference import Reference
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.pixels import to_values
from patchscore.windows import Axis, Competition, Group

SIGMA = {3: 0.16, 5: 0.5, 7: 0.99, 11: 1.92, 17: 3.98, 25: 8.0}
"""The noise each patch size is calibrated to, roughly."""
OTHER_NOISE = ((3, 0.08), (3, 4.0))
"""One case where nearly all weights vanish, and one where none does."""
SLOT = 0.2  # seconds a measurement aims at
MOST_IMAGES = 2048
SHORT_SIZES = (3, 7, 17)
SMALLEST_BANK = {"sliding": 64}  # its vectors hold 16 images, and 16 more keep the second thread busy
MEMORY = 2**31

Denoise = Callable[[torch.Tensor, float, torch.Tensor, int], torch.Tensor]


# Contenders: denoise(z [1, C, H, W], sigma, train [N, C, H, W] in [-1, 1], k) -> [C, H * W].


def competition(k: int, size: int) -> Competition:
    axis = Axis(range(size), range(k // 2, size - k // 2))
    return Competition(k, "circular", (Group(axis, axis),))


def by_engine(engine) -> Denoise:
    def denoise(z, sigma, train, k):
        bank, noise = ps.PatchBank(train), torch.tensor([sigma], dtype=torch.float64)
        return engine.posterior_sum(z, noise, bank, competition(k, z.shape[-1]), MEMORY).mean[0].flatten(1)

    return denoise


def by_peer(prepare: peers.Prepare) -> Denoise:
    """Windows are materialised anew in every call, as the bank may not fit in memory so."""
    return lambda z, sigma, train, k: prepare(z, sigma, train, k)()[0].flatten(1)


def contenders() -> dict[str, Denoise]:
    serving = peers.found(torch.device("cpu"), lambda reason: print(f"skipped {reason}"))
    return {
        "sliding": by_engine(SlidingCpu()),
        "reference": by_engine(Reference()),
        **{name: by_peer(prepare) for name, prepare in serving.items()},
    }


# Data.


def images_of(path: str | None, channels: int, size: int, count: int) -> torch.Tensor:
    """uint8 [count, channels, size, size]: from a folder or tar of image files, or smooth random ones."""
    if path is None:
        return record.smooth(channels, size, count)
    found = record.shuffled(record.opened(path, size=size, channels=channels, limit=count))
    return found.repeat(-(-count // len(found)), 1, 1, 1)[:count].contiguous()


# Measuring.


def measure(case, engines: dict[str, Denoise], images: torch.Tensor, repeats: int) -> list[dict]:
    k, sigma, channels, size = case
    pairs_per_image = size**2 * (size - k + 1) ** 2
    z = to_values(images[:1]) + sigma * torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))
    exact = by_engine(Reference())(z.double(), sigma, images[:2], k)

    def call(name, count):
        train = images[:count] if name in ("sliding", "reference") else to_values(images[:count])
        start = time.perf_counter()
        result = engines[name](z, sigma, train, k)
        return time.perf_counter() - start, result

    rows = {}
    for name in engines:
        call(name, 1)
        error = (call(name, 2)[1].double() - exact).abs().max().item()
        count = min(SMALLEST_BANK.get(name, 2), len(images))
        while (seconds := call(name, count)[0]) < SLOT / 2 and count < min(MOST_IMAGES, len(images)):
            count = int(min(MOST_IMAGES, len(images), count * min(8.0, max(2.0, SLOT / seconds))))
        rows[name] = {
            "engine": name,
            "k": k,
            "sigma": sigma,
            "channels": channels,
            "size": size,
            "images": count,
            "pairs": count * pairs_per_image,
            "error": error,
            "seconds": [],
        }
    for _ in range(repeats):
        for name, row in rows.items():
            row["seconds"].append(call(name, row["images"])[0])
    for row in rows.values():
        seconds = row.pop("seconds")
        row |= {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
        row["pairs_per_second"] = row["pairs"] / row["seconds_median"]
    return list(rows.values())


def ceilings() -> dict[str, float]:
    """Fused multiply-adds and exponentials a second, as torch's own kernels reach them on the same threads."""

    def best(work, operations):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return operations / statistics.median(times)

    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    x, out = torch.randn(64, 1 << 14), torch.empty(64, 1 << 14)
    return {
        "fused_multiply_adds_per_second": best(lambda: a @ b, 1536**3),
        "exponentials_per_second": best(lambda: [torch.exp(x, out=out) for _ in range(8)], 8 * x.numel()),
    }


def table(rows: list[dict]) -> str:
    """Billions of pairs a second, and how many times `sliding` is ahead."""
    names = list(dict.fromkeys(row["engine"] for row in rows))
    lines = ["| case | " + " | ".join(names) + " | worst error of sliding |", "| --- " * (len(names) + 2) + "|"]
    cases = dict.fromkeys((row["size"], row["channels"], row["k"], row["sigma"]) for row in rows)
    for size, channels, k, sigma in cases:
        found = {
            r["engine"]: r for r in rows if (r["size"], r["channels"], r["k"], r["sigma"]) == (size, channels, k, sigma)
        }
        ours = found["sliding"]["pairs_per_second"]
        cells = [f"{size} x {size} x {channels}, k = {k}, sigma = {sigma}"]
        for name in names:
            rate = found[name]["pairs_per_second"]
            cells.append(f"{rate / 1e9:.3f}" + ("" if name == "sliding" else f" ({ours / rate:.1f}x)"))
        lines.append("| " + " | ".join([*cells, f"{found['sliding']['error']:.1e}"]) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Pairs a second against patch size, in the images that were measured first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size, channels = rows[0]["size"], rows[0]["channels"]
    figure, ax = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for name in dict.fromkeys(row["engine"] for row in rows):
        same = [r for r in rows if (r["engine"], r["size"], r["channels"]) == (name, size, channels)]
        same = sorted((r["k"], r["pairs_per_second"]) for r in same if r["sigma"] == SIGMA[r["k"]])
        ax.semilogy([k for k, _ in same], [rate for _, rate in same], "o-", ms=4, label=name)
    ax.set_xlabel("patch size, at the noise it is calibrated to")
    ax.set_ylabel("(pixel, window) pairs a second")
    ax.set_title(f"{size} x {size}, {channels} channels", fontsize=9)
    ax.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder or tar of images to use instead of smooth random ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--channels", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--short", action="store_true", help="three cases at 32 x 32 in colour, three repeats")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.sizes, options.channels = 3, [32], [3]
    if options.images and not Path(options.images).exists():
        print(f"{options.images}: not found, taking smooth random images", file=sys.stderr)
        options.images = None
    if reason := native.missing:
        sys.exit(f"engine sliding: {reason}")

    engines, rows = contenders(), []
    speed = ceilings()
    for size in options.sizes:
        for channels in options.channels:
            images = images_of(options.images, channels, size, MOST_IMAGES)
            cases = [(k, sigma, channels, size) for k, sigma in SIGMA.items()]
            if size == 32:
                cases = [*((k, sigma, channels, size) for k, sigma in OTHER_NOISE), *cases]
            if options.short:
                cases = [case for case in cases if case[0] in SHORT_SIZES and case[1] == SIGMA[case[0]]]
            for case in cases:
                rows += measure(case, engines, images, options.repeats)
                print(table(rows[-len(engines) :]).splitlines()[-1], flush=True)
    data = "smooth random" if options.images is None else Path(options.images).name
    simd = os.environ.get("PATCHSCORE_SIMD") or native.native.simd_levels()[0]
    record.write("exact_cpu", __doc__.splitlines()[0], simd=simd, data=data, ceilings=speed, rows=rows)
    draw(rows, record.PICTURES / "exact-cpu.png")
    print(table(rows))
    print({name: f"{value:.3g}" for name, value in speed.items()})


if __name__ == "__main__":
    main()
