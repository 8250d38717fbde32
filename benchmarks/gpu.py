"""What the GPU does: ceilings, engines beside peers, banks, batches, samples, several sizes at once, and whole images.

A pair is a query pixel and a competing window. No speed is reported of an engine that is wrong: each case is held
against `reference` in float64 on a few images first, PATCHSCORE_STRICT=1 forbids another engine to serve, and a row
says which one did. Beside a rate stand the range that the cost model derives for it, clock and power.

Every section is written as soon as it is done, to gpu-<device>.json in benchmarks/results (or PATCHSCORE_RESULTS), so
that a run cut short, or a section that fails, leaves what the others found; `--only` runs some sections and keeps what
other runs of the same commit wrote. `--dry` goes through all of it on tiny data, on the CPU under Triton's interpreter
where there is no GPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["PATCHSCORE_STRICT"] = "1"
if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import record

if "--dry" in sys.argv:
    sys.path.append(str(record.ROOT / "tests"))
    import interpreted  # noqa: F401
import ceilings
import peers
import sensors
import torch
from peers import golddiff
from tables import gpu as tables

import patchscore as ps
from patchscore import engines
from patchscore.engines import autotune, cost
from patchscore.engines import device as resident
from patchscore.engines.fused import launch as fused
from patchscore.engines.fused.plan import Plan, choose_plan, spectrum_of

TABLE = "cifar10-resnet-zeros"
CASES = ((3, 0.02), (3, 0.16), (5, 0.1), (5, 0.5), (7, 0.99), (11, 1.92), (17, 3.98), (7, 30.0))
"""(k, sigma) where engines and peers meet: low noise, and the noise each patch size is calibrated to, high noise."""
QUICK = ((3, 0.02), (7, 0.99), (17, 3.98))
COMPILED = ((7, 0.99),)
"""The cases of peers that torch compiles, some ten seconds each."""
GOLDDIFF_CASES = ((3, 0.16), (7, 0.99), (11, 1.92), (17, 3.98))
PRUNED_CASES = ((7, 0.844), (3, 0.16), (11, 1.92))
BATCH = 16
MEMORY = 8 * 2**30
FEW = 300
"""Images that errors against float64 are taken on."""


def bound(engine: str, sigma: float) -> float:
    """The error that an exact engine promises for a pixel."""
    return fused.TOLERANCE if engine == "fused" or sigma < 0.05 else 1e-4


def unavailable(engine: str, device: torch.device) -> str | None:
    """Why an engine cannot serve a device, or None."""
    found = [one for one in engines.EXACT if one.name == engine and one.runs_on(device)]
    return found[0].unavailable(device) if found else f"it does not run on {device.type}"


class Wrong(Exception):
    """An engine is wrong, or another one served: no speed of it is reported."""


class Bench:
    """The device, the clock and the record of one run."""

    def __init__(self, options: argparse.Namespace):
        self.dry, self.quick = options.dry, options.quick
        self.only: list[str] | None = options.only
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.deadline = time.monotonic() + options.seconds
        self.repeats = 0 if self.dry else 3 if self.quick else 5
        self.sensors = sensors.Sensors()
        self.ran: list[str] = []
        self.content: dict[str, object] = {"device": self.name, "rows": [], "skipped": [], "failed": []}
        self.earlier = {} if self.dry or self.only is None else self.written()

    @property
    def file(self) -> str:
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def written(self) -> dict:
        """What earlier runs of the same commit wrote."""
        path = record.RESULTS / f"{self.file}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("commit") == record.provenance()["commit"] else {}

    def section(self, name: str, work: Callable, *arguments: object) -> object:
        """One part of the run, written when it ends: what fails in it does not take the others along."""
        if self.only is not None and name not in self.only:
            return None
        if self.out_of_time(name):
            return None
        self.name_of_section = name
        self.ran.append(name)
        start = time.monotonic()
        try:
            return work(self, *arguments)
        except Exception as error:
            self.fail(name, error)
            return None
        finally:
            self.content.setdefault("section_seconds", []).append([name, time.monotonic() - start])
            self.flush()

    def fail(self, what: str, error: Exception) -> None:
        """Notes it and goes on; a dry run stops."""
        if self.dry:
            raise error
        lines = str(error).strip().splitlines() or [""]
        self.content["failed"].append(f"{what}: {type(error).__name__}: {lines[0]}")
        traceback.print_exception(error)
        torch.cuda.empty_cache()

    def decline(self, what: str, error: Exception) -> None:
        """A case that a guest cannot do."""
        self.skip(f"{what}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")

    def skip(self, what: str) -> None:
        if what not in self.content["skipped"]:
            self.content["skipped"].append(what)
            print(f"skipped {what}", flush=True)

    def out_of_time(self, what: str) -> bool:
        late = time.monotonic() > self.deadline
        if late:
            self.skip(f"{what}: out of time")
        return late

    def add(self, **row: object) -> None:
        row = {"section": self.name_of_section, **row}
        self.content["rows"].append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)

    def flush(self) -> None:
        if self.dry:
            return
        others = [row for row in self.earlier.get("rows", []) if row["section"] not in self.ran]
        kept = {name: value for name, value in self.earlier.items() if name not in self.content}
        content = {**kept, **self.content, "rows": [*others, *self.content["rows"]]}
        for name in ("skipped", "failed"):
            before = [what for what in self.earlier.get(name, []) if what.partition(":")[0] not in self.ran]
            content[name] = list(dict.fromkeys([*before, *self.content[name]]))
        for name in record.provenance():
            content.pop(name, None)
        content.pop("what", None)
        record.write(self.file, __doc__.splitlines()[0], **content)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def interleaved(
        self, works: dict[str, Callable[[], object]], guests: Collection[str] = ()
    ) -> dict[str, dict[str, float]]:
        """Median, least and most seconds of each, in turns, after one to warm up; what fails then is left out.

        A guest, other people's code, that cannot do a case is skipped; anything else has failed.
        Clock and power are those of all turns; peak memory is that of the first call, which compiles.
        """
        first, peak = {}, {}
        for name, work in works.items():
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                first[name] = self.once(work)
            except Wrong:
                raise
            except Exception as error:
                what = f"{self.name_of_section}: {name}"
                self.decline(what, error) if name in guests else self.fail(what, error)
                continue
            peak[name] = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        rounds: dict[str, list[float]] = {name: [] for name in first}
        since = time.perf_counter()
        for _ in range(self.repeats):
            for name in first:
                rounds[name].append(self.once(works[name]))
        times = {name: of or [first[name]] for name, of in rounds.items()}
        sensed = self.sensors.between(since, time.perf_counter())
        return {
            name: {
                "seconds_median": statistics.median(of),
                "seconds_min": min(of),
                "seconds_max": max(of),
                "first_seconds": first[name],
                "peak_gib": peak[name],
                **sensed,
            }
            for name, of in times.items()
        }

    def seconds(self, work: Callable[[], object]) -> dict[str, float]:
        """Of one contender."""
        return self.interleaved({"": work})[""]


@dataclass
class Call:
    """One call of a machine: noisy images at one noise level over a bank."""

    bank: ps.PatchBank
    k: int | None
    sigma: float
    z: torch.Tensor
    mode: str = "circular"

    def machine(self, engine: str, bank: ps.PatchBank | None = None, **options) -> ps.Denoiser:
        bank = self.bank if bank is None else bank
        options = {"engine": engine, "memory_limit": MEMORY, **options}
        if self.k is None:
            return ps.IdealScore(bank, **options)
        return ps.EquivariantLocalScore(bank, self.k, padding_mode=self.mode, **options)

    def work(self, engine: str, **options) -> Callable[[], ps.Estimate]:
        machine = self.machine(engine, **options)

        def call() -> ps.Estimate:
            est = machine.estimate(self.z, self.sigma, ess=False)  # what `denoise` does, and says who served
            # Some leave groups of pixels to the next by design; a row carries all that served.
            if engine != "auto" and engine not in est.engine.split(" and "):
                raise Wrong(f"{engine} was named, {est.engine} served")
            return est

        return call

    @property
    def pairs(self) -> int:
        return len(self.z) * len(self.bank) * self.machine("reference").competition(self.k).pairs_per_image

    def few(self) -> Call:
        """One noisy image over a few images."""
        bank = self.bank if len(self.bank) <= FEW else ps.PatchBank(self.bank.images[:FEW])
        return Call(bank, self.k, self.sigma, self.z[:1], self.mode)

    def exact(self) -> torch.Tensor:
        return self.machine("reference").denoise(self.z.double(), self.sigma)

    def error(self, engine: str) -> float:
        """The worst pixel against float64 on a few images; Wrong where it is more than the engine promises."""
        small = self.few()
        worst = (small.work(engine)().mean - small.exact()).abs().nan_to_num(torch.inf).max().item()
        if worst > bound(engine, self.sigma):
            raise Wrong(f"{engine} at k = {self.k}, sigma = {self.sigma:g}, {self.mode}: off by {worst:.3g}")
        return worst

    def about(self) -> dict[str, object]:
        channels, side, _ = self.bank.shape
        windows = len(self.bank) * (max(1, side - (self.k or side) + 1) ** 2 if self.k else 1)
        return {
            "k": self.k or "whole", "sigma": self.sigma, "channels": channels, "size": side, "padding": self.mode,
            "batch": len(self.z), "images": len(self.bank), "windows": windows, "pairs": self.pairs,
        }  # fmt: skip


def noisy(bank: ps.PatchBank, sigma: float, batch: int, device: torch.device) -> torch.Tensor:
    x0 = bank.chunk(0, batch)
    return (x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))).to(device)


def first_images(bank: ps.PatchBank, count: int) -> ps.PatchBank:
    return bank if count >= len(bank) else ps.PatchBank(bank.images[:count])


def rated(times: dict[str, float], pairs: int, batch: int) -> dict[str, float]:
    seconds = times["seconds_median"]
    return {**times, "pairs_per_second": pairs / seconds, "seconds_per_image": seconds / batch}


def plan_of(call: Call, device: torch.device) -> Plan:
    """How `fused` describes a window there."""
    d = call.bank.shape[0] * call.k**2
    uint8 = call.bank.images.dtype == torch.uint8
    return choose_plan(spectrum_of(call.bank, call.k, device), d, call.sigma, fused.TOLERANCE, uint8, axes=True)


def described(call: Call, device: torch.device) -> dict[str, object]:
    """The columns of a window there, and the rate that the cost model derives."""
    d = call.bank.shape[0] * call.k**2
    plan = plan_of(call, device)
    precision = "exact" if plan.exact else "fp16 split" if plan.q_lo else "fp16"
    work = cost.fused(plan.columns, d if plan.exact else 0, pilot=plan.pilot)
    about = {"rank": plan.size if plan.axes else d, "columns": plan.columns, "precision": precision}
    return about | derived(work, cost.TRITON, device)


def derived(work: cost.Work, efficiency: cost.Range, device: torch.device) -> dict[str, object]:
    """The model's range, on a device it knows."""
    if device.type != "cuda":
        return {}
    of = torch.cuda.get_device_properties(device)
    known = cost.device_of(of.name, (of.major, of.minor), of.multi_processor_count, of.total_memory)
    low, high = cost.rate(work, known, efficiency)
    return {"derived_low": low, "derived_high": high, "derived_binds": work.binds(known, cost.middle(efficiency))}


