"""Instructions a pair takes in the CUDA kernel, counted in its machine code, and the rate an H200 could reach by them.

Needs no GPU: nvcc compiles csrc/sliding/sliding.cu for sm_90, nvdisasm (of the CUDA toolkit, or triton's) lists it, and
the basic blocks of the loop over windows are told apart by what is in them. Circular, 32 x 32, every window weighed;
then the kernels of whole images; then registers, spills and blocks a multiprocessor of every kernel on sm_80, sm_90 and
sm_100. Writes benchmarks/results/sliding_cuda_sass.json, from which tests/emulated.py takes the registers.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import record
import torch

import patchscore as ps
from patchscore.engines.sliding import cuda

SIZE = 32
TARGETS, COUNTED = ("sm_80", "sm_90", "sm_100"), "sm_90"
REGISTERS, THREADS = 65536, 256  # of a multiprocessor; of a block
CLOCK, SMS = 1.98e9, 132  # an H200 at its boost clock
ISSUE = 4 * 32 * SMS * CLOCK  # lanes of instructions a second
SHARED = 32 * SMS * CLOCK  # lanes of 4-byte shared memory accesses
EXPONENTIALS = 16 * SMS * CLOCK
MEMORY = 4.8e12  # bytes a second
PRODUCTS = 4 * SMS * CLOCK / 4  # products of 16 x 8 x 32 bytes at the full rate; mma.sync may reach less


def blocks(sass: str, kernel: str) -> list[tuple[str, list[str]]]:
    """(label, instructions) of every basic block of a kernel."""
    section = next(part for part in re.split(r"\.section\s+\.text\.", sass)[1:] if kernel in part.split(",")[0])
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            found.append((label[1], []))
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            found[-1][1].append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]).strip())
    return found


def names(block: list[str]) -> Counter:
    return Counter(instruction.split()[0].split(".")[0] for instruction in block)


def parts(sass: str, values: int) -> dict[str, Counter]:
    """The loop over window rows in parts: what a row costs, a step of products sliding, and the first window's rows."""
    found = blocks(sass, f"windows_kernelILi1ELi{values}ELb0E")
    counts = [names(block) for _, block in found]
    products = [i for i, count in enumerate(counts) if count["IMMA"]]
    assert len(products) == 2, "one loop of products slides, the other begins a run"
    average = next(i for i, count in enumerate(counts) if count["FFMA"] > 30 and count["LDG"] >= 8)
    # The loop ends where it branches back, at or after the barrier.
    labels = {label: i for i, (label, _) in enumerate(found)}
    end, head = next(
        (i, labels[target[1]])
        for i in range(average, len(found))
        for instruction in found[i][1]
        if (target := re.match(r"BRA `\((\.L_x_\d+)\)", instruction)) and labels.get(target[1], i) < products[0]
    )
    begins = next(i for i in range(head, end) if counts[i]["CS2R"] + counts[i]["IMAD"] > 20 and i not in products
                  and not counts[i]["MUFU"] and products[0] < i < products[1])  # fmt: skip
    row = Counter()
    for i in range(head, end + 1):
        rare = counts[i]["FSETP"] >= 9 or (counts[i]["FSEL"] == 8 and not counts[i]["MUFU"])
        if not rare and i not in products and not begins <= i < products[1]:
            row += counts[i]
    first = sum((counts[i] for i in range(begins + 1, products[1])), Counter())
    return {"row": row, "sliding": counts[products[0]], "beginning": counts[products[1]], "first": first}


def rates(part: dict[str, Counter], k: int, channels: int) -> dict[str, float]:
    """Per pair at patch size k: lanes of instructions, shared memory accesses, products; and pairs/s by each limit."""
    windows = SIZE - k + 1
    steps = math.ceil(k / 4) * math.ceil(channels / 4)
    pairs = 16 * windows / (8 * math.ceil(windows / 8))  # a lane's, in a row of windows
    rows_at_first = (k + 1) // 2

    def per_pair(amount) -> float:
        sliding = (windows - 1) * steps * amount(part["sliding"])
        beginning = rows_at_first * (amount(part["first"]) + steps * amount(part["beginning"]))
        return (amount(part["row"]) + (sliding + beginning) / windows) / pairs

    instructions = per_pair(lambda count: count.total())
    shared = per_pair(lambda count: count["LDS"] + count["STS"])
    products = per_pair(lambda count: count["IMMA"])
    limits = {
        "issue": ISSUE / instructions,
        "shared": SHARED / shared,
        "products": PRODUCTS * 32 / products,
        "exponentials": EXPONENTIALS,
    }
    return {
        "k": k,
        "channels": channels,
        "instructions_per_pair": instructions,
        "shared_accesses_per_pair": shared,
        "products_per_pair": products,
        **{f"limit_{name}": limit for name, limit in limits.items()},
        "predicted_pairs_per_second": min(limits.values()),
        "measured_pairs_per_second": "not measured",
    }


