"""Every configuration of the dense kernel compiled ahead of time for sm_80 and sm_90, and what the compiler made of it.

No GPU is needed: Triton's own ptxas, cuobjdump and nvdisasm do it. For each: registers, spills, shared memory, matrix
instructions, and the instructions of the loop over patches counted per (query, patch) pair and lane, from which the
ceilings follow. Writes benchmarks/results/fused_compile.json.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import record
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchscore.engines.features import Plan
from patchscore.engines.fused import Configuration, configurations, kernel_constants
from patchscore.kernels.dense import dense_kernel

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a block may have."""
TYPES = {
    **dict.fromkeys(("q", "p", "v"), "*fp16"),
    **dict.fromkeys(("scale", "sums", "other"), "*fp32"),
    "floor": "fp32",
}
POINTERS = ("q", "p", "v", "scale", "sums", "other")

# Per cycle and multiprocessor of an H200 (CUDA programming guide, throughput of arithmetic instructions; matrix units
# from the data sheet's dense fp16 rate), its clock under load and its number of multiprocessors.
H200 = {"exponentials": 16, "lanes": 128, "products": 2048, "clock": 1.755e9, "multiprocessors": 132}

PLANS = {
    "k = 3, sigma < 0.1: pixels, decisive weights from differences": Plan(27, q_lo=True, exact=True, skip=True),
    "k = 5, sigma < 0.1: pixels, decisive weights from differences": Plan(75, q_lo=True, exact=True, skip=True),
    "k = 3, pixels, query split": Plan(27, q_lo=True, skip=True),
    "k = 3, pixels": Plan(27),
    "k = 5, pixels": Plan(75),
    "k = 7, pixels": Plan(147),
    "k = 7, pixels, query split": Plan(147, q_lo=True, skip=True),
    "rank 61": Plan(61, axes=True),
    "rank 125": Plan(125, axes=True),
    "rank 189": Plan(189, axes=True),
    "rank 253": Plan(253, axes=True),
    "rank 317": Plan(317, axes=True),
    "rank 509": Plan(509, axes=True),
    "k = 17, pixels": Plan(867),
    "k = 17, sigma < 0.6: pixels, decisive weights from differences": Plan(867, q_lo=True, exact=True, skip=True),
}


