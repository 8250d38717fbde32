"""Every kernel and configuration compiled ahead of time for sm_80, sm_90 and sm_100, and what the compiler made of it.

No GPU is needed: Triton's own ptxas, cuobjdump and nvdisasm do it. For each: registers, spills, shared memory, matrix
instructions, and of the two that multiply the instructions of the loop over patches counted per (query, patch) pair and
lane, from which the ceilings follow. Writes benchmarks/results/fused_compile.json and pruned_compile.json.
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
from patchscore.engines.pruned import device_index as lists_rows
from patchscore.engines.pruned import kernels as lists
from patchscore.engines.pruned import recheck as lists_recheck
from patchscore.engines.pruned import triton as pruned_cuda

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
LISTS_TYPES = {
    **dict.fromkeys(("q", "p", "v"), "*fp16"),
    **dict.fromkeys(("cell_first", "block_first", "block_end", "item", "first_tile", "first_item"), "*i64"),
    **dict.fromkeys(("slot", "first_slot", "promising", "picked", "ids", "window"), "*i64"),
    **dict.fromkeys(("place", "offered", "beside"), "*i64"),
    **dict.fromkeys(("order", "cell_size", "cell_turn", "block_key", "query", "take", "cell", "counts"), "*i32"),
    **dict.fromkeys(("family", "n_slots", "geometry"), "*i32"),
    **dict.fromkeys(("total", "distance", "stands_for", "met", "own"), "*fp64"),
    **dict.fromkeys(("first_cell", "end_cell", "n_queries", "n_parents"), "i32"),
    **dict.fromkeys(("bits", "floor", "value_unit", "blur"), "fp32"),
    "images": "*u8",
}
"""Of the arguments of kernels/lists.py; all others are *fp32."""

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


# Kernels of the pruned engine, with the constants of an index of colour images at k = 7 unless said.
LISTS = {
    "foresee": {"K": 96, "BK": pruned_cuda.FORESEEN_AXES, "BQ": pruned_cuda.PLANNED},
    "allocate": {"QUANTUM": pruned_cuda.QUANTUM, "BP": pruned_cuda.TILE, "BC": 256},
    "list": {"QUANTUM": pruned_cuda.QUANTUM, "NM": 8, "BC": 256},
    "sum": {"C": 3, "NV": 16, "NM": 8, "BI": 128},
    "pick": {"KA": 64, "KB": 0, "BP": pruned_cuda.TILE, "BT": 32, "COUNTED": True, "ORDERED": True},
    "distance": {"R": 64, "C": 3, "H": 32, "W": 32, "SIZE": 7, "BYTES": True, "BR": 16, "BD": 64},
}
for windows, guided in ((128, True), (576, True), (320, False)):
    of_samples = {"R": windows, "C": 3, "BR": 1 << (windows - 1).bit_length(), "GUIDED": guided}
    LISTS[f"correct, {windows} windows"] = of_samples
for axes, rank, k in ((27, 28, 3), (60, 60, 7), (125, 128, 11), (253, 256, 17)):
    of_proposals = {"R": 4 * lists_recheck.PROPOSED, "SIZE": k, "A": axes, "RANK": rank, "BD": 16}
    LISTS[f"propose, {axes} axes"] = LISTS["distance"] | of_proposals | {"BA": lists_recheck.axes_block(axes)}


def list_types(name: str, arguments: list[str]) -> dict[str, str]:
    types = {argument: LISTS_TYPES.get(argument, "*fp32") for argument in arguments}
    if name in ("allocate", "list"):
        return types | {"floor": "*fp32"}  # a number elsewhere
    if name == "correct":
        return types | {"sums": "*fp64", "result": "*fp64"}
    return types | {"q": "*fp32"} if name == "foresee" else types


def compiled_list(name: str, constants: dict, capability: int, warps: int = 4, stages: int = 3):
    kernel = getattr(lists, f"{name}_kernel")
    types = list_types(name, kernel.arg_names)
    return _compiled(kernel, types, constants, capability, warps, stages)


def scan_constants(columns: int, configuration: Configuration, **variant: bool) -> dict:
    larger = 1 << (columns.bit_length() - 1)
    flags = {"COUNTED": False, "ORDERED": False, "PILOT": False} | variant
    return {
        "KA": larger,
        "KB": columns - larger,
        "NV": lists_rows.value_columns(3),
        "BQ": configuration.queries,
        "BP": configuration.patches,
        **flags,
    }


def report_list(name: str, capability: int) -> dict:
    """Of a kernel without a matrix product."""
    constants, of = LISTS[name], name.partition(",")[0]
    warps = {"sum": 1, "pick": 1}.get(of, 4)
    if of == "propose":
        warps = lists_recheck.proposal_warps(constants["BA"])
    elif of == "correct":
        warps = lists_recheck.correction_warps(constants["BR"])
    kernel = compiled_list(of, constants, capability, warps)
    return {"kernel": name, "capability": capability} | resources(kernel)[0]


def report_scan(columns: int, configuration: Configuration, capability: int, variant: str = "") -> dict:
    """Of the pruned engine's scan; `variant` COUNTED, ORDERED or PILOT."""
    flags = {variant: True} if variant else {}
    constants = scan_constants(columns, configuration, **flags)
    kernel = compiled_list("scan", constants, capability, configuration.warps, configuration.stages)
    used, sass = resources(kernel)
    row = {"kernel": "scan", "variant": variant, "columns": columns, "capability": capability}
    row |= {"tile": f"{configuration.queries} x {configuration.patches}", "warps": configuration.warps}
    row |= {"stages": configuration.stages} | used
    if variant == "PILOT":  # no exponentials to tell its loop by
        return row
    row |= per_pair(sass, configuration, 1)
    # Both sums read the same values.
    return row | ceilings(row, configuration, 2 * max(constants["NV"], 32))


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

    It is the loop with an exponential for each of a lane's `pairs` and the fewest besides: those of a running maximum,
    which the pilot and a tile done again have too, fade sums by one more. A skipped tile takes every long jump forward
    inside the loop. An inner loop with products runs `blocks` times.
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
    counts, skipped = loop_over_patches(sass, blocks, pairs)

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
        for configuration in configurations(plan, divmod(capability, 10))
    ]


def scan_jobs() -> list[tuple[int, Configuration, int, str]]:
    return [
        (columns, configuration, capability, variant)
        for capability in (90, 80)
        for columns in lists_rows.COLUMNS
        for configuration in pruned_cuda.configurations(columns, divmod(capability, 10))
        for variant in ("", "COUNTED", "ORDERED", "PILOT")
        if not variant or columns == 64
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
    parser.add_argument("--only", choices=["fused", "pruned"], help="kernels of one engine")
    parser.add_argument("--suffix", default="", help="of the files in benchmarks/results")
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--ess", action="store_true", help="`fused` with the effective sample size")
    parser.add_argument("--no-json", action="store_true", help="print only")
    options = parser.parse_args()
    small = [(name, capability) for capability in (90, 80) for name in LISTS]
    work = {
        "fused": [(report, jobs(options.capabilities, options.ess))],
        "pruned": [(report_scan, scan_jobs()), (report_list, small)],
    }
    for engine, tasks in work.items():
        if options.only not in (None, engine):
            continue
        rows = []
        with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
            for of, todo in tasks:
                for row in pool.map(of, *zip(*todo, strict=True)):
                    rows.append(row)
                    show(row)
        if not options.no_json:
            name = f"{engine}_compile{options.suffix}"
            record.write(name, __doc__.splitlines()[0], triton=triton.__version__, h200=H200, rows=rows)


if __name__ == "__main__":
    main()