def details(engine: str, call: Call, device: torch.device) -> dict[str, object]:
    if "fused" in engine.split(" and "):
        return described(call, device)
    if engine == "sliding" and call.k:
        competition = call.machine("reference").competition(call.k)
        return derived(cost.sliding(competition, call.bank.shape), cost.INTEGER, device)
    return {}


# Sections.


def units(bench: Bench) -> None:
    """Ceilings."""
    bench.content["ceilings"] = {
        name: operations / bench.seconds(work)["seconds_min"]
        for name, (work, operations) in ceilings.works(bench.device, bench.dry).items()
    }
    print(bench.content["ceilings"], flush=True)


def cases_of(bench: Bench) -> tuple[tuple[int, float], ...]:
    return ((3, 0.16), (5, 2.0)) if bench.dry else QUICK if bench.quick else CASES


def beside_peers(bench: Bench, bank: ps.PatchBank, engine: str) -> None:
    """An engine and every peer on the same queries, in turns, circular padding; rates on as many images as fit."""
    peers_of = peers.found(bench.device, bench.skip) if engine == "fused" else {}
    for k, sigma in cases_of(bench):
        if bench.out_of_time(f"{bench.name_of_section}: k = {k}, sigma = {sigma:g}"):
            return
        batch = 1 if bench.dry else BATCH
        z = noisy(bank, sigma, batch, bench.device)
        calls = {engine: Call(first_images(bank, 3 if bench.dry else 10_000), k, sigma, z)}
        works, errors, more = {}, {}, {}
        try:
            errors[engine] = calls[engine].error(engine)
            works[engine] = calls[engine].work(engine)
            more[engine] = details(engine, calls[engine], bench.device)
        except Exception as error:
            bench.fail(f"{bench.name_of_section}: {engine} at k = {k}, sigma = {sigma:g}", error)

        small = calls[engine].few()
        exact = small.exact() if peers_of else None
        # Their windows are materialised: a share of the memory for each.
        fit = 2 * 10**9 // (k * k * 3 * 4 * 900)
        for name, prepare in peers_of.items():
            compiled = name in ("compiled attention", "FlexAttention")
            if compiled and not bench.dry and (k, sigma) not in COMPILED:
                continue
            try:
                train = small.bank.chunk(0, len(small.bank), device=bench.device)
                found = prepare(small.z, sigma, train, k)()
                errors[name] = (found.double() - exact).abs().nan_to_num(torch.inf).max().item()
                calls[name] = Call(first_images(bank, 3 if bench.dry else max(1, min(fit, 1500))), k, sigma, z)
                works[name] = prepare(
                    z, sigma, calls[name].bank.chunk(0, len(calls[name].bank), device=bench.device), k
                )
            except Exception as error:  # out of memory, no kernel for such a head, no compiler
                bench.decline(f"{bench.name_of_section}: {name} at k = {k}", error)
        for name, times in bench.interleaved(works, guests=peers_of).items():
            rate = rated(times, calls[name].pairs, batch)
            bench.add(engine=name, **calls[name].about(), error=errors[name], **more.get(name, {}), **rate)
        bench.flush()


