"""What a share of the pairs buys: error, stated error and time of `pruned` beside exact sums and other ways to cut.

Every step of a published table, held-out images with that step's noise, one at a time: exact sums and then every
budget, so that each image is one repeat. Contenders of equal time, on the interior: the nearest windows that FAISS
finds (top-k and softmax, for four sizes), exact sums over a uniform subset of the images, and over those that a coarse
comparison of whole images picks. Writes results/pruned_cpu.json after every step, docs/images/pruned-time.png and
docs/images/pruned-errors.png.

Times are processor seconds of one thread, which other work on the machine changes less than it does the clock.

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
BUDGETS = (0.0005, 0.001, 0.003, 0.01)
COMPARED = 0.01
"""Budget whose time contenders get."""
TOGETHER = 4
"""Images of one call, for contenders."""
SWEEP = {"budget": (0.001, 0.003, 0.01, 0.03), "share": (0.01, 0.03, 0.1, 0.3), "nprobe": (4, 16, 64, 256)}
SWEPT = (3, 7, 11, 17)
FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
BINS = np.linspace(-8, 8, 65)
"""Of errors in standard errors; those beyond count in the outermost."""


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


class Setting:
    """One bank with its index, the published patch sizes, and held-out images."""

    def __init__(self, name: str, bank: ps.PatchBank, held_out: torch.Tensor, index: ps.PatchIndex, table):
        self.name, self.bank, self.held_out, self.index = name, bank, held_out, index
        self.machine = ps.EquivariantLocalScore(bank, table, padding_mode="zeros")
        self.coarse = screening.coarse(bank.chunk(0, len(bank)))
        self.schedule = ps.get_schedule("cosine", 20)
        self.generator = torch.Generator().manual_seed(0)
        self.swept = set(SWEPT)

    def measured(self, steps: list[int] | None):
        """For every step: its rows, one for each budget; its contenders; the curves where its size is a new one."""
        for step in range(len(self.schedule.sigmas) - 1):
            level = float(self.schedule.sigmas[step] / self.schedule.alphas[step])
            k = self.machine.patch_size_at(level)
            z = self.held_out + level * torch.randn(self.held_out.shape, generator=self.generator)
            if steps is not None and step not in steps:
                continue
            about = {"setting": self.name, "step": step, "sigma": level, "k": k, "images": len(z)}
            rows, truth = self.budgets(z, level, k)
            others, sweep = self.contenders(z[:TOGETHER], level, k, truth[:TOGETHER], rows[0]["exact_seconds"])
            yield [about | row for row in rows], about | others, [about | point for point in sweep]

    def budgets(self, z: torch.Tensor, level: float, k: int) -> tuple[list[dict], torch.Tensor]:
        competition = self.machine.competition(k)
        sigma = torch.tensor([level], dtype=torch.float64)
        pairs = len(self.bank) * competition.pairs_per_image
        truths, runs = [], {budget: [] for budget in BUDGETS}
        for one in z.split(1):
            truth, slow = timed(exact, one, sigma, self.bank, competition)
            truths.append(truth.mean)
            for budget, found in runs.items():
                sums, fast = timed(
                    estimated, Pruned(self.index, budget, None, seed=0), one, sigma, self.bank, competition
                )
                found.append((sums.mean - truth.mean, sums.stderr, sums.pairs / pairs, slow, fast))
        rows = []
        for budget, found in runs.items():
            errors, stderrs, shares, slow, fast = zip(*found, strict=True)
            error, stderr = torch.cat(errors), torch.cat(stderrs)
            sampled = stderr > 0
            scores = (error / stderr)[sampled].clamp(-7.99, 7.99)
            rows.append({
                "budget": budget,
                "pairs_share": statistics.mean(shares),
                "rms": rms(error),
                "worst": error.abs().max().item(),
                "stderr_rms": rms(stderr),
                **{f"within_{n}_stderr": share_within(error, stderr, n) for n in (1, 2, 3)},
                "beyond_5_stderr": int((error.abs() > 5 * stderr + 1e-4)[sampled].sum()),
                "beyond_6_stderr": int((error.abs() > 6 * stderr + 1e-4)[sampled].sum()),
                "values": error.numel(),
                "sampled": int(sampled.sum()),
                "silent": int(((error.abs() > 0.1) & (stderr < 0.02)).sum()),
                "scores": np.histogram(scores.numpy(), BINS)[0].tolist(),
                "exact_seconds": statistics.median(slow),
                "pruned_seconds": statistics.median(fast),
                "faster": statistics.median(a / b for a, b in zip(slow, fast, strict=True)),
            })  # fmt: skip
            row = rows[-1]
            print(
                f"{self.name} sigma {level:8.3f} k {k:2} {budget:g}: rms {row['rms']:.5f} worst {row['worst']:.3f} "
                f"within {row['within_1_stderr']:.3f} {row['within_2_stderr']:.3f} {row['within_3_stderr']:.3f} "
                f"beyond 6 {row['beyond_6_stderr']} silent {row['silent']} of {row['sampled']}, {row['faster']:.1f}x",
                flush=True,
            )
        return rows, torch.cat(truths)

    def contenders(self, z, level: float, k: int, truth, slow: float) -> tuple[dict, list[dict]]:
        """Rms errors of the interior, each in the time that `pruned` takes for it. slow: exact seconds of an image."""
        bank, coarse, index = self.bank, self.coarse, self.index
        sigma, reference = torch.full((len(z),), level, dtype=torch.float64), inside(truth, k)
        generator = torch.Generator().manual_seed(k)  # its own: the noise of a step is the same if others are left out
        inner = interior(self.machine.competition(k))
        slow *= len(z) * inner.pairs_per_image / self.machine.competition(k).pairs_per_image

        def point(method: str, at: float, run: Callable, *given) -> dict:
            got, spent = timed(run, *given)
            got = got.mean if isinstance(got, ps.PosteriorSum) else got
            error = rms((inside(got, k) if got.shape[2] == z.shape[2] else got) - reference)
            return {"method": method, "at": at, "seconds": spent / len(z), "rms": error}

        def pruned(budget: float) -> dict:
            return point("pruned", budget, estimated, Pruned(index, budget, None, seed=0), z, sigma, bank, inner)

        def nearest(nprobe: int) -> dict:
            return point("FAISS top-k", nprobe, top_k.interior_mean, z, sigma, index, k, nprobe)

        own = pruned(COMPARED)
        limit = own["seconds"] * len(z)
        count = min(len(bank), max(16, round(len(bank) * limit / slow)))
        some = uniform.images(count, len(bank), generator)
        others = {
            "interior": own,
            "subset": point("uniform subset", count, subset, z, sigma, bank, inner, some),
            "screened": point("screened images", count, screened, z, sigma, bank, coarse, inner, count),
        }
        sweep: list[dict] = []
        if k in SWEPT:
            for nprobe in (1, 4, 16, 64, 256, 1024):
                found = nearest(nprobe)
                if found["seconds"] > 1.2 * own["seconds"] and "top_k" in others:
                    break
                others["top_k"] = found
        if k in self.swept:
            self.swept.discard(k)
            sweep = [{"method": "exact", "at": 1.0, "seconds": slow / len(z), "rms": 0.0}]
            sweep += [pruned(budget) for budget in SWEEP["budget"]]
            for share in SWEEP["share"]:
                some = uniform.images(max(16, round(share * len(bank))), len(bank), generator)
                sweep.append(point("uniform subset", share, subset, z, sigma, bank, inner, some))
                sweep.append(point("screened images", share, screened, z, sigma, bank, coarse, inner, len(some)))
            sweep += [nearest(nprobe) for nprobe in SWEEP["nprobe"]]
        print({name: round(found["rms"], 5) for name, found in others.items()}, flush=True)
        flat = {f"{name}_{of}": found[of] for name, found in others.items() for of in ("rms", "seconds")}
        return flat, sweep


def share_within(error: torch.Tensor, stderr: torch.Tensor, n: int) -> float:
    """Of the values that were sampled, how many are off by at most n standard errors."""
    sampled = stderr > 0
    return (error.abs() <= n * stderr + 1e-6)[sampled].double().mean().item() if sampled.any() else 1.0


def draw_times(sweep, path: Path) -> None:
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
            if not here:
                ax.set_axis_off()
                continue
            for point in here:
                if point["method"] == "exact":
                    ax.axvline(point["seconds"], color="gray", lw=1)
                    ax.text(point["seconds"], ax.get_ylim()[0], " exact", rotation=90, va="bottom", color="gray")
            ax.set_title(f"{setting}, k = {k}", fontsize=9)
            ax.set_xlabel("seconds an image")
            ax.set_ylabel("rms error")
    axes[-1, -1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_errors(rows, path: Path) -> None:
    """Errors in standard errors, over all steps, beside the normal distribution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = sorted({row["setting"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(4.5 * len(settings), 3.2), squeeze=False, layout="constrained"
    )
    middles, width = (BINS[1:] + BINS[:-1]) / 2, BINS[1] - BINS[0]
    for ax, setting in zip(axes[0], settings, strict=True):
        for budget in BUDGETS:
            counts = sum(
                np.array(row["scores"]) for row in rows if (row["setting"], row["budget"]) == (setting, budget)
            )
            ax.step(middles, counts / max(1, counts.sum()), where="mid", label=f"budget {budget:.2%}")
        ax.plot(middles, width * np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), "k:", label="normal")
        ax.set_yscale("log")
        ax.set_ylim(1e-7, 1)
        ax.set_xlabel("error in standard errors (outermost: and beyond)")
        ax.set_ylabel("share of pixel values")
        ax.set_title(setting, fontsize=9)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def sizes_of(table: ps.ScaleTable) -> list[int]:
    """The patch sizes that the steps use."""
    return sorted({table(float(level)) for level in ps.get_schedule("cosine", 20).ratios[:-1]})


def shuffled(images: torch.Tensor) -> torch.Tensor:
    """In an order of its own, the same each time: files lie class by class."""
    return images[np.random.default_rng(0).permutation(len(images))]


def open_index(bank, sizes, path: Path) -> tuple[ps.PatchIndex, dict[str, object]]:
    index = ps.PatchIndex.build(bank, sizes, path)
    windows = sum(index.at(k).meta["windows"] for k in index.patch_sizes)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    opened = timed(ps.PatchIndex.open, path, bank)[1]
    built = {"windows": windows, "bytes_a_window": size / windows, "open_seconds": opened}
    built["build_seconds"] = sum(index.at(k).meta["build_seconds"] for k in index.patch_sizes)
    print(built, flush=True)
    return index, built


def stays(row: dict, steps: list[int] | None) -> bool:
    """Of a setting that is measured again: whether it is a row of a step that is not."""
    return steps is not None and "step" in row and row["step"] not in steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of the CIFAR-10 training images; without it, left out")
    parser.add_argument("--indexes", type=Path, required=True, help="where indexes are kept or built (6 GB)")
    parser.add_argument("--only", nargs="*", help="settings, such as cifar10-20000")
    parser.add_argument("--steps", type=int, nargs="*", help="these steps alone, from 0; others stay as they are")
    parser.add_argument("--count", type=int, default=8, help="noisy images (default 8: an hour and ten minutes)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = []
    if FASHION.exists():
        settings += [("fashion-mnist-10000", ps.PatchBank.open(FASHION).images, 10000, "fashionmnist-resnet-zeros")]
    if given.images:
        colour = shuffled(record.opened(given.images, size=32).images)
        settings += [("cifar10-20000", colour, 20000, "cifar10-resnet-zeros")]
    target = record.RESULTS / "pruned_cpu.json"
    kept = json.loads(target.read_text()) if target.exists() and given.only else {}
    content = {name: list(kept.get(name, [])) for name in ("indexes", "rows", "contenders", "sweep")}
    for name, images, count, table_name in settings:
        if given.only and name not in given.only:
            continue
        for part in content.values():
            part[:] = [row for row in part if row["setting"] != name or stays(row, given.steps)]
        bank = ps.PatchBank(images[:count].clone())
        table = ps.ScaleTable.published(table_name)
        held_out = to_values(images[30000 : 30000 + given.count])
        index, built = open_index(bank, sizes_of(table), given.indexes / f"{name}.index")
        content["indexes"].append({"setting": name, **built})
        for rows, others, sweep in Setting(name, bank, held_out, index, table).measured(given.steps):
            content["rows"] += rows
            content["contenders"].append(others)
            content["sweep"] += sweep
            record.write("pruned_cpu", "engine pruned on the CPU, every step, zeros padding", **content)
    draw_times(content["sweep"], record.PICTURES / "pruned-time.png")
    draw_errors(content["rows"], record.PICTURES / "pruned-errors.png")


if __name__ == "__main__":
    main()
