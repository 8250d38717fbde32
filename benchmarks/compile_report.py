"""Every kernel and configuration compiled ahead of time for sm_80, sm_90 and sm_100, and what the compiler made of it.

No GPU is needed: Triton's own ptxas, cuobjdump and nvdisasm do it. For each: registers, spills, shared memory, matrix
instructions, and of the two that multiply the instructions of the loop over patches counted per (query, patch) pair and
lane, from which the ceilings follow. Writes benchmarks/results/fused_compile.json.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import record
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchscore.engines.autotune import Configuration
from patchscore.engines.fused.kernel import posterior_kernel
from patchscore.engines.fused.launch import configurations, kernel_constants
from patchscore.engines.fused.plan import Plan

CAPABILITIES = (90, 80, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a block may have; a multiprocessor has 1 KiB more, and each block takes 1 KiB besides."""
REGISTERS, THREADS = 65536, 2048
"""Of a multiprocessor."""
TYPES = {
    **dict.fromkeys(("q", "p", "v"), "*fp16"),
    **dict.fromkeys(("scale", "sums", "other"), "*fp32"),
    "floor": "fp32",
}
# Per cycle and multiprocessor of an H200 (CUDA programming guide, throughput of arithmetic instructions; matrix units
# from the data sheet's dense fp16 rate), its clock under load and its number of multiprocessors.
H200 = {"exponentials": 16, "lanes": 128, "products": 2048, "clock": 1.755e9, "multiprocessors": 132}

PLANS = {
    "k = 3, sigma < 0.1: pixels, decisive weights from differences": Plan(27, q_lo=27, exact=True, skip=True),
    "k = 5, sigma < 0.1: pixels, decisive weights from differences": Plan(75, q_lo=75, exact=True, skip=True),
    "k = 3, pixels, query split": Plan(27, q_lo=27, skip=True),
    "k = 3, pixels": Plan(27, pilot=True),
    "k = 5, pixels": Plan(75, pilot=True),
    "k = 7, pixels": Plan(147, pilot=True),
    "k = 5, axes, eight split": Plan(75, axes=True, q_lo=8, p_lo=8, pilot=True),
    "k = 7, axes, eight split": Plan(147, axes=True, q_lo=8, p_lo=8, pilot=True),
    "k = 7, pixels, query split": Plan(147, q_lo=147, skip=True),
    "rank 61": Plan(61, axes=True, pilot=True),
    "rank 125": Plan(125, axes=True, pilot=True),
    "rank 189": Plan(189, axes=True, pilot=True),
    "rank 253": Plan(253, axes=True, pilot=True),
    "rank 317": Plan(317, axes=True, pilot=True),
    "rank 509": Plan(509, axes=True, pilot=True),
    "k = 17, pixels": Plan(867, pilot=True),
    "k = 17, sigma < 0.6: pixels, decisive weights from differences": Plan(867, q_lo=867, exact=True, skip=True),
}


def compiled(plan: Plan, channels: int, configuration: Configuration, capability: int, ess: bool = False):
    constants = kernel_constants(plan, channels, configuration, ess)
    types = {name: TYPES.get(name, "i32") for name in posterior_kernel.arg_names}
    return _compiled(posterior_kernel, types, constants, capability, configuration.warps, configuration.stages)