def rates(bench: Bench, bank: ps.PatchBank, engine: str, cases: list[tuple[int, float, int, int]]) -> None:
    """An engine at (k, sigma, images, batch), zeros padding."""
    for k, sigma, images, batch in cases:
        if bench.out_of_time(f"{bench.name_of_section}: k = {k}, batch {batch}"):
            return
        call = Call(first_images(bank, images), k, sigma, noisy(bank, sigma, batch, bench.device), "zeros")
        try:
            error = 0.0 if engine == "auto" else call.error(engine)
            work = call.work(engine)
            served = work().engine
            rate = rated(bench.seconds(work), call.pairs, batch)
        except Exception as problem:
            bench.fail(f"{bench.name_of_section}: {engine} at k = {k}, batch {batch}", problem)
            continue
        bench.add(
            engine=served, asked=engine, **call.about(), error=error, **details(served, call, bench.device), **rate
        )
        bench.flush()


def graph(bench: Bench, bank: ps.PatchBank) -> None:
    """One dense call of 16 images launched by the host, and replayed as a CUDA graph: what launching costs."""
    if bench.device.type != "cuda":
        return
    call = Call(first_images(bank, 2000), 7, 0.99, noisy(bank, 0.99, BATCH, bench.device))
    machine = call.machine("fused")
    call.work("fused")()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        machine.denoise(call.z, call.sigma)
    works = {"launched": lambda: machine.denoise(call.z, call.sigma), "replayed": recorded.replay}
    for name, times in bench.interleaved(works).items():
        bench.add(engine="fused", how=name, **call.about(), **rated(times, call.pairs, BATCH))


