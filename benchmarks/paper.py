"""What the GPU engines should reach, on paper: tables from the cost model (patchscore/engines/cost.py), not measured.

For the kernels as compiled, for the steps of a published table over all of CIFAR-10, and for banks of 1e9 and 1e10
windows. benchmarks/report.py puts them into the docs; nothing is written here.
"""

from __future__ import annotations

from dataclasses import dataclass

import record
import torch

import patchscore as ps
from patchscore.engines import cost

DEVICE = cost.H200


# The kernels as compiled.


def compiled_work(row: dict) -> tuple[cost.Work, bool]:
    """A row of fused_compile.json as work of a pair, by the instructions counted; whether its tiles are skipped ones.

    A skipped tile costs its copy, the first product and the maxima.
    """
    queries, patches = map(int, row["tile"].split(" x "))
    columns, skipped = row["columns"], row["per_pair_of_a_skipped_tile"]
    l2_bytes = 2 * columns / queries + (2 * columns / patches if row["block"] else 0)
    if skipped:
        return cost.Work(0, columns, skipped, l2_bytes), True
    values = 2 * cost.VALUE_COLUMNS / queries
    products = columns + cost.VALUE_PRODUCTS
    loop = cost.Work(row["exponentials_per_pair"], products, row["per_pair"], l2_bytes + values)
    return loop.scaled(1 + cost.PILOT), False


def shown(of: cost.Range) -> str:
    low, high = (f"{x / 1e12:.2g}" for x in of)
    return low if low == high else f"{low} to {high}"


# Steps over all of CIFAR-10.

TABLE, IMAGES, BATCH, STEPS, SHAPE = "cifar10-resnet-zeros", 50_000, 16, 20, (3, 32, 32)


@dataclass(frozen=True)
class Plan:
    """The columns of a row, from the table that benchmarks/fused_precision.py made."""

    columns: int
    size: int
    exact: bool
    pilot: bool


def columns_table() -> dict[int, dict[float, Plan]]:
    """k -> noise -> plan, for 50,000 images of CIFAR-10."""
    found: dict[int, dict[float, Plan]] = {}
    for row in record.read("fused_precision")["rows"]:
        numbers = SHAPE[0] * row["k"] ** 2
        # As `choose_plan` has it: where float32 sums of products could be off by the tolerance.
        exact = 1.5 * numbers * 2.0**-22 > record.read("fused_precision")["tolerance"] * row["sigma"] ** 2
        found.setdefault(row["k"], {})[row["sigma"]] = Plan(row["columns_50000"], numbers, exact, row["pilot_50000"])
    return found