def _compiled(kernel, types: dict[str, str], constants: dict, capability: int, warps: int, stages: int):
    """The kernel as the engine calls it: aligned pointers, sizes that are not specialised."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): x for n, x in constants.items()}, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


_BYTES = {"images": "*u8", "windows": "*i16", "least": "*i32", "about": "*i32", "top": "*i32", "scores": "*i32"}
PRUNED_TYPES = {
    **dict.fromkeys(("logs", "size", "competing", "facts", "budget", "units", "found", "model", "sums"), "*fp32"),
    **dict.fromkeys(("centre", "bits", "images", "windows", "least", "about", "top", "scores"), "*fp32"),
    **dict.fromkeys(("cells", "taken", "start", "shift", "block_cell", "block_visits"), "*i32"),
    **dict.fromkeys(("ids", "first", "known", "order", "block_first", "top_id", "listed"), "*i64"),
    "climb": "*fp64",
    "allowed": "*u8",
    "certain_from": "fp32",
}
"""Of the arguments of `pruned`'s kernels, for images of floats."""
PRUNED_VARIANTS = (
    {"C": 3, "K": 7, "POWERS": 2, "NV": 16, "BYTES": True, "ALLOWED": False, "MOMENTS": False},
    {"C": 3, "K": 17, "POWERS": 4, "NV": 16, "BYTES": True, "ALLOWED": True, "MOMENTS": True},
    {"C": 16, "K": 3, "POWERS": 2, "NV": 64, "BYTES": False, "ALLOWED": False, "MOMENTS": False},
)


def compiled_pruned(name: str, variant: int, capability: int):
    """Kernel `name` of `pruned`, as gpu.py starts it for bytes, for moments of bytes, or for floats of 16 channels."""
    from patchscore.engines.pruned import gpu, kernels

    kernel, constants, warps = getattr(kernels, f"{name}_kernel"), dict(PRUNED_VARIANTS[variant]), 4
    types = PRUNED_TYPES | (_BYTES if constants["BYTES"] else {})
    if name == "plan":
        constants = {"NF": 16, "BH": gpu.CELLS}
    elif name == "score":
        constants = {key: constants[key] for key in ("C", "K", "BYTES", "ALLOWED")} | {"BW": 64, "BD": 32}
    else:
        constants |= {"KNOWN": gpu.KNOWN, "BV": gpu.VISITS, "BW": gpu.WINDOWS, "BD": 32}
        warps = gpu.warps(constants["NV"])
    arguments = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    return _compiled(kernel, arguments, constants, capability, warps, 3)


def resources(kernel) -> tuple[dict, str]:
    usage, sass = disassembled(kernel.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "wgmma": sum(m.startswith("HGMMA") for _, m, _ in instructions(sass)),
        "mma": sum(m.startswith("HMMA") for _, m, _ in instructions(sass)),
        "tcgen05": sum(m.startswith("UTCHMMA") for _, m, _ in instructions(sass)),
    }, sass


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