def whole_images(sass: str) -> dict[str, float]:
    """Values of training images a second in the kernels of whole images, by instruction issue; memory gives MEMORY."""
    counts = [names(block) for _, block in blocks(sass, "products_kernelILb1")]
    step = next(count.total() for count in counts if count["IMMA"])
    counts = [names(block) for _, block in blocks(sass, "average_kernelIhLi4")]
    image = max(count.total() for count in counts if count["FFMA"] >= 32)
    return {
        "instructions_per_value_of_products": step / (32 * 64 / 32),  # a warp: 32 images, 64 values each, of 16 items
        "instructions_per_value_of_averages": image / 4,  # a lane: 4 values of an image, for 8 items
        "limit_products": ISSUE / (step / 64),
        "limit_averages": ISSUE / (image / 4),
        "limit_memory": MEMORY,
        "measured_values_per_second": "not measured",
    }


def compiled(target: str, cubin: Path) -> list[dict]:
    """Registers, spilled bytes and blocks a multiprocessor (by registers) of every kernel."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-cubin", "-Xptxas", "-v", "-o", str(cubin)]
    source = str(record.ROOT / "csrc" / "sliding" / "sliding.cu")
    report = subprocess.run([*command, source], capture_output=True, text=True, check=True).stderr
    report = subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout
    entry = r"entry function '(?:void )?patchscore::(.*?)\(.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(entry, report, re.DOTALL)
    return [
        {
            "kernel": name,
            "target": target,
            "registers": int(registers),
            "spilled": int(spilled),
            "blocks": REGISTERS // (THREADS * -(-int(registers) // 8) * 8),
        }
        for name, spilled, registers in found
    ]


def shared_bytes(k: int, channels: int) -> int | None:
    """Shared memory of a block of the windows kernel, circular, 32 x 32; None where the library was not built."""
    if cuda.library is None:
        return None
    bank = ps.PatchBank(torch.zeros(1, channels, SIZE, SIZE, dtype=torch.uint8))
    (group,) = ps.EquivariantLocalScore(bank, k, padding_mode="circular").competition(k).groups
    task = cuda._Windows(
        channel_quads=-(-channels // 4), planes=1, values_per_pixel=channels, height=SIZE, width=SIZE, patch_size=k,
        circular=1, rows=cuda._axis(group.rows), cols=cuda._axis(group.cols), strip=min(cuda.STRIP, SIZE),
    )  # fmt: skip
    return cuda.library.patchscore_shared_bytes(ctypes.byref(task))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvdisasm", default="nvdisasm", help="the disassembler of the CUDA toolkit")
    options = parser.parse_args()
    kernels: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            cubin = Path(folder) / target
            kernels += compiled(target, cubin)
            if target == COUNTED:
                command = [options.nvdisasm, "-c", str(cubin)]
                sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [
        rates(parts(sass, channels), k, channels) | {"shared_bytes": shared_bytes(k, channels)}
        for channels in (1, 3, 4)
        for k in range(3, 18, 2)
    ]
    print(whole_images(sass))
    for row in rows:
        print(f"C={row['channels']} k={row['k']:2}: {row['instructions_per_pair']:.1f} instructions,"
              f" {row['shared_accesses_per_pair']:.1f} shared, {row['products_per_pair']:.2f} products a pair;"
              f" {row['predicted_pairs_per_second'] / 1e12:.2f}e12 pairs/s predicted")  # fmt: skip
    record.write(
        "sliding_cuda_sass",
        "instructions a pair, counted in the machine code for sm_90; rates are predictions for an H200, not measured",
        kernels=kernels,
        rows=rows,
        whole_images=whole_images(sass),
    )


if __name__ == "__main__":
    main()
