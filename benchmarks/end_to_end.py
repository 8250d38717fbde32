"""Time to whole samples by exact sums, by `pruned` and by every peer, and their r^2 with the exact images.

Sixteen images, twenty steps of DDIM, published patch sizes, zeros padding, over 60,000 images of Fashion-MNIST and
20,000 of CIFAR-10. Exact sums, `pruned`, a uniform subset of the images of equal time and FAISS top-k (softmax over the
nearest windows; borders exact) make all images. Peers that sum over materialised windows are far too slow for that:
they are timed on a part of each patch size, and their seconds follow from the pairs (`extrapolated`). Writes
benchmarks/results/end_to_end.json and docs/images/end-to-end.png.

    python benchmarks/end_to_end.py --cifar10 cifar10/train --fashion-mnist train-images-idx3-ubyte.gz --indexes indexes
    python benchmarks/end_to_end.py --short          (500 built-in images, four samples, a minute)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import exact_cpu
import peers.top_k
import peers.uniform
import pruned_cpu
import record
import torch

import patchscore as ps
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.windows import Competition

STEPS = 20
BUDGETS = (0.003, 0.01)
NPROBE = 64
MEMORY = 2**31
PART = 1.0  # seconds at least of what an extrapolated row is timed on, for every patch size
SETTINGS = {
    "fashion-mnist-60000": ("fashionmnist-resnet-zeros", 60_000, 16),
    "cifar10-20000": ("cifar10-resnet-zeros", 20_000, 16),
}
SHORT = {"fashion-mnist-500": ("fashionmnist-resnet-zeros", 500, 4)}
SHORT_SIZES = (3, 5)  # indexed; building all takes longer than all else


class Machine(ps.EquivariantLocalScore):
    """EquivariantLocalScore whose sums are taken by a function of (z, sigma, bank, competition)."""

    def __init__(self, bank: ps.PatchBank, table: ps.ScaleTable, mean: Callable):
        super().__init__(bank, table, padding_mode="zeros")
        self.mean = mean

    def estimate(self, z, sigma, labels=None) -> ps.Estimate:
        level = torch.as_tensor(sigma, dtype=torch.float64).expand(len(z))
        # All items of a sampler's batch are at one level.
        mean = self.mean(z, level, self.bank, self.competition(self.patch_size_at(float(level[0]))))
        return ps.Estimate(mean.float(), torch.zeros_like(z), torch.ones_like(z[:, 0]), 0, "benchmark")


def exact(z, sigma, bank, competition):
    return SlidingCpu().posterior_sum(z, sigma, bank, competition, MEMORY).mean


def nearest_windows(index: ps.PatchIndex) -> Callable:
    """Softmax over the nearest windows that FAISS finds where both axes are free; exact sums along the border."""

    def mean(z, sigma, bank, competition):
        k = competition.patch_size
        r = k // 2
        indexed = k in index.patch_sizes
        free = tuple(g for g in competition.groups if indexed and not g.rows.locked and not g.cols.locked)
        border = Competition(k, competition.padding_mode, tuple(g for g in competition.groups if g not in free))
        found = exact(z, sigma, bank, border) if border.groups else torch.zeros_like(z)
        if free:
            inside = peers.top_k.interior_mean(z, sigma, index, k, NPROBE).to(torch.float64)
            found = found.to(torch.float64)
            found[:, :, r : r + inside.shape[2], r : r + inside.shape[3]] = inside
        return found

    return mean


class Setting:
    """One bank, and the rows that are made of it."""

    def __init__(self, name: str, bank: ps.PatchBank, table: str, n: int, short: bool, keep: Callable):
        self.name, self.bank, self.n, self.short, self.keep = name, bank, n, short, keep
        self.table = ps.ScaleTable.published(table)
        self.schedule = ps.get_schedule("cosine", STEPS)
        self.rows: list[dict] = []
        self.also = f" at k = {' and '.join(map(str, SHORT_SIZES))}, else exact" if short else ""

    def sampled(self, denoiser: ps.Denoiser) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        images = ps.sample(
            denoiser, n=self.n, steps=STEPS, schedule="cosine", seed=0, batch_size=self.n, progress=False
        )
        return images, time.perf_counter() - start

    def add(self, method: str, seconds: float, images: torch.Tensor | None, truth: torch.Tensor, **more) -> None:
        row = {
            "setting": self.name,
            "method": method,
            "images": self.n,
            "seconds": seconds,
            "extrapolated": images is None,
        }
        if images is not None:
            r2 = record.r_squared(images, truth)
            row |= {"r2_median": r2.median().item(), "r2_least": r2.min().item()}
        self.rows.append(row | more)
        print(row | more, flush=True)
        self.keep(self.rows)

    def run(self, folder: Path | None) -> None:
        if self.short:
            # Its index has few sizes; the others are summed exactly, as a method's name says.
            warnings.filterwarnings("ignore", message=".*the index has patch sizes")
        truth, slow = self.sampled(ps.EquivariantLocalScore(self.bank, self.table, engine="sliding"))
        self.add("sliding, exact", slow, truth, truth)
        index = None
        try:
            index, built = self.index(folder)
        except ImportError as reason:
            print(f"pruned and FAISS top-k: skipped, {reason}", flush=True)
        else:
            for budget in BUDGETS:
                machine = ps.EquivariantLocalScore(self.bank, self.table, index=index, budget=budget)
                images, fast = self.sampled(machine)
                self.add(f"pruned, budget {budget:g}{self.also}", fast, images, truth, build_seconds=built)
            # Exact sums over as many images as take as long as the largest budget.
            count = min(len(self.bank), max(16, round(len(self.bank) * fast / slow)))
            some = peers.uniform.images(count, len(self.bank), torch.Generator().manual_seed(1))
            part = ps.PatchBank(self.bank.images[some])
            images, seconds = self.sampled(ps.EquivariantLocalScore(part, self.table, engine="sliding"))
            self.add(f"uniform subset, as long as budget {budget:g}", seconds, images, truth, subset=count)
        contenders = exact_cpu.contenders()
        for name in contenders:
            if name != "sliding":
                self.add(name, self.extrapolated(contenders[name]), None, truth)
        if index is not None:
            images, seconds = self.sampled(Machine(self.bank, self.table, nearest_windows(index)))
            self.add(f"FAISS top-{peers.top_k.NEAREST}, nprobe {NPROBE}{self.also}", seconds, images, truth)

    def index(self, folder: Path | None) -> tuple[ps.PatchIndex, float]:
        assert folder is not None
        sizes = SHORT_SIZES if self.short else pruned_cpu.sizes_of(self.table)
        index = ps.PatchIndex.build(self.bank, sizes, folder / f"{self.name}.index")
        return index, sum(index.at(k).meta.get("build_seconds", 0.0) for k in index.patch_sizes)

    def extrapolated(self, contender: exact_cpu.Denoise) -> float:
        """Seconds of all steps: pairs of each patch size over the rate that the contender has on some images."""
        sizes = [self.table(float(sigma)) for sigma in self.schedule.ratios[:-1]]
        levels = {k: float(sigma) for k, sigma in zip(sizes, self.schedule.ratios[:-1], strict=True)}
        machine = ps.EquivariantLocalScore(self.bank, self.table)
        side, total = self.bank.shape[-1], 0.0
        for k, sigma in levels.items():
            x0 = self.bank.chunk(0, 1)
            z = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
            count = 2
            while True:
                train = self.bank.chunk(0, count)
                start = time.perf_counter()
                contender(z, sigma, train, k)
                seconds = time.perf_counter() - start
                # Their windows are stored: 4 bytes for each of C k^2 numbers.
                bytes_of = 2 * count * (side - k + 1) ** 2 * train.shape[1] * k * k * 4
                if (
                    seconds > (PART / 10 if self.short else PART)
                    or 2 * count > min(len(self.bank), 2048)
                    or 2 * bytes_of > MEMORY
                ):
                    break
                count *= 2
            rate = count * side**2 * (side - k + 1) ** 2 / seconds
            pairs = self.n * len(self.bank) * machine.competition(k).pairs_per_image
            total += sizes.count(k) * pairs / rate
        return total


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(6 * len(settings), 3.2), squeeze=False, layout="constrained"
    )
    for ax, setting in zip(axes[0], settings, strict=True):
        same = sorted((row for row in rows if row["setting"] == setting), key=lambda row: -row["seconds"])
        bars = ax.barh([row["method"] for row in same], [row["seconds"] for row in same])
        for bar, row in zip(bars, same, strict=True):
            bar.set_hatch("//" if row["extrapolated"] else "")
            bar.set_facecolor("lightgray" if row["extrapolated"] else "tab:blue")
            r2 = "extrapolated" if row["extrapolated"] else f"r^2 {row['r2_median']:.3f}"
            ax.text(row["seconds"], bar.get_y() + bar.get_height() / 2, f" {r2}", va="center", fontsize=7)
        ax.set_xscale("log")
        ax.set_xlim(right=ax.get_xlim()[1] * 4)
        ax.set_xlabel(f"seconds for {same[0]['images']} images of 20 steps")
        ax.set_title(setting, fontsize=9)
        ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def bank_of(name: str, options: argparse.Namespace, count: int) -> ps.PatchBank | None:
    """Images at random from the source of a setting, which is None where it was not given."""
    source = (
        "fashion-mnist" if options.short else options.cifar10 if name.startswith("cifar10") else options.fashion_mnist
    )
    if source is None or not (options.short or Path(source).exists()):
        print(f"{name}: skipped, its images were not given or are not there", flush=True)
        return None
    everything = record.opened(source, size=32 if name.startswith("cifar10") else None)
    if count >= len(everything):
        return everything
    # As pruned_cpu.py takes them, so that its index of CIFAR-10 serves here too.
    return ps.PatchBank(pruned_cpu.shuffled(everything.images)[:count].clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10's training images")
    parser.add_argument("--fashion-mnist", type=Path, help="IDX file of Fashion-MNIST's 60,000 training images")
    parser.add_argument("--indexes", type=Path, help="where indexes are kept or built (30 GB); else a temporary folder")
    parser.add_argument("--only", nargs="*", help="settings, such as cifar10-20000")
    parser.add_argument("--samples", type=int, help="images to make of each setting (default 16)")
    parser.add_argument("--short", action="store_true", help="500 built-in images, four samples")
    options = parser.parse_args()
    settings = SHORT if options.short else SETTINGS
    target = record.RESULTS / "end_to_end.json"
    kept = json.loads(target.read_text())["rows"] if target.exists() and not options.short else []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (table, count, n) in settings.items():
            if options.only and name not in options.only:
                continue
            bank = bank_of(name, options, count)
            if bank is None:
                continue
            others = [row for row in kept if row["setting"] != name]

            def keep(rows: list[dict], others: list[dict] = others) -> None:
                record.write("end_to_end", __doc__.splitlines()[0], steps=STEPS, rows=others + rows)

            setting = Setting(name, bank, table, options.samples or n, options.short, keep)
            setting.run(options.indexes or Path(temporary))
            kept = others + setting.rows
    if kept:
        draw(kept, record.PICTURES / "end-to-end.png")
        print(table_of(kept))


def table_of(rows: list[dict]) -> str:
    lines = ["| setting | method | seconds | r^2 with exact |", "| --- | --- | --- | --- |"]
    for row in rows:
        r2 = "(extrapolated)" if row["extrapolated"] else f"{row['r2_median']:.4f}, least {row['r2_least']:.4f}"
        lines.append(f"| {row['setting']} | {row['method']} | {row['seconds']:.1f} | {r2} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