def loop_over_patches(sass: str, blocks: int, pairs: float) -> tuple[collections.Counter[str], int]:
    """Instructions of the loop over patches, by mnemonic; how many a skipped tile runs.

    It is the loop with an exponential for each of a lane's `pairs`, but for the polynomial's, and the fewest besides:
    those of a running maximum, which the pilot and a tile done again have too, fade sums by one more. A skipped tile
    takes every long jump forward inside the loop. An inner loop with products runs `blocks` times.
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

    weighing = [part for part in loops if exponentials(part) >= pairs]
    loop = min(weighing, key=lambda part: (exponentials(part), len(part)))
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


def per_pair(sass: str, configuration: Configuration, blocks: int) -> dict[str, float]:
    """Instructions of the loop over patches, of one lane and pair."""
    pairs = configuration.queries * configuration.patches / (32 * configuration.warps)  # of one lane and tile
    weighed = pairs * (1 - 1 / configuration.cubic) if configuration.cubic else pairs
    counts, skipped = loop_over_patches(sass, blocks, weighed)

    def total(*prefixes: str) -> int:
        return sum(count for mnemonic, count in counts.items() if mnemonic.startswith(prefixes))

    return {
        "per_pair": sum(counts.values()) / pairs,
        "per_pair_of_a_skipped_tile": skipped / pairs,
        "exponentials_per_pair": total("MUFU.EX2") / pairs,
        "multiply_adds_per_pair": total("FFMA", "FMUL", "FADD") / pairs,
        "maxima_per_pair": total("FMNMX") / pairs,
        "conversions_per_pair": total("F2F") / pairs,
    }


def programs(row: dict) -> int:
    """A multiprocessor's, as far as registers, shared memory and threads go."""
    threads = 32 * row["warps"]
    registers = -(-row["registers"] // 8) * 8 * threads
    shared = (SHARED_LIMIT[row["capability"]] + 1024) // (row["shared_bytes"] + 1024)
    return min(REGISTERS // registers, shared, THREADS // threads)


def l2_bytes(plan: Plan, configuration: Configuration, values: int) -> float:
    """Of a pair: rows and values once a tile of queries, queries again for every tile where columns come in blocks."""
    again = 2 * plan.columns / configuration.patches if configuration.block else 0
    return 2 * (plan.columns + values) / configuration.queries + again


def report(
    title: str, plan: Plan, configuration: Configuration, capability: int, ess: bool = False, channels: int = 3
) -> dict:
    """Of the kernel of `fused`."""
    used, sass = resources(compiled(plan, channels, configuration, capability, ess))
    values = kernel_constants(plan, channels, configuration, ess)["NV"]
    row = {
        "plan": title,
        "columns": plan.columns,
        "capability": capability,
        "tile": f"{configuration.queries} x {configuration.patches}",
        "warps": configuration.warps,
        "stages": configuration.stages,
        "block": configuration.block,
        "cubic": configuration.cubic if plan.pilot else 0,
        "ess": ess,
        "l2_bytes_per_pair": l2_bytes(plan, configuration, values),
        **used,
        **per_pair(sass, configuration, plan.columns // configuration.block if configuration.block else 1),
    }
    if not plan.skip:
        row["per_pair_of_a_skipped_tile"] = None
    return row | {"programs": programs(row)} | ceilings(row, configuration, values)


def ceilings(row: dict, configuration: Configuration, values: int) -> dict[str, float]:
    """Pairs a second an H200 could do if one unit alone bound it; `values` columns count as 32 (wgmma's A side)."""
    per_second = H200["clock"] * H200["multiprocessors"]
    return {
        "exponential_ceiling": H200["exponentials"] * per_second / row["exponentials_per_pair"],
        "issue_ceiling": H200["lanes"] * per_second / row["per_pair"],
        "matrix_ceiling": H200["products"] * per_second / (row["columns"] + max(values, 32)),
    }


def jobs(capabilities: Sequence[int], ess: bool) -> list[tuple[str, Plan, Configuration, int, bool]]:
    return [
        (title, plan, configuration, capability, ess)
        for capability in capabilities
        for title, plan in PLANS.items()
        for configuration in configurations(plan, divmod(capability, 10), ess)
    ]


def show(row: dict) -> None:
    fits = row["shared_bytes"] <= SHARED_LIMIT[row["capability"]]
    what = row.get("plan") or f"{row['kernel']} {row.get('variant', '')}"
    tile = f"{row['tile']:>9} {row['warps']}w {row['stages']}st" if "tile" in row else ""
    loop = f"instr/pair={row['per_pair']:.2f} exp/pair={row['exponentials_per_pair']:.2f}" if "per_pair" in row else ""
    print(
        f"sm_{row['capability']} {what:64} K={row.get('columns', ''):4} {tile} regs={row['registers']} "
        f"spilled={row['spilled_bytes']} shared={row['shared_bytes']}{'' if fits else ' TOO MUCH'} "
        f"wgmma={row['wgmma']} mma={row['mma']} programs={row.get('programs', '')} {loop}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--suffix", default="", help="of the files in benchmarks/results")
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--ess", action="store_true", help="`fused` with the effective sample size")
    parser.add_argument("--no-json", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(report, *zip(*jobs(options.capabilities, options.ess), strict=True)):
            rows.append(row)
            show(row)
    if not options.no_json:
        name = f"fused_compile{options.suffix}"
        record.write(name, __doc__.splitlines()[0], triton=triton.__version__, h200=H200, rows=rows)


if __name__ == "__main__":
    main()