def compiled(plan: Plan, channels: int, configuration: Configuration, capability: int):
    constants = kernel_constants(plan, channels, configuration)
    names = dense_kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS}
    source = ASTSource(dense_kernel, signature, {(names.index(n),): x for n, x in constants.items()}, attributes)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """(REG, STACK, SHARED, LOCAL), and the SASS."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    assert found, usage.stdout
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, found.groups()), strict=True)), sass.stdout


def instructions(sass: str) -> list[tuple[str | None, str, str]]:
    """(label before it, mnemonic, line) of every instruction."""
    found, label = [], None
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            label = match[1]
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            found.append((label, match[1], line))
            label = None
    return found


def loop_over_patches(sass: str, blocks: int) -> tuple[collections.Counter[str], int]:
    """Instructions of the shortest loop that holds most of the exponentials, by mnemonic; how many a skipped tile runs.

    A skipped tile takes every long jump forward inside the loop. An inner loop with products runs `blocks` times.
    """
    code = instructions(sass)
    labels = {label: i for i, (label, _, _) in enumerate(code) if label}

    def target_of(line: str) -> int | None:
        found = re.search(r"(\.L_x_\d+)", line)
        return labels.get(found[1]) if found else None

    loops = []
    for i, (_, mnemonic, line) in enumerate(code):
        start = target_of(line)
        if mnemonic.startswith("BRA") and start is not None and start <= i:
            loops.append(range(start, i + 1))

    def exponentials(part: range) -> int:
        return sum(code[i][1] == "MUFU.EX2" for i in part)

    most = max(map(exponentials, loops))
    loop = min((part for part in loops if exponentials(part) == most), key=len)
    times = dict.fromkeys(loop, 1)
    for part in loops:
        if (
            part.start > loop.start
            and part.stop < loop.stop
            and any(code[i][1].startswith(("HGMMA", "HMMA")) for i in part)
        ):
            times |= dict.fromkeys(part, blocks)
    i, skipped = loop.start, 0
    while i < loop.stop:
        _, mnemonic, line = code[i]
        skipped += times[i]
        target = target_of(line) if mnemonic.startswith("BRA") else None
        i = target if target is not None and i + 200 < target < loop.stop else i + 1
    counts: collections.Counter[str] = collections.Counter()
    for i in loop:
        counts[code[i][1]] += times[i]
    return counts, skipped


def report(title: str, plan: Plan, configuration: Configuration, capability: int, channels: int = 3) -> dict:
    kernel = compiled(plan, channels, configuration, capability)
    usage, sass = disassembled(kernel.asm["cubin"])
    counts, skipped = loop_over_patches(sass, plan.columns // configuration.block if configuration.block else 1)

    def total(*prefixes: str) -> int:
        return sum(count for mnemonic, count in counts.items() if mnemonic.startswith(prefixes))

    pairs = configuration.queries * configuration.patches / (32 * configuration.warps)  # of one lane and tile
    matrix = {name: sum(m.startswith(name) for _, m, _ in instructions(sass)) for name in ("HGMMA", "HMMA")}
    row = {
        "plan": title,
        "columns": plan.columns,
        "capability": capability,
        "tile": f"{configuration.queries} x {configuration.patches}",
        "warps": configuration.warps,
        "stages": configuration.stages,
        "block": configuration.block,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "wgmma": matrix["HGMMA"],
        "mma": matrix["HMMA"],
        "per_pair": sum(counts.values()) / pairs,
        "per_pair_of_a_skipped_tile": skipped / pairs if plan.skip else None,
        "exponentials_per_pair": total("MUFU.EX2") / pairs,
        "multiply_adds_per_pair": total("FFMA", "FMUL", "FADD") / pairs,
        "maxima_per_pair": total("FMNMX") / pairs,
        "conversions_per_pair": total("F2F") / pairs,
    }
    return row | (ceilings(row, configuration, kernel_constants(plan, channels, configuration)["NV"]))


def ceilings(row: dict, configuration: Configuration, values: int) -> dict[str, float]:
    """Pairs a second an H200 could do if one unit alone bound it; `values` columns count as 32 (wgmma's A side)."""
    per_second = H200["clock"] * H200["multiprocessors"]
    return {
        "exponential_ceiling": H200["exponentials"] * per_second / row["exponentials_per_pair"],
        "issue_ceiling": H200["lanes"] * per_second / row["per_pair"],
        "matrix_ceiling": H200["products"] * per_second / (row["columns"] + max(values, 32)),
    }


def jobs() -> list[tuple[str, Plan, Configuration, int]]:
    return [
        (title, plan, configuration, capability)
        for capability in (90, 80)
        for title, plan in PLANS.items()
        for configuration in configurations(plan, divmod(capability, 10))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="plans whose title contains this")
    parser.add_argument("--name", default="fused_compile", help="of the file in benchmarks/results")
    parser.add_argument("--no-json", action="store_true", help="print only")
    options = parser.parse_args()
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        rows = []
        for row in pool.map(report, *zip(*(job for job in jobs() if options.only in job[0]), strict=True)):
            rows.append(row)
            fits = row["shared_bytes"] <= SHARED_LIMIT[row["capability"]]
            print(
                f"sm_{row['capability']} {row['plan']:64} K={row['columns']:4} {row['tile']:>9} {row['warps']}w "
                f"{row['stages']}st block={row['block']} regs={row['registers']} spilled={row['spilled_bytes']} "
                f"shared={row['shared_bytes']}{'' if fits else ' TOO MUCH'} wgmma={row['wgmma']} mma={row['mma']} "
                f"instr/pair={row['per_pair']:.2f} exp/pair={row['exponentials_per_pair']:.2f}",
                flush=True,
            )
    if not options.no_json:
        record.write(options.name, __doc__.splitlines()[0], triton=triton.__version__, h200=H200, rows=rows)


if __name__ == "__main__":
    main()