def several_sizes(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` at each patch size alone, and at all of them in one pass over the bank, circular padding."""
    sigma, sizes = 1.0, ((3, 5) if bench.dry else tuple(range(3, 18, 2)))
    part, z = first_images(bank, 10_000), noisy(bank, sigma, 1, bench.device)
    calls = {str(k): Call(part, k, sigma, z) for k in sizes}
    competitions = [call.machine("sliding").competition(call.k) for call in calls.values()]
    levels, together = torch.full((1,), sigma, dtype=torch.float64), "all in one pass"
    works = {k: call.work("sliding") for k, call in calls.items()}
    sliding = next(one for one in engines.EXACT if one.name == "sliding" and one.runs_on(bench.device))
    works[together] = lambda: sliding.posterior_sums(z, levels, part, competitions, MEMORY)
    seconds = bench.interleaved(works)
    pairs = {k: call.pairs for k, call in calls.items()}
    pairs[together] = sum(pairs.values())
    for name, times in seconds.items():
        about = {"k": name, "sigma": sigma, "batch": 1, "pairs": pairs[name]}
        bench.add(engine="sliding", **about, **rated(times, pairs[name], 1))
    alone = [times["seconds_median"] for name, times in seconds.items() if name != together]
    whole = seconds[together]["seconds_median"]
    bench.content["sizes together"] = {"over_slowest": whole / max(alone), "over_separate_calls": whole / sum(alone)}
    print(bench.content["sizes together"], flush=True)


def whole_images(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` beside the float64 product of `reference` where whole images compete, by batch."""
    for batch in (1,) if bench.dry else (1, 16, 64):
        if bench.out_of_time(f"{bench.name_of_section}: batch {batch}"):
            return
        batch = min(batch, len(bank))
        call = Call(bank, None, 1.0, noisy(bank, 1.0, batch, bench.device))
        error = call.error("sliding")
        for name, times in bench.interleaved({name: call.work(name) for name in ("sliding", "reference")}).items():
            rate = rated(times, call.pairs, batch)
            bytes_of = bank.images.numel() / times["seconds_median"]
            bench.add(engine=name, **call.about(), error=error if name == "sliding" else 0.0, **rate,
                      pixels_per_second=bytes_of)  # fmt: skip


def streamed(bench: Bench, bank: ps.PatchBank) -> None:
    """`sliding` on a bank that lies in the device's memory, and on the same streamed through pinned memory."""
    if bench.device.type != "cuda":
        return
    call = Call(bank, 7, 1.0, noisy(bank, 1.0, 1, bench.device))
    work, share = call.work("sliding"), resident.RESIDENT_SHARE
    for where, used in (("resident", share), ("streamed", 0.0)):
        resident.RESIDENT_SHARE = used
        resident.copies.clear()
        bench.add(engine="sliding", how=where, **call.about(), **rated(bench.seconds(work), call.pairs, 1))
    resident.RESIDENT_SHARE = share


def warps_specialised(bench: Bench, bank: ps.PatchBank) -> None:
    """`fused` beside a prototype of its loop with specialised warps, at high noise, circular padding."""
    if bench.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        bench.skip("specialised: it is for sm_90")
        return
    import specialised

    # The noise where 64 columns are enough.
    call = Call(first_images(bank, 5_000), 5, 10.0, noisy(bank, 10.0, BATCH, bench.device))

    def prototype(of: Call) -> Callable[[], torch.Tensor]:
        return specialised.prepare(of.bank, of.k, of.sigma, of.z, of.machine("reference").competition(of.k))

    small = call.few()
    error = (prototype(small)() - small.exact()).abs().nan_to_num(torch.inf).max().item()
    if error > fused.TOLERANCE:
        raise Wrong(f"the prototype is off by {error:.3g}")
    errors = {"fused": call.error("fused"), "prototype": error}
    works = {"fused": call.work("fused"), "prototype": prototype(call)}
    of_plan = {
        "fused": described(call, bench.device),
        "prototype": {"columns": 64} | derived(cost.fused(64, share=0), cost.SPECIALISED, bench.device),
    }
    for name, times in bench.interleaved(works).items():
        about = call.about() | of_plan[name]
        bench.add(engine=name, **about, error=errors[name], **rated(times, call.pairs, BATCH))


def each_configuration(bench: Bench, bank: ps.PatchBank) -> None:
    """The configurations that `fused` chooses from, one by one: what a polynomial's share and larger tiles give."""
    for k, sigma in ((3, 2.0),) if bench.dry else ((5, 10.0), (17, 11.0)):
        if bench.out_of_time(f"{bench.name_of_section}: k = {k}, sigma = {sigma:g}"):
            return
        call = Call(first_images(bank, 5_000), k, sigma, noisy(bank, sigma, BATCH, bench.device))
        capability = torch.cuda.get_device_capability() if bench.device.type == "cuda" else (9, 0)
        for configuration in fused.configurations(plan_of(call, bench.device), capability, ess=False):
            alone = mock.patch.object(fused, "configurations", lambda *_, one=configuration: [one])
            with alone, mock.patch.dict(autotune._chosen, clear=True):
                error = call.error("fused")
                times = bench.seconds(call.work("fused"))
            about = call.about() | described(call, bench.device) | {"configuration": dataclasses.asdict(configuration)}
            bench.add(engine="fused", **about, error=error, **rated(times, call.pairs, BATCH))


def golddiff_of(call: Call, engine: str) -> Callable[[], torch.Tensor]:
    """The images that GoldDiff chooses for each noisy image, summed by an exact engine."""
    everything = call.bank.chunk(0, len(call.bank), device=call.z.device)

    def work() -> torch.Tensor:
        generator, means = torch.Generator().manual_seed(0), []
        for z in call.z:
            chosen = golddiff.images(z, call.sigma, everything, generator).cpu()
            part = ps.PatchBank(call.bank.images[chosen])
            means.append(call.machine(engine, part).denoise(z[None], call.sigma))
        return torch.cat(means)

    return work


def keep(name: str, work: Callable[[], object], answers: dict[str, object]) -> Callable[[], None]:
    return lambda: answers.update({name: work()})


def chosen_images(bench: Bench, bank: ps.PatchBank, exact_by: str = "fused") -> None:
    """GoldDiff's images, summed exactly, beside sums over all of them, zeros padding."""
    for k, sigma in ((3, 0.5),) if bench.dry else GOLDDIFF_CASES:
        if bench.out_of_time(f"{bench.name_of_section}: k = {k}"):
            return
        batch = 1 if bench.dry else BATCH
        call = Call(bank, k, sigma, noisy(bank, sigma, batch, bench.device), "zeros")
        error = call.error(exact_by)
        dense = call.work(exact_by)
        exact = dense().mean
        summed = "fused" if unavailable("sliding", bench.device) else "sliding"
        works = {exact_by: dense, "golddiff": golddiff_of(call, summed)}
        answers: dict[str, object] = {}
        keeping = {name: keep(name, work, answers) for name, work in works.items()}
        for name, times in bench.interleaved(keeping).items():
            about, rate = call.about(), rated(times, call.pairs, batch)
            if name == exact_by:
                served = answers[name].engine
                bench.add(engine=served, **about, error=error, **details(served, call, bench.device), **rate)
                continue
            off = answers[name] - exact
            # Their pairs are those of the subset; what is compared is error and time.
            del rate["pairs_per_second"], about["pairs"]
            measured = {"error": off.abs().max().item(), "rms": off.square().mean().sqrt().item()}
            bench.add(engine=f"GoldDiff's images, {summed}", **about, **measured, **rate)
        bench.flush()


def sampled(bench: Bench, bank: ps.PatchBank) -> None:
    """`pruned` at several budgets beside exact sums and its time in the cost model, zeros padding, index built here."""
    for k, sigma in ((3, 0.5),) if bench.dry else PRUNED_CASES:
        if bench.out_of_time(f"{bench.name_of_section}: k = {k}"):
            return
        batch = 1 if bench.dry else BATCH
        call = Call(bank, k, sigma, noisy(bank, sigma, batch, bench.device), "zeros")
        exact_by = "sliding" if bench.dry else "fused"
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            index = ps.PatchIndex.build(bank, k, folder, progress=False)
            built = time.monotonic() - start
            works: dict[str, Callable[[], ps.Estimate]] = {exact_by: call.work(exact_by)}
            for budget in (0.1,) if bench.dry else (0.001, 0.003, 0.01):
                works[f"pruned, {budget:g}"] = call.work("pruned", index=index, budget=budget)
            exact = works[exact_by]()
            r = k // 2
            answers: dict[str, object] = {}
            keeping = {name: keep(name, work, answers) for name, work in works.items()}
            for name, times in bench.interleaved(keeping).items():
                about, rate, found = call.about(), rated(times, call.pairs, batch), answers[name]
                if name == exact_by:
                    bench.add(engine=found.engine, **about, **details(found.engine, call, bench.device), **rate)
                    continue
                off = (found.mean - exact.mean)[..., r:-r, r:-r]
                stderr = found.stderr[..., r:-r, r:-r]
                measured = {
                    "error": off.abs().max().item(), "rms": off.square().mean().sqrt().item(),
                    "stderr": stderr.square().mean().sqrt().item(),
                    "within_2": (off.abs() <= 2 * stderr + 1e-3).double().mean().item(),
                    "windows_evaluated": found.pairs, "index_seconds": built,
                }  # fmt: skip
                del rate["pairs_per_second"], about["pairs"]
                bench.add(engine=name, **about, **measured, **rate)
        bench.flush()


def samples(bench: Bench, bank: ps.PatchBank) -> None:
    """20 steps of DDIM with the published table, 16 images at once, over the whole bank; compiled before."""
    engine = "fused" if bench.dry else "auto"
    n, steps = (1, 2) if bench.dry else (BATCH, 20)
    table = ps.ScaleTable.constant(3) if bench.dry else ps.ScaleTable.published(TABLE)
    machine = ps.EquivariantLocalScore(bank, table, engine=engine, memory_limit=MEMORY)
    served: list[str] = []

    def work():
        served.clear()
        return ps.sample(machine, n=n, steps=steps, schedule="cosine", seed=0, device=bench.device, progress=False)

    levels = ps.get_schedule("cosine", steps).ratios[:-1].tolist()
    pairs = n * len(bank) * sum(machine.competition(table(level)).pairs_per_image for level in levels)
    times = bench.seconds(work)
    about = {"table": TABLE, "steps": steps, "batch": n, "images": len(bank), "pairs": pairs}
    bench.add(engine=engine, **about, **rated(times, pairs, n))


def images_of(path: Path | None, options: argparse.Namespace) -> torch.Tensor:
    """uint8 images of a folder or tar, resized to 32 x 32, or smooth random ones."""
    if path is None or options.dry:
        return record.smooth(3, 8 if options.dry else 32, 4 if options.dry else 20_000 if options.quick else 50_000)
    return record.shuffled(record.opened(path, size=32))


SECTIONS = (
    "ceilings", "peers", "banks", "batches", "graph", "samples", "golddiff", "pruned", "steps", "sliding",
    "several sizes", "whole images", "streamed", "specialised", "configurations",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder or tar of images; else smooth random")
    parser.add_argument("--seconds", type=float, default=440, help="start nothing after so many")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections, in the order of the run")
    parser.add_argument("--quick", action="store_true", help="three cases, three repeats, 20,000 images at most")
    parser.add_argument("--dry", action="store_true", help="tiny data, no result")
    options = parser.parse_args()
    bench = Bench(options)
    if reason := unavailable("fused", bench.device):
        sys.exit(f"engine fused: {reason}")
    if options.images and not options.images.exists():
        print(f"{options.images}: not found, taking smooth random images", file=sys.stderr)
        options.images = None
    images = images_of(options.images, options)
    bank = ps.PatchBank(images[:20_000] if options.quick else images)
    data = options.images.name if options.images and not options.dry else "smooth random"
    import triton

    bench.content |= {"data": data, "images": len(bank), "triton": triton.__version__, "quick": options.quick}
    # Step 1 is the last that is sampled, step 19 the first.
    levels = ps.get_schedule("cosine", 20).ratios[:-1].flip(0).tolist()[:19]
    scale = ps.ScaleTable.published(TABLE)

    bench.section("ceilings", units)
    # Peers in float32 compute in float32.
    torch.backends.cudnn.allow_tf32 = False
    bench.section("peers", beside_peers, bank, "fused")
    if options.dry:
        bench.section("banks", rates, bank, "fused", [(3, 2.0, 2, 2)])
    else:
        banks = [millions * 10**6 // 26**2 for millions in (1, 10)] + [len(bank)]  # windows of k = 7
        bench.section("banks", rates, bank, "fused", [(7, 0.99, images, 4) for images in banks])
        bench.section("batches", rates, bank, "fused", [(7, 0.99, len(bank), batch) for batch in (1, 4, 16)])
    bench.section("graph", graph, bank)
    bench.section("samples", samples, bank)
    bench.section("golddiff", chosen_images, bank)
    bench.section("pruned", sampled, bank)
    # Many plans over few images: they take the first configuration, as compiling is what takes time.
    os.environ["PATCHSCORE_AUTOTUNE"] = "0"
    steps = [(3, 0.5, 4, 1)] if options.dry else [(scale(sigma), sigma, 10_000, 4) for sigma in levels]
    bench.section("steps", rates, bank, "fused", steps)
    if reason := unavailable("sliding", bench.device):
        bench.skip(f"sliding: {reason}")
    else:
        bench.section("sliding", beside_peers, bank, "sliding")
        bench.section("several sizes", several_sizes, bank)
        bench.section("whole images", whole_images, bank)
        bench.section("streamed", streamed, bank)
    bench.section("specialised", warps_specialised, bank)
    bench.section("configurations", each_configuration, bank)
    bench.flush()
    bench.sensors.close()
    print(tables.gpu_table(bench.content["rows"]))
    if bench.content["failed"]:
        sys.exit("failed: " + "; ".join(bench.content["failed"]))


if __name__ == "__main__":
    main()
