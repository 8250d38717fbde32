"""What a share of the pairs buys: error, stated error and time of `pruned` beside exact sums and other ways to cut.

Every step of a published table, on held-out images with that step's noise: at a budget of 1% of the pairs, and at the
least budget whose error meets the aim (0.008 up to k = 7, 0.015 above). Contenders of equal time, on the interior:
the nearest windows FAISS finds (top-k + softmax), exact sums over a uniform subset of the images, and over the images
that a coarse comparison of whole images picks. Writes results/pruned_cpu.json and docs/images/pruned-time.png.

Times are processor seconds, which other work on the machine changes less than it does the clock.

    python benchmarks/pruned_cpu.py --images cifar10/train --indexes /somewhere/large [--only fashion-mnist-10000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import record
import torch
from peers import screening, top_k, uniform

import patchscore as ps
from patchscore import engines
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.pixels import to_values
from patchscore.windows import Competition

MEMORY = 2**31
REPEATS = 5
BUDGET = 0.01
LESS = (0.0003, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007)
SWEEP = {"budget": (0.001, 0.003, 0.01, 0.03), "share": (0.01, 0.03, 0.1, 0.3), "nprobe": (4, 16, 64, 256)}
SWEPT = (3, 7, 11, 17)
FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


def timed(run: Callable, *given, **options) -> tuple:
    start = time.process_time()
    result = run(*given, **options)
    return result, time.process_time() - start


def exact(z, sigma, bank, competition):
    return SlidingCpu().posterior_sum(z, sigma, bank, competition, MEMORY)


def estimated(pruned: Pruned, z, sigma, bank, competition):
    """What a machine serves that names the engine: edges and what it leaves alone by exact sums."""
    return engines.serve((pruned, *engines.EXACT), "pruned", z, sigma, bank, competition, MEMORY)[0]


def subset(z, sigma, bank, competition, images):
    """Exact sums over some of the images."""
    return exact(z, sigma, ps.PatchBank(bank.images[images]), competition).mean


def screened(z, sigma, bank, coarse, competition, count):
    """Exact sums over the `count` images nearest to z at a quarter of the resolution."""
    return subset(z, sigma, bank, competition, screening.images(z, coarse, count))


def inside(x, k):
    r = k // 2
    return x[:, :, r : x.shape[2] - r, r : x.shape[3] - r]


def rms(error: torch.Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def interior(competition: Competition) -> Competition:
    free = tuple(group for group in competition.groups if not group.rows.locked and not group.cols.locked)
    return Competition(competition.patch_size, competition.padding_mode, free)


def steps_of(setting: str, bank, held_out, index, table, repeats):
    machine = ps.EquivariantLocalScore(bank, table, padding_mode="zeros")
    coarse = screening.coarse(bank.chunk(0, len(bank)))
    schedule = ps.get_schedule("cosine", 20)
    generator = torch.Generator().manual_seed(0)
    rows, sweep = [], []
    swept = set(SWEPT)
    for step in range(len(schedule.sigmas) - 1):
        level = float(schedule.sigmas[step] / schedule.alphas[step])
        k = machine.patch_size_at(level)
        sigma = torch.full((len(held_out),), level, dtype=torch.float64)
        z = held_out + level * torch.randn(held_out.shape, generator=generator)
        competition = machine.competition(k)
        inner = interior(competition)
        pruned = Pruned(index, BUDGET, None, seed=0)
        seconds: dict[str, list[float]] = {"exact": [], "pruned": []}
        for _ in range(repeats):
            truth, spent = timed(exact, z, sigma, bank, competition)
            seconds["exact"].append(spent)
            sums, spent = timed(estimated, pruned, z, sigma, bank, competition)
            seconds["pruned"].append(spent)
        error, stderr = sums.mean - truth.mean, sums.stderr
        row = {
            "setting": setting,
            "step": step,
            "sigma": level,
            "k": k,
            "images": len(z),
            "pairs_share": sums.pairs / (len(z) * len(bank) * competition.pairs_per_image),
            "rms": rms(error),
            "worst": error.abs().max().item(),
            "stderr_rms": rms(stderr),
            **{f"within_{n}_stderr": share_within(error, stderr, n) for n in (1, 2, 3)},
            "beyond_6_stderr": int((error.abs() > 6 * stderr + 1e-6).sum()),
            "values": int((stderr > 0).sum()),
            "silent": int(((error.abs() > 0.1) & (stderr < 0.02)).sum()),
            "exact_seconds": statistics.median(seconds["exact"]),
            "pruned_seconds": statistics.median(seconds["pruned"]),
        }
        row["faster"] = row["exact_seconds"] / row["pruned_seconds"]
        row |= least_budget(z, sigma, bank, competition, index, truth.mean, 0.008 if k <= 7 else 0.015, repeats)
        row["least_faster"] = row["exact_seconds"] / row["least_seconds"]

        # Others, in the time `pruned` takes for the interior.
        reference = inside(truth.mean, k)
        estimate, limit = timed(estimated, pruned, z, sigma, bank, inner)
        row["interior_rms"], row["interior_seconds"] = rms(inside(estimate.mean, k) - reference), limit
        _, whole = timed(exact, z, sigma, bank, inner)
        count = max(16, round(len(bank) * limit / whole))
        some = uniform.images(count, len(bank), generator)
        got, row["subset_seconds"] = timed(subset, z, sigma, bank, inner, some)
        row["subset_rms"] = rms(inside(got, k) - reference)
        got, row["screened_seconds"] = timed(screened, z, sigma, bank, coarse, inner, count)
        row["screened_rms"] = rms(inside(got, k) - reference)
        row["top_k_rms"], row["top_k_seconds"] = torch.inf, 0.0
        for nprobe in (1, 4, 16, 64, 256, 1024):
            got, spent = timed(top_k.interior_mean, z, sigma, index, k, nprobe)
            if spent > 1.2 * limit and row["top_k_seconds"]:
                break
            row["top_k_rms"], row["top_k_seconds"], row["top_k_nprobe"] = rms(got - reference), spent, nprobe
        rows.append(row)
        print(
            f"{setting} step {step:2} sigma {level:8.3f} k {k:2}  rms {row['rms']:.5f} worst {row['worst']:.3f} "
            f"within {row['within_1_stderr']:.3f} {row['within_2_stderr']:.3f} {row['within_3_stderr']:.3f} "
            f"silent {row['silent']}  {row['faster']:.1f}x, at budget "
            f"{row['least_budget']} rms {row['least_rms']:.5f} {row['least_faster']:.1f}x | interior "
            f"{row['interior_rms']:.5f} top-k {row['top_k_rms']:.5f} subset {row['subset_rms']:.5f} "
            f"screened {row['screened_rms']:.5f}",
            flush=True,
        )
        if k in swept:
            swept.discard(k)
            sweep += curve(setting, z, sigma, bank, coarse, index, k, level, inner, reference, generator)
    return rows, sweep


def share_within(error: torch.Tensor, stderr: torch.Tensor, n: int) -> float:
    """Of the values that were sampled, how many are off by at most n standard errors."""
    sampled = stderr > 0
    return (error.abs() <= n * stderr + 1e-6)[sampled].double().mean().item() if sampled.any() else 1.0


def least_budget(z, sigma, bank, competition, index, truth, aim: float, repeats: int) -> dict[str, float]:
    """The least budget whose error meets the aim, and its time."""
    for budget in (*LESS, BUDGET):
        engine = Pruned(index, budget, None, seed=0)
        error = rms(estimated(engine, z, sigma, bank, competition).mean - truth)
        if error <= aim:
            break
    spent = [timed(estimated, engine, z, sigma, bank, competition)[1] for _ in range(repeats)]
    return {"aim": aim, "least_budget": budget, "least_rms": error, "least_seconds": statistics.median(spent)}


def curve(setting, z, sigma, bank, coarse, index, k, level, inner, reference, generator):
    """Error against time of every contender at one step."""
    points = []

    def point(method: str, setting_value: float, run: Callable, *given) -> None:
        got, spent = timed(run, *given)
        got = got.mean if isinstance(got, ps.PosteriorSum) else got
        got = inside(got, k) if got.shape[2] == z.shape[2] else got
        points.append(
            {
                "setting": setting,
                "k": k,
                "sigma": level,
                "method": method,
                "at": setting_value,
                "seconds": spent / len(z),
                "rms": rms(got - reference),
            }
        )

    point("exact", 1, exact, z, sigma, bank, inner)
    for budget in SWEEP["budget"]:
        engine = Pruned(index, budget, None, seed=0)
        point("pruned", budget, estimated, engine, z, sigma, bank, inner)
    for share in SWEEP["share"]:
        some = uniform.images(max(16, round(share * len(bank))), len(bank), generator)
        point("uniform subset", share, subset, z, sigma, bank, inner, some)
        point("screened images", share, screened, z, sigma, bank, coarse, inner, len(some))
    for nprobe in SWEEP["nprobe"]:
        point("FAISS top-k", nprobe, top_k.interior_mean, z, sigma, index, k, nprobe)
    return points


def samples(setting: str, bank, index, table, n: int) -> dict[str, object]:
    """Whole samples from the same seeds, exact and pruned."""
    options = {"n": n, "steps": 20, "schedule": "cosine", "seed": 0}
    machine = ps.EquivariantLocalScore(bank, table, padding_mode="zeros", engine="sliding")
    truth, slow = timed(ps.sample, machine, **options)
    machine = ps.EquivariantLocalScore(bank, table, padding_mode="zeros", index=index, budget=BUDGET)
    got, fast = timed(ps.sample, machine, **options)
    r2 = record.r_squared(got, truth)
    row = {
        "setting": setting,
        "images": n,
        "r2_median": r2.median().item(),
        "r2_least": r2.min().item(),
        "exact_seconds": slow,
        "pruned_seconds": fast,
        "faster": slow / fast,
    }
    print(row, flush=True)
    return row


def draw(sweep, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = sorted({point["setting"] for point in sweep})
    sizes = sorted({point["k"] for point in sweep})
    figure, axes = pyplot.subplots(
        len(settings), len(sizes), figsize=(3.3 * len(sizes), 3 * len(settings)), squeeze=False, layout="constrained"
    )
    for line, setting in zip(axes, settings, strict=True):
        for ax, k in zip(line, sizes, strict=True):
            here = [point for point in sweep if point["setting"] == setting and point["k"] == k]
            for method, mark in (
                ("pruned", "o-"),
                ("FAISS top-k", "s--"),
                ("screened images", "^:"),
                ("uniform subset", "v:"),
            ):
                of = sorted((p["seconds"], p["rms"]) for p in here if p["method"] == method)
                ax.loglog([x for x, _ in of], [max(y, 1e-6) for _, y in of], mark, label=method)
            for point in here:
                if point["method"] == "exact":
                    ax.axvline(point["seconds"], color="gray", lw=1)
                    ax.text(point["seconds"], ax.get_ylim()[0], " exact", rotation=90, va="bottom", color="gray")
            ax.set_title(f"{setting}, k = {k}", fontsize=9)
            ax.set_xlabel("seconds an image")
            ax.set_ylabel("rms error")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def sizes_of(table: ps.ScaleTable) -> list[int]:
    """The patch sizes that the steps use."""
    return sorted({table(float(level)) for level in ps.get_schedule("cosine", 20).ratios[:-1]})


def open_index(bank, sizes, path: Path) -> tuple[ps.PatchIndex, dict[str, object]]:
    index = ps.PatchIndex.build(bank, sizes, path)
    windows = sum(index.at(k).meta["windows"] for k in index.patch_sizes)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    opened = timed(ps.PatchIndex.open, path, bank)[1]
    built = {"windows": windows, "bytes_a_window": size / windows, "open_seconds": opened}
    built["build_seconds"] = sum(index.at(k).meta["build_seconds"] for k in index.patch_sizes)
    print(built, flush=True)
    return index, built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of the CIFAR-10 training images; without it, left out")
    parser.add_argument("--indexes", type=Path, required=True, help="where indexes are kept or built (6 GB)")
    parser.add_argument("--only", nargs="*", help="settings, such as cifar10-20000")
    parser.add_argument("--batch", type=int, default=4, help="noisy images at a time (default 4)")
    parser.add_argument("--samples", type=int, default=4, help="whole samples; 0 for none (default 4)")
    given = parser.parse_args()
    settings = []
    if given.images:
        colour = record.opened(given.images, size=32).images
        colour = colour[np.random.default_rng(0).permutation(len(colour))]
        settings += [("cifar10-20000", colour, 20000, "cifar10-resnet-zeros")]
    if FASHION.exists():
        settings += [("fashion-mnist-10000", ps.PatchBank.open(FASHION).images, 10000, "fashionmnist-resnet-zeros")]
    target = record.RESULTS / "pruned_cpu.json"
    kept = json.loads(target.read_text()) if target.exists() and given.only else {}
    content = {name: list(kept.get(name, [])) for name in ("indexes", "rows", "sweep", "samples")}
    for name, images, count, table_name in settings:
        if given.only and name not in given.only:
            continue
        for part in content.values():
            part[:] = [row for row in part if row["setting"] != name]
        bank = ps.PatchBank(images[:count].clone())
        table = ps.ScaleTable.published(table_name)
        held_out = to_values(images[30000 : 30000 + given.batch])
        index, built = open_index(bank, sizes_of(table), given.indexes / f"{name}.index")
        content["indexes"].append({"setting": name, **built})
        rows, sweep = steps_of(name, bank, held_out, index, table, REPEATS)
        content["rows"] += rows
        content["sweep"] += sweep
        if given.samples:
            content["samples"].append(samples(name, bank, index, table, given.samples))
        record.write("pruned_cpu", "engine pruned on the CPU, budget 0.01 unless said, zeros padding", **content)
    draw(content["sweep"], record.PICTURES / "pruned-time.png")


if __name__ == "__main__":
    main()
