"""GPUs: what was measured, what the compiler made of the kernels, and what is derived on paper."""

import json
from collections.abc import Set

import paper

from patchscore.engines import cost

from . import results
from .results import Missing, measured_on, result, table


def gpu() -> str:
    devices = sorted(results.RESULTS.glob("gpu-*.json"))
    if not devices:
        raise Missing("gpu-*")
    parts = []
    for path in devices:
        record = json.loads(path.read_text())
        lacking = {"Not measured": record["skipped"], "Failed": record["failed"]}
        parts.append(f"{record['device']}, {measured_on(record)}:\n\n{gpu_table(record['rows'], red_engines(record))}")
        parts += [
            "\n".join([f"{what} there:\n", *(f"- {of}" for of in some)]) for what, some in lacking.items() if some
        ]
    return "\n\n".join(parts)


def red_engines(record: dict) -> set[str]:
    """Engines whose GPU tests did not pass in the run of gpu_quick.sh that made the record."""
    ended = {step["step"]: step["status"] for step in record.get("steps", [])}
    return {engine for engine in ("fused", "sliding") if ended.get(f"tests-{engine}", "passed") != "passed"}


def gpu_table(rows: list[dict], red: Set[str] = frozenset()) -> str:
    """Rows of gpu.py, which prints this too; no speed of an engine whose tests are red."""

    def cells(row: dict) -> list[str]:
        named = [str(row.get(name, "")) for name in ("engine", "k", "sigma", "batch")]
        if red & set(row["engine"].split(" and ")):
            return [row["section"], *named, *[""] * 4, "not reported: its tests are red", *[""] * 7]
        return [
            row["section"],
            *named,
            f"{row['windows']:,}" if "windows" in row else "",
            *(str(row.get(name, "")) for name in ("columns", "precision", "budget")),
            f"{row['pairs_per_second'] / 1e12:.3f}" if "pairs_per_second" in row else "",
            f"{row['derived_low'] / 1e12:.2f} to {row['derived_high'] / 1e12:.2f}" if "derived_low" in row else "",
            f"{row['clock_mhz'] / 1e3:.2f}, {row['power_watts']:.0f}" if "clock_mhz" in row else "",
            *(f"{row[name]:.1e}" if name in row else "" for name in ("error", "rms", "stderr_rms")),
            f"{1e3 * row['seconds_median'] / row.get('batch', 1):.2f}",
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        ]

    header = ["section", "engine", "k", "sigma", "batch", "windows", "columns", "precision", "budget", "1e12 pairs/s"]
    header += ["derived", "GHz, W", "worst pixel", "rms", "rms stated", "ms an image", "peak GiB"]
    return table(header, [cells(row) for row in rows])


def fused_compiled() -> str:
    record = result("fused_compile-triton-3.6")
    rows = []
    for row in record["rows"]:
        if row["capability"] != 90:
            continue
        work, skipped = paper.compiled_work(row)
        cells = [row["plan"], str(row["columns"]), f"{row['tile']}, {row['warps']}w, {row['stages']}st"]
        cells += [str(row[key]) for key in ("registers", "spilled_bytes")]
        cells += [f"{row['shared_bytes'] / 1024:.0f}", str(row["wgmma"])]
        cells += [f"{row['per_pair']:.1f}", f"{row['exponentials_per_pair']:.2f}"]
        cells += [f"{row[key] / 1e12:.1f}" for key in ("exponential_ceiling", "issue_ceiling", "matrix_ceiling")]
        cells.append(f"{paper.DEVICE.l2_rate / work.l2_bytes / 1e12:.2g}")
        cells.append(paper.shown(cost.rate(work, paper.DEVICE, cost.TRITON)) + " (skipped)" * skipped)
        rows.append(cells)
    header = ["plan", "K", "tile", "regs", "spilled", "KiB shared", "wgmma", "instr / pair", "exp / pair"]
    header += ["exp", "issue", "matrix", "L2", "derived"]
    return f"Triton {record['triton']}, sm_90 ({record['commit']}, {record['date']}):\n\n{table(header, rows)}"


