"""What the GPU does: ceilings, engines beside peers, banks, batches, samples, several sizes at once, and whole images.

A pair is a query pixel and a competing window. Every section is written as soon as it is done, to
benchmarks/results/gpu-<device>.json, so that a run cut short, or a section that fails, leaves what the others found.
`--dry` goes through all of it on tiny data, on the CPU under Triton's interpreter where there is no GPU, and writes
nothing.

The rows of `pruned` need FAISS, to build an index (on the CPU). Without `--indexes` that is one of 2,000 images, built
in a temporary folder; with it, the index of the whole bank is opened there, or built, which takes long:

    python benchmarks/gpu.py --images cifar10 --indexes /somewhere/large --index-only   (once)
    python benchmarks/gpu.py --images cifar10 --indexes /somewhere/large
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import record
import report

if "--dry" in sys.argv:
    sys.path.append(str(record.ROOT / "tests"))
    import interpreted  # noqa: F401
import torch
import torch.nn.functional as F
from exact_cpu import online_softmax, query_rows, smooth, window_rows
from torch.nn.attention import SDPBackend, sdpa_kernel

import patchscore as ps
from patchscore import engines
from patchscore.engines import device as resident
from patchscore.engines import reference
from patchscore.engines.fused import launch as fused
from patchscore.engines.fused.rows import choose_plan, spectrum_of
from patchscore.engines.pruned import device_index as lists_rows
from patchscore.engines.pruned import triton as pruned_cuda
from patchscore.engines.sliding import cpu as sliding

TABLE = "cifar10-resnet-zeros"
CASES = ((3, 0.02), (3, 0.16), (5, 0.1), (5, 0.5), (7, 0.99), (11, 1.92), (17, 3.98), (7, 30.0))
"""(k, sigma) where engines and peers meet: low noise, and the noise each patch size is calibrated to, high noise."""
PRUNED_CASES = ((3, 0.16), (7, 0.99), (11, 1.92), (17, 3.98))
BUDGETS = (0.001, 0.003, 0.01, 0.03)
MEMORY = 8 * 2**30
FEW = 300
"""Images that errors against float64 are taken on."""

Result = TypeVar("Result")


class Bench:
    """The device, the clock and the record of one run."""

    def __init__(self, options: argparse.Namespace):
        self.dry = options.dry
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.deadline = time.monotonic() + options.seconds
        self.repeats = 1 if self.dry else 5
        self.content: dict[str, object] = {"device": self.name, "rows": [], "skipped": [], "failed": []}

    def section(self, work: Callable[..., Result], *arguments: object) -> Result | None:
        """One part of the run, written when it ends: what fails in it does not take the others along."""
        name = work.__name__.replace("_", " ")
        if self.out_of_time(name):
            return None
        start = time.monotonic()
        try:
            return work(self, *arguments)
        except Exception as error:
            if self.dry:
                raise
            self.content["failed"].append(
                f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            traceback.print_exc()
            torch.cuda.empty_cache()
            return None
        finally:
            self.content.setdefault("section_seconds", []).append([name, time.monotonic() - start])
            self.flush()

    def out_of_time(self, what: str) -> bool:
        late = time.monotonic() > self.deadline
        if late:
            self.content["skipped"].append(f"{what}: out of time")
            print(f"{what}: skipped, out of time", flush=True)
        return late

    def add(self, **row: object) -> None:
        self.content["rows"].append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)

    def flush(self) -> None:
        if not self.dry:
            slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
            record.write(f"gpu-{slug}", __doc__.splitlines()[0], **self.content)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def interleaved(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, in turns, after one to warm up: for ratios."""
        for work in works.values():
            self.once(work)
        rounds = [{name: self.once(work) for name, work in works.items()} for _ in range(self.repeats)]
        return {name: statistics.median(times[name] for times in rounds) for name in works}

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> dict[str, float]:
        """Median, least and most of several runs, after one to warm up; peak memory of all of them."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = self.once(work)
        times = [first] if self.dry else [self.once(work) for _ in range(repeats or self.repeats)]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {
            "seconds_median": statistics.median(times),
            "seconds_min": min(times),
            "seconds_max": max(times),
            "first_seconds": first,
            "peak_gib": peak / 2**30,
        }


# Ceilings.


def ceilings(bench: Bench) -> None:
    """Bytes copied, products of half floats and exponentials a second, as torch's own kernels reach them."""
    n = 256 if bench.dry else 8192
    a = torch.randn(n, n, dtype=torch.float16, device=bench.device)
    source = torch.empty(n * n * (1 if bench.dry else 8), dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    x = torch.randn(n * n, dtype=torch.float16, device=bench.device)
    tuned = {
        "bytes_per_second": (lambda: target.copy_(source), 2 * source.nbytes),
        "fp16_multiply_adds_per_second": (lambda: a @ a, n**3),
        # Half floats, so that memory does not bound it: 4 bytes an exponential.
        "exponentials_per_second": (lambda: torch.exp2(x, out=x), x.numel()),
    }
    bench.content["ceilings"] = {
        name: operations / bench.seconds(work)["seconds_min"] for name, (work, operations) in tuned.items()
    }
    print(bench.content["ceilings"], flush=True)


# Contenders beside ours: prepare(z, sigma, train, k) gives a function that answers [C, H * W].


def rows_with_bias(z, sigma, train, k, dtype):
    """Queries over sigma^2 with ones, windows with their bias, values as wide; head size a multiple of 8."""
    p, v = window_rows(train, k)
    p, v = p.to(z.device), v.to(z.device)
    q = query_rows(z, k) / sigma**2
    width = -(-(p.shape[1] + 1) // 8) * 8
    keys = F.pad(torch.cat([p, p.square().sum(1, keepdim=True) / (-2 * sigma**2)], 1), (0, width - p.shape[1] - 1))
    queries = F.pad(torch.cat([q, torch.ones_like(q[:, :1])], 1), (0, width - p.shape[1] - 1))
    values = F.pad(v, (0, width - v.shape[1]))
    return (x.to(dtype)[None, None] for x in (queries, keys, values))


def attention(dtype: torch.dtype, backend: SDPBackend):
    def prepare(z, sigma, train, k):
        q, p, v = rows_with_bias(z, sigma, train, k, dtype)
        channels = z.shape[1]

        def work():
            on_cpu = contextlib.nullcontext() if z.device.type == "cpu" else sdpa_kernel(backend)
            with on_cpu:
                return F.scaled_dot_product_attention(q, p, v, scale=1.0)[0, 0, :, :channels].T

        return work

    return prepare


def gemm(z, sigma, train, k, chunk=65536):
    p, v = window_rows(train, k)
    q, bias = query_rows(z, k) / sigma**2, p.square().sum(1) / (-2 * sigma**2)

    def work():
        parts = range(0, len(p), chunk)
        return online_softmax(
            (torch.addmm(bias[a : a + chunk], q, p[a : a + chunk].T), v[a : a + chunk]) for a in parts
        )

    return work


def convolution(z, sigma, train, k, chunk=16384):
    """The published formulation: training windows are the filters of a convolution over z."""
    p, v = window_rows(train, k)
    padded = F.pad(z, (k // 2,) * 4, mode="circular") / sigma**2
    bias, filters = p.square().sum(1) / (-2 * sigma**2), p.reshape(-1, z.shape[1], k, k)

    def logits(a):
        return F.conv2d(padded, filters[a : a + chunk], bias[a : a + chunk])[0].flatten(1).T.contiguous()

    def work():
        return online_softmax((logits(a), v[a : a + chunk]) for a in range(0, len(p), chunk))

    return work


PEERS = {
    "attention fp16": attention(torch.float16, SDPBackend.FLASH_ATTENTION),
    "attention fp32": attention(torch.float32, SDPBackend.EFFICIENT_ATTENTION),
    "gemm": gemm,
    "convolution": convolution,
}


def by_engine(engine, z, sigma, bank, machine):
    competition = machine.competition(machine.patch_size)
    sigmas = torch.full((len(z),), sigma, dtype=torch.float64)
    return lambda: engine.posterior_sum(z, sigmas, bank, competition, MEMORY)


def served(bench: Bench) -> dict:
    """Exact engines that can serve this device, the slow definition aside."""
    found = {}
    for engine in engines.EXACT:
        name = engine.name
        if name == "reference" or not engine.runs_on(bench.device):
            continue
        reason = engine.unavailable(bench.device)
        if reason is None:
            found[name] = engine
        else:
            bench.content["skipped"].append(f"{name}: {reason}")
            print(f"{name}: skipped, {reason}")
    return found


def noisy(bank: ps.PatchBank, sigma: float, batch: int, device: torch.device) -> torch.Tensor:
    x0 = bank.chunk(0, batch)
    return (x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))).to(device)


def described(k: int, sigma: float, bank: ps.PatchBank, device: torch.device) -> dict[str, object]:
    """How `fused` describes a window there."""
    d = bank.shape[0] * k * k
    uint8 = bank.images.dtype == torch.uint8
    plan = choose_plan(spectrum_of(bank, k, device), d, sigma, fused.TOLERANCE, uint8, axes=True)
    precision = "exact" if plan.exact else "fp16 split" if plan.q_lo else "fp16"
    return {"rank": plan.size if plan.axes else d, "columns": plan.columns, "precision": precision}


# Sections.


def beside_peers(bench: Bench, bank: ps.PatchBank) -> None:
    """Every contender on the same queries, circular padding; errors on a few images, rates on many."""
    few, cases = (3, ((3, 0.16), (5, 2.0))) if bench.dry else (FEW, CASES)
    ours = served(bench)
    for k, sigma in cases:
        if bench.out_of_time(f"peers at k = {k}, sigma = {sigma}"):
            return
        small = ps.PatchBank(bank.images[:few])
        z = noisy(bank, sigma, 1, bench.device)
        machine = ps.EquivariantLocalScore(small, k, padding_mode="circular")
        exact = by_engine(reference, z.double(), sigma, small, machine)().mean[0].flatten(1)
        pairs_per_image = machine.competition(k).pairs_per_image
        common = {"k": k, "sigma": sigma, "channels": bank.shape[0], "size": bank.shape[2], "batch": 1}

        for name, engine in ours.items():
            error = (by_engine(engine, z, sigma, small, machine)().mean[0].flatten(1) - exact).abs().max().item()
            large = small if bench.dry else ps.PatchBank(bank.images[:10_000])
            times = bench.seconds(by_engine(engine, z, sigma, large, machine))
            pairs = len(large) * pairs_per_image
            row = common | {"engine": name, "windows": pairs // z[0, 0].numel(), "pairs": pairs, "error": error}
            row |= described(k, sigma, large, bench.device) if name == "fused" else {}
            bench.add(**row, **times, pairs_per_second=pairs / times["seconds_median"])
        for name, prepare in PEERS.items():
            try:
                train = small.chunk(0, few, device=bench.device)
                error = (prepare(z, sigma, train, k)().double() - exact).abs().nan_to_num(torch.inf).max().item()
                wide = 1 if bench.dry else max(1, min(len(bank), 2 * 10**9 // (k * k * 3 * 4 * 900)))
                train = bank.chunk(0, min(wide, 1500), device=bench.device)
                times = bench.seconds(prepare(z, sigma, train, k), repeats=3)
            except (RuntimeError, NotImplementedError) as reason:
                bench.content["skipped"].append(f"{name} at k = {k}: {str(reason).splitlines()[0]}")
                print(f"{name} at k = {k}: {str(reason).splitlines()[0]}", flush=True)
                continue
            pairs = len(train) * pairs_per_image
            row = common | {"engine": name, "windows": pairs // z[0, 0].numel(), "pairs": pairs, "error": error}
            bench.add(**row, **times, pairs_per_second=pairs / times["seconds_median"])
        bench.flush()


def off(engine, k: int, sigma: float, bank: ps.PatchBank, mode: str, z: torch.Tensor) -> float:
    """The worst pixel against `reference` in float64, on FEW images of the bank."""
    small = bank if len(bank) <= FEW else ps.PatchBank(bank.images[:FEW])
    machine = ps.EquivariantLocalScore(small, k, padding_mode=mode)
    exact = by_engine(reference, z.double(), sigma, small, machine)().mean
    return (by_engine(engine, z, sigma, small, machine)().mean - exact).abs().max().item()


def rates(bench: Bench, bank: ps.PatchBank, what: str, cases: list[tuple[int, float, int, int]]) -> None:
    """`fused` at (k, sigma, images, batch), zeros padding."""
    for k, sigma, images, batch in cases:
        if bench.out_of_time(f"{what}, k = {k}, batch {batch}"):
            return
        part = bank if images >= len(bank) else ps.PatchBank(bank.images[:images])
        machine = ps.EquivariantLocalScore(part, k, padding_mode="zeros")
        z = noisy(bank, sigma, batch, bench.device)
        error = off(fused, k, sigma, part, "zeros", z[:1])
        times = bench.seconds(by_engine(fused, z, sigma, part, machine), repeats=3)
        pairs = batch * len(part) * machine.competition(k).pairs_per_image
        interior = max(1, bank.shape[2] - k + 1) ** 2
        bench.add(
            section=what,
            engine="fused",
            k=k,
            sigma=sigma,
            channels=bank.shape[0],
            size=bank.shape[2],
            batch=batch,
            windows=len(part) * interior,
            pairs=pairs,
            error=error,
            **described(k, sigma, part, bench.device),
            **times,
            pairs_per_second=pairs / times["seconds_median"],
            seconds_per_image=times["seconds_median"] / batch,
        )
        bench.flush()


def graph(bench: Bench, bank: ps.PatchBank) -> None:
    """One dense call of 16 images launched by the host, and replayed as a CUDA graph: what launching costs."""
    if bench.device.type != "cuda":
        return
    part = ps.PatchBank(bank.images[:2000])
    machine = ps.EquivariantLocalScore(part, 7, engine="fused", memory_limit=MEMORY)
    z = noisy(bank, 0.99, 16, bench.device)
    machine.denoise(z, 0.99)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        machine.denoise(z, 0.99)
    seconds = bench.interleaved({"launched": lambda: machine.denoise(z, 0.99), "replayed": recorded.replay})
    for name, median in seconds.items():
        bench.add(section=f"graph: {name}", engine="fused", k=7, sigma=0.99, batch=16, seconds_median=median)


def several_sizes(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` at each patch size alone, and at all of them in one pass over the bank, circular padding."""
    sigma, sizes = 1.0, ((3, 5) if bench.dry else tuple(range(3, 18, 2)))
    part = ps.PatchBank(bank.images[:10_000])
    z, sigmas = noisy(bank, sigma, 1, bench.device), torch.full((1,), sigma, dtype=torch.float64)
    machines = [ps.EquivariantLocalScore(part, k, padding_mode="circular") for k in sizes]
    competitions = [machine.competition(machine.patch_size) for machine in machines]
    together = "all in one pass"
    works = {str(k): by_engine(sliding, z, sigma, part, machine) for k, machine in zip(sizes, machines, strict=True)}
    works[together] = lambda: sliding.posterior_sums(z, sigmas, part, competitions, MEMORY)
    seconds = bench.interleaved(works)
    common = {"engine": "sliding", "sigma": sigma, "channels": bank.shape[0], "size": bank.shape[2], "batch": 1}
    pairs = {str(c.patch_size): len(part) * c.pairs_per_image for c in competitions}
    pairs[together] = sum(pairs.values())
    for name, median in seconds.items():
        row = {"section": "sizes", "k": name, "pairs": pairs[name], "seconds_median": median}
        bench.add(**common, **row, pairs_per_second=pairs[name] / median)
    alone = [seconds[str(k)] for k in sizes]
    bench.content["sizes together"] = {
        "over_slowest": seconds[together] / max(alone),
        "over_separate_calls": seconds[together] / sum(alone),
    }
    print(bench.content["sizes together"], flush=True)


def whole_images(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` beside the float64 product of `reference` where whole images compete, by batch."""
    for batch in (1,) if bench.dry else (1, 16, 64):
        if bench.out_of_time(f"whole images, batch {batch}"):
            return
        z, machine = noisy(bank, 1.0, min(batch, len(bank)), bench.device), ps.IdealScore(bank)
        ours = {"sliding": sliding, "reference": reference}
        seconds = bench.interleaved({name: by_engine(engine, z, 1.0, bank, machine) for name, engine in ours.items()})
        for name, median in seconds.items():
            row = {"section": "whole images", "engine": name, "k": "whole", "sigma": 1.0, "batch": batch}
            bench.add(**row, images=len(bank), seconds_median=median, pixels_per_second=bank.images.numel() / median)


def streamed(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` on a bank that lies in the device's memory, and on the same streamed through pinned memory."""
    if bench.device.type != "cuda":
        return
    z, sigmas = noisy(bank, 1.0, 1, bench.device), torch.full((1,), 1.0).double()
    competition = ps.EquivariantLocalScore(bank, 7, padding_mode="circular").competition(7)

    def work(share: float) -> object:
        resident.RESIDENT_SHARE = share
        if share == 0.0:
            resident.copies.clear()
        return sliding.posterior_sum(z, sigmas, bank, competition, MEMORY)

    share = resident.RESIDENT_SHARE
    pairs = len(bank) * competition.pairs_per_image
    for where, used in (("resident", share), ("streamed", 0.0)):
        times = bench.seconds(lambda used=used: work(used))
        row = {"section": where, "engine": "sliding", "k": 7, "sigma": 1.0, "batch": 1, "pairs": pairs}
        bench.add(**row, **times, pairs_per_second=pairs / times["seconds_median"])
    resident.RESIDENT_SHARE = share


def index_of(bank: ps.PatchBank, sizes: list[int], folder: Path, cells: int | None = None) -> ps.PatchIndex:
    """The index of these images in `folder`, built or completed where it has to be."""
    return ps.PatchIndex.build(bank, sizes, folder / f"{bank.fingerprint[:16]}.index", cells=cells)


def shares(bench: Bench, index: ps.PatchIndex, cases: tuple[tuple[int, float], ...], batch: int) -> None:
    """`pruned` at several budgets beside `fused` on the same queries, zeros padding: time, error and stated error."""
    bank = index.bank
    for k, sigma in cases:
        if bench.out_of_time(f"pruned at k = {k}"):
            return
        z = noisy(bank, sigma, batch, bench.device)
        machine = ps.EquivariantLocalScore(bank, k, engine="fused")
        whole = by_engine(fused, z, sigma, bank, machine)
        exact, times = whole().mean, bench.seconds(whole, repeats=3)
        pairs = batch * len(bank) * machine.competition(k).pairs_per_image
        common = {"section": "pruned", "k": k, "sigma": sigma, "channels": bank.shape[0], "size": bank.shape[2]}
        common |= {"batch": batch, "windows": len(bank) * max(1, bank.shape[2] - k + 1) ** 2}
        rate = {"pairs": pairs, "pairs_per_second": pairs / times["seconds_median"]}
        each = {"seconds_per_image": times["seconds_median"] / batch}
        bench.add(**common, engine="fused", **rate, **times, **each, **described(k, sigma, bank, bench.device))
        for budget in BUDGETS[-1:] if bench.dry else BUDGETS:
            part = ps.EquivariantLocalScore(bank, k, index=index, budget=budget)
            work, kept = by_engine(part.pruned, z, sigma, bank, part), []
            times = bench.seconds(lambda work=work, kept=kept: kept.append(work()))
            found = kept.pop()
            error = found.mean - exact
            bench.add(
                **common,
                engine="pruned",
                budget=budget,
                rank=index.at(k).rank,
                columns=lists_rows.columns_for(index.at(k)),
                precision="fp16",
                pairs=found.pairs,
                pairs_per_second=found.pairs / times["seconds_median"],
                pairs_share=found.pairs / pairs,
                error=error.abs().max().item(),
                rms=error.square().mean().sqrt().item(),
                stderr_rms=found.stderr.square().mean().sqrt().item(),
                within_2_stderr=(error.abs() <= 2 * found.stderr + 1e-3).double().mean().item(),
                seconds_per_image=times["seconds_median"] / batch,
                **times,
            )
        bench.flush()


def pruned(bench: Bench, bank: ps.PatchBank, folder: Path | None) -> ps.PatchIndex | None:
    """The rows of engine `pruned`; the index of the whole bank where there is one."""
    if importlib.util.find_spec("faiss") is None:
        bench.content["skipped"].append("pruned: FAISS is not installed")
        print("pruned: skipped, FAISS is not installed", flush=True)
        return None
    if folder is not None and not bench.dry:
        index = index_of(bank, sorted(set(ps.ScaleTable.published(TABLE).sizes[1:])), folder)
        shares(bench, index, PRUNED_CASES, 16)
        return index
    if bench.dry:
        pruned_cuda.RECHECK = 4  # the interpreter takes milliseconds for each
    with tempfile.TemporaryDirectory() as there:
        small = ps.PatchBank(bank.images[: 4 if bench.dry else 2000])
        cases = ((3, 0.5),) if bench.dry else PRUNED_CASES[:2]
        index = index_of(small, [k for k, _ in cases], Path(there), 16 if bench.dry else None)
        shares(bench, index, cases, 1 if bench.dry else 16)
    return None


def samples(bench: Bench, bank: ps.PatchBank, index: ps.PatchIndex | None = None) -> None:
    """20 steps of DDIM with the published table, 16 images at once, over the whole bank; compiled before."""
    name = "fused" if index is None else "pruned"
    n, steps = (1, 2) if bench.dry else (16, 20)
    table = ps.ScaleTable.constant(3) if bench.dry else ps.ScaleTable.published(TABLE)
    options = {} if index is None else {"index": index, "tolerance": 0.01}
    machine = ps.EquivariantLocalScore(bank, table, engine=name, memory_limit=MEMORY, **options)

    def work():
        return ps.sample(machine, n=n, steps=steps, schedule="cosine", seed=0, device=bench.device, progress=False)

    times = bench.seconds(work, repeats=1)
    bench.add(
        section="samples",
        engine=name,
        table=TABLE,
        steps=steps,
        batch=n,
        images=len(bank),
        **times,
        seconds_per_image=times["seconds_median"] / n,
    )


def images_of(path: Path | None, dry: bool) -> torch.Tensor:
    """uint8 images of a folder or tar, resized to 32 x 32, or smooth random ones."""
    if path is None or dry:
        return smooth(3, 8 if dry else 32, 4 if dry else 50_000)
    return record.shuffled(record.opened(path, size=32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder or tar of images; else smooth random")
    parser.add_argument("--seconds", type=float, default=440, help="start nothing after so many")
    parser.add_argument("--indexes", type=Path, help="folder of indexes of the whole bank, some 40 GB with all sizes")
    parser.add_argument("--index-only", action="store_true", help="build the index in --indexes and stop")
    parser.add_argument("--dry", action="store_true", help="tiny data, no result")
    options = parser.parse_args()
    if options.index_only:
        whole = ps.PatchBank(images_of(options.images, False))
        index_of(whole, sorted(set(ps.ScaleTable.published(TABLE).sizes[1:])), options.indexes)
        return
    bench = Bench(options)
    if reason := fused.unavailable(bench.device):
        sys.exit(f"engine fused: {reason}")
    if options.images and not options.images.exists():
        print(f"{options.images}: not found, taking smooth random images", file=sys.stderr)
        options.images = None
    bank = ps.PatchBank(images_of(options.images, options.dry))
    data = options.images.name if options.images and not options.dry else "smooth random"
    import triton

    bench.content |= {"data": data, "images": len(bank), "triton": triton.__version__}
    # Step 1 is the last that is sampled, step 19 the first.
    levels = ps.get_schedule("cosine", 20).ratios[:-1].flip(0).tolist()[:19]
    scale = ps.ScaleTable.published(TABLE)

    bench.section(ceilings)
    # Peers in float32 compute in float32.
    torch.backends.cudnn.allow_tf32 = False
    bench.section(beside_peers, bank)
    if options.dry:
        bench.section(rates, bank, "sizes", [(3, 0.5, 4, 1)])
        bench.section(rates, bank, "banks", [(3, 2.0, 2, 2)])
    else:
        banks = [millions * 10**6 // 26**2 for millions in (1, 10)] + [len(bank)]  # windows of k = 7
        bench.section(rates, bank, "banks", [(7, 0.99, images, 4) for images in banks])
        bench.section(rates, bank, "batches", [(7, 0.99, len(bank), batch) for batch in (1, 4, 16)])
    bench.section(graph, bank)
    bench.section(samples, bank)
    index = bench.section(pruned, bank, options.indexes)
    if index is not None:
        bench.section(samples, bank, index)
    if not options.dry:
        # Many plans over few images: they take the first configuration, as compiling is what takes time.
        os.environ["PATCHSCORE_AUTOTUNE"] = "0"
        bench.section(rates, bank, "sizes", [(scale(sigma), sigma, 10_000, 4) for sigma in levels])
    if reason := sliding.unavailable(bench.device):
        print(f"sliding: skipped, {reason}")
    else:
        bench.section(several_sizes, bank)
        bench.section(whole_images, bank)
        bench.section(streamed, bank)
    bench.flush()
    print(report.gpu_table(bench.content["rows"]))


if __name__ == "__main__":
    main()