def plan_at(table: dict[int, dict[float, Plan]], k: int, sigma: float) -> Plan:
    """Of the next noise below that the table has, which takes as many columns or more; sizes between by d."""
    nearest = min(table, key=lambda known: (known < k, abs(known - k)))
    of = table[nearest][max(known for known in table[nearest] if known <= sigma)]
    scale = (k / nearest) ** 2
    numbers = SHAPE[0] * k * k
    columns = -(-round(of.columns * scale) // 32) * 32
    return Plan(columns, numbers, of.exact, of.pilot)


def steps() -> list[dict]:
    """One row a step of the sampler: milliseconds an image by engine, and which one "auto" would take."""
    table, scale = columns_table(), ps.ScaleTable.published(TABLE)
    bank = ps.PatchBank(torch.zeros(1, *SHAPE, dtype=torch.uint8))
    rows = []
    for sigma in ps.get_schedule("cosine", STEPS).ratios[:-1].tolist():
        k = scale(sigma)
        competition = ps.EquivariantLocalScore(bank, k).competition(k)
        plan = plan_at(table, k, sigma)
        seconds = {"auto": 0.0}
        # Rows of locked coordinates are pixels.
        pixels = Plan(max(plan.columns, -(-(plan.size + 3) // 32) * 32), plan.size, plan.exact, pilot=False)

        def plan_of(group: cost.Group, plan: Plan = plan, pixels: Plan = pixels) -> Plan:
            return pixels if group.rows.locked or group.cols.locked else plan

        served = {}
        for group in competition.groups:
            dense = cost.fused_seconds(DEVICE, group, IMAGES, BATCH, plan_of(group))
            slides = cost.sliding_seconds(DEVICE, competition.only([group]), IMAGES, BATCH, SHAPE)
            served[group] = "fused" if dense <= slides else "sliding"
            seconds["auto"] += min(dense, slides)
        seconds["sliding"] = cost.sliding_seconds(DEVICE, competition, IMAGES, BATCH, SHAPE)
        interior = max(competition.groups, key=lambda group: group.pixels * group.windows_per_image)
        ms = {name: 1e3 * spent / BATCH for name, spent in seconds.items()}
        rows.append({"sigma": sigma, "k": k, "columns": plan.columns, "exact": plan.exact, "interior": served[interior],
                     "pairs": IMAGES * competition.pairs_per_image, **ms})  # fmt: skip
    return rows


# Larger banks.

PIXELS = 64  # of a side: ImageNet at 64 x 64, in colour
CASES = ((3, 0.2), (7, 1.0), (17, 4.0))
BUS, LINK = 50e9, 400e9  # bytes a second: PCIe 5.0 x16 as reached; NVLink, one way


def larger_banks() -> list[dict]:
    """Bytes, pairs and seconds a step of one noisy image, by the resource that takes longest."""
    table, rows = columns_table(), []
    bank = ps.PatchBank(torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8))
    for windows in (1e9, 1e10):
        for k, sigma in CASES:
            inside = (PIXELS - k + 1) ** 2
            interior = max(ps.EquivariantLocalScore(bank, k).competition(k).groups, key=lambda group: group.pixels)
            competition = cost.Competition(k, "zeros", (interior,))
            pairs, bank_bytes = inside * windows, windows / inside * 3 * PIXELS**2
            common = {"windows": windows, "k": k, "sigma": sigma, "images": windows / inside, "pairs": pairs}
            common["bank_bytes"] = bank_bytes
            plan = table[k][sigma]
            slides = cost.sliding(competition, (3, PIXELS, PIXELS))
            for gpus in (1, 8):
                made = {
                    "fused": dense(windows, pairs, inside, plan, bank_bytes, gpus),
                    "sliding": exact_from_pixels(pairs, slides, bank_bytes, gpus),
                }
                for engine, costs in made.items():
                    held = costs.pop("bytes")
                    # The sums of every pixel, from every GPU but one: m, s, v, s2 in float64.
                    costs["link"] = (gpus - 1) * 8 * 6 * PIXELS**2 / LINK
                    binding = max(costs, key=lambda name: costs[name])
                    row = {**common, "engine": engine, "gpus": gpus, "bytes_a_gpu": held / gpus}
                    rows.append({**row, "seconds": costs[binding], "binds": binding, "costs": costs})
    return rows


def dense(windows: float, pairs: float, queries: int, plan: Plan, bank_bytes: float, gpus: int) -> dict[str, float]:
    """`fused`: every pair; rows come from memory once for all queries that run at a time, from L2 once a tile."""
    work = cost.fused(plan.columns, plan.size if plan.exact else 0, pilot=plan.pilot)
    per_pair, efficiency = work.costs(DEVICE), cost.middle(cost.TRITON)
    rows = windows * 2 * (plan.columns + cost.VALUE_COLUMNS)
    fits = rows / gpus <= cost.KEPT * DEVICE.memory
    padded = -(-queries // cost.QUERIES) * cost.QUERIES / queries
    computing = per_pair["products"] + max(per_pair["exponentials"], per_pair["instructions"])
    return {
        "bytes": rows if fits else bank_bytes,
        "products and softmax": padded * pairs * computing / efficiency / gpus,
        "L2": padded * pairs * per_pair["L2"] / gpus,
        "memory": rows * (1 if fits else 1 + cost.MAKING) / (DEVICE.memory_rate * gpus),
        "bus": 0.0 if bank_bytes / gpus <= cost.KEPT * DEVICE.memory else bank_bytes / (BUS * gpus),
    }


def exact_from_pixels(pairs: float, work: cost.Work, bank_bytes: float, gpus: int) -> dict[str, float]:
    """`sliding`: every pair, at the rate its instructions allow; the bank's bytes from memory or over the bus."""
    fits = bank_bytes / gpus <= cost.KEPT * DEVICE.memory
    return {
        "bytes": bank_bytes,
        "instructions": pairs * work.seconds(DEVICE, cost.middle(cost.INTEGER)) / gpus,
        "memory" if fits else "bus": bank_bytes / ((DEVICE.memory_rate if fits else BUS) * gpus),
    }


if __name__ == "__main__":
    for row in steps():
        print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
    mean = {name: sum(row[name] for row in steps()) / STEPS for name in ("sliding", "auto")}
    print({name: f"{value:.3g} ms an image and step" for name, value in mean.items()})
    for row in larger_banks():
        print(f"{row['windows']:.0e} {row['k']} {row['engine']:8} x{row['gpus']} {row['seconds']:.3g} s {row['binds']}")