def fused_everywhere() -> str:
    return _everywhere("fused_compile")


def _everywhere(report: str) -> str:
    rows = []
    for name in (f"{report}-triton-3.6", report):
        record = result(name)
        for capability, kind in ((100, "tcgen05"), (90, "wgmma"), (80, "mma")):
            found = [row for row in record["rows"] if row["capability"] == capability]
            if not found:
                continue
            cells = [record["triton"], f"sm_{capability}", str(len(found))]
            cells += [f"{min(r['registers'] for r in found)} to {max(r['registers'] for r in found)}"]
            cells += [str(max(r["spilled_bytes"] for r in found))]
            cells += [f"{max(r['shared_bytes'] for r in found) / 1024:.0f}"]
            multiply = [r for r in found if r.get("kernel", "scan") == "scan"]
            cells += [f"{sum(r[kind] > 0 for r in multiply)} of {len(multiply)} with {kind}"]
            rows.append(cells)
    header = [
        "Triton",
        "device",
        "compiled",
        "registers",
        "most bytes spilled",
        "most KiB shared",
        "matrix instructions",
    ]
    return table(header, rows)


def fused_before() -> str:
    """The first configuration of each plan, with a running maximum and with a fixed reference."""
    before, after = result("fused_compile-before"), result("fused_compile-triton-3.6")
    rows = []
    for old in before["rows"]:
        new = next(row for row in after["rows"] if row["capability"] == 90 and row["plan"] == old["plan"])
        if any(row[0] == old["plan"] for row in rows):
            continue
        cells = [f"{of['tile']}, {of['warps']}w" for of in (old, new)]
        cells = [old["plan"], str(old["columns"]), cells[0] if cells[0] == cells[1] else " -> ".join(cells)]
        for key, unit in (("per_pair", 1), ("registers", 1), ("shared_bytes", 1024), ("programs", 1)):
            cells.append(" -> ".join(f"{of[key] / unit:.3g}" for of in (old, new)))
        cells.append(" -> ".join(f"{of['l2_bytes_per_pair']:.2f}" for of in (old, new)))
        rows.append(cells)
    header = ["plan", "K", "tile", "instr / pair", "registers", "KiB shared", "programs", "bytes / pair from L2"]
    return (
        f"Triton {after['triton']}, sm_90, before ({before['commit']}) and after ({after['commit']}):\n\n"
        f"{table(header, rows)}"
    )


def fused_precision() -> str:
    record = result("fused_precision")
    rows = []
    sigmas = sorted({row["sigma"] for row in record["rows"]})
    for k in sorted({row["k"] for row in record["rows"]}):
        found = {row["sigma"]: row for row in record["rows"] if row["k"] == k}
        rows.append([str(k), *(f"{found[s]['columns']}: {found[s]['worst']:.0e}" for s in sigmas)])
    worst = max(row["worst"] for row in record["rows"])
    note = (
        f"{record['queries']} query pixels a cell, CIFAR-10, columns: worst of {record['queries']} pixels x 3 channels "
        f"({record['commit']}, {record['date']}). The worst of all is {worst:.1e}, {record['tolerance']:g} was asked:"
    )
    return f"{note}\n\n{table(['k', *(f'{s:g}' for s in sigmas)], rows)}"


def fused_columns() -> str:
    record = result("fused_precision")
    sigmas = sorted({row["sigma"] for row in record["rows"]})
    rows = []
    for k in sorted({row["k"] for row in record["rows"]}):
        found = {row["sigma"]: row for row in record["rows"] if row["k"] == k}
        rows.append([str(k), str(3 * k * k), *(str(found[s]["columns_50000"]) for s in sigmas)])
    return table(["k", "C k^2", *(f"{s:g}" for s in sigmas)], rows)


def sliding_compiled() -> str:
    """The CUDA kernel of `sliding`: what a pair costs in its machine code, and the rates that follow."""
    record = result("sliding_cuda_sass")
    rows = []
    for row in record["rows"]:
        if row["channels"] != 3 and row["k"] not in (3, 17):
            continue
        work = cost.Work(1, 0, row["instructions_per_pair"], 0)
        cells = [str(row["k"]), str(row["channels"]), f"{row['instructions_per_pair']:.1f}"]
        cells += [f"{row['shared_accesses_per_pair']:.1f}", f"{row['products_per_pair']:.2f}"]
        cells += [f"{row['predicted_pairs_per_second'] / 1e12:.2f}"]
        rows.append([*cells, paper.shown(cost.rate(work, paper.DEVICE, cost.INTEGER)), results.NOT_MEASURED])
    header = ["k", "C", "instructions", "shared accesses", "products", "bound, 1e12 pairs/s", "derived", "measured"]
    return f"sm_90 ({record['commit']}, {record['date']}):\n\n{table(header, rows)}"


def on_paper() -> str:
    rows = [
        [
            f"{row['windows']:.0e}".replace("e+", "e"),
            f"{row['k']}, {row['sigma']:g}",
            f"{row['images'] / 1e6:.2g}M",
            f"{row['pairs']:.1e}".replace("e+", "e"),
            f"{row['bank_bytes'] / 1e9:.0f}",
            f"`{row['engine']}`",
            str(row["gpus"]),
            f"{row['bytes_a_gpu'] / 1e9:.0f}",
            f"{row['seconds']:.2g}",
            row["binds"],
        ]
        for row in paper.larger_banks()
    ]
    header = ["windows", "k, sigma", "images", "pairs", "bank, GB", "engine", "GPUs", "GB a GPU", "s a step", "binds"]
    device = paper.DEVICE
    note = (
        f"Derived for {device.name}s of {device.multiprocessors} multiprocessors at {device.clock / 1e9:g} GHz, "
        f"{device.memory / 1e9:.0f} GB at {device.memory_rate:.2g} bytes/s, L2 at {device.l2_rate:.2g} bytes/s "
        f"(assumed), PCIe at {paper.BUS:.2g} and NVLink at {paper.LINK:.2g} bytes/s; not measured."
    )
    return f"{table(header, rows)}\n\n{note}"


def expected_steps() -> str:
    """Each step of a published table over all of CIFAR-10, by engine."""
    steps = paper.steps()
    rows = [
        [
            f"{row['sigma']:.3g}",
            str(row["k"]),
            f"{row['columns']}{' (exact)' if row['exact'] else ''}",
            f"{row['pairs']:.2g}".replace("e+", "e"),
            *(f"{row[engine]:.1f}" for engine in ("sliding", "auto")),
            f"`{row['interior']}`",
        ]
        for row in steps
    ]
    mean = [f"{sum(row[engine] for row in steps) / len(steps):.1f}" for engine in ("sliding", "auto")]
    rows.append(["mean", "", "", "", *mean, ""])
    header = ["sigma", "k", "K", "pairs an image", "ms an image: `sliding`", "`auto`", "interior by"]
    note = (
        f"Derived, not measured: {paper.BATCH} images at once on {paper.DEVICE.name}, {paper.IMAGES:,} images of "
        f"CIFAR-10, zero padding, `{paper.TABLE}`; K of the next lower noise in the table of columns:"
    )
    return f"{note}\n\n{table(header, rows)}"


def anchors() -> str:
    """The model beside published attention kernels."""
    rows = []
    for name, of in cost.PUBLISHED.items():
        for head, teraflops in of.items():
            work = cost.attention(head, 2 if name == "FlashAttention-3" and head > 64 else 1)
            published = teraflops * 1e12 / (4 * head)
            share = published * work.seconds(cost.H100, 1.0)
            rows.append([name, str(head), str(teraflops), f"{published / 1e12:.2f}",
                         f"{1 / work.seconds(cost.H100, 1.0) / 1e12:.2f}", f"{share:.2f}"])  # fmt: skip
    header = ["kernel", "head size", "published TFLOPS", "1e12 pairs/s", "model at efficiency 1", "efficiency"]
    return f"H100, half floats, no causal mask, 16k tokens (arXiv:2407.08608, figure 5):\n\n{table(header, rows)}"
